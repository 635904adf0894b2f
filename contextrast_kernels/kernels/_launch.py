"""The host's side of a sweep: which layers share a launch, how their memory lies, and the launch itself.

A Triton kernel sees all layers of a group at once, as tuples of pointers and sizes, picks its own layer first and then runs one
body. What the compiler knows about that body is what holds for every layer of the group, so layers are grouped by how their
features lie in memory: the axis of stride 1 and the power of two that divides all other strides.
"""

import contextlib
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl


class Geometry(NamedTuple):
    """Where each layer of a launch lies; every field is a tuple over the layers."""

    number: Any  # of the layer, in the tables (layers, N, D)
    block: Any  # the layer's first block of the grid
    pixel: Any  # the layer's first pixel in the code maps
    h: Any
    w: Any


class Strides(NamedTuple):
    """Strides of the layers' feature maps in units of ``align`` elements; every field is a tuple over the layers."""

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
    """A power of two, at most 16, that divides all other strides; with an address divisible by 16 it widens the loads."""
    aligned: bool
    wide: bool
    """Offsets inside one image need 64 bits."""


def layout(x: Tensor) -> Layout:
    stride = dict(zip("bdhw", x.stride(), strict=True))
    unit = "d" if stride["d"] == 1 else "w" if stride["w"] == 1 else ""
    others = [stride[axis] for axis, size in zip("bdhw", x.shape, strict=True) if axis != unit and size > 1]
    align = 16
    while unit and any(s % align for s in others):
        align //= 2
    extent = sum(s * (size - 1) for s, size in zip(x.stride()[1:], x.shape[1:], strict=True))
    return Layout(unit, align if unit else 1, x.data_ptr() % 16 == 0 if x.device.type != "meta" else True, extent >= 2**31)


def strides(tensors: Sequence[Tensor], align: int) -> Strides:
    # An axis of size 1 is never stepped along: its stride says nothing.
    def units(x: Tensor, axis: int) -> int:
        return x.stride(axis) // align if x.shape[axis] > 1 else 0

    return Strides(*(tuple(units(x, axis) for x in tensors) for axis in range(4)))


class Group(NamedTuple):
    """Layers that share a launch."""

    layers: tuple[int, ...]
    layouts: tuple[Layout, ...]


def groups(*maps: Sequence[Tensor]) -> list[Group]:
    """Layers grouped by the layouts of all their feature maps (x, and dx where it is written)."""
    found: dict[tuple[Layout, ...], list[int]] = {}
    for i, of_layer in enumerate(zip(*maps, strict=True)):
        if of_layer[0].numel():
            found.setdefault(tuple(layout(x) for x in of_layer), []).append(i)
    return [Group(tuple(layers), layouts) for layouts, layers in found.items()]


def pixel_starts(features: Sequence[Tensor]) -> list[int]:
    """Where each layer begins in the code maps, which hold all layers end to end, and where the last one ends."""
    starts = [0]
    for x in features:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        starts.append(starts[-1] + -(-pixels // 16) * 16)
    return starts


def geometry(features: Sequence[Tensor], layers: Sequence[int], rows: int, columns: int) -> tuple[Geometry, int]:
    """Geometry of blocks of ``rows`` x ``columns`` pixels of one image, and their number."""
    starts = pixel_starts(features)
    block = [0]
    for i in layers:
        batch, _, h, w = features[i].shape
        block.append(block[-1] + batch * triton.cdiv(h, rows) * triton.cdiv(w, columns))
    picked = [features[i] for i in layers]
    return (
        Geometry(
            tuple(layers),
            tuple(block[:-1]),
            tuple(starts[i] for i in layers),
            tuple(x.shape[2] for x in picked),
            tuple(x.shape[3] for x in picked),
        ),
        block[-1],
    )


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
        arguments, tiles: what the kernel takes besides the layers: tensors and numbers, and constants. ``tiles`` has the ROWS
            and P of a block; P shrinks to what the rows need.
        out: feature maps that are written.
        parts: programs of a block.
        share: of the features that is read.
    """
    for group in groups(features, out) if out is not None else groups(features):
        picked = [features[i] for i in group.layers]
        lies = group.layouts[0]
        P = segment(picked, tiles["P"])
        blocks_geometry, blocks = geometry(features, group.layers, tiles["ROWS"], P)
        constants = {
            **tiles,
            "P": P,
            "D": picked[0].shape[1],
            "UNIT": lies.unit,
            "ALIGN": lies.align,
            "WIDE": any(layout_.wide for layout_ in group.layouts),
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
