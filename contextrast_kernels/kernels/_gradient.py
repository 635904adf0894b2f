"""dL/dx: the one sweep that writes, for positives, negatives and the anchors' own path at once.

With u_p the gradient of the loss by the embedding v_p = r_p x_p,

    u_p = k⁺_y σ_p â_y  +  k⁻_e exp(s_ep - Z_e) â_e  +  T_y,        dx_p = g r_p (u_p - v_p ⟨v_p, u_p⟩)

    σ_p = sigmoid(Z_y - s_yp), the positive's share        k⁺_n = -λ / (|C| c_n τ)
    G_n = mean of σ over the positives of n                k⁻_n = λ G_n / (|C| τ)
    T_n = (dL/da^n) / c_n, the pull through the anchor     g = the upstream gradient, read from memory

⟨v, u⟩ is a sum of products with rows of â and T, so u is never held: the row is read for the products, and again,
from cache, to be written.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._tile_table import copied_tiles, copies_rows, next_power_of_2, tiles
from contextrast_kernels.kernels._tiles import (
    FLOAT32_DOT,
    anchor_products,
    block_classes,
    block_of,
    channels,
    class_rows,
    dot_float64,
    image_codes,
    image_features,
    inverse_norm,
    is_finite,
    is_negative,
    joined,
    layer_of,
    pick,
    real,
    sigmoid,
    size_term,
    stacked,
    steps_again,
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
    """dL/dx of every layer. ``pull``: T (layers, N, D); ``terms``: the loss's own; ``gradient``: g, a scalar."""
    out = [torch.empty_like(x) for x in features]
    D = features[0].shape[1]
    acc = _launch.accumulator(features[0].dtype)
    arguments = {
        "y": y,
        "pull": pull,
        "gradient": gradient,
        "temperature": _launch.float64_bits(temperature),
        "N": num_classes,
    }
    constants = {"NORMALIZE": normalize, "ACC": _launch.triton_type(acc)}
    if terms is None or terms.base is None:
        arguments |= terms._asdict() if terms is not None else dict.fromkeys(Terms._fields)
        arguments.pop("base")
        constants |= {**tiles("_features_bwd", features[0].dtype, D), "BINS": next_power_of_2(num_classes)}
        copied = None
        if normalize and copies_rows(features[0].dtype, D):
            copied = _features_bwd, arguments, {**constants, **copied_tiles(), "COPIED": True}
        _launch.sweep(_features_bwd, features, arguments, {**constants, "COPIED": False}, out=out, copied=copied)
    else:
        arguments |= terms._asdict()
        arguments.pop("similarity")
        constants |= tiles("_features_bwd_dense", features[0].dtype, D, "K", "COLUMNS", "CLASSES")
        _launch.sweep(_features_bwd_dense, features, arguments, constants, out=out)
    return out


@triton.jit
def _write_copied_rows(
    image,
    sH,
    sW,
    sD,
    out_image,
    oH,
    oW,
    oD,
    y,
    e,
    similarity,
    table,
    pull,
    slots,
    Z,
    coefficients,
    g,
    inverse_temperature,
    r0,
    h,
    c,
    w,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
):
    """dx of a block of normalised bfloat16 features with at most 16 classes. Returns whether a vector of the block or a
    row of a table is not finite: then 0 · NaN is in dx, and the block has to be written again.

    A row of 64 pixels comes to shared memory once. Its product with the rows of â and T of the block's classes,
    xᵀ (P, D) · Rᵀ (D, 64), gives ⟨x, â⟩ and ⟨x, T⟩; W (P, 64) · R (64, C) gives r g u, where W holds a pixel's weights
    in the columns of its classes. Nothing is gathered. R and W are in two pieces of bfloat16.

    ⟨x, u⟩ is made of the same R and W, without what their two pieces leave out: dx stays orthogonal to x, to float32's
    precision, however small it is beside u.
    """
    C: tl.constexpr = min(D, 128)  # channels of dx that are held in registers
    live = c < w
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

    for r in tl.range(r0, tl.minimum(r0 + ROWS, h), num_stages=3):
        row = image + tl.cast(r, tl.int64) * sH
        pixel = r * w + c
        label = tl.load(y + pixel, mask=live, other=32767).to(tl.int32)
        valid = label < N
        step_w, step_d = steps_again(sW, sD, r, UNIT, ALIGN)

        # 1. ‖x‖² and the products of x with the rows of the block's classes.
        tiles = ()
        for i in tl.static_range(D // C):
            tiles = tiles + (channels(row, c * step_w, live, i * C, step_d, D, C),)  # noqa: RUF005
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
            negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)
            is_hard = negative < N
            against = anchor_classes == negative[:, None]
            s = tl.load(similarity + pixel, mask=is_hard, other=0.0)
            hard = tl.exp(s - tl.load(Z + negative, mask=is_hard, other=0.0))
            hard *= tl.load(coefficients + N + negative, mask=is_hard, other=0.0) * outer
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
        out_row = out_image + tl.cast(r, tl.int64) * oH
        out_w, out_d = steps_again(oW, oD, r, OUT_UNIT, OUT_ALIGN)
        for i in tl.static_range(D // C):
            u = tl.dot(W_high, R[i], tl.dot(W_low, R[i]))
            # As one fma, x changes its layout as bfloat16, not as a float32 product.
            x = tl.trans(tiles[i]).to(tl.float32)
            u = tl.fma(x, tl.broadcast_to(inner[:, None], (P, C)), u)
            d = i * C + tl.arange(0, C)
            tl.store(out_row + (d[None, :] * out_d + (c * out_w)[:, None]), u.to(tl.bfloat16), mask=live[:, None])
    return (broken + tl.max((spoilt_pixel != spoilt_pixel).to(tl.int32), 0)) > 0


@triton.jit(do_not_specialize=["temperature", "N"])
def _features_bwd(
    x,
    strides,
    out,
    out_strides,
    geometry,
    y,
    e,
    similarity,
    table,
    pull,
    Z,
    coefficients,
    gradient,
    temperature,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COPIED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx of one block where a pixel is a negative of one class at most.

    Recomputed: the norm, s_y. Read: s_e, one number a pixel. Rows of â and T are gathered; they stay in cache.
    COPIED: rows can be copied. ``_write_copied_rows`` then writes the block, unless it has many classes or
    holds something that is not finite.
    Moves: the features once, dx once, 6 bytes a pixel.
    """
    program = tl.program_id(0)
    layer = layer_of(program, geometry.block)
    number = pick(geometry.number, layer)
    b, r0, c0, h, w = block_of(program, geometry, layer, ROWS, P, UNIT, ALIGN)
    image, sH, sW, sD = image_features(x, strides, layer, b, UNIT, ALIGN, WIDE)
    out_image, oH, oW, oD = image_features(out, out_strides, layer, b, OUT_UNIT, OUT_ALIGN, WIDE)
    codes = image_codes(geometry, layer, b, h, w)
    y += codes
    c = c0 + tl.arange(0, P)
    live = c < w
    g = 1.0
    if gradient is not None:
        g = tl.load(gradient).to(ACC)
    if pull is not None:
        pull += number * N * D
    if table is not None:
        e += codes
        similarity += codes
        table += number * N * D
        Z += number * N
        coefficients += 2 * number * N
        inverse_temperature = (1.0 / real(temperature)).to(ACC)
    else:
        inverse_temperature = 1.0

    gathered = True
    if COPIED:
        slots, classes = block_classes(y, e, r0, h, c, w, 0, N, ROWS, P, BINS, 16)
        gathered = classes > 16
        if classes <= 16:
            gathered = _write_copied_rows(
                image,
                sH,
                sW,
                sD,
                out_image,
                oH,
                oW,
                oD,
                y,
                e,
                similarity,
                table,
                pull,
                slots,
                Z,
                coefficients,
                g,
                inverse_temperature,
                r0,
                h,
                c,
                w,
                N,
                D,
                ROWS,
                P,
                UNIT,
                ALIGN,
                OUT_UNIT,
                OUT_ALIGN,
            )
            if gathered:
                tl.debug_barrier()  # what other threads stored is written again
    r1 = r0
    if gathered:
        r1 = tl.minimum(r0 + ROWS, h)

    for r in range(r0, r1):
        row = image + tl.cast(r, tl.int64) * sH
        pixel = r * w + c
        label = tl.load(y + pixel, mask=live, other=32767).to(tl.int32)
        valid = label < N

        # 1. ‖x‖² and the products of x with the rows of its class.
        sizes = tl.zeros((CHUNK, P), ACC)
        to_anchor = tl.zeros((CHUNK, P), ACC)
        to_pull = tl.zeros((CHUNK, P), ACC)
        for k in tl.range(0, D, CHUNK, loop_unroll_factor=8):
            tile = channels(row, c * sW, live, k, sD, D, CHUNK).to(ACC)
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
            negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)
            is_hard = negative < N
            some_hard = tl.max(is_hard.to(tl.int32), 0) > 0
            if some_hard:
                s = tl.load(similarity + pixel, mask=is_hard, other=0.0)
                weight = tl.load(coefficients + N + negative, mask=is_hard, other=0.0)
                hard = weight * tl.exp(s - tl.load(Z + negative, mask=is_hard, other=0.0))
                # ⟨x, â_e⟩ = s τ / r; without direction nothing passes.
                along += hard * s / (inverse_temperature * tl.where(norm == 0, 1.0, norm))

        # 3. dx = g r (u - x r² ⟨x, u⟩). A vector without direction has r = 0.
        outer = tl.where(valid, norm * g, 0.0)
        inner = along * norm * norm
        broken_and_ignored = tl.max(((is_finite(size) == 0) & (valid == 0)).to(tl.int32), 0) > 0
        out_row = out_image + tl.cast(r, tl.int64) * oH
        for k in tl.range(0, D, CHUNK, loop_unroll_factor=4):
            tile = channels(row, c * sW, live, k, sD, D, CHUNK)
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
            d = k + tl.arange(0, CHUNK)
            here = out_row + (d[:, None] * oD + (c * oW)[None, :])
            if D % CHUNK == 0:
                tl.store(here, u.to(tile.dtype), mask=live[None, :])
            else:
                tl.store(here, u.to(tile.dtype), mask=live[None, :] & (d < D)[:, None])


@triton.jit(do_not_specialize=["temperature", "N"])
def _features_bwd_dense(
    x,
    strides,
    out,
    out_strides,
    geometry,
    y,
    e,
    base,
    table,
    pull,
    Z,
    coefficients,
    gradient,
    temperature,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx of one block where a pixel may be a negative of every class but its own: u = Σ_n C_n â_n + T_y, with all
    classes' weights C (CLASSES, P) formed and used a few classes at a time. N x pixels are nowhere stored.

    Moves: the features once, dx once. A row is read for its norms, and from cache for every CLASSES classes and to
    be written.
    """
    program = tl.program_id(0)
    layer = layer_of(program, geometry.block)
    number = pick(geometry.number, layer)
    b, r0, c0, h, w = block_of(program, geometry, layer, ROWS, P, UNIT, ALIGN)
    image, sH, sW, sD = image_features(x, strides, layer, b, UNIT, ALIGN, WIDE)
    out_image, oH, oW, oD = image_features(out, out_strides, layer, b, OUT_UNIT, OUT_ALIGN, WIDE)
    codes = image_codes(geometry, layer, b, h, w)
    c = c0 + tl.arange(0, P)
    live = c < w
    g = tl.load(gradient).to(ACC)
    table += number * N * D
    if pull is not None:
        pull += number * N * D
    inverse_temperature = (1.0 / real(temperature)).to(ACC)
    toward = coefficients + 2 * number * N
    away = toward + N

    for r in range(r0, tl.minimum(r0 + ROWS, h)):
        row = image + tl.cast(r, tl.int64) * sH
        pixel = codes + (r * w + c)
        label = tl.load(y + pixel, mask=live, other=32767).to(tl.int32)
        negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)
        is_base = tl.load(base + pixel, mask=live, other=0) != 0
        valid = label < N
        sizes = tl.zeros((CHUNK, P), ACC)
        to_pull = tl.zeros((CHUNK, P), ACC)
        for k in tl.range(0, D, CHUNK, loop_unroll_factor=8):
            tile = channels(row, c * sW, live, k, sD, D, CHUNK).to(ACC)
            sizes += size_term(tile, NORMALIZE)
            if pull is not None and NORMALIZE:
                to_pull += tile * table_rows(pull, label, valid, k, D, CHUNK)
        norm = inverse_norm(tl.sum(sizes, 0), NORMALIZE)
        along = tl.sum(to_pull, 0)
        gradients = zero_tiles((D + COLUMNS - 1) // COLUMNS, COLUMNS, P, ACC)
        for n0 in range(0, N, CLASSES):
            n = n0 + tl.arange(0, CLASSES)
            classes = tl.where(n < N, n, -1)
            products = anchor_products(row, c * sW, live, sD, table, classes, D, P, K, ACC)
            own = (classes[:, None] == label[None, :]) & valid[None, :]
            against = is_negative(classes, label, negative, is_base)
            log_sum = tl.load(Z + number * N + classes, mask=classes >= 0, other=0.0)[:, None]
            s = products * (norm * inverse_temperature)[None, :]
            pulled = tl.load(toward + classes, mask=classes >= 0, other=0.0)[:, None] * sigmoid(log_sum - s)
            pushed = tl.load(away + classes, mask=classes >= 0, other=0.0)[:, None] * tl.exp(s - log_sum)
            weights = tl.where(own, pulled, 0.0) + tl.where(against, pushed, 0.0)
            along += tl.sum(tl.where(own | against, weights * products, 0.0), 0)
            grown = ()
            for i in tl.static_range((D + COLUMNS - 1) // COLUMNS):
                rows = tl.trans(class_rows(table, classes, i * COLUMNS, D, COLUMNS))
                if tl.float64 == ACC:
                    grown = grown + (dot_float64(rows, weights, gradients[i]),)  # noqa: RUF005
                else:
                    grown = grown + (tl.dot(rows, weights, gradients[i], input_precision=FLOAT32_DOT),)  # noqa: RUF005
            gradients = grown
        outer = tl.where(valid, norm * g, 0.0)
        inner = along * norm * norm
        out_row = out_image + tl.cast(r, tl.int64) * oH
        for i in tl.static_range((D + COLUMNS - 1) // COLUMNS):
            tile = channels(row, c * sW, live, i * COLUMNS, sD, D, COLUMNS)
            u = gradients[i]
            if pull is not None:
                u += table_rows(pull, label, valid, i * COLUMNS, D, COLUMNS)
            if NORMALIZE:
                u -= inner[None, :] * tile.to(ACC)
            u = tl.where(valid[None, :], u * outer[None, :], 0.0)
            d = i * COLUMNS + tl.arange(0, COLUMNS)
            here = out_row + (d[:, None] * oD + (c * oW)[None, :])
            tl.store(here, u.to(tile.dtype), mask=live[None, :] & (d < D)[:, None])
