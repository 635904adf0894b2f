"""The tap: hooks that record the encoder's maps in training, and the projection heads for these maps."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from contextrast_kernels import checks
from contextrast_kernels.attach.trace import Layer, grid, image_of, tensors
from contextrast_kernels.modules import ProjectionHead

NAME = "contextrast_heads"
"""The name under which a tap is registered in its model."""

_WEIGHTS = (1.0, 0.7, 0.4, 0.1)


class FeatureTap(nn.Module):
    """The tapped layers of a model and their projection heads: what ``attach`` returns.

    ``layers`` describes the tapped layers, ``heads`` projects their maps, and ``doubt`` is a sentence about what is not
    certain, or "". Maps are recorded only in training mode with gradients on, from the start to the end of the model's
    forward. Evaluation therefore keeps no memory, and activation checkpointing, which runs a layer again, records
    nothing. A deep copy of the model has its own tap.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], dim: int, doubt: str = ""):
        super().__init__()
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
        self.layers = list(layers)
        self.doubt = doubt
        self.heads = nn.ModuleList(
            ProjectionHead(layer.channels, dim, spatial_dims=len(layer.size)) for layer in layers
        )
        self.heads.to(like.device, like.dtype)
        self._model = [model]  # in a list, because a module attribute would be registered as a child
        self._maps: list[tuple | None] | None = None
        self._image: tuple[int, ...] | None = None
        self._open = False
        self._why_empty = (
            "the model has not run since attach(). Call model(images), not model.forward(images) or its parts"
        )
        modules = dict(model.named_modules())
        self._handles = []
        try:
            self._handles.append(model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for i, layer in enumerate(layers):
                self._handles.append(modules[layer.module].register_forward_hook(_Recorder(self, i)))
            self._handles.append(model.register_forward_hook(self._end))
            self._handles.append(model.register_forward_hook(self._fail, always_call=True))
            model.add_module(NAME, self)
            self.train(model.training)
        except BaseException:
            self.detach()
            raise

    def features(self) -> list[Tensor]:
        """Projects the maps of the last training forward: (B, D, h_i, w_i), from high to low resolution.

        For volumes they are (B, D, z_i, h_i, w_i). The heads run in the precision of the layers. The recorded maps are
        released: call this once for each forward and keep the list.

        Raises:
            RuntimeError: nothing was recorded, or the recorded maps cannot train the encoder; the error says why.
        """
        if not self._model:
            raise RuntimeError("features(): this tap was detached from its model. Call attach(model) again.")
        if self._maps is None:
            raise RuntimeError(f"features(): nothing was recorded: {self._why_empty}.")
        maps, self._maps = self._maps, None
        self._why_empty = (
            "the maps of the last forward were taken already. Call features() once for each model(images) and keep "
            "the list that it returns"
        )
        return [self._project(i, recorded) for i, recorded in enumerate(maps)]

    def _project(self, i: int, recorded: tuple | None) -> Tensor:
        layer = self.layers[i]
        head: Any = self.heads[i]
        if recorded is None:
            raise RuntimeError(
                f"features(): layer {layer.name!r} gave no feature map in the last forward. Either the model did not "
                "call it: choose a different layer. Or it was replaced after attach(), as convert_sync_batchnorm does: "
                "convert first. Or the model was compiled before attach(): attach, then compile. Or this is a copy "
                "made through a module that registers a part before the model: register the model before its parts."
            )
        x, version, dtype = recorded
        if version is not None and x._version != version:
            raise RuntimeError(
                f"features(): layer {layer.name!r} was overwritten in place after it was recorded. Tap the module that "
                "writes into it, such as the ReLU(inplace=True) behind it, or make that one inplace=False."
            )
        if not x.requires_grad:
            raise RuntimeError(
                f"features(): layer {layer.name!r} carries no gradient, so the loss cannot train the encoder. Leave it "
                "out of layers, unfreeze it, take it out of torch.no_grad, or checkpoint with use_reentrant=False."
            )
        if head[0].weight.ndim != 2 + len(layer.size):
            raise RuntimeError(
                f"features(): expected whole projection heads, got a weight {checks.describe(head[0].weight)}, as "
                "FullyShardedDataParallel leaves it after its forward. Compute the loss inside the wrapped module's "
                "forward."
            )
        if hasattr(head[0].weight, "to_local") and not hasattr(head, "unshard"):
            raise RuntimeError(
                "features(): expected whole projection heads, got sharded ones: FSDP shards the parameters again after "
                "the forward. Call fully_shard(head) for each head in tap.heads before fully_shard(model)."
            )
        x = _as_map(x, layer, self._image)
        if dtype is None:
            x = x.to(head[0].weight.dtype)
        if x.device.type == "meta":  # torch.autocast refuses it
            return head(x)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return head(x)

    def detach(self) -> None:
        """Remove hooks and heads, so that the model is as before ``attach``. A second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._maps = None
        for model in self._model:
            if model._modules.get(NAME) is self:
                delattr(model, NAME)
        self._model = []

    def table(self) -> str:
        """Describe each tapped layer in a line: name, stride, channels, size for the example, layout. Hints follow."""
        rows = [("layer", "stride", "channels", "size", "layout")]
        for layer in self.layers:
            stride = str(layer.stride) if len(set(layer.strides)) == 1 else " x ".join(map(str, layer.strides))
            notes = [layer.layout]
            if layer.overwritten:
                notes.append("copied: overwritten later")
            if layer.calls > 1:
                notes.append(f"called {layer.calls} times: the last call is used")
            rows.append((layer.name, stride, str(layer.channels), " x ".join(map(str, layer.size)), ", ".join(notes)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if self.doubt:
            lines.append(f"{self.doubt} To choose others, call ck.attach(model, layers=[...]).")
        if len(self.layers) != len(_WEIGHTS):
            weights = (*_WEIGHTS, *(_WEIGHTS[-1],) * len(rows))[: len(self.layers)]
            lines.append(f"{len(self.layers)} layers: give the loss as many layer_weights, such as {weights}")
        return "\n".join(lines)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "model: expected one copy of it in each process, got a replica of nn.DataParallel, whose threads share "
                "one tap. Use DistributedDataParallel."
            )
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
            return  # in a backward pass: checkpointing of the whole model runs its forward again
        self._open = self.training and torch.is_grad_enabled()
        self._maps = [None] * len(self.layers) if self._open else None
        if not self._open:
            mode, remedy = (
                ("under torch.no_grad", "Train with gradients on")
                if self.training
                else ("in evaluation mode", "Call model.train(), and freeze normalisation layers one by one")
            )
            self._why_empty = f"the last forward ran {mode}. {remedy}"
        image = image_of(args, kwargs)
        self._image = None if image is None else tuple(image[2:])

    def _record(self, i: int, output) -> None:
        if not self._open or self._maps is None:
            return
        layer = self.layers[i]
        x = dict(tensors(output)).get(layer.path)
        if x is None:
            return
        if layer.overwritten:
            x = x.clone()
        device, dtype = x.device.type, None
        if device != "meta" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # Compiled code has no version counters. There only maps are copied that the example's forward overwrote.
        self._maps[i] = (x, None if torch.compiler.is_compiling() else x._version, dtype)

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        self._open = False

    def _fail(self, model: nn.Module, args: tuple, output) -> None:
        # This hook runs after every forward. After one that raised, it is the only one.
        if self._open:
            self._open, self._maps = False, None
            self._why_empty = "the last forward raised an exception. Call model(images) again"

    def forward(self, x):
        """Return ``x``. If the model is an nn.Sequential, the tap is one of its children and is called."""
        return x

    def __prepare_scriptable__(self):
        raise RuntimeError(
            "torch.jit.script: expected a plain model, got one with a tap, whose hooks cannot be scripted. Call "
            "tap.detach() first, or script a copy: twin = copy.deepcopy(model); twin.contextrast_heads.detach()."
        )

    def extra_repr(self) -> str:
        return self.table()

    def __getstate__(self):
        # What was recorded belongs to one forward and cannot be copied or pickled.
        why = "this copy of the model has not run. Call it on images"
        return {**self.__dict__, "_maps": None, "_open": False, "_why_empty": why}


class _Recorder:
    """The forward hook of one layer."""

    def __init__(self, tap: FeatureTap | None, i: int):
        self.tap = tap
        self.i = i

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        if self.tap is not None:
            self.tap._record(self.i, output)

    def __deepcopy__(self, memo: dict) -> "_Recorder":
        # A copy of the model gets its own tap. A copy of a part, such as a teacher's encoder, must not copy the model.
        whole = self.tap is not None and id(self.tap._model[0]) in memo
        return _Recorder(copy.deepcopy(self.tap, memo) if whole else None, self.i)


def split_heads(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the state dict of an attached model into that of the plain model and that of the projection heads.

    The state may be that of a wrapped model. What DDP and torch.compile add to the names, ``module.`` and
    ``_orig_mod.``, is removed. A different prefix, such as the attribute of a LightningModule, stays.

    Args:
        state_dict: the result of ``model.state_dict()`` while the model was attached, or a saved one.

    Returns:
        The plain model's state, for ``model.load_state_dict``, and that of the heads, for ``tap.load_state_dict``.

    Raises:
        TypeError, ValueError: state_dict is not a mapping of names to tensors, or it is a checkpoint that holds one.

    Examples:
        >>> state, heads = ck.split_heads(torch.load("checkpoint.pt"))
        >>> model.load_state_dict(state)
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict: expected a mapping of names to tensors, got {checks.describe(state_dict)}. "
            "Pass model.state_dict() or a loaded checkpoint."
        )
    for name, value in state_dict.items():
        if isinstance(value, Mapping) and any(f".{NAME}." in f".{inner}" for inner in value):
            raise ValueError(
                f"state_dict: expected a mapping of names to tensors, got a checkpoint that holds one. "
                f"Pass checkpoint[{name!r}]."
            )
    names = {name: name.replace("_orig_mod.", "") for name in state_dict}
    wrapped = all(name.startswith("module.") for name in names.values())
    model, heads = {}, {}
    for name, value in state_dict.items():
        short = names[name].removeprefix("module.") if wrapped else names[name]
        _, found, after = f".{short}".rpartition(f".{NAME}.")
        if found:
            heads[after] = value
        else:
            model[short] = value
    return model, heads


def _as_map(x: Tensor, layer: Layer, image: tuple[int, ...] | None) -> Tensor:
    """A view of ``x`` as (B, C, h, w) or (B, C, z, h, w), whatever the layout."""
    dims = len(layer.size)
    if layer.layout.endswith("C") and x.ndim == 2 + dims:
        x = x.movedim(-1, 1)
    elif layer.layout == "tokens" and x.ndim == 3:
        sides = None if image is None else grid(x.shape[1] - layer.prefix, image, layer.stride)
        if sides is None:
            pixels = " x ".join([str(layer.stride)] * dims)
            raise ValueError(
                f"features(): layer {layer.name!r}: expected a token for each {pixels} pixels, got "
                f"{checks.describe(x)} for an image of {image}. Make its sides multiples of {layer.stride}."
            )
        x = x[:, layer.prefix :].transpose(1, 2).unflatten(2, sides)
    if x.ndim != 2 + dims or x.shape[1] != layer.channels:
        raise ValueError(
            f"features(): layer {layer.name!r}: expected {layer.channels} channels in {layer.layout}, as with the "
            f"example_input of attach(), got {checks.describe(x)}. Attach with an example like the training's input."
        )
    return x
