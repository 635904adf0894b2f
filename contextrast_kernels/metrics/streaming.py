"""The base class of all metrics: counts that add up over batches, ranks and saved states."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from contextrast_kernels import checks, maps


class Metric(ABC):
    """Counts over batches, and the results that follow from them.

    The counts are kept on the device of the maps. Integer counts depend neither on the order of the batches nor on the
    number of ranks. BoundaryF1 and AlignmentUniformity also hold float64 sums, whose rounding depends on both. The
    pixels that AlignmentUniformity draws depend on both, too. Only ``compute()`` synchronises or communicates, and only
    the first batch may copy options to the device.

    A metric is not an ``nn.Module``, because DistributedDataParallel would overwrite its counts with those of rank 0.
    """

    _layout: dict[str, tuple[tuple[int | None, ...], torch.dtype]]
    """Shape and dtype of each count; None is a size that the first batch determines."""

    def __init__(self, num_classes: int, ignore_index: int, group: object):
        checks.several_classes(num_classes)
        checks.ignore_index(ignore_index)
        if not (group is None or group == "auto" or (dist.is_available() and isinstance(group, dist.ProcessGroup))):
            raise TypeError(
                "group: expected 'auto' (all ranks), None (this rank alone) or a torch.distributed process group, "
                f"got {checks.describe(group)}. Leave it out for all ranks."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._group = group
        self._state: dict[str, Tensor] = {}  # empty until the first batch

    @abstractmethod
    def update(self, *batch: Any, **options: Any) -> None:
        """Add a batch."""

    def compute(self) -> dict[str, Tensor]:
        """The results so far, over all ranks of the group, which must call this together. Counting can continue."""
        return self._results(self._over_ranks())

    def reset(self) -> None:
        """Remove all counts."""
        self._state = {}

    def merge(self, other: Metric) -> None:
        """Add the counts of another metric with the same options."""
        if type(other) is not type(self) or other._options() != self._options():
            raise ValueError(
                f"other: expected {type(self).__name__} with the options {self._options()}, got "
                f"{type(other).__name__} with {other._options() if isinstance(other, Metric) else 'none'}. "
                "Make both with the same arguments."
            )
        if other._state:
            self._add(other._state)

    def state_dict(self) -> dict[str, Tensor]:
        """The counts as a dict that can be saved; empty before the first batch."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the counts by saved ones."""
        if not isinstance(state, dict):
            raise TypeError(
                f"state: expected the result of state_dict(), got {checks.describe(state)}. "
                "Pass the dict that it returned."
            )
        wanted = {name: dtype for name, (_, dtype) in self._layout.items()}
        got = {name: getattr(value, "dtype", type(value)) for name, value in state.items()}
        if got not in ({}, wanted):
            raise ValueError(
                f"state: expected {wanted}, as state_dict() of {type(self).__name__} gives, got {got}. "
                "Load what the same metric saved."
            )
        for name, value in state.items():
            shape, _ = self._layout[name]
            if len(shape) != value.ndim or any(n not in (None, m) for n, m in zip(shape, value.shape)):
                sizes = str(shape).replace("None", "any")
                raise ValueError(
                    f"state: expected {name} of shape {sizes}, got {checks.describe(value)}. "
                    "Load what was saved with the same options."
                )
        self._state = {name: value.clone() for name, value in state.items()}

    def _class_maps(self, predictions: Tensor, labels: Tensor, *, volumes: bool = False) -> tuple[Tensor, Tensor]:
        """Predicted and true class of every pixel, at the labels' size: int64 (B, *size) each.

        volumes: whether the metric accepts volumes too. The true class is -1 for ignored pixels. The predicted class is
        N for values outside 0..N-1, which are misses. ``ignore_index`` is neither a true nor a predicted class.
        """
        N = self.num_classes
        dims = checks.dims_of(predictions, labels) if volumes else 2
        predictions = checks.predictions("predictions", predictions, N, dims)
        labels = checks.class_map("labels", labels, dims=dims)
        checks.together("predictions", predictions, "labels", labels)
        size = labels.shape[1:]
        checks.samples_from("predictions", predictions, *size)
        predicted = maps.resized_classes(predictions, size, self.ignore_index)
        predicted = torch.where((predicted >= 0) & (predicted < N), predicted, N)
        return predicted, maps.targets(labels, size, N, self.ignore_index)

    @abstractmethod
    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The results that follow from the counts."""

    def _combine(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        """The counts of both together."""
        return {name: one[name] + other[name] for name in one}

    def _add(self, counts: dict[str, Tensor]) -> None:
        # Never in place, because counts made under inference_mode cannot be changed outside it.
        if self._state:
            device = next(iter(counts.values())).device
            seen = {name: value.to(device) for name, value in self._state.items()}
            for name, value in counts.items():
                if value.shape != seen[name].shape:
                    raise ValueError(
                        f"{type(self).__name__}: expected batches of one kind, got {name} of shape "
                        f"{tuple(value.shape)} after {tuple(seen[name].shape)}. Keep the number of channels and layers."
                    )
            counts = self._combine(seen, counts)
        self._state = counts

    def _options(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def _blank(self, shapes: dict[str, tuple[int, ...]], device: torch.device | str) -> dict[str, Tensor]:
        return {
            name: torch.zeros(shapes[name], dtype=dtype, device=device) for name, (_, dtype) in self._layout.items()
        }

    def _over_ranks(self) -> dict[str, Tensor]:
        """The counts of all ranks of the group; zeros if no rank has seen a batch."""
        nothing = {name: tuple(n or 0 for n in shape) for name, (shape, _) in self._layout.items()}
        if self._group is None or not (dist.is_available() and dist.is_initialized()):
            return self._state or self._blank(nothing, "cpu")
        group = None if isinstance(self._group, str) else self._group
        if dist.get_rank(group) < 0:
            raise ValueError("group: expected a process group with this rank in it. Call compute() on its ranks only.")
        # The ranks must use the same kind of device, also those that have not seen a batch.
        device = torch.device("cuda" if "nccl" in str(dist.get_backend_config(group)) else "cpu")
        home = next((value.device for value in self._state.values()), device)
        if home.type == device.type:
            device = home  # it may differ from the current device
        kind = f"{type(self).__name__} with the options {self._options()}"
        kinds = _gather(torch.tensor([_number(kind)], dtype=torch.int64, device=device), group).flatten().tolist()
        others = [rank for rank, other in enumerate(kinds) if other != kinds[0]]
        if others:
            raise ValueError(
                f"{type(self).__name__}: expected the same metric and options on every rank, got others on the ranks "
                f"{others} than on rank 0, and {kind} on this rank. Make the metrics with the same arguments."
            )
        shapes = {name: tuple(value.shape) for name, value in self._state.items()} or nothing
        sizes = [n for name in self._layout for n in shapes[name]]
        own = torch.tensor([bool(self._state), *sizes], dtype=torch.int64, device=device)
        all_sizes = _gather(own, group)
        known = {tuple(sizes) for seen, *sizes in all_sizes.tolist() if seen}
        if len(known) > 1:
            raise ValueError(
                f"{type(self).__name__}: expected the same channels and layers on every rank, got counts of the sizes "
                f"{sorted(known)}. Pass features with the same channels and layers on all ranks."
            )
        if not known:
            return self._blank(nothing, "cpu")
        [remaining] = known
        for name, (shape, _) in self._layout.items():
            shapes[name], remaining = remaining[: len(shape)], remaining[len(shape) :]
        state = self._state or self._blank(shapes, device)
        # All ranks reduce in the same order, that of the layout.
        gathered = {name: _gather(state[name].to(device), group) for name in self._layout}
        total = {name: values[0] for name, values in gathered.items()}
        for rank in range(1, len(all_sizes)):
            total = self._combine(total, {name: values[rank] for name, values in gathered.items()})
        return {name: value.to(home) for name, value in total.items()}


def _number(text: str) -> int:
    """A 63-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _gather(value: Tensor, group) -> Tensor:
    """Gather the value of every rank: (ranks, ...)."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(values, value.contiguous(), group=group)
    return torch.stack(values)


def count(cells: Tensor, counted: Tensor, size: int) -> Tensor:
    """How often each cell 0..size-1 occurs among the ``counted`` pixels: int64 (size,)."""
    cells = torch.where(counted, cells, 0).flatten()
    return torch.zeros(size, dtype=torch.int64, device=cells.device).scatter_add(0, cells, counted.flatten().long())


def to_fixed(values: Tensor, bits: int) -> Tensor:
    """Convert to int64 multiples of 2**-bits, whose sums are exact in any order."""
    return (values.double() * 2.0**bits).round().long()


def from_fixed(values: Tensor, bits: int) -> Tensor:
    """The inverse of ``to_fixed``, in float64."""
    return values.double() / 2.0**bits
