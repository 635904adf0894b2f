"""InfoNCE of rows against columns (``info_nce``: the equations), forward and backward, without the matrix between them.

    s_ij = x_i · z_j / τ      Z_i = log Σ_{j∈N_i} w_j e^{s_ij}      Y_i: the same over P_i      A_i: over both

A program holds HELD vectors and streams the others past them, STREAM at a time: a tile of s is computed and used but
not stored. Where the held vectors are too few for a GPU, the streamed ones are split over programs, whose results are
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

Lower bound: each product takes 2 R C D operations. "each" needs 6 products with both gradients, the other forms 5, and
rows against themselves two fewer. Every sweep reads the columns once, which is the bound for few rows against many
columns.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._pairs import (
    addresses,
    column_codes,
    pair_kinds,
    row_codes,
    similarities,
    softplus_and_sigmoid,
    times_weight,
    vector_tile,
    vector_tiles,
)
from contextrast_kernels.kernels._tile_table import (
    ADDED,
    ADDED_SPLITS,
    MEAN_RUN,
    PROGRAMS,
    InfoNceTiles,
    info_nce_gradient_tiles,
    info_nce_tiles,
)
from contextrast_kernels.kernels._tiles import decode_int, dot_features, float64_from_bits, zero_tiles

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


class Vector(NamedTuple):
    """One number for each row; its stride is made by ``_launch.encode_ints``, and 0 where all rows share a number."""

    start: Tensor
    stride: int


class MatrixLayout(NamedTuple):
    """What the compiler may know of the memory of a matrix."""

    unit: str
    """The axis of stride 1: "d" the channels, "r" the rows, "" neither."""
    align: int
    """A power of two that divides the other stride, up to 16 bytes' worth."""
    wide: bool
    """Offsets inside a block of rows need 64 bits."""


class Form(NamedTuple):
    """What of the pairs is known when a kernel is compiled."""

    itself: bool
    positives: str
    label: tl.dtype
    """The type in which labels are compared."""


class Pairs(NamedTuple):
    """The arguments of every sweep: which columns are positives and negatives of a row."""

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

    def form(self) -> Form:
        labels = (self.rows.labels, self.rows.negatives, self.columns.labels, self.columns.negatives)
        narrow = -(2**31) <= self.ignore_index < 2**31 and all(x is None or x.element_size() <= 4 for x in labels)
        return Form(self.itself, self.positives, tl.int32 if narrow else tl.int64)


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


def matrix_of(x: Tensor, block: int) -> tuple[Matrix, MatrixLayout]:
    """A matrix as a kernel sees it, which takes ``block`` rows of it at a time, and its layout."""
    (n, D), (row_stride, channel_stride) = x.shape, x.stride()
    unit = "d" if channel_stride == 1 or D == 1 else "r" if row_stride == 1 or n == 1 else ""
    align = 16 // x.element_size() if unit else 1
    while (row_stride if unit == "d" else channel_stride) % align:
        align //= 2
    steps = _launch.encode_ints([row_stride // align, channel_stride // align])
    return Matrix(x, *steps), MatrixLayout(unit, align, block * row_stride + D * channel_stride >= 2**31)


# ------------------------------------------------------------------------------------------------------------- launches


def forward(rows: Tensor, columns: Tensor, pairs: Pairs, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss (), the number of valid rows (), and Z or A, Y, push and pull of each row (4, R). Without
    ``mean`` the loss is l (R,), and the number is empty."""
    (R, D), C = rows.shape, columns.shape[0]
    acc, device = _launch.accumulator(rows.dtype), rows.device
    tiles = info_nce_tiles(rows.dtype, D, R)
    (blocks, splits), span = _split(R, C, tiles)
    numbers = 2 if pairs.positives == "each" else 4
    log_sums = torch.empty(splits, numbers, R, dtype=torch.float64, device=device)
    terms = torch.empty(splits, 3, R, dtype=torch.float64, device=device) if pairs.positives == "each" else None
    losses = torch.empty(R, dtype=acc, device=device)
    kept = torch.empty(4, R, dtype=acc, device=device)
    x, x_layout = matrix_of(rows, tiles.HELD)
    z, z_layout = matrix_of(columns, tiles.STREAM)
    form = pairs.form()
    sweep = {"x": x, "z": z, **pairs.arguments(), "log_sums": log_sums, "R": R, "C": C, "span": span}
    constants = {"D": D, "TILES": tiles, "num_warps": tiles.num_warps, "X_LAYOUT": x_layout, "Z_LAYOUT": z_layout}
    constants |= {"FORM": form, "NUMBERS": numbers, "ACC": _launch.triton_type(acc)}
    _launch.launch(_info_nce_log_sums, (blocks, splits), sweep, constants)
    if terms is not None:
        _launch.launch(_info_nce_terms, (blocks, splits), {**sweep, "terms": terms, "splits": splits}, constants)
    every_row = {"rows": pairs.rows, "losses": losses, "ignore_index": pairs.ignore_index, "R": R}
    _launch.launch(
        _info_nce_rows,
        (_launch.ceil_div(R, ADDED),),
        {**every_row, "log_sums": log_sums, "terms": terms, "kept": kept, "splits": splits},
        {"HELD": ADDED, "FORM": form, "NUMBERS": numbers},
    )
    if not mean:
        return losses, losses.new_empty(0), kept
    loss, count = losses.new_empty(()), losses.new_empty(())
    _launch.launch(
        _info_nce_mean,
        (1,),
        {**every_row, "loss": loss, "count": count},
        {"RUN": MEAN_RUN, "FORM": form, **_launch.UNFUSED},
    )
    return loss, count, kept


def backward(
    gradient: Tensor, rows: Tensor, columns: Tensor, pairs: Pairs, count: Tensor, kept: Tensor, toward: str
) -> Tensor:
    """Return the gradient ``toward`` the "rows" or the "columns", or of rows against themselves through "both".
    gradient: dL/dloss, () or (R,)."""
    held, streamed = (columns, rows) if toward == "columns" else (rows, columns)
    (n, D), m = held.shape, streamed.shape[0]
    mean = gradient.ndim == 0
    acc = _launch.accumulator(rows.dtype)
    out = torch.empty_like(held)
    tiles = info_nce_gradient_tiles(rows.dtype, D, n, toward)
    (blocks, splits), span = _split(n, m, tiles)
    partial = torch.empty(splits, n, D, dtype=acc, device=held.device) if splits > 1 else None
    x, x_layout = matrix_of(held, tiles.HELD)
    z, z_layout = matrix_of(streamed, tiles.STREAM)
    written, out_layout = matrix_of(out if partial is None else partial[0], tiles.HELD)
    if partial is not None:
        written = written._replace(start=partial)
    (gradient_stride,) = _launch.encode_ints([0 if mean else gradient.stride(0)])
    _launch.launch(
        _info_nce_bwd,
        (blocks, splits, _launch.ceil_div(D, tiles.CHANNELS)),
        {"x": x, "z": z, "out": written, **pairs.arguments(), "gradient": Vector(gradient, gradient_stride)}
        | {"kept": kept, "count": count if mean else None, "n": n, "m": m, "span": span},
        {"D": D, "TILES": tiles, "num_warps": tiles.num_warps}
        | {"X_LAYOUT": x_layout, "Z_LAYOUT": z_layout, "OUT_LAYOUT": out_layout}
        | {"FORM": pairs.form(), "TOWARD": toward, "ACC": _launch.triton_type(acc)},
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


def _split(held: int, streamed: int, tiles: InfoNceTiles) -> tuple[tuple[int, int], int]:
    """Return the grid (blocks of held vectors, splits of the streamed ones), and the number of streamed vectors of a
    split."""
    blocks, steps = _launch.ceil_div(held, tiles.HELD), _launch.ceil_div(streamed, tiles.STREAM)
    most = min(_launch.ceil_div(PROGRAMS, blocks), _launch.ceil_div(steps, 4))
    steps_of_split = _launch.ceil_div(steps, most)
    return (blocks, _launch.ceil_div(steps, steps_of_split)), steps_of_split * tiles.STREAM


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
    TILES: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    NUMBERS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes HELD rows and one split of the columns and writes for each row the largest s and
    Σ w e^(s - largest) of the negatives ("supcon": of all pairs), and of the positives the same ("pooled"), or Σ w and
    Σ w s ("supcon").

    The kernel reads the rows once, and the columns once for every block of rows, from the second on out of the cache. A
    NaN or inf anywhere makes the first sum NaN, and no later step hides it.
    """
    HELD: tl.constexpr = TILES.HELD
    STREAM: tl.constexpr = TILES.STREAM
    held_first = tl.program_id(0) * HELD
    i = held_first + tl.arange(0, HELD)
    row_label, row_name, valid = row_codes(rows, i, R, ignore_index, FORM)
    held = vector_tiles(x, held_first, valid, D, HELD, TILES, X_LAYOUT)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    largest = tl.full((HELD,), float("-inf"), ACC)
    total = tl.zeros((HELD,), tl.float64)
    largest_positive = tl.full((HELD,), float("-inf"), ACC)
    total_positive = tl.zeros((HELD,), tl.float64)
    mass = tl.zeros((HELD,), tl.float64)
    start = tl.program_id(1) * span
    for first in range(start, _stop(valid, start, span, C), STREAM):
        j = first + tl.arange(0, STREAM)
        label, name, candidate, weight, valid_column = column_codes(columns, j, C, ignore_index, FORM, ACC)
        # A tile of ignored columns only is skipped, except the first, so that a NaN in a row is seen even without valid
        # columns.
        if (tl.max(valid_column.to(tl.int32), 0) > 0) | (first == start):
            streamed = vector_tiles(z, first, valid_column, D, STREAM, TILES, Z_LAYOUT)
            s = similarities(
                held, streamed, x, held_first, valid, z, first, valid_column, inverse_temperature, D, TILES, X_LAYOUT,
                Z_LAYOUT, ACC,
            )  # fmt: skip
            positive, negative = pair_kinds(
                columns, row_label[:, None], row_name[:, None], label[None, :], name[None, :], candidate[None, :],
                i[:, None], j[None, :], FORM,
            )  # fmt: skip
            if FORM.positives == "supcon":
                negative = negative | positive
            largest, total, e = _grow(largest, total, s, negative, columns, weight)
            total += tl.sum(e + s * times_weight(columns, 0.0, weight[None, :]), 1).to(tl.float64)
            if FORM.positives == "pooled":
                largest_positive, total_positive, e = _grow(
                    largest_positive, total_positive, s, positive, columns, weight
                )
                total_positive += tl.sum(e, 1).to(tl.float64)
            if FORM.positives == "supcon":
                mass += tl.sum(tl.where(positive, weight[None, :], 0.0), 1).to(tl.float64)
                pulled = tl.where(positive, times_weight(columns, s, weight[None, :]), 0.0)
                total_positive += tl.sum(pulled, 1).to(tl.float64)
    here = log_sums + tl.program_id(1).to(tl.int64) * NUMBERS * R + i
    tl.store(here, largest.to(tl.float64), mask=i < R)
    tl.store(here + R, total, mask=i < R)
    if FORM.positives != "each":
        third = mass if FORM.positives == "supcon" else largest_positive.to(tl.float64)
        tl.store(here + tl.cast(R, tl.int64) * 2, third, mask=i < R)
        tl.store(here + tl.cast(R, tl.int64) * 3, total_positive, mask=i < R)


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
    TILES: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    NUMBERS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes HELD rows and one split of the columns and writes for each row of "each" Σ w,
    Σ w softplus(Z - s) and Σ w sigmoid(Z - s) over the positives. Tiles without a positive pair are skipped; in columns
    sorted by class these are nearly all."""
    HELD: tl.constexpr = TILES.HELD
    STREAM: tl.constexpr = TILES.STREAM
    held_first = tl.program_id(0) * HELD
    i = held_first + tl.arange(0, HELD)
    row_label, row_name, valid = row_codes(rows, i, R, ignore_index, FORM)
    held = vector_tiles(x, held_first, valid, D, HELD, TILES, X_LAYOUT)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    log_sum = _log_sum(log_sums, 0, splits, i, R, HELD, NUMBERS).to(ACC)
    mass = tl.zeros((HELD,), tl.float64)
    loss = tl.zeros((HELD,), tl.float64)
    share = tl.zeros((HELD,), tl.float64)
    start = tl.program_id(1) * span
    for first in range(start, _stop(valid, start, span, C), STREAM):
        j = first + tl.arange(0, STREAM)
        label, name, candidate, weight, valid_column = column_codes(columns, j, C, ignore_index, FORM, ACC)
        positive, _ = pair_kinds(
            columns, row_label[:, None], row_name[:, None], label[None, :], name[None, :], candidate[None, :],
            i[:, None], j[None, :], FORM,
        )  # fmt: skip
        positive = positive & valid[:, None]
        if tl.max(tl.max(positive.to(tl.int32), 1), 0) > 0:
            streamed = vector_tiles(z, first, valid_column, D, STREAM, TILES, Z_LAYOUT)
            s = similarities(
                held, streamed, x, held_first, valid, z, first, valid_column, inverse_temperature, D, TILES, X_LAYOUT,
                Z_LAYOUT, ACC,
            )  # fmt: skip
            softplus, sigmoid = softplus_and_sigmoid(log_sum[:, None] - s)
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
    FORM: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """Each program takes HELD rows and writes l of each row, and what its backward pass needs, from the sums of all
    splits."""
    i = tl.program_id(0) * HELD + tl.arange(0, HELD)
    _, _, valid = row_codes(rows, i, R, ignore_index, FORM)
    log_sum = _log_sum(log_sums, 0, splits, i, R, HELD, NUMBERS)
    log_positives = tl.zeros((HELD,), tl.float64)
    if FORM.positives == "pooled":
        log_positives = _log_sum(log_sums, 2, splits, i, R, HELD, NUMBERS)
        takes_part = valid & (log_positives != float("-inf"))
        loss, push = softplus_and_sigmoid(log_sum - log_positives)
        pull = push
    elif FORM.positives == "supcon":
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
    """Write one of the four numbers that the backward pass needs of rows i."""
    tl.store(kept + tl.cast(R, tl.int64) * number + i, value.to(kept.dtype.element_ty), mask=i < R)


@triton.jit
def _kept(kept, number, i, R):
    """Return what ``_keep`` wrote, (rows,), and 0 beyond the last row."""
    return tl.load(kept + tl.cast(R, tl.int64) * number + i, mask=i < R, other=0.0)


@triton.jit(do_not_specialize=["ignore_index", "R"])
def _info_nce_mean(losses, rows, loss, count, ignore_index, R, RUN: tl.constexpr, FORM: tl.constexpr):
    """The one program writes the mean over the valid rows and their number (at least 1), summed in order."""
    total = tl.zeros((RUN,), tl.float64)
    number = tl.zeros((RUN,), tl.float64)
    for first in range(0, R, RUN):
        i = first + tl.arange(0, RUN)
        _, _, valid = row_codes(rows, i, R, ignore_index, FORM)
        total += tl.load(losses + i, mask=i < R, other=0.0).to(tl.float64)
        number += valid.to(tl.float64)
    valid_rows = tl.maximum(tl.sum(number, 0), 1.0)
    tl.store(count, valid_rows.to(count.dtype.element_ty))
    tl.store(loss, (tl.sum(total, 0) / valid_rows).to(loss.dtype.element_ty))


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit
def _row_gradients(rows, kept, gradient, i, R, ignore_index, MEAN: tl.constexpr, FORM: tl.constexpr):
    """Return the codes of rows i, Z, Y, and what pushes and pulls, with dL/dl in the latter two where rows have their
    own."""
    label, name, valid = row_codes(rows, i, R, ignore_index, FORM)
    push = _kept(kept, 2, i, R)
    pull = _kept(kept, 3, i, R)
    if not MEAN:
        g = tl.load(gradient.start + i.to(tl.int64) * decode_int(gradient.stride), mask=valid, other=0.0)
        push *= g
        pull *= g
    return label, name, valid, _kept(kept, 0, i, R), _kept(kept, 1, i, R), push, pull


@triton.jit
def _slopes(s, positive, negative, log_sum, log_positives, push, pull, columns, weight, FORM: tl.constexpr):
    """Return ∂L/∂s, but for factors that all pairs share. A weighted exponential is a share of its sum, so at most 1,
    also where the recomputed s is rounded differently than in Z."""
    ratio = tl.exp(s - log_sum)
    share = tl.minimum(times_weight(columns, ratio, weight), 1.0)
    if FORM.positives == "pooled":
        positive_share = tl.minimum(times_weight(columns, tl.exp(s - log_positives), weight), 1.0)
        return tl.where(negative, push * share, 0.0) - tl.where(positive, pull * positive_share, 0.0)
    elif FORM.positives == "supcon":
        pulled = times_weight(columns, pull, weight)
        return tl.where(negative | positive, push * share, 0.0) - tl.where(positive, pulled, 0.0)
    else:
        pulled = times_weight(columns, pull / (1.0 + ratio), weight)
        return tl.where(negative, push * share, 0.0) - tl.where(positive, pulled, 0.0)


@triton.jit(do_not_specialize=["temperature", "ignore_index", "n", "m", "span"])
def _info_nce_bwd(
    x,
    z,
    out,
    rows,
    columns,
    gradient,
    kept,
    count,
    temperature,
    ignore_index,
    n,
    m,
    span,
    D: tl.constexpr,
    TILES: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    FORM: tl.constexpr,
    TOWARD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes HELD vectors and one split of the streamed ones and writes dL/dx of CHANNELS channels of the
    held ones.
    The n held vectors are the rows (TOWARD "rows"), the columns, or both at once, as then the m streamed ones are.

    s is computed again. The kernel reads the held vectors once, the streamed ones once for every block of held ones,
    and writes a gradient for each split.
    """
    K: tl.constexpr = TILES.K
    HELD: tl.constexpr = TILES.HELD
    STREAM: tl.constexpr = TILES.STREAM
    PRODUCTS: tl.constexpr = TILES.CHANNELS // TILES.K
    MEAN: tl.constexpr = count is not None
    R = m if TOWARD == "columns" else n
    held_first = tl.program_id(0) * HELD
    a = held_first + tl.arange(0, HELD)
    if TOWARD != "columns":
        row_label, row_name, valid, log_sum, log_positives, push, pull = _row_gradients(
            rows, kept, gradient, a, R, ignore_index, MEAN, FORM
        )
    if TOWARD != "rows":
        own_label, own_name, own_candidate, own_weight, valid = column_codes(columns, a, n, ignore_index, FORM, ACC)
    held = vector_tiles(x, held_first, valid, D, HELD, TILES, X_LAYOUT)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    d0 = tl.program_id(2) * TILES.CHANNELS
    gradients = zero_tiles(PRODUCTS, HELD, K, ACC)
    start = tl.program_id(1) * span
    for first in range(start, _stop(valid, start, span, m), STREAM):
        b = first + tl.arange(0, STREAM)
        if TOWARD != "columns":
            label, name, candidate, weight, wanted = column_codes(columns, b, m, ignore_index, FORM, ACC)
        if TOWARD != "rows":
            its_label, its_name, wanted, its_log_sum, its_log_positives, its_push, its_pull = _row_gradients(
                rows, kept, gradient, b, R, ignore_index, MEAN, FORM
            )
        if tl.max(wanted.to(tl.int32), 0) > 0:
            streamed = vector_tiles(z, first, wanted, D, STREAM, TILES, Z_LAYOUT)
            s = similarities(
                held, streamed, x, held_first, valid, z, first, wanted, inverse_temperature, D, TILES, X_LAYOUT,
                Z_LAYOUT, ACC,
            )  # fmt: skip
            slopes = tl.zeros((HELD, STREAM), ACC)
            if TOWARD != "columns":
                positive, negative = pair_kinds(
                    columns, row_label[:, None], row_name[:, None], label[None, :], name[None, :], candidate[None, :],
                    a[:, None], b[None, :], FORM,
                )  # fmt: skip
                slopes += _slopes(
                    s, positive, negative, log_sum[:, None], log_positives[:, None], push[:, None], pull[:, None],
                    columns, weight[None, :], FORM,
                )  # fmt: skip
            if TOWARD != "rows":
                positive, negative = pair_kinds(
                    columns, its_label[None, :], its_name[None, :], own_label[:, None], own_name[:, None],
                    own_candidate[:, None], b[None, :], a[:, None], FORM,
                )  # fmt: skip
                slopes += _slopes(
                    s, positive, negative, its_log_sum[None, :], its_log_positives[None, :], its_push[None, :],
                    its_pull[None, :], columns, own_weight[:, None], FORM,
                )  # fmt: skip
            sums = ()
            for i in tl.static_range(PRODUCTS):
                if TILES.HOLD:
                    tile = streamed[i]
                else:
                    tile = vector_tile(z, first, wanted, d0 + i * K, D, STREAM, K, Z_LAYOUT, D % TILES.CHANNELS == 0)
                sums = sums + (dot_features(slopes, tile, gradients[i], CHAINED=True),)  # noqa: RUF005
            gradients = sums
    scale = inverse_temperature
    if MEAN:
        scale *= tl.load(gradient.start).to(ACC) / tl.load(count).to(ACC)
    split = tl.program_id(1).to(tl.int64) * n * D
    for i in tl.static_range(PRODUCTS):
        d = d0 + i * K
        start_of_block, here = addresses(out, held_first, d, HELD, K, OUT_LAYOUT)
        value = tl.where(valid[:, None], gradients[i] * scale, 0.0).to(out.start.dtype.element_ty)
        tl.store(start_of_block + split + here, value, mask=(a < n)[:, None] & (d + tl.arange(0, K) < D)[None, :])


@triton.jit(do_not_specialize=["n", "splits"])
def _add_splits(
    partial, out, n, splits, D: tl.constexpr, ELEMENTS: tl.constexpr, SPLITS: tl.constexpr, OUT_LAYOUT: tl.constexpr
):
    """Each program takes ELEMENTS elements and writes Σ partial over the splits, always added in the same order."""
    e = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    size = tl.cast(n, tl.int64) * D
    total = tl.zeros((ELEMENTS,), partial.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        here = partial + split.to(tl.int64)[:, None] * size + e[None, :]
        total += tl.sum(tl.load(here, mask=(split < splits)[:, None] & (e < size)[None, :], other=0.0), 0)
    row_stride = 1 if OUT_LAYOUT.unit == "r" else decode_int(out.row_stride) * OUT_LAYOUT.align
    channel_stride = 1 if OUT_LAYOUT.unit == "d" else decode_int(out.channel_stride) * OUT_LAYOUT.align
    tl.store(
        out.start + e // D * row_stride + e % D * channel_stride, total.to(out.start.dtype.element_ty), mask=e < size
    )


# ----------------------------------------------------------------------------------------------------------------- sums


@triton.jit
def _stop(valid, start, span, end):
    """Return where a split of the streamed vectors ends: at its start where no held vector is valid, as in padding."""
    return tl.where(tl.max(valid.to(tl.int32), 0) > 0, tl.minimum(start + span, end), start)


@triton.jit
def _grow(largest, total, s, chosen, columns, weight):
    """Return the largest element so far, the sum of exponentials relative to it, and what the chosen elements of a tile
    add to the sum."""
    top = tl.maximum(largest, tl.max(tl.where(chosen, s, float("-inf")), 1))
    shift = tl.where(top == float("-inf"), 0.0, top)
    e = tl.where(chosen, times_weight(columns, tl.exp(s - shift[:, None]), weight[None, :]), 0.0)
    return top, total * tl.exp(largest - shift).to(tl.float64), e


@triton.jit
def _load_splits(sums, number, split, splits, i, R, other, NUMBERS: tl.constexpr):
    """Return one of NUMBERS sums of rows i from each of some splits, (splits, rows), and ``other`` where there is
    none."""
    here = sums + (split.to(tl.int64) * NUMBERS + number)[:, None] * R + i[None, :]
    return tl.load(here, mask=(split < splits)[:, None] & (i < R)[None, :], other=other)


@triton.jit
def _sum(sums, number, splits, i, R, HELD: tl.constexpr, NUMBERS: tl.constexpr):
    """Return one of NUMBERS sums of rows i over all splits, (HELD,), always added in the same order."""
    total = tl.zeros((HELD,), tl.float64)
    for first in range(0, splits, 16):
        total += tl.sum(_load_splits(sums, number, first + tl.arange(0, 16), splits, i, R, 0.0, NUMBERS), 0)
    return total


@triton.jit
def _log_sum(sums, number, splits, i, R, HELD: tl.constexpr, NUMBERS: tl.constexpr):
    """Return the logarithm of the sum of exponentials over all splits, (HELD,), from the largest s and the sum relative
    to it (the next number): -inf where nothing was summed, NaN where something is not finite."""
    largest = tl.full((HELD,), float("-inf"), tl.float64)
    total = tl.zeros((HELD,), tl.float64)
    for first in range(0, splits, 16):
        split = first + tl.arange(0, 16)
        tops = _load_splits(sums, number, split, splits, i, R, float("-inf"), NUMBERS)
        top = tl.maximum(largest, tl.max(tops, 0))
        shift = tl.where(top == float("-inf"), 0.0, top)
        totals = _load_splits(sums, number + 1, split, splits, i, R, 0.0, NUMBERS) * tl.exp(tops - shift[None, :])
        total = total * tl.exp(largest - shift) + tl.sum(totals, 0)
        largest = top
    return tl.where(total == 0.0, float("-inf"), largest + tl.log(tl.where(total == 0.0, 1.0, total)))
