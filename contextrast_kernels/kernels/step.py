"""What one training step of ``ContextrastLoss`` puts on the device, from shapes alone: every kernel, fill and copy, and
the most memory that it holds at once beside inputs and gradients. Nothing is run."""

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from contextrast_kernels import native
from contextrast_kernels.kernels import _launch, contextrast

QUIET = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})
"""Ops that are no work for the device, beside views."""

GRAIN = 512
"""PyTorch's allocator hands out memory in multiples of so many bytes."""


class Row(NamedTuple):
    name: str
    programs: int | None
    """Of the grid; None for a fill, a copy or a kernel of the native library."""
    reads: int
    writes: int


class Step(NamedTuple):
    rows: list[Row]
    launches: list[_launch.Launch]
    """Of the kernels among the rows, with their arguments and constants."""
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
    """Forward in training mode with the defaults of the selection, and the backward pass of a loss of its own.

    A row has the bytes of features, label maps and tables that its kernel reads and writes at least once (the
    similarities of hard negatives: at most, since only rows that hold one are read). The floor, three reads of the
    features and one write, is four times their bytes.

    Args:
        sizes: (h, w) of every layer.
        layout: "nchw" or "channels_last".
    """
    features, labels, e, seed = _meta_inputs(batch, sizes, channels, num_classes, dtype, layout)
    with _launch.recording() as called:
        watch = Watch(called)
        with watch:
            outcome, y, terms = contextrast.forward(
                *(features, labels, e, seed, num_classes, 255, (1.0,) * len(sizes), 0.1, 0.7, base_rate, True, False)
            )
            forward_peak, watch.peak = watch.peak, 0
            gradients = contextrast.backward(outcome.loss, features, y, terms, outcome.pull, 0.1, True)
    of_gradients = sum(rounded(_launch.nbytes(x)) for x in gradients)
    codes = rounded(_launch.nbytes(e))
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
    programs = 1
    for axis in launch.grid:
        programs *= axis
    return Row(launch.kernel.__name__, programs, launch.reads, launch.writes)
