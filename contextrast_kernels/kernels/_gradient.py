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
from contextrast_kernels.kernels._tile_table import tiles
from contextrast_kernels.kernels._tiles import (
    FLOAT32_DOT,
    anchor_products,
    block_of,
    channels,
    class_rows,
    dot_float64,
    image_codes,
    image_features,
    inverse_norm,
    is_finite,
    is_negative,
    layer_of,
    pick,
    real,
    sigmoid,
    size_term,
    table_rows,
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
        constants |= tiles("_features_bwd", features[0].dtype, D)
        _launch.sweep(_features_bwd, features, arguments, constants, out=out)
    else:
        arguments |= terms._asdict()
        arguments.pop("similarity")
        constants |= tiles("_features_bwd_dense", features[0].dtype, D, "K", "COLUMNS", "CLASSES")
        _launch.sweep(_features_bwd_dense, features, arguments, constants, out=out)
    return out


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
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """dx of one block where a pixel is a negative of one class at most.

    Recomputed: the norm, s_y. Read: s_e, one number a pixel. Rows of â and T are gathered, they stay in cache.
    Moves: the features once, dx once, 6 bytes a pixel.
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
    g = 1.0
    if gradient is not None:
        g = tl.load(gradient).to(ACC)
    if pull is not None:
        pull += number * N * D
    if table is not None:
        table += number * N * D
        inverse_temperature = (1.0 / real(temperature)).to(ACC)
        toward = coefficients + 2 * number * N
        away = toward + N

    for r in range(r0, tl.minimum(r0 + ROWS, h)):
        row = image + tl.cast(r, tl.int64) * sH
        pixel = codes + (r * w + c)
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
            share = sigmoid(
                tl.load(Z + number * N + label, mask=valid, other=0.0) - product * norm * inverse_temperature
            )
            own = tl.where(valid, tl.load(toward + label, mask=valid, other=0.0) * share, 0.0)
            along += own * product
            negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)
            is_hard = negative < N
            some_hard = tl.max(is_hard.to(tl.int32), 0) > 0
            if some_hard:
                s = tl.load(similarity + pixel, mask=is_hard, other=0.0)
                weight = tl.load(away + negative, mask=is_hard, other=0.0)
                hard = weight * tl.exp(s - tl.load(Z + number * N + negative, mask=is_hard, other=0.0))
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
