"""Pixel embeddings: the vectors v of Eq. 1 from a feature map, zero at ignored pixels."""

import torch
from torch import Tensor

ZERO_NORM = 1e-12
"""A vector no longer than this has no direction: it becomes zero and passes no gradient (x / 1e-12 would have the
derivative 1e12)."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision and float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖₂ over the last axis; zero where ‖x‖₂ <= ZERO_NORM. A NaN stays a NaN."""
    squared_norm = (x * x).sum(-1, keepdim=True)
    vanishes = squared_norm <= ZERO_NORM**2
    # The inner `where` keeps the derivative of the reciprocal finite; the outer one stops it.
    return torch.where(vanishes, 0.0, x * torch.where(vanishes, 1.0, squared_norm).rsqrt())


def pixel_embeddings(features: Tensor, valid: Tensor, normalize: bool) -> Tensor:
    """Embeddings (P, D) of a feature map (B, D, *size), one row per pixel in memory order, zero outside ``valid``.

    Pixels outside ``valid`` (B, *size) become zero before anything is computed on them, so that a NaN there reaches
    neither value nor gradient.
    """
    x = features.movedim(1, -1).to(compute_dtype(features.dtype))
    x = torch.where(valid.unsqueeze(-1), x, 0.0).flatten(0, -2)
    return unit(x) if normalize else x
