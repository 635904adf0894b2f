"""What nvcc makes of the kernels of csrc/: registers and shared memory within tests/cuda_budgets.json, and no spills.

The file holds, for each kernel, registers on each architecture and bytes of fixed shared memory. A kernel over its
budget fails; one far below it asks for the budget to be lowered, so that the file stays a description. To write it
anew:

    python tests/test_cuda_budgets.py
"""

import concurrent.futures
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = Path(__file__).with_name("cuda_budgets.json")
ARCHITECTURES = ("80", "90", "100")
REGISTER_STEP = 8  # registers are handed out in steps of 8
SLACK = 2 * REGISTER_STEP  # compilers differ by so much without anything having changed here


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [None, *(os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home)]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


def kernel_name(mangled: str) -> str:
    """solve<int32> from _ZN11contextrast..5solveIiEEv...: the last of the nested names, and its template argument."""
    rest = mangled.removeprefix("_ZN")
    name = ""
    while match := re.match(r"(\d+)", rest):
        length = int(match[1])
        name, rest = rest[match.end() :][:length], rest[match.end() + length :]
    types = {
        "a": "int8",
        "h": "uint8",
        "s": "int16",
        "i": "int32",
        "l": "int64",
        "x": "int64",
        "f": "float",
        "v": "void",
    }
    argument = re.match(r"I([a-z])E", rest)
    return f"{name}<{types[argument[1]]}>" if argument else name


def compile_for(nvcc: str, source: Path, architecture: str, folder: str) -> dict[str, dict[str, int]]:
    """Kernel → registers, shared, spills of one file on one architecture."""
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-cubin",
        f"-arch=sm_{architecture}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
    ]
    output = os.path.join(folder, f"{source.stem}_{architecture}.cubin")
    done = subprocess.run([*command, str(source), "-o", output], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = {}
    for name, text in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", done.stderr, re.S):
        shared = re.search(r"(\d+) bytes smem", text)
        kernels[kernel_name(name)] = {
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "shared": int(shared[1]) if shared else 0,
            # a kernel's own, and what the functions it calls report besides
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", text))),
        }
    return kernels


def compile_all(nvcc: str) -> dict[tuple[str, str], dict[str, int]]:
    """(kernel, architecture) → registers, shared, spills."""
    jobs = [(source, arch) for source in sorted((ROOT / "csrc").glob("*.cu")) for arch in ARCHITECTURES]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda job: compile_for(nvcc, *job, folder), jobs)
        return {(name, arch): used for (_, arch), kernels in zip(jobs, results) for name, used in kernels.items()}


@pytest.fixture(scope="module")
def compiled():
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("budgets of CUDA kernels need nvcc, which was not found")
    return compile_all(nvcc)


@pytest.fixture(scope="module")
def budgets():
    return json.loads(BUDGETS.read_text())


def test_every_kernel_has_a_budget(compiled, budgets):
    assert {name for name, _ in compiled} == set(budgets)
    assert all(set(budget["registers"]) == set(ARCHITECTURES) for budget in budgets.values())


def test_no_kernel_spills_registers(compiled):
    assert {key: used["spills"] for key, used in compiled.items() if used["spills"]} == {}


def test_kernels_keep_to_their_budgets(compiled, budgets):
    for (name, arch), used in compiled.items():
        budget = budgets[name]
        assert used["shared"] == budget["shared"], f"{name} on sm_{arch}: {used['shared']} bytes of shared memory"
        allowed = budget["registers"][arch]
        assert allowed - SLACK <= used["registers"] <= allowed, (
            f"{name} on sm_{arch} uses {used['registers']} registers, its budget says {allowed}: "
            "find out why, or write the budgets anew"
        )


def main() -> None:
    nvcc = find_nvcc() or sys.exit("nvcc was not found")
    budgets = {}
    for (name, arch), used in sorted(compile_all(nvcc).items()):
        budget = budgets.setdefault(name, {"registers": {}, "shared": used["shared"]})
        budget["registers"][arch] = -(-used["registers"] // REGISTER_STEP) * REGISTER_STEP
    lines = [f"  {json.dumps(name)}: {json.dumps(budget, sort_keys=True)}" for name, budget in budgets.items()]
    BUDGETS.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
