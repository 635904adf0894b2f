"""No program reads beyond the features.

The features end where memory without access begins, so a read beyond them kills the process. The kernels run in
Triton's interpreter, which reads this process's memory.
"""

import ctypes
import itertools
import mmap
import signal

import processes
import pytest
import torch
from interpreter import set_up
from kernel_checks import DEVICE, NEEDS_TRITON

import contextrast_kernels as ck

pytestmark = [
    NEEDS_TRITON,
    pytest.mark.skipif(DEVICE == "cuda", reason="guards the host's memory, which kernels on a GPU do not read"),
    pytest.mark.skipif(not hasattr(mmap, "PROT_READ"), reason="needs mprotect"),
]

_guards = []


def guarded(x: torch.Tensor) -> torch.Tensor:
    """A copy that ends where a page without access begins."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 64 * mmap.PAGESIZE)
    _guards.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(64 * mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size).as_strided(x.shape, x.stride())
    return copy.copy_(x)


# These numbers of channels are multiples of a tile, but are not divided evenly among the programs.
CASES = [
    ("class_anchors", 576, torch.float16),
    ("hard", 288, torch.float32),
    ("hard", 480, torch.float16),
    ("hard", 160, torch.float64),
    ("dense", 480, torch.float32),
    ("info_nce", 320, torch.float16),
    ("info_nce", 160, torch.float32),
]


def run(op: str, D: int, dtype: torch.dtype, layout: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, D, 2, 16, generator=generator).to(dtype)
    labels = torch.arange(32).view(1, 2, 16) % 3
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = guarded(x.flatten(2)[0].T.contiguous() if op == "info_nce" else x).requires_grad_()
    with ck.backend("triton"):
        if op == "class_anchors":
            value = ck.class_anchors(x, labels, 3)[0].sum()
        elif op == "info_nce":
            value = ck.info_nce(x, labels.flatten())
        else:
            rate = {"hard": 0.0, "dense": 1.0}[op]
            value = ck.contextrast_loss(
                [x], labels, (labels + 1) % 3, num_classes=3, layer_weights=(1.0,), base_rate=rate
            )
        value.backward()
    assert x.grad.isfinite().all()


def run_all(log) -> None:
    torch.set_num_threads(1)
    set_up()
    for case, layout in zip(CASES, itertools.cycle(["nchw", "channels_last"])):
        log.write_text(f"{case} in {layout}")
        run(*case, layout)


def read_beyond() -> None:
    x = guarded(torch.zeros(5))
    ctypes.c_float.from_address(x.data_ptr() + 5 * x.element_size()).value  # noqa: B018


def exit_code(target, *arguments) -> int:
    """Run ``target`` in a new process and return its exit code."""
    process = processes.context().Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_kernels_read_no_memory_beyond_the_features(tmp_path):
    log = tmp_path / "case"
    assert exit_code(run_all, log) == 0, log.read_text()


def test_a_read_beyond_the_features_is_detected():
    assert exit_code(read_beyond) == -signal.SIGSEGV
