"""Metrics over a data set: IoU of regions, boundaries and instances, and the geometry of embeddings.

``update`` adds a batch on the maps' device, without synchronising. ``compute()`` returns a dict of tensors, over all
ranks if torch.distributed is initialised. ``reset()`` starts again. The docstring of each metric lists its entries,
which are float64 unless it says int64. An entry whose name ends in ``_per_class`` has one number per class, NaN for a
class that never occurred.
"""

from contextrast_kernels.metrics.boundaries import BoundaryF1, BoundaryIoU, TrimapIoU, boundary_mask
from contextrast_kernels.metrics.embeddings import AlignmentUniformity, AnchorSimilarity
from contextrast_kernels.metrics.regions import (
    CITYSCAPES_CATEGORIES,
    CITYSCAPES_INSTANCE_SIZES,
    ConfusionMatrix,
    InstanceIoU,
)

__all__ = [
    "CITYSCAPES_CATEGORIES",
    "CITYSCAPES_INSTANCE_SIZES",
    "AlignmentUniformity",
    "AnchorSimilarity",
    "BoundaryF1",
    "BoundaryIoU",
    "ConfusionMatrix",
    "InstanceIoU",
    "TrimapIoU",
    "boundary_mask",
]
