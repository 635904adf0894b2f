"""Counts what the compiled kernels execute and move, on the paper's cases. Nothing is timed.

    python -m tests.compiled.counts                                   the section of docs/performance.md
    python -m tests.compiled.counts --write                           the same, into benchmarks/results/counted.md
    python -m tests.compiled.counts --cases camvid --hot 15           one case, and what it executes most

A case runs with one image, of half its height and width if it is large, and counts are per pixel. Cityscapes on Hopper
has tables by kernel, as has a case alone; the others have their bounds.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"

import argparse
import functools
import itertools
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from aot import TOOLS, blocks_of_a_multiprocessor

import contextrast_kernels as ck
from contextrast_kernels import cases
from contextrast_kernels.plan import training_step

from .driver import Launched, Launcher, emulated
from .engine import Schedule

WRITTEN = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "counted.md"
L1_BYTES = {80: 192 * 1024, 90: 256 * 1024, 100: 256 * 1024}
"""The L1 cache of a multiprocessor, including shared memory, by architecture."""
SECTOR = 32
LARGE = 2**18
"""Pixels of an image that is counted with half its height and width."""
SHARED = ("ld shared", "st shared", "atom shared", "ld global to shared")


@dataclass(frozen=True)
class Device:
    """Peak rates that NVIDIA publishes, but for the L2 cache, whose rate is what others measured."""

    name: str
    memory: float
    """Bytes a second."""
    multiprocessors: int = 132
    clock: float = 1.755e9
    l2: float = 5.5e12
    tensor: dict = field(default_factory=lambda: {"f16": 989e12, "bf16": 989e12, "tf32": 494e12, "f64": 67e12})
    """Operations a second, dense."""


A100_TENSOR = {"f16": 312e12, "bf16": 312e12, "tf32": 156e12, "f64": 19.5e12}
DEVICES = {
    90: (Device("H100 SXM", 3.35e12), Device("H200", 4.8e12)),
    80: (Device("A100 SXM", 2.04e12, 108, 1.41e9, 4.4e12, A100_TENSOR),),
}
"""The L2 cache of an A100 was not measured: it has the share of its peak that Hopper's reaches."""


# ------------------------------------------------------------------------------------------------------------ counting


def registers_of(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1])


@functools.cache
def blocks_held(cubin: bytes, shared: int, warps: int, arch: int) -> int:
    return blocks_of_a_multiprocessor(registers_of(cubin), shared, warps, arch)


def l1_share(launcher: Launcher) -> int:
    """What the shared memory of all blocks of a multiprocessor leaves of its L1 cache, by their number."""
    metadata = launcher.metadata
    held = blocks_held(launcher.cubin, metadata.shared, metadata.num_warps, metadata.target.arch)
    return (L1_BYTES[metadata.target.arch] - held * (metadata.shared + 1024)) // held


EXPLAINED = "\n".join(
    (
        "`python -m tests.compiled.counts` executes the PTX of the kernels on a CPU, on one image, and counts what "
        "they execute and move. The image has half the case's height and width, except for CamVid's small images. "
        "No figure here is a time. A bound is the time that a resource needs at its peak rate if it never waits; a "
        "device may take much longer. F is the size of the features.",
        "",
        "* *issue*: warp instructions / (multiprocessors × 4 schedulers × clock). Each PTX instruction counts as "
        "one machine instruction, although ptxas adds some and removes others.",
        "* *L1*: (wavefronts of shared memory + sectors of global requests / 4) / (multiprocessors × clock). A "
        "wavefront moves 128 bytes, and each bank conflict needs one more. The operands that wgmma reads are included, "
        'except in "wavefronts / ideal", which is 1 without bank conflicts.',
        "* *L2*: sectors of 32 bytes that pass the L1 cache / 5.5 TB/s. Shared memory and the L1 cache of a "
        "multiprocessor have 256 KiB together. A block has its share of what shared memory leaves, and the cache is "
        "empty at first. Stores and atomics always pass. An A100 has 192 KiB, and its L2 bandwidth is estimated as "
        "4.4 TB/s, with Hopper's share of the peak.",
        "* *memory*: sectors that pass the L2 cache / 85 % of the memory's rate. The cache holds everything that "
        "one launch touches and nothing of the launch before.",
        "* *tensor*: products / the dense peak rate of their type.",
        "",
        "An H100 SXM and an H200 have 132 multiprocessors at 1.755 GHz, 3.35 and 4.8 TB/s of memory bandwidth, "
        "and 989 TFLOP/s in 16 bits, 494 in TF32 and 67 in float64. An A100 SXM of 80 GB has 108 at 1.41 GHz, "
        "2.04 TB/s, and 312, 156 and 19.5 TFLOP/s. The kernels run one after the other, so the "
        "sum of each kernel's largest bound is a bound too. Counts of kernels whose grid depends on the number of "
        "pixels are scaled to the full image; the smaller image has more padding. The floor is 4 F: three reads "
        "of the features and one write.",
    )
)

KINDS = ("integer", "float", "float64", "special function", "shuffle", "barrier", "tensor core", "control")


@dataclass
class Counts:
    """Counts summed over the launches of one kernel."""

    kinds: Counter = field(default_factory=Counter)
    memory: dict[str, Counter] = field(default_factory=dict)
    operations: Counter = field(default_factory=Counter)
    """Operations of tensor cores, by type."""
    wavefronts_of_operands: float = 0.0
    """Shared-memory wavefronts that wgmma reads."""

    def add(self, launched: Launched) -> None:
        for instruction, count in zip(launched.program.kernel.instructions, launched.result.counts):
            self.kinds[instruction.kind] += count["warps"]
            if instruction.kind.split()[0] in ("ld", "st", "atom"):
                self.memory.setdefault(instruction.kind, Counter()).update(count)
            if instruction.kind == "tensor core":
                name, operations = operations_of(instruction)
                self.operations[name] += operations * count["warps"]
                self.wavefronts_of_operands += wavefronts_of_operands(instruction) * count["warps"]

    def total(self, what: str, *kinds: str) -> int:
        return sum(count[what] for kind, count in self.memory.items() if kind.startswith(kinds))

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    def bounds(self, device: Device) -> dict[str, float]:
        """Seconds that each resource needs at least."""
        cycles = device.multiprocessors * device.clock
        sectors = self.total("sectors", "ld global", "st global", "atom global")
        wavefronts = self.total("wavefronts", *SHARED) + self.wavefronts_of_operands
        return {
            "issue": self.instructions / (4 * cycles),
            "L1": (wavefronts + sectors / 4) / cycles,
            "L2": self.total("beyond_l1", "ld", "st", "atom") * SECTOR / device.l2,
            "memory": self.total("beyond_l2", "ld", "st", "atom") * SECTOR / (0.85 * device.memory),
            "tensor": sum(n / device.tensor[kind] for kind, n in self.operations.items()),
        }


def operations_of(instruction) -> tuple[str, int]:
    """The type and the operations of one warp's part of a product."""
    shape = re.search(r"m(\d+)n(\d+)k(\d+)", instruction.opcode)
    M, N, K = map(int, shape.groups())
    rows = 16 if M == 64 else M  # a warp of wgmma has a quarter of the rows
    return instruction.parts[-2], 2 * rows * N * K


def wavefronts_of_operands(instruction) -> float:
    """What one warp's part of a wgmma reads of shared memory: N columns of B are shared by four warps."""
    if instruction.parts[0] != "wgmma":
        return 0.0
    type_bytes = 4 if instruction.parts[-1] == "tf32" else 2
    N, K = map(int, re.search(r"n(\d+)k(\d+)", instruction.opcode).groups())
    of_a = 0 if instruction.arguments[1].startswith("{") else 64
    return (of_a + N) * K * type_bytes / 128 / 4


@dataclass
class Counted:
    """A case whose smaller twin was executed."""

    case: cases.Case
    twin: cases.Case
    kernels: dict[str, Counts]
    scales: dict[str, float]
    """What the counts of each kernel are multiplied with for the whole case: the pixels' ratio, or 1 where the grid
    does not depend on them."""
    launches: list[Launched]


def pixels_of(case: cases.Case) -> int:
    return case.batch * sum(h * w for h, w in case.sizes)


def smaller(case: cases.Case) -> cases.Case:
    """One image of the case. A large one has half the height and width; its layers keep their alignment."""
    part = 2 if case.height * case.width >= LARGE else 1
    return replace(case, batch=1, height=case.height // part, width=case.width // part)


def counted(case: cases.Case, arch: int, options: dict) -> Counted:
    twin = smaller(case)
    inputs = twin.inputs()
    leaves = [x.requires_grad_() for x in inputs.features]
    with emulated(arch, Schedule(seed=1), l1_share=l1_share, machine_code=True) as gpu:
        loss = ck.contextrast_loss(leaves, inputs.labels, inputs.predictions, **twin.loss_options, **options)
        torch.autograd.grad(loss, leaves)
    kernels: dict[str, Counts] = {}
    programs: Counter = Counter()
    for launched in gpu.launches:
        kernels.setdefault(launched.kernel, Counts()).add(launched)
        programs[launched.kernel] += math.prod(launched.grid)
    plan = training_step(
        case.batch, case.sizes, case.channels, case.num_classes, case.dtype, layout=case.layout, **options
    )
    whole: Counter = Counter()
    for launch in plan.launches:
        whole[launch.kernel.__name__] += math.prod(launch.grid)
    pixels = pixels_of(case) / pixels_of(twin)
    scales = {name: 1.0 if whole[name] == programs[name] else pixels for name in kernels}
    return Counted(case, twin, kernels, scales, gpu.launches)


# ------------------------------------------------------------------------------------------------------------ printing


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def instructions_table(found: dict[str, Counts], pixels: int) -> str:
    rows = []
    for kernel, counts in found.items():
        kinds = {kind: count / pixels for kind, count in counts.kinds.items()}
        memory = sum(count for kind, count in kinds.items() if kind not in KINDS)
        rows.append(
            [
                f"`{kernel}`",
                f"{sum(kinds.values()):.1f}",
                *(f"{kinds.get(kind, 0):.1f}" for kind in KINDS),
                f"{memory:.1f}",
            ]
        )
    return table(["kernel", "all", *KINDS, "memory"], rows)


def memory_table(found: dict[str, Counts], pixels: int, feature_bytes: int) -> str:
    rows = []
    for kernel, counts in found.items():

        def share(top: str, bottom: str, *kinds: str, counts=counts) -> str:
            below = counts.total(bottom, *kinds)
            return f"{counts.total(top, *kinds) / below:.1f}" if below else "–"

        def features(what: str, *kinds: str, counts=counts) -> str:
            return f"{counts.total(what, *kinds) * SECTOR / feature_bytes:.2f}"

        rows.append(
            [
                f"`{kernel}`",
                share("sectors", "warps", "ld global"),
                share("sectors", "warps", "st global"),
                f"{(counts.total('wavefronts', *SHARED) + counts.wavefronts_of_operands) / pixels:.2f}",
                share("wavefronts", "ideal", *SHARED),
                f"{counts.total('lanes', 'atom global') / pixels:.2f}",
                *(features(what, "ld global") for what in ("sectors", "beyond_l1", "beyond_l2")),
                features("beyond_l2", "st global", "atom global"),
            ]
        )
    head = ["kernel", "sectors per load", "sectors per store", "shared wavefronts per pixel", "wavefronts / ideal"]
    head += ["atomics per pixel", "F requested from L1", "F requested from L2", "F read from memory", "F written"]
    return table(head, rows)


RESOURCES = ("issue", "L1", "L2", "memory", "tensor")


def bounds_table(found: Counted, arch: int) -> str:
    rows = []
    for device in DEVICES[arch]:
        whole, largest = Counter(), 0.0
        for name, counts in found.kernels.items():
            bounds = {what: found.scales[name] * seconds for what, seconds in counts.bounds(device).items()}
            whole.update(bounds)
            largest += max(bounds.values())
        floor = 4 * found.case.feature_bytes / (0.85 * device.memory)
        micro = [*(whole[name] for name in RESOURCES), largest, floor]
        rows.append([device.name, *(f"{1e6 * seconds:.0f}" for seconds in micro)])
    return table(["µs at least, by", *RESOURCES, "largest of each kernel, summed", "4 F of memory"], rows)


def section(found: Counted, arch: int, hot: int, in_full: bool) -> str:
    text = [f"### {found.case}, sm_{arch}"]
    if in_full:
        text += [
            f"Warp instructions per pixel, by kind, over the {pixels_of(found.twin)} pixels that were counted:",
            instructions_table(found.kernels, pixels_of(found.twin)),
            "Requests to memory:",
            memory_table(found.kernels, pixels_of(found.twin), found.twin.feature_bytes),
        ]
    text.append(bounds_table(found, arch))
    if hot:
        text.append(hottest(found.launches, hot))
    return "\n\n".join(text)


def hottest(launches: list[Launched], most: int) -> str:
    rows = []
    for launched in launches:
        for instruction, count in zip(launched.program.kernel.instructions, launched.result.counts):
            rows.append((count["warps"], launched.kernel, instruction.source, instruction.text[:60]))
    return "\n".join("  ".join(map(str, row)) for row in sorted(rows, reverse=True)[:most])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(cases.CASES), default=["cityscapes", "ade20k", "camvid"])
    parser.add_argument("--layout", nargs="+", choices=list(cases.LAYOUTS), default=list(cases.LAYOUTS))
    parser.add_argument("--arch", nargs="+", type=int, choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--base-rate", type=float, default=0.0)
    parser.add_argument("--hot", type=int, default=0, help="list so many instructions that are executed most")
    parser.add_argument("--write", action="store_true", help=f"into {WRITTEN.name}, for docs/performance.md")
    given = parser.parse_args()
    options = {"base_rate": given.base_rate} if given.base_rate else {}
    sections = [EXPLAINED]
    print(EXPLAINED)
    for arch, name, layout in itertools.product(given.arch, given.cases, given.layout):
        found = counted(replace(cases.CASES[name], layout=layout), arch, options)
        in_full = len(given.cases) == 1 or (name == "cityscapes" and arch == 90)
        sections.append(section(found, arch, given.hot, in_full))
        print(f"\n{sections[-1]}", flush=True)
    if given.write:
        WRITTEN.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
