"""Features out of any model: a tap on the encoder's layers, and the projection heads that go with it.

tap = ck.attach(model)                     # before the optimizer, DDP and torch.compile
logits = model(images)
loss = criterion(tap.features(), labels, logits)
tap.detach()                               # for export: the model is as it was
"""

import copy
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from contextrast_kernels import checks
from contextrast_kernels.modules import ProjectionHead

_NAME = "contextrast_heads"
_MAX_LAYERS = 4
_MIN_STRIDE = 4
_MAX_STEP = 4
_MAX_NAMES = 12
_WEIGHTS = (1.0, 0.7, 0.4, 0.1)
_FSDP = ("FullyShardedDataParallel", "FSDPModule")
_PREFIXES = (0, 1, 2, 5)
"""Tokens before those of the pixels: none, class, class and distillation, class and four registers."""


@dataclass(frozen=True)
class Layer:
    """One tapped feature map: where it comes from and what it looked like in the example's forward."""

    name: str
    """``module``, or ``module[key]`` for one map of an output that holds several."""
    module: str
    path: tuple
    layout: str
    """NCHW, NHWC, or tokens (B, L, C)."""
    channels: int
    size: tuple[int, int]
    stride: int
    prefix: int
    """Tokens before the first pixel's."""
    calls: int
    """How often one forward calls the module; the map is the last call's."""
    overwritten: bool
    """A later module writes into this tensor, so that the tap keeps a copy."""


@torch.inference_mode(False)  # the heads would be born without gradients
def attach(
    model: nn.Module,
    layers: str | Sequence[str] = "auto",
    example_input: Tensor | tuple | list | Mapping | None = None,
    dim: int = 256,
) -> "FeatureTap":
    """Tap a model's encoder layers and give each a projection head; prints the table of what was chosen.

    The tap is registered as ``model.contextrast_heads``: optimizer, ``.to()``, ``state_dict()`` and DDP see its
    parameters. Attach after loading pretrained weights, and before the optimizer, DDP, FSDP and torch.compile are made.

    Args:
        model: any module whose layers give maps (B, C, h, w), (B, h, w, C), or tokens (B, L, C), which are taken to lie
            row by row. Where a model orders them otherwise, as Hiera does, name layers that give maps.
        layers: names of modules, as in ``model.named_modules()``; ``"encoder[2]"`` is one map of an output that holds
            several, ``"encoder"`` its last four of stride 4 or more. ``"auto"`` looks for the encoder's stages: the one
            output that lists them, or else the siblings that lower the resolution one after another; of more than four
            the last of each stride.
        example_input: what the model is called with once, in evaluation mode and without gradients, to see shapes: a
            tensor, a tuple of arguments, or a dict of keywords; one image is enough. None: a black one of 256 × 320
            pixels, with the channels of the first convolution.
        dim: D of the projected features.

    Returns:
        The tap. After each training forward ``tap.features()`` gives the projected maps, from high to low resolution.

    Raises:
        TypeError, ValueError: an argument that cannot be used, an unknown layer (the closest names are listed), fewer
            than two layers found by ``"auto"``; the sentence says what to do.
        RuntimeError: the model is attached, wrapped or compiled already, or cannot run on the example.

    Example:
        >>> tap = ck.attach(model)
        >>> criterion = ck.ContextrastCriterion(num_classes=19)
        >>> logits = model(images)
        >>> loss = criterion(tap.features(), labels, logits)
    """
    _check_model(model)
    checks.integer("dim", dim, low=1)
    if layers != "auto" and (
        isinstance(layers, str)
        or not isinstance(layers, Sequence)
        or len(layers) == 0
        or not all(isinstance(name, str) for name in layers)
    ):
        raise TypeError(f'layers: expected "auto" or a list of module names, got {checks.describe(layers)}')
    seen = _watch(model, _example(model) if example_input is None else example_input, example_input is None)
    chosen = _find_stages(seen) if layers == "auto" else _look_up(layers, seen)
    chosen = sorted(chosen, key=lambda layer: -layer.size[0] * layer.size[1])
    tap = FeatureTap(model, chosen, dim)
    if (
        not torch.distributed.is_available()
        or not torch.distributed.is_initialized()
        or not torch.distributed.get_rank()
    ):
        print(tap.table())
    return tap


class FeatureTap(nn.Module):
    """The tapped layers of a model and their projection heads: what ``attach`` returns.

    ``layers`` describes the taps and ``heads`` projects them. Recording takes place only while the model is in training
    mode with gradients on, between the start and the end of its forward, so that evaluation keeps no memory and a layer
    that activation checkpointing runs again leaves nothing behind. A deep copy of the model has a tap of its own.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], dim: int):
        super().__init__()
        like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
        self.layers = list(layers)
        self.heads = nn.ModuleList(ProjectionHead(layer.channels, dim) for layer in layers)
        self.heads.to(like.device, like.dtype)
        self._model = [model]  # in a list: as an attribute of its own it would be registered as a child
        self._maps: list[tuple | None] | None = None
        self._image: tuple[int, int] | None = None
        self._open = False
        self._why_empty = "the model has not run since attach(); call model(images), not model.forward or its parts"
        modules = dict(model.named_modules())
        self._handles = [model.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for i, layer in enumerate(layers):
            self._handles.append(modules[layer.module].register_forward_hook(_Recorder(self, i)))
        self._handles.append(model.register_forward_hook(self._end))
        self._handles.append(model.register_forward_hook(self._fail, always_call=True))
        model.add_module(_NAME, self)
        self.train(model.training)

    def features(self) -> list[Tensor]:
        """The projected maps (B, D, h_i, w_i) of the last training forward, from high to low resolution.

        The heads run in the precision that the layers ran in. The recorded maps are handed over: call it once for each
        forward and keep the list.

        Raises:
            RuntimeError: nothing was recorded, or what was recorded cannot train the encoder; the sentence says why.
        """
        if not self._model:
            raise RuntimeError("features: this tap was detached from its model; call attach(model) again")
        if self._maps is None:
            raise RuntimeError(
                f"features: expected a training forward of the model before, got none: {self._why_empty}"
            )
        maps, self._maps = self._maps, None
        self._why_empty = (
            "its maps were taken already; call features() once for each model(images) and keep the list it returns"
        )
        return [self._project(i, taken) for i, taken in enumerate(maps)]

    def _project(self, i: int, taken: tuple | None) -> Tensor:
        layer, head = self.layers[i], self.heads[i]
        if taken is None:
            raise RuntimeError(
                f"features: layer {layer.name!r} gave no feature map in the last forward: the model did not call it, "
                "it was replaced since attach(), as by convert_sync_batchnorm, the model was compiled before, or this "
                "is a copy made by way of a module that registers a part before the model; choose a layer that the "
                "model calls, convert first, then attach, then compile, and register the model before its parts"
            )
        x, version, dtype = taken
        if version is not None and x._version != version:
            raise RuntimeError(
                f"features: layer {layer.name!r} was overwritten in place after it was recorded; tap the module that "
                "writes into it, such as the ReLU(inplace=True) behind it, or make that one inplace=False"
            )
        if not x.requires_grad:
            raise RuntimeError(
                f"features: layer {layer.name!r} carries no gradient, so the loss could not train the encoder; leave "
                "it out of layers, unfreeze it, take it out of torch.no_grad, or checkpoint with use_reentrant=False"
            )
        if head[0].weight.ndim != 4:
            raise RuntimeError(
                f"features: expected whole projection heads, got a weight {checks.describe(head[0].weight)}, as "
                "FullyShardedDataParallel leaves it after its forward; compute the loss inside of the wrapped module's "
                "forward"
            )
        if hasattr(head[0].weight, "to_local") and not hasattr(head, "unshard"):
            raise RuntimeError(
                "features: expected whole projection heads, got sharded ones, as FSDP puts the model's parameters away "
                "after its forward; call fully_shard(head) for each head in tap.heads before fully_shard(model)"
            )
        x = _as_map(x, layer, self._image)
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return head(x if dtype is not None else x.to(head[0].weight.dtype))

    def detach(self) -> None:
        """Takes hooks and heads out of the model, which is then as before ``attach``. Calling it again does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._maps = None
        for model in self._model:
            delattr(model, _NAME)
        self._model = []

    def table(self) -> str:
        """The tapped layers, a line each: name, stride, channels, size on the example, layout; hints."""
        rows = [
            (
                layer.name,
                str(layer.stride),
                str(layer.channels),
                "{} × {}".format(*layer.size),
                layer.layout
                + (", copied: overwritten later" if layer.overwritten else "")
                + (f", called {layer.calls} ×: the last call is used" if layer.calls > 1 else ""),
            )
            for layer in self.layers
        ]
        rows.insert(0, ("layer", "stride", "channels", "size", "layout"))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if len(rows) - 1 != len(_WEIGHTS):
            weights = (*_WEIGHTS, *(_WEIGHTS[-1],) * len(rows))[: len(rows) - 1]
            lines.append(f"{len(rows) - 1} layers: give the loss as many layer_weights, such as {weights}")
        return "\n".join(lines)

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(model, "_is_replica", False):
            raise RuntimeError(
                "model: expected one copy of it in each process, got a replica of nn.DataParallel, whose threads share "
                "one tap; use DistributedDataParallel"
            )
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
            return  # within a backward pass: checkpointing of the whole model runs it again
        self._open = self.training and torch.is_grad_enabled()
        self._maps = [None] * len(self.layers) if self._open else None
        if not self._open:
            mode, remedy = (
                ("under torch.no_grad", "train with gradients on")
                if self.training
                else ("in evaluation mode", "call model.train(), and freeze normalisation layers one by one")
            )
            self._why_empty = f"the last forward ran {mode}, where nothing is recorded; {remedy}"
        image = _image(args, kwargs)
        self._image = None if image is None else tuple(image[-2:])

    def _record(self, i: int, output) -> None:
        if not self._open:
            return
        layer = self.layers[i]
        x = dict(_tensors(output)).get(layer.path)
        if x is None:
            return
        if layer.overwritten:
            x = x.clone()
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # Compiled code counts no versions: there only what the example's forward showed is copied.
        self._maps[i] = (x, None if torch.compiler.is_compiling() else x._version, dtype)

    def _end(self, model: nn.Module, args: tuple, output) -> None:
        self._open = False

    def _fail(self, model: nn.Module, args: tuple, output) -> None:
        # Called after every forward, and alone after one that raised.
        if self._open:
            self._open, self._maps, self._why_empty = False, None, "the last forward raised an exception"

    def forward(self, x):
        """Returns ``x``: where the model is a container that runs its children in turn, the tap is one of them."""
        return x

    def extra_repr(self) -> str:
        return self.table()

    def __getstate__(self):
        # What was recorded belongs to one forward and cannot be copied or pickled.
        return {**self.__dict__, "_maps": None, "_open": False, "_why_empty": "this copy of the model has not run"}


class _Recorder:
    """The forward hook of one layer."""

    def __init__(self, tap: FeatureTap | None, i: int):
        self.tap = tap
        self.i = i

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        if self.tap is not None:
            self.tap._record(self.i, output)

    def __deepcopy__(self, memo: dict) -> "_Recorder":
        # A copy of the model has its own tap. A copy of a part, a teacher's encoder say, must not drag the model along.
        whole = self.tap is not None and id(self.tap._model[0]) in memo
        return _Recorder(copy.deepcopy(self.tap, memo) if whole else None, self.i)


def _check_model(model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {checks.describe(model)}")
    kind = type(model).__name__
    # FSDP's by name, as importing it takes a second: a class of its own, or one that fully_shard put into a module's.
    sharded = any(c.__name__ in _FSDP for module in model.modules() for c in type(module).__mro__)
    if sharded or isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise RuntimeError(f"model: expected the plain model, got {kind}; attach to it first, then wrap or shard it")
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise RuntimeError(
                "model: expected it before torch.compile, which never sees hooks that come later, got "
                f"{name or 'the model itself'!r} compiled; attach first, then compile the model or its parts"
            )
        if isinstance(module, FeatureTap):
            raise RuntimeError(f"model: attached already, at {name!r}; use that tap, or call its detach() first")
    if hasattr(model, _NAME):
        raise RuntimeError(f"model: expected no attribute {_NAME!r}, the name the tap is registered under; rename it")


def _example(model: nn.Module) -> Tensor:
    """One black image, with the channels of the first convolution."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Conv3d)), None)
    if isinstance(first, nn.Conv3d):
        raise ValueError("model: expected one for images, got one with Conv3d; only 2-D features are supported")
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    # Not square, so that (B, h, w, C) cannot be taken for (B, C, h, w).
    return torch.zeros(1, first.in_channels if first else 3, 256, 320, device=like.device, dtype=like.dtype)


def _tensors(output, path: tuple = ()) -> Iterator[tuple[tuple, Tensor]]:
    """Every tensor in a module's output, with the keys that lead to it."""
    if isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, (*path, key))
    elif isinstance(output, tuple | list):
        for i, value in enumerate(output):
            yield from _tensors(value, (*path, i))


def _image(args: tuple, kwargs: dict) -> torch.Size | None:
    """(B, C, H, W) of the first image among a forward's arguments."""
    for _, x in _tensors((args, kwargs)):
        if x.ndim == 4 and (x.is_floating_point() or x.dtype == torch.uint8):
            return x.shape
    return None


def _grid(tokens: int, image: tuple[int, int], stride: int) -> tuple[int, int] | None:
    """Rows and columns of a sequence of tokens, where the network rounds its sizes up or down."""
    H, W = image
    for h, w in ((math.ceil(H / stride), math.ceil(W / stride)), (H // stride, W // stride)):
        if h * w == tokens > 0:
            return h, w
    return None


def _as_map(x: Tensor, layer: Layer, image: tuple[int, int] | None) -> Tensor:
    """(B, C, h, w) whatever the layout; a view."""
    if layer.layout == "NHWC" and x.ndim == 4:
        x = x.permute(0, 3, 1, 2)
    elif layer.layout == "tokens" and x.ndim == 3:
        grid = None if image is None else _grid(x.shape[1] - layer.prefix, image, layer.stride)
        if grid is None:
            raise ValueError(
                f"features: layer {layer.name!r}: expected a token for each {layer.stride} × {layer.stride} pixels, "
                f"got {checks.describe(x)} for an image of {image}; make its sides multiples of {layer.stride}"
            )
        x = x[:, layer.prefix :].transpose(1, 2).unflatten(2, grid)
    if x.ndim != 4 or x.shape[1] != layer.channels:
        raise ValueError(
            f"features: layer {layer.name!r}: expected {layer.channels} channels in {layer.layout}, as with attach()'s "
            f"example_input, got {checks.describe(x)}; attach with an example like the training's input"
        )
    return x


def _read(x: Tensor, image: torch.Size) -> list[tuple[str, int, tuple[int, int], int]]:
    """Layout, channels, size and prefix of a tensor that can hold the feature maps of the images; one of four axes can
    have two readings."""
    B, _, H, W = image
    if x.ndim not in (3, 4) or x.shape[0] != B:
        return []
    if x.ndim == 4:
        readings = (("NCHW", *x.shape[1:]), ("NHWC", x.shape[3], x.shape[1], x.shape[2]))
        # One stride for rows and columns, a pixel more or less in each.
        return [
            (layout, c, (h, w), 0)
            for layout, c, h, w in readings
            if c > 0 and 0 < h <= H and 0 < w <= W and abs(h * W - w * H) <= H + W
        ]
    if x.shape[2] > 0:
        for prefix in _PREFIXES:
            tokens = x.shape[1] - prefix
            grid = _grid(tokens, (H, W), round(math.sqrt(H * W / tokens))) if tokens > 0 else None
            if grid is not None:
                return [("tokens", x.shape[2], grid, prefix)]
    return []


@dataclass
class _Event:
    """A module that was called: its maps, in the order in which modules finish."""

    module: str
    layers: list[Layer]
    others: dict[str, Layer]
    """The other reading of maps that can be (B, C, h, w) as well as (B, h, w, C), by name."""
    parametric: bool
    calls: int = 1


def _watch(model: nn.Module, example, own_example: bool) -> list[_Event]:
    """One forward with hooks on every module."""
    events: dict[str, _Event] = {}
    kept = []  # every map until the end of the forward, to see which of them is written into

    if isinstance(example, Mapping):
        args, kwargs = (), dict(example)
    else:
        args, kwargs = tuple(example) if isinstance(example, tuple | list) else (example,), {}
    image = _image(args, kwargs)
    if image is None:
        volume = any(x.ndim == 5 for _, x in _tensors((args, kwargs)))
        raise ValueError(
            "example_input: expected an image (B, C, H, W), of floats or uint8, among the model's arguments, got "
            + ("a volume; only 2-D features are supported" if volume else checks.describe(example))
        )

    def record(name: str, module: nn.Module, inputs, output) -> None:
        found, others = [], {}
        for path, x in _tensors(output):
            label = name + "".join(f"[{key}]" for key in path)
            readings = []
            for layout, channels, size, prefix in _read(x, image):
                stride = max(1, round(math.sqrt(image[2] * image[3] / (size[0] * size[1]))))
                readings.append(Layer(label, name, path, layout, channels, size, stride, prefix, 1, False))
            if not readings:
                continue
            found.append(readings[0])
            if len(readings) == 2:
                others[label] = readings[1]
            if not x.is_inference():  # these cannot be written into, and count no versions
                kept.append((x, x._version, label))
        before = events.pop(name, None)
        parametric = any(True for _ in module.parameters())
        events[name] = _Event(name, found, others, parametric, 1 if before is None else before.calls + 1)

    modes = [(module, module.training) for module in model.modules()]
    handles = [module.register_forward_hook(partial(record, name)) for name, module in model.named_modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:
        what = f"one black image {tuple(example.shape)}" if own_example else checks.describe(example)
        reason = " ".join(str(error).split())[:200]
        raise RuntimeError(
            f"example_input: the model cannot run on {what} ({type(error).__name__}: {reason}); "
            "pass an example_input that it accepts: a tensor, a tuple of arguments or a dict of keywords"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    overwritten = {label for x, version, label in kept if x._version != version}
    seen = list(events.values())
    for event in seen:
        if event.others and _channels_are_last(event, seen):
            event.layers = [event.others.get(layer.name, layer) for layer in event.layers]
    for event in seen:
        event.layers = [
            replace(layer, calls=event.calls, overwritten=layer.name in overwritten) for layer in event.layers
        ]
    return seen


def _channels_are_last(event: _Event, seen: list[_Event]) -> bool:
    """How to read maps with as many channels as rows and columns: as most of those that leave no choice, beside them in
    one output, else of the module's siblings, else of its parent's."""

    def votes(some: list[_Event]) -> list[bool]:
        maps = [layer for e in some for layer in e.layers if layer.name not in e.others]
        return [layer.layout == "NHWC" for layer in maps if layer.layout != "tokens"]

    found, name = votes([event]), event.module
    while name and not found:
        parent = name.rpartition(".")[0]
        found = votes([e for e in seen if e.module not in ("", name) and e.module.rpartition(".")[0] == parent])
        name = parent
    return 2 * sum(found) > len(found)


def _look_up(names: Sequence[str], seen: list[_Event]) -> list[Layer]:
    known: dict[str, list[Layer]] = {}
    for event in seen:
        if event.layers:
            known.update({layer.name: [layer] for layer in event.layers})
            known.setdefault(event.module, max(_lists(event), key=len, default=[]))
    known = {name: layers for name, layers in known.items() if layers}
    chosen = []
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=_MAX_NAMES, cutoff=0.0)
            raise ValueError(
                f"layers: expected names of modules that gave a feature map in the example's forward, got {name!r}; "
                f"known, closest first: {_listed(close, len(known))}"
            )
        chosen += known[name]
    return list(dict.fromkeys(chosen))


def _listed(names: Sequence[str], total: int) -> str:
    more = total - len(names[:_MAX_NAMES])
    return ", ".join(map(repr, names[:_MAX_NAMES])) + (f" and {more} more" if more else "")


def _deep(layers: list[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.stride >= _MIN_STRIDE and layer.size != (1, 1)]


def _lists(event: _Event) -> list[list[Layer]]:
    """The stages that each list, tuple or mapping in a module's output holds."""
    lists: dict[tuple, list[Layer]] = {}
    for layer in _deep(event.layers):
        lists.setdefault(layer.path[:-1], []).append(layer)
    return [_of_each_stride(found) for found in lists.values() if _may_be_stages(found)]


def _may_be_stages(found: list[Layer]) -> bool:
    """Positions in a sequence are alike. Names may stand for anything, such as masks, queries and a last hidden state,
    except where every one is a map of another stride."""
    named = any(layer.path and isinstance(layer.path[-1], str) for layer in found)
    strides, layouts = {layer.stride for layer in found}, {layer.layout for layer in found}
    return not named or len(found) == 1 or (len(found) == len(strides) > 2 and len(layouts) == 1)


def _of_each_stride(layers: list[Layer]) -> list[Layer]:
    """At most four. More are blocks, and the last of each stride is taken; of one stride alone, the last four."""
    last = list({layer.stride: layer for layer in layers}.values())
    return (last if len(layers) > _MAX_LAYERS and len(last) > 1 else layers)[-_MAX_LAYERS:]


@dataclass(frozen=True)
class _Group:
    """Layers that may be the encoder's stages: maps that one output lists, or siblings."""

    parent: str
    listed: bool
    order: int
    layers: tuple[Layer, ...]

    @property
    def varied(self) -> bool:
        return len({layer.channels for layer in self.layers}) > 1

    @property
    def strides(self) -> int:
        return len({layer.stride for layer in self.layers})

    def covers(self, other: "_Group") -> bool:
        """The other group lies inside of this one and tells nothing more."""
        if self.listed:
            # Maps of equal width may be logits, or a pyramid made of the stages inside.
            inside = _inside(other.parent, self.parent) and not (other.listed and other.parent == self.parent)
            more = len(self.layers) >= len(other.layers) or self.strides >= other.strides
            return inside and more and (self.varied or not other.varied)
        inside = any(_inside(other.parent, layer.module) for layer in self.layers)
        return inside and not other.listed and self.strides >= other.strides


def _inside(module: str, parent: str) -> bool:
    return parent == "" or f"{module}.".startswith(f"{parent}.")


def _find_stages(seen: list[_Event]) -> list[Layer]:
    """The encoder's stages: of all groups the largest; of equals one that an output lists; of these the first."""
    groups = []
    siblings: dict[str, list[tuple[int, _Event]]] = {}
    called = {event.module for event in seen}
    for order, event in enumerate(seen):
        for found in _lists(event):
            # Two maps of one stride are logits and auxiliary logits, more are the depths of a plain transformer.
            if len(found) > 2 or len({layer.stride for layer in found}) > 1:
                groups.append(_Group(event.module, True, order, tuple(found)))
        # A stage may give its map in two layouts.
        if event.module and event.calls == 1 and len({(layer.channels, layer.size) for layer in event.layers}) == 1:
            parent = event.module.rpartition(".")[0]
            while parent not in called:  # a ModuleList is never called itself
                parent = parent.rpartition(".")[0]
            siblings.setdefault(parent, []).append((order, event))
    parametric = [event.parametric for event in seen]
    for parent, events in siblings.items():
        stages = _descent(events)
        strides = [layer.stride for _, layer in stages]
        if len(set(strides)) < 2 or any(b > _MAX_STEP * a for a, b in pairwise(strides)):
            continue
        # What ends within the first tenth of the model is a stem.
        if 10 * sum(parametric[: stages[-1][0] + 1]) >= sum(parametric):
            groups.append(_Group(parent, False, stages[0][0], tuple(layer for _, layer in stages)))
    groups = [group for group in groups if not any(other.covers(group) for other in groups)]
    if not groups:
        known = [layer.name for event in seen for layer in _deep(event.layers)]
        known.sort(key=lambda name: name.count("."))
        raise ValueError(
            'layers: expected at least two encoder stages of stride 4 or more, but "auto" found fewer; '
            f"name the layers, of: {_listed(known, len(known)) or 'none of that stride'}"
        )
    return list(max(groups, key=lambda g: (len(g.layers), g.listed and g.varied, -g.order)).layers)


def _descent(events: list[tuple[int, _Event]]) -> list[tuple[int, Layer]]:
    """The stages among siblings, until the resolution rises again, each with its place in the forward.

    A stage begins with a module that has parameters and gives another number of channels or another size; what
    follows at that size, such as an activation, belongs to it.
    """
    stages: list[tuple[int, Layer]] = []
    for order, event in events:
        layer = event.layers[0]
        if layer.size == (1, 1):
            continue
        before = stages[-1][1] if stages else None
        if before is not None and layer.stride < before.stride:
            break
        if before is not None and (layer.channels, layer.size) == (before.channels, before.size):
            stages[-1] = (order, layer)
        elif event.parametric:
            stages.append((order, layer))
    places = {layer: order for order, layer in stages}
    found = _of_each_stride([layer for _, layer in stages if layer.stride >= _MIN_STRIDE])
    return [(places[layer], layer) for layer in found]
