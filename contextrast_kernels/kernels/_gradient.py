"""Backward pass: one kernel writes dL/dx and combines the gradients through positives, negatives and anchors.

With u_p the gradient of the loss by the embedding v_p = r_p x_p,

    u_p = k⁺_y σ_p â_y  +  k⁻_e exp(s_ep - Z_e) â_e  +  T_y,        dx_p = g r_p (u_p - v_p ⟨v_p, u_p⟩)

    σ_p = sigmoid(Z_y - s_yp), the positive's share        k⁺_n = -λ / (|C| c_n τ)
    G_n = mean of σ over the positives of n                k⁻_n = λ G_n / (|C| τ)
    T_n = (dL/da^n) / c_n, the pull through the anchor     g = the upstream gradient, read from memory

⟨v, u⟩ is a sum of products with rows of â and T, so u need not be held: a row is read for the products, and again, from
cache, to be written. Where rows can be copied to shared memory, tensor cores form both from the copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._tile_table import copied_tiles, copies_rows, next_power_of_2, tiles_of
from contextrast_kernels.kernels._tiles import (
    FLOAT32_DOT,
    anchor_products,
    block_classes,
    channels,
    class_rows,
    dot_float64,
    float64_from_bits,
    hard_share,
    image_of,
    in_map,
    inverse_norm,
    is_finite,
    is_negative,
    joined,
    open_block,
    rounded,
    row_again,
    row_codes,
    row_flags,
    row_of,
    row_tiles,
    sigmoid,
    size_term,
    stacked,
    store_channels,
    summed_size,
    table_rows,
    two_pieces,
    zero_tiles,
)


class Terms(NamedTuple):
    """What the backward pass keeps of the loss besides the features: O(pixels + N D)."""

    e: Tensor
    base: Tensor | None
    similarity: Tensor | None
    """The similarity of each hard negative to its anchor, one number a pixel. None if base pixels need all classes."""
    table: Tensor
    """(layers, N, D) â."""
    Z: Tensor
    """(layers, N)."""
    coefficients: Tensor
    """(layers, 2, N): k⁺ and k⁻."""


def feature_gradients(
    features: Sequence[Tensor],
    y: Tensor,
    num_classes: int,
    normalize: bool,
    *,
    pull: Tensor | None = None,
    terms: Terms | None = None,
    temperature: float = 1.0,
    gradient: Tensor | None = None,
) -> list[Tensor]:
    """Return dL/dx of every layer. pull: T (layers, N, D). terms: what the loss kept. gradient: g, a scalar."""
    out = [torch.empty_like(x) for x in features]
    dtype, D = features[0].dtype, features[0].shape[1]
    if terms is None:
        terms = Terms(None, None, None, None, None, None)
    arguments = {
        "y": y,
        "terms": terms,
        "pull": pull,
        "gradient": gradient,
        "temperature": _launch.float64_bits(temperature),
        "N": num_classes,
    }
    constants = {"NORMALIZE": normalize, "ACC": _launch.triton_type(_launch.accumulator(dtype))}
    if terms.base is not None:
        tiles = tiles_of("_features_bwd_dense", dtype, D)
        _launch.sweep(_features_bwd_dense, features, arguments, tiles, constants, out=out)
        return out
    tiles = tiles_of("_features_bwd", dtype, D)
    copied = _launch.Copied(copied_tiles(tiles), {}) if normalize and copies_rows(dtype, D) else None
    constants |= {"BINS": next_power_of_2(num_classes), "COPIED": False}
    _launch.sweep(_features_bwd, features, arguments, tiles, constants, out=out, copied=copied)
    return out


@triton.jit(do_not_specialize=["temperature", "N"])
def _features_bwd(
    x,
    out,
    geometry,
    y,
    terms,
    pull,
    gradient,
    temperature,
    N,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COPIED: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes one block (ROWS rows of P pixels of one image) and writes dx where a pixel is a negative of
    one class at most.

    The norm and s_y are computed again, s_e is read, one number a pixel. Rows of â and T are gathered; they stay in
    cache. The kernel moves the features once, dx once, and 6 bytes a pixel.
    COPIED: rows can be copied. ``_write_copied_rows`` then writes the block, unless it has many classes or holds
    something that is not finite.
    """
    P: tl.constexpr = TILES.P
    CHUNK: tl.constexpr = TILES.CHUNK
    e = terms.e
    similarity = terms.similarity
    table = terms.table
    g = 1.0
    if gradient is not None:
        g = tl.load(gradient).to(ACC)
    inverse_temperature = 1.0
    if table is not None:
        inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)

    block = open_block(x, geometry, tl.program_id(0), TILES.ROWS, P, LAYOUT)
    gathered = True
    if COPIED:
        slots, classes = block_classes(y, e, block, 0, N, TILES.ROWS, BINS, 16)
        gathered = classes > 16
        if classes <= 16:
            gathered = _write_copied_rows(
                block, out, y, terms, pull, slots, g, inverse_temperature, N, D, LAYOUT, OUT_LAYOUT
            )
            if gathered:
                tl.debug_barrier()  # what other threads stored is written again
    out_image = image_of(out, block.layer, block.b, OUT_LAYOUT)
    if pull is not None:
        pull += block.number * N * D
    if table is not None:
        table, Z, coefficients = _of_layer(terms, block.number, N, D)
    r1 = block.r0
    if gathered:
        r1 = block.r1

    for r in range(block.r0, r1):
        row = row_of(block.image, block, r)
        label = row_codes(y, block, r)
        valid = label < N

        # 1. ‖x‖² and the products of x with the rows of its class.
        sizes = tl.zeros((CHUNK, P), ACC)
        to_anchor = tl.zeros((CHUNK, P), ACC)
        to_pull = tl.zeros((CHUNK, P), ACC)
        for k in tl.range(0, D, CHUNK, loop_unroll_factor=8):
            tile = channels(row, k, D, CHUNK).to(ACC)
            sizes += size_term(tile, NORMALIZE)
            if table is not None:
                to_anchor += tile * table_rows(table, label, valid, k, D, CHUNK)
            if pull is not None and NORMALIZE:
                to_pull += tile * table_rows(pull, label, valid, k, D, CHUNK)
        size = tl.sum(sizes, 0)
        norm = inverse_norm(size, NORMALIZE)
        along = tl.sum(to_pull, 0)  # ⟨x, u⟩

        # 2. The weights of â_y and â_e in u.
        own = tl.zeros((P,), ACC)
        hard = tl.zeros((P,), ACC)
        negative = label
        is_hard = label < 0
        some_hard = tl.max(is_hard.to(tl.int32), 0) > 0
        if table is not None:
            product = tl.sum(to_anchor, 0)
            share = sigmoid(tl.load(Z + label, mask=valid, other=0.0) - product * norm * inverse_temperature)
            own = tl.where(valid, tl.load(coefficients + label, mask=valid, other=0.0) * share, 0.0)
            along += own * product
            negative = row_codes(e, block, r)
            is_hard = negative < N
            some_hard = tl.max(is_hard.to(tl.int32), 0) > 0
            if some_hard:
                s = tl.load(in_map(similarity, block, r), mask=is_hard, other=0.0)
                weight = tl.load(coefficients + N + negative, mask=is_hard, other=0.0)
                hard = weight * tl.exp(s - tl.load(Z + negative, mask=is_hard, other=0.0))
                # ⟨x, â_e⟩ = s τ / r; without direction nothing passes.
                along += hard * s / (inverse_temperature * tl.where(norm == 0, 1.0, norm))

        # 3. dx = g r (u - x r² ⟨x, u⟩). A vector without direction has r = 0.
        outer = tl.where(valid, norm * g, 0.0)
        inner = along * norm * norm
        broken_and_ignored = tl.max(((is_finite(size) == 0) & (valid == 0)).to(tl.int32), 0) > 0
        out_row = row_of(out_image, block, r)
        for k in tl.range(0, D, CHUNK, loop_unroll_factor=4):
            tile = channels(row, k, D, CHUNK)
            u = tl.zeros((CHUNK, P), ACC)
            if pull is not None:
                u += table_rows(pull, label, valid, k, D, CHUNK)
            if table is not None:
                u += own[None, :] * table_rows(table, label, valid, k, D, CHUNK)
                if some_hard:
                    u += hard[None, :] * table_rows(table, negative, is_hard, k, D, CHUNK)
            if NORMALIZE:
                u -= inner[None, :] * tile.to(ACC)
            u *= outer[None, :]
            if broken_and_ignored:
                u = tl.where(valid[None, :], u, 0.0)
            store_channels(out_row, k, u.to(tile.dtype), D, CHUNK)


@triton.jit
def _of_layer(terms, number, N, D: tl.constexpr):
    """Return the pointers to â, Z and the coefficients of layer ``number``."""
    return terms.table + number * N * D, terms.Z + number * N, terms.coefficients + 2 * number * N


@triton.jit
def _write_copied_rows(
    block,
    out,
    y,
    terms,
    pull,
    slots,
    g,
    inverse_temperature,
    N,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
):
    """Write dx of a block of normalised bfloat16 features with at most 16 classes. Return whether a vector of the block
    or a row of a table is not finite: then 0 · NaN is in dx, and the block has to be written again.

    A row of 64 pixels comes to shared memory once. Its product with the rows of â and T of the block's classes,
    xᵀ (P, D) · Rᵀ (D, 64), gives ⟨x, â⟩ and ⟨x, T⟩; W (P, 64) · R (64, C) gives r g u, where W holds a pixel's weights
    in the columns of its classes. Nothing is gathered. R and W are in two pieces of bfloat16.

    ⟨x, u⟩ is made of the same R and W, without what their two pieces leave out: dx stays orthogonal to x, to float32's
    precision, however small it is beside u.
    """
    P: tl.constexpr = block.c.shape[0]
    C: tl.constexpr = min(D, 128)  # channels of dx that are held in registers
    out_image = image_of(out, block.layer, block.b, OUT_LAYOUT)
    table = terms.table
    if pull is not None:
        pull += block.number * N * D
    if table is not None:
        table, Z, coefficients = _of_layer(terms, block.number, N, D)
    R = ()
    spoilt = tl.zeros((16, C), tl.float32)  # becomes NaN
    for i in tl.static_range(D // C):
        if table is not None:
            rows = class_rows(table, slots, i * C, D, C)
            spoilt += rows * 0.0
        if pull is not None:
            rows_of_pull = class_rows(pull, slots, i * C, D, C)
            spoilt += rows_of_pull * 0.0
            rows = stacked(rows, rows_of_pull) if table is not None else rows_of_pull
        R = R + (stacked(*two_pieces(rows)),)  # noqa: RUF005
    broken = tl.max(tl.max((spoilt != spoilt).to(tl.int32), 0), 0)

    # The classes of R's rows, -1 where a row is not of that table.
    no_class = tl.full((16,), -1, tl.int32)
    anchor_classes = slots
    pull_classes = slots
    if table is not None and pull is not None:
        anchor_classes = joined(slots, no_class)
        pull_classes = joined(no_class, slots)
    anchor_classes = joined(anchor_classes, anchor_classes)[None, :]
    pull_classes = joined(pull_classes, pull_classes)[None, :]
    diagonal = tl.arange(0, P)[:, None] == tl.arange(0, P)[None, :]
    spoilt_pixel = tl.zeros((P,), tl.float32)

    for r in tl.range(block.r0, block.r1, num_stages=3):
        label = row_codes(y, block, r)
        valid = label < N

        # 1. ‖x‖² and the products of x with the rows of the block's classes.
        tiles = row_tiles(row_again(block.image, block, r, LAYOUT), D, C)
        sizes = tl.zeros((P, P), tl.float32)  # on its diagonal
        products = tl.zeros((P, R[0].shape[0]), tl.float32)
        for i in tl.static_range(D // C):
            sizes = tl.dot(tl.trans(tiles[i]), tiles[i], sizes)
            products = tl.dot(tl.trans(tiles[i]), tl.trans(R[i]), products)
        size = tl.sum(tl.where(diagonal, sizes, 0.0), 1)
        spoilt_pixel += size * 0.0
        norm = inverse_norm(size, True)
        outer = tl.where(valid, norm * g, 0.0)

        # 2. The weights of â_y, â_e and T_y in r g u.
        W_high = tl.zeros(products.shape, tl.bfloat16)
        W_low = W_high
        if pull is not None:
            own = pull_classes == label[:, None]
            high, low = two_pieces(outer)
            W_high = tl.where(own, high[:, None], W_high)
            W_low = tl.where(own, low[:, None], W_low)
        if table is not None:
            own = anchor_classes == label[:, None]
            s = tl.sum(tl.where(own, products, 0.0), 1) * norm * inverse_temperature
            share = sigmoid(tl.load(Z + label, mask=valid, other=0.0) - s)
            mine = tl.load(coefficients + label, mask=valid, other=0.0) * share * outer
            negative = row_codes(terms.e, block, r)
            against = anchor_classes == negative[:, None]
            hard = hard_share(in_map(terms.similarity, block, r), Z, negative, N)
            hard *= tl.load(coefficients + N + negative, mask=negative < N, other=0.0) * outer
            mine += tl.where(negative == label, hard, 0.0)  # a given negative of its own class
            high, low = two_pieces(hard)
            W_high = tl.where(against, high[:, None], W_high)
            W_low = tl.where(against, low[:, None], W_low)
            high, low = two_pieces(mine)
            W_high = tl.where(own, high[:, None], W_high)
            W_low = tl.where(own, low[:, None], W_low)

        # 3. dx = r g u - x r² (r g ⟨x, u⟩).
        along = tl.sum((W_high.to(tl.float32) + W_low.to(tl.float32)) * products, 1)
        inner = -along * norm * norm
        out_row = row_again(out_image, block, r, OUT_LAYOUT)
        for i in tl.static_range(D // C):
            u = tl.dot(W_high, R[i], tl.dot(W_low, R[i]))
            # As one fma, x changes its layout as bfloat16, not as a float32 product.
            x = tl.trans(tiles[i]).to(tl.float32)
            u = tl.fma(x, tl.broadcast_to(inner[:, None], (P, C)), u)
            d = i * C + tl.arange(0, C)
            here = out_row.start + (d[None, :] * out_row.d + out_row.pixel[:, None])
            tl.store(here, u.to(tl.bfloat16), mask=block.live[:, None])
    return (broken + tl.max((spoilt_pixel != spoilt_pixel).to(tl.int32), 0)) > 0


@triton.jit(do_not_specialize=["temperature", "N"])
def _features_bwd_dense(
    x,
    out,
    geometry,
    y,
    terms,
    pull,
    gradient,
    temperature,
    N,
    D: tl.constexpr,
    TILES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LAYOUT: tl.constexpr,
    OUT_LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes one block (ROWS rows of P pixels of one image) and writes dx where a pixel may be a negative
    of every class but its own. Then u = Σ_n C_n â_n + T_y, and the weights C (CLASSES, P) are computed and used a few
    classes at a time, so that N x pixels are not stored anywhere.

    The kernel moves the features once and dx once. A row is read for its norms, and from cache for every CLASSES
    classes and to be written.
    """
    P: tl.constexpr = TILES.P
    COLUMNS: tl.constexpr = TILES.COLUMNS
    CLASSES: tl.constexpr = TILES.CLASSES
    PARTS: tl.constexpr = (D + TILES.COLUMNS - 1) // TILES.COLUMNS
    block = open_block(x, geometry, tl.program_id(0), TILES.ROWS, P, LAYOUT)
    out_image = image_of(out, block.layer, block.b, OUT_LAYOUT)
    table, Z, k_pull = _of_layer(terms, block.number, N, D)
    k_push = k_pull + N
    if pull is not None:
        pull += block.number * N * D
    g = tl.load(gradient).to(ACC)
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)

    for r in range(block.r0, block.r1):
        row = row_of(block.image, block, r)
        label = row_codes(y, block, r)
        negative = row_codes(terms.e, block, r)
        is_base = row_flags(terms.base, block, r)
        valid = label < N
        size = summed_size(row, D, TILES.CHUNK, NORMALIZE, ACC)
        norm = inverse_norm(size, NORMALIZE)
        gradients = zero_tiles(PARTS, COLUMNS, P, ACC)
        for n0 in range(0, N, CLASSES):
            n = n0 + tl.arange(0, CLASSES)
            classes = tl.where(n < N, n, -1)
            products = anchor_products(row, table, classes, D, TILES.K, ACC)
            own = (classes[:, None] == label[None, :]) & valid[None, :]
            against = is_negative(classes, label, negative, is_base)
            log_sum = tl.load(Z + classes, mask=classes >= 0, other=0.0)[:, None]
            s = rounded(products * (norm * inverse_temperature)[None, :])
            pulled = tl.load(k_pull + classes, mask=classes >= 0, other=0.0)[:, None] * sigmoid(log_sum - s)
            pushed = tl.load(k_push + classes, mask=classes >= 0, other=0.0)[:, None] * tl.exp(s - log_sum)
            weights = tl.where(own, pulled, 0.0) + tl.where(against, pushed, 0.0)
            sums = ()
            for i in tl.static_range(PARTS):
                rows = tl.trans(class_rows(table, classes, i * COLUMNS, D, COLUMNS))
                if tl.float64 == ACC:
                    sums = sums + (dot_float64(rows, weights, gradients[i]),)  # noqa: RUF005
                else:
                    sums = sums + (tl.dot(rows, weights, gradients[i], input_precision=FLOAT32_DOT),)  # noqa: RUF005
            gradients = sums
        # ⟨x, u⟩ is made of u as it was rounded, so dx is 0 to the last bit where u has no other part.
        along = tl.zeros((COLUMNS, P), ACC)
        whole = ()
        for i in tl.static_range(PARTS):
            u = gradients[i]
            if pull is not None:
                u += table_rows(pull, label, valid, i * COLUMNS, D, COLUMNS)
            if NORMALIZE:
                along += channels(row, i * COLUMNS, D, COLUMNS).to(ACC) * u
            whole = whole + (u,)  # noqa: RUF005
        outer = tl.where(valid, norm * g, 0.0)
        inner = tl.sum(along, 0) / tl.where(norm == 0, 1.0, size)
        out_row = row_of(out_image, block, r)
        for i in tl.static_range(PARTS):
            tile = channels(row, i * COLUMNS, D, COLUMNS)
            u = whole[i]
            if NORMALIZE:
                u -= inner[None, :] * tile.to(ACC)
            u = tl.where(valid[None, :], u * outer[None, :], 0.0)
            store_channels(out_row, i * COLUMNS, u.to(tile.dtype), D, COLUMNS)
