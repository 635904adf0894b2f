"""Mean IoU over a data set, and the boundary mask that restricts it to a trimap."""

from __future__ import annotations

import torch
from torch import Tensor

from contextrast_kernels import checks
from contextrast_kernels.bane import NO_EDGE, distance_transform
from contextrast_kernels.maps import targets


class ConfusionMatrix:
    """Counts of (label, prediction) pairs, gathered batch by batch on the maps' device without synchronising.

    ``counts`` is int64 (N, N+1): row n holds the pixels with label n by predicted class, in the last column those
    that were predicted as no class.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, device: torch.device | str | None = None):
        checks.num_classes(num_classes)
        checks.ignore_index(ignore_index)
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes + 1, dtype=torch.int64, device=device)

    def update(self, predictions: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> None:
        """Add a batch: class maps (B, H, W) of one size; with a bool ``mask`` (B, H, W) only its True pixels.

        Pixels whose label is ``ignore_index`` or outside 0..N-1 are left out. A prediction outside 0..N-1 is a miss
        for the label's class and a false alarm for none.
        """
        N = self.num_classes
        labels = checks.class_map("labels", labels)
        predictions = checks.class_map("predictions", predictions, shape=labels.shape)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != labels.shape):
            raise ValueError(f"mask: expected bool of shape {tuple(labels.shape)}, got {checks.describe(mask)}")
        labels = targets(labels, *labels.shape[-2:], N, self.ignore_index)
        predictions = predictions.long()
        predictions = torch.where((predictions >= 0) & (predictions < N), predictions, N)
        counted = labels >= 0 if mask is None else (labels >= 0) & mask
        cell = torch.where(counted, labels * (N + 1) + predictions, 0)
        self.counts.view(-1).scatter_add_(0, cell.flatten(), counted.flatten().long())

    def iou(self) -> Tensor:
        """Intersection over union of each class, float64 (N,); NaN for a class in neither labels nor predictions."""
        hits = self.counts.diagonal()
        union = self.counts.sum(1) + self.counts[:, :-1].sum(0) - hits
        return hits.double() / union  # 0 / 0 is NaN

    def mean_iou(self) -> Tensor:
        """Mean of ``iou()`` over the classes in labels or predictions, float64 scalar; NaN when there is none."""
        return self.iou().nanmean()


def boundary_mask(labels: Tensor, radius: float, *, num_classes: int | None = None, ignore_index: int = 255) -> Tensor:
    """The trimap of a label map: the valid pixels at most ``radius`` px from a boundary between two classes.

    A boundary pixel is a valid pixel with a 4-neighbour that is valid and of another class. So both sides of a
    boundary belong to it, and the border of an ignored region is none.

    Args:
        labels: (B, H, W) or (B, 1, H, W) integers.
        radius: Euclidean, between pixel centres; 0 gives the boundary pixels alone.
        num_classes: N; values from N on are ignored. None: every value >= 0 is a class.
        ignore_index: the label of pixels that take no part.

    Returns:
        bool (B, H, W).
    """
    labels = checks.class_map("labels", labels)
    checks.real("radius", radius, low=0)
    checks.ignore_index(ignore_index)
    classes = targets(labels, *labels.shape[-2:], num_classes, ignore_index)
    boundary = torch.zeros_like(classes, dtype=torch.bool)
    for axis in (-2, -1):
        length = classes.shape[axis]
        if length < 2:
            continue
        before, after = classes.narrow(axis, 0, length - 1), classes.narrow(axis, 1, length - 1)
        differs = (before != after) & (before >= 0) & (after >= 0)
        boundary.narrow(axis, 0, length - 1).logical_or_(differs)
        boundary.narrow(axis, 1, length - 1).logical_or_(differs)
    distance = distance_transform(~boundary, squared=True)
    return (distance <= radius**2) & (distance < NO_EDGE) & (classes >= 0)
