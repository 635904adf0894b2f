"""The pixel-anchor loss (Eqs. 3-4) of all layers, in two steps between which ranks may reduce.

    s_np = â^n · v_p / τ        Z_n = log Σ_{p negative of n} exp(s_np)        σ_p = sigmoid(Z_y - s_yp)
    L = 1/|C| Σ_n 1/c_n Σ_{p∈P^n} softplus(Z_n - s_np)

``log_sums`` finds Z. ``moments`` sweeps once more and yields the loss and dL/dâ together, since the upstream
gradient is a scalar that can wait:

    dL/dâ^n = 1/(|C| τ) ( -A⁺_n / c_n + G_n A⁻_n )
    A⁺_n = Σ_{p∈P^n} σ_p v_p        A⁻_n = Σ_{p negative} exp(s_np - Z_n) v_p

with G_n the mean of σ over P^n. G_n is known only after the sweep, so A⁺ and A⁻ are summed apart. ``finish`` puts
the pieces together for each class.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._codes import Codes, codes
from contextrast_kernels.kernels._gradient import Terms, feature_gradients
from contextrast_kernels.kernels._log_sums import log_sums
from contextrast_kernels.kernels._sums import Sums, zeros
from contextrast_kernels.kernels._tile_table import copied_tiles, next_power_of_2, tiles
from contextrast_kernels.kernels._tiles import (
    add_fixed,
    anchor_products,
    block_classes,
    block_norms,
    block_of,
    channels,
    chosen,
    class_pieces,
    dot_features,
    exponent_above,
    image_codes,
    image_features,
    inverse_norm,
    is_finite,
    is_negative,
    layer_of,
    pick,
    piece_products,
    plain,
    power_of_two,
    program_and_part,
    pulled_scale,
    pushed_scale,
    real,
    row_pieces,
    side_by_side,
    sigmoid,
    softplus,
    steps_again,
    summed_size,
    two_pieces,
    zero_tiles,
)
from contextrast_kernels.kernels.anchors import largest_features


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
    """(layers, N): ‖â‖, as it was before it was normalised if it was."""
    reach: Tensor | None
    temperature: float
    headroom: int

    def arguments(self) -> dict:
        return self._asdict() | {"temperature": _launch.float64_bits(self.temperature)}


def forward(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    negatives: Tensor | None,
    base: Tensor | None,
    temperature: float,
    ignore_index: int,
    normalize: bool,
    volume: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Terms]:
    """The loss, dL/danchors, the label codes, and what ``backward`` needs besides. Without negatives and base every
    other-class pixel is one."""
    sums = zeros([features], anchors.shape[0], normalize, anchors=False, loss=True)
    code = codes(
        [features],
        labels,
        anchors.shape[0],
        ignore_index,
        sums,
        negatives=None if negatives is None else [negatives],
        base=None if base is None else [base],
        base_rate=1.0 if negatives is None and base is None else 0.0,
        volumes=volume,
    )
    table, lengths = given_table(anchors, sums.counts, _launch.accumulator(features.dtype))
    if not normalize:
        largest_features([features], code, sums)
    Z, similarity = log_sums([features], code, sums, table, temperature, normalize)
    scales = Scales(lengths, sums.reach, temperature, _launch.headroom(_launch.pixels((features.shape,))))
    moments([features], code, sums, table, Z, similarity, scales)
    outcome = finish(sums, table, Z, scales, (1.0,))
    terms = Terms(code.e, code.base, similarity, table, Z, outcome.coefficients)
    return outcome.loss, outcome.pull[0], code.y, terms


def backward(
    gradient: Tensor, features: Tensor, y: Tensor, terms: Terms, temperature: float, normalize: bool
) -> Tensor:
    """dL/dx of the features."""
    (dx,) = feature_gradients(
        [features], y, terms.table.shape[1], normalize, terms=terms, temperature=temperature, gradient=gradient
    )
    return dx


def given_table(anchors: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Given anchors as a table (1, N, D): rows of classes without pixels become zero, as they are in no term; and
    ‖â‖ (1, N)."""
    N, D = anchors.shape
    table = torch.empty(1, N, D, dtype=dtype, device=anchors.device)
    lengths = torch.empty(1, N, dtype=dtype, device=anchors.device)
    _launch.launch(
        _given_table,
        (N,),
        {
            "anchors": anchors,
            "strides": _launch.encode_ints(anchors.stride()),
            "counts": counts,
            "table": table,
            "lengths": lengths,
        },
        {"D": D, "BLOCK": next_power_of_2(D), **_launch.UNFUSED},
    )
    return table, lengths


def moments(
    features: Sequence[Tensor],
    code: Codes,
    sums: Sums,
    table: Tensor,
    Z: Tensor,
    similarity: Tensor | None,
    scales: Scales,
    chained: bool = False,
    norms: Tensor | None = None,
) -> None:
    """``sums.pulled``, ``pushed`` and ``terms``: what the loss and dL/dâ are made of. One read of the features.

    chained: A⁺ and A⁻ to 16 bits are enough (``_tiles.dot_features``). norms: 1/‖x‖ as ``class_sums`` kept it, for
    layers whose rows can be copied."""
    N, D = table.shape[1:]
    shared = (
        {"y": code.y, "e": code.e, "similarity": similarity, "table": table, "Z": Z}
        | {"pulled_sums": sums.pulled, "pushed_sums": sums.pushed, "counts": sums.counts, "terms": sums.terms}
        | {**scales.arguments(), "N": N}
    )
    copied = None
    if norms is not None:
        arguments = {**shared, "norms": norms}
        del arguments["reach"]
        copied = _pixel_anchor_copied_fwd, arguments, {**copied_tiles(), "BINS": next_power_of_2(N)}
    taken = tiles("_pixel_anchor_fwd", features[0].dtype, D, "K", "COLUMNS", "CLASSES")
    _launch.sweep(
        _pixel_anchor_fwd,
        features,
        {**shared, "base": code.base},
        {
            **taken,
            "BINS": next_power_of_2(N),
            "NORMALIZE": scales.reach is None,
            "ACC": _launch.triton_type(table.dtype),
            "CHAINED": chained,
        },
        splits=_launch.ceil_div(D, taken["COLUMNS"]),
        copied=copied,
    )


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
    """Loss and dL/dâ from the sums of all ranks' pixels; with ``fusion_weight`` on to T, the pull on each class's
    pixels."""
    L, N, D = table.shape
    device = table.device
    losses = torch.empty(L, dtype=table.dtype, device=device)
    loss = torch.empty((), dtype=table.dtype, device=device)
    report = torch.empty(3, L, dtype=torch.int64, device=device)
    coefficients = torch.empty(L, 2, N, dtype=table.dtype, device=device)
    pull = torch.empty_like(table)
    _launch.launch(
        _finish,
        (N,),
        {"pulled_sums": sums.pulled, "pushed_sums": sums.pushed, "terms": sums.terms, "counts": sums.counts}
        | {"drawn": sums.drawn, "table": table, "Z": Z, **scales.arguments()}
        | {"loss": loss, "losses": losses, "report": report, "coefficients": coefficients, "pull": pull}
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
            "NORMALIZE": scales.reach is None,
            "NORMALIZE_ANCHORS": normalize_anchors,
            "GIVEN": fusion_weight is None,
            **_launch.UNFUSED,
        },
    )
    return Outcome(loss, losses, report, coefficients, pull)


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _given_table(anchors, strides, counts, table, lengths, D: tl.constexpr, BLOCK: tl.constexpr):
    """One program, one class: a row of any strides and dtype into the table, and its length."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    anchor = tl.load(anchors + tl.cast(n, tl.int64) * plain(strides[0]) + d * plain(strides[1]), mask=d < D, other=0.0)
    anchor = tl.where(tl.load(counts + n) > 0, anchor.to(table.dtype.element_ty), 0.0)
    tl.store(table + n * D + d, anchor, mask=d < D)
    tl.store(lengths + n, tl.sqrt(tl.sum(anchor * anchor, 0)))


@triton.jit
def term_scale(Z, length, reach, layer, inverse_temperature, headroom, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """The fixed-point scale of Σ softplus(Z_n - s_np), whose terms are below |Z| + ‖â‖ max‖v‖ / τ + 1, and whether
    there is one: not where Z or â is not finite or an s may overflow."""
    longest = 1.0
    if not NORMALIZE:
        longest = tl.load(reach + layer) * (D * 1.0)
    # An anchor that was normalised is longer than the ``length`` that it had.
    longest *= tl.maximum(length, 1.0)
    bound = tl.where(-float("inf") == Z, 0.0, tl.abs(Z)) + longest * inverse_temperature + 1.0
    known = bound < 2.0**60
    return power_of_two(headroom - exponent_above(tl.where(known, bound, 1.0))), known


@triton.jit(do_not_specialize=["temperature", "headroom", "N"])
def _pixel_anchor_fwd(
    x,
    strides,
    geometry,
    y,
    e,
    base,
    similarity,
    table,
    Z,
    pulled_sums,
    pushed_sums,
    counts,
    terms,
    lengths,
    reach,
    temperature,
    headroom,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    CLASSES: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Over one block: A⁺, A⁻ (COLUMNS of the channels), Σ softplus(Z - s) and Σ σ of the classes found there, CLASSES
    at a time; with ``base`` of all classes.

    A row of the block is read from memory for its norms, and from cache for two products on the tensor cores: the
    rows of the label classes with x give s, the weights σ and exp(s - Z) with xᵀ give A⁺ and A⁻. x meets them as it
    came; 1/‖x‖ is in the weights.
    Moves: the features once, 6 bytes a pixel, 16 D bytes into the sums for each class of a block.
    """
    program, part = program_and_part(D, COLUMNS)
    d0 = part * COLUMNS
    layer = layer_of(program, geometry.block)
    number = pick(geometry.number, layer)
    b, r0, c0, h, w = block_of(program, geometry, layer, ROWS, P, UNIT, ALIGN)
    image, sH, sW, sD = image_features(x, strides, layer, b, UNIT, ALIGN, WIDE)
    codes = image_codes(geometry, layer, b, h, w)
    table += number * N * D
    Z += number * N
    terms += 3 * number * N
    inverse_temperature = (1.0 / real(temperature)).to(ACC)
    c = c0 + tl.arange(0, P)
    live = c < w

    rank0 = 0
    rounds = 1
    while rank0 < rounds:
        if base is None:
            labels, label_count = block_classes(y + codes, None, r0, h, c, w, rank0, N, ROWS, P, BINS, CLASSES)
            others, other_count = block_classes(e + codes, None, r0, h, c, w, rank0, N, ROWS, P, BINS, CLASSES)
            rounds = tl.maximum(label_count, other_count)
        else:
            labels = rank0 + tl.arange(0, CLASSES)
            labels = tl.where(labels < N, labels, -1)
            others = labels
            rounds = N
        pulled = zero_tiles(COLUMNS // K, CLASSES, K, ACC)
        pushed = zero_tiles(COLUMNS // K, CLASSES, K, ACC)
        losses = tl.zeros((CLASSES,), ACC)
        shares = tl.zeros((CLASSES,), ACC)
        for r in range(r0, tl.minimum(r0 + ROWS, h)):
            row = image + tl.cast(r, tl.int64) * sH
            pixel = codes + (r * w + c)
            label = tl.load(y + pixel, mask=live, other=32767).to(tl.int32)
            negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)

            # 1. Norms, and products with the anchors of the label classes. A vector that is not finite is taken out
            # and its class marked: 0 · NaN would reach every class.
            size = summed_size(row, c * sW, live, sD, D, P, CHUNK, NORMALIZE, ACC)
            norm = inverse_norm(size, NORMALIZE)
            products = anchor_products(row, c * sW, live, sD, table, labels, D, P, K, ACC)
            sound = is_finite(size)
            some_broken = tl.min(sound.to(tl.int32), 0) == 0
            if some_broken:
                broken = live & (label < N) & (sound == 0)
                tl.atomic_max(terms + 2 * N + label, tl.full((P,), 1, tl.int64), mask=broken, sem="relaxed")
            own = (labels[:, None] == label[None, :]) & sound[None, :]

            # 2. Positives: each pixel has one class, so s, σ and the term are one number a pixel.
            s = tl.sum(tl.where(own, products, 0.0), 0) * norm * inverse_temperature
            apart = tl.load(Z + label, mask=label < N, other=0.0) - s
            share = sigmoid(apart)
            losses += tl.sum(tl.where(own, softplus(apart)[None, :], 0.0), 1)
            shares += tl.sum(tl.where(own, share[None, :], 0.0), 1)
            pull = tl.where(own, (share * norm)[None, :], 0.0)

            # 3. Negatives.
            if base is None:
                is_hard = negative < N
                hard = tl.load(similarity + pixel, mask=is_hard, other=0.0)
                hard = tl.exp(hard - tl.load(Z + negative, mask=is_hard, other=0.0)) * norm
                push = tl.where((others[:, None] == negative[None, :]) & sound[None, :], hard[None, :], 0.0)
            else:
                against = is_negative(others, label, negative, tl.load(base + pixel, mask=live, other=0) != 0)
                log_sum = tl.load(Z + others, mask=others >= 0, other=0.0)
                push = tl.exp(products * (norm * inverse_temperature)[None, :] - log_sum[:, None]) * norm[None, :]
                push = tl.where(against & sound[None, :], push, 0.0)

            # 4. Weighted sums of the embeddings.
            more_pulled = ()
            more_pushed = ()
            for k in tl.static_range(COLUMNS // K):
                tile = channels(row, c * sW, live, d0 + k * K, sD, D, K, D % COLUMNS == 0)
                if some_broken:
                    tile = tl.where(sound[None, :], tile, 0.0)
                more_pulled = more_pulled + (dot_features(pull, tl.trans(tile), pulled[k], CHAINED=CHAINED),)  # noqa: RUF005
                more_pushed = more_pushed + (dot_features(push, tl.trans(tile), pushed[k], CHAINED=CHAINED),)  # noqa: RUF005
            pulled = more_pulled
            pushed = more_pushed

        count = tl.load(counts + number * N + labels, mask=labels >= 0, other=1)
        scale = pulled_scale(reach, number, count, NORMALIZE)[:, None]
        for k in tl.static_range(COLUMNS // K):
            d = d0 + k * K + tl.arange(0, K)
            here = pulled_sums + (number * N + labels[:, None]) * D + d[None, :]
            add_fixed(here, pulled[k], scale, (labels >= 0)[:, None] & (d < D)[None, :])
        scale = pushed_scale(reach, number, NORMALIZE)
        for k in tl.static_range(COLUMNS // K):
            d = d0 + k * K + tl.arange(0, K)
            here = pushed_sums + (number * N + others[:, None]) * D + d[None, :]
            add_fixed(here, pushed[k], scale, (others >= 0)[:, None] & (d < D)[None, :])
        if part == 0:
            used = labels >= 0
            length = tl.load(lengths + number * N + labels, mask=used, other=0.0)
            log_sum = tl.load(Z + labels, mask=used, other=0.0)
            scale_of_terms, known = term_scale(
                log_sum, length, reach, number, inverse_temperature, headroom, D, NORMALIZE
            )
            known = known & (tl.abs(losses) < float("inf"))
            add_fixed(terms + labels, losses, scale_of_terms, used & known)
            add_fixed(terms + N + labels, shares, power_of_two(headroom), used & known)
            mark = tl.full((CLASSES,), 1, tl.int64)
            tl.atomic_max(terms + 2 * N + labels, mark, mask=used & (known == 0), sem="relaxed")
        rank0 += CLASSES


@triton.jit
def _sums_of_copied_rows(
    image,
    sH,
    sW,
    sD,
    y,
    e,
    similarity,
    norms,
    broken,
    table,
    slots,
    Z,
    r0,
    h,
    c,
    w,
    N,
    inverse_temperature,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """[A⁺ | A⁻] (D, 32) in tiles of C channels, and Σ softplus and Σ σ as (P, 16), of 16 classes of a block.

    AHEAD: all vectors are finite, and rows are copied to shared memory, one ahead, where they stay for both products;
    else they are read again, from cache, and the anchors' pieces are made again."""
    live = c < w
    if AHEAD:
        anchors = row_pieces(table, slots, D, C)
    sums = zero_tiles(D // C, C, 32, tl.float32)
    losses = tl.zeros((P, 16), tl.float32)
    shares = tl.zeros((P, 16), tl.float32)
    for r in tl.range(r0, tl.minimum(r0 + ROWS, h), num_stages=3 if AHEAD else 1):
        row = image + tl.cast(r, tl.int64) * sH
        pixel = r * w + c
        label = tl.load(y + pixel, mask=live, other=32767).to(tl.int32)
        negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)
        norm = tl.load(norms + pixel, mask=live, other=0.0)
        readable = live
        if not AHEAD:
            # 0 · NaN would reach every class of the block: such a vector is not read, and its class marked.
            readable = live & (norm == norm)
            lost = live & (label < N) & (norm != norm)
            tl.atomic_max(broken + label, tl.full((P,), 1, tl.int64), mask=lost, sem="relaxed")
            label = tl.where(readable, label, 32767)
            negative = tl.where(readable, negative, 32767)
            norm = tl.where(readable, norm, 0.0)
        step_w, step_d = steps_again(sW, sD, r, UNIT, ALIGN)
        products = tl.zeros((P, 16), tl.float32)
        if AHEAD:
            tiles = ()
            for i in tl.static_range(D // C):
                tiles = tiles + (channels(row, c * step_w, readable, i * C, step_d, D, C),)  # noqa: RUF005
            for i in tl.static_range(D // C):
                products = piece_products(tiles[i], anchors[i], products)
        else:
            for k in range(0, D, C):
                tile = channels(row, c * step_w, readable, k, step_d, D, C)
                products = piece_products(tile, class_pieces(table, slots, k, D, C), products)
        own = slots[None, :] == label[:, None]
        against = slots[None, :] == negative[:, None]

        # Positives: each pixel has one class, so s, σ and the term are one number a pixel.
        s = tl.sum(tl.where(own, products, 0.0), 1) * norm * inverse_temperature
        apart = tl.load(Z + label, mask=label < N, other=0.0) - s
        share = sigmoid(apart)
        losses += chosen(own, softplus(apart))
        shares += chosen(own, share)

        # Negatives.
        is_hard = negative < N
        hard = tl.load(similarity + pixel, mask=is_hard, other=0.0)
        hard = tl.exp(hard - tl.load(Z + negative, mask=is_hard, other=0.0)) * norm

        # Weighted sums of the embeddings.
        pull, pull_low = two_pieces(share * norm)
        push, push_low = two_pieces(hard)
        high = side_by_side(chosen(own, pull), chosen(against, push))
        low = side_by_side(chosen(own, pull_low), chosen(against, push_low))
        weights = side_by_side(high, low)
        grown = ()
        for i in tl.static_range(D // C):
            tile = tiles[i] if AHEAD else channels(row, c * step_w, readable, i * C, step_d, D, C)
            grown = grown + (sums[i] + tl.sum(tl.reshape(tl.dot(tile, weights), (C, 2, 32)), 1),)  # noqa: RUF005
        sums = grown
    return sums, losses, shares


@triton.jit
def _add_copied_sums(
    sums,
    losses,
    shares,
    slots,
    pulled_sums,
    pushed_sums,
    counts,
    terms,
    lengths,
    Z,
    inverse_temperature,
    headroom,
    N,
    D: tl.constexpr,
    C: tl.constexpr,
):
    """Adds what ``_sums_of_copied_rows`` found; the pointers are those of the layer."""
    used = slots >= 0
    count = tl.load(counts + slots, mask=used, other=1)
    pulled_by = pulled_scale(None, 0, count, True)
    pushed_by = pushed_scale(None, 0, True)
    for i in tl.static_range(D // C):
        pulled, pushed = tl.split(tl.permute(tl.reshape(sums[i], (C, 2, 16)), (0, 2, 1)))
        d = i * C + tl.arange(0, C)
        here = slots[None, :] * D + d[:, None]
        # A class may be here as a label or as a negative alone.
        add_fixed(pulled_sums + here, pulled, pulled_by[None, :], used[None, :] & (pulled != 0.0))
        add_fixed(pushed_sums + here, pushed, pushed_by, used[None, :] & (pushed != 0.0))
    length = tl.load(lengths + slots, mask=used, other=0.0)
    log_sum = tl.load(Z + slots, mask=used, other=0.0)
    scale_of_terms, known = term_scale(log_sum, length, None, 0, inverse_temperature, headroom, D, True)
    loss = tl.sum(losses, 0)
    known = known & (tl.abs(loss) < float("inf"))
    add_fixed(terms + slots, loss, scale_of_terms, used & known)
    add_fixed(terms + N + slots, tl.sum(shares, 0), power_of_two(headroom), used & known)
    mark = tl.full((16,), 1, tl.int64)
    tl.atomic_max(terms + 2 * N + slots, mark, mask=used & (known == 0), sem="relaxed")


@triton.jit(do_not_specialize=["temperature", "headroom", "N"])
def _pixel_anchor_copied_fwd(
    x,
    strides,
    geometry,
    y,
    e,
    similarity,
    norms,
    table,
    Z,
    pulled_sums,
    pushed_sums,
    counts,
    terms,
    lengths,
    temperature,
    headroom,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    BINS: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """``_pixel_anchor_fwd`` of bfloat16 that is normalised, with hard negatives alone, where rows can be copied.

    A row of 64 pixels comes to shared memory once, for both products: xᵀ (P, D) · [three pieces of â] (D, 48) gives s,
    x (D, P) · [pull | push] (P, 32) the sums, whose weights have two pieces. One list of classes serves labels and
    negatives. A block with more classes than 16, or with a vector that is not finite, goes a slower way.
    Moves: the features once, 10 bytes a pixel, 16 D bytes into the sums for each class of a block.
    """
    C: tl.constexpr = 64  # channels of a product: see ``piece_products``
    program = tl.program_id(0)
    layer = layer_of(program, geometry.block)
    number = pick(geometry.number, layer)
    b, r0, c0, h, w = block_of(program, geometry, layer, ROWS, P, UNIT, ALIGN)
    image, sH, sW, sD = image_features(x, strides, layer, b, UNIT, ALIGN, WIDE)
    codes = image_codes(geometry, layer, b, h, w)
    y += codes
    e += codes
    similarity += codes
    norms += codes
    table += number * N * D
    Z += number * N
    pulled_sums += number * N * D
    pushed_sums += number * N * D
    counts += number * N
    lengths += number * N
    terms += 3 * number * N
    broken = terms + 2 * N
    inverse_temperature = (1.0 / real(temperature)).to(tl.float32)
    c = c0 + tl.arange(0, P)

    slots, classes = block_classes(y, e, r0, h, c, w, 0, N, ROWS, P, BINS, 16)
    if (classes <= 16) & block_norms(norms, r0, h, c, w, ROWS):
        sums, losses, shares = _sums_of_copied_rows(
            image,
            sH,
            sW,
            sD,
            y,
            e,
            similarity,
            norms,
            broken,
            table,
            slots,
            Z,
            r0,
            h,
            c,
            w,
            N,
            inverse_temperature,
            D,
            ROWS,
            P,
            C,
            UNIT,
            ALIGN,
            AHEAD=True,
        )
        _add_copied_sums(
            sums,
            losses,
            shares,
            slots,
            pulled_sums,
            pushed_sums,
            counts,
            terms,
            lengths,
            Z,
            inverse_temperature,
            headroom,
            N,
            D,
            C,
        )
    else:
        for rank0 in range(0, classes, 16):
            slots, _ = block_classes(y, e, r0, h, c, w, rank0, N, ROWS, P, BINS, 16)
            sums, losses, shares = _sums_of_copied_rows(
                image,
                sH,
                sW,
                sD,
                y,
                e,
                similarity,
                norms,
                broken,
                table,
                slots,
                Z,
                r0,
                h,
                c,
                w,
                N,
                inverse_temperature,
                D,
                ROWS,
                P,
                C,
                UNIT,
                ALIGN,
                AHEAD=False,
            )
            _add_copied_sums(
                sums,
                losses,
                shares,
                slots,
                pulled_sums,
                pushed_sums,
                counts,
                terms,
                lengths,
                Z,
                inverse_temperature,
                headroom,
                N,
                D,
                C,
            )


@triton.jit
def _dL_dfused(
    pulled_sums,
    pushed_sums,
    terms,
    counts,
    reach,
    temperature,
    headroom,
    layer_weight,
    layer,
    n,
    d,
    N,
    D: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """dL/dâ of one class of a layer, its k⁺, k⁻ and its pixel count; in float64."""
    every = tl.arange(0, BINS)
    all_counts = tl.load(counts + layer * N + every, mask=every < N, other=0)
    present = tl.maximum(tl.sum((all_counts > 0).to(tl.int32), 0), 1).to(tl.float64)
    count = tl.load(counts + layer * N + n)
    pixels = tl.maximum(count, 1).to(tl.float64)
    share = tl.load(terms + (3 * layer + 1) * N + n).to(tl.float64) / power_of_two(headroom) / pixels  # G
    pulled = tl.load(pulled_sums + (layer * N + n) * D + d, mask=d < D, other=0)
    pushed = tl.load(pushed_sums + (layer * N + n) * D + d, mask=d < D, other=0)
    pulled = pulled.to(tl.float64) / pulled_scale(reach, layer, count, NORMALIZE)
    pushed = pushed.to(tl.float64) / pushed_scale(reach, layer, NORMALIZE)
    strength = tl.where(count > 0, real(layer_weight) / (present * real(temperature)), 0.0)
    slope = strength * (share * pushed - pulled / pixels)
    slope = tl.where(tl.load(terms + (3 * layer + 2) * N + n) > 0, float("nan"), slope)
    return tl.where(count > 0, slope, 0.0), -strength / pixels, strength * share, count


@triton.jit(do_not_specialize=["temperature", "headroom", "layer_weights", "fusion_weight", "N"])
def _finish(
    pulled_sums,
    pushed_sums,
    terms,
    counts,
    drawn,
    table,
    Z,
    lengths,
    reach,
    temperature,
    headroom,
    loss,
    losses,
    report,
    coefficients,
    pull,
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
    """One program, one class: dL/dâ of all layers, back through normalisation and fusion to dL/da, divided by the
    count. The first program also adds up the loss."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    w_h = real(fusion_weight)
    top_count = tl.load(counts + (L - 1) * N + n)
    from_below = tl.zeros((BLOCK,), tl.float64)
    for i in tl.static_range(L):
        slope, toward, away, count = _dL_dfused(
            pulled_sums,
            pushed_sums,
            terms,
            counts,
            reach,
            temperature,
            headroom,
            layer_weights[i],
            i,
            n,
            d,
            N,
            D,
            BINS,
            NORMALIZE,
        )
        tl.store(coefficients + 2 * i * N + n, toward.to(coefficients.dtype.element_ty))
        tl.store(coefficients + (2 * i + 1) * N + n, away.to(coefficients.dtype.element_ty))
        if NORMALIZE_ANCHORS:
            # â = a/‖a‖: dL/da = (dL/dâ - â ⟨â, dL/dâ⟩) / ‖a‖.
            unit = tl.load(table + (i * N + n) * D + d, mask=d < D, other=0.0).to(tl.float64)
            own_length = tl.load(lengths + i * N + n).to(tl.float64)
            slope = (slope - unit * tl.sum(unit * slope, 0)) * inverse_norm(own_length * own_length, True)
        if not GIVEN:
            if i < L - 1:
                from_below += tl.where((top_count > 0) & (count > 0), w_h * slope, 0.0)
                slope = tl.where(top_count > 0, (1 - w_h) * slope, slope)
            else:
                slope += from_below
            slope = slope / tl.maximum(count, 1).to(tl.float64)
        tl.store(pull + (i * N + n) * D + d, slope.to(pull.dtype.element_ty), mask=d < D)
    if n == 0:
        every = tl.arange(0, BINS)
        exists = every < N
        total_loss = tl.zeros((), tl.float64)
        for i in tl.static_range(L):
            pixels = tl.load(counts + i * N + every, mask=exists, other=0)
            present = tl.sum((pixels > 0).to(tl.int64), 0)
            inverse_temperature = (1.0 / real(temperature)).to(Z.dtype.element_ty)
            log_sum = tl.load(Z + i * N + every, mask=exists, other=0.0)
            length = tl.load(lengths + i * N + every, mask=exists, other=0.0)
            scale, _ = term_scale(log_sum, length, reach, i, inverse_temperature, headroom, D, NORMALIZE)
            sums = tl.load(terms + 3 * i * N + every, mask=exists, other=0).to(tl.float64)
            mean = tl.where(pixels > 0, sums / scale / tl.maximum(pixels, 1).to(tl.float64), 0.0)
            broken = tl.load(terms + (3 * i + 2) * N + every, mask=exists, other=0) > 0
            layer_loss = tl.sum(mean, 0) / tl.maximum(present, 1).to(tl.float64)
            layer_loss = tl.where(tl.max((broken & (pixels > 0)).to(tl.int32), 0) > 0, float("nan"), layer_loss)
            total_loss += real(layer_weights[i]) * layer_loss
            tl.store(losses + i, layer_loss.to(losses.dtype.element_ty))
            tl.store(report + i, present)
            tl.store(report + L + i, tl.sum(pixels, 0))
            tl.store(report + 2 * L + i, tl.load(drawn + i))
        tl.store(loss, total_loss.to(loss.dtype.element_ty))
