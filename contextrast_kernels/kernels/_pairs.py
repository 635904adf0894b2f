"""Pieces that the kernels of ``info_nce`` share: tiles of vectors, their products, and which columns are positives and
negatives of a row.

A tile has N vectors and K channels. The vectors of ``x`` are held by a program, those of ``z`` stream past them.
"""

import triton
from triton import language as tl

from contextrast_kernels.kernels._tiles import FLOAT32_DOT, decode_int, dot_float64, rounded


@triton.jit
def addresses(matrix, first, d0, N: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr):
    """Return a pointer to vector ``first`` of a matrix, and the offsets (N, K) from there of channels d0 .. d0+K-1 of
    N vectors. The products with LAYOUT.align tell the compiler what divides a stride."""
    v = tl.arange(0, N)
    d = d0 + tl.arange(0, K)
    if LAYOUT.wide:
        v = v.to(tl.int64)
        d = d.to(tl.int64)
    row_stride = decode_int(matrix.row_stride) * LAYOUT.align
    channel_stride = decode_int(matrix.channel_stride) * LAYOUT.align
    if LAYOUT.unit == "d":
        return matrix.start + tl.cast(first, tl.int64) * row_stride, v[:, None] * row_stride + d[None, :]
    elif LAYOUT.unit == "r":
        return matrix.start + tl.cast(first, tl.int64), v[:, None] + d[None, :] * channel_stride
    else:
        start = matrix.start + tl.cast(first, tl.int64) * row_stride
        return start, v[:, None] * row_stride + d[None, :] * channel_stride


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
    """Return channels d0 .. d0+K-1 of N vectors from ``first`` on, (N, K), with zeros beyond D and for vectors that
    are not wanted. WITHIN: no tile begins beyond D."""
    start, here = addresses(matrix, first, d0, N, K, LAYOUT)
    if D % K == 0 and WITHIN:
        return tl.load(start + here, mask=wanted[:, None], other=0.0)
    else:
        return tl.load(start + here, mask=wanted[:, None] & (d0 + tl.arange(0, K) < D)[None, :], other=0.0)


@triton.jit
def vector_tiles(matrix, first, wanted, D: tl.constexpr, N: tl.constexpr, TILES: tl.constexpr, LAYOUT: tl.constexpr):
    """Return N vectors from ``first`` on as a tuple of tiles (N, K) of their channels, which is empty unless
    TILES.HOLD."""
    K: tl.constexpr = TILES.K
    tiles = ()
    if TILES.HOLD:
        for d0 in tl.static_range(0, D, K):
            tiles = tiles + (vector_tile(matrix, first, wanted, d0, D, N, K, LAYOUT),)  # noqa: RUF005
    return tiles


@triton.jit
def _minus_dot(x, z, acc):
    """Return acc - x zᵀ for tiles x and z of vectors, as exact as the accumulator. A product that is added becomes
    part of the tensor cores' sum, which is truncated; one that is subtracted is a sum of its own
    (``_tiles.dot_features``)."""
    if x.dtype == tl.float64:
        return dot_float64(-x, tl.trans(z), acc)
    elif x.dtype == tl.float32:
        return acc - tl.dot(x, tl.trans(z), input_precision=FLOAT32_DOT)
    else:
        return acc - tl.dot(x, tl.trans(z))


@triton.jit
def similarities(
    held,
    streamed,
    x,
    x_first,
    x_wanted,
    z,
    z_first,
    z_wanted,
    inverse_temperature,
    D: tl.constexpr,
    TILES: tl.constexpr,
    X_LAYOUT: tl.constexpr,
    Z_LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Return s of HELD vectors and STREAM others, (HELD, STREAM): from their tiles ``held`` and ``streamed`` where
    TILES.HOLD; else both matrices are read, K channels at a time."""
    K: tl.constexpr = TILES.K
    HELD: tl.constexpr = TILES.HELD
    STREAM: tl.constexpr = TILES.STREAM
    s = tl.zeros((HELD, STREAM), ACC)
    if TILES.HOLD:
        for i in tl.static_range((D + K - 1) // K):
            s = _minus_dot(held[i], streamed[i], s)
    else:
        for d0 in range(0, D, K):
            left = vector_tile(x, x_first, x_wanted, d0, D, HELD, K, X_LAYOUT)
            s = _minus_dot(left, vector_tile(z, z_first, z_wanted, d0, D, STREAM, K, Z_LAYOUT), s)
    return rounded(-inverse_temperature * s)


@triton.jit
def _codes(codes, stride, at, live, ignore_index, LABEL: tl.constexpr):
    """Return the integers at some positions of a vector in the type LABEL, and ignore_index where they are not
    live."""
    code = tl.load(codes + at.to(tl.int64) * decode_int(stride), mask=live, other=0).to(LABEL)
    return tl.where(live, code, tl.cast(ignore_index, LABEL))


@triton.jit
def row_codes(rows, i, R, ignore_index, FORM: tl.constexpr):
    """Return for each of the rows i its label, the label of its negatives, and whether it is valid."""
    LABEL: tl.constexpr = FORM.label
    label = _codes(rows.labels, rows.labels_stride, i, i < R, ignore_index, LABEL)
    name = label
    if rows.negatives is not None:
        name = _codes(rows.negatives, rows.negatives_stride, i, i < R, ignore_index, LABEL)
    return label, name, label != tl.cast(ignore_index, LABEL)


@triton.jit
def column_codes(columns, j, C, ignore_index, FORM: tl.constexpr, ACC: tl.constexpr):
    """Return for each of the columns j its label; the label of the rows whose negative it is; whether it can be a
    negative; its weight, NaN where what is given is no weight; and whether it is valid. A column that does not count
    gets the label of ignored rows."""
    LABEL: tl.constexpr = FORM.label
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
def pair_kinds(columns, row_label, row_name, label, name, candidate, i, j, FORM: tl.constexpr):
    """Return whether each pair of a row and a column is a positive one, and whether it is a negative one. The
    arguments are vectors of rows and of columns, shaped so that they meet in a tile. Ignored rows and columns share a
    label; no term has these rows."""
    positive = row_label == label
    negative = (positive == 0) & candidate
    if columns.negatives is not None:
        negative = (row_name == name) & candidate
    if FORM.itself:
        positive = positive & (i != j)
        negative = negative & (i != j)
    return positive, negative


@triton.jit
def times_weight(columns, value, weight):
    """Return value · weight, or the value where columns have no weights."""
    if columns.weights is not None:
        return value * weight
    else:
        return value


@triton.jit
def softplus_and_sigmoid(t):
    """Return log(1 + e^t) to full relative precision, as ``_tiles.softplus`` does, and 1 / (1 + e^-t), from one
    exponential."""
    u = tl.exp(-tl.abs(t))
    w = 1.0 + u
    softplus = tl.maximum(t, 0.0) + tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return softplus, tl.where(t > 0, 1.0, u) / w
