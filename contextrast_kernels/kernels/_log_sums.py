"""Z_n = log Σ exp(s_np) over the negatives of every anchor n: the phase between the anchors and the loss.

Hard negatives, each of one class, are few: their vectors are read once for s_ep, and all else works on that one number
a pixel. With base pixels a pixel is a negative of many classes, and all features are swept.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._codes import Codes
from contextrast_kernels.kernels._sums import Sums
from contextrast_kernels.kernels._tile_table import PIXELS, RUN, next_power_of_2, tiles_of
from contextrast_kernels.kernels._tiles import (
    Row,
    add_fixed,
    anchor_products,
    channels,
    filled,
    float64_from_bits,
    from_order,
    in_map,
    in_order,
    inverse_norm,
    is_negative,
    layer_of,
    of_layer,
    open_block,
    power_of_two,
    rounded,
    row_codes,
    row_flags,
    row_of,
    size_term,
    summed_size,
    table_rows,
)


def log_sums(
    features: Sequence[Tensor],
    code: Codes,
    sums: Sums,
    table: Tensor,
    temperature: float,
    normalize: bool,
    norms: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return Z (layers, N), -inf where a class has no negative, and the similarity of each hard negative to its anchor,
    in the order of the codes. Ranks combine Z by log-sum-exp. norms: 1/‖x‖ as ``class_sums`` kept it.

    Where a pixel is a negative of one class only, the negatives alone are read (in NCHW the row segments that hold
    one). With base pixels everything is read, and no similarity is kept.
    """
    L, N, D = table.shape
    dtype, shapes = features[0].dtype, _launch.shapes(features)
    shared = {"e": code.e, "table": table, "temperature": _launch.float64_bits(temperature), "N": N}
    constants = {"NORMALIZE": normalize, "ACC": _launch.triton_type(table.dtype)}
    Z = torch.empty(L, N, dtype=table.dtype, device=table.device)
    if code.base is None:
        similarity = torch.empty(code.e.shape, dtype=table.dtype, device=table.device)
        _launch.sweep(
            _hard_similarities,
            features,
            {**shared, "norms": norms, "similarity": similarity, "largest": sums.largest},
            tiles_of("_hard_similarities", dtype, D),
            constants,
        )
        runs, blocks = _launch.flat_geometry(shapes, PIXELS)
        scale_exponent = _launch.scale_exponent(_launch.pixels(shapes))
        both = {"largest": sums.largest, "total": sums.total, "scale_exponent": scale_exponent, "N": N}
        _launch.launch(
            _exponentials,
            (blocks,),
            {**both, "e": code.e, "similarity": similarity, "geometry": runs, "B": features[0].shape[0]},
            {"PIXELS": PIXELS},
        )
        _launch.launch(_hard_log_sums, (L,), {**both, "Z": Z}, {"BINS": next_power_of_2(N)})
        return Z, similarity
    tiles = tiles_of("_dense_similarities", dtype, D)
    tiles = tiles._replace(CLASSES=min(tiles.CLASSES, max(16, next_power_of_2(N))))
    blocks = _launch.blocks_of_layers(features, tiles)
    first = [sum(blocks[:i]) for i in range(L)]
    partial = torch.empty(2, sum(blocks), N, dtype=table.dtype, device=table.device)
    _launch.sweep(
        _dense_similarities,
        features,
        {
            **shared,
            "y": code.y,
            "base": code.base,
            "partial": partial,
            "partial_start": _launch.encode_ints(first),
            "partials": sum(blocks),
        },
        tiles,
        {**constants, "ROUNDS": _launch.ceil_div(N, tiles.CLASSES)},
    )
    _launch.launch(
        _dense_log_sums,
        (L, N),
        {
            "partial": partial,
            "first": _launch.encode_ints(first),
            "count": _launch.encode_ints(blocks),
            "partials": sum(blocks),
            "Z": Z,
            "N": N,
        },
        {"RUN": RUN, **_launch.UNFUSED},
    )
    return Z, None


@triton.jit(do_not_specialize=["temperature", "N"])
def _hard_similarities(
    x,
    geometry,
    e,
    norms,
    table,
    similarity,
    largest,
    temperature,
    N,
    D: tl.constexpr,
    TILES: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes one block (ROWS rows of P pixels of one image), writes s_ep of its hard negatives (0
    elsewhere), and raises the largest s of every class.
    norms: 1/‖x‖ of every pixel, or None to compute it.

    In channels_last the kernel reads the negatives' own vectors; in NCHW, where single pixels cannot be read for less
    than their memory sector, the rows of P pixels that hold a negative. It writes one number a pixel.
    """
    P: tl.constexpr = TILES.P
    CHUNK: tl.constexpr = TILES.CHUNK
    block = open_block(x, geometry, tl.program_id(0), TILES.ROWS, P, LAYOUT)
    table += block.number * N * D
    largest += block.number * N
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    for r in range(block.r0, block.r1):
        row = row_of(block.image, block, r)
        negative = row_codes(e, block, r)
        is_hard = negative < N
        if LAYOUT.unit == "d":
            row = Row(row.start, row.pixel, is_hard, row.d)
        s = tl.zeros((P,), ACC)
        if tl.max(is_hard.to(tl.int32), 0) > 0:
            sizes = tl.zeros((CHUNK, P), ACC)
            products = tl.zeros((CHUNK, P), ACC)
            for k in tl.range(0, D, CHUNK, loop_unroll_factor=8):
                tile = channels(row, k, D, CHUNK).to(ACC)
                if norms is None:
                    sizes += size_term(tile, NORMALIZE)
                products += tile * table_rows(table, negative, is_hard, k, D, CHUNK)
            if norms is None:
                norm = inverse_norm(tl.sum(sizes, 0), NORMALIZE)
            else:
                norm = tl.load(in_map(norms, block, r), mask=is_hard, other=0.0)
                norm = tl.where(norm == norm, norm, 0.0)  # as ``inverse_norm``: NaN only where a product is not finite
            s = tl.where(is_hard, tl.sum(products, 0) * norm * inverse_temperature, 0.0)
            tl.atomic_max(largest + negative, in_order(s), mask=is_hard, sem="relaxed")
        tl.store(in_map(similarity, block, r), s, mask=block.live)


@triton.jit(do_not_specialize=["B", "N", "scale_exponent"])
def _exponentials(e, similarity, largest, total, geometry, B, N, scale_exponent, PIXELS: tl.constexpr):
    """Each program takes PIXELS pixels of one layer and adds Σ exp(s_ep - largest_n) [e_p = n] to total[n] in fixed
    point. Every term is at most 1, and one of them is 1."""
    program = tl.program_id(0)
    layer = layer_of(program, geometry.block)
    number = of_layer(geometry.number, layer)
    pixel = (program - of_layer(geometry.block, layer)).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    live = pixel < tl.cast(of_layer(geometry.h, layer), tl.int64) * of_layer(geometry.w, layer) * B
    pixel += tl.cast(of_layer(geometry.pixel, layer), tl.int64)
    negative = tl.load(e + pixel, mask=live, other=32767).to(tl.int32)
    is_hard = negative < N
    s = tl.load(similarity + pixel, mask=is_hard, other=0.0)
    top = from_order(tl.load(largest + number * N + negative, mask=is_hard, other=0), s.dtype)
    weight = tl.exp(s - tl.where(is_hard, top, 0.0))
    add_fixed(total + number * N + negative, weight, power_of_two(scale_exponent), is_hard)


@triton.jit(do_not_specialize=["scale_exponent", "N"])
def _hard_log_sums(largest, total, Z, scale_exponent, N, BINS: tl.constexpr):
    """Each program takes one layer and writes Z = largest + log Σ exp(s - largest) of all classes."""
    n = tl.arange(0, BINS)
    here = tl.program_id(0) * N + n
    top = from_order(tl.load(largest + here, mask=n < N, other=0), Z.dtype.element_ty)
    weights = tl.load(total + here, mask=n < N, other=0).to(tl.float64) / power_of_two(scale_exponent)
    log_sum = top + tl.log(tl.maximum(weights, 1.0)).to(top.dtype)
    # An infinite or undefined similarity leaves no Z.
    log_sum = tl.where(top < float("inf"), log_sum, float("nan"))
    tl.store(Z + here, log_sum, mask=n < N)


@triton.jit(do_not_specialize=["temperature", "N", "partials"])
def _dense_similarities(
    x,
    geometry,
    y,
    e,
    base,
    table,
    partial,
    partial_start,
    partials,
    temperature,
    N,
    D: tl.constexpr,
    TILES: tl.constexpr,
    ROUNDS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    LAYOUT: tl.constexpr,
    ACC: tl.constexpr,
):
    """Each program takes one block (ROWS rows of P pixels of one image) and writes the log-sum-exp of its negatives of
    every class, as a largest value and a sum relative to it (online, CLASSES classes at a time). All programs write
    (2, blocks, N) numbers, never N x pixels.

    The kernel moves the features once. A row of the block is read for its norms, and from cache in each of ROUNDS
    rounds.
    """
    CLASSES: tl.constexpr = TILES.CLASSES
    block = open_block(x, geometry, tl.program_id(0), TILES.ROWS, TILES.P, LAYOUT)
    table += block.number * N * D
    inverse_temperature = (1.0 / float64_from_bits(temperature)).to(ACC)
    here = (of_layer(partial_start, block.number) + block.index).to(tl.int64) * N
    largest = filled(ROUNDS, CLASSES, -float("inf"), ACC)
    total = filled(ROUNDS, CLASSES, 0.0, ACC)
    for r in range(block.r0, block.r1):
        row = row_of(block.image, block, r)
        label = row_codes(y, block, r)
        negative = row_codes(e, block, r)
        is_base = row_flags(base, block, r)
        norm = inverse_norm(summed_size(row, D, TILES.CHUNK, NORMALIZE, ACC), NORMALIZE)
        new_largest = ()
        new_total = ()
        for i in tl.static_range(ROUNDS):
            n = i * CLASSES + tl.arange(0, CLASSES)
            classes = tl.where(n < N, n, -1)
            s = rounded(anchor_products(row, table, classes, D, TILES.K, ACC) * (norm * inverse_temperature)[None, :])
            s = tl.where(is_negative(classes, label, negative, is_base), s, -float("inf"))
            top = tl.maximum(largest[i], tl.max(s, 1))
            shift = tl.where(top == -float("inf"), 0.0, top)
            added = tl.sum(tl.exp(s - shift[:, None]), 1)
            new_largest = new_largest + (top,)  # noqa: RUF005
            new_total = new_total + (total[i] * tl.exp(largest[i] - shift) + added,)  # noqa: RUF005
        largest = new_largest
        total = new_total
    for i in tl.static_range(ROUNDS):
        n = i * CLASSES + tl.arange(0, CLASSES)
        tl.store(partial + here + n, largest[i], mask=n < N)
        tl.store(partial + tl.cast(partials, tl.int64) * N + here + n, total[i], mask=n < N)


@triton.jit(do_not_specialize=["partials", "N"])
def _dense_log_sums(partial, first, count, partials, Z, N, RUN: tl.constexpr):
    """Each program takes one class of one layer and writes Z from the sums of its blocks, added in a fixed order."""
    layer = tl.program_id(0)
    n = tl.program_id(1)
    start = tl.cast(of_layer(first, layer), tl.int64)
    blocks = of_layer(count, layer)
    largest = tl.full((RUN,), -float("inf"), partial.dtype.element_ty)
    total = tl.zeros((RUN,), partial.dtype.element_ty)
    for i in range(0, blocks, RUN):
        block = i + tl.arange(0, RUN)
        here = (start + block) * N + n
        more = tl.load(partial + here, mask=block < blocks, other=-float("inf"))
        weight = tl.load(partial + tl.cast(partials, tl.int64) * N + here, mask=block < blocks, other=0.0)
        top = tl.maximum(largest, more)
        shift = tl.where(top == -float("inf"), 0.0, top)
        total = total * tl.exp(largest - shift) + weight * tl.exp(more - shift)
        largest = top
    largest_of_all = tl.max(largest, 0)
    shift = tl.where(largest_of_all == -float("inf"), 0.0, largest_of_all)
    log_sum = largest_of_all + tl.log(tl.maximum(tl.sum(total * tl.exp(largest - shift), 0), 1.0))
    broken = tl.max((total != total).to(tl.int32), 0) > 0
    tl.store(Z + layer * N + n, tl.where((largest_of_all < float("inf")) & (broken == 0), log_sum, float("nan")))
