"""Tile sizes of all kernels, in one table.

The sizes are chosen from the compiler's output. Once they are measured on a GPU, the measurement replaces the reason.
A reason gives the registers of a thread, its stack in bytes (to which registers are spilled) and the shared memory of a
thread block on sm_90, over both layouts and at D 256 unless another D is named. "2 blocks" is the calculated number of
thread blocks that fit on a multiprocessor. ``python tests/aot.py`` prints these. sm_80, 90 and 100 compile so much
alike that no architecture has rows of its own.
"""

import functools
from typing import NamedTuple

import torch
import triton

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
PIXELS = 1024
"""Pixels of a program that reads label codes alone: 8 a thread."""
RUN = 256
"""Partial sums that a program adds up at a time: 2 a thread."""
PROGRAMS = 264
"""Where the held vectors of ``info_nce`` fill fewer, the streamed ones are split: two programs for each multiprocessor
of an H100. A constant, so that no sum depends on the device."""
ADDED = 64
"""Rows, or elements of a gradient, whose splits a program adds up, ADDED_SPLITS at a time."""
ADDED_SPLITS = 16
MEAN_RUN = 1024
"""Rows that the one program of the mean takes at a time."""


class Tiles(NamedTuple):
    """What a program takes at a time. A block is ``ROWS`` rows of ``P`` pixels."""

    P: int
    K: int = 64
    """Channels of a product on the tensor cores."""
    COLUMNS: int = 0
    """Channels whose sums a program holds in registers; more are shared out over programs."""
    CLASSES: int = 16
    """Classes of a product: 16 is the least that a tensor core takes."""
    num_warps: int = 4
    ROWS: int = 8
    """A block of 8 x 64 real labels holds 3.0 classes on average and 10 at most (stride 4): 16 serve it in one
    round, and its sums go out once for 8 rows."""
    CHUNK: int = 16
    """Channels taken at a time where nothing but arithmetic asks for them: 16 bytes a thread and load."""
    NARROW: int = 32
    """The most pixels of a row where rows cannot be read 16 bytes at a time, as with camvid's of 60, 30 and 15: with 64
    ``_class_anchors_fwd`` spills 592 B and ``_features_bwd`` 112 B on sm_90 (bfloat16, D 256). With 32 pixels neither
    kernel spills."""


class Row(NamedTuple):
    bytes: tuple[int, ...]
    """Element sizes in bytes that this row applies to."""
    D: int
    """The most channels that the row is for."""
    tiles: Tiles


TABLE = {
    "_class_anchors_fwd": (
        # bfloat16 needs 172-251 registers, no stack and 12 KiB, float16 255 registers, 8-24 B of stack and 24 KiB, so 2
        # blocks fit. D 480 and 512 spill 32 B. A row of 64 two-byte pixels is one cache line.
        Row((2,), 512, Tiles(P=64, COLUMNS=512)),
        # D 720 needs 224-236 registers, no stack and 8 KiB, so 2 blocks fit. P 64 would spill 48 B.
        Row((2,), 1024, Tiles(P=32, COLUMNS=512)),
        # This tile needs 178-230 registers, no stack and 20 KiB, so 2 blocks fit.
        Row((4,), 1024, Tiles(P=32, COLUMNS=512)),
        # This tile needs 186 registers, no stack and 6 KiB, so 2 blocks fit. P 32 would spill 48 B.
        Row((8,), 1024, Tiles(P=16, K=32, COLUMNS=256)),
    ),
    "_largest_features": (Row((2, 4, 8), 1024, Tiles(P=64)),),
    "_hard_similarities": (
        # This tile needs 80-168 registers, no stack and 4 KiB, so 3 to 6 blocks fit.
        Row((2, 4), 1024, Tiles(P=64)),
        Row((8,), 1024, Tiles(P=32)),
    ),
    "_dense_similarities": (
        # At N 150 a warp executes 7.0 thousand instructions for a row of the block with 32 classes a round. 16 classes
        # in an outer loop would need 17 thousand. 64 classes would need 4.9 thousand, but Hopper would multiply them by
        # other instructions than in the sweeps that follow (see ``DENSE``). This tile needs 232-241 registers, no stack
        # and 6 KiB, so 2 blocks fit.
        Row((2, 4), 1024, Tiles(P=32, K=32, CLASSES=32)),
        Row((8,), 1024, Tiles(P=16, K=32, CLASSES=32)),
    ),
    "_pixel_anchor_fwd": (
        # bfloat16 needs 242-255 registers, 0-8 B of stack (float16 8-24 B) and 4 KiB, so 2 blocks fit. 32 classes at a
        # time would take 30 % more instructions, since the weights are formed for every class. float32 spills 88-376 B;
        # K 64 would spill 150-490 B and 8 warps 120-224 B. Tiles that spill less cost more: 128 columns would spill
        # 48 B, but form the products twice, with a third more instructions; rows of 16 pixels would spill 16-56 B, with
        # 54 % more instructions a pixel.
        Row((2, 4), 1024, Tiles(P=32, K=32, COLUMNS=256)),
        # This tile needs 255 registers, 0-8 B of stack and 8 KiB, so 2 blocks fit. P 32 with all columns would spill
        # 1.9 KB.
        Row((8,), 1024, Tiles(P=16, K=32, COLUMNS=128)),
    ),
    "_features_bwd": (
        # This tile needs 103-253 registers, no stack and 4 KiB, so 2 to 4 blocks fit.
        Row((2,), 1024, Tiles(P=64)),
        Row((4,), 1024, Tiles(P=32)),
        # This tile needs 56-128 registers, no stack and 2 KiB, so 4 to 9 blocks fit. P 32 would spill 56 B.
        Row((8,), 1024, Tiles(P=16)),
    ),
    "_features_bwd_dense": (
        # The row's gradient, P x D, is held in registers. This tile needs 234-249 registers, no stack and 8 KiB, so 2
        # blocks fit. 32 classes at a time would spill 232 B. With 8 warps they would spill 88 B and take 70 % more
        # instructions. Rows that cannot be read 16 bytes at a time need 255 registers and 8-170 B of stack; P 32 would
        # spill 1.4 KB there.
        Row((2, 4), 256, Tiles(P=32, K=32, COLUMNS=64, ROWS=4, NARROW=16)),
        # D 720 of two bytes needs 255 registers and 40-210 B of stack, D 1024 200-340 B. With 8 warps D 720 would spill
        # 0-16 B, but take half as many instructions again for a pixel, and a thread would load two bytes at a time.
        Row((2,), 1024, Tiles(P=16, K=32, COLUMNS=64, ROWS=4)),
        Row((4,), 512, Tiles(P=16, K=32, COLUMNS=64, ROWS=4)),
        # D 720 needs 240-255 registers and 120-160 B of stack.
        Row((4,), 1024, Tiles(P=16, K=32, COLUMNS=64, ROWS=4, num_warps=8)),
        # This tile needs 226-236 registers, no stack and 16 KiB, so 1 block of 8 warps fits. 4 warps would spill 104 B,
        # P 32 3.2 KB.
        Row((8,), 1024, Tiles(P=16, K=32, COLUMNS=64, ROWS=4, num_warps=8)),
    ),
}

RDNA = {
    # The numbers are vector registers spilled on gfx1100 and gfx1201 (bfloat16, D 256). This tile spills none; P 64
    # would spill 30 on gfx1100.
    "_class_anchors_fwd": {"P": 32},
    # This tile spills 17 registers on gfx1100 and none on gfx1201. With 128 columns it would spill 91 and 49, and with
    # 32 pixels as well 220 and 126. The tile of the table would spill 550 and 431.
    "_pixel_anchor_fwd": {"P": 16, "COLUMNS": 64},
    # This tile spills none. P 64 would spill 79 and 77.
    "_features_bwd": {"P": 32},
}
"""What AMD's RDNA GPUs (gfx11 and gfx12) take in place of a row's tiles, for features of two bytes. A wavefront has 32
lanes there, and a thread has 256 registers."""

DENSE = ("_dense_similarities", "_pixel_anchor_fwd", "_features_bwd_dense")
"""These take K alike, and fewer classes than the 64 at which Hopper multiplies by other instructions, so that each
adds up the same s to the last bit: exp(s - Z) is exactly 1 where one negative is all of Z, however large s is."""


def copies_rows(dtype: torch.dtype, D: int) -> bool:
    """Whether kernels copy rows of these features to shared memory, in layers whose layout allows it. On Hopper alone:
    for Ampere this spills 400 B, and for Blackwell it was not tried. A plan without a device is for Hopper. From Triton
    3.8 on alone: 3.6 spills 328 B, and compiles no proxy fence in ``_features_bwd``, without which PTX does not promise
    that tensor cores see what was copied. 3.7 was not tried."""
    return dtype == torch.bfloat16 and D in (64, 128, 256) and architecture() in (None, 90) and TRITON >= (3, 8)


def keeps_norms(dtype: torch.dtype, D: int, num_classes: int) -> bool:
    """Whether 1/‖x‖ of every pixel is kept for the sweep of the loss, which then copies rows. Beside the sums of many
    classes it would take more memory than the loss may."""
    return copies_rows(dtype, D) and num_classes <= 64


def architecture() -> int | str | None:
    """What the active driver compiles for; None where there is none."""
    try:
        return triton.runtime.driver.active.get_current_target().arch
    except RuntimeError:
        return None


@functools.cache
def copied_tiles(tiles: Tiles) -> Tiles:
    """The same for blocks whose rows are copied. P is 64, the M of wgmma, so that pixels as well as channels can be the
    M dimension."""
    return tiles._replace(ROWS=8, P=64, num_warps=4)


def next_power_of_2(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tiles_of(kernel: str, dtype: torch.dtype, D: int) -> Tiles:
    """A kernel's row of the table, shrunk to what D channels need."""
    return _tiles_of(kernel, dtype, D, str(architecture()).startswith(("gfx11", "gfx12")))


@functools.cache
def _tiles_of(kernel: str, dtype: torch.dtype, D: int, rdna: bool) -> Tiles:
    row = next(row.tiles for row in TABLE[kernel] if dtype.itemsize in row.bytes and row.D >= D)
    if rdna and dtype.itemsize == 2:
        row = row._replace(**RDNA.get(kernel, {}))
    K = min(row.K, max(16, next_power_of_2(D)))
    chunks = -(-D // K)
    parts = -(-chunks * K // row.COLUMNS) if row.COLUMNS else 1
    tiles = row._replace(K=K, COLUMNS=-(-chunks // parts) * K, CHUNK=min(row.CHUNK, next_power_of_2(D)))
    if kernel == "_features_bwd" and D < row.CHUNK:  # so few bytes that fewer threads load 16 each
        tiles = tiles._replace(num_warps=max(1, min(row.num_warps, row.P * tiles.CHUNK * dtype.itemsize // 512)))
    return tiles


class InfoNceTiles(NamedTuple):
    """What a program of ``info_nce`` takes at a time."""

    HELD: int
    """Vectors that a program holds."""
    STREAM: int
    """Vectors that stream past them at a time."""
    K: int
    """Channels of a product of both."""
    HOLD: bool
    """The held vectors stay in registers or shared memory, and each streamed tile is read once."""
    num_warps: int
    CHANNELS: int = 0
    """Channels of the gradient that a program sums; more are shared out over programs, which form s again."""


@functools.cache
def info_nce_tiles(dtype: torch.dtype, D: int, held: int) -> InfoNceTiles:
    """Tiles of ``info_nce``'s forward kernels for ``held`` vectors of D channels."""
    size = dtype.itemsize
    return InfoNceTiles(
        HELD=min(32 if size == 8 else 64, max(16, next_power_of_2(held))),
        STREAM=64 if size == 4 else 32,
        K=min(128 // size, max(16, next_power_of_2(D))),
        HOLD=size == 2 and D <= 256,
        num_warps=8 if size == 4 else 4,
    )


@functools.cache
def info_nce_gradient_tiles(dtype: torch.dtype, D: int, held: int, toward: str) -> InfoNceTiles:
    """Tiles of ``_info_nce_bwd``. Two-byte vectors at D 256: 168-242 registers, no stack, 24-36 KiB, 2 blocks. 64 held
    vectors spill 5 KB on sm_80, and with 128 channels a program take 44 % more instructions."""
    # Two-byte vectors hold half as many, as do passes that keep the slopes of both sides in registers.
    halved = dtype.itemsize == 2 or toward == "both"
    tiles = info_nce_tiles(dtype, D, min(held, 32) if halved else held)
    most = {2: 256, 4: 128, 8: 64}[dtype.itemsize]
    return tiles._replace(STREAM=32, CHANNELS=min(most, -(-D // tiles.K) * tiles.K), num_warps=4)
