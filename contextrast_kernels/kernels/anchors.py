"""Class anchors (Eq. 1): sums of embeddings by class in one read of the features, and the tables made from them.

    a^n = Σ_p r_p x_p [y_p = n] / c_n,    r_p = 1/‖x_p‖,    c_n = Σ_p [y_p = n]

Sums of different programs meet in int64 fixed point: they add up to the same bits in any order, without a second
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
from contextrast_kernels.kernels._tile_table import copied_tiles, copies_rows, next_power_of_2, tiles
from contextrast_kernels.kernels._tiles import (
    LARGEST_REACH,
    add_fixed,
    block_classes,
    block_of,
    channels,
    dot_features,
    image_codes,
    image_features,
    inverse_norm,
    is_finite,
    layer_of,
    pick,
    program_and_part,
    real,
    size_term,
    steps_again,
    two_pieces,
    vector_scale,
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
    """Anchors (N, D), counts (N,), and the label codes that ``backward`` needs."""
    sums = zeros([features], num_classes, normalize, anchors=True, loss=False)
    code = codes([features], labels, num_classes, ignore_index, sums, volumes=volume)
    if not normalize:
        largest_features([features], code, sums)
    headroom = _launch.headroom(_launch.pixels((features.shape,)))
    class_sums([features], code, sums, headroom)
    table, _ = anchor_tables(sums, _launch.accumulator(features.dtype), headroom)
    return table[0], sums.counts[0].clone(), code.y


def backward(gradient: Tensor, features: Tensor, counts: Tensor, y: Tensor, normalize: bool) -> Tensor:
    """dL/dx: every pixel gets its class's dL/da / c, through v = x / ‖x‖."""
    pull = (
        (gradient / counts.clamp(min=1).unsqueeze(1)).to(_launch.accumulator(features.dtype)).unsqueeze(0).contiguous()
    )
    (dx,) = feature_gradients([features], y, pull.shape[1], normalize, pull=pull)
    return dx


def largest_features(features: Sequence[Tensor], code: Codes, sums: Sums) -> None:
    """``sums.reach``: the largest finite |x| of each layer's valid pixels, by which unnormalised sums are scaled."""
    x = features[0]
    arguments = {"codes": code.y, "reach": sums.reach, "N": sums.counts.shape[1]}
    taken = tiles("_largest_features", x.dtype, x.shape[1])
    _launch.sweep(_largest_features, features, arguments, taken)


def class_sums(features: Sequence[Tensor], code: Codes, sums: Sums, headroom: int, norms: Tensor | None = None) -> None:
    """``sums.vectors``: Σ v over the pixels of every class. One read of the features.

    headroom: ``_launch.headroom`` of all the pixels (of all ranks) that the sums will hold. norms: where 1/‖x‖ of
    every pixel is kept for later sweeps, NaN where x is not finite."""
    x = features[0]
    D = x.shape[1]
    arguments = {
        "codes": code.y,
        "sums": sums.vectors,
        "broken": sums.broken,
        "norms": norms,
        "reach": sums.reach,
        "headroom": headroom,
        "N": sums.counts.shape[1],
    }
    taken = {
        **tiles("_class_anchors_fwd", x.dtype, D, "K", "COLUMNS", "CLASSES"),
        "BINS": next_power_of_2(sums.counts.shape[1]),
        "NORMALIZE": sums.reach is None,
        "COPIED": False,
        "ACC": _launch.triton_type(_launch.accumulator(x.dtype)),
    }
    copied = None
    if sums.reach is None and copies_rows(x.dtype, D):
        copied = _class_anchors_fwd, arguments, {**taken, **copied_tiles(), "COPIED": True}
    splits = _launch.ceil_div(D, taken["COLUMNS"])
    _launch.sweep(_class_anchors_fwd, features, arguments, taken, splits=splits, copied=copied)


def anchor_tables(
    sums: Sums, dtype: torch.dtype, headroom: int, fusion_weight: float = 0.0, normalize_anchors: bool = False
) -> tuple[Tensor, Tensor]:
    """â (layers, N, D) from the sums of all ranks: means, mixed with the last layer's, normalised if asked. A class
    without pixels has a zero row, one with a broken pixel a row of NaN. And ‖â‖ (layers, N) as it was before it was
    normalised."""
    L, N, D = sums.vectors.shape
    table = torch.empty(L, N, D, dtype=dtype, device=sums.vectors.device)
    lengths = torch.empty(L, N, dtype=dtype, device=sums.vectors.device)
    _launch.launch(
        _anchor_tables,
        (N,),
        {
            "sums": sums.vectors,
            "broken": sums.broken,
            "reach": sums.reach,
            "counts": sums.counts,
            "table": table,
            "lengths": lengths,
            "headroom": headroom,
            "fusion_weight": _launch.float64_bits(fusion_weight),
            "N": N,
        },
        {
            "L": L,
            "D": D,
            "BLOCK": next_power_of_2(D),
            "NORMALIZE": sums.reach is None,
            "NORMALIZE_ANCHORS": normalize_anchors,
            **_launch.UNFUSED,
        },
    )
    return table, lengths


@triton.jit
def _sums_of_copied_rows(
    image,
    sH,
    sW,
    sD,
    codes,
    norms,
    slots,
    r0,
    h,
    c,
    w,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Σ r_p x_p of the 16 classes of a block, in tiles (C, 16), and whether all of its vectors are finite.

    A row of 64 pixels comes to shared memory once. x (C, P) · Wᵀ (P, 64) gives its sums, where W holds r in the row of
    a pixel's class. Three pieces of bfloat16, one below the other, hold all bits of float32; the first of them comes in
    two halves, each with zeros for the other half's pixels. Tensor cores cut a sum toward zero after every few
    products, so a long one would shrink: sums over 32 pixels are added in float32.
    """
    live = c < w
    in_second = (tl.arange(0, P) >= P // 2)[None, :]
    part = tl.arange(0, 4)[:, None]
    totals = zero_tiles(D // C, C, 16, tl.float32)
    spoilt = tl.zeros((P,), tl.float32)  # becomes NaN
    for r in tl.range(r0, tl.minimum(r0 + ROWS, h), num_stages=3):
        row = image + tl.cast(r, tl.int64) * sH
        y = tl.load(codes + (r * w + c), mask=live, other=32767).to(tl.int32)
        step_w, step_d = steps_again(sW, sD, r, UNIT, ALIGN)
        tiles = ()
        sizes = tl.zeros((C, P), tl.float32)
        for i in tl.static_range(D // C):
            tiles = tiles + (channels(row, c * step_w, live, i * C, step_d, D, C),)  # noqa: RUF005
            sizes += size_term(tiles[i].to(tl.float32), True)
        size = tl.sum(sizes, 0)
        spoilt += size * 0.0
        norm = inverse_norm(size, True)
        if norms is not None:
            tl.store(norms + (r * w + c), tl.where(is_finite(size), norm, float("nan")), mask=live)
        high, middle = two_pieces(norm)
        third = (norm - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
        zero = tl.zeros((4, P), tl.bfloat16)
        pieces = tl.where((part == 0) & in_second | (part == 1) & (in_second == 0), zero, high[None, :])
        pieces = tl.where(part == 2, middle[None, :], tl.where(part == 3, third[None, :], pieces))
        own = (slots[:, None] == y[None, :])[None, :, :]
        weights = tl.reshape(tl.where(own, pieces[:, None, :], tl.zeros((4, 16, P), tl.bfloat16)), (64, P))
        grown = ()
        for i in tl.static_range(D // C):
            parts = tl.dot(tiles[i], tl.trans(weights))
            grown = grown + (totals[i] + tl.sum(tl.reshape(parts, (C, 4, 16)), 1),)  # noqa: RUF005
        totals = grown
    return totals, tl.max((spoilt != spoilt).to(tl.int32), 0) == 0


@triton.jit(do_not_specialize=["headroom", "N"])
def _class_anchors_fwd(
    x,
    strides,
    geometry,
    codes,
    sums,
    broken,
    norms,
    reach,
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
    COPIED: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
):
    """sums[n] += Σ_p r_p x_p [y_p = n] over one block, COLUMNS of the channels.

    Fused: the norm and the sum by class. A row of the block is read from memory for its norms and again, from
    cache, for the product W · xᵀ with W = r_p [y_p = class of slot], which runs on the tensor cores and touches no
    element of x by hand. Moves: the features once, and 8 bytes x D for each class of each block into the sums.
    COPIED: rows can be copied. ``_sums_of_copied_rows`` then does the work, unless the block has many classes or a
    vector that is not finite.
    """
    program, part = program_and_part(D, COLUMNS)
    d0 = part * COLUMNS
    layer = layer_of(program, geometry.block)
    number = pick(geometry.number, layer)
    b, r0, c0, h, w = block_of(program, geometry, layer, ROWS, P, UNIT, ALIGN)
    image, sH, sW, sD = image_features(x, strides, layer, b, UNIT, ALIGN, WIDE)
    pixels = image_codes(geometry, layer, b, h, w)
    codes += pixels
    if norms is not None:
        norms += pixels
    sums += number * N * D
    c = c0 + tl.arange(0, P)
    live = c < w
    scale = vector_scale(reach, number, headroom, NORMALIZE)

    rank0 = 0
    classes = 1
    if COPIED:
        slots, found = block_classes(codes, None, r0, h, c, w, 0, N, ROWS, P, BINS, CLASSES)
        if found <= CLASSES:
            C: tl.constexpr = 64  # channels of a product: the least with which they are wgmma's rows
            totals, finite = _sums_of_copied_rows(
                image, sH, sW, sD, codes, norms, slots, r0, h, c, w, D, ROWS, P, C, UNIT, ALIGN
            )
            if finite:
                for i in tl.static_range(D // C):
                    d = i * C + tl.arange(0, C)
                    add_fixed(sums + slots[None, :] * D + d[:, None], totals[i], scale, (slots >= 0)[None, :])
                classes = 0  # nothing is left to do
            else:
                tl.debug_barrier()  # the norms that other threads stored are written again
    while rank0 < classes:
        slots, classes = block_classes(codes, None, r0, h, c, w, rank0, N, ROWS, P, BINS, CLASSES)
        totals = zero_tiles(COLUMNS // K, CLASSES, K, ACC)
        for r in range(r0, tl.minimum(r0 + ROWS, h)):
            row = image + tl.cast(r, tl.int64) * sH
            y = tl.load(codes + (r * w + c), mask=live, other=BINS).to(tl.int32)
            sizes = tl.zeros((CHUNK, P), ACC)
            for k in tl.range(0, D, CHUNK, loop_unroll_factor=8):
                sizes += size_term(channels(row, c * sW, live, k, sD, D, CHUNK).to(ACC), NORMALIZE)
            size = tl.sum(sizes, 0)
            # 0 · NaN would carry a broken pixel into every class of the block: it is taken out, and its class marked.
            sound = is_finite(size)
            some_broken = tl.min(sound.to(tl.int32), 0) == 0
            if some_broken:
                tl.atomic_max(
                    broken + number * N + y,
                    tl.full((P,), 1, tl.int64),
                    mask=live & (y < N) & (sound == 0),
                    sem="relaxed",
                )
            norm = inverse_norm(size, NORMALIZE)
            if norms is not None:
                tl.store(norms + (r * w + c), tl.where(sound, norm, float("nan")), mask=live)
            weight = tl.where((slots[:, None] == y[None, :]) & sound[None, :], norm[None, :], 0.0)
            grown = ()
            for k in tl.static_range(COLUMNS // K):
                tile = channels(row, c * sW, live, d0 + k * K, sD, D, K, D % COLUMNS == 0)
                if some_broken:
                    tile = tl.where(sound[None, :], tile, 0.0)
                grown = grown + (dot_features(weight, tl.trans(tile), totals[k]),)  # noqa: RUF005
            totals = grown
        for k in tl.static_range(COLUMNS // K):
            d = d0 + k * K + tl.arange(0, K)
            here = sums + slots[:, None] * D + d[None, :]
            add_fixed(here, totals[k], scale, (slots >= 0)[:, None] & (d < D)[None, :])
        rank0 += CLASSES


@triton.jit(do_not_specialize=["N"])
def _largest_features(
    x,
    strides,
    geometry,
    codes,
    reach,
    N,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    P: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """reach = max |x| over the finite channels of valid pixels. Unnormalised features alone need this read."""
    program = tl.program_id(0)
    layer = layer_of(program, geometry.block)
    b, r0, c0, h, w = block_of(program, geometry, layer, ROWS, P, UNIT, ALIGN)
    image, sH, sW, sD = image_features(x, strides, layer, b, UNIT, ALIGN, WIDE)
    codes += image_codes(geometry, layer, b, h, w)
    c = c0 + tl.arange(0, P)
    live = c < w
    largest = tl.zeros((CHUNK, P), reach.dtype.element_ty)
    for r in range(r0, tl.minimum(r0 + ROWS, h)):
        row = image + tl.cast(r, tl.int64) * sH
        valid = tl.load(codes + (r * w + c), mask=live, other=255).to(tl.int32) < N
        for k in range(0, D, CHUNK):
            size = tl.abs(channels(row, c * sW, live, k, sD, D, CHUNK).to(reach.dtype.element_ty))
            largest = tl.maximum(largest, tl.where(valid[None, :] & (size < float("inf")), size, 0.0))
    tl.atomic_max(reach + pick(geometry.number, layer), tl.max(tl.max(largest, 0), 0), sem="relaxed")


@triton.jit
def _mean(sums, broken, reach, counts, layer, n, d, headroom, N, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """a^n of a layer in float64, and its count."""
    count = tl.load(counts + layer * N + n)
    scale = vector_scale(reach, layer, headroom, NORMALIZE).to(tl.float64)
    total = tl.load(sums + (layer * N + n) * D + d, mask=d < D, other=0).to(tl.float64)
    lost = tl.load(broken + layer * N + n) > 0
    if not NORMALIZE:
        lost = lost | (tl.load(reach + layer) >= LARGEST_REACH)
    return tl.where(lost & (count > 0), float("nan"), total / (scale * tl.maximum(count, 1).to(tl.float64))), count


@triton.jit(do_not_specialize=["headroom", "fusion_weight", "N"])
def _anchor_tables(
    sums,
    broken,
    reach,
    counts,
    table,
    lengths,
    headroom,
    fusion_weight,
    N,
    L: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NORMALIZE_ANCHORS: tl.constexpr,
):
    """One program, one class: â_i = (1 - w_h) a_i + w_h a_I where the class is in both layers, else a_i; 0 where
    layer i lacks it."""
    n = tl.program_id(0)
    d = tl.arange(0, BLOCK)
    w_h = real(fusion_weight)
    top, top_count = _mean(sums, broken, reach, counts, L - 1, n, d, headroom, N, D, NORMALIZE)
    for i in tl.static_range(L):
        anchor, count = _mean(sums, broken, reach, counts, i, n, d, headroom, N, D, NORMALIZE)
        if i < L - 1:
            anchor = tl.where(top_count > 0, (1 - w_h) * anchor + w_h * top, anchor)
        anchor = tl.where(count > 0, anchor, 0.0)
        size = tl.sum(anchor * anchor, 0)
        tl.store(lengths + i * N + n, tl.sqrt(size).to(lengths.dtype.element_ty))
        if NORMALIZE_ANCHORS:
            anchor = anchor * inverse_norm(size, True)
        tl.store(table + (i * N + n) * D + d, anchor.to(table.dtype.element_ty), mask=d < D)
