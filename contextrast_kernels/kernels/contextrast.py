"""The whole loss of all layers, in three phases. After each phase the ranks of a group can reduce.

    anchors   codes, class_sums   | counts, broken, max_abs, Σ v | anchor_tables
    Z         log_sums            | Z                          |
    loss      moments             | A⁺, A⁻, terms              | finish

The ranks reduce the sums of ``_sums``, Z and the numbers of errors. All are integers except Z, max_abs and, with a
group, Σ v, which is reduced in float64 because the fixed-point scales of the ranks differ. Integers add up to the same
bits however many ranks there are and in whatever order. The backward pass reduces nothing more.

The features are read once in each phase (hard negatives alone in the second) and once more in the backward pass,
which writes dx. ``python -m contextrast_kernels bench --plan`` lists what each launch moves.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from contextrast_kernels import ranks
from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._codes import codes
from contextrast_kernels.kernels._finish import Outcome, Scales, finish
from contextrast_kernels.kernels._gradient import Terms, feature_gradients
from contextrast_kernels.kernels._log_sums import log_sums
from contextrast_kernels.kernels._sums import zeros
from contextrast_kernels.kernels._tile_table import keeps_norms
from contextrast_kernels.kernels.anchors import anchor_tables, class_sums, float64_sums, largest_features
from contextrast_kernels.kernels.pixel_anchor import moments


def forward(
    features: Sequence[Tensor],
    labels: Tensor,
    e: Tensor,
    base: Sequence[Tensor],
    seed: Tensor,
    num_classes: int,
    ignore_index: int,
    layer_weights: Sequence[float],
    temperature: float,
    fusion_weight: float,
    base_rate: float,
    normalize: bool,
    normalize_anchors: bool,
    errors: Tensor | None = None,
    group: str | None = None,
    volumes: Sequence[int] | None = None,
) -> tuple[Outcome, Tensor, Terms]:
    """Return the loss, the label codes, and what ``backward`` needs besides.

    Args:
        e: codes of the hard negatives of all layers.
        base: bool maps of the base pixels of every layer, or an empty list where ``base_rate`` draws them with
            ``seed``, an int64 tensor.
        group: the name of the process group over whose ranks the sums are added up. ``errors`` (layers,), which is
            added up as well, is then a fourth row of the report.
        volumes: as in ``codes``.
    """
    dtype = _launch.accumulator(features[0].dtype)
    if group is not None:
        errors = errors.clone()
    sums = zeros(features, num_classes, normalize, anchors=True, loss=True)
    code = codes(
        features,
        labels,
        num_classes,
        ignore_index,
        sums,
        hard=e,
        base=base or None,
        base_rate=base_rate,
        seed=seed,
        volumes=volumes,
    )
    if not normalize:
        largest_features(features, code, sums)
        if group is not None:
            sums.max_abs.copy_(ranks.reduced(sums.max_abs, group, "max"))
    norms = None
    if code.base is None and normalize and keeps_norms(features[0].dtype, features[0].shape[1], num_classes):
        norms = torch.empty(code.y.shape, dtype=torch.float32, device=code.y.device)
    class_sums(features, code, sums, norms)
    if group is not None:
        sums = sums._replace(vectors=float64_sums(sums))
        ranks.add_up([sums.vectors, sums.counts, sums.broken, sums.drawn, errors], group)
    table, lengths = anchor_tables(sums, dtype, fusion_weight, normalize_anchors)

    Z, similarity = log_sums(features, code, sums, table, temperature, normalize, norms)
    if group is not None:
        Z = ranks.log_sum_exp(Z, group, 1 / temperature if normalize else None)  # ‖â‖ ≤ 1 and ‖v‖ ≤ 1

    scales = Scales(lengths, sums.max_abs, temperature)
    # If the gradient is rounded to 16 bits, its sums need no higher precision.
    chained = features[0].element_size() == 2 and normalize
    moments(features, code, sums, table, Z, similarity, scales, chained, norms)
    if group is not None:
        ranks.add_up([sums.pulled, sums.pushed, sums.terms], group)
    outcome = finish(
        sums, table, Z, scales, layer_weights, fusion_weight=fusion_weight, normalize_anchors=normalize_anchors
    )
    if group is not None:
        outcome = outcome._replace(report=torch.cat([outcome.report, errors.unsqueeze(0)]))
    return outcome, code.y, Terms(code.e, code.base, similarity, table, Z, outcome.coefficients)


def backward(
    gradient: Tensor,
    features: Sequence[Tensor],
    y: Tensor,
    terms: Terms,
    pull: Tensor | None,
    temperature: float,
    normalize: bool,
) -> list[Tensor]:
    """Return dL/dx of every layer. Without ``pull`` no gradient goes through the anchors."""
    return feature_gradients(
        features,
        y,
        terms.table.shape[1],
        normalize,
        pull=pull,
        terms=terms,
        temperature=temperature,
        gradient=gradient,
    )
