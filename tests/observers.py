"""What PyTorch does while a function runs: the ops that it dispatches, copies between devices, graphs compiled."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Dispatched(TorchDispatchMode):
    """Counts dispatched ops, and refuses those whose result depends on values the host would have to wait for."""

    WAITING = frozenset(
        {
            "aten::_local_scalar_dense",
            "aten::is_nonzero",
            "aten::equal",
            "aten::nonzero",
            "aten::nonzero_numpy",
            "aten::masked_select",
            "aten::unique_dim",
            "aten::_unique",
            "aten::_unique2",
            "aten::unique_consecutive",
            "aten::bincount",
            "aten::argwhere",
            "aten::allclose",
            "aten::histogram",
            "aten::one_hot",
        }
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name, kwargs or {}
        assert name not in self.WAITING, f"{name} makes the host wait for the device"
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a mask makes the host wait for the device"
        if name == "aten::repeat_interleave":
            assert kwargs.get("output_size") is not None, "repeat_interleave without output_size makes the host wait"
        self.count += 1
        return func(*args, **kwargs)


class Crossings(TorchDispatchMode):
    """The ops whose inputs and outputs are on more than one kind of device."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.device.type for t in tensors}) > 1:
            self.seen.append(str(function))
        return out


class Compilations:
    """A backend that counts how often Dynamo hands it a graph, and runs aot_eager."""

    def __init__(self):
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)
