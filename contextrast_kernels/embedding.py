"""Pixel embeddings: the vectors v of Eq. 1 from a feature map, zero at ignored pixels."""

from typing import NamedTuple

import torch
from torch import Tensor

from contextrast_kernels.backend import may_read_values

ZERO_NORM = 1e-12
"""A vector no longer than this has no direction: it becomes zero and passes no gradient (x / 1e-12 would have the
derivative 1e12)."""


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float32 for half precision and float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def unit(x: Tensor) -> Tensor:
    """x / ‖x‖₂ over the last axis; zero where ‖x‖₂ <= ZERO_NORM. A NaN stays a NaN."""
    return x * _inverse_norm((x * x).sum(-1, keepdim=True))


def _inverse_norm(squared_norm: Tensor) -> Tensor:
    """1 / ‖x‖₂ from ‖x‖₂²; 0 without a gradient where ‖x‖₂ <= ZERO_NORM. A NaN stays a NaN."""
    vanishes = squared_norm <= ZERO_NORM**2
    # The inner `where` keeps the derivative of the reciprocal finite; the outer one stops it.
    return torch.where(vanishes, 0.0, torch.where(vanishes, 1.0, squared_norm).rsqrt())


class Embeddings(NamedTuple):
    """The embeddings v = scale · x of a layer's pixels, kept as their factors.

    The anchors and the similarities both multiply x by a small matrix. To scale that product costs less than to scale
    x.
    """

    x: Tensor
    """(B, D, P). At pixels that are not valid it is zero, unless ``moderate`` is True."""
    scale: Tensor
    """(B, 1, P), 1 / ‖x‖₂, or 1 without normalisation."""
    moderate: bool
    """Whether every value of x is known to be finite and far from overflow, so that its product with 0 is 0."""


def pixel_embeddings(features: Tensor, valid: Tensor, normalize: bool) -> Embeddings:
    """Embeddings of a feature map (B, D, *size), the pixels in memory order.

    A NaN in a pixel outside ``valid`` (B, *size) reaches neither value nor gradient, because such pixels become zero.
    On eager CPU code, where values can be read, this step is left out if all features are moderate.
    """
    x = features.to(compute_dtype(features.dtype)).flatten(2)
    moderate = _is_moderate(x)
    if not moderate:
        x = torch.where(valid.flatten(1).unsqueeze(1), x, 0.0)
        moderate = _is_moderate(x)
    if not normalize:
        return Embeddings(x, torch.ones_like(x[:, :1]), moderate)
    squared_norm = _SquaredNorm.apply(x) if moderate else (x * x).sum(1, keepdim=True)
    return Embeddings(x, _inverse_norm(squared_norm), moderate)


def _is_moderate(x: Tensor) -> bool:
    return may_read_values(x) and (x.numel() == 0 or all(abs(v) <= 1e15 for v in x.detach().aminmax()))


class _SquaredNorm(torch.autograd.Function):
    """(x · x).sum(1, keepdim=True) of x (B, D, P). On a CPU new memory costs more than arithmetic: autograd's own
    derivative of x · x would take three tensors as large as x, this one takes one."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return sum((part * part).sum(1, keepdim=True) for part in x.split(32, 1))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return 2 * gradient * x

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        return (2 * x * tangent).sum(1, keepdim=True)
