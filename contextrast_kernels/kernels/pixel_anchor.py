"""The pixel-anchor loss (Eqs. 3-4) of all layers, in two steps between which ranks may reduce.

    s_np = â^n · v_p / τ        Z_n = log Σ_{p negative of n} exp(s_np)        σ_p = sigmoid(Z_y - s_yp)
    L = 1/|C| Σ_n 1/c_n Σ_{p∈P^n} softplus(Z_n - s_np)

``log_sums`` finds Z. ``moments`` sweeps once more and sums what both the loss and dL/dâ are made of, since the upstream
gradient is a scalar that can wait:

    A⁺_n = Σ_{p∈P^n} σ_p v_p        A⁻_n = Σ_{p negative} exp(s_np - Z_n) v_p

``finish`` puts the sums together.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._codes import Codes, codes
from contextrast_kernels.kernels._finish import Scales, finish
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
    count_scale,
    decode_int,
    dot_features,
    float64_from_bits,
    hard_share,
    in_map,
    inverse_norm,
    is_finite,
    is_negative,
    open_block,
    piece_products,
    program_and_part,
    pushed_scale,
    rounded,
    row_again,
    row_codes,
    row_flags,
    row_of,
    row_pieces,
    row_tiles,
    side_by_side,
    sigmoid,
    softplus,
    sum_scale,
    summed_size,
    term_scale,
    two_pieces,
    zero_tiles,
)
from contextrast_kernels.kernels.anchors import largest_features


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
    """Return the loss, dL/danchors, the label codes, and what ``backward`` needs besides. Without negatives and base
    every pixel of another class is a negative."""
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
    scales = Scales(lengths, sums.max_abs, temperature)
    moments([features], code, sums, table, Z, similarity, scales)
    outcome = finish(sums, table, Z, scales, (1.0,))
    terms = Terms(code.e, code.base, similarity, table, Z, outcome.coefficients)
    return outcome.loss, outcome.pull[0], code.y, terms


def backward(
    gradient: Tensor, features: Tensor, y: Tensor, terms: Terms, temperature: float, normalize: bool
) -> Tensor:
    """Return dL/dx of the features."""
    (dx,) = feature_gradients(
        [features], y, terms.table.shape[1], normalize, terms=terms, temperature=temperature, gradient=gradient
    )
    return dx


def given_table(anchors: Tensor, counts: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return given anchors as a table (1, N, D), and ‖â‖ (1, N). Rows of classes without pixels become zero, as they
    are in no term."""
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
    """Add what the loss and dL/dâ are made of to ``sums.pulled``, ``pushed`` and ``terms``, in one read of the
    features.

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


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _given_table(anchors, strides, counts, table, lengths, D: tl.constexpr, BLOCK: tl.constexpr):
    """Each program takes one class, copies its row of any strides and dtype into the table, and writes its length."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    anchor = tl.load(
        anchors + tl.cast(n, tl.int64) * decode_int(strides[0]) + d * decode_int(strides[1]), mask=d < D, other=0.0
    )
    anchor = tl.where(tl.load(counts + n) > 0, anchor.to(table.dtype.element_ty), 0.0)
    tl.store(table + n * D + d, anchor, mask=d < D)
    tl.store(lengths + n, tl.sqrt(tl.sum(anchor * anchor, 0)))


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
    """Each program takes one block (ROWS rows of P pixels of one image) and adds A⁺, A⁻ (COLUMNS of the channels),
    Σ softplus(Z - s) and Σ σ of the classes found there, CLASSES at a time; with ``codes.base`` of all classes.

    A row of the block is read from memory for its norms, and from cache for two products on the tensor cores: the rows
    of the label classes with x give s, the weights σ and exp(s - Z) with xᵀ give A⁺ and A⁻. x meets them as it came;
    1/‖x‖ is in the weights. COPIED: rows can be copied, and all negatives are hard. ``_sums_of_copied_rows`` then does
    the work, unless the block has many classes or a vector that is not finite. The kernel moves the features once, 6
    bytes a pixel (10 where rows are copied), and 16 D bytes into the sums for each class of a block.
    """
    K: tl.constexpr = TILES.K
    CLASSES: tl.constexpr = TILES.CLASSES
    PRODUCTS: tl.constexpr = TILES.COLUMNS // TILES.K
    program, part = program_and_part(D, TILES.COLUMNS)
    d0 = part * TILES.COLUMNS
    y = codes.y
    e = codes.e
    inverse_temperature = (1.0 / float64_from_bits(scales.temperature)).to(ACC)

    rank0 = 0
    rounds = tl.full((), 1, tl.int32)
    block = open_block(x, geometry, program, TILES.ROWS, TILES.P, LAYOUT)
    if COPIED:
        slots, classes = block_classes(y, e, block, 0, N, TILES.ROWS, BINS, 16)
        if (classes <= 16) & all_finite(norms, block, TILES.ROWS):
            _add_copied_rows(
                block, codes, similarity, norms, table, Z, pulled, pushed, terms, counts, scales, slots,
                inverse_temperature, N, D, LAYOUT,
            )  # fmt: skip
            rounds = 0  # nothing is left to do
    table, Z, pulled, pushed, terms, counts = _of_layer(block.number, table, Z, pulled, pushed, terms, counts, N, D)
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
                hard = hard_share(in_map(similarity, block, r), Z, negative, N)
                push = tl.where((others[:, None] == negative[None, :]) & finite[None, :], (hard * norm)[None, :], 0.0)
            else:
                against = is_negative(others, label, negative, row_flags(codes.base, block, r))
                log_sum = tl.load(Z + others, mask=others >= 0, other=0.0)
                similarities = rounded(products * (norm * inverse_temperature)[None, :])
                push = tl.exp(similarities - log_sum[:, None]) * norm[None, :]
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
        scale = sum_scale(scales.max_abs, block.number, count, NORMALIZE)[:, None]
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
            _add_terms(
                terms, losses, shares, labels, Z, counts, scales, block.number, inverse_temperature, N, D, NORMALIZE
            )
        rank0 += CLASSES


@triton.jit
def _of_layer(number, table, Z, pulled, pushed, terms, counts, N, D: tl.constexpr):
    """Return the pointers to what belongs to layer ``number``."""
    row = number * N
    return table + row * D, Z + row, pulled + row * D, pushed + row * D, terms + 3 * row, counts + row


@triton.jit
def _add_copied_rows(
    block,
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
    slots,
    inverse_temperature,
    N,
    D: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """Add A⁺, A⁻, Σ softplus and Σ σ of the 16 classes of a block of normalised vectors that are finite."""
    C: tl.constexpr = 64  # channels of a product: see ``piece_products``
    table, Z, pulled, pushed, terms, counts = _of_layer(block.number, table, Z, pulled, pushed, terms, counts, N, D)
    sums, losses, shares = _sums_of_copied_rows(
        block, codes, similarity, norms, table, Z, slots, inverse_temperature, N, D, C, LAYOUT
    )
    used = slots >= 0
    scale = sum_scale(None, 0, tl.load(counts + slots, mask=used, other=1), True)
    for i in tl.static_range(D // C):
        block_pulled, block_pushed = tl.split(tl.permute(tl.reshape(sums[i], (C, 2, 16)), (0, 2, 1)))
        d = i * C + tl.arange(0, C)
        here = slots[None, :] * D + d[:, None]
        # A class may be here as a label or as a negative alone.
        add_fixed(pulled + here, block_pulled, scale[None, :], used[None, :] & (block_pulled != 0.0))
        add_fixed(pushed + here, block_pushed, pushed_scale(None, 0, True), used[None, :] & (block_pushed != 0.0))
    _add_terms(
        terms, tl.sum(losses, 0), tl.sum(shares, 0), slots, Z, counts, scales, block.number, inverse_temperature, N,
        D, True,
    )  # fmt: skip


@triton.jit
def _sums_of_copied_rows(
    block,
    codes,
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
    """Return [A⁺ | A⁻] (D, 32) in tiles of C channels, and Σ softplus and Σ σ as (P, 16), of the 16 classes of a block
    whose vectors are finite. ``table`` and ``Z`` point to those of the block's layer.

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
        label = row_codes(codes.y, block, r)
        negative = row_codes(codes.e, block, r)
        norm = tl.load(in_map(norms, block, r), mask=block.live, other=0.0)
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
        hard = hard_share(in_map(similarity, block, r), Z, negative, N) * norm

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
    counts,
    scales,
    number,
    inverse_temperature,
    N,
    D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Add Σ softplus and Σ σ of some classes (-1: none) to the terms of layer ``number``, and mark classes whose sum
    has no scale. ``terms``, ``Z`` and ``counts`` point to those of the layer."""
    used = classes >= 0
    length = tl.load(scales.lengths + number * N + classes, mask=used, other=0.0)
    log_sum = tl.load(Z + classes, mask=used, other=0.0)
    count = tl.load(counts + classes, mask=used, other=1)
    scale, known = term_scale(log_sum, length, scales.max_abs, number, count, inverse_temperature, D, NORMALIZE)
    known = known & (tl.abs(losses) < float("inf"))
    add_fixed(terms + classes, losses, scale, used & known)
    add_fixed(terms + N + classes, shares, count_scale(count), used & known)
    mark = tl.full(classes.shape, 1, tl.int64)
    tl.atomic_max(terms + 2 * N + classes, mark, mask=used & (known == 0), sem="relaxed")
