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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from contextrast_kernels.kernels._tile_table import NARROW, next_power_of_2

UNFUSED = {"enable_fp_fusion": False}
"""For kernels whose threads all store one number that they reduced. Fused into the first step of a reduction, a product
is rounded in one of two lanes only, and their sums differ in the last bit."""

COMPILED_WITH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
"""Defaults of all kernels. Triton 3.10 changes that of enable_fp_fusion; numbers should not move with it."""

CACHED = 256
"""Different sets of feature maps whose places are remembered."""


class Geometry(NamedTuple):
    """Where each layer of a launch is; every field is a tuple over the layers, made by ``encode_ints``."""

    number: Any  # of the layer, in the tables (layers, N, D)
    block: Any  # the layer's first block of the grid
    pixel: Any  # the layer's first pixel in the code maps
    h: Any
    w: Any


class Strides(NamedTuple):
    """Strides of the layers' feature maps in units of ``align`` elements; every field is a tuple over the layers,
    made by ``encode_ints``."""

    b: Any
    d: Any
    h: Any
    w: Any


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
    """Launches a kernel, or lists it inside of ``recording``; an empty grid is no launch."""
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
    # Triton finds the compiled kernel by a key that it builds in each call from every argument: most of the
    # host's time. This key is shorter and says as much.
    unspecialized, in_order = _signature(kernel)
    key = (*_what_compiling_depends_on(arguments, unspecialized), *constants.items())
    found = kernel.device_caches[driver.active.get_current_device()][0]
    compiled = found.get(key)
    if compiled is None:
        found[key] = kernel[grid](**arguments, **constants)
    else:
        compiled[(*grid, 1, 1)[:3]](*in_order(arguments | constants))


def _signature(kernel: JITFunction) -> tuple[frozenset[str], Callable[[dict], tuple]]:
    """The integers for which a kernel is not recompiled, and a function that puts all arguments in order."""
    signature = _signatures.get(kernel.fn)
    if signature is None:
        unspecialized = frozenset(parameter.name for parameter in kernel.params if parameter.do_not_specialize)
        in_order = operator.itemgetter(*(parameter.name for parameter in kernel.params))
        signature = _signatures[kernel.fn] = unspecialized, in_order
    return signature


_signatures: dict[Callable, tuple[frozenset[str], Callable[[dict], tuple]]] = {}


def _what_compiling_depends_on(arguments: dict, unspecialized: frozenset[str]) -> list:
    """For each argument what Triton specialises a kernel for, in a form that can be hashed."""
    known = []
    for name, value in arguments.items():
        kind = type(value)
        if isinstance(value, Tensor):
            known += value.dtype, value.data_ptr() % 16 == 0
        elif kind is int and name in unspecialized:
            known.append(-(2**31) <= value < 2**31)
        elif kind in INTEGERS_ALONE:
            known.append(_specialized(value))
        elif isinstance(value, tuple):
            known.append(
                tuple((x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else _specialized(x) for x in value)
            )
        else:
            known.append(_specialized(value))
    return known


@functools.lru_cache(16 * CACHED, typed=True)
def _specialized(value):
    """The width of each integer, whether it is 1, and whether 16 divides it; other values as they are."""
    if isinstance(value, tuple):
        return tuple(map(_specialized, value))
    if type(value) is not int or value == 1:
        return value
    return value % 16 == 0, -(2**31) <= value < 2**31


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def encode_ints(numbers: Sequence[int]) -> tuple[int, ...]:
    """Encode integers for a tuple argument. Triton recompiles a kernel when one of them becomes 1 or a multiple of
    16. The odd numbers above one that this makes of them never do, so a kernel once compiled serves every size.
    ``_tiles.decode_int`` decodes them in a kernel."""
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
# Everything here follows from where tensors lie, which hardly changes from step to step: it is worked out once.


class Place(NamedTuple):
    """The memory of a feature map."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int
    aligned: bool
    """The first address is divisible by 16."""


def places(tensors: Sequence[Tensor]) -> tuple[Place, ...]:
    return tuple(Place(x.shape, x.stride(), x.element_size(), address(x) % 16 == 0) for x in tensors)


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


def layout(x: Place) -> Layout:
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


def strides(maps: Sequence[Place], align: int) -> Strides:
    # An axis of size 1 is never stepped along: its stride says nothing.
    def units(x: Place, axis: int) -> int:
        return x.stride[axis] // align if x.shape[axis] > 1 else 0

    return Strides(*(encode_ints([units(x, axis) for x in maps]) for axis in range(4)))


class Group(NamedTuple):
    """Layers that share a launch."""

    layers: tuple[int, ...]
    layouts: tuple[Layout, ...]
    """What holds for all of them: of x, and of dx where it is written."""


def groups(*maps: Sequence[Place]) -> list[Group]:
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


class Part(NamedTuple):
    """One launch of a sweep: what it takes of the layers it is for."""

    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    """The number of blocks of each of these layers."""
    arguments: dict
    constants: dict
    copied: bool
    """Rows are copied 16 bytes at a time."""


@functools.lru_cache(CACHED)
def launches_of(
    x: tuple[Place, ...], out: tuple[Place, ...] | None, rows: int, longest: int, copied: tuple[int, int] | None = None
) -> list[Part]:
    """A launch for each group of layers with the same memory layout.

    Args:
        rows, longest: a block has ``rows`` rows of at most ``longest`` pixels.
        copied: ROWS and P of the blocks where rows can be copied.
    """
    features, parts = tuple(place.shape for place in x), []
    starts = pixel_starts(features)
    for group in groups(x) if out is None else groups(x, out):
        picked = [x[i] for i in group.layers]
        of_x = group.layouts[0]
        readable = of_x.align * picked[0].itemsize == 16
        wide = any(of_map.wide for of_map in group.layouts)
        copies = copied is not None and readable and all(of_map.aligned for of_map in group.layouts) and not wide
        P = segment(features, longest if readable else min(longest, NARROW))
        if copies:
            rows_of_block, P = copied
        else:
            rows_of_block = rows
        blocks = tuple(
            B * ceil_div(h, rows_of_block) * ceil_div(w, P) for B, _, h, w in (place.shape for place in picked)
        )
        first = list(itertools.accumulate(blocks, initial=0))[:-1]
        width_unit = of_x.align if of_x.unit == "w" else 1
        heights, widths = [place.shape[2] for place in picked], [place.shape[3] // width_unit for place in picked]
        fields = (group.layers, first, [starts[i] for i in group.layers], heights, widths)
        arguments = {"strides": strides(picked, of_x.align), "geometry": Geometry(*map(encode_ints, fields))}
        constants = {"P": P, "D": picked[0].shape[1], "UNIT": of_x.unit, "ALIGN": of_x.align, "WIDE": wide}
        if out is not None:
            of_out = group.layouts[1]
            arguments["out_strides"] = strides([out[i] for i in group.layers], of_out.align)
            constants |= {"OUT_UNIT": of_out.unit, "OUT_ALIGN": of_out.align}
        parts.append(Part(group.layers, blocks, arguments, constants, copies))
    return parts


def blocks_of_layers(features: Sequence[Tensor], tiles: Mapping[str, int]) -> list[int]:
    """How many blocks of each layer a sweep with these tiles takes, in all of its launches."""
    blocks = [0] * len(features)
    for part in launches_of(places(features), None, tiles["ROWS"], tiles["P"]):
        for layer, of_layer in zip(part.layers, part.blocks, strict=True):
            blocks[layer] = of_layer
    return blocks


def sweep(
    kernel,
    features: Sequence[Tensor],
    arguments: dict,
    tiles: dict,
    *,
    out: Sequence[Tensor] | None = None,
    splits: int = 1,
    copied: tuple[Any, dict, dict] | None = None,
) -> None:
    """Launches a kernel over all blocks of all layers, once for each group of layers with the same memory layout.

    Args:
        arguments, tiles: what the kernel takes besides the layers: tensors and numbers, and constants. ``tiles`` has
            the ROWS and P of a block; P shrinks to what the rows need.
        out: feature maps that are written.
        splits: programs of a block, side by side: ``_tiles.program_and_part``.
        copied: the kernel, arguments and tiles for layers whose rows can be copied.
    """
    blocks_of_copies = None if copied is None else (copied[2]["ROWS"], copied[2]["P"])
    general = kernel, arguments, tiles
    for part in launches_of(
        places(features), None if out is None else places(out), tiles["ROWS"], tiles["P"], blocks_of_copies
    ):
        kernel, arguments, tiles = copied if part.copied else general
        picked = tuple(features[i] for i in part.layers)
        written = () if out is None else tuple(out[i] for i in part.layers)
        given = {"x": picked, **part.arguments, **arguments}
        if out is not None:
            given["out"] = written
        # Several threads hold each element of a tile with few channels, and of every tile of float64's products.
        several = part.constants["D"] < 32 or features[0].dtype == torch.float64
        launch(
            kernel,
            (sum(part.blocks) * (1 if part.copied else splits),),
            given,
            {**tiles, **part.constants, **(UNFUSED if several else {})},
        )
