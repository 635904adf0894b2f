"""The host's side of a sweep: which layers share a launch, how their memory lies, and the launch itself.

A Triton kernel sees all layers of a group at once, as tuples of pointers and sizes, picks its own layer first and
then runs one body. What the compiler knows about that body is what holds for every layer of the group, so layers
are grouped by how their features lie in memory: the axis of stride 1 and the power of two that divides all other
strides.
"""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from contextrast_kernels.kernels._tile_table import NARROW


class Geometry(NamedTuple):
    """Where each layer of a launch lies; every field is a tuple over the layers, made by ``odd``."""

    number: Any  # of the layer, in the tables (layers, N, D)
    block: Any  # the layer's first block of the grid
    pixel: Any  # the layer's first pixel in the code maps
    h: Any
    w: Any


class Strides(NamedTuple):
    """Strides of the layers' feature maps in units of ``align`` elements; every field is a tuple over the layers,
    made by ``odd``."""

    b: Any
    d: Any
    h: Any
    w: Any


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict
    constants: dict
    reads: int
    """Bytes that must come from memory once, repeated reads being the caches' business."""
    writes: int


_recorded: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside the block launches are listed, not run: tensors may live on the meta device."""
    global _recorded
    previous, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = previous


def launch(kernel, grid: tuple[int, ...], arguments: dict, constants: dict, reads: int = 0, writes: int = 0) -> None:
    if 0 in grid:
        return
    # Triton 3.10 changes the default of enable_fp_fusion; numbers should not move with it.
    constants = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True, **constants}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, reads, writes))
        return
    kernel[grid](**arguments, **constants)


def nbytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def odd(numbers: Sequence[int]) -> tuple[int, ...]:
    """Integers for a tuple argument. Triton compiles a kernel anew when one of them becomes 1 or a multiple of 16;
    as odd numbers above one they never do, and a kernel once compiled serves every size. ``_tiles.plain`` turns
    them back."""
    return tuple(2 * n + 3 for n in numbers)


def bits(value: float) -> int:
    """A Python float reaches a kernel as float32. Its 64 bits, as an integer, reach it whole: see ``_tiles.real``."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def triton_type(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


# ------------------------------------------------------------------------------------------------------------ layouts


class Layout(NamedTuple):
    """What the compiler may know about the memory of a feature map."""

    unit: str
    """The axis of stride 1: "w" (NCHW), "d" (channels_last), or "" for neither."""
    align: int
    """A power of two that divides all other strides, and the width where w has stride 1: so many elements can be
    read at once wherever a row begins. No more than 16 bytes' worth."""
    aligned: bool
    """The first address is divisible by 16."""
    wide: bool
    """Offsets inside one image need 64 bits."""


def layout(x: Tensor) -> Layout:
    stride = dict(zip("bdhw", x.stride(), strict=True))
    unit = "d" if stride["d"] == 1 else "w" if stride["w"] == 1 else ""
    steps = [stride[axis] for axis, size in zip("bdhw", x.shape, strict=True) if axis != unit and size > 1]
    if unit == "w":
        steps.append(x.shape[3])
    align = 16 // x.element_size() if unit else 1
    while any(s % align for s in steps):
        align //= 2
    extent = sum(s * (size - 1) for s, size in zip(x.stride()[1:], x.shape[1:], strict=True))
    return Layout(unit, align, address(x) % 16 == 0, extent >= 2**31)


def address(x: Tensor) -> int:
    return x.storage_offset() * x.element_size() if x.device.type == "meta" else x.data_ptr()


def strides(tensors: Sequence[Tensor], align: int) -> Strides:
    # An axis of size 1 is never stepped along: its stride says nothing.
    def units(x: Tensor, axis: int) -> int:
        return x.stride(axis) // align if x.shape[axis] > 1 else 0

    return Strides(*(odd([units(x, axis) for x in tensors]) for axis in range(4)))


class Group(NamedTuple):
    """Layers that share a launch."""

    layers: tuple[int, ...]
    layouts: tuple[Layout, ...]
    """What holds for all of them: of x, and of dx where it is written."""


def groups(*maps: Sequence[Tensor]) -> list[Group]:
    """Layers grouped by the layouts of all their feature maps. Those that cannot be read 16 bytes at a time share
    one group with the smallest alignment among them: they are few and small."""
    found: dict[tuple, tuple[list[int], list[tuple[Layout, ...]]]] = {}
    for i, of_layer in enumerate(zip(*maps, strict=True)):
        if of_layer[0].numel():
            layouts = tuple(layout(x) for x in of_layer)
            kind = tuple(lies._replace(align=lies.align * x.element_size() == 16) for lies, x in zip(layouts, of_layer))
            layers, members = found.setdefault(kind, ([], []))
            layers.append(i)
            members.append(layouts)
    return [
        Group(tuple(layers), tuple(min(of_map, key=lambda lies: lies.align) for of_map in zip(*members)))
        for layers, members in found.values()
    ]


def pixel_starts(features: Sequence[Tensor]) -> list[int]:
    """Where each layer begins in the code maps, which hold all layers end to end, and where the last one ends."""
    starts = [0]
    for x in features:
        starts.append(starts[-1] + pixels(x))
    return starts


def geometry(
    features: Sequence[Tensor], layers: Sequence[int], rows: int, columns: int, align: int
) -> tuple[Geometry, int]:
    """Geometry of blocks of ``rows`` x ``columns`` pixels of one image, and their number. Widths are in units of
    ``align``."""
    starts = pixel_starts(features)
    block = [0]
    for i in layers:
        batch, _, h, w = features[i].shape
        block.append(block[-1] + batch * triton.cdiv(h, rows) * triton.cdiv(w, columns))
    picked = [features[i] for i in layers]
    heights, widths = [x.shape[2] for x in picked], [x.shape[3] // align for x in picked]
    return Geometry(*map(odd, (layers, block[:-1], [starts[i] for i in layers], heights, widths))), block[-1]


def flat_geometry(features: Sequence[Tensor], run: int) -> tuple[Geometry, int]:
    """Geometry of runs of ``run`` pixels, regardless of rows and images, and their number."""
    layers = [i for i, x in enumerate(features) if x.numel()]
    starts = pixel_starts(features)
    blocks, first = 0, []
    for i in layers:
        first.append(blocks)
        blocks += triton.cdiv(pixels(features[i]), run)
    sizes = [features[i].shape[2:] for i in layers]
    picked = (layers, first, [starts[i] for i in layers], [h for h, _ in sizes], [w for _, w in sizes])
    return Geometry(*map(odd, picked)), blocks


def pixels(*features: Tensor) -> int:
    """Pixels of the largest layer."""
    return max(x.shape[0] * x.shape[2] * x.shape[3] for x in features)


def blocks_of_layers(features: Sequence[Tensor], tiles: dict) -> list[int]:
    """Blocks of each layer in a sweep with these tiles."""
    P = segment(features, tiles["P"])
    return [x.shape[0] * triton.cdiv(x.shape[2], tiles["ROWS"]) * triton.cdiv(x.shape[3], P) for x in features]


def segment(features: Sequence[Tensor], longest: int) -> int:
    """Pixels of a row that a program takes at a time: a power of two, no longer than the rows need."""
    return min(longest, max(16, triton.next_power_of_2(max(x.shape[3] for x in features))))


def headroom(pixels: int) -> int:
    """Sums of ``pixels`` numbers of size 1 fit into int64 when each is scaled by two to this power."""
    return 61 - max(pixels, 1).bit_length()


# ------------------------------------------------------------------------------------------------------------ sweeps


def sweep(
    kernel,
    features: Sequence[Tensor],
    arguments: dict,
    tiles: dict,
    *,
    out: Sequence[Tensor] | None = None,
    parts: int = 1,
    share: float = 1.0,
) -> None:
    """Launches a kernel over all blocks of all layers, once for each group of layers whose memory lies alike.

    Args:
        arguments, tiles: what the kernel takes besides the layers: tensors and numbers, and constants. ``tiles`` has
            the ROWS and P of a block; P shrinks to what the rows need.
        out: feature maps that are written.
        parts: programs of a block.
        share: of the features that is read.
    """
    for group in groups(features, out) if out is not None else groups(features):
        picked = [features[i] for i in group.layers]
        lies = group.layouts[0]
        readable = lies.align * picked[0].element_size() == 16
        P = segment(features, tiles["P"] if readable else min(tiles["P"], NARROW))
        width_unit = lies.align if lies.unit == "w" else 1
        blocks_geometry, blocks = geometry(features, group.layers, tiles["ROWS"], P, width_unit)
        constants = {
            **tiles,
            "P": P,
            "D": picked[0].shape[1],
            "UNIT": lies.unit,
            "ALIGN": lies.align,
            "WIDE": any(of_map.wide for of_map in group.layouts),
        }
        given = {"x": tuple(picked), "strides": strides(picked, lies.align), "geometry": blocks_geometry, **arguments}
        if out is not None:
            written, lies = [out[i] for i in group.layers], group.layouts[1]
            given |= {"out": tuple(written), "out_strides": strides(written, lies.align)}
            constants |= {"OUT_UNIT": lies.unit, "OUT_ALIGN": lies.align}
        launch(
            kernel,
            (blocks, parts),
            given,
            constants,
            reads=round(share * nbytes(*picked)),
            writes=nbytes(*written) if out is not None else 0,
        )
