"""What every sweep of ``info_nce`` reads: two matrices however they lie, and who is whose positive and negative.

The first half is the host's description of them, the second the pieces of kernels that read it.
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._tiles import FLOAT32_DOT, dot_float64, plain


class Matrix(NamedTuple):
    """A matrix as a kernel sees it. ``encode_ints`` makes the strides, in units of what is known to divide them."""

    start: Tensor
    of_row: int
    of_channel: int


class Rows(NamedTuple):
    """What is known of each row besides its vector; strides are made by ``_launch.encode_ints``."""

    labels: Tensor
    negatives: Tensor | None
    labels_stride: int
    negatives_stride: int


class Columns(NamedTuple):
    labels: Tensor
    negatives: Tensor | None
    base: Tensor | None
    weights: Tensor | None
    labels_stride: int
    negatives_stride: int
    base_stride: int
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


def pairs(
    row_labels: Tensor,
    column_labels: Tensor | None,
    row_negatives: Tensor | None,
    column_negatives: Tensor | None,
    base: Tensor | None,
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
        with_strides(Columns, column_labels, column_negatives, base, column_weights),
        itself,
        temperature,
        ignore_index,
        positives,
    )


def matrix_of(x: Tensor, block: int) -> tuple[Matrix, tuple[str, int, bool]]:
    """A matrix for a kernel, and what the compiler may know of its memory: the axis of stride 1 ("d" channels, "r"
    rows, "" neither), a power of two that divides the other stride, up to 16 bytes' worth, and whether offsets inside
    ``block`` rows need 64 bits."""
    (n, D), (of_row, of_channel) = x.shape, x.stride()
    unit = "d" if of_channel == 1 or D == 1 else "r" if of_row == 1 or n == 1 else ""
    align = 16 // x.element_size() if unit else 1
    while (of_row if unit == "d" else of_channel) % align:
        align //= 2
    steps = _launch.encode_ints([of_row // align, of_channel // align])
    return Matrix(x, *steps), (unit, align, block * of_row + D * of_channel >= 2**31)


# -------------------------------------------------------------------------------------------------------------- pieces


@triton.jit
def places(matrix, first, d0, N: tl.constexpr, K: tl.constexpr, LIES: tl.constexpr):
    """Where vector ``first`` begins, and offsets (N, K) from there of N vectors and channels d0 .. d0+K-1. The products
    with what divides a stride tell the compiler so."""
    v = tl.arange(0, N)
    d = d0 + tl.arange(0, K)
    if LIES[2]:
        v = v.to(tl.int64)
        d = d.to(tl.int64)
    of_row = plain(matrix.of_row) * LIES[1]
    of_channel = plain(matrix.of_channel) * LIES[1]
    if LIES[0] == "d":
        return matrix.start + tl.cast(first, tl.int64) * of_row, v[:, None] * of_row + d[None, :]
    elif LIES[0] == "r":
        return matrix.start + tl.cast(first, tl.int64), v[:, None] + d[None, :] * of_channel
    else:
        return matrix.start + tl.cast(first, tl.int64) * of_row, v[:, None] * of_row + d[None, :] * of_channel


@triton.jit
def vector_tile(
    matrix,
    first,
    wanted,
    d0,
    D: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    LIES: tl.constexpr,
    WITHIN: tl.constexpr = True,
):
    """Channels d0 .. d0+K-1 of N vectors (N, K), zero where not wanted. WITHIN: as in ``_tiles.channels``."""
    start, here = places(matrix, first, d0, N, K, LIES)
    if D % K == 0 and WITHIN:
        return tl.load(start + here, mask=wanted[:, None], other=0.0)
    else:
        return tl.load(start + here, mask=wanted[:, None] & (d0 + tl.arange(0, K) < D)[None, :], other=0.0)


@triton.jit
def vector_tiles(
    matrix, first, wanted, D: tl.constexpr, N: tl.constexpr, K: tl.constexpr, LIES: tl.constexpr, HOLD: tl.constexpr
):
    """N vectors as tiles (N, K) of their channels, to keep at hand; none unless HOLD."""
    tiles = ()
    if HOLD:
        for d0 in tl.static_range(0, D, K):
            tiles = tiles + (vector_tile(matrix, first, wanted, d0, D, N, K, LIES),)  # noqa: RUF005
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
    X_LIES: tl.constexpr,
    Z_LIES: tl.constexpr,
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
            left = vector_tile(x, x_first, x_wanted, d0, D, HELD, K, X_LIES)
            s = _minus_dot(left, vector_tile(z, z_first, z_wanted, d0, D, STREAM, K, Z_LIES), s)
    return -s


@triton.jit
def _codes(codes, stride, at, live, ignore_index, LABEL: tl.constexpr):
    """Integers as they are, ignore_index beyond the end."""
    code = tl.load(codes + at.to(tl.int64) * plain(stride), mask=live, other=0).to(LABEL)
    return tl.where(live, code, tl.cast(ignore_index, LABEL))


@triton.jit
def row_codes(rows, i, R, ignore_index, LABEL: tl.constexpr):
    """Of rows i: the label, the label of their negatives, and whether they are valid."""
    label = _codes(rows.labels, rows.labels_stride, i, i < R, ignore_index, LABEL)
    name = label
    if rows.negatives is not None:
        name = _codes(rows.negatives, rows.negatives_stride, i, i < R, ignore_index, LABEL)
    return label, name, label != tl.cast(ignore_index, LABEL)


@triton.jit
def column_codes(columns, j, C, ignore_index, LABEL: tl.constexpr, ACC: tl.constexpr):
    """Of columns j: the label; the label of the rows whose negative it is; bits that say whether it counts (1), whether
    it is a negative by name (2) and by being base (4); the weight, NaN where that is none; and whether it is valid."""
    ignored = tl.cast(ignore_index, LABEL)
    label = _codes(columns.labels, columns.labels_stride, j, j < C, ignore_index, LABEL)
    valid = label != ignored
    counts = valid
    weight = valid.to(ACC)
    if columns.weights is not None:
        given = tl.load(columns.weights + j.to(tl.int64) * plain(columns.weights_stride), mask=valid, other=0.0)
        weight = given.to(ACC)
        weight = tl.where((weight >= 0) & (weight < float("inf")), weight, float("nan"))
        counts = valid & (weight != 0)
    bits = counts.to(tl.int32)
    name = label
    if columns.negatives is not None:
        name = _codes(columns.negatives, columns.negatives_stride, j, j < C, ignore_index, LABEL)
        bits += 2 * (counts & (name != ignored)).to(tl.int32)
    if columns.base is not None:
        is_base = tl.load(columns.base + j.to(tl.int64) * plain(columns.base_stride), mask=counts, other=0) != 0
        bits += 4 * is_base.to(tl.int32)
    return label, name, bits, weight, valid


@triton.jit
def sets(columns, row_label, row_name, label, name, bits, i, j, ITSELF: tl.constexpr):
    """Whether each pair is one of a positive, and of a negative. The arguments are vectors of rows and of columns,
    shaped so that they meet in a tile. An ignored column has the label of ignored rows alone, which are in no term."""
    positive = row_label == label
    if columns.negatives is None and columns.base is None:
        negative = (positive == 0) & ((bits & 1) != 0)
    else:
        negative = (positive == 0) & ((bits & 4) != 0)
        if columns.negatives is not None:
            negative = negative | ((row_name == name) & ((bits & 2) != 0))
    if columns.weights is not None:
        positive = positive & ((bits & 1) != 0)
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
