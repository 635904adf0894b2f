"""Host side: group layers by memory layout, choose grids, launch.

A Triton kernel sees all layers of a group at once, as tuples of pointers and sizes, picks its own layer first and
then runs one body. The compiler may assume of this body only what holds for every layer of the group, so layers are
grouped by the memory layout of their features: the axis of stride 1 and the power of two that divides all other
strides.
"""

import contextlib
import functools
import itertools
import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from contextrast_kernels.kernels._tile_table import Tiles, next_power_of_2

UNFUSED = {"enable_fp_fusion": False}
"""For kernels whose threads all store one number that they reduced. Fused into the first step of a reduction, a product
is rounded in one of two lanes only, and their sums differ in the last bit."""

COMPILED_WITH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
"""Defaults of all kernels. Triton 3.10 changes the default of enable_fp_fusion. It is set here, so that results do not
change with the Triton version."""

CACHED = 256
"""Different sets of feature maps whose memory layouts are remembered."""


class Geometry(NamedTuple):
    """Where each layer of a launch is; every field is a tuple over the layers, made by ``encode_ints``."""

    number: Any
    """The number of the layer in the tables (layers, N, D)."""
    block: Any
    """The layer's first block of the grid."""
    pixel: Any
    """The layer's first pixel in the code maps."""
    h: Any
    w: Any
    """The width in units of ``Layout.align`` pixels where w has stride 1, else in pixels."""


class Strides(NamedTuple):
    """Strides of the layers' feature maps in units of ``align`` elements; every field is a tuple over the layers,
    made by ``encode_ints``."""

    b: Any
    d: Any
    h: Any
    w: Any


class Maps(NamedTuple):
    """The feature maps of the layers of a launch."""

    start: Any
    """Pointers to their first elements."""
    strides: Strides


INTEGERS_ALONE = (Geometry, Strides)


class Launch(NamedTuple):
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict
    constants: dict


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


def launch(kernel, grid: tuple[int, ...], arguments: dict, constants: dict) -> None:
    """Launch a kernel, or list the launch inside of ``recording``. An empty grid is no launch."""
    if 0 in grid:
        return
    constants = {**COMPILED_WITH, **constants}
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants))
        return
    # Interpreted, or on AMD, where kernels are also specialised for the size of a tensor.
    if not isinstance(kernel, JITFunction) or torch.version.hip:
        kernel[grid](**arguments, **constants)
        return
    # Triton finds the compiled kernel by a key that it builds in each call from every argument, which takes most of the
    # host's time. This key is shorter and distinguishes the same cases.
    unspecialized, in_order = _signature(kernel)
    key = (*_what_compiling_depends_on(arguments, unspecialized), *constants.items())
    found = kernel.device_caches[driver.active.get_current_device()][0]
    compiled = found.get(key)
    if compiled is None:
        found[key] = kernel[grid](**arguments, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*in_order(arguments | constants))


def _signature(kernel: JITFunction) -> tuple[frozenset[str], Callable[[dict], tuple]]:
    """Return the integers for which a kernel is not recompiled, and a function that puts all arguments in order."""
    signature = _signatures.get(kernel.fn)
    if signature is None:
        unspecialized = frozenset(parameter.name for parameter in kernel.params if parameter.do_not_specialize)
        in_order = operator.itemgetter(*(parameter.name for parameter in kernel.params))
        signature = _signatures[kernel.fn] = unspecialized, in_order
    return signature


_signatures: dict[Callable, tuple[frozenset[str], Callable[[dict], tuple]]] = {}


def _what_compiling_depends_on(arguments: dict, unspecialized: frozenset[str]) -> list:
    """Return for each argument what Triton specialises a kernel for, in a form that can be hashed."""
    known = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            known += value.dtype, value.data_ptr() % 16 == 0
        elif type(value) is int and name in unspecialized:
            known.append(-(2**31) <= value < 2**31)
        elif isinstance(value, tuple):
            _add_known(value, known)
        else:
            known.append(_specialized(value))
    return known


def _add_known(parts: tuple, known: list) -> None:
    """Append what Triton specialises a kernel for in a tuple."""
    if type(parts) in INTEGERS_ALONE:
        known.append(_specialized(parts))
        return
    for part in parts:
        if isinstance(part, Tensor):
            known += part.dtype, part.data_ptr() % 16 == 0
        elif isinstance(part, tuple):
            _add_known(part, known)
        else:
            known.append(_specialized(part))


@functools.lru_cache(16 * CACHED, typed=True)
def _specialized(value):
    """Return the width of each integer, whether it is 1, and whether 16 divides it, and other values as they are."""
    if isinstance(value, tuple):
        return tuple(map(_specialized, value))
    if type(value) is not int or value == 1:
        return value
    return value % 16 == 0, -(2**31) <= value < 2**31


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def encode_ints(numbers: Sequence[int]) -> tuple[int, ...]:
    """Encode integers for a tuple argument. Triton recompiles a kernel when one of them becomes 1 or a multiple of
    16. The encoded numbers are odd and above one, so they are never 1 or a multiple of 16, and the kernel is compiled
    once for all sizes. ``_tiles.decode_int`` decodes them in a kernel."""
    return tuple(2 * n + 3 for n in numbers)


def decode_int(number: int) -> int:
    return (number - 3) >> 1


@functools.lru_cache(CACHED)
def float64_bits(value: float) -> int:
    """Triton passes a Python float as float32. Its 64 bits are passed as an integer instead, which
    ``_tiles.float64_from_bits`` decodes."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def triton_type(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.float64: tl.float64}[dtype]


# ------------------------------------------------------------------------------------------------------------ layouts
# Everything here depends only on the memory layout of the tensors, so it is cached.


class Memory(NamedTuple):
    """Where a feature map lies."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int
    aligned: bool
    """The first address is divisible by 16."""


def memories(tensors: Sequence[Tensor]) -> tuple[Memory, ...]:
    return tuple(Memory(x.shape, x.stride(), x.element_size(), address(x) % 16 == 0) for x in tensors)


def address(x: Tensor) -> int:
    return x.storage_offset() * x.element_size() if x.device.type == "meta" else x.data_ptr()


class Layout(NamedTuple):
    """What the compiler may know about the memory of a feature map."""

    unit: str
    """The axis of stride 1: "w" (NCHW), "d" (channels_last), or "" for neither."""
    align: int
    """A power of two that divides all other strides, and the width where w has stride 1: so many elements can be
    read at once wherever a row begins. No more than 16 bytes' worth."""
    aligned: bool
    wide: bool
    """Offsets inside one image need 64 bits."""


def layout(x: Memory) -> Layout:
    stride = dict(zip("bdhw", x.stride, strict=True))
    unit = "d" if stride["d"] == 1 else "w" if stride["w"] == 1 else ""
    steps = [stride[axis] for axis, size in zip("bdhw", x.shape, strict=True) if axis != unit and size > 1]
    if unit == "w":
        steps.append(x.shape[3])
    align = 16 // x.itemsize if unit else 1
    while any(s % align for s in steps):
        align //= 2
    extent = sum(s * (size - 1) for s, size in zip(x.stride[1:], x.shape[1:], strict=True))
    return Layout(unit, align, x.aligned, extent >= 2**31)


def strides_of(maps: Sequence[Memory], align: int) -> Strides:
    """Return the strides of some feature maps, in units of ``align`` elements."""

    # An axis of size 1 is never stepped along: its stride says nothing.
    def units(x: Memory, axis: int) -> int:
        return x.stride[axis] // align if x.shape[axis] > 1 else 0

    return Strides(*(encode_ints([units(x, axis) for x in maps]) for axis in range(4)))


class Group(NamedTuple):
    """Layers that share a launch."""

    layers: tuple[int, ...]
    layouts: tuple[Layout, ...]
    """What holds for all of them: of x, and of dx where it is written."""


def groups(*maps: Sequence[Memory]) -> list[Group]:
    """Layers grouped by the layouts of all their feature maps. Those that cannot be read 16 bytes at a time share
    one group with the smallest alignment among them: they are few and small."""
    found: dict[tuple, tuple[list[int], list[tuple[Layout, ...]]]] = {}
    for i, of_layer in enumerate(zip(*maps, strict=True)):
        if 0 not in of_layer[0].shape:
            layouts = tuple(layout(x) for x in of_layer)
            kind = tuple(of_map._replace(align=of_map.align * x.itemsize == 16) for of_map, x in zip(layouts, of_layer))
            layers, members = found.setdefault(kind, ([], []))
            layers.append(i)
            members.append(layouts)
    return [
        Group(tuple(layers), tuple(min(of_map, key=lambda layout: layout.align) for of_map in zip(*members)))
        for layers, members in found.values()
    ]


Shapes = tuple[tuple[int, ...], ...]
"""(B, D, h, w) of every layer."""


def shapes(features: Sequence[Tensor]) -> Shapes:
    return tuple(x.shape for x in features)


@functools.lru_cache(CACHED)
def pixel_starts(features: Shapes) -> tuple[int, ...]:
    """Where each layer begins in the code maps, which hold all layers end to end, and where the last one ends."""
    return tuple(itertools.accumulate((B * h * w for B, _, h, w in features), initial=0))


@functools.lru_cache(CACHED)
def flat_geometry(features: Shapes, run: int) -> tuple[Geometry, int]:
    """Geometry of runs of ``run`` pixels, regardless of rows and images, and their number."""
    layers = [i for i, shape in enumerate(features) if 0 not in shape]
    starts = pixel_starts(features)
    blocks, first = 0, []
    for i in layers:
        first.append(blocks)
        blocks += ceil_div(starts[i + 1] - starts[i], run)
    sizes = [features[i][2:] for i in layers]
    picked = (layers, first, [starts[i] for i in layers], [h for h, _ in sizes], [w for _, w in sizes])
    return Geometry(*map(encode_ints, picked)), blocks


def segment(features: Shapes, longest: int) -> int:
    """Pixels of a row that a program takes at a time: a power of two, no longer than the rows need."""
    return min(longest, max(16, next_power_of_2(max(shape[3] for shape in features))))


def pixels(features: Shapes) -> int:
    """Pixels of the largest layer."""
    return max(B * h * w for B, _, h, w in features)


def scale_exponent(pixels: int) -> int:
    """Sums of ``pixels`` numbers of size 1 fit into int64 when each is scaled by two to this power."""
    return 61 - max(pixels, 1).bit_length()


# ------------------------------------------------------------------------------------------------------------ sweeps


class Copied(NamedTuple):
    """What a sweep takes where rows can be copied to shared memory."""

    tiles: Tiles
    arguments: dict
    """Arguments in the place of the general ones."""


class Part(NamedTuple):
    """One launch of a sweep, over the layers of a group."""

    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    """The number of blocks of each of these layers."""
    strides: tuple[Strides, ...]
    """Of x, and of dx where it is written."""
    geometry: Geometry
    constants: dict
    copied: bool
    """Rows are copied 16 bytes at a time."""


@functools.lru_cache(CACHED)
def launches_of(
    x: tuple[Memory, ...], out: tuple[Memory, ...] | None, tiles: Tiles, copied: Tiles | None = None
) -> list[Part]:
    """Return a launch for each group of layers with the same memory layout.

    Args:
        tiles: a block has ``tiles.ROWS`` rows of at most ``tiles.P`` pixels.
        copied: the tiles where rows can be copied; None where that is not asked for.
    """
    parts = []
    shapes = tuple(memory.shape for memory in x)
    starts = pixel_starts(shapes)
    maps = (x,) if out is None else (x, out)
    for group in groups(*maps):
        _, D, _, _ = shapes[group.layers[0]]
        sizes = [(shapes[i][0], *shapes[i][2:]) for i in group.layers]
        x_layout, itemsize = group.layouts[0], x[group.layers[0]].itemsize
        readable = x_layout.align * itemsize == 16
        wide = any(layout.wide for layout in group.layouts)
        copies = copied is not None and readable and all(layout.aligned for layout in group.layouts) and not wide
        group_tiles = (
            copied if copies else tiles._replace(P=segment(shapes, tiles.P if readable else min(tiles.P, tiles.NARROW)))
        )
        blocks = tuple(B * ceil_div(h, group_tiles.ROWS) * ceil_div(w, group_tiles.P) for B, h, w in sizes)
        first = list(itertools.accumulate(blocks, initial=0))[:-1]
        width_unit = x_layout.align if x_layout.unit == "w" else 1
        heights, widths = [h for _, h, _ in sizes], [w // width_unit for _, _, w in sizes]
        geometry = Geometry(
            *map(encode_ints, (group.layers, first, [starts[i] for i in group.layers], heights, widths))
        )
        strides = tuple(
            strides_of([memories[i] for i in group.layers], layout.align)
            for memories, layout in zip(maps, group.layouts)
        )
        names = ("LAYOUT", "OUT_LAYOUT")
        constants: dict[str, Any] = {
            name: layout._replace(wide=wide) for name, layout in zip(names, group.layouts, strict=False)
        }
        constants |= {"D": D, "TILES": group_tiles, "num_warps": group_tiles.num_warps}
        # Several threads hold each element of a tile with few channels, and of every tile of float64's products.
        if D < 32 or itemsize == 8:
            constants |= UNFUSED
        parts.append(Part(group.layers, blocks, strides, geometry, constants, copies))
    return parts


def blocks_of_layers(features: Sequence[Tensor], tiles: Tiles) -> list[int]:
    """Return the number of blocks of each layer in all launches of a sweep with these tiles."""
    blocks = [0] * len(features)
    for part in launches_of(memories(features), None, tiles):
        for layer, number in zip(part.layers, part.blocks, strict=True):
            blocks[layer] = number
    return blocks


def sweep(
    kernel,
    features: Sequence[Tensor],
    arguments: dict,
    tiles: Tiles,
    constants: dict,
    *,
    out: Sequence[Tensor] | None = None,
    splits: int = 1,
    copied: Copied | None = None,
) -> None:
    """Launch a kernel over all blocks of all layers, once for each group of layers with the same memory layout.

    Args:
        arguments, constants: what the kernel takes besides the layers, D and TILES.
        tiles: what a program takes at a time; P shrinks to what the rows need.
        out: feature maps that are written.
        splits: programs of a block, side by side: ``_tiles.program_and_part``.
        copied: what is different for layers whose rows can be copied, which have one program a block.
    """
    x, written = memories(features), None if out is None else memories(out)
    for part in launches_of(x, written, tiles, None if copied is None else copied.tiles):
        maps = {"x": Maps(tuple([features[i] for i in part.layers]), part.strides[0])}
        if out is not None:
            maps["out"] = Maps(tuple([out[i] for i in part.layers]), part.strides[1])
        given, fixed = {**maps, "geometry": part.geometry, **arguments}, {**constants, **part.constants}
        blocks = sum(part.blocks)
        if part.copied:
            given |= copied.arguments
            fixed["COPIED"] = True
        else:
            blocks *= splits
        launch(kernel, (blocks,), given, fixed)
