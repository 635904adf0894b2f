"""Boundary-aware contrastive learning for semantic segmentation: the Contextrast loss (CVPR 2024) and its parts."""

from contextrast_kernels import metrics, viz
from contextrast_kernels.anchors import class_anchors, fuse_anchors
from contextrast_kernels.attach import attach, split_heads
from contextrast_kernels.backend import available, backend, warn_if_not_built
from contextrast_kernels.bane import bane_negatives, error_map, select_nearest
from contextrast_kernels.contextrast import contextrast_loss
from contextrast_kernels.distance import distance_transform, edge_distance
from contextrast_kernels.info_nce import info_nce
from contextrast_kernels.modules import ContextrastCriterion, ContextrastLoss, ProjectionHead
from contextrast_kernels.pixel_anchor import pixel_anchor_loss
from contextrast_kernels.relatives import (
    MemoryBank,
    MultiScaleContrastLoss,
    PixelContrastLoss,
    PNELoss,
    RegionContrastLoss,
    Sampler,
)

__version__ = "0.1.0"

__all__ = [
    "ContextrastCriterion",
    "ContextrastLoss",
    "MemoryBank",
    "MultiScaleContrastLoss",
    "PNELoss",
    "PixelContrastLoss",
    "ProjectionHead",
    "RegionContrastLoss",
    "Sampler",
    "attach",
    "available",
    "backend",
    "bane_negatives",
    "class_anchors",
    "contextrast_loss",
    "distance_transform",
    "edge_distance",
    "error_map",
    "fuse_anchors",
    "info_nce",
    "metrics",
    "pixel_anchor_loss",
    "select_nearest",
    "split_heads",
    "viz",
]

warn_if_not_built()
