"""Label codes: what every sweep must know of a pixel, in one or two bytes, for all layers in one launch.

    y     the class of the pixel; the largest number of its type where it takes no part
    e     the class whose anchor it is a hard negative of; the largest number for none
    base  1 where it is a negative of every class but its own

Labels keep their own resolution and dtype in memory and are sampled here once, with exact integers, instead of in
each sweep: at stride 4 every int64 label that is read lies in a different memory sector. The kernel also counts the
pixels of each class.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._sums import Sums
from contextrast_kernels.kernels._tile_table import PIXELS, next_power_of_2
from contextrast_kernels.kernels._tiles import decode_int, layer_of, of_layer, pointer_of_layer
from contextrast_kernels.native import code_dtype


class Codes(NamedTuple):
    """Codes of all layers end to end (``_launch.pixel_starts``)."""

    y: Tensor
    e: Tensor
    base: Tensor | None


def codes(
    features: Sequence[Tensor],
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    sums: Sums,
    negatives: Sequence[Tensor] | None = None,
    hard: Tensor | None = None,
    base: Sequence[Tensor] | None = None,
    base_rate: float = 0.0,
    seed: Tensor | None = None,
    volumes: Sequence[int] | None = None,
) -> Codes:
    """Return the codes, and add the number of pixels of every class and of the negatives to ``sums``.

    negatives, base: integer maps (B, h, w) of each layer, as the public functions take them. hard, in the place of
    negatives: e, of which all pixels are valid. base_rate: the share of pixels to draw as base (1: all, and no seed is
    needed). volumes: z, h, w of each layer in turn, where the labels are volumes (B, Z, H, W) and the features
    ``maps.plane_stack`` of volumes.
    """
    device = features[0].device
    dense = base is not None or base_rate > 0
    shapes, depths = _launch.shapes(features), None
    if volumes is not None:
        sides = list(zip(volumes[::3], volumes[1::3], volumes[2::3], strict=True))
        shapes = tuple((*x.shape[:2], z * h, w) for x, (z, h, w) in zip(features, sides, strict=True))
        depths = _launch.encode_ints([z for x, (z, _, _) in zip(features, sides, strict=True) if x.numel()])
    pixels = _launch.pixel_starts(shapes)[-1]
    y = torch.empty(pixels, dtype=code_dtype(num_classes), device=device)
    e = torch.empty_like(y) if hard is None else hard
    base_map = torch.empty(pixels, dtype=torch.uint8, device=device) if dense else None

    code = Codes(y, e, base_map)
    pixel_runs, blocks = _launch.flat_geometry(shapes, PIXELS)
    given = {
        name: None if maps is None else tuple(maps[i].contiguous() for i, x in enumerate(features) if x.numel())
        for name, maps in (("negatives", negatives), ("base_maps", base))
    }
    if not blocks:
        return code
    _launch.launch(
        _label_codes,
        (blocks,),
        {
            "labels": labels,
            "label_strides": _launch.encode_ints(labels.stride()),
            "depths": depths,
            **given,
            "seed": seed,
            "codes": code,
            "counts": sums.counts,
            "drawn": sums.drawn,
            "geometry": pixel_runs,
            "batch": features[0].shape[0],
            "label_sizes": _launch.encode_ints((1 if volumes is None else labels.shape[1], *labels.shape[-2:])),
            "N": num_classes,
            "ignore_index": ignore_index,
            # For an integer hash, hash < rate · 2³² exactly when hash < ⌈rate · 2³²⌉.
            "threshold": math.ceil(base_rate * 2.0**32),
        },
        {
            "DRAW": base is None and 0 < base_rate < 1,
            "NONE": torch.iinfo(y.dtype).max,
            "GIVEN": hard is not None,
            "BINS": next_power_of_2(num_classes),
            "PIXELS": PIXELS,
        },
    )
    return code


@triton.jit
def _mix(x):
    """Return an invertible mixing of 32-bit integers, the same as ``hashing._mix``."""
    x = (x ^ (x >> 15)) * tl.full((), 0x2C1B3C6D, tl.uint32)
    x = (x ^ (x >> 12)) * tl.full((), 0x297A2D39, tl.uint32)
    return x ^ (x >> 15)


@triton.jit
def _hash(seed, stream, pixel):
    """Return ``hashing.pixel_hash`` of an int64 seed and of a uint32 stream and pixels."""
    high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    key = _mix(_mix(_mix(stream + tl.full((), 0x9E3779B9, tl.uint32)) ^ high) ^ low)
    return _mix(pixel ^ key)


@triton.jit(do_not_specialize=["batch", "N", "ignore_index", "threshold"])
def _label_codes(
    labels,
    label_strides,
    depths,
    negatives,
    base_maps,
    seed,
    codes,
    counts,
    drawn,
    geometry,
    batch,
    label_sizes,
    N,
    ignore_index,
    threshold,
    DRAW: tl.constexpr,
    GIVEN: tl.constexpr,
    NONE: tl.constexpr,
    BINS: tl.constexpr,
    PIXELS: tl.constexpr,
):
    """Each program takes PIXELS pixels of one layer, writes their codes, and counts the pixels of each class and the
    negatives.

    The kernel moves one sampled label a pixel (its memory sector in the high layers), and 1 or 2 bytes a pixel for each
    code.
    """
    program = tl.program_id(0)
    layer = layer_of(program, geometry.block)
    number = of_layer(geometry.number, layer)
    h = of_layer(geometry.h, layer)
    w = of_layer(geometry.w, layer)
    pixel = (program - of_layer(geometry.block, layer)).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    image_size = tl.cast(h, tl.int64) * w
    live = pixel < image_size * batch
    b = pixel // image_size
    inside = (pixel - b * image_size).to(tl.int32)
    r = inside // w
    c = inside - r * w

    # 1. The label at row ⌊r H / h⌋, column ⌊c W / w⌋, and in a volume plane ⌊d Z / z⌋. Labels are compared as int64, so
    # that ignore_index=-100 is not equal to the uint8 156.
    Z = decode_int(label_sizes[0])
    H = decode_int(label_sizes[1])
    W = decode_int(label_sizes[2])
    source = b * decode_int(label_strides[0])
    if depths is not None:
        z = of_layer(depths, layer)
        h = h // z  # h was the number of rows of all planes
        d = r // h
        r = r - d * h
        source += (d * Z // z).to(tl.int64) * decode_int(label_strides[1])
    source += (r * H // h).to(tl.int64) * decode_int(label_strides[-2])
    source += (c * W // w).to(tl.int64) * decode_int(label_strides[-1])
    label = tl.load(labels + source, mask=live, other=0).to(tl.int64)
    valid = live & (label >= 0) & (label < N) & (label != ignore_index)
    here = tl.cast(of_layer(geometry.pixel, layer), tl.int64) + pixel
    tl.store(codes.y + here, tl.where(valid, label, NONE).to(codes.y.dtype.element_ty), mask=live)
    n = tl.arange(0, BINS)
    seen = tl.histogram(tl.where(valid, label, 0).to(tl.int32), BINS, mask=valid)
    tl.atomic_add(counts + number * N + n, seen.to(tl.int64), mask=seen > 0, sem="relaxed")

    # 2. Negatives; an ignored pixel is none, whatever a given map says.
    if GIVEN:
        hard = live & (tl.load(codes.e + here, mask=live, other=NONE).to(tl.int32) < N)
    elif negatives is not None:
        negative = tl.load(pointer_of_layer(negatives, layer) + pixel, mask=live, other=-1).to(tl.int64)
        hard = valid & (negative >= 0) & (negative < N)
        tl.store(codes.e + here, tl.where(hard, negative, NONE).to(codes.e.dtype.element_ty), mask=live)
    else:
        hard = valid & (label < 0)
        tl.store(codes.e + here, tl.full((PIXELS,), NONE, tl.int32).to(codes.e.dtype.element_ty), mask=live)
    if codes.base is not None:
        if base_maps is not None:
            is_base = valid & (tl.load(pointer_of_layer(base_maps, layer) + pixel, mask=live, other=0) != 0)
        elif DRAW:
            hashed = _hash(tl.load(seed), (number + 1).to(tl.uint32), inside.to(tl.uint32))
            is_base = valid & (hashed.to(tl.int64) < threshold)
        else:
            is_base = valid
        tl.store(codes.base + here, is_base.to(tl.uint8), mask=live)
        hard = hard | is_base
    tl.atomic_add(drawn + number, tl.sum(hard.to(tl.int64), 0), sem="relaxed")
