"""Counter-based randomness: every draw is a pure function of (seed, stream, pixel).

The same seed gives the same draw on every backend and device, bit for bit. A pixel is identified by its index inside
its own image in memory order (row * width + column; in a volume (plane * height + row) * width + column), so a draw
depends on neither the batch nor the rank.
"""

import math

import torch
from torch import Tensor

STREAM_TIES = 0
"""The stream that breaks ties of BANE and orders the semi-hard selection."""
STREAM_BASE = 1
"""Base pixels of layer i are drawn from stream STREAM_BASE + i."""

_LOW_32_BITS = 0xFFFFFFFF


def _mix(x):
    """An invertible mixing of 32-bit integers, held in 64 bits (a Python int or an int64 tensor)."""
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & _LOW_32_BITS
    x = ((x ^ (x >> 12)) * 0x297A2D39) & _LOW_32_BITS
    return x ^ (x >> 15)


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """The seed, a number or a tensor on this device, as an int64 scalar on the device.

    A number is filled in on the device, because a copy from the host would synchronise.
    """
    if isinstance(seed, Tensor):
        return seed if seed.ndim == 0 else seed.reshape(())
    return torch.full((), seed, dtype=torch.int64, device=device)


def pixel_hash(seed: int | Tensor, stream: int, pixels: Tensor) -> Tensor:
    """Hash of each pixel index: int64 in [0, 2**32), of the shape of ``pixels`` (int64).

    ``seed`` is an int64 number or tensor of one element. For a fixed (seed, stream) the map is a bijection of the
    32-bit integers, so no two pixels of an image ever tie.
    """
    if isinstance(seed, Tensor):
        seed = seed_tensor(seed, pixels.device)
    high, low = (seed >> 32) & _LOW_32_BITS, seed & _LOW_32_BITS
    stream_key = _mix((stream + 0x9E3779B9) & _LOW_32_BITS)
    key = _mix(_mix(stream_key ^ high) ^ low)
    return _mix(pixels ^ key)


def image_hash(seed: int | Tensor, stream: int, size: tuple[int, ...], device: torch.device) -> Tensor:
    """``pixel_hash`` of every pixel of an image of this size: int64 (*size)."""
    pixels = torch.arange(math.prod(size), device=device)
    return pixel_hash(seed, stream, pixels).reshape(size)
