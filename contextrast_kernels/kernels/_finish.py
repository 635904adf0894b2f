"""The loss and dL/dâ from the sums over all pixels, class by class: the last step of the forward pass, after the last
reduction over ranks.

    L = 1/|C| Σ_n 1/c_n Σ_{p∈P^n} softplus(Z_n - s_np)
    dL/dâ^n = 1/(|C| τ) ( -A⁺_n / c_n + G_n A⁻_n )

with A⁺ and A⁻ as ``pixel_anchor`` sums them and G_n the mean of σ over P^n. G_n is known only after that sweep, which
is why it keeps A⁺ and A⁻ apart.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._sums import Sums
from contextrast_kernels.kernels._tile_table import next_power_of_2
from contextrast_kernels.kernels._tiles import (
    count_scale,
    float64_from_bits,
    inverse_norm,
    pushed_scale,
    sum_scale,
    term_scale,
)


class Outcome(NamedTuple):
    loss: Tensor
    """Scalar: Σ λ_i L_i."""
    losses: Tensor
    """(layers,) L_i."""
    report: Tensor
    """(3, layers) int64: classes, positives, negatives."""
    coefficients: Tensor
    """(layers, 2, N): k⁺ and k⁻ of ``_gradient``."""
    pull: Tensor
    """(layers, N, D): T of ``_gradient``, or dL/dâ of given anchors."""


class Scales(NamedTuple):
    """What the fixed-point scales of the sums follow from."""

    lengths: Tensor
    """(layers, N): ‖â‖ before normalisation."""
    max_abs: Tensor | None
    temperature: float

    def encoded(self) -> "Scales":
        """Return the same for a kernel, with the bits of the temperature."""
        return self._replace(temperature=_launch.float64_bits(self.temperature))


def finish(
    sums: Sums,
    table: Tensor,
    Z: Tensor,
    scales: Scales,
    layer_weights: Sequence[float],
    *,
    fusion_weight: float | None = None,
    normalize_anchors: bool = False,
) -> Outcome:
    """Return the loss and dL/dâ from the sums over the pixels of all ranks; with ``fusion_weight``, T in the place of
    dL/dâ: the pull on each class's pixels."""
    L, N, D = table.shape
    device = table.device
    outcome = Outcome(
        loss=torch.empty((), dtype=table.dtype, device=device),
        losses=torch.empty(L, dtype=table.dtype, device=device),
        report=torch.empty(3, L, dtype=torch.int64, device=device),
        coefficients=torch.empty(L, 2, N, dtype=table.dtype, device=device),
        pull=torch.empty_like(table),
    )
    _launch.launch(
        _finish,
        (N,),
        {"pulled": sums.pulled, "pushed": sums.pushed, "terms": sums.terms, "counts": sums.counts}
        | {"drawn": sums.drawn, "table": table, "Z": Z, "scales": scales.encoded(), "outcome": outcome}
        | {
            "layer_weights": tuple(_launch.float64_bits(weight) for weight in layer_weights),
            "fusion_weight": _launch.float64_bits(fusion_weight or 0.0),
            "N": N,
        },
        {
            "L": L,
            "D": D,
            "BLOCK": next_power_of_2(D),
            "BINS": next_power_of_2(N),
            "NORMALIZE": scales.max_abs is None,
            "NORMALIZE_ANCHORS": normalize_anchors,
            "GIVEN": fusion_weight is None,
            **_launch.UNFUSED,
        },
    )
    return outcome


@triton.jit
def _dL_dfused(
    pulled,
    pushed,
    terms,
    counts,
    scales,
    layer_weight,
    layer,
    n,
    d,
    N,
    D: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Return dL/dâ of one class of a layer, (BLOCK,), its k⁺ and k⁻, all in float64, and its count of pixels."""
    every = tl.arange(0, BINS)
    all_counts = tl.load(counts + layer * N + every, mask=every < N, other=0)
    present = tl.maximum(tl.sum((all_counts > 0).to(tl.int32), 0), 1).to(tl.float64)
    count = tl.load(counts + layer * N + n)
    pixels = tl.maximum(count, 1).to(tl.float64)
    share = tl.load(terms + (3 * layer + 1) * N + n).to(tl.float64) / count_scale(count) / pixels  # G
    A_pulled = tl.load(pulled + (layer * N + n) * D + d, mask=d < D, other=0)
    A_pushed = tl.load(pushed + (layer * N + n) * D + d, mask=d < D, other=0)
    A_pulled = A_pulled.to(tl.float64) / sum_scale(scales.max_abs, layer, count, NORMALIZE)
    A_pushed = A_pushed.to(tl.float64) / pushed_scale(scales.max_abs, layer, NORMALIZE)
    temperature = float64_from_bits(scales.temperature)
    strength = tl.where(count > 0, float64_from_bits(layer_weight) / (present * temperature), 0.0)
    slope = strength * (share * A_pushed - A_pulled / pixels)
    slope = tl.where(tl.load(terms + (3 * layer + 2) * N + n) > 0, float("nan"), slope)
    return tl.where(count > 0, slope, 0.0), -strength / pixels, strength * share, count


@triton.jit(do_not_specialize=["scales", "layer_weights", "fusion_weight", "N"])
def _finish(
    pulled,
    pushed,
    terms,
    counts,
    drawn,
    table,
    Z,
    scales,
    outcome,
    layer_weights,
    fusion_weight,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_ANCHORS: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """Each program takes one class and writes dL/dâ of all layers, or with fusion what follows from it back through
    normalisation and fusion: dL/da, divided by the count. The first program also adds up the loss."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    w_h = float64_from_bits(fusion_weight)
    top_count = tl.load(counts + (L - 1) * N + n)
    from_below = tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(L):
        slope, k_pull, k_push, count = _dL_dfused(
            pulled, pushed, terms, counts, scales, layer_weights[i], i, n, d, N, D, BINS, NORMALIZE
        )
        coefficients = outcome.coefficients + 2 * i * N + n
        tl.store(coefficients, k_pull.to(coefficients.dtype.element_ty))
        tl.store(coefficients + N, k_push.to(coefficients.dtype.element_ty))
        if NORMALIZE_ANCHORS:
            # â = a/‖a‖: dL/da = (dL/dâ - â ⟨â, dL/dâ⟩) / ‖a‖.
            unit = tl.load(table + (i * N + n) * D + d, mask=d < D, other=0.0).to(tl.float64)
            own_length = tl.load(scales.lengths + i * N + n).to(tl.float64)
            slope = (slope - unit * tl.sum(unit * slope, 0)) * inverse_norm(own_length * own_length, True)
        if not GIVEN:
            if i < L - 1:
                from_below += tl.where((top_count > 0) & (count > 0), w_h * slope, 0.0)
                slope = tl.where(top_count > 0, (1 - w_h) * slope, slope)
            else:
                slope += from_below
            slope = slope / tl.maximum(count, 1).to(tl.float64)
        tl.store(outcome.pull + (i * N + n) * D + d, slope.to(table.dtype.element_ty), mask=d < D)
    if n == 0:
        every = tl.arange(0, BINS)
        exists = every < N
        total_loss = tl.zeros((), tl.float64)
        for i in tl.static_range(L):
            pixels = tl.load(counts + i * N + every, mask=exists, other=0)
            present = tl.sum((pixels > 0).to(tl.int64), 0)
            inverse_temperature = (1.0 / float64_from_bits(scales.temperature)).to(Z.dtype.element_ty)
            log_sum = tl.load(Z + i * N + every, mask=exists, other=0.0)
            length = tl.load(scales.lengths + i * N + every, mask=exists, other=0.0)
            scale, _ = term_scale(log_sum, length, scales.max_abs, i, pixels, inverse_temperature, D, NORMALIZE)
            sums = tl.load(terms + 3 * i * N + every, mask=exists, other=0).to(tl.float64)
            mean = tl.where(pixels > 0, sums / scale / tl.maximum(pixels, 1).to(tl.float64), 0.0)
            broken = tl.load(terms + (3 * i + 2) * N + every, mask=exists, other=0) > 0
            layer_loss = tl.sum(mean, 0) / tl.maximum(present, 1).to(tl.float64)
            layer_loss = tl.where(tl.max((broken & (pixels > 0)).to(tl.int32), 0) > 0, float("nan"), layer_loss)
            total_loss += float64_from_bits(layer_weights[i]) * layer_loss
            tl.store(outcome.losses + i, layer_loss.to(table.dtype.element_ty))
            tl.store(outcome.report + i, present)
            tl.store(outcome.report + L + i, tl.sum(pixels, 0))
            tl.store(outcome.report + 2 * L + i, tl.load(drawn + i))
        tl.store(outcome.loss, total_loss.to(table.dtype.element_ty))
