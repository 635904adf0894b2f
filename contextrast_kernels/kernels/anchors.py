"""Class anchors (Eq. 1): sums of embeddings by class in one read of the features, and the tables made from them.

    a^n = Σ_p r_p x_p [y_p = n] / c_n,    r_p = 1/‖x_p‖,    c_n = Σ_p [y_p = n]

Programs add their sums to int64 accumulators in fixed point, which gives the same bits in any order, without a second
stage.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._codes import Codes, codes
from contextrast_kernels.kernels._gradient import feature_gradients
from contextrast_kernels.kernels._sums import Sums, zeros
from contextrast_kernels.kernels._tile_table import copied_tiles, copies_rows, next_power_of_2, tiles_of
from contextrast_kernels.kernels._tiles import (
    LARGEST_MAX_ABS,
    add_fixed,
    block_classes,
    channels,
    dot_features,
    float64_from_bits,
    in_map,
    inverse_norm,
    is_finite,
    open_block,
    program_and_part,
    row_again,
    row_codes,
    row_of,
    row_tiles,
    size_term,
    sum_scale,
    summed_size,
    two_pieces,
    zero_tiles,
)


def forward(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    normalize: bool,
    volume: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return anchors (N, D), counts (N,), and the label codes that ``backward`` needs."""
    sums = zeros([features], num_classes, normalize, anchors=True, loss=False)
    code = codes([features], labels, num_classes, ignore_index, sums, volumes=volume)
    if not normalize:
        largest_features([features], code, sums)
    class_sums([features], code, sums)
    table, _ = anchor_tables(sums, _launch.accumulator(features.dtype))
    return table[0], sums.counts[0].clone(), code.y


def backward(gradient: Tensor, features: Tensor, counts: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """Return dL/dx: every pixel gets its class's dL/da / c, through v = x / ‖x‖."""
    pull = (
        (gradient / counts.clamp(min=1).unsqueeze(1)).to(_launch.accumulator(features.dtype)).unsqueeze(0).contiguous()
    )
    (dx,) = feature_gradients([features], y, pull.shape[1], normalize, pull=pull)
    return dx


def largest_features(features: Sequence[Tensor], code: Codes, sums: Sums) -> None:
    """Put the largest finite |x| of each layer's valid pixels into ``sums.max_abs``: unnormalised sums are scaled by
    it."""
    x = features[0]
    arguments = {"codes": code.y, "max_abs": sums.max_abs, "N": sums.counts.shape[1]}
    tiles = tiles_of("_largest_features", x.dtype, x.shape[1])
    _launch.sweep(_largest_features, features, arguments, tiles, {})


def class_sums(features: Sequence[Tensor], code: Codes, sums: Sums, norms: Tensor | None = None) -> None:
    """Add Σ v over the pixels of every class to ``sums.vectors``, in one read of the features. norms: where 1/‖x‖ of
    every pixel is kept for later sweeps, NaN where x is not finite."""
    x = features[0]
    D = x.shape[1]
    arguments = {
        "codes": code.y,
        "sums": sums.vectors,
        "broken": sums.broken,
        "norms": norms,
        "max_abs": sums.max_abs,
        "counts": sums.counts,
        "N": sums.counts.shape[1],
    }
    tiles = tiles_of("_class_anchors_fwd", x.dtype, D)
    constants = {
        "BINS": next_power_of_2(sums.counts.shape[1]),
        "NORMALIZE": sums.max_abs is None,
        "COPIED": False,
        "ACC": _launch.triton_type(_launch.accumulator(x.dtype)),
    }
    copied = None
    if sums.max_abs is None and copies_rows(x.dtype, D):
        copied = _launch.Copied(copied_tiles(tiles), {})
    splits = _launch.ceil_div(D, tiles.COLUMNS)
    _launch.sweep(_class_anchors_fwd, features, arguments, tiles, constants, splits=splits, copied=copied)


def float64_sums(sums: Sums) -> Tensor:
    """Return Σ v of every class, (layers, N, D) float64, which ranks can add up: their fixed-point scales differ."""
    L, N, D = sums.vectors.shape
    vectors = torch.empty(L, N, D, dtype=torch.float64, device=sums.vectors.device)
    _launch.launch(
        _float64_sums,
        (L * N,),
        {"sums": sums.vectors, "max_abs": sums.max_abs, "counts": sums.counts, "vectors": vectors, "N": N},
        {"D": D, "BLOCK": next_power_of_2(D), "NORMALIZE": sums.max_abs is None},
    )
    return vectors


def anchor_tables(
    sums: Sums, dtype: torch.dtype, fusion_weight: float = 0.0, normalize_anchors: bool = False
) -> tuple[Tensor, Tensor]:
    """Return â (layers, N, D) from the sums of all ranks, and ‖â‖ (layers, N) before normalisation. The rows of â are
    means, mixed with those of the last layer, and normalised if asked. A class without pixels has a row of zeros, one
    with a pixel that is not finite a row of NaN."""
    L, N, D = sums.vectors.shape
    table = torch.empty(L, N, D, dtype=dtype, device=sums.vectors.device)
    lengths = torch.empty(L, N, dtype=dtype, device=sums.vectors.device)
    _launch.launch(
        _anchor_tables,
        (N,),
        {
            "sums": sums.vectors,
            "broken": sums.broken,
            "max_abs": sums.max_abs,
            "counts": sums.counts,
            "table": table,
            "lengths": lengths,
            "fusion_weight": _launch.float64_bits(fusion_weight),
            "N": N,
        },
        {
            "L": L,
            "D": D,
            "BLOCK": next_power_of_2(D),
            "NORMALIZE": sums.max_abs is None,
            "NORMALIZE_ANCHORS": normalize_anchors,
            **_launch.UNFUSED,
        },
    )
    return table, lengths


@triton.jit(do_not_specialize=["N"])
def _class_anchors_fwd(
    x,
    geometry,
    codes,
    sums,
    broken,
    norms,
    max_abs,
    counts,
    N,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    COPIED: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes one block (ROWS rows of P pixels of one image) and adds Σ_p r_p x_p [y_p = n] to sums[n],
    for COLUMNS of the channels.

    A row of the block is read from memory for its norms and again, from cache, for the product W · xᵀ with
    W = r_p [y_p = class of slot], which runs on the tensor cores without elementwise operations on x. The kernel moves
    the features once, and 8 D bytes into the sums for each class of a block.
    COPIED: rows can be copied. ``_sums_of_copied_rows`` then does the work, unless the block has many classes or a
    vector that is not finite.
    """
    K: tl.constexpr = TILES.K
    CLASSES: tl.constexpr = TILES.CLASSES
    PRODUCTS: tl.constexpr = TILES.COLUMNS // TILES.K
    program, part = program_and_part(D, TILES.COLUMNS)
    block = open_block(x, geometry, program, TILES.ROWS, TILES.P, LAYOUT)
    d0 = part * TILES.COLUMNS

    rank0 = 0
    classes = 1
    if COPIED:
        slots, found = block_classes(codes, None, block, 0, N, TILES.ROWS, BINS, CLASSES)
        if found <= CLASSES:
            C: tl.constexpr = 64  # channels of a product: the least with which they are wgmma's rows
            used = slots >= 0
            count = tl.load(counts + block.number * N + slots, mask=used, other=1)
            scale = sum_scale(None, 0, count, True)[None, :]
            totals, finite = _sums_of_copied_rows(block, codes, norms, slots, D, C, LAYOUT)
            if finite:
                for i in tl.static_range(D // C):
                    d = i * C + tl.arange(0, C)
                    here = sums + ((block.number * N + slots) * D)[None, :] + d[:, None]
                    add_fixed(here, totals[i], scale, used[None, :])
                classes = 0  # nothing is left to do
            else:
                tl.debug_barrier()  # the norms that other threads stored are written again
    while rank0 < classes:
        slots, classes = block_classes(codes, None, block, rank0, N, TILES.ROWS, BINS, CLASSES)
        totals = zero_tiles(PRODUCTS, CLASSES, K, ACC)
        for r in range(block.r0, block.r1):
            row = row_of(block.image, block, r)
            y = row_codes(codes, block, r)
            size = summed_size(row, D, TILES.CHUNK, NORMALIZE, ACC)
            # 0 · NaN would carry a vector that is not finite into every class of the block: it is taken out, and its
            # class marked.
            finite = is_finite(size)
            some_broken = tl.min(finite.to(tl.int32), 0) == 0
            if some_broken:
                mark = tl.full(y.shape, 1, tl.int64)
                lost = block.live & (y < N) & (finite == 0)
                tl.atomic_max(broken + block.number * N + y, mark, mask=lost, sem="relaxed")
            norm = inverse_norm(size, NORMALIZE)
            if norms is not None:
                tl.store(in_map(norms, block, r), tl.where(finite, norm, float("nan")), mask=block.live)
            weight = tl.where((slots[:, None] == y[None, :]) & finite[None, :], norm[None, :], 0.0)
            more = ()
            for k in tl.static_range(PRODUCTS):
                tile = channels(row, d0 + k * K, D, K, D % TILES.COLUMNS == 0)
                if some_broken:
                    tile = tl.where(finite[None, :], tile, 0.0)
                more = more + (dot_features(weight, tl.trans(tile), totals[k]),)  # noqa: RUF005
            totals = more
        count = tl.load(counts + block.number * N + slots, mask=slots >= 0, other=1)
        scale = sum_scale(max_abs, block.number, count, NORMALIZE)[:, None]
        for k in tl.static_range(PRODUCTS):
            d = d0 + k * K + tl.arange(0, K)
            here = sums + ((block.number * N + slots) * D)[:, None] + d[None, :]
            add_fixed(here, totals[k], scale, (slots >= 0)[:, None] & (d < D)[None, :])
        rank0 += CLASSES


@triton.jit
def _sums_of_copied_rows(block, codes, norms, slots, D: tl.constexpr, C: tl.constexpr, LAYOUT: tl.constexpr):
    """Return Σ r_p x_p of the 16 classes of a block, in tiles (C, 16) of the channels, and whether all of its vectors
    are finite.

    A row of 64 pixels comes to shared memory once. x (C, P) · Wᵀ (P, 64) gives its sums, where W holds r in the row of
    a pixel's class. Three pieces of bfloat16, one below the other, hold all bits of float32; the first of them comes in
    two halves, each with zeros for the other half's pixels. Tensor cores truncate the accumulator after every few
    products, so a long sum would shrink: sums over 32 pixels are added in float32.
    """
    P: tl.constexpr = block.c.shape[0]
    in_second = (tl.arange(0, P) >= P // 2)[None, :]
    part = tl.arange(0, 4)[:, None]
    totals = zero_tiles(D // C, C, 16, tl.float32)
    spoilt = tl.zeros((P,), tl.float32)  # becomes NaN
    for r in tl.range(block.r0, block.r1, num_stages=3):
        y = row_codes(codes, block, r)
        tiles = row_tiles(row_again(block.image, block, r, LAYOUT), D, C)
        sizes = tl.zeros((C, P), tl.float32)
        for i in tl.static_range(D // C):
            sizes += size_term(tiles[i].to(tl.float32), True)
        size = tl.sum(sizes, 0)
        spoilt += size * 0.0
        norm = inverse_norm(size, True)
        if norms is not None:
            kept = tl.where(is_finite(size), norm, float("nan"))
            tl.store(in_map(norms, block, r), kept, mask=block.live)
        high, middle = two_pieces(norm)
        third = (norm - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
        zero = tl.zeros((4, P), tl.bfloat16)
        pieces = tl.where((part == 0) & in_second | (part == 1) & (in_second == 0), zero, high[None, :])
        pieces = tl.where(part == 2, middle[None, :], tl.where(part == 3, third[None, :], pieces))
        own = (slots[:, None] == y[None, :])[None, :, :]
        weights = tl.reshape(tl.where(own, pieces[:, None, :], tl.zeros((4, 16, P), tl.bfloat16)), (64, P))
        more = ()
        for i in tl.static_range(D // C):
            parts = tl.dot(tiles[i], tl.trans(weights))
            more = more + (totals[i] + tl.sum(tl.reshape(parts, (C, 4, 16)), 1),)  # noqa: RUF005
        totals = more
    return totals, tl.max((spoilt != spoilt).to(tl.int32), 0) == 0


@triton.jit(do_not_specialize=["N"])
def _largest_features(x, geometry, codes, max_abs, N, D: tl.constexpr, TILES: tl.constexpr, LAYOUT: tl.constexpr):
    """Each program takes one block (ROWS rows of P pixels of one image) and raises max_abs to the largest |x| of the
    finite channels of valid pixels. Unnormalised features alone need this read."""
    P: tl.constexpr = TILES.P
    CHUNK: tl.constexpr = TILES.CHUNK
    block = open_block(x, geometry, tl.program_id(0), TILES.ROWS, P, LAYOUT)
    largest = tl.zeros((CHUNK, P), max_abs.dtype.element_ty)
    for r in range(block.r0, block.r1):
        row = row_of(block.image, block, r)
        valid = row_codes(codes, block, r) < N
        for k in range(0, D, CHUNK):
            size = tl.abs(channels(row, k, D, CHUNK).to(max_abs.dtype.element_ty))
            largest = tl.maximum(largest, tl.where(valid[None, :] & (size < float("inf")), size, 0.0))
    tl.atomic_max(max_abs + block.number, tl.max(tl.max(largest, 0), 0), sem="relaxed")


@triton.jit
def _total(sums, max_abs, count, layer, n, d, N, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return Σ v of class n of a layer in float64, (BLOCK,), from a sum in fixed point or in float64."""
    total = tl.load(sums + (layer * N + n) * D + d, mask=d < D, other=0).to(tl.float64)
    if sums.dtype.element_ty == tl.int64:
        total /= sum_scale(max_abs, layer, count, NORMALIZE).to(tl.float64)
    return total


@triton.jit(do_not_specialize=["N"])
def _float64_sums(sums, max_abs, counts, vectors, N, D: tl.constexpr, BLOCK: tl.constexpr, NORMALIZE: tl.constexpr):
    """Each program takes one class of one layer and writes its Σ v in float64."""
    layer = tl.program_id(0) // N
    n = tl.program_id(0) % N
    d = tl.arange(0, BLOCK)
    total = _total(sums, max_abs, tl.load(counts + layer * N + n), layer, n, d, N, D, NORMALIZE)
    tl.store(vectors + (layer * N + n) * D + d, total, mask=d < D)


@triton.jit
def _mean(sums, broken, max_abs, counts, layer, n, d, N, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return a^n of a layer in float64, (BLOCK,), and the class's count of pixels."""
    count = tl.load(counts + layer * N + n)
    total = _total(sums, max_abs, count, layer, n, d, N, D, NORMALIZE)
    lost = tl.load(broken + layer * N + n) > 0
    if not NORMALIZE:
        lost = lost | (tl.load(max_abs + layer) >= LARGEST_MAX_ABS)
    return tl.where(lost & (count > 0), float("nan"), total / tl.maximum(count, 1).to(tl.float64)), count


@triton.jit(do_not_specialize=["fusion_weight", "N"])
def _anchor_tables(
    sums,
    broken,
    max_abs,
    counts,
    table,
    lengths,
    fusion_weight,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_ANCHORS: tl.constexpr,
):
    """Each program takes one class and writes â_i = (1 - w_h) a_i + w_h a_I where the class is in both layers, else
    a_i, and 0 where layer i lacks it."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    w_h = float64_from_bits(fusion_weight)
    top, top_count = _mean(sums, broken, max_abs, counts, L - 1, n, d, N, D, NORMALIZE)
    for i in tl.static_range(L):
        anchor, count = _mean(sums, broken, max_abs, counts, i, n, d, N, D, NORMALIZE)
        if i < L - 1:
            anchor = tl.where(top_count > 0, (1 - w_h) * anchor + w_h * top, anchor)
        anchor = tl.where(count > 0, anchor, 0.0)
        size = tl.sum(anchor * anchor, 0)
        tl.store(lengths + i * N + n, tl.sqrt(size).to(lengths.dtype.element_ty))
        if NORMALIZE_ANCHORS:
            anchor = anchor * inverse_norm(size, True)
        tl.store(table + (i * N + n) * D + d, anchor.to(table.dtype.element_ty), mask=d < D)
