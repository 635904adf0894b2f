"""Which pixels a loss contrasts: fixed shapes, no synchronisation, every draw a function of (seed, stream, pixel).

A sampler is anything that is called as ``sampler(labels, predictions, num_classes, seed, stream)`` with a layer's label
map and predicted class map, int64 (B, h, w) or (B, z, h, w) of a volume, label -1 = no part, and returns a bool map of
the chosen pixels.
``PixelContrastLoss`` and ``MultiScaleContrastLoss`` take one, and ``contextrast_loss`` for its base pixels.

The pixels of a pair (image, class) are drawn in the order of their hash, so a draw is uniform and without
replacement. A pixel's hash depends on its place inside its image alone (``hashing.py``): not on batch, rank or device.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks
from contextrast_kernels.backend import may_read_values
from contextrast_kernels.distance import NO_EDGE, edge_distance
from contextrast_kernels.embedding import compute_dtype, unit
from contextrast_kernels.hashing import image_hash

STREAM_ROWS = 1000
"""Rows of scale i are drawn from stream STREAM_ROWS + i."""
STREAM_BANK, STREAM_MINED_POSITIVES, STREAM_MINED_NEGATIVES, STREAM_SETS = 2000, 2001, 2002, 2003
"""Pixels for the memory bank; semi-hard mining; PNE's three sets."""

SAMPLERS = ("hard-easy", "bane", "common-count", "uniform")


@dataclass(frozen=True)
class Sampler:
    """A rule that chooses pixels of a layer.

    T pairs (image, class) have at least ``min_pixels`` pixels; each gives V of them (all, if it has fewer).

    Args:
        kind: "hard-easy", ContrastiveSeg's quota: V = min(max_samples // T, max_views), half of them wrongly predicted
            (hard) and half right (easy); where one kind is short, the other fills up.
            "bane": the same quota, but the hard pixels are those nearest to the edge of their error region (Eq. 7)
            instead of random ones.
            "common-count", of MS/CS: V = min(pixels of the rarest pair, max_views, max_samples // T).
            "uniform": max_samples // B of each image's valid pixels, whatever their class.
        max_samples: most pixels of a batch. Every pair gives at least one, so T pairs above it choose T pixels.
        max_views: most pixels of a pair.
        min_pixels: pairs with fewer take no part. None: 5 for "common-count", else max_views + 1, as published.

    Raises:
        TypeError, ValueError: an option has the wrong type or range; the error names it.
    """

    kind: str
    max_samples: int
    max_views: int
    min_pixels: int | None = None

    def __post_init__(self):
        checks.choice("sampler", self.kind, SAMPLERS)
        checks.integer("max_samples", self.max_samples, low=1)
        checks.integer("max_views", self.max_views, low=1)
        if self.min_pixels is not None:
            checks.integer("min_pixels", self.min_pixels, low=1)

    def most(self, batch: int, num_classes: int, pixels: int) -> int:
        """The most pixels that can be chosen of ``batch`` images of ``pixels``: a number, whatever the labels."""
        if self.kind == "uniform":
            chosen = max(self.max_samples, batch)
        else:
            pairs = batch * num_classes
            chosen = min(max(self.max_samples, pairs), pairs * self.max_views)
        return min(chosen, batch * pixels)

    @checks.takes_subclasses
    def __call__(
        self, labels: Tensor, predictions: Tensor, num_classes: int, seed: int | Tensor, stream: int = STREAM_ROWS
    ) -> Tensor:
        """The chosen pixels: bool, of the labels' shape.

        Args:
            labels: (B, h, w) or (B, z, h, w) integers; outside 0..N-1 a pixel takes no part.
            predictions: integers of the same shape, the predicted classes.
            num_classes: N.
            seed, stream: of the draw (``hashing.py``).

        Raises:
            TypeError, ValueError: maps of the wrong type or size; the error names the argument.
        """
        dims = 3 if isinstance(labels, Tensor) and labels.ndim > 3 else 2
        labels = checks.class_map("labels", labels, dims=dims)
        predictions = checks.class_map("predictions", predictions, shape=labels.shape, dims=dims)
        checks.together("labels", labels, "predictions", predictions)
        checks.several_classes(num_classes)
        labels, predictions = labels.long(), predictions.long()
        labels = torch.where(labels < num_classes, labels, -1)
        batch, image = labels.shape[0], images_of(labels)
        order = image_hash(seed, stream, labels.shape[1:], labels.device).expand_as(labels)
        if self.kind == "uniform":
            segment = torch.where(labels >= 0, image, batch)
            quota = torch.full_like(image.flatten(), max(self.max_samples // max(batch, 1), 1))
            return rank_in_segment(segment, batch, order) < F.pad(quota, (0, 1))[segment]

        pairs = batch * num_classes
        wrong = predictions != labels
        # Two segments a pair: the right pixels, then the wrong ones.
        segment = torch.where(labels >= 0, 2 * (image * num_classes + labels) + wrong, 2 * pairs)
        right_count, wrong_count = segment_counts(segment, 2 * pairs).reshape(pairs, 2).unbind(1)
        count = right_count + wrong_count
        least = self.min_pixels or (5 if self.kind == "common-count" else self.max_views + 1)
        kept = count >= least
        views = (self.max_samples // kept.sum().clamp(min=1)).clamp(min=1, max=self.max_views)
        if self.kind == "common-count":
            rarest = F.pad(torch.where(kept, count, self.max_views), (0, 1), value=self.max_views).amin()
            views = torch.minimum(views, rarest)
            segment = segment // 2
            return rank_in_segment(segment, pairs, order) < F.pad(views * kept, (0, 1))[segment]

        # ContrastiveSeg's four cases in two lines: half and half, the other kind filling up where one is short.
        hard = torch.minimum(wrong_count, torch.maximum(views // 2, views - right_count))
        easy = torch.minimum(right_count, views - hard)
        quota = torch.stack([easy * kept, hard * kept], 1).flatten()
        if self.kind == "bane":
            is_class = (predictions >= 0) & (predictions < num_classes)
            errors = torch.where(wrong & is_class & (labels >= 0), predictions, -1)
            distance = edge_distance(errors, squared=True).long()
            # Ties by hash, as in BANE; right pixels, and predictions that are no class, by hash alone.
            order = (torch.where(distance >= 0, distance, NO_EDGE) << 32) + order
        return rank_in_segment(segment, 2 * pairs, order) < F.pad(quota, (0, 1))[segment]


def images_of(maps: Tensor) -> Tensor:
    """The number of each image of maps (B, ...), int64, to be broadcast over its pixels."""
    return torch.arange(maps.shape[0], device=maps.device).view(-1, *(1,) * (maps.ndim - 1))


def segment_counts(segment: Tensor, segments: int) -> Tensor:
    """How many elements each of the segments 0..segments-1 has: int64 (segments,). Others count nowhere."""
    flat = segment.flatten()
    return flat.new_zeros(segments + 1).index_add(0, flat, torch.ones_like(flat))[:-1]


def rank_in_segment(segment: Tensor, segments: int, order: Tensor) -> Tensor:
    """The place of every element among those of its segment, in ascending ``order`` (equal ones: as they stand).

    ``segment`` int64 in 0..segments, the last for elements that are in none, whose rank means nothing.
    """
    flat = segment.flatten()
    by_order = order.flatten().argsort(stable=True)
    ordered, by_segment = flat[by_order].sort(stable=True)
    counts = segment_counts(segment, segments)
    first = F.pad(counts.cumsum(0), (1, 0))  # the first place of each segment, and of the rest
    rank = torch.arange(flat.shape[0], device=flat.device) - first[ordered]
    return torch.empty_like(flat).scatter(0, by_order[by_segment], rank).reshape(segment.shape)


def indices_of(chosen: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The flat indices of the chosen elements, int64 (R,), and which of them are filled, bool (R,).

    R is ``most``, or the number of chosen elements where that is smaller and may be read (eager, on a CPU). The indices
    are in ascending order, the filled ones first. The i-th of the others is i: the gradients of rows that read one
    element are added one after another, so no element stands in for all of them. More than ``most``, which is at most
    the number of elements, are cut off.
    """
    flat = chosen.flatten()
    if may_read_values(flat):
        index = flat.nonzero()[:most, 0]
        return index, torch.ones_like(index, dtype=torch.bool)
    place = flat.cumsum(0) - 1
    slot = torch.where(flat & (place < most), place, most)
    every = torch.arange(flat.shape[0], device=flat.device)
    index = every.new_zeros(most + 1).scatter(0, slot, every)[:-1]
    filled = every[:most] < flat.sum()
    return torch.where(filled, index, every[:most]), filled


def thinned(chosen: Tensor, most: int, order: Tensor) -> Tensor:
    """The chosen elements, or the first ``most`` of them in ascending ``order`` if there are more."""
    return chosen & (rank_in_segment((~chosen).long(), 1, order) < most)


def take_rows(features: Tensor, index: Tensor, filled: Tensor, normalize: bool) -> Tensor:
    """The embeddings (R, D) of the pixels with flat indices ``index`` into (B, *size); zero where not filled."""
    place: list[Any] = []
    for side in features.shape[:1:-1]:
        place.insert(0, index % max(side, 1))
        index = index // max(side, 1)
    x = features[(index, slice(None), *place)].to(compute_dtype(features.dtype))
    x = torch.where(filled.unsqueeze(1), x, 0.0)
    return unit(x) if normalize else x


def sampled_rows(
    features: Tensor, targets: Tensor, chosen: Tensor, most: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The chosen pixels' embeddings (most, D) and labels (most,); the rows that are left over have label -1."""
    index, filled = indices_of(chosen & (targets >= 0), most)
    labels = torch.where(filled, targets.flatten()[index], -1) if most else index
    return take_rows(features, index, filled, normalize), labels
