"""Accumulators that all programs add to, and that ranks reduce, in one zero-filled allocation."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from contextrast_kernels.kernels import _launch


class Sums(NamedTuple):
    """int64 each, but for ``max_abs``; vectors and terms in fixed point. After ranks added them up, the vectors are
    float64."""

    vectors: Tensor | None
    """(layers, N, D): Σ v of every class."""
    pulled: Tensor | None
    """(layers, N, D): A⁺ of ``pixel_anchor``."""
    pushed: Tensor | None
    """(layers, N, D): A⁻."""
    counts: Tensor
    """(layers, N): valid pixels of every class."""
    drawn: Tensor
    """(layers,): hard and base negatives, each pixel once."""
    broken: Tensor
    """(layers, N): nonzero where a pixel of the class is not finite."""
    largest: Tensor
    """(layers, N): the largest s of a hard negative (``_tiles.in_order``)."""
    total: Tensor
    """(layers, N): Σ exp(s - largest) of the hard negatives."""
    terms: Tensor
    """(layers, 3, N): Σ softplus(Z - s), Σ σ; nonzero where a term is not finite."""
    max_abs: Tensor | None
    """(layers,) floats: the largest |x| of a valid pixel; None when normalised."""


def zeros(features: Sequence[Tensor], num_classes: int, normalize: bool, *, anchors: bool, loss: bool) -> Sums:
    """anchors, loss: whether Σ v, and A⁺ and A⁻, will be summed; else these are None."""
    L, N, D = len(features), num_classes, features[0].shape[1]
    table = (L, N, D)
    shapes = Sums(
        vectors=table if anchors else None,
        pulled=table if loss else None,
        pushed=table if loss else None,
        counts=(L, N),
        drawn=(L,),
        broken=(L, N),
        largest=(L, N),
        total=(L, N),
        terms=(L, 3, N),
        max_abs=None if normalize else (L,),
    )
    starts = [0]
    for shape in shapes:
        size = 0 if shape is None else math.prod(shape)
        starts.append(starts[-1] + size + size % 2)  # so that 16 divides every address
    words = torch.zeros(starts[-1], dtype=torch.int64, device=features[0].device)
    sums = Sums(
        *(
            None if shape is None else words.as_strided(shape, dense(shape), start)
            for shape, start in zip(shapes, starts)
        )
    )
    if normalize:
        return sums
    return sums._replace(max_abs=sums.max_abs.view(_launch.accumulator(features[0].dtype))[:L])


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
