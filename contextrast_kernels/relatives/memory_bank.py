"""Embeddings of earlier batches: two queues per class, one of pixels and one of region centres."""

import torch
from torch import Tensor, nn

from contextrast_kernels import checks, ranks
from contextrast_kernels.backend import may_read_values
from contextrast_kernels.info_nce import check_rows
from contextrast_kernels.relatives.samplers import rank_in_segment, segment_counts
from contextrast_kernels.state import lasting


class MemoryBank(nn.Module):
    """A first-in-first-out queue of pixel embeddings and one of region centres for every class.

    A region centre is the mean embedding of the pixels of one class in one image, scaled to unit length.

    Unused places are not columns of any loss, so an empty bank gives a loss of 0, not a contrast with random vectors.
    Writing does not synchronise. Embeddings that are not finite are skipped, because one overflow would otherwise stay
    for thousands of steps.

    The bank is saved in the ``state_dict`` of the loss that it is passed to, but it is not one of its buffers, which
    DistributedDataParallel would overwrite with those of rank 0 in every forward. Without ``group`` every rank keeps
    its own bank. With a group all ranks write the entries of all ranks, in the order of the ranks, and hold the same
    bank; every rank must then write the same number of rows, so the ranks need the same batch size and layer size. If
    they differ in the first batch, every rank raises an error.

    Args:
        num_classes: N.
        dim: D, the channels of the embeddings.
        pixels: length of each class's queue of pixels; 0 for none.
        regions: length of each class's queue of region centres; 0 for none.
        group: a torch.distributed process group whose ranks share what they write. None: this process alone.

    Raises:
        TypeError, ValueError: an argument has the wrong type, range or size; the error names it.
        RuntimeError: torch.distributed does not know the group.

    Examples:
        >>> bank = MemoryBank(num_classes=19, dim=256)
        >>> criterion = PixelContrastLoss(num_classes=19, bank=bank)
    """

    QUEUES = ("pixels", "regions")

    def __init__(self, num_classes: int, dim: int, *, pixels: int = 5000, regions: int = 5000, group=None):
        super().__init__()
        checks.num_classes(num_classes)
        checks.integer("dim", dim, low=1)
        checks.integer("pixels", pixels, low=0)
        checks.integer("regions", regions, low=0)
        if pixels + regions == 0:
            raise ValueError(
                "pixels: expected at least one queue, got pixels=0 and regions=0. Set one of them above 0."
            )
        self.num_classes, self.dim, self.lengths = num_classes, dim, (pixels, regions)
        self.group = ranks.name_of(group)
        # One row more than the queues need: entries that are not kept are written there.
        self.storage = lasting(torch.zeros(num_classes * (pixels + regions) + 1, dim))
        self.written = lasting(torch.zeros(len(self.QUEUES), num_classes, dtype=torch.int64))

    @property
    def counts(self) -> Tensor:
        """Entries of each queue and class: int64 (2, N), pixels first."""
        return torch.stack([w.clamp(max=length) for w, length in zip(self.written, self.lengths)])

    def columns(self) -> tuple[Tensor, Tensor]:
        """All places as columns of ``info_nce``: embeddings (N · (pixels + regions), D), not copied, and their classes,
        int64, -1 for unused places."""
        filled = [
            torch.arange(length, device=n.device) < n.unsqueeze(1) for n, length in zip(self.counts, self.lengths)
        ]
        classes = torch.arange(self.num_classes, device=self.written.device).unsqueeze(1)
        return self.storage[:-1], torch.where(torch.cat(filled, 1), classes, -1).flatten()

    def copied_columns(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A copy of ``columns`` on the rows' device and in their dtype, without empty places where values may be read.
        It is a copy because the bank is written before the backward pass reads it."""
        self.follow(rows.device)
        entries, classes = self.columns()
        if may_read_values(rows) and may_read_values(classes):
            written = classes >= 0
            return entries[written].to(rows.dtype), classes[written]
        return entries.to(rows.dtype, copy=True), classes

    @checks.takes_subclasses
    @torch.no_grad()
    def push(self, queue: str, embeddings: Tensor, labels: Tensor) -> None:
        """Write embeddings; each replaces the oldest entry of its class.

        Args:
            queue: "pixels" or "regions".
            embeddings: (K, D) floating point.
            labels: (K,) integers; rows with a label outside 0..N-1 are left out. If a class has more rows than
                places, its last rows are kept.

        Raises:
            TypeError, ValueError: an argument has the wrong type or size; the error names it.
        """
        checks.choice("queue", queue, self.QUEUES)
        labels = check_rows("embeddings", embeddings, "labels", labels)
        self.check_dim("embeddings", embeddings)
        self.follow(embeddings.device)
        number = self.QUEUES.index(queue)
        length, offset = self.lengths[number], sum(self.lengths[:number])
        if length == 0:
            return
        embeddings, labels = embeddings.to(self.storage.dtype), labels.long()
        if self.group is not None:
            rows = f"{int(labels.shape[0])} rows of {self.dim} channels for the {length} {queue} of a memory bank"
            ranks.agree(self.group, f"{rows} of {self.num_classes} classes")
            embeddings, labels = (ranks.gathered(x, self.group) for x in (embeddings, labels))
        N = self.num_classes
        kept = (labels >= 0) & (labels < N) & embeddings.isfinite().all(1)
        label = torch.where(kept, labels, N)
        order = torch.arange(label.shape[0], device=label.device)
        rank, count = rank_in_segment(label, N, order), segment_counts(label, N)
        label = torch.where(kept, labels, 0)
        kept = kept & (rank >= count[label] - length)
        place = (self.written[number, label] + rank) % length
        block = sum(self.lengths)
        self.storage.index_copy_(0, torch.where(kept, label * block + offset + place, N * block), embeddings)
        self.written[number].add_(count)

    def check_dim(self, name: str, embeddings: Tensor) -> None:
        if embeddings.shape[1] != self.dim:
            raise ValueError(
                f"{name}: expected {self.dim} channels, as the memory bank has, got {checks.describe(embeddings)}. "
                "Make the bank with dim = the channels of the features."
            )

    def follow(self, device: torch.device) -> None:
        if self.storage.device != device:
            self.storage, self.written = lasting(self.storage, device), lasting(self.written, device)

    def _apply(self, fn, recurse=True):
        # .to(device) moves the bank; .half() does not change its dtype.
        super()._apply(fn, recurse)
        self.follow(fn(self.storage[:0]).device)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "storage"] = self.storage
        destination[prefix + "written"] = self.written

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        for name in ("storage", "written"):
            own, saved = getattr(self, name), state.get(prefix + name)
            if prefix + name in unexpected:
                unexpected.remove(prefix + name)
            if saved is None:
                if strict:
                    missing.append(prefix + name)
            elif saved.shape != own.shape:
                errors.append(
                    f"{prefix}{name}: expected shape {tuple(own.shape)}, that of a bank of {self.num_classes} classes, "
                    f"{self.dim} channels and {self.lengths} places, got {checks.describe(saved)}"
                )
            else:
                own.copy_(saved)

    def extra_repr(self) -> str:
        pixels, regions = self.lengths
        return f"num_classes={self.num_classes}, dim={self.dim}, pixels={pixels}, regions={regions}"


def check_bank(bank, num_classes: int) -> None:
    """Check the bank that is passed to a loss."""
    if not isinstance(bank, MemoryBank):
        raise TypeError(
            f"bank: expected a MemoryBank, got {checks.describe(bank)}. Pass ck.MemoryBank(num_classes, dim)."
        )
    if bank.num_classes != num_classes:
        raise ValueError(
            f"bank: expected a MemoryBank of {num_classes} classes (num_classes), got one of {bank.num_classes}. "
            "Make both with the same num_classes."
        )
