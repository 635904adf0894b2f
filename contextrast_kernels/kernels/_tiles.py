"""Pieces that the sweeps share, named after what they compute.

A block is a few rows of P pixels of one image, which one program handles; it is not a thread block of CUDA. A sweep
takes one row of it at a time, a tile x (channels, P), in chunks of channels. It reads the row once for what needs the
whole vector (its norm, its products with anchors), and again, then from cache, for what is done with it. B is the
number of images, N of classes, D of channels, P of pixels in a row of a block; a layer has h rows of w pixels. Offsets
and strides are counted in elements.
"""

from typing import Any, NamedTuple

import torch
import triton
from triton import language as tl
from triton.language.target_info import cuda_capability_geq, is_cuda

from contextrast_kernels.kernels._tile_table import TRITON

ZERO_NORM_SQUARED = tl.constexpr(1e-24)
"""The square of ``embedding.ZERO_NORM``."""
LARGEST_MAX_ABS = tl.constexpr(2.0**100)
"""Unnormalised features beyond this have no fixed-point scale: their sums become NaN."""
FLOAT64_DOT = tl.constexpr(TRITON >= (3, 9))
"""Whether tl.dot takes float64. Triton 3.6 cannot compile it for Ampere and Hopper, nor always for Blackwell; 3.9 can;
the versions between were not tried."""
ON_AMD = tl.constexpr(torch.version.hip is not None)
FLOAT32_DOT = tl.constexpr("ieee" if torch.version.hip else "tf32x3")
"""How float32 is multiplied. NVIDIA: three TF32 products, which together have float32's precision. AMD's matrix cores
multiply float32 itself."""


@triton.constexpr_function
def compiled_for_cuda():
    """Return whether a kernel is compiled for an NVIDIA GPU: not for another one, and not interpreted."""
    return is_cuda() and not triton.knobs.runtime.interpret


# -------------------------------------------------------------------------------------------------- layers and blocks


@triton.jit
def float64_from_bits(bits):
    """Return the float64 whose bits a launch passed as an integer (``_launch.float64_bits``)."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def decode_int(number):
    """Return the integer that a launch encoded by ``_launch.encode_ints``."""
    return (number - 3) >> 1


@triton.jit
def program_and_part(D: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the number of a program's block among those of its launch, and which COLUMNS of the channels it sums
    there. Parts of a block run side by side: what one of them reads from memory the others find in cache."""
    PARTS: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    return tl.program_id(0) // PARTS, tl.program_id(0) % PARTS


@triton.jit
def layer_of(program, starts):
    """Return the position in the launch of the layer that a program works on. ``starts`` holds the first program of
    each layer, encoded."""
    layer = 0
    for i in tl.static_range(1, len(starts)):
        layer += (program >= decode_int(starts[i])).to(tl.int32)
    return layer


@triton.jit
def of_layer(numbers, layer):
    """Return the integer of one layer from a tuple that holds one for each layer, encoded."""
    value = numbers[0]
    for i in tl.static_range(1, len(numbers)):
        value = tl.where(layer == i, numbers[i], value)
    return decode_int(value)


@triton.jit
def pointer_of_layer(pointers, layer):
    """Return the pointer of one layer from a tuple that holds one for each layer."""
    value = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        if layer == i:
            value = pointers[i]
    return value


class Image(NamedTuple):
    """One image of a feature map, as a kernel sees it."""

    start: Any
    """A pointer to its first element."""
    h: Any
    """The stride of rows."""
    w: Any
    """The stride of pixels in a row."""
    d: Any
    """The stride of channels."""


class Block(NamedTuple):
    """The block of a program: rows r0 .. r1-1 and at most P columns of one image of one layer."""

    layer: Any
    """The position of the layer in the launch."""
    number: Any
    """The number of the layer in the tables (layers, N, D)."""
    index: Any
    """The position of the block among those of the layer."""
    b: Any
    """The number of the image in the batch."""
    image: Any
    """The features of the image, an ``Image``."""
    pixel: Any
    """The offset of the image in maps with one number a pixel."""
    r0: Any
    r1: Any
    w: Any
    """The width of the image."""
    c: Any
    """(P,): the columns of the block."""
    live: Any
    """(P,): whether a column is inside of the image."""


class Row(NamedTuple):
    """A row of pixels of a block in a feature map."""

    start: Any
    """A pointer to the first pixel of the image's row."""
    pixel: Any
    """(P,): the offset of each pixel in the row."""
    live: Any
    """(P,): whether a pixel is inside of the image."""
    d: Any
    """The stride of channels."""


@triton.jit
def open_block(maps, geometry, program, ROWS: tl.constexpr, P: tl.constexpr, LAYOUT: tl.constexpr):
    """Return the ``Block`` of a program. The product of the width with LAYOUT.align tells the compiler what divides
    it, and so the mask at the end of a row."""
    layer = layer_of(program, geometry.block)
    index = program - of_layer(geometry.block, layer)
    h = of_layer(geometry.h, layer)
    w = of_layer(geometry.w, layer)
    if LAYOUT.unit == "w":
        w = w * LAYOUT.align
    across = tl.cdiv(w, P)
    blocks = across * tl.cdiv(h, ROWS)
    b = index // blocks
    in_image = index % blocks
    pixel = tl.cast(of_layer(geometry.pixel, layer), tl.int64) + tl.cast(b, tl.int64) * h * w
    r0 = (in_image // across) * ROWS
    c = (in_image % across) * P + tl.arange(0, P)
    return Block(
        layer,
        of_layer(geometry.number, layer),
        index,
        b,
        image_of(maps, layer, b, LAYOUT),
        pixel,
        r0,
        tl.minimum(r0 + ROWS, h),
        w,
        c,
        c < w,
    )


@triton.jit
def image_of(maps, layer, b, LAYOUT: tl.constexpr):
    """Return image b of a layer, an ``Image``. The products with LAYOUT.align tell the compiler what divides the
    strides. Offsets inside an image have 32 bits unless LAYOUT.wide."""
    start = pointer_of_layer(maps.start, layer) + tl.cast(b, tl.int64) * (
        tl.cast(of_layer(maps.strides.b, layer), tl.int64) * LAYOUT.align
    )
    h = of_layer(maps.strides.h, layer)
    w = of_layer(maps.strides.w, layer)
    d = of_layer(maps.strides.d, layer)
    if LAYOUT.wide:
        h = tl.cast(h, tl.int64)
        w = tl.cast(w, tl.int64)
        d = tl.cast(d, tl.int64)
    h = h * LAYOUT.align
    w = w * LAYOUT.align
    d = d * LAYOUT.align
    one = tl.full((), 1, tl.int32)
    if LAYOUT.unit == "w":
        return Image(start, h, one, d)
    elif LAYOUT.unit == "d":
        return Image(start, h, w, one)
    else:
        return Image(start, h, w, d)


@triton.jit
def row_of(image, block, r):
    """Return row r of a block in an image, a ``Row``."""
    return Row(image.start + tl.cast(r, tl.int64) * image.h, block.c * image.w, block.live, image.d)


@triton.jit
def in_map(numbers, block, r):
    """Return pointers to the numbers of row r of a block in a map with one number a pixel of all layers, (P,)."""
    return numbers + block.pixel + (r * block.w + block.c)


@triton.jit
def row_codes(codes, block, r):
    """Return the codes of row r of a block, int32 (P,), which are no class outside of the image."""
    return tl.load(in_map(codes, block, r), mask=block.live, other=32767).to(tl.int32)


@triton.jit
def row_flags(flags, block, r):
    """Return whether the pixels of row r of a block are marked, (P,)."""
    return tl.load(in_map(flags, block, r), mask=block.live, other=0) != 0


# ------------------------------------------------------------------------------------------------ pixels and channels


@triton.jit
def channels(row, d0, D: tl.constexpr, CHUNK: tl.constexpr, WITHIN: tl.constexpr = True):
    """Return channels d0 .. d0+CHUNK-1 of a row of pixels, (CHUNK, P), with zeros beyond D and outside of the image.
    Where pixels lie side by side, ``row.live`` may depend on the position alone: a mask that changes from pixel to
    pixel would break the wide loads. WITHIN: no chunk begins beyond D, as one may where programs share out the
    channels."""
    d = d0 + tl.arange(0, CHUNK)
    here = row.start + (d[:, None] * row.d + row.pixel[None, :])
    if D % CHUNK == 0 and WITHIN:
        return tl.load(here, mask=row.live[None, :], other=0.0)
    else:
        return tl.load(here, mask=row.live[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def store_channels(row, d0, tile, D: tl.constexpr, CHUNK: tl.constexpr):
    """Writes channels d0 .. d0+CHUNK-1 of a row of pixels from a tile (CHUNK, P)."""
    d = d0 + tl.arange(0, CHUNK)
    here = row.start + (d[:, None] * row.d + row.pixel[None, :])
    if D % CHUNK == 0:
        tl.store(here, tile, mask=row.live[None, :])
    else:
        tl.store(here, tile, mask=row.live[None, :] & (d < D)[:, None])


@triton.jit
def table_rows(table, rows, live, d0, D: tl.constexpr, CHUNK: tl.constexpr):
    """Return columns d0 .. d0+CHUNK-1 of one row of a table (N, D) for each pixel, (CHUNK, P), with zeros beyond D and
    for pixels that are not live."""
    d = d0 + tl.arange(0, CHUNK)
    if D % CHUNK == 0:
        return tl.load(table + (rows[None, :] * D + d[:, None]), mask=live[None, :], other=0.0)
    else:
        return tl.load(table + (rows[None, :] * D + d[:, None]), mask=live[None, :] & (d < D)[:, None], other=0.0)


@triton.jit
def class_rows(table, classes, d0, D: tl.constexpr, CHUNK: tl.constexpr):
    """Return columns d0 .. d0+CHUNK-1 of the rows of some classes in a table (N, D), (classes, CHUNK). The class -1
    has a row of zeros."""
    d = d0 + tl.arange(0, CHUNK)
    return tl.load(
        table + (classes[:, None] * D + d[None, :]), mask=(classes >= 0)[:, None] & (d < D)[None, :], other=0.0
    )


@triton.jit
def size_term(x, NORMALIZE: tl.constexpr):
    """Return what sums to ‖x‖² over the channels; without normalisation, to 0, or to NaN where a channel is not
    finite."""
    if NORMALIZE:
        return x * x
    else:
        return x * 0.0


@triton.jit
def is_finite(size):
    """Return whether a pixel's vector is finite, from its summed ``size_term``."""
    return size < float("inf")


@triton.jit
def inverse_norm(size, NORMALIZE: tl.constexpr):
    """Return r of v = r x from the summed ``size_term``: 1/‖x‖, or 0 for a vector without direction; 1 without
    normalisation."""
    if NORMALIZE:
        vanishes = size <= ZERO_NORM_SQUARED
        return tl.where(vanishes, 0.0, tl.rsqrt(tl.where(vanishes, 1.0, size)))
    else:
        return size + 1.0


@triton.jit
def dot_features(a, x, acc, PIECES: tl.constexpr = 3, CHAINED: tl.constexpr = False):
    """Return acc + a · x to float32's precision. a (M, K) has the accumulator's type. x (K, ·) holds features, which
    are operands of the tensor-core product as they are; all weights are in the smaller operand a.

    bfloat16: a in PIECES pieces; three hold all of its bits, two hold 16 or more. float16: two TF32 pieces, since a
    may leave float16's range and x is exact in TF32; the first has 8 bits, so that most sums of its products are exact
    in float32. float32: three TF32 products. float64: as it is. On AMD float16 and float32 are multiplied in float32.

    Tensor cores truncate the accumulator after every few products, which shrinks a long sum. A sum here starts at zero
    with the smallest pieces and is added to acc in float32, rounded to nearest. CHAINED saves that addition where only
    16 bits of the sum are kept.
    """
    if x.dtype == tl.bfloat16:
        high = a.to(tl.bfloat16)
        rest = a - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        if CHAINED:
            return tl.dot(high, x, tl.dot(middle, x, acc))
        if PIECES == 3:
            small = tl.dot(middle, x, tl.dot((rest - middle.to(tl.float32)).to(tl.bfloat16), x))
        else:
            small = tl.dot(middle, x)
        return acc + tl.dot(high, x, small)
    elif x.dtype == tl.float16 and not ON_AMD:
        exact = x.to(tl.float32)
        high = a.to(tl.bfloat16).to(tl.float32)
        if CHAINED:
            return tl.dot(high, exact, tl.dot(a - high, exact, acc, input_precision="tf32"), input_precision="tf32")
        return acc + tl.dot(high, exact, tl.dot(a - high, exact, input_precision="tf32"), input_precision="tf32")
    elif x.dtype != tl.float64:
        # Triton's three products start at zero as well, the smallest first, and are then added to acc.
        return tl.dot(a, x.to(tl.float32), acc, input_precision=FLOAT32_DOT)
    else:
        return dot_float64(a, x, acc)


@triton.jit
def dot_float32(a, x, acc):
    """Return acc + a · x of float32, for a (M, K) and x (K, ·), from six products of bfloat16 pieces: as many
    operations as three TF32 products. The largest products have 16 bits and are summed alone, so that tensor cores
    truncate hardly any bits of their sum. TF32's products have 22 bits, and their truncated sums shrink s by 1e-7."""
    a1, a2 = two_pieces(a)
    x1, x2 = two_pieces(x)
    a3 = (a - a1.to(tl.float32) - a2.to(tl.float32)).to(tl.bfloat16)
    x3 = (x - x1.to(tl.float32) - x2.to(tl.float32)).to(tl.bfloat16)
    small = tl.dot(a1, x2, tl.dot(a2, x1, tl.dot(a3, x1, tl.dot(a1, x3, tl.dot(a2, x2)))))
    return acc + (tl.dot(a1, x1) + small)


@triton.jit
def dot_float64(a, x, acc):
    """Return acc + a · x of float64, for a (M, K) and x (K, ·)."""
    if FLOAT64_DOT:
        return tl.dot(a, x, acc, input_precision="ieee", out_dtype=tl.float64)
    else:
        return acc + tl.sum(a[:, :, None] * x[None, :, :], 1)


@triton.jit
def summed_size(row, D: tl.constexpr, CHUNK: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr):
    """Return the summed ``size_term`` of a row of pixels, (P,). This is the first read of the row, with many loads in
    flight."""
    sizes = tl.zeros((CHUNK, row.live.shape[0]), ACC)
    for k in tl.range(0, D, CHUNK, loop_unroll_factor=8):
        sizes += size_term(channels(row, k, D, CHUNK).to(ACC), NORMALIZE)
    return tl.sum(sizes, 0)


@triton.jit
def anchor_products(row, table, classes, D: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """Return ⟨x, â⟩ of a row of pixels, which comes from cache, and some classes, (classes, P). s is ⟨x, â⟩ r / τ.
    Ampere's tensor cores truncate the accumulator after every 8 products, so that a third piece is needed to stay
    exact; Hopper's truncate after 16."""
    PIECES: tl.constexpr = 2 if cuda_capability_geq(9) else 3
    products = tl.zeros((classes.shape[0], row.live.shape[0]), ACC)
    for k in range(0, D, K):
        anchors = class_rows(table, classes, k, D, K)
        tile = channels(row, k, D, K)
        if tile.dtype == tl.float32 and compiled_for_cuda():
            products = dot_float32(anchors, tile, products)
        else:
            products = dot_features(anchors, tile, products, PIECES)
    return products


@triton.jit
def rounded(product):
    """Return a product, rounded to its type. Without it the compiler would use a fused multiply-add for s - Z. Then
    exp(s - Z) would differ from 1, by the rounding error of s, where one negative dominates Z."""
    if product.dtype == tl.float32 and compiled_for_cuda():
        product = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [product], tl.float32, is_pure=True, pack=1)
    return product


@triton.jit
def is_negative(classes, label, negative, is_base):
    """Return whether each pixel is a negative of each class, (classes, P); none is of the class -1. Ignored pixels
    have neither e nor base."""
    chosen = classes[:, None] == negative[None, :]
    return (chosen | (is_base[None, :] & (classes[:, None] != label[None, :]))) & (classes >= 0)[:, None]


@triton.jit
def hard_share(similarity, Z, negative, N):
    """Return exp(s - Z), the share of each hard negative in the sum of its class, (P,); 1 for a pixel that is none.
    ``similarity`` points to s of each pixel, ``Z`` to those of the layer."""
    is_hard = negative < N
    s = tl.load(similarity, mask=is_hard, other=0.0)
    return tl.exp(s - tl.load(Z + negative, mask=is_hard, other=0.0))


# ------------------------------------------------------------------------------------------------- classes of a block


@triton.jit
def block_classes(codes, more, block, rank0, N, ROWS: tl.constexpr, BINS: tl.constexpr, CLASSES: tl.constexpr):
    """Return the distinct classes in a block of one or two code maps, in ascending order: (CLASSES,) of them from the
    rank0-th on, padded with -1, and the number of all.

    A block of a real label map holds a handful of classes: sums over them need CLASSES rows, not N. A block with more
    classes takes further rounds.
    """
    P: tl.constexpr = block.c.shape[0]
    r = block.r0 + tl.arange(0, ROWS)
    inside = (r < block.r1)[:, None] & block.live[None, :]
    here = block.pixel + (r[:, None] * block.w + block.c[None, :])
    code = tl.load(codes + here, mask=inside, other=BINS).to(tl.int32)
    code = tl.reshape(tl.where(inside, code, BINS), (ROWS * P,))
    n = tl.arange(0, BINS)
    found = tl.histogram(code, BINS, mask=code < N)
    if more is not None:
        code = tl.load(more + here, mask=inside, other=BINS).to(tl.int32)
        code = tl.reshape(tl.where(inside, code, BINS), (ROWS * P,))
        found += tl.histogram(code, BINS, mask=code < N)
    present = (found > 0).to(tl.int32)
    rank = tl.cumsum(present, 0) - 1 - rank0
    slot = tl.arange(0, CLASSES)
    of_slot = (present > 0)[None, :] & (rank[None, :] == slot[:, None])
    return tl.max(tl.where(of_slot, n[None, :], -1), 1), tl.sum(present, 0)


# ------------------------------------------------------------------------------------------------------- copied rows
# Rows of 64 bfloat16 pixels are copied to shared memory asynchronously, one row ahead. Hopper's tensor cores read them
# there in both orientations. See ``_tile_table.copies_rows``.


@triton.jit
def all_finite(norms, block, ROWS: tl.constexpr):
    """Return whether all vectors of a block are finite. The kept norms are NaN where a vector is not."""
    r = block.r0 + tl.arange(0, ROWS)
    inside = (r < block.r1)[:, None] & block.live[None, :]
    here = block.pixel + (r[:, None] * block.w + block.c[None, :])
    norm = tl.load(norms + here, mask=inside, other=0.0)
    return tl.max(tl.max((norm != norm).to(tl.int32), 0), 0) == 0


@triton.jit
def again(number, r):
    """Return the same int32, hidden from the compiler behind a loop's r: what is computed from it stays in the loop,
    where it takes a few instructions, and does not fill registers across it."""
    if compiled_for_cuda():
        number = tl.inline_asm_elementwise(
            "mov.b32 $0, $1; // $2", "=r,r,r", [number, r], tl.int32, is_pure=True, pack=1
        )
    return number


@triton.jit
def row_again(image, block, r, LAYOUT: tl.constexpr):
    """Return ``row_of``, with the strides of pixels and channels hidden by ``again``."""
    start = image.start + tl.cast(r, tl.int64) * image.h
    if LAYOUT.unit == "w":
        d = again(image.d // LAYOUT.align, r) * LAYOUT.align
        return Row(start, block.c * image.w, block.live, d)
    else:
        w = again(image.w // LAYOUT.align, r) * LAYOUT.align
        return Row(start, block.c * w, block.live, image.d)


@triton.jit
def row_tiles(row, D: tl.constexpr, C: tl.constexpr):
    """Return the D channels of a row of pixels as tiles (C, P)."""
    tiles = ()
    for i in tl.static_range(D // C):
        tiles = tiles + (channels(row, i * C, D, C),)  # noqa: RUF005
    return tiles


@triton.jit
def side_by_side(a, b):
    """Return (M, 2 n) with the columns of a (M, n) before those of b (M, n)."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def two_pieces(a):
    """Return two bfloat16 whose sum is a, of float32, to 16 bits."""
    high = a.to(tl.bfloat16)
    return high, (a - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def stacked(a, b):
    """Return (2 M, n) with a (M, n) above b (M, n). Unlike after ``tl.join``, a thread holds neighbouring columns, and
    stores several of them to shared memory at a time."""
    first = (tl.arange(0, 2) == 0)[:, None, None]
    return tl.reshape(tl.where(first, a[None, :, :], b[None, :, :]), (2 * a.shape[0], a.shape[1]))


@triton.jit
def joined(a, b):
    """Return (2 n,) with a (n,) before b (n,)."""
    first = (tl.arange(0, 2) == 0)[:, None]
    return tl.reshape(tl.where(first, a[None, :], b[None, :]), (2 * a.shape[0],))


@triton.jit
def class_pieces(table, classes, d0, D: tl.constexpr, C: tl.constexpr):
    """Return C channels from d0 on of the rows of 16 classes for ``piece_products``, (64, C). Three pieces of bfloat16
    hold all bits of float32; the first of them comes in two halves, each with zeros for the other half's channels."""
    rows = class_rows(table, classes, d0, D, C)
    high, middle = two_pieces(rows)
    third = (rows - high.to(tl.float32) - middle.to(tl.float32)).to(tl.bfloat16)
    in_second = (tl.arange(0, C) >= C // 2)[None, :]
    zero = tl.zeros(high.shape, tl.bfloat16)
    part = tl.arange(0, 4)[:, None, None]
    first = tl.where(
        part == 0, tl.where(in_second, zero, high)[None, :, :], tl.where(in_second, high, zero)[None, :, :]
    )
    rest = tl.where(part == 2, middle[None, :, :], third[None, :, :])
    return tl.reshape(tl.where(part < 2, first, rest), (64, C))


@triton.jit
def row_pieces(table, classes, D: tl.constexpr, C: tl.constexpr):
    """Return ``class_pieces`` of all channels, in tiles (64, C)."""
    tiles = ()
    for i in tl.static_range(D // C):
        tiles = tiles + (class_pieces(table, classes, i * C, D, C),)  # noqa: RUF005
    return tiles


@triton.jit
def piece_products(tile, pieces, products):
    """Return products (P, 16) + ⟨x, â⟩ over the channels of a tile (C, P). Tensor cores truncate the accumulator after
    every few products, so a long sum would shrink: the sums over each half of the channels are added in float32."""
    parts = tl.dot(tl.trans(tile), tl.trans(pieces))
    return products + tl.sum(tl.reshape(parts, (parts.shape[0], 4, 16)), 1)


@triton.jit
def chosen(mask, values):
    """Return a pixel's value where the mask (P, classes) is set, and 0 elsewhere, for values (P,)."""
    return tl.where(mask, values[:, None], tl.zeros(mask.shape, values.dtype))


# ---------------------------------------------------------------------------------------------------- order-free sums


@triton.jit
def power_of_two(exponent):
    """Return 2^exponent in float32, exactly, for exponents between -126 and 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_above(x):
    """Return an integer e with |x| < 2^e, for finite x of size 2^-60 .. 2^126; -60 below."""
    e = ((x.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 126
    return tl.maximum(e, -60)


@triton.jit
def vector_scale(max_abs, layer, scale_exponent, NORMALIZE: tl.constexpr):
    """Return what a sum of embeddings is multiplied with before it becomes an int64, so that it may be added in any
    order with the same bits: 2^scale_exponent where |v| <= 1, which is when v is normalised; else less by the exponent
    of the layer's largest |x|."""
    if NORMALIZE:
        return power_of_two(scale_exponent)
    else:
        return power_of_two(scale_exponent - exponent_above(tl.load(max_abs + layer)))


@triton.jit
def count_scale(count):
    """Return the fixed-point scale of a sum of ``count`` numbers of at most 1, with room for as many roundings."""
    return power_of_two(60 - exponent_above(tl.maximum(count, 1)))


@triton.jit
def sum_scale(max_abs, layer, count, NORMALIZE: tl.constexpr):
    """Return the scale of a sum of ``count`` embeddings with weights of at most 1, with room for as many roundings."""
    return vector_scale(max_abs, layer, 60 - exponent_above(tl.maximum(count, 1)), NORMALIZE)


@triton.jit
def pushed_scale(max_abs, layer, NORMALIZE: tl.constexpr):
    """Return the scale of A⁻, a sum of embeddings with weights that add up to 1."""
    return vector_scale(max_abs, layer, tl.full((), 60, tl.int32), NORMALIZE)


@triton.jit
def term_scale(Z, length, max_abs, layer, count, inverse_temperature, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return the fixed-point scale of Σ softplus(Z_n - s_np) over the ``count`` pixels of a class, whose terms are
    below |Z| + ‖â‖ max‖v‖ / τ + 1, and whether there is one: there is none where Z or â is not finite or an s may
    overflow."""
    longest = 1.0
    if not NORMALIZE:
        longest = tl.load(max_abs + layer) * (D**0.5)
    # An anchor that was normalised is longer than the ``length`` that it had.
    longest *= tl.maximum(length, 1.0)
    bound = tl.where(-float("inf") == Z, 0.0, tl.abs(Z)) + longest * inverse_temperature + 1.0
    known = bound < 2.0**60
    exponent = 60 - exponent_above(tl.maximum(count, 1)) - exponent_above(tl.where(known, bound, 1.0))
    return power_of_two(exponent), known


@triton.jit
def zero_tiles(COUNT: tl.constexpr, M: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr):
    """Return a tuple of COUNT tiles (M, K) of zeros."""
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles = tiles + (tl.zeros((M, K), DTYPE),)  # noqa: RUF005 - tuples grow by + in Triton
    return tiles


@triton.jit
def filled(COUNT: tl.constexpr, M: tl.constexpr, VALUE: tl.constexpr, DTYPE: tl.constexpr):
    """Return a tuple of COUNT vectors (M,) of one value."""
    vectors = ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.full((M,), VALUE, DTYPE),)  # noqa: RUF005
    return vectors


@triton.jit
def nearest(x):
    """Return x rounded to the nearest int64, halves away from zero. Where a float has no bits for a fraction, the last
    bit of x may change."""
    return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int64)


@triton.jit
def add_fixed(pointer, tile, scale, mask):
    """Adds a tile to int64 sums in fixed point, each element multiplied by ``scale``."""
    tl.atomic_add(pointer, nearest(tile * scale), mask=mask, sem="relaxed")


@triton.jit
def in_order(x):
    """Return an int64 above 0 for every x, in the order of the floats, with NaN as the largest, so that a maximum can
    begin at 0. The last bit of a float64 is lost, and with it -inf, which comes back as NaN."""
    bits = x.to(tl.float64).to(tl.int64, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits)
    return (tl.where(x == x, bits, 0x7FF8000000000000) >> 1) + 0x4000000000000000


@triton.jit
def from_order(key, DTYPE: tl.constexpr):
    """Return the float that ``in_order`` made a key of, or -inf for the key 0."""
    bits = (key - 0x4000000000000000) << 1
    x = tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits).to(tl.float64, bitcast=True)
    return tl.where(key == 0, -float("inf"), x).to(DTYPE)


# ---------------------------------------------------------------------------------------------------------- functions


@triton.jit
def sigmoid(t):
    """Return 1 / (1 + e^-t)."""
    return 1.0 / (1.0 + tl.exp(-t))


@triton.jit
def softplus(t):
    """Return log(1 + e^t), to full relative precision also where e^t is tiny: log(1 + u) = log(w) u / (w - 1) with
    w = 1 + u as it is rounded."""
    u = tl.exp(-tl.abs(t))
    w = 1.0 + u
    return tl.maximum(t, 0.0) + tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
