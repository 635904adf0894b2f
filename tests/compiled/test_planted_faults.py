"""Faults planted into what Triton compiled, or on the way to it, each of which must be seen: as a finding of the right
kind, or as a value or gradient outside of the contract."""

import contextlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from kernel_checks import relative, run
from option_cases import QUICK, Case, build

import contextrast_kernels as ck

from . import driver
from .driver import Mispacked, emulated
from .engine import Schedule

HARD, GIVEN, ROWS = (
    next(case for case in QUICK if (case.op, case.dtype, case.D) == (op, "bfloat16", 64))
    for op in ("contextrast_loss", "pixel_anchor_loss", "info_nce")
)
ANCHORS = Case("class_anchors", dtype="float32", D=20, sizes="wide rows", layout="unaligned")
CONTRACT = "a value or gradient outside of the contract"


@dataclass(frozen=True)
class Fault:
    name: str
    case: Case
    finds: str
    """The start of a finding's kind, or CONTRACT."""
    kernel: str = ""
    pattern: str = ""
    replacement: str = ""
    count: int = 0
    """How many matches are replaced; 0: all."""
    patch: Callable | None = None
    """A context in which the case runs, for faults that are not in the PTX."""


def swapped_pointers():
    """The first two pointers change places on their way to every kernel."""
    pack = driver.pack

    def swapped(kernel, arguments):
        packed = bytearray(pack(kernel, arguments))
        a, b = [p.offset for p in kernel.parameters if p.pointer][:2]
        packed[a : a + 8], packed[b : b + 8] = packed[b : b + 8], packed[a : a + 8]
        return bytes(packed)

    return mock.patch.object(driver, "pack", swapped)


def unaligned_pointer():
    """A kernel that was compiled for addresses which 16 divides is called with one that it does not."""
    pack = driver.pack

    def shifted(kernel, arguments):
        packed = bytearray(pack(kernel, arguments))
        packed[0] += 2 if kernel.name == "_class_anchors_fwd" else 0
        return bytes(packed)

    return mock.patch.object(driver, "pack", shifted)


DIVERGED = "{ .reg .pred %few; .reg .b32 %t; mov.u32 %t, %tid.x; setp.lt.u32 %few, %t, 5; @%few bar.sync 0; }"
BARRIER, FULL_SUM = r"bar\.sync\s+0;", r"atom\.global\.gpu\.relaxed\.add\.u64 %\w+, (\[[^\]]*\]), (%\w+);"
MMA = r"(mma\.sync[^{]*\{[^}]*\}, )\{ *(%\w+), *(%\w+),([^}]*\}, \{[^}]*\}, )\{[^}]*\}"

FAULTS = [
    Fault("one barrier dropped", HARD, "race in shared memory", "_class_anchors_fwd", BARRIER, "", 3),
    Fault("all barriers of a kernel dropped", GIVEN, "race in shared memory", "_pixel_anchor_fwd", BARRIER),
    Fault("a barrier in a divergent branch", HARD, "not all lanes", "_label_codes", BARRIER, DIVERGED, 1),
    Fault("masks of loads lost", GIVEN, "outside of every tensor", "_pixel_anchor_fwd", r"@%p\d+ (ld\.global)", r"\1"),
    Fault("masks of stores lost", HARD, "outside of every tensor", "_label_codes", r"@%p\d+ (st\.global)", r"\1"),
    Fault("a store to shared memory lost", HARD, "undefined", "_class_anchors_fwd", r"(@!?%p\d+ )?st\.shared[^;]*;"),
    Fault("loads two bytes further on", GIVEN, "address not aligned", "_pixel_anchor_fwd",
          r"(ld\.global\.v4\.b32[^\[]*\[ %rd\d+ \+) 0", r"\1 2"),
    Fault("a pointer that is not aligned as promised", HARD, "address not aligned", patch=unaligned_pointer),
    Fault("sums without atomics", HARD, "race in global memory", "_class_anchors_fwd", FULL_SUM,
          r"st.global.b64 \1, \2;"),
    Fault("a maximum in place of a sum", HARD, CONTRACT, "_class_anchors_fwd", r"relaxed\.add\.u64", "relaxed.max.u64"),
    Fault("the block's index of another axis", HARD, CONTRACT, "_features_bwd", r"%ctaid\.x", "%ctaid.y"),
    Fault("rows of the first operand swapped", GIVEN, CONTRACT, "_pixel_anchor_fwd", MMA,
          r"\1{\3, \2,\4{0f00000000, 0f00000000, 0f00000000, 0f00000000}"),
    Fault("tensor cores without a proxy fence", ROWS, "tensor cores read shared", "_info_nce_log_sums",
          r"fence\.proxy\.async[^;]*;"),
    Fault("results of wgmma without wait_group", ROWS, "undefined", "_info_nce_log_sums", r"wgmma\.wait_group[^;]*;"),
    Fault("copies that nobody waits for", HARD, "undefined", "_pixel_anchor_fwd",
          r"cp\.async\.wait_group[^;]*;", "cp.async.wait_group 15;"),
    Fault("a descriptor 16 bytes further on", ROWS, CONTRACT, "_info_nce_log_sums",
          r"(wgmma\.mma_async[^;]*?, )(%rd\d+), (%p\d+|\d+), 1, 1", r"add.s64 \2, \2, 1; \1\2, \3, 1, 1"),
    Fault("a stride twice as long", HARD, CONTRACT, "_hard_similarities", r"(mad|mul)\.wide\.s32([^;]*), 2([,;])",
          r"\1.wide.s32\2, 4\3"),
    Fault("two pointers swapped on their way", HARD, "", patch=swapped_pointers),
]  # fmt: skip


def breaks_the_contract(case: Case, found) -> bool:
    built = build(case)
    with ck.backend("reference"):
        true = run(built.reference, built.leaves, torch.float64)
        own = run(built.reference, built.leaves)
    return any(
        not relative(ours, value) <= 2 * relative(theirs, value) + 1e-6 for ours, value, theirs in zip(found, true, own)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_planted_fault_is_seen(fault):
    from contextrast_kernels.kernels._tile_table import copies_rows

    if "cp\\.async" in fault.pattern and not copies_rows(torch.bfloat16, fault.case.D):
        pytest.skip("kernels copy rows from Triton 3.8 on")
    planted = 0

    def mutate(kernel: str, ptx: str) -> str:
        nonlocal planted
        if kernel != fault.kernel:
            return ptx
        ptx, number = re.subn(fault.pattern, fault.replacement, ptx, count=fault.count)
        planted += number
        return ptx

    built = build(fault.case)
    with (fault.patch or contextlib.nullcontext)(), emulated(90, Schedule(seed=1), mutate=mutate) as gpu:
        found = run(built.loss, built.leaves)
    assert planted or fault.patch, "the kernel has nothing like that any more: plant the fault elsewhere"
    kinds = {finding.kind for finding in gpu.faults() if not fault.kernel or finding.kernel == fault.kernel}
    if fault.finds == CONTRACT:
        assert kinds or breaks_the_contract(fault.case, found)
    else:
        assert any(kind.startswith(fault.finds) for kind in kinds), kinds


def test_arguments_that_the_ptx_does_not_declare_are_refused():
    built = build(ANCHORS)
    flatten = driver.flatten
    with (
        emulated(90),
        mock.patch.object(driver, "flatten", lambda *given: list(flatten(*given))[1:]),
        pytest.raises(Mispacked, match="arguments for"),
    ):
        run(built.loss, built.leaves)


def test_the_cases_themselves_have_no_fault():
    for case in (HARD, GIVEN, ROWS, ANCHORS):
        built = build(case)
        with emulated(90, Schedule(seed=1)) as gpu:
            found = run(built.loss, built.leaves)
        assert not gpu.faults(), "\n".join(map(str, gpu.faults()))
        assert not breaks_the_contract(case, found)
