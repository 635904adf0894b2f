"""Calculate what one training step does on the device, from shapes alone: every kernel, fill and copy with the bytes
that it moves, and the peak memory beside inputs and gradients. Nothing is run."""

import math
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contextrast_kernels import native
from contextrast_kernels.kernels import _launch, contextrast, info_nce

QUIET = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Ops that launch nothing on the device, besides views."""

GRAIN = 512
"""PyTorch's allocator rounds sizes up to a multiple of this number of bytes."""

SECTOR = 32
"""The memory is read in units of this number of bytes."""

WRITTEN = {
    "_label_codes": ("y", "e", "base", "counts", "drawn"),
    "_largest_features": ("max_abs",),
    "_class_anchors_fwd": ("sums", "broken", "norms"),
    "_anchor_tables": ("table", "lengths"),
    "_given_table": ("table", "lengths"),
    "_hard_similarities": ("similarity", "largest"),
    "_exponentials": ("total",),
    "_hard_log_sums": ("Z",),
    "_dense_similarities": ("partial",),
    "_dense_log_sums": ("Z",),
    "_pixel_anchor_fwd": ("pulled", "pushed", "terms"),
    "_finish": ("loss", "losses", "report", "coefficients", "pull"),
    "_features_bwd": ("out",),
    "_features_bwd_dense": ("out",),
    "_info_nce_log_sums": ("log_sums",),
    "_info_nce_terms": ("terms",),
    "_info_nce_rows": ("losses", "kept"),
    "_info_nce_mean": ("loss", "count"),
    "_info_nce_bwd": ("out",),
    "_add_splits": ("out",),
}
"""The arguments, or fields of arguments, that each kernel writes or adds to. It reads the others."""

PIXEL_MAPS = frozenset({"codes", "y", "e", "base", "similarity", "norms"})
"""Arguments and fields with one number for each pixel of all layers. A sweep takes the pixels of its own layers."""


class Row(NamedTuple):
    name: str
    programs: int | None
    """The number of programs in the grid; None for a fill, a copy or a kernel of the native library."""
    reads: int
    writes: int


class Step(NamedTuple):
    rows: list[Row]
    launches: list[_launch.Launch]
    """The launches of the kernels among the rows, with their arguments and constants."""
    peak: int | None
    """Bytes beside inputs, outputs and gradients. None where the native library cannot say what its kernels take."""


class Watch(TorchDispatchMode):
    """Follows what is allocated and what ops reach the device.

    ``called``: names of the ops that do; ``live``: bytes held now; ``peak``: the most there were.
    """

    def __init__(self, called: list | None = None):
        super().__init__()
        self.called = [] if called is None else called
        self.live = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if made and not func.is_view and name not in QUIET:
            self.called.append(name)
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in made:
            if id(x.untyped_storage()) not in given:
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage) -> None:
        size = rounded(storage.nbytes())
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


def rounded(size: int) -> int:
    return -(-size // GRAIN) * GRAIN


def training_step(
    batch: int,
    sizes: Sequence[tuple[int, int]],
    channels: int,
    num_classes: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    layout: str = "nchw",
    base_rate: float = 0.0,
) -> Step:
    """Calculate a forward pass in training mode, with the defaults of the selection, and its backward pass.

    A row has the bytes of features, label maps and tables that its kernel reads and writes at least once. Those of the
    similarities of hard negatives are an upper bound, because the kernel reads only the rows that hold a negative. The
    floor is four times the bytes of the features: three reads and one write.

    Args:
        sizes: (h, w) of every layer.
        layout: "nchw" or "channels_last".
    """
    features, labels, e, seed = _meta_inputs(batch, sizes, channels, num_classes, dtype, layout)
    with _launch.recording() as called:
        watch = Watch(called)
        with watch:
            outcome, y, terms = contextrast.forward(
                *(features, labels, e, [], seed, num_classes, 255),
                *((1.0,) * len(sizes), 0.1, 0.7, base_rate, True, False),
            )
            forward_peak, watch.peak = watch.peak, 0
            gradients = contextrast.backward(outcome.loss, features, y, terms, outcome.pull, 0.1, True)
    of_gradients = sum(rounded(x.nbytes) for x in gradients)
    codes = rounded(e.nbytes)
    scratch = native.bane_scratch(labels, num_classes, sizes)
    peak = None
    if scratch is not None:
        peak = codes + max(rounded(scratch), forward_peak, watch.peak - of_gradients)
    rows = [
        Row("seed: copy", None, 8, 8),
        *(Row(f"negatives: {name}", None, 0, 0) for name in native.BANE_ENQUEUES),
        *(_row(launch) for launch in called),
        Row("seed: add", None, 8, 8),
        Row("gradient of the loss: fill", None, 0, outcome.loss.element_size()),
    ]
    return Step(rows, [launch for launch in called if isinstance(launch, _launch.Launch)], peak)


def _meta_inputs(
    batch: int,
    sizes: Sequence[tuple[int, int]],
    channels: int,
    num_classes: int,
    dtype: torch.dtype,
    layout: str,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Features, labels, codes of hard negatives and seed as tensors without memory."""

    def empty(*shape, dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    features = [empty(batch, channels, h, w, dtype=dtype).to(memory_format=form) for h, w in sizes]
    labels = empty(batch, 4 * sizes[0][0], 4 * sizes[0][1], dtype=torch.int64)
    e = empty(sum(batch * h * w for h, w in sizes), dtype=native.code_dtype(num_classes))
    return features, labels, e, empty(1, dtype=torch.int64)


def _row(launch: _launch.Launch | str) -> Row:
    if isinstance(launch, str):
        return Row(f"sums: {launch}", None, 0, 0)
    return Row(launch.kernel.__name__, math.prod(launch.grid), *moved(launch))


def info_nce_launches(
    R: int, C: int | None, D: int, dtype: torch.dtype = torch.bfloat16, positives: str = "each"
) -> list[_launch.Launch]:
    """The launches of one forward and backward pass of ``info_nce``, in order. C None: the rows against themselves."""

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows = empty(R, D)
    columns = rows if C is None else empty(C, D)
    row_labels = empty(R, dtype=torch.int64)
    column_labels = None if C is None else empty(C, dtype=torch.int64)
    pairs = info_nce.pairs_of(row_labels, column_labels, None, None, None, 0.1, -1, positives)
    with _launch.recording() as launches:
        loss, count, kept = info_nce.forward(rows, columns, pairs, True)
        for toward in ("both",) if C is None else ("rows", "columns"):
            info_nce.backward(loss, rows, columns, pairs, count, kept, toward)
    return launches


# --------------------------------------------------------------------------------------------------------------- bytes


def moved(launch: _launch.Launch) -> tuple[int, int]:
    """The bytes that a launch reads and writes at least once. Repeated reads are assumed to hit a cache."""
    name, arguments = launch.kernel.__name__, launch.arguments
    written = set(WRITTEN[name])
    if name == "_label_codes" and launch.constants["GIVEN"]:
        written.remove("e")
    own_pixels = None
    if isinstance(arguments.get("x"), _launch.Maps):
        own_pixels = sum(x.numel() // x.shape[1] for x in arguments["x"].start)
    sizes = {}  # by address: what two arguments share is moved once
    for argument, x in named_tensors(arguments.items()):
        size = x.nbytes
        if argument in PIXEL_MAPS and own_pixels is not None:
            size = own_pixels * x.element_size()
        elif name == "_label_codes" and argument == "labels":
            size = _sampled_bytes(x, arguments)
        sizes[argument in written, id(x)] = size
    reads, writes = (sum(size for (is_written, _), size in sizes.items() if is_written == way) for way in (False, True))
    return reads, writes


def named_tensors(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among the arguments of a launch, by name; those of a named tuple by the names of its fields, but
    those of feature maps and matrices by the name of the argument."""
    for name, value in arguments:
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple) and hasattr(value, "_fields") and "start" not in value._fields:
            yield from named_tensors(zip(value._fields, value, strict=True))
        elif isinstance(value, tuple):
            yield from named_tensors((name, part) for part in value)


def _sampled_bytes(labels: Tensor, arguments: dict) -> int:
    """The bytes of the labels that ``_label_codes`` reads: a sector for each pixel, and at most the whole row."""
    total = 0
    for h, w in zip(arguments["geometry"].h, arguments["geometry"].w, strict=True):
        rows = min(_launch.decode_int(h), math.prod(labels.shape[1:-1]))
        total += labels.shape[0] * rows * min(_launch.decode_int(w) * SECTOR, labels.shape[-1] * labels.element_size())
    return total
