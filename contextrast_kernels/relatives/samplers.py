"""Samplers: they choose the pixels that a loss contrasts, with static shapes and without synchronisation.

A sampler is a callable ``sampler(labels, predictions, num_classes, seed, stream)``. It gets a layer's label map and
predicted class map, int64 (B, h, w), or (B, z, h, w) of a volume, with label -1 for ignored pixels, and returns a bool
map of the chosen pixels. ``PixelContrastLoss`` and ``MultiScaleContrastLoss`` take one, and ``contextrast_loss`` for
its base pixels.

The pixels of a pair (image, class) are drawn in the order of a hash of (seed, stream, pixel), so a draw is uniform and
without replacement. The hash depends on the pixel's place inside its image (``hashing.py``), so the order does not
depend on batch, rank or device. How many pixels of a pair are drawn depends on the whole batch.
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
"""The rows of scale i are drawn from stream STREAM_ROWS + i."""
STREAM_BANK, STREAM_MINED_POSITIVES, STREAM_MINED_NEGATIVES, STREAM_SETS = 2000, 2001, 2002, 2003
"""The streams of the memory bank's pixels, of semi-hard mining, and of PNE's three sets."""

SAMPLERS = ("hard-easy", "bane", "common-count", "uniform")


@dataclass(frozen=True)
class Sampler:
    """A rule that chooses pixels of a layer.

    It chooses V pixels of each pair (image, class) that has at least ``min_pixels`` pixels, or all of them if there are
    fewer than V. T is the number of these pairs.

    Args:
        kind: "hard-easy", ContrastiveSeg's quota: V = min(max_samples // T, max_views), half of them wrongly predicted
            (hard) and half right (easy); where one kind is short, the other fills up.
            "bane": the same quota, but the hard pixels are those nearest to the edge of their error region (Eq. 7)
            instead of random ones.
            "common-count", of MS/CS: V = min(pixels of the rarest pair, max_views, max_samples // T).
            "uniform": max_samples // B of each image's valid pixels, whatever their class.
        max_samples: the most pixels of a batch. Every pair gives at least one pixel, so more pairs than this give T
            pixels.
        max_views: the most pixels of a pair.
        min_pixels: pairs with fewer pixels are left out. None: 5 for "common-count", else max_views + 1, as published.

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
        """The most pixels that can be chosen in ``batch`` images of ``pixels`` pixels, for any labels."""
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
        """Choose pixels; return a bool map of the labels' shape.

        Args:
            labels: (B, h, w) or (B, z, h, w) integers; pixels outside 0..N-1 are ignored.
            predictions: integers of the same shape, the predicted classes.
            num_classes: N.
            seed, stream: the two numbers that a draw depends on (``hashing.py``).

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

        # ContrastiveSeg's four cases in two lines: half and half; if one kind is short, the other fills up.
        hard = torch.minimum(wrong_count, torch.maximum(views // 2, views - right_count))
        easy = torch.minimum(right_count, views - hard)
        quota = torch.stack([easy * kept, hard * kept], 1).flatten()
        if self.kind == "bane":
            is_class = (predictions >= 0) & (predictions < num_classes)
            errors = torch.where(wrong & is_class & (labels >= 0), predictions, -1)
            distance = edge_distance(errors, squared=True).long()
            # Ties by hash, as in BANE. Right pixels, and predictions outside 0..N-1, are ordered by the hash alone.
            order = (torch.where(distance >= 0, distance, NO_EDGE) << 32) + order
        return rank_in_segment(segment, 2 * pairs, order) < F.pad(quota, (0, 1))[segment]


def images_of(maps: Tensor) -> Tensor:
    """The index of each image of maps (B, ...), int64, in a shape that broadcasts over its pixels."""
    return torch.arange(maps.shape[0], device=maps.device).view(-1, *(1,) * (maps.ndim - 1))


def segment_counts(segment: Tensor, segments: int) -> Tensor:
    """The number of elements of each segment 0..segments-1: int64 (segments,). Other elements are not counted."""
    flat = segment.flatten()
    return flat.new_zeros(segments + 1).index_add(0, flat, torch.ones_like(flat))[:-1]


def rank_in_segment(segment: Tensor, segments: int, order: Tensor) -> Tensor:
    """The rank of every element within its segment, in ascending ``order``; equal elements keep their order.

    ``segment`` is int64 in 0..segments. The last value is for elements in no segment, whose rank is meaningless.
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

    R is ``most``, or the number of chosen elements if that is smaller and may be read (eager, on a CPU). The filled
    indices come first, in ascending order. Unfilled place i has index i: if all of them had one index, the gradients of
    their rows would be added to one element, one after another. Chosen elements beyond ``most`` are dropped; ``most``
    is at most the number of elements.
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
    """The chosen pixels' embeddings (R, D) and labels (R,), with R of ``indices_of``; unused rows have label -1."""
    index, filled = indices_of(chosen & (targets >= 0), most)
    labels = torch.where(filled, targets.flatten()[index], -1) if most else index
    return take_rows(features, index, filled, normalize), labels
