"""Counts what the compiled kernels execute and move, on the paper's cases. Nothing is timed.

    python -m tests.compiled.counts                                   the table of docs/performance.md
    python -m tests.compiled.counts --write                           the same, into benchmarks/results/counted.md
    python -m tests.compiled.counts --cases cityscapes --hot 15       the instructions that are executed most

A case runs with one image of a quarter of its height and width and the same classes, and is counted a pixel. What a
count allows at best is the count divided by a resource's peak rate, on the pixels of the whole case:

    issue    warp instructions / (multiprocessors x 4 x clock)          PTX instructions, of which ptxas makes others
    L1       (wavefronts of shared memory + global sectors / 4) / (multiprocessors x clock)
    L2       sectors that pass the L1 cache x 32 bytes / rate of the L2 cache
    memory   sectors that pass the L2 cache x 32 bytes / 85 % of the memory's rate
    tensor   products by type / rate of the tensor cores

No kernel can take less time than its largest bound on that device; nothing says that it takes no more.
"""

import os

os.environ["TRITON_INTERPRET"] = "0"

import argparse
import functools
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

from .driver import GPU, Launched, emulated
from .engine import Schedule

WRITTEN = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "counted.md"
L1_BYTES = 256 * 1024
"""Of a multiprocessor, shared memory included."""
SECTOR = 32


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


DEVICES = (Device("H100 SXM", 3.35e12), Device("H200", 4.8e12))


# ------------------------------------------------------------------------------------------------------------ counting


def registers_of(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"REG:(\d+)", usage)[1])


class CountingGPU(GPU):
    """Every block has its share of the L1 cache that the blocks of a multiprocessor leave of 256 KiB."""

    @functools.cached_property
    def _registers(self) -> dict[bytes, int]:
        return {}

    def l1_of_a_block(self, launcher) -> int:
        metadata = launcher.metadata
        if launcher.cubin not in self._registers:
            self._registers[launcher.cubin] = registers_of(launcher.cubin)
        registers = self._registers[launcher.cubin]
        resident = blocks_of_a_multiprocessor(registers, metadata.shared, metadata.num_warps, self.arch)
        return (L1_BYTES - resident * (metadata.shared + 1024)) // resident


KINDS = ("integer", "float", "float64", "special function", "shuffle", "barrier", "tensor core", "control")


@dataclass
class Counts:
    """Of the launches of one kernel."""

    kinds: Counter = field(default_factory=Counter)
    memory: dict[str, Counter] = field(default_factory=dict)
    operations: Counter = field(default_factory=Counter)
    """Of tensor cores, by type."""

    def add(self, launched: Launched) -> None:
        for instruction, count in zip(launched.program.kernel.instructions, launched.result.counts):
            self.kinds[instruction.kind] += count["warps"]
            if instruction.kind.split()[0] in ("ld", "st", "atom"):
                self.memory.setdefault(instruction.kind, Counter()).update(count)
            if instruction.kind == "tensor core":
                name, operations = operations_of(instruction)
                self.operations[name] += operations * count["warps"]

    def total(self, what: str, *kinds: str) -> int:
        return sum(count[what] for kind, count in self.memory.items() if kind.startswith(kinds))

    @property
    def instructions(self) -> int:
        return sum(self.kinds.values())

    def bounds(self, device: Device, scale: float) -> dict[str, float]:
        """Seconds that each resource needs at least, for ``scale`` times what was counted."""
        cycles = device.multiprocessors * device.clock
        sectors = self.total("sectors", "ld global", "st global", "atom global")
        wavefronts = self.total("wavefronts", "ld shared", "st shared", "atom shared")
        found = {
            "issue": self.instructions / (4 * cycles),
            "L1": (wavefronts + sectors / 4) / cycles,
            "L2": self.total("beyond_l1", "ld", "st", "atom") * SECTOR / device.l2,
            "memory": self.total("beyond_l2", "ld", "st", "atom") * SECTOR / (0.85 * device.memory),
            "tensor": sum(n / device.tensor[kind] for kind, n in self.operations.items()),
        }
        return {name: scale * seconds for name, seconds in found.items()}


def operations_of(instruction) -> tuple[str, int]:
    """The type and the operations of one warp's part of a product."""
    shape = re.search(r"m(\d+)n(\d+)k(\d+)", instruction.opcode)
    M, N, K = map(int, shape.groups())
    rows = 16 if M == 64 else M  # a warp of wgmma has a quarter of the rows
    return instruction.parts[-2], 2 * rows * N * K


def counted(case: cases.Case, arch: int, options: dict) -> tuple[dict[str, Counts], int, list[Launched]]:
    """Counts by kernel, the pixels that were counted, and the launches."""
    smaller = replace(case, batch=1, height=case.height // 4, width=case.width // 4)
    inputs = smaller.inputs()
    leaves = [x.requires_grad_() for x in inputs.features]
    with emulated(arch, Schedule(seed=1), count_memory=True, kind=CountingGPU) as gpu:
        loss = ck.contextrast_loss(leaves, inputs.labels, inputs.predictions, **smaller.loss_options, **options)
        torch.autograd.grad(loss, leaves)
    found: dict[str, Counts] = {}
    for launched in gpu.launches:
        found.setdefault(launched.kernel, Counts()).add(launched)
    return found, pixels_of(smaller), gpu.launches


def pixels_of(case: cases.Case) -> int:
    return case.batch * sum(h * w for h, w in case.sizes)


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
            [f"`{kernel}`", f"{sum(kinds.values()):.1f}", *(f"{kinds.get(kind, 0):.1f}" for kind in KINDS), f"{memory:.1f}"]
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
                f"{counts.total('wavefronts', 'ld shared', 'st shared', 'atom shared') / pixels:.2f}",
                share("wavefronts", "ideal", "ld shared", "st shared", "atom shared"),
                f"{counts.total('lanes', 'atom global') / pixels:.2f}",
                *(features(what, "ld global") for what in ("sectors", "beyond_l1", "beyond_l2")),
                features("beyond_l2", "st global", "atom global"),
            ]
        )
    head = ["kernel", "sectors a load", "sectors a store", "shared wavefronts a pixel", "wavefronts an ideal one"]
    return table([*head, "atomics a pixel", "F asked of L1", "F asked of L2", "F read from memory", "F written"], rows)


def bounds_table(found: dict[str, Counts], scale: float) -> str:
    rows = []
    for device in DEVICES:
        whole, largest = Counter(), 0.0
        for counts in found.values():
            bounds = counts.bounds(device, scale)
            whole.update(bounds)
            largest += max(bounds.values())
        micro = [f"{1e6 * whole[name]:.0f}" for name in ("issue", "L1", "L2", "memory", "tensor")]
        rows.append([device.name, *micro, f"{1e6 * largest:.0f}"])
    return table(["µs at least, by", "issue", "L1", "L2", "memory", "tensor", "each kernel's largest, summed"], rows)


def section(case: cases.Case, arch: int, options: dict, hot: int) -> str:
    found, pixels, launches = counted(case, arch, options)
    smaller = replace(case, batch=1, height=case.height // 4, width=case.width // 4)
    scale = pixels_of(case) / pixels
    text = [
        f"### {case}{''.join(f', {k}={v}' for k, v in options.items())}, sm_{arch}",
        f"{pixels} pixels were counted, the whole case has {pixels_of(case)}. Warp instructions a pixel, by kind:",
        instructions_table(found, pixels),
        "Memory; F is the features' bytes:",
        memory_table(found, pixels, smaller.feature_bytes),
        "Bounds for the whole case:",
        bounds_table(found, scale),
    ]
    if hot:
        text.append(hottest(launches, hot))
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
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--base-rate", type=float, default=0.0)
    parser.add_argument("--hot", type=int, default=0, help="list so many instructions that are executed most")
    parser.add_argument("--write", action="store_true", help=f"into {WRITTEN.name}, which docs/performance.md takes in")
    given = parser.parse_args()
    options = {"base_rate": given.base_rate} if given.base_rate else {}
    sections = []
    for name in given.cases:
        for layout in given.layout:
            sections.append(section(replace(cases.CASES[name], layout=layout), given.arch, options, given.hot))
            print(sections[-1], flush=True)
    if given.write:
        WRITTEN.write_text("\n\n".join(sections) + "\n")


if __name__ == "__main__":
    main()
