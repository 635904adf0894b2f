"""Record one forward of a model: the feature maps of its modules, and which operation reads which result."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from contextrast_kernels import checks

_PREFIXES = (0, 1, 2, 5)
"""Numbers of tokens before those of the pixels: none, class, class and distillation, class and four registers."""

_PRODUCTS = ("convolution", "addmm", "mm", "bmm", "baddbmm", "linear")
_SHAPERS = ("batch_norm", "layer_norm", "group_norm", "relu", "gelu", "silu", "elu", "swish", "hardtanh", "mish")
"""Normalisations and activations, by a part of the operation's name."""
_RISES = ("upsample", "unpool", "pixel_shuffle", "grid_sampler", "col2im")

_Reading = tuple[str, int, tuple[int, ...], tuple[int, ...], int]
"""Layout, channels, size, strides and prefix of a tensor read as a feature map."""

IMAGE = 0
"""The node of the images themselves."""


@dataclass(frozen=True)
class Layer:
    """A feature map in a module's output: where it comes from, and its shape in the example's forward."""

    name: str
    """``module``, or ``module[key]`` for one map of an output that holds several."""
    module: str
    path: tuple
    layout: str
    """NCHW, NHWC (NCDHW, NDHWC for volumes), or tokens (B, L, C)."""
    channels: int
    size: tuple[int, ...]
    strides: tuple[int, ...]
    """The number of image pixels per pixel of the map, along each spatial axis."""
    prefix: int
    """The number of tokens before the first pixel's."""
    calls: int = 1
    """The number of times that one forward calls the module. The map is that of the last call."""
    overwritten: bool = False
    """True if a later module writes into this tensor, so that the tap keeps a copy."""

    @property
    def stride(self) -> int:
        return max(self.strides)

    @property
    def pixels(self) -> int:
        return math.prod(self.size)


@dataclass
class Call:
    """A module's last call in the forward."""

    module: str
    start: int
    """The number of operations before the call. Its own operations have the numbers ``start`` to ``end`` - 1."""
    end: int
    maps: list[tuple[Layer, int | None]]
    """The maps in its output, each with the node that computed it; None where no graph is recorded."""
    others: dict[str, Layer]
    """By name, the second reading of maps that can be (B, C, h, w) as well as (B, h, w, C)."""
    parametric: bool
    kind: tuple[str, ...]
    """The names of the module's class, of its first child's, and so on."""
    calls: int = 1

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer, _ in self.maps]


@dataclass
class Graph:
    """The operations of a forward that depend on the images, in execution order.

    Each list has an entry for a node. Views are not nodes: a tensor's node is the last operation that wrote its memory.
    """

    sources: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    """The nodes whose results the operation reads."""
    parameters: list[int] = field(default_factory=lambda: [0])
    """The number of parameters that it reads."""
    kernel: list[int] = field(default_factory=lambda: [0])
    """The longest side of a convolution's kernel, 1 for other products with parameters, 0 for everything else."""
    shapes: list[bool] = field(default_factory=lambda: [False])
    """True for a normalisation or an activation."""
    pools: list[bool] = field(default_factory=lambda: [False])
    """True for pooling to a fixed size of more than one pixel."""
    rise: list[int] = field(default_factory=lambda: [0])
    """The pixels of the map whose resolution the operation raises; 0 for all other operations."""
    gates: set[int] = field(default_factory=set)
    """The nodes of sigmoids. Raising the resolution of a gate does not end an encoder."""
    joins: set[int] = field(default_factory=set)
    """The nodes of concatenations."""
    outputs: set[int] = field(default_factory=set)
    """The nodes of the model's output."""

    def __len__(self) -> int:
        return len(self.sources)

    def ancestors(self, nodes, stop=frozenset()) -> set[int]:
        """The nodes and everything they depend on, without the nodes in ``stop`` and what only these depend on."""
        found, todo = set(), [n for n in nodes if n not in stop]
        while todo:
            n = todo.pop()
            if n not in found:
                found.add(n)
                todo += [s for s in self.sources[n] if s not in stop]
        return found


class _Recorder(TorchDispatchMode):
    """Records the graph while the model runs."""

    def __init__(self, model: nn.Module, images: list[Tensor]):
        super().__init__()
        self.graph = Graph()
        # A weak reference keeps the storage's address in use but not its data, so no later storage gets this address.
        self._refs: dict[int, StorageWeakRef] = {}
        self._node: dict[int, int] = {}
        self._parameters: dict[int, int] = {}
        for p in model.parameters():
            self._parameters[self._key(p)] = p.numel()
        for x in images:
            self._node[self._key(x)] = IMAGE

    def _key(self, x: Tensor) -> int:
        try:
            storage = x.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse tensors, for example, have no storage
            return id(x)
        if storage._cdata not in self._refs:
            self._refs[storage._cdata] = StorageWeakRef(storage)
        return storage._cdata

    def node(self, x: Tensor) -> int | None:
        """The operation that computed ``x``; None where it does not depend on the images."""
        return self._node.get(self._key(x))

    def mark_rise(self, node: int, pixels: int) -> None:
        self.graph.rise[node] = min(self.graph.rise[node] or pixels, pixels)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        read = {self._key(x): x for _, x in tensors((args, kwargs))}
        written = [x for _, x in tensors(output)]
        if func._schema.is_mutable:
            flat = dict(zip((a.name for a in func._schema.arguments), args)) | kwargs
            for argument in func._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += [x for _, x in tensors(flat.get(argument.name))]
            keys = {self._key(x) for x in written}
        else:
            keys = {self._key(x) for x in written} - read.keys()
        if not keys:
            return output
        sources = tuple(sorted({self._node[key] for key in read if key in self._node}))
        parameters = sum(self._parameters.get(key, 0) for key in read if key not in self._node)
        if sources:
            for key in keys:
                self._node[key] = len(self.graph)
            self._add(func, args, kwargs, sources, parameters, written)
        else:  # a tensor computed from parameters alone, such as a standardised weight, counts as these parameters
            for key in keys:
                self._parameters[key] = parameters
        return output

    def _add(self, func, args, kwargs, sources, parameters, written) -> None:
        graph, name = self.graph, func._schema.name.partition("::")[2].rstrip("_")
        operands = [x for _, x in tensors(args)]
        convolution = "convolution" in name and len(operands) > 1
        kernel = max(operands[1].shape[2:], default=1) if convolution else int(any(name == p for p in _PRODUCTS))
        rise = 0
        if any(part in name for part in _RISES) or (convolution and True in [a for a in args if isinstance(a, bool)]):
            pixels = math.prod(operands[0].shape[2:])
            if written and math.prod(written[0].shape[2:]) > pixels and not graph.gates.issuperset(sources):
                rise = pixels
        if "sigmoid" in name:
            graph.gates.add(len(graph))
        if name == "cat":
            graph.joins.add(len(graph))
        graph.sources.append(sources)
        graph.parameters.append(parameters)
        graph.kernel.append(kernel if parameters else 0)
        graph.shapes.append(any(part in name for part in _SHAPERS))
        graph.pools.append("adaptive" in name and bool(written) and math.prod(written[0].shape[2:]) > 1)
        graph.rise.append(rise)


def tensors(output, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor in a module's output, with the keys that lead to it."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors(value, (*path, key))
    elif isinstance(output, tuple | list):
        for i, value in enumerate(output):
            yield from tensors(value, (*path, i))


def image_of(args: tuple, kwargs: dict) -> torch.Size | None:
    """The shape of the first image or volume among a forward's arguments."""
    for _, x in tensors((args, kwargs)):
        if x.ndim in (4, 5) and (x.is_floating_point() or x.dtype == torch.uint8):
            return x.shape
    return None


def grid(tokens: int, image: tuple[int, ...], stride: int) -> tuple[int, ...] | None:
    """The sides of the map that a sequence of tokens represents. Networks round the sides up or down."""
    for sides in (tuple(math.ceil(n / stride) for n in image), tuple(n // stride for n in image)):
        if math.prod(sides) == tokens > 0:
            return sides
    return None


def _strides(size: tuple[int, ...], image: Sequence[int]) -> tuple[int, ...] | None:
    """The stride along each axis, or None where ``size`` cannot be a feature map's."""
    if not all(0 < n <= side for n, side in zip(size, image)):
        return None
    strides = tuple(max(1, round(side / n)) for n, side in zip(size, image))
    if len(size) == 2:  # one stride for rows and columns, which may differ by a pixel
        (h, w), (H, W) = size, image
        stride = max(1, round(math.sqrt(H * W / (h * w))))
        return (stride, stride) if abs(h * W - w * H) <= H + W else None
    # Volumes may have a different stride along each axis, as in nnU-Net.
    exact = all(abs(side - n * s) < s for n, side, s in zip(size, image, strides))
    return strides if exact and max(strides) <= 8 * min(strides) else None


def _read(x: Tensor, image: torch.Size) -> list[_Reading]:
    """The ways to read a tensor as the images' feature maps: none, one, or two if it has as many channels as rows."""
    B, _, *sides = image
    if x.shape[:1] != (B,):
        return []
    if x.ndim == len(image):
        volume = "D" if len(sides) == 3 else ""
        readings = ((f"NC{volume}HW", x.shape[1], x.shape[2:]), (f"N{volume}HWC", x.shape[-1], x.shape[1:-1]))
        return [
            (layout, c, tuple(size), strides, 0)
            for layout, c, size in readings
            if c > 0 and (strides := _strides(tuple(size), sides)) is not None
        ]
    if x.ndim == 3 and x.shape[2] > 0:
        for prefix in _PREFIXES:
            tokens = x.shape[1] - prefix
            if tokens > 0:
                stride = max(1, round((math.prod(sides) / tokens) ** (1 / len(sides))))
                size = grid(tokens, tuple(sides), stride)
                if size is not None:
                    return [("tokens", x.shape[2], size, (stride,) * len(sides), prefix)]
    return []


def default_example(model: nn.Module) -> Tensor:
    """One black image or volume, with the channels of the first convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    # The sides differ, to tell (B, h, w, C) from (B, C, h, w).
    sides = (64, 96, 64) if isinstance(first, nn.Conv3d) else (256, 320)
    return torch.zeros(1, first.in_channels if first else 3, *sides, device=like.device, dtype=like.dtype)


def watch(model: nn.Module, example, own_example: bool) -> tuple[list[Call], Graph | None, str]:
    """Run one forward with hooks on every module; return its calls in the order in which they ended, and the graph.

    The graph is None if the model does not run while its operations are recorded; the text gives the reason.
    """
    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = tuple(example) if isinstance(example, tuple | list) else (example,), {}
    image = image_of(args, kwargs)
    if image is None:
        raise ValueError(
            "example_input: expected an image (B, C, H, W) or a volume (B, C, D, H, W), of floats or uint8, among the "
            f"model's arguments, got {checks.describe(example)}. Pass one."
        )
    try:
        return *_run(model, args, kwargs, image, record=True), ""
    except Exception as error:
        while_recorded = _reason(error)
    try:  # the recording itself may be the cause: some operations do not support it
        return *_run(model, args, kwargs, image, record=False), while_recorded
    except Exception as error:
        what = f"one black image {tuple(example.shape)}" if own_example else checks.describe(example)
        raise RuntimeError(
            f"example_input: the model cannot run on {what} ({_reason(error)}). "
            "Pass an example_input that it accepts: a tensor, a tuple of arguments or a dict of keywords."
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _run(
    model: nn.Module, args: tuple, kwargs: dict, image: torch.Size, record: bool
) -> tuple[list[Call], Graph | None]:
    calls: dict[str, Call] = {}
    kept = []  # keeps every map until the end of the forward, to see which one is overwritten
    images = [x for _, x in tensors((args, kwargs)) if x.ndim == len(image)]
    recorder = _Recorder(model, images) if record else None
    starts: dict[str, int] = {}

    def enter(name: str, module: nn.Module, inputs) -> None:
        starts[name] = len(recorder.graph) if recorder else 0

    def leave(name: str, module: nn.Module, inputs, keywords, output) -> None:
        found, others = [], {}
        for path, x in tensors(output):
            label = name + "".join(f"[{key}]" for key in path)
            readings = [Layer(label, name, path, *reading) for reading in _read(x, image)]
            if not readings:
                continue
            node = recorder.node(x) if recorder else None
            found.append((readings[0], node))
            if len(readings) == 2:
                others[label] = readings[1]
            if not x.is_inference():  # inference tensors cannot be overwritten and have no version counter
                kept.append((x, x._version, label))
        parametric = any(True for _ in module.parameters())
        # A larger output means a rise in resolution, unless a module without parameters only pads its input. Upsampling
        # without parameters is recorded as an operation instead.
        if recorder and parametric:
            readings_in = [_read(x, image) for _, x in tensors((inputs, keywords))]
            given = [math.prod(only[0][2]) for only in readings_in if len(only) == 1]
            for layer, node in found:
                if node and node >= starts[name] and given and layer.name not in others and max(given) < layer.pixels:
                    recorder.mark_rise(node, min(given))
        before = calls.pop(name, None)
        end = len(recorder.graph) if recorder else 0
        count = 1 if before is None else before.calls + 1
        calls[name] = Call(name, starts.get(name, 0), end, found, others, parametric, _kind(module), count)

    modes = [(module, module.training) for module in model.modules()]
    handles = []
    try:
        for name, module in model.named_modules():
            if recorder:
                handles.append(module.register_forward_pre_hook(partial(enter, name)))
            handles.append(module.register_forward_hook(partial(leave, name), with_kwargs=True))
        model.eval()
        with torch.no_grad():
            if recorder:
                with recorder:
                    output = model(*args, **kwargs)
                recorder.graph.outputs = {n for _, x in tensors(output) if (n := recorder.node(x)) is not None}
            else:
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    overwritten = {label for x, version, label in kept if x._version != version}
    seen = list(calls.values())
    for call in seen:
        last = bool(call.others) and _channels_are_last(call, seen)
        maps = [(call.others.get(layer.name, layer) if last else layer, node) for layer, node in call.maps]
        call.maps = [
            (replace(layer, calls=call.calls, overwritten=layer.name in overwritten), node) for layer, node in maps
        ]
    return seen, recorder.graph if recorder else None


def _kind(module: nn.Module | None) -> tuple[str, ...]:
    return () if module is None else (type(module).__name__, *_kind(next(module.children(), None)))


def _channels_are_last(call: Call, seen: list[Call]) -> bool:
    """Whether to read ambiguous maps, with as many channels as rows, as channels-last.

    The majority decides among the unambiguous maps in the same output, else among those of the module's siblings, else
    among those of its parent's siblings.
    """

    def votes(some: list[Call]) -> list[bool]:
        maps = [layer for c in some for layer in c.layers if layer.name not in c.others]
        return [layer.layout.endswith("C") for layer in maps if layer.layout != "tokens"]

    found, name = votes([call]), call.module
    while name and not found:
        parent = name.rpartition(".")[0]
        found = votes([c for c in seen if c.module not in ("", name) and c.module.rpartition(".")[0] == parent])
        name = parent
    return 2 * sum(found) > len(found)
