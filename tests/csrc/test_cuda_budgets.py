"""The kernels of csrc/ spill no registers and leave room for enough threads on a multiprocessor of each architecture.

The PTX is that of tests/compiled/csrc.py, which compiles the sources once for each architecture.
"""

import re
import subprocess
from pathlib import Path

import pytest
from compiled import csrc

pytestmark = pytest.mark.skipif(
    csrc.find_nvcc() is None, reason="budgets of CUDA kernels need nvcc, which was not found"
)

REGISTERS, SHARED = 65536, 100 << 10
"""The registers of a multiprocessor, and the bytes of shared memory of the smallest ones, sm_86 and sm_89."""
FEWEST_THREADS = 768
"""The fewest threads of a kernel on a multiprocessor: half the limit of sm_86, enough to hide the latency of loads."""


def compile_for(arch: int, folder: Path) -> dict[str, dict[str, int]]:
    """Kernel → registers, threads of a block, shared, spills."""
    ptxas, kernels = Path(csrc.find_nvcc()).with_name("ptxas"), {}
    built = csrc.build(arch)
    for name, path in built.paths.items():
        command = [ptxas, "-v", f"-arch=sm_{arch}", path, "-o", folder / f"{name}.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        for kernel, text in re.findall(r"entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", done.stderr, re.S):
            shared = re.search(r"(\d+) bytes smem", text)
            threads = re.search(rf"\.entry {kernel}\(.*?\.maxntid (\d+)", built.ptx[name], re.S)
            kernels[kernel] = {
                "registers": int(re.search(r"Used (\d+) registers", text)[1]),
                "threads": int(threads[1]),
                "shared": int(shared[1]) if shared else 0,
                # those of the kernel and of the functions that it calls, which are reported separately
                "spills": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text))),
            }
    return kernels


def held(used: dict[str, int]) -> int:
    """Threads that fit on a multiprocessor at once, given their registers and fixed shared memory."""
    of_a_warp = -(-used["registers"] * 32 // 256) * 256
    blocks = REGISTERS // (of_a_warp * used["threads"] // 32)
    if used["shared"]:
        blocks = min(blocks, SHARED // (used["shared"] + 1024))  # the system keeps 1 KiB of each block
    return blocks * used["threads"]


@pytest.mark.parametrize(
    "arch", [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.slow) for arch in csrc.ARCHITECTURES]
)
def test_kernels_spill_nothing_and_stay_within_register_limits(arch, tmp_path):
    kernels = compile_for(arch, tmp_path)
    assert len(kernels) >= 27
    assert {name: used for name, used in kernels.items() if used["spills"]} == {}
    assert {name: used for name, used in kernels.items() if held(used) < FEWEST_THREADS} == {}
