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
from contextrast_kernels.kernels._tile_table import copied_tiles, next_power_of_2, tiles_of
from contextrast_kernels.kernels._tiles import (
    add_fixed,
    all_finite,
    anchor_products,
    block_classes,
    channels,
    chosen,
    decode_int,
    dot_features,
    exponent_above,
    float64_from_bits,
    inverse_norm,
    is_finite,
    is_negative,
    open_block,
    piece_products,
    power_of_two,
    program_and_part,
    pulled_scale,
    pushed_scale,
    row_again,
    row_codes,
    row_flags,
    row_of,
    row_pieces,
    row_tiles,
    side_by_side,
    sigmoid,
    softplus,
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
    max_abs: Tensor | None
    temperature: float
    scale_exponent: int

    def encoded(self) -> "Scales":
        """The same for a kernel, with the bits of the temperature."""
        return self._replace(temperature=_launch.float64_bits(self.temperature))


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
    scales = Scales(lengths, sums.max_abs, temperature, _launch.scale_exponent(_launch.pixels((features.shape,))))
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
    tiles = tiles_of("_pixel_anchor_fwd", features[0].dtype, D)
    _launch.sweep(
        _pixel_anchor_fwd,
        features,
        {"codes": code, "similarity": similarity, "norms": None, "table": table, "Z": Z, "counts": sums.counts}
        | {"pulled": sums.pulled, "pushed": sums.pushed, "terms": sums.terms, "scales": scales.encoded(), "N": N},
        tiles,
        {
            "BINS": next_power_of_2(N),
            "NORMALIZE": scales.max_abs is None,
            "COPIED": False,
            "CHAINED": chained,
            "ACC": _launch.triton_type(table.dtype),
        },
        splits=_launch.ceil_div(D, tiles.COLUMNS),
        copied=None if norms is None else _launch.Copied(copied_tiles(tiles), {"norms": norms}),
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


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _given_table(anchors, strides, counts, table, lengths, D: tl.constexpr, BLOCK: tl.constexpr):
    """One program, one class: a row of any strides and dtype into the table, and its length."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    anchor = tl.load(
        anchors + tl.cast(n, tl.int64) * decode_int(strides[0]) + d * decode_int(strides[1]), mask=d < D, other=0.0
    )
    anchor = tl.where(tl.load(counts + n) > 0, anchor.to(table.dtype.element_ty), 0.0)
    tl.store(table + n * D + d, anchor, mask=d < D)
    tl.store(lengths + n, tl.sqrt(tl.sum(anchor * anchor, 0)))


@triton.jit
def term_scale(
    Z, length, max_abs, layer, inverse_temperature, scale_exponent, D: tl.constexpr, NORMALIZE: tl.constexpr
):
    """The fixed-point scale of Σ softplus(Z_n - s_np), whose terms are below |Z| + ‖â‖ max‖v‖ / τ + 1, and whether
    there is one: not where Z or â is not finite or an s may overflow."""
    longest = 1.0
    if not NORMALIZE:
        longest = tl.load(max_abs + layer) * (D * 1.0)
    # An anchor that was normalised is longer than the ``length`` that it had.
    longest *= tl.maximum(length, 1.0)
    bound = tl.where(-float("inf") == Z, 0.0, tl.abs(Z)) + longest * inverse_temperature + 1.0
    known = bound < 2.0**60
    return power_of_two(scale_exponent - exponent_above(tl.where(known, bound, 1.0))), known


@triton.jit(do_not_specialize=["scales", "N"])
def _pixel_anchor_fwd(
    x,
    geometry,
    codes,
    similarity,
    norms,
    table,
    Z,
    pulled,
    pushed,
    terms,
    counts,
    scales,
    N,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COPIED: tl.constexpr,
    CHAINED: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """A⁺, A⁻ (COLUMNS of the channels), Σ softplus(Z - s) and Σ σ over one block, for the classes found there, CLASSES
    at a time; with ``codes.base`` for all classes.

    A row of the block is read from memory for its norms, and from cache for two products on the tensor cores: the
    rows of the label classes with x give s, the weights σ and exp(s - Z) with xᵀ give A⁺ and A⁻. x meets them as it
    came; 1/‖x‖ is in the weights.
    COPIED: rows can be copied, and all negatives are hard. ``_sums_of_copied_rows`` then does the work, unless the
    block has many classes or a vector that is not finite.
    Moves: the features once, 6 bytes a pixel (10 where rows are copied), 16 D bytes into the sums for each class of a
    block.
    """
    K: tl.constexpr = TILES.K
    CLASSES: tl.constexpr = TILES.CLASSES
    PRODUCTS: tl.constexpr = TILES.COLUMNS // TILES.K
    program, part = program_and_part(D, TILES.COLUMNS)
    block = open_block(x, geometry, program, TILES.ROWS, TILES.P, LAYOUT)
    d0 = part * TILES.COLUMNS
    y = codes.y + block.pixel
    e = codes.e + block.pixel
    table += block.number * N * D
    pulled += block.number * N * D
    pushed += block.number * N * D
    Z += block.number * N
    counts += block.number * N
    terms += 3 * block.number * N
    inverse_temperature = (1.0 / float64_from_bits(scales.temperature)).to(ACC)

    rank0 = 0
    rounds = 1
    if COPIED:
        C: tl.constexpr = 64  # channels of a product: see ``piece_products``
        slots, classes = block_classes(y, e, block, 0, N, TILES.ROWS, BINS, 16)
        if (classes <= 16) & all_finite(norms + block.pixel, block, TILES.ROWS):
            sums, losses, shares = _sums_of_copied_rows(
                block, y, e, similarity + block.pixel, norms + block.pixel, table, Z, slots, inverse_temperature, N,
                D, C, LAYOUT,
            )  # fmt: skip
            used = slots >= 0
            scale = pulled_scale(None, 0, tl.load(counts + slots, mask=used, other=1), True)
            for i in tl.static_range(D // C):
                block_pulled, block_pushed = tl.split(tl.permute(tl.reshape(sums[i], (C, 2, 16)), (0, 2, 1)))
                d = i * C + tl.arange(0, C)
                here = slots[None, :] * D + d[:, None]
                # A class may be here as a label or as a negative alone.
                add_fixed(pulled + here, block_pulled, scale[None, :], used[None, :] & (block_pulled != 0.0))
                add_fixed(
                    pushed + here, block_pushed, pushed_scale(None, 0, True), used[None, :] & (block_pushed != 0.0)
                )
            _add_terms(
                terms, tl.sum(losses, 0), tl.sum(shares, 0), slots, Z, scales, block.number, inverse_temperature, N,
                D, NORMALIZE,
            )  # fmt: skip
            rounds = 0  # nothing is left to do
    while rank0 < rounds:
        if codes.base is None:
            labels, label_count = block_classes(y, None, block, rank0, N, TILES.ROWS, BINS, CLASSES)
            others, other_count = block_classes(e, None, block, rank0, N, TILES.ROWS, BINS, CLASSES)
            rounds = tl.maximum(label_count, other_count)
        else:
            labels = rank0 + tl.arange(0, CLASSES)
            labels = tl.where(labels < N, labels, -1)
            others = labels
            rounds = N
        block_pulled = zero_tiles(PRODUCTS, CLASSES, K, ACC)
        block_pushed = zero_tiles(PRODUCTS, CLASSES, K, ACC)
        losses = tl.zeros((CLASSES,), ACC)
        shares = tl.zeros((CLASSES,), ACC)
        for r in range(block.r0, block.r1):
            row = row_of(block.image, block, r)
            label = row_codes(y, block, r)
            negative = row_codes(e, block, r)

            # 1. Norms, and products with the anchors of the label classes. A vector that is not finite is taken out
            # and its class marked: 0 · NaN would reach every class.
            size = summed_size(row, D, TILES.CHUNK, NORMALIZE, ACC)
            norm = inverse_norm(size, NORMALIZE)
            products = anchor_products(row, table, labels, D, K, ACC)
            finite = is_finite(size)
            some_broken = tl.min(finite.to(tl.int32), 0) == 0
            if some_broken:
                mark = tl.full(label.shape, 1, tl.int64)
                broken = block.live & (label < N) & (finite == 0)
                tl.atomic_max(terms + 2 * N + label, mark, mask=broken, sem="relaxed")
            own = (labels[:, None] == label[None, :]) & finite[None, :]

            # 2. Positives: each pixel has one class, so s, σ and the term are one number a pixel.
            s = tl.sum(tl.where(own, products, 0.0), 0) * norm * inverse_temperature
            logit = tl.load(Z + label, mask=label < N, other=0.0) - s
            share = sigmoid(logit)
            losses += tl.sum(tl.where(own, softplus(logit)[None, :], 0.0), 1)
            shares += tl.sum(tl.where(own, share[None, :], 0.0), 1)
            pull = tl.where(own, (share * norm)[None, :], 0.0)

            # 3. Negatives.
            if codes.base is None:
                is_hard = negative < N
                here = similarity + block.pixel + (r * block.w + block.c)
                hard = tl.exp(tl.load(here, mask=is_hard, other=0.0) - tl.load(Z + negative, mask=is_hard, other=0.0))
                push = tl.where((others[:, None] == negative[None, :]) & finite[None, :], (hard * norm)[None, :], 0.0)
            else:
                against = is_negative(others, label, negative, row_flags(codes.base + block.pixel, block, r))
                log_sum = tl.load(Z + others, mask=others >= 0, other=0.0)
                push = tl.exp(products * (norm * inverse_temperature)[None, :] - log_sum[:, None]) * norm[None, :]
                push = tl.where(against & finite[None, :], push, 0.0)

            # 4. Weighted sums of the embeddings.
            more_pulled = ()
            more_pushed = ()
            for k in tl.static_range(PRODUCTS):
                tile = channels(row, d0 + k * K, D, K, D % TILES.COLUMNS == 0)
                if some_broken:
                    tile = tl.where(finite[None, :], tile, 0.0)
                tile = tl.trans(tile)
                more_pulled = more_pulled + (dot_features(pull, tile, block_pulled[k], CHAINED=CHAINED),)  # noqa: RUF005
                more_pushed = more_pushed + (dot_features(push, tile, block_pushed[k], CHAINED=CHAINED),)  # noqa: RUF005
            block_pulled = more_pulled
            block_pushed = more_pushed

        count = tl.load(counts + labels, mask=labels >= 0, other=1)
        scale = pulled_scale(scales.max_abs, block.number, count, NORMALIZE)[:, None]
        for k in tl.static_range(PRODUCTS):
            d = d0 + k * K + tl.arange(0, K)
            here = pulled + labels[:, None] * D + d[None, :]
            add_fixed(here, block_pulled[k], scale, (labels >= 0)[:, None] & (d < D)[None, :])
        scale = pushed_scale(scales.max_abs, block.number, NORMALIZE)
        for k in tl.static_range(PRODUCTS):
            d = d0 + k * K + tl.arange(0, K)
            here = pushed + others[:, None] * D + d[None, :]
            add_fixed(here, block_pushed[k], scale, (others >= 0)[:, None] & (d < D)[None, :])
        if part == 0:
            _add_terms(terms, losses, shares, labels, Z, scales, block.number, inverse_temperature, N, D, NORMALIZE)
        rank0 += CLASSES


@triton.jit
def _sums_of_copied_rows(
    block,
    y,
    e,
    similarity,
    norms,
    table,
    Z,
    slots,
    inverse_temperature,
    N,
    D: tl.constexpr,
    C: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """[A⁺ | A⁻] (D, 32) in tiles of C channels, and Σ softplus and Σ σ as (P, 16), of the 16 classes of a block whose
    vectors are finite. The pointers are those of the block's image and layer.

    A row of 64 pixels comes to shared memory once, one ahead, for both products: xᵀ (P, D) · [three pieces of â]
    (D, 64) gives s, x (D, P) · [two pieces of the weights] (P, 64) the sums. One list of classes serves labels and
    negatives.
    """
    P: tl.constexpr = block.c.shape[0]
    anchors = row_pieces(table, slots, D, C)
    sums = zero_tiles(D // C, C, 32, tl.float32)
    losses = tl.zeros((P, 16), tl.float32)
    shares = tl.zeros((P, 16), tl.float32)
    for r in tl.range(block.r0, block.r1, num_stages=3):
        pixel = r * block.w + block.c
        label = row_codes(y, block, r)
        negative = row_codes(e, block, r)
        norm = tl.load(norms + pixel, mask=block.live, other=0.0)
        tiles = row_tiles(row_again(block.image, block, r, LAYOUT), D, C)
        products = tl.zeros((P, 16), tl.float32)
        for i in tl.static_range(D // C):
            products = piece_products(tiles[i], anchors[i], products)
        own = slots[None, :] == label[:, None]
        against = slots[None, :] == negative[:, None]

        # Positives: each pixel has one class, so s, σ and the term are one number a pixel.
        s = tl.sum(tl.where(own, products, 0.0), 1) * norm * inverse_temperature
        logit = tl.load(Z + label, mask=label < N, other=0.0) - s
        share = sigmoid(logit)
        losses += chosen(own, softplus(logit))
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
        more = ()
        for i in tl.static_range(D // C):
            more = more + (sums[i] + tl.sum(tl.reshape(tl.dot(tiles[i], weights), (C, 2, 32)), 1),)  # noqa: RUF005
        sums = more
    return sums, losses, shares


@triton.jit
def _add_terms(
    terms,
    losses,
    shares,
    classes,
    Z,
    scales,
    number,
    inverse_temperature,
    N,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Adds Σ softplus and Σ σ of some classes (-1: none) to the terms of layer ``number``, and marks classes whose sum
    has no scale. terms, Z: pointers to those of the layer."""
    used = classes >= 0
    length = tl.load(scales.lengths + number * N + classes, mask=used, other=0.0)
    log_sum = tl.load(Z + classes, mask=used, other=0.0)
    scale, known = term_scale(
        log_sum, length, scales.max_abs, number, inverse_temperature, scales.scale_exponent, D, NORMALIZE
    )
    known = known & (tl.abs(losses) < float("inf"))
    add_fixed(terms + classes, losses, scale, used & known)
    add_fixed(terms + N + classes, shares, power_of_two(scales.scale_exponent), used & known)
    mark = tl.full(classes.shape, 1, tl.int64)
    tl.atomic_max(terms + 2 * N + classes, mark, mask=used & (known == 0), sem="relaxed")


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
    """dL/dâ of one class of a layer, its k⁺, k⁻ and its pixel count; in float64."""
    every = tl.arange(0, BINS)
    all_counts = tl.load(counts + layer * N + every, mask=every < N, other=0)
    present = tl.maximum(tl.sum((all_counts > 0).to(tl.int32), 0), 1).to(tl.float64)
    count = tl.load(counts + layer * N + n)
    pixels = tl.maximum(count, 1).to(tl.float64)
    share = tl.load(terms + (3 * layer + 1) * N + n).to(tl.float64) / power_of_two(scales.scale_exponent) / pixels  # G
    A_pulled = tl.load(pulled + (layer * N + n) * D + d, mask=d < D, other=0)
    A_pushed = tl.load(pushed + (layer * N + n) * D + d, mask=d < D, other=0)
    A_pulled = A_pulled.to(tl.float64) / pulled_scale(scales.max_abs, layer, count, NORMALIZE)
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
    """One program, one class: dL/dâ of all layers, back through normalisation and fusion to dL/da, divided by the
    count. The first program also adds up the loss."""
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
            scale, _ = term_scale(
                log_sum, length, scales.max_abs, i, inverse_temperature, scales.scale_exponent, D, NORMALIZE
            )
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
