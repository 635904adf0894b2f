"""Builds the engine of ``engine/*.cpp`` once a machine, and runs a kernel on it.

    program = Program(ptx_text)
    result = program.run(arch=90, grid=(4, 1, 1), block=(128, 1, 1), parameters=packed, extents=extents, shared=4096)

Nothing here knows Triton: a launch is the text of a module, packed parameters, and the extents of global memory that
the kernel may touch.
"""

import concurrent.futures
import ctypes
import functools
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import reader
from .checks import KINDS, Finding

SOURCES = Path(__file__).with_name("engine")
# Results do not depend on the processor: no contraction to fused multiply-adds, no other order of sums.
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-ffp-contract=off", "-fno-math-errno", "-march=native"]
CONTROL = {"branch": -1, "return": -2, "barrier": -3, "trap": -4}
UNDEFINED_INSTRUCTION = -100
MOST_FINDINGS = 4096


def cache_folder() -> Path:
    folder = os.environ.get("CONTEXTRAST_ENGINE_CACHE")
    return Path(folder) if folder else Path.home() / ".cache" / "contextrast_kernels" / "engine"


def missing() -> str:
    """Why the engine cannot be built here, or an empty string."""
    return "" if shutil.which("g++") else "the compiled kernels need g++ to build their engine; install g++"


@functools.cache
def library() -> ctypes.CDLL:
    processor = subprocess.run(["g++", "-march=native", "-Q", "--help=target"], capture_output=True).stdout
    sources = sorted(SOURCES.iterdir())
    key = hashlib.sha256(b"".join([*(s.read_bytes() for s in sources), " ".join(FLAGS).encode(), processor]))
    built = cache_folder() / f"engine-{key.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as scratch:

            def compiled(source: Path) -> str:
                target = f"{scratch}/{source.stem}.o"
                subprocess.run(["g++", *FLAGS, "-c", source, "-o", target], check=True)
                return target

            with concurrent.futures.ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compiled, (s for s in sources if s.suffix == ".cpp")))
            linked = f"{scratch}/engine.so"
            subprocess.run(["g++", "-shared", *objects, "-o", linked], check=True)
            os.replace(linked, built)
    return ctypes.CDLL(str(built))


# ------------------------------------------------------------------------------------------ the structures of machine.h

s32, u64, pointer = ctypes.c_int32, ctypes.c_uint64, ctypes.c_void_p


def structure(name: str, **fields):
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


def named(kind, *names: str) -> dict:
    return dict.fromkeys(names, kind)


_Operand = structure("Operand", **named(s32, "place", "word", "high"))
_Instruction = structure(
    "Instruction",
    **named(s32, "handler", "guard", "guard_word", "guard_negated", "first", "count"),
    numbers=s32 * 8,
)
_Constant = structure("Constant", **named(s32, "place", "word", "high", "width"), value=u64)
_Special = structure("Special", **named(s32, "place", "word", "which", "unused"))
_Extent = structure("Extent", begin=u64, end=u64, undefined=pointer, grain=u64)
_Finding = structure(
    "Finding", **named(s32, "kind", "instruction", "block", "warp", "lane", "other"), address=u64, count=u64
)
_Count = structure(
    "Count",
    **named(u64, "warps", "lanes", "sectors", "wavefronts", "ideal", "distinct", "beyond_l1", "beyond_l2"),
)
_Launch = structure(
    "Launch",
    grid=s32 * 3,
    block=s32 * 3,
    **named(s32, "arch", "register_bytes", "register_words", "shared_base", "shared_bytes"),
    **named(s32, "parameter_bytes", "instructions", "operands", "constants", "specials", "extents", "blocks"),
    **named(s32, "quantum", "exact_sums", "noise", "count_memory", "l1_sectors"),
    seed=u64,
    limit=u64,
)


# ------------------------------------------------------------------------------------------------------------- running


@dataclass
class Extent:
    """Global memory that a kernel may touch."""

    begin: int
    end: int
    undefined: np.ndarray | None = None
    """A mark for each byte that was never written, uint8; None where all are defined."""
    grain: int = 1
    """Bytes of an element: what races are watched by."""
    name: str = ""


@dataclass(frozen=True)
class Schedule:
    """The order of blocks and warps, and how the hardware computes where PTX leaves it open."""

    seed: int = 1
    """0: blocks and warps one after the other; else an order drawn from it."""
    quantum: int = 0
    """A warp runs up to so many instructions before another one may; 0: until a barrier."""
    exact_sums: bool = False
    """Tensor cores add without cutting their sums, as no hardware was measured to."""
    noise: bool = False
    """Approximate instructions are as far off as PTX allows."""
    edges: int = 0
    """Run only so many of the first and of the last blocks; 0: all."""


IN_ORDER = Schedule(seed=0)


@dataclass
class Result:
    findings: list[Finding]
    counts: list[dict[str, int]]
    """One for each instruction of the kernel."""
    share: float
    """The share of all blocks that ran."""


class Program:
    """A kernel as the engine takes it."""

    def __init__(self, text: str, name: str | None = None):
        self.kernel = kernel = reader.Kernel(text, name)
        places, operands = kernel.places, []
        self.instructions = (_Instruction * len(kernel.instructions))()
        for k, (row, instruction) in enumerate(zip(self.instructions, kernel.instructions)):
            row.handler = CONTROL.get(instruction.handler) or library().engine_handler(
                instruction.handler.encode(), len(instruction.operands)
            )
            if row.handler == UNDEFINED_INSTRUCTION:
                place = f"{kernel.name}: PTX line {instruction.line}: {instruction.text!r}"
                raise reader.Unknown(f"{place}: the engine has no {instruction.handler} of that form")
            row.guard = -1
            if instruction.guard:
                row.guard, row.guard_word, _ = places[reader.Register(instruction.guard)]
                row.guard_negated = instruction.negated
            row.first, row.count = len(operands), len(instruction.operands)
            numbers = instruction.numbers
            if instruction.handler == "branch":
                numbers = [kernel.target(instruction), kernel.joins[k]]
            row.numbers[: len(numbers)] = numbers
            operands += [(-1, -1, -1) if operand is None else places[operand] for operand in instruction.operands]
        self.operands = _table(_Operand, operands)
        constants = [(at, o) for o, at in places.items() if isinstance(o, reader.Constant)]
        self.constants = _table(_Constant, [(*at, o.width, o.bits) for at, o in constants])
        specials = [(at, o) for o, at in places.items() if isinstance(o, reader.Special)]
        self.specials = _table(_Special, [(*at[:2], o.number, 0) for at, o in specials])

    def run(
        self,
        *,
        arch: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        parameters: bytes,
        extents: list[Extent],
        shared: int = 0,
        schedule: Schedule = IN_ORDER,
        count_memory: bool = False,
        l1_bytes: int = 0,
        limit: int = 2**62,
    ) -> Result:
        """Runs the grid.

        Args:
            shared: bytes of dynamic shared memory.
            count_memory: count what requests to memory cost too.
            l1_bytes: a block's share of the L1 cache, for these counts.
            limit: instructions of warps, after which the launch is given up.
        """
        kernel = self.kernel
        blocks = grid[0] * grid[1] * grid[2]
        order = list(range(blocks))
        if schedule.edges:
            order = [k for k in order if min(k, blocks - 1 - k) < schedule.edges]
        if schedule.seed:
            random.Random(schedule.seed).shuffle(order)
        extents = sorted(extents, key=lambda extent: extent.begin)
        rows = [(e.begin, e.end, None if e.undefined is None else e.undefined.ctypes.data, e.grain) for e in extents]
        launch = _Launch(
            grid=grid,
            block=block,
            arch=arch,
            register_bytes=kernel.register_bytes,
            register_words=kernel.register_words,
            shared_base=reader.SHARED_BASE,
            shared_bytes=kernel.static_shared + shared,
            parameter_bytes=len(parameters),
            instructions=len(self.instructions),
            operands=len(self.operands),
            constants=len(self.constants),
            specials=len(self.specials),
            extents=len(rows),
            blocks=len(order),
            quantum=schedule.quantum,
            exact_sums=schedule.exact_sums,
            noise=schedule.noise,
            count_memory=count_memory,
            l1_sectors=l1_bytes // 32,
            seed=schedule.seed,
            limit=limit,
        )
        counts = (_Count * len(self.instructions))()
        found = (_Finding * MOST_FINDINGS)()
        number = library().engine_run(
            ctypes.byref(launch), self.instructions, self.operands, self.constants, self.specials,
            _table(_Extent, rows), parameters, (s32 * len(order))(*order), counts, found, MOST_FINDINGS,
        )  # fmt: skip
        findings = [self._finding(row, extents) for row in found[:number]]
        table = [{name: getattr(row, name) for name, _ in _Count._fields_} for row in counts]
        return Result(findings, table, len(order) / max(blocks, 1))

    def _finding(self, row, extents: list[Extent]) -> Finding:
        i = self.kernel.instructions[row.instruction]
        near = [e for e in extents if e.begin - 4096 <= row.address < e.end + 4096]
        where = (
            f"byte {row.address - near[0].begin} of {near[0].name}, which has {near[0].end - near[0].begin}"
            if near
            else ""
        )
        return Finding(
            kernel=self.kernel.name, kind=KINDS[row.kind], source=i.source, ptx_line=i.line, ptx=i.text,
            block=row.block, warp=row.warp, lane=row.lane, address=row.address, other=row.other, count=row.count,
            where=where,
        )  # fmt: skip


def _table(kind, rows):
    return (kind * len(rows))(*rows)
