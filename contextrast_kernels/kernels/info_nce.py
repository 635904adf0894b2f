"""InfoNCE of rows against columns (``info_nce``: the equations), forward and backward, without the matrix between them.

    s_ij = x_i · z_j / τ      Z_i = log Σ_{j∈N_i} w_j e^{s_ij}      Y_i: the same over P_i      A_i: over both

A program holds HELD vectors and streams the others past them, STREAM at a time: a tile of s is formed, used and
forgotten. Where the held vectors are too few for a GPU, the streamed ones are split over programs, whose results are
added in a fixed order.

Forward, "each": one sweep for Z, a second for the terms of the positives, which need Z. "supcon" and "pooled": one.

    each     l_i = 1/w(P_i) Σ_{P_i} w_j softplus(Z_i - s_ij)      ∂l_i/∂s_ij = G_i w_j e^{s_ij - Z_i}       at j ∈ N_i
             G_i = 1/w(P_i) Σ_{P_i} w_j sigmoid(Z_i - s_ij)                  - w_j/w(P_i) sigmoid(Z_i - s_ij)    j ∈ P_i
    supcon   l_i = A_i - 1/w(P_i) Σ_{P_i} w_j s_ij                           w_j e^{s_ij - A_i}           j ∈ N_i ∪ P_i
                                                                             - w_j/w(P_i)                        j ∈ P_i
    pooled   l_i = softplus(Z_i - Y_i)                                       G_i w_j e^{s_ij - Z_i}              j ∈ N_i
             G_i = sigmoid(Z_i - Y_i)                                        - G_i w_j e^{s_ij - Y_i}            j ∈ P_i

Kept for the backward pass, for each row: Z (or A), Y, what pushes (G, or 1) and what pulls (1/w(P), or G). Backward
recomputes s and with it W = ∂L/∂s: dL/dx = W z / τ and dL/dz = Wᵀ x / τ in one sweep each, and of rows against
themselves (W + Wᵀ) x / τ in one sweep for both.

Floor, by arithmetic: 2 R C D operations for every product, of which "each" takes 6 with both gradients, the other
forms 5, rows against themselves two fewer; and one read of the columns for every sweep, which is what
bounds few rows against many columns.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._tile_table import (
    ADDED,
    ADDED_SPLITS,
    MEAN_RUN,
    PROGRAMS,
    info_nce_gradient_tiles,
    info_nce_tiles,
)
from contextrast_kernels.kernels._tiles import (
    FLOAT32_DOT,
    decode_int,
    dot_features,
    dot_float64,
    float64_from_bits,
    zero_tiles,
)

# ----------------------------------------------------------------------------------------------- what a launch is given


class Matrix(NamedTuple):
    """A matrix as a kernel sees it. ``encode_ints`` makes the strides, in units of what is known to divide them."""

    start: Tensor
    row_stride: int
    channel_stride: int


class Rows(NamedTuple):
    """What is known of each row besides its vector; strides are made by ``_launch.encode_ints``."""

    labels: Tensor
    negatives: Tensor | None
    labels_stride: int
    negatives_stride: int


class Columns(NamedTuple):
    labels: Tensor
    negatives: Tensor | None
    weights: Tensor | None
    labels_stride: int
    negatives_stride: int
    weights_stride: int


class Pairs(NamedTuple):
    """The arguments of every sweep: who is whose positive and negative."""

    rows: Rows
    columns: Columns
    itself: bool
    """The columns are the rows, and (i, i) is no pair."""
    temperature: float
    ignore_index: int
    positives: str

    def arguments(self) -> dict:
        return {
            "rows": self.rows,
            "columns": self.columns,
            "temperature": _launch.float64_bits(self.temperature),
            "ignore_index": self.ignore_index,
        }

    def constants(self) -> dict:
        labels = (self.rows.labels, self.rows.negatives, self.columns.labels, self.columns.negatives)
        narrow = -(2**31) <= self.ignore_index < 2**31 and all(x is None or x.element_size() <= 4 for x in labels)
        return {"ITSELF": self.itself, "LABEL": tl.int32 if narrow else tl.int64}


def pairs_of(
    row_labels: Tensor,
    column_labels: Tensor | None,
    row_negatives: Tensor | None,
    column_negatives: Tensor | None,
    column_weights: Tensor | None,
    temperature: float,
    ignore_index: int,
    positives: str,
) -> Pairs:
    """``column_labels`` None: the rows against themselves."""
    itself = column_labels is None
    if itself:
        column_labels = row_labels

    def with_strides(kind, *vectors: Tensor | None):
        return kind(*vectors, *_launch.encode_ints([0 if x is None else x.stride(0) for x in vectors]))

    return Pairs(
        with_strides(Rows, row_labels, row_negatives),
        with_strides(Columns, column_labels, column_negatives, column_weights),
        itself,
        temperature,
        ignore_index,
        positives,
    )


def matrix_of(x: Tensor, block: int) -> tuple[Matrix, tuple[str, int, bool]]:
    """A matrix for a kernel, and what the compiler may know of its memory: the axis of stride 1 ("d" channels, "r"
    rows, "" neither), a power of two that divides the other stride, up to 16 bytes' worth, and whether offsets inside
    ``block`` rows need 64 candidate."""
    (n, D), (row_stride, channel_stride) = x.shape, x.stride()
    unit = "d" if channel_stride == 1 or D == 1 else "r" if row_stride == 1 or n == 1 else ""
    align = 16 // x.element_size() if unit else 1
    while (row_stride if unit == "d" else channel_stride) % align:
        align //= 2
    steps = _launch.encode_ints([row_stride // align, channel_stride // align])
    return Matrix(x, *steps), (unit, align, block * row_stride + D * channel_stride >= 2**31)


# ------------------------------------------------------------------------------------------------------------- launches


def forward(rows: Tensor, columns: Tensor, pairs: Pairs, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (), the number of valid rows (), and per row Z or A, Y, push and pull (4, R). Without ``mean``: l (R,)
    and nothing for the number."""
    (R, D), C = rows.shape, columns.shape[0]
    acc, device = _launch.accumulator(rows.dtype), rows.device
    tiles = info_nce_tiles(rows.dtype, D, R)
    (blocks, splits), span = _split(R, C, tiles)
    numbers = 2 if pairs.positives == "each" else 4
    log_sums = torch.empty(splits, numbers, R, dtype=torch.float64, device=device)
    terms = torch.empty(splits, 3, R, dtype=torch.float64, device=device) if pairs.positives == "each" else None
    losses = torch.empty(R, dtype=acc, device=device)
    kept = torch.empty(4, R, dtype=acc, device=device)
    x, x_layout = matrix_of(rows, tiles["HELD"])
    z, z_layout = matrix_of(columns, tiles["STREAM"])
    form = {"POSITIVES": pairs.positives, "NUMBERS": numbers}
    label = {"LABEL": pairs.constants()["LABEL"]}
    sweep = {"x": x, "z": z, **pairs.arguments(), "log_sums": log_sums, "R": R, "C": C, "span": span}
    constants = {
        **tiles,
        **pairs.constants(),
        "D": D,
        "X_LAYOUT": x_layout,
        "Z_LAYOUT": z_layout,
        "ACC": _launch.triton_type(acc),
    }
    _launch.launch(
        _info_nce_log_sums,
        (blocks, splits),
        sweep,
        {**constants, **form},
    )
    if terms is not None:
        _launch.launch(
            _info_nce_terms,
            (blocks, splits),
            {**sweep, "terms": terms, "splits": splits},
            {**constants, "NUMBERS": numbers},
        )
    every_row = {"rows": pairs.rows, "losses": losses, "ignore_index": pairs.ignore_index, "R": R}
    _launch.launch(
        _info_nce_rows,
        (_launch.ceil_div(R, ADDED),),
        {**every_row, "log_sums": log_sums, "terms": terms, "kept": kept, "splits": splits},
        {"HELD": ADDED, **form, **label},
    )
    if not mean:
        return losses, losses.new_empty(0), kept
    loss, count = losses.new_empty(()), losses.new_empty(())
    _launch.launch(
        _info_nce_mean,
        (1,),
        {**every_row, "loss": loss, "count": count},
        {"RUN": MEAN_RUN, **label, **_launch.UNFUSED},
    )
    return loss, count, kept


def backward(
    gradient: Tensor, rows: Tensor, columns: Tensor, pairs: Pairs, count: Tensor, kept: Tensor, toward: str
) -> Tensor:
    """dL/drows, dL/dcolumns, or of rows against themselves dL/drows through both: ``toward`` "rows", "columns" or
    "both". gradient: dL/dloss, () or (R,)."""
    held, streamed = (columns, rows) if toward == "columns" else (rows, columns)
    (n, D), R = held.shape, rows.shape[0]
    mean = gradient.ndim == 0
    acc = _launch.accumulator(rows.dtype)
    out = torch.empty_like(held)
    tiles = info_nce_gradient_tiles(rows.dtype, D, n, toward)
    (blocks, splits), span = _split(n, streamed.shape[0], tiles)
    partial = torch.empty(splits, n, D, dtype=acc, device=held.device) if splits > 1 else None
    x, x_layout = matrix_of(held, tiles["HELD"])
    z, z_layout = matrix_of(streamed, tiles["STREAM"])
    written, out_layout = matrix_of(out if partial is None else partial[0], tiles["HELD"])
    if partial is not None:
        written = written._replace(start=partial)
    _launch.launch(
        _info_nce_bwd,
        (blocks, splits, _launch.ceil_div(D, tiles["CHANNELS"])),
        {"x": x, "z": z, "out": written, **pairs.arguments(), "gradient": gradient, "kept": kept, "count": count}
        | {"gradient_stride": _launch.encode_ints([0 if mean else gradient.stride(0)])[0], "R": R}
        | {"n": n, "m": streamed.shape[0], "span": span},
        {**tiles, **pairs.constants(), "D": D, "X_LAYOUT": x_layout, "Z_LAYOUT": z_layout, "OUT_LAYOUT": out_layout}
        | {"POSITIVES": pairs.positives, "TOWARD": toward, "MEAN": mean, "ACC": _launch.triton_type(acc)},
    )
    if partial is not None:
        written, out_layout = matrix_of(out, 1)
        _launch.launch(
            _add_splits,
            (_launch.ceil_div(n * D, ADDED),),
            {"partial": partial, "out": written, "n": n, "splits": splits},
            {"D": D, "ELEMENTS": ADDED, "SPLITS": ADDED_SPLITS, "OUT_LAYOUT": out_layout},
        )
    return out


def _split(held: int, streamed: int, tiles: dict) -> tuple[tuple[int, int], int]:
    """The grid (blocks of held vectors, splits of the streamed ones), and the streamed vectors of a split."""
    blocks, steps = _launch.ceil_div(held, tiles["HELD"]), _launch.ceil_div(streamed, tiles["STREAM"])
    wanted = min(_launch.ceil_div(PROGRAMS, blocks), _launch.ceil_div(steps, 4))
    of_split = _launch.ceil_div(steps, wanted)
    return (blocks, _launch.ceil_div(steps, of_split)), of_split * tiles["STREAM"]


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["temperature", "ignore_index", "R", "C", "span"])
def _info_nce_log_sums(
    x,
    z,
    rows,
    columns,
    log_sums,
    temperature,
    ignore_index,
    R,
    C,
    span,
    D: tl.constexpr,
    K: tl.constexpr,
    HELD: tl.constexpr,
    STREAM: tl.constexpr,
    HOLD: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    ITSELF: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMBERS: tl.constexpr,
    LABEL: tl.constexpr,
    ACC: tl.constexpr,
):
    """For each row and split of the columns: the largest s and Σ w e^(s - largest) of the negatives ("supcon": of all
    pairs); of the positives the same ("pooled"), or Σ w and Σ w s ("supcon").

    Moves: the rows once; the columns once for every block of rows, from the second on out of the cache. A NaN or inf
    anywhere makes the first sum NaN, and no later step hides it.
    """
    held_first = tl.program_id(0) * HELD
    i = held_first + tl.arange(0, HELD)
    row_label, row_name, valid = row_codes(rows, i, R, ignore_index, LABEL)
    held = vector_tiles(x, held_first, valid, D, HELD, K, X_LAYOUT, HOLD)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    largest = tl.full((HELD,), float("-inf"), ACC)
    total = tl.zeros((HELD,), tl.float64)
    largest_positive = tl.full((HELD,), float("-inf"), ACC)
    of_positives = tl.zeros((HELD,), tl.float64)
    mass = tl.zeros((HELD,), tl.float64)
    start = tl.program_id(1) * span
    for first in range(start, _stop(valid, start, span, C), STREAM):
        j = first + tl.arange(0, STREAM)
        label, name, candidate, weight, valid_column = column_codes(columns, j, C, ignore_index, LABEL, ACC)
        # Ignored columns alone are passed over; but for the first tile, so that a broken row shows without a column.
        if (tl.max(valid_column.to(tl.int32), 0) > 0) | (first == start):
            streamed = vector_tiles(z, first, valid_column, D, STREAM, K, Z_LAYOUT, HOLD)
            s = inverse_temperature * products(
                held, streamed, x, held_first, valid, z, first, valid_column,
                D, K, HELD, STREAM, X_LAYOUT, Z_LAYOUT, HOLD, ACC,
            )  # fmt: skip
            positive, negative = pair_kinds(
                columns, row_label[:, None], row_name[:, None], label[None, :], name[None, :], candidate[None, :],
                i[:, None], j[None, :], ITSELF,
            )  # fmt: skip
            if POSITIVES == "supcon":
                negative = negative | positive
            largest, total, e = _grow(largest, total, s, negative, columns, weight)
            total += tl.sum(e + s * times_weight(columns, 0.0, weight[None, :]), 1).to(tl.float64)
            if POSITIVES == "pooled":
                largest_positive, of_positives, e = _grow(largest_positive, of_positives, s, positive, columns, weight)
                of_positives += tl.sum(e, 1).to(tl.float64)
            if POSITIVES == "supcon":
                mass += tl.sum(tl.where(positive, weight[None, :], 0.0), 1).to(tl.float64)
                pulled = tl.where(positive, times_weight(columns, s, weight[None, :]), 0.0)
                of_positives += tl.sum(pulled, 1).to(tl.float64)
    here = log_sums + tl.program_id(1).to(tl.int64) * NUMBERS * R + i
    tl.store(here, largest.to(tl.float64), mask=i < R)
    tl.store(here + R, total, mask=i < R)
    if POSITIVES != "each":
        third = mass if POSITIVES == "supcon" else largest_positive.to(tl.float64)
        tl.store(here + tl.cast(R, tl.int64) * 2, third, mask=i < R)
        tl.store(here + tl.cast(R, tl.int64) * 3, of_positives, mask=i < R)


@triton.jit(do_not_specialize=["temperature", "ignore_index", "R", "C", "span", "splits"])
def _info_nce_terms(
    x,
    z,
    rows,
    columns,
    log_sums,
    terms,
    temperature,
    ignore_index,
    R,
    C,
    span,
    splits,
    D: tl.constexpr,
    K: tl.constexpr,
    HELD: tl.constexpr,
    STREAM: tl.constexpr,
    HOLD: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    ITSELF: tl.constexpr,
    NUMBERS: tl.constexpr,
    LABEL: tl.constexpr,
    ACC: tl.constexpr,
):
    """ "each", for each row and split: Σ w, Σ w softplus(Z - s) and Σ w sigmoid(Z - s) over the positives. Tiles
    without a positive pair are passed over: in columns sorted by class, nearly all."""
    held_first = tl.program_id(0) * HELD
    i = held_first + tl.arange(0, HELD)
    row_label, row_name, valid = row_codes(rows, i, R, ignore_index, LABEL)
    held = vector_tiles(x, held_first, valid, D, HELD, K, X_LAYOUT, HOLD)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    log_sum = _log_sum(log_sums, 0, splits, i, R, HELD, NUMBERS).to(ACC)
    mass = tl.zeros((HELD,), tl.float64)
    loss = tl.zeros((HELD,), tl.float64)
    share = tl.zeros((HELD,), tl.float64)
    start = tl.program_id(1) * span
    for first in range(start, _stop(valid, start, span, C), STREAM):
        j = first + tl.arange(0, STREAM)
        label, name, candidate, weight, valid_column = column_codes(columns, j, C, ignore_index, LABEL, ACC)
        positive, _ = pair_kinds(
            columns, row_label[:, None], row_name[:, None], label[None, :], name[None, :], candidate[None, :],
            i[:, None], j[None, :], ITSELF,
        )  # fmt: skip
        positive = positive & valid[:, None]
        if tl.max(tl.max(positive.to(tl.int32), 1), 0) > 0:
            streamed = vector_tiles(z, first, valid_column, D, STREAM, K, Z_LAYOUT, HOLD)
            s = inverse_temperature * products(
                held, streamed, x, held_first, valid, z, first, valid_column,
                D, K, HELD, STREAM, X_LAYOUT, Z_LAYOUT, HOLD, ACC,
            )  # fmt: skip
            softplus, sigmoid = _softplus_and_sigmoid(log_sum[:, None] - s)
            mass += tl.sum(tl.where(positive, weight[None, :], 0.0), 1).to(tl.float64)
            weighted = tl.where(positive, times_weight(columns, softplus, weight[None, :]), 0.0)
            loss += tl.sum(weighted, 1).to(tl.float64)
            weighted = tl.where(positive, times_weight(columns, sigmoid, weight[None, :]), 0.0)
            share += tl.sum(weighted, 1).to(tl.float64)
    here = terms + tl.program_id(1).to(tl.int64) * 3 * R + i
    tl.store(here, mass, mask=i < R)
    tl.store(here + R, loss, mask=i < R)
    tl.store(here + tl.cast(R, tl.int64) * 2, share, mask=i < R)


@triton.jit(do_not_specialize=["ignore_index", "R", "splits"])
def _info_nce_rows(
    log_sums,
    terms,
    rows,
    losses,
    kept,
    ignore_index,
    R,
    splits,
    HELD: tl.constexpr,
    POSITIVES: tl.constexpr,
    NUMBERS: tl.constexpr,
    LABEL: tl.constexpr,
):
    """l of each row, and what its backward pass needs, from the sums of all splits."""
    i = tl.program_id(0) * HELD + tl.arange(0, HELD)
    _, _, valid = row_codes(rows, i, R, ignore_index, LABEL)
    log_sum = _log_sum(log_sums, 0, splits, i, R, HELD, NUMBERS)
    log_positives = tl.zeros((HELD,), tl.float64)
    if POSITIVES == "pooled":
        log_positives = _log_sum(log_sums, 2, splits, i, R, HELD, NUMBERS)
        takes_part = valid & (log_positives != float("-inf"))
        loss, push = _softplus_and_sigmoid(log_sum - log_positives)
        pull = push
    elif POSITIVES == "supcon":
        mass = _sum(log_sums, 2, splits, i, R, HELD, NUMBERS)
        takes_part = valid & (mass > 0)
        mass = tl.where(takes_part, mass, 1.0)
        loss = log_sum - _sum(log_sums, 3, splits, i, R, HELD, NUMBERS) / mass
        push = tl.full((HELD,), 1.0, tl.float64)
        pull = 1.0 / mass
    else:
        mass = _sum(terms, 0, splits, i, R, HELD, 3)
        takes_part = valid & (mass > 0)
        mass = tl.where(takes_part, mass, 1.0)
        loss = _sum(terms, 1, splits, i, R, HELD, 3) / mass
        push = _sum(terms, 2, splits, i, R, HELD, 3) / mass
        pull = 1.0 / mass
    # What is broken in a valid column shows in every valid row, what is broken in a row there.
    broken = tl.where(valid & (log_sum != log_sum), float("nan"), 0.0)
    tl.store(losses + i, (tl.where(takes_part, loss, 0.0) + broken).to(losses.dtype.element_ty), mask=i < R)
    _keep(kept, 0, i, R, tl.where(takes_part, log_sum, 0.0))
    _keep(kept, 1, i, R, tl.where(takes_part, log_positives, 0.0))
    _keep(kept, 2, i, R, tl.where(takes_part, push, 0.0) + broken)
    _keep(kept, 3, i, R, tl.where(takes_part, pull, 0.0) + broken)


@triton.jit
def _keep(kept, number, i, R, value):
    tl.store(kept + tl.cast(R, tl.int64) * number + i, value.to(kept.dtype.element_ty), mask=i < R)


@triton.jit
def _kept(kept, number, i, R):
    return tl.load(kept + tl.cast(R, tl.int64) * number + i, mask=i < R, other=0.0)


@triton.jit(do_not_specialize=["ignore_index", "R"])
def _info_nce_mean(losses, rows, loss, count, ignore_index, R, RUN: tl.constexpr, LABEL: tl.constexpr):
    """The mean over the valid rows and their number (at least 1), summed in order by one program."""
    total = tl.zeros((RUN,), tl.float64)
    number = tl.zeros((RUN,), tl.float64)
    for first in range(0, R, RUN):
        i = first + tl.arange(0, RUN)
        _, _, valid = row_codes(rows, i, R, ignore_index, LABEL)
        total += tl.load(losses + i, mask=i < R, other=0.0).to(tl.float64)
        number += valid.to(tl.float64)
    valid_rows = tl.maximum(tl.sum(number, 0), 1.0)
    tl.store(count, valid_rows.to(count.dtype.element_ty))
    tl.store(loss, (tl.sum(total, 0) / valid_rows).to(loss.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _row_gradients(rows, kept, gradient, gradient_stride, i, R, ignore_index, LABEL: tl.constexpr, MEAN: tl.constexpr):
    """Codes of rows i; Z, Y, and what pushes and pulls, with dL/dl in the latter two where rows have their own."""
    label, name, valid = row_codes(rows, i, R, ignore_index, LABEL)
    push = _kept(kept, 2, i, R)
    pull = _kept(kept, 3, i, R)
    if not MEAN:
        g = tl.load(gradient + i.to(tl.int64) * decode_int(gradient_stride), mask=valid, other=0.0)
        push *= g
        pull *= g
    return label, name, valid, _kept(kept, 0, i, R), _kept(kept, 1, i, R), push, pull


@triton.jit
def _slopes(s, positive, negative, log_sum, log_positives, push, pull, columns, weight, POSITIVES: tl.constexpr):
    """∂L/∂s, but for factors that all pairs share. A weighted exponential is a share of its sum, so at most 1, also
    where the recomputed s is rounded differently than in Z."""
    ratio = tl.exp(s - log_sum)
    share = tl.minimum(times_weight(columns, ratio, weight), 1.0)
    if POSITIVES == "pooled":
        of_positives = tl.minimum(times_weight(columns, tl.exp(s - log_positives), weight), 1.0)
        return tl.where(negative, push * share, 0.0) - tl.where(positive, pull * of_positives, 0.0)
    elif POSITIVES == "supcon":
        pulled = times_weight(columns, pull, weight)
        return tl.where(negative | positive, push * share, 0.0) - tl.where(positive, pulled, 0.0)
    else:
        pulled = times_weight(columns, pull / (1.0 + ratio), weight)
        return tl.where(negative, push * share, 0.0) - tl.where(positive, pulled, 0.0)


@triton.jit(do_not_specialize=["gradient_stride", "temperature", "ignore_index", "R", "n", "m", "span"])
def _info_nce_bwd(
    x,
    z,
    out,
    rows,
    columns,
    gradient,
    gradient_stride,
    kept,
    count,
    temperature,
    ignore_index,
    R,
    n,
    m,
    span,
    D: tl.constexpr,
    K: tl.constexpr,
    HELD: tl.constexpr,
    STREAM: tl.constexpr,
    HOLD: tl.constexpr,
    CHANNELS: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    TOWARD: tl.constexpr,
    MEAN: tl.constexpr,
    ITSELF: tl.constexpr,
    POSITIVES: tl.constexpr,
    LABEL: tl.constexpr,
    ACC: tl.constexpr,
):
    """dL/dx of n held vectors, against m streamed ones: the held are the rows (TOWARD "rows"), the columns, or both at
    once, as then the streamed are.

    Recomputed: s. Moves: the held once; the streamed once for every block of them; a gradient for each split.
    """
    held_first = tl.program_id(0) * HELD
    a = held_first + tl.arange(0, HELD)
    if TOWARD != "columns":
        row_label, row_name, valid, log_sum, log_positives, push, pull = _row_gradients(
            rows, kept, gradient, gradient_stride, a, R, ignore_index, LABEL, MEAN
        )
    if TOWARD != "rows":
        own_label, own_name, own_candidate, own_weight, valid = column_codes(columns, a, n, ignore_index, LABEL, ACC)
    held = vector_tiles(x, held_first, valid, D, HELD, K, X_LAYOUT, HOLD)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    d0 = tl.program_id(2) * CHANNELS
    gradients = zero_tiles(CHANNELS // K, HELD, K, ACC)
    start = tl.program_id(1) * span
    for first in range(start, _stop(valid, start, span, m), STREAM):
        b = first + tl.arange(0, STREAM)
        if TOWARD != "columns":
            label, name, candidate, weight, wanted = column_codes(columns, b, m, ignore_index, LABEL, ACC)
        if TOWARD != "rows":
            its_label, its_name, wanted, its_log_sum, its_log_positives, its_push, its_pull = _row_gradients(
                rows, kept, gradient, gradient_stride, b, R, ignore_index, LABEL, MEAN
            )
        if tl.max(wanted.to(tl.int32), 0) > 0:
            streamed = vector_tiles(z, first, wanted, D, STREAM, K, Z_LAYOUT, HOLD)
            s = inverse_temperature * products(
                held, streamed, x, held_first, valid, z, first, wanted,
                D, K, HELD, STREAM, X_LAYOUT, Z_LAYOUT, HOLD, ACC,
            )  # fmt: skip
            slopes = tl.zeros((HELD, STREAM), ACC)
            if TOWARD != "columns":
                positive, negative = pair_kinds(
                    columns, row_label[:, None], row_name[:, None], label[None, :], name[None, :], candidate[None, :],
                    a[:, None], b[None, :], ITSELF,
                )  # fmt: skip
                slopes += _slopes(
                    s, positive, negative, log_sum[:, None], log_positives[:, None], push[:, None], pull[:, None],
                    columns, weight[None, :], POSITIVES,
                )  # fmt: skip
            if TOWARD != "rows":
                positive, negative = pair_kinds(
                    columns, its_label[None, :], its_name[None, :], own_label[:, None], own_name[:, None],
                    own_candidate[:, None], b[None, :], a[:, None], ITSELF,
                )  # fmt: skip
                slopes += _slopes(
                    s, positive, negative, its_log_sum[None, :], its_log_positives[None, :], its_push[None, :],
                    its_pull[None, :], columns, own_weight[:, None], POSITIVES,
                )  # fmt: skip
            grown = ()
            for i in tl.static_range(CHANNELS // K):
                if HOLD:
                    tile = streamed[i]
                else:
                    tile = vector_tile(z, first, wanted, d0 + i * K, D, STREAM, K, Z_LAYOUT, D % CHANNELS == 0)
                grown = grown + (dot_features(slopes, tile, gradients[i], CHAINED=True),)  # noqa: RUF005
            gradients = grown
    scale = inverse_temperature
    if MEAN:
        scale *= tl.load(gradient).to(ACC) / tl.load(count).to(ACC)
    split = tl.program_id(1).to(tl.int64) * n * D
    for i in tl.static_range(CHANNELS // K):
        d = d0 + i * K
        start_of_block, here = addresses(out, held_first, d, HELD, K, OUT_LAYOUT)
        value = tl.where(valid[:, None], gradients[i] * scale, 0.0).to(out.start.dtype.element_ty)
        tl.store(start_of_block + split + here, value, mask=(a < n)[:, None] & (d + tl.arange(0, K) < D)[None, :])


@triton.jit(do_not_specialize=["n", "splits"])
def _add_splits(
    partial, out, n, splits, D: tl.constexpr, ELEMENTS: tl.constexpr, SPLITS: tl.constexpr, OUT_LAYOUT: tl.constexpr
):
    """out = Σ partial over the splits, always in the same order."""
    e = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    size = tl.cast(n, tl.int64) * D
    total = tl.zeros((ELEMENTS,), partial.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        here = partial + split.to(tl.int64)[:, None] * size + e[None, :]
        total += tl.sum(tl.load(here, mask=(split < splits)[:, None] & (e < size)[None, :], other=0.0), 0)
    row_stride = 1 if OUT_LAYOUT[0] == "r" else decode_int(out.row_stride) * OUT_LAYOUT[1]
    channel_stride = 1 if OUT_LAYOUT[0] == "d" else decode_int(out.channel_stride) * OUT_LAYOUT[1]
    tl.store(
        out.start + e // D * row_stride + e % D * channel_stride, total.to(out.start.dtype.element_ty), mask=e < size
    )


# ------------------------------------------------------------------------------------------------------ tiles and pairs


@triton.jit
def addresses(matrix, first, d0, N: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr):
    """Where vector ``first`` begins, and offsets (N, K) from there of N vectors and channels d0 .. d0+K-1. The products
    with what divides a stride tell the compiler so."""
    v = tl.arange(0, N)
    d = d0 + tl.arange(0, K)
    if LAYOUT[2]:
        v = v.to(tl.int64)
        d = d.to(tl.int64)
    row_stride = decode_int(matrix.row_stride) * LAYOUT[1]
    channel_stride = decode_int(matrix.channel_stride) * LAYOUT[1]
    if LAYOUT[0] == "d":
        return matrix.start + tl.cast(first, tl.int64) * row_stride, v[:, None] * row_stride + d[None, :]
    elif LAYOUT[0] == "r":
        return matrix.start + tl.cast(first, tl.int64), v[:, None] + d[None, :] * channel_stride
    else:
        return matrix.start + tl.cast(first, tl.int64) * row_stride, v[:, None] * row_stride + d[
            None, :
        ] * channel_stride


@triton.jit
def vector_tile(
    matrix,
    first,
    wanted,
    d0,
    D: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LAYOUT: tl.constexpr,
    WITHIN: tl.constexpr = True,
):
    """Channels d0 .. d0+K-1 of N vectors (N, K), zero where not wanted. WITHIN: as in ``_tiles.channels``."""
    start, here = addresses(matrix, first, d0, N, K, LAYOUT)
    if D % K == 0 and WITHIN:
        return tl.load(start + here, mask=wanted[:, None], other=0.0)
    else:
        return tl.load(start + here, mask=wanted[:, None] & (d0 + tl.arange(0, K) < D)[None, :], other=0.0)


@triton.jit
def vector_tiles(
    matrix, first, wanted, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr, HOLD: tl.constexpr
):
    """N vectors as tiles (N, K) of their channels, to keep at hand; none unless HOLD."""
    tiles = ()
    if HOLD:
        for d0 in tl.static_range(0, D, K):
            tiles = tiles + (vector_tile(matrix, first, wanted, d0, D, N, K, LAYOUT),)  # noqa: RUF005
    return tiles


@triton.jit
def _minus_dot(x, z, acc):
    """acc - x zᵀ, as exact as the accumulator. A product that is added becomes part of the tensor cores' sum, which is
    cut toward zero; one that is subtracted is a sum of its own: see ``dot_features``."""
    if x.dtype == tl.float64:
        return dot_float64(-x, tl.trans(z), acc)
    elif x.dtype == tl.float32:
        return acc - tl.dot(x, tl.trans(z), input_precision=FLOAT32_DOT)
    else:
        return acc - tl.dot(x, tl.trans(z))


@triton.jit
def products(
    held,
    streamed,
    x,
    x_first,
    x_wanted,
    z,
    z_first,
    z_wanted,
    D: tl.constexpr,
    K: tl.constexpr,
    HELD: tl.constexpr,
    STREAM: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    HOLD: tl.constexpr,
    ACC: tl.constexpr,
):
    """⟨x, z⟩ (HELD, STREAM), from tiles that are at hand or read K channels at a time."""
    s = tl.zeros((HELD, STREAM), ACC)
    if HOLD:
        for i in tl.static_range((D + K - 1) // K):
            s = _minus_dot(held[i], streamed[i], s)
    else:
        for d0 in range(0, D, K):
            left = vector_tile(x, x_first, x_wanted, d0, D, HELD, K, X_LAYOUT)
            s = _minus_dot(left, vector_tile(z, z_first, z_wanted, d0, D, STREAM, K, Z_LAYOUT), s)
    return -s


@triton.jit
def _codes(codes, stride, at, live, ignore_index, LABEL: tl.constexpr):
    """Integers as they are, ignore_index beyond the end."""
    code = tl.load(codes + at.to(tl.int64) * decode_int(stride), mask=live, other=0).to(LABEL)
    return tl.where(live, code, tl.cast(ignore_index, LABEL))


@triton.jit
def row_codes(rows, i, R, ignore_index, LABEL: tl.constexpr):
    """For rows i: the label, the label of their negatives, and whether they are valid."""
    label = _codes(rows.labels, rows.labels_stride, i, i < R, ignore_index, LABEL)
    name = label
    if rows.negatives is not None:
        name = _codes(rows.negatives, rows.negatives_stride, i, i < R, ignore_index, LABEL)
    return label, name, label != tl.cast(ignore_index, LABEL)


@triton.jit
def column_codes(columns, j, C, ignore_index, LABEL: tl.constexpr, ACC: tl.constexpr):
    """For columns j: the label; the label of the rows whose negative it is; whether it can be a negative; the weight,
    NaN where that is none; and whether it is valid. A column that does not count gets the label of ignored rows."""
    ignored = tl.cast(ignore_index, LABEL)
    label = _codes(columns.labels, columns.labels_stride, j, j < C, ignore_index, LABEL)
    valid = label != ignored
    candidate = valid
    weight = valid.to(ACC)
    if columns.weights is not None:
        given = tl.load(columns.weights + j.to(tl.int64) * decode_int(columns.weights_stride), mask=valid, other=0.0)
        weight = given.to(ACC)
        weight = tl.where((weight >= 0) & (weight < float("inf")), weight, float("nan"))
        candidate = valid & (weight != 0)
        label = tl.where(candidate, label, ignored)
    name = label
    if columns.negatives is not None:
        name = _codes(columns.negatives, columns.negatives_stride, j, j < C, ignore_index, LABEL)
        candidate = candidate & (name != ignored)
    return label, name, candidate, weight, valid


@triton.jit
def pair_kinds(columns, row_label, row_name, label, name, candidate, i, j, ITSELF: tl.constexpr):
    """Whether each pair is a positive one, and whether it is a negative one. The arguments are vectors of rows and of
    columns, shaped so that they meet in a tile. Ignored rows and columns share a label; no term has these rows."""
    positive = row_label == label
    negative = (positive == 0) & candidate
    if columns.negatives is not None:
        negative = (row_name == name) & candidate
    if ITSELF:
        positive = positive & (i != j)
        negative = negative & (i != j)
    return positive, negative


@triton.jit
def times_weight(columns, value, weight):
    if columns.weights is not None:
        return value * weight
    else:
        return value


# ----------------------------------------------------------------------------------------------------------------- sums


@triton.jit
def _stop(valid, start, span, end):
    """Where a split of the streamed vectors ends: at once where no held vector is valid, as in padding."""
    return tl.where(tl.max(valid.to(tl.int32), 0) > 0, tl.minimum(start + span, end), start)


@triton.jit
def _grow(largest, total, s, chosen, columns, weight):
    """The largest element so far, the sum of exponentials relative to it, and what the chosen elements of a tile add
    to the sum."""
    grown = tl.maximum(largest, tl.max(tl.where(chosen, s, float("-inf")), 1))
    shift = tl.where(grown == float("-inf"), 0.0, grown)
    e = tl.where(chosen, times_weight(columns, tl.exp(s - shift[:, None]), weight[None, :]), 0.0)
    return grown, total * tl.exp(largest - shift).to(tl.float64), e


@triton.jit
def _softplus_and_sigmoid(t):
    """log(1 + e^t) to full relative precision, as ``_tiles.softplus``, and 1 / (1 + e^-t), from one exponential."""
    u = tl.exp(-tl.abs(t))
    w = 1.0 + u
    softplus = tl.maximum(t, 0.0) + tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return softplus, tl.where(t > 0, 1.0, u) / w


@triton.jit
def _of_splits(sums, number, split, splits, i, R, other, NUMBERS: tl.constexpr):
    """One of NUMBERS sums of rows i, from each of some splits: (splits, rows)."""
    here = sums + (split.to(tl.int64) * NUMBERS + number)[:, None] * R + i[None, :]
    return tl.load(here, mask=(split < splits)[:, None] & (i < R)[None, :], other=other)


@triton.jit
def _sum(sums, number, splits, i, R, HELD: tl.constexpr, NUMBERS: tl.constexpr):
    """Added over all splits, always in the same order."""
    total = tl.zeros((HELD,), tl.float64)
    for first in range(0, splits, 16):
        total += tl.sum(_of_splits(sums, number, first + tl.arange(0, 16), splits, i, R, 0.0, NUMBERS), 0)
    return total


@triton.jit
def _log_sum(sums, number, splits, i, R, HELD: tl.constexpr, NUMBERS: tl.constexpr):
    """The logarithm of the sum of exponentials over all splits, from the largest s and the sum relative to it (the
    next number): -inf of nothing, NaN of anything broken."""
    largest = tl.full((HELD,), float("-inf"), tl.float64)
    total = tl.zeros((HELD,), tl.float64)
    for first in range(0, splits, 16):
        split = first + tl.arange(0, 16)
        tops = _of_splits(sums, number, split, splits, i, R, float("-inf"), NUMBERS)
        grown = tl.maximum(largest, tl.max(tops, 0))
        shift = tl.where(grown == float("-inf"), 0.0, grown)
        totals = _of_splits(sums, number + 1, split, splits, i, R, 0.0, NUMBERS) * tl.exp(tops - shift[None, :])
        total = total * tl.exp(largest - shift) + tl.sum(totals, 0)
        largest = grown
    return tl.where(total == 0.0, float("-inf"), largest + tl.log(tl.where(total == 0.0, 1.0, total)))
