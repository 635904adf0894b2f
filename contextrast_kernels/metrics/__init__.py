"""Evaluation over a data set: IoU, at boundaries and over instances, and how embeddings lie.

Every metric is fed batch by batch with ``update``, on the maps' device and without synchronising; ``compute()`` gives a
dict of float64 tensors, over all ranks where torch.distributed runs; ``reset()`` starts again. A scalar in that dict is
a mean over classes, what ends in ``_per_class`` has one entry a class, NaN for a class that never occurred.
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
