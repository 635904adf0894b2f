"""The machine itself, on programs written by hand: what instructions compute, against NumPy, and a smallest program for
every kind of finding."""

import numpy as np
import pytest

from .checks import HARMLESS, KINDS, faults
from .engine import Extent, Program, Schedule
from .reader import Unknown

WIDTHS = {"u16": 2, "s16": 2, "f16": 2, "u32": 4, "s32": 4, "f32": 4, "u64": 8, "s64": 8, "f64": 8}
NUMPY = {kind: np.dtype({"u": "uint", "s": "int", "f": "float"}[kind[0]] + kind[1:]) for kind in WIDTHS}


def program(body: str, shared: int = 256) -> Program:
    """A kernel of two warps with two pointers, %in and %out; %x and %y are this thread's addresses in them, 8 bytes
    apart."""
    return Program(f"""
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 .ptr .global in, .param .u64 .ptr .global out) .reqntid 64
{{
    .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<20>; .reg .b64 %d<20>; .reg .b64 %x; .reg .b64 %y; .reg .b32 %tid;
    .reg .b64 %in; .reg .b64 %out; .reg .b32 %lane;
    .shared .align 16 .b8 memory[{shared}];
    ld.param.b64 %in, [in];
    ld.param.b64 %out, [out];
    mov.u32 %tid, %tid.x;
    mov.u32 %lane, %laneid;
    mad.wide.u32 %x, %tid, 8, %in;
    mad.wide.u32 %y, %tid, 8, %out;
    {body}
    ret;
}}
""")


def execute(body: str, given: np.ndarray | None = None, grid: int = 1, undefined: bool = False, **schedule):
    """(64 words of output, findings). The input has 64 words of 8 bytes."""
    given = np.arange(64, dtype=np.uint64) if given is None else given
    output = np.zeros(64, np.uint64)
    marks = np.ones(given.nbytes, np.uint8) if undefined else None
    extents = [
        Extent(given.ctypes.data, given.ctypes.data + given.nbytes, marks, 8, name="the input"),
        Extent(output.ctypes.data, output.ctypes.data + output.nbytes, grain=8, name="the output"),
    ]
    parameters = np.array([given.ctypes.data, output.ctypes.data], np.uint64).tobytes()
    result = program(body).run(
        arch=90, grid=(grid, 1, 1), block=(64, 1, 1), parameters=parameters, extents=extents,
        schedule=Schedule(**schedule), limit=100_000,
    )  # fmt: skip
    return output, result.findings


# -------------------------------------------------------------------------------------------------------- instructions


def values(kind: str, rng) -> np.ndarray:
    """64 numbers of a type, the awkward ones first."""
    dtype = NUMPY[kind]
    if kind[0] == "f":
        special = [
            0.0,
            -0.0,
            np.inf,
            -np.inf,
            np.nan,
            np.finfo(dtype).max,
            np.finfo(dtype).smallest_subnormal,
            1.0,
            -1.0,
        ]
        return np.concatenate([special, rng.standard_normal(64 - len(special)) * 10]).astype(dtype)
    info = np.iinfo(dtype)
    special = [0, 1, info.max, info.min, 31, 32, 33, 63, 64]
    return np.array([*special, *rng.integers(info.min, info.max, 64 - len(special), dtype)], dtype)


def shift(function):
    return lambda x, y: np.where(y >= 8 * x.itemsize, 0, function(x, np.minimum(y, 8 * x.itemsize - 1).astype(x.dtype)))


INSTRUCTIONS = {
    # instruction: types of the result and the sources, and what NumPy says
    "add.s32": ("s32", ["s32", "s32"], np.add),
    "sub.u16": ("u16", ["u16", "u16"], np.subtract),
    "mul.lo.s64": ("s64", ["s64", "s64"], np.multiply),
    "mul.hi.u32": ("u32", ["u32", "u32"], lambda x, y: (x.astype(np.uint64) * y >> np.uint64(32)).astype(np.uint32)),
    "mul.hi.s32": ("s32", ["s32", "s32"], lambda x, y: (x.astype(np.int64) * y >> 32).astype(np.int32)),
    "mul.wide.s32": ("s64", ["s32", "s32"], lambda x, y: x.astype(np.int64) * y),
    "mad.lo.s32": ("s32", ["s32", "s32", "s32"], lambda x, y, z: x * y + z),
    "and.b32": ("u32", ["u32", "u32"], np.bitwise_and),
    "xor.b64": ("u64", ["u64", "u64"], np.bitwise_xor),
    "not.b32": ("u32", ["u32"], np.invert),
    "shl.b32": ("u32", ["u32", "u32"], shift(np.left_shift)),
    "shr.u32": ("u32", ["u32", "u32"], shift(np.right_shift)),
    "shr.s32": ("s32", ["s32", "u32"], lambda x, y: x >> np.minimum(y, 31).astype(np.int32)),
    "min.s32": ("s32", ["s32", "s32"], np.minimum),
    "max.u64": ("u64", ["u64", "u64"], np.maximum),
    "popc.b32": ("u32", ["u32"], lambda x: np.array([bin(v).count("1") for v in x], np.uint32)),
    "clz.b32": ("u32", ["u32"], lambda x: np.array([32 - int(v).bit_length() for v in x], np.uint32)),
    "brev.b32": ("u32", ["u32"], lambda x: np.array([int(f"{v:032b}"[::-1], 2) for v in x], np.uint32)),
    "add.rn.f32": ("f32", ["f32", "f32"], np.add),
    "mul.rn.f64": ("f64", ["f64", "f64"], np.multiply),
    "div.rn.f32": ("f32", ["f32", "f32"], np.divide),
    "sqrt.rn.f32": ("f32", ["f32"], np.sqrt),
    "fma.rn.f32": ("f32", ["f32"] * 3, lambda x, y, z: (np.float64(x) * y + z).astype(np.float32)),
    "min.f32": ("f32", ["f32", "f32"], np.fmin),
    "neg.f32": ("f32", ["f32"], np.negative),
    "abs.f64": ("f64", ["f64"], np.abs),
    "add.rn.f16": ("f16", ["f16", "f16"], np.add),
    "mul.rn.f16": ("f16", ["f16", "f16"], np.multiply),
    "cvt.rn.f16.f32": ("f16", ["f32"], lambda x: x.astype(np.float16)),
    "cvt.f32.f16": ("f32", ["f16"], lambda x: x.astype(np.float32)),
    "cvt.rn.f32.s32": ("f32", ["s32"], lambda x: x.astype(np.float32)),
    "cvt.rn.f32.f64": ("f32", ["f64"], lambda x: x.astype(np.float32)),
    "cvt.s64.s32": ("s64", ["s32"], lambda x: x.astype(np.int64)),
    "cvt.u16.u32": ("u16", ["u32"], lambda x: x.astype(np.uint16)),
    "cvt.rzi.s32.f32": ("s32", ["f32"], lambda x: np.nan_to_num(x.astype(float)).clip(-(2**31), 2**31 - 1).astype(int)),
}  # fmt: skip


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_instruction_equals_numpy(name, rng):
    result, sources, expected = INSTRUCTIONS[name]
    prefix = {2: "%h", 4: "%r", 8: "%d"}
    given = [rng.permutation(values(kind, rng)) for kind in sources]
    words = np.zeros((64, 4), np.uint64)
    for k, x in enumerate(given):
        words[:, k] = x.view(f"uint{8 * x.itemsize}")
    loads = "".join(
        f"ld.global.b{8 * WIDTHS[kind]} {prefix[WIDTHS[kind]]}{k + 1}, [%d0+{8 * k}];" for k, kind in enumerate(sources)
    )
    arguments = ", ".join(f"{prefix[WIDTHS[kind]]}{k + 1}" for k, kind in enumerate(sources))
    target = f"{prefix[WIDTHS[result]]}0" if WIDTHS[result] < 8 else "%d9"
    body = f"""mad.wide.u32 %d0, %tid, 32, %in; {loads} {name} {target}, {arguments};
               st.global.b{8 * WIDTHS[result]} [%y], {target};"""
    output, findings = execute(body, words)
    assert not faults(findings)
    got = output.view(NUMPY[result])[:: 8 // WIDTHS[result]]
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, expected(*given))


def test_predicates_select_and_lanes_meet_again():
    body = """setp.lt.u32 %p1, %lane, 5;
              @%p1 bra LOW;
              mov.u32 %r1, 10;
              bra.uni END;
              LOW: mov.u32 %r1, 20;
              END: shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
              selp.b32 %r3, %r2, 0, %p1;
              st.global.b32 [%y], %r3;"""
    output, findings = execute(body)
    assert not faults(findings)
    assert output.tolist() == [10 if k % 32 < 5 else 0 for k in range(64)]


def test_bfloat16_rounds_to_even(rng):
    x = np.concatenate([np.float32([1 + 2**-8, 1 + 3 * 2**-8, np.nan, np.inf, 3.4e38]), rng.standard_normal(59)])
    words = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    output, _ = execute("ld.global.b32 %r1, [%x]; cvt.rn.bf16.f32 %h1, %r1; st.global.b16 [%y], %h1;", words)
    import torch

    expected = torch.from_numpy(x.astype(np.float32)).bfloat16().float()
    got = torch.from_numpy((output.astype(np.uint32) << 16).view(np.float32))
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_an_unknown_instruction_is_an_error():
    for body in ("tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [in, {%r1, %r2}];", "add.sat.s32 %r1, %r2, %r3;"):
        with pytest.raises(Unknown, match=body.split()[0]):
            program(body)


@pytest.mark.parametrize(("apart", "wavefronts"), [(8, 4), (128, 64)], ids=["neighbours", "one bank"])
def test_bank_conflicts_of_a_copy_to_shared_memory_are_counted(apart, wavefronts):
    """16 lanes copy 8 bytes each in one wavefront, or in 16 if they share a bank."""
    given = np.zeros(64, np.uint64)
    where = given.ctypes.data, given.ctypes.data + given.nbytes
    copy = program(
        f"mov.b32 %r1, memory; mad.lo.u32 %r2, %tid, {apart}, %r1; cp.async.ca.shared.global [%r2], [%x], 8;"
        "cp.async.commit_group; cp.async.wait_group 0;",
        shared=64 * apart,
    )
    result = copy.run(
        arch=90, grid=(1, 1, 1), block=(64, 1, 1), parameters=np.array([where[0]] * 2, np.uint64).tobytes(),
        extents=[Extent(*where, grain=8, name="the input")], count_memory=True,
    )  # fmt: skip
    [i] = [i for i, instruction in enumerate(copy.kernel.instructions) if instruction.kind == "ld global to shared"]
    assert not result.findings
    assert (result.counts[i]["wavefronts"], result.counts[i]["ideal"]) == (wavefronts, 4)


# ------------------------------------------------------------------------------------------------------------ findings

SHARED = "mov.b32 %r1, memory; mad.lo.u32 %r2, %tid, 4, %r1;"  # this thread's word
MATRIX = "{%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3};"
PROGRAMS = {
    "outside of every tensor that was passed": "ld.global.b64 %d1, [%x+8]; st.global.b64 [%y], 0;",
    "address not aligned to the access": "st.global.b32 [%y+2], 0;",
    "outside of shared memory": f"{SHARED} st.shared.b32 [%r2+4], 0;",
    "shared address not aligned to the access": f"{SHARED} setp.eq.u32 %p1, %tid, 0; @%p1 st.shared.b32 [%r2+1], 0;",
    "outside of the parameters": "ld.param.b64 %d1, [out+8];",
    "undefined value stored": "st.global.b32 [%y], %r9;",
    "undefined address": "add.s64 %d2, %x, %d1; ld.global.b64 %d3, [%d2];",
    "undefined branch or guard": "setp.eq.u32 %p1, %r9, 0; @%p1 bra END; END: mov.u32 %r1, 0;",
    "undefined bytes read": "ld.global.b64 %d1, [%x];",
    "undefined value in an atomic": "atom.global.add.u32 %r1, [%y], %r9;",
    "race in shared memory": f"{SHARED} st.shared.b32 [%r2], %tid; xor.b32 %r3, %tid, 32; mad.lo.u32 %r4, %r3, 4, %r1;"
    "ld.shared.b32 %r5, [%r4];",
    "race in global memory between warps of a block": "mad.wide.u32 %d1, %lane, 8, %out; st.global.b64 [%d1], %x;",
    "race in global memory between blocks": "mov.u32 %r1, %ctaid.x; st.global.b32 [%y], %r1;",
    "lanes of a warp exchange values without a warp barrier": f"{SHARED} st.shared.b32 [%r2], %tid;"
    "xor.b32 %r3, %tid, 1; mad.lo.u32 %r4, %r3, 4, %r1; ld.shared.b32 %r5, [%r4];",
    "lanes of one store bring different values to one address": "st.global.b32 [%out], %tid;",
    "same value written to shared memory by several warps": f"{SHARED} mad.lo.u32 %r3, %lane, 4, %r1;"
    "st.shared.b32 [%r3], 7; st.shared.b32 [%r3], 7;",
    "same value written to global memory by several warps or blocks": "st.global.b64 [%out], 0;",
    "not all lanes take part": "setp.lt.u32 %p1, %lane, 5; @%p1 bar.sync 0;",
    "warps wait at different barriers, or have ended": "setp.lt.u32 %p1, %tid, 32; @%p1 bra A; bar.sync 0; bra.uni B;"
    "A: bar.sync 0; B: mov.u32 %r1, 0;",
    "integer division by zero": "mov.u32 %r1, 0; div.u32 %r2, %tid, %r1;",
    "trap, or too many instructions": "AGAIN: bra.uni AGAIN;",
    "read through the cache for read-only data of what this launch writes": "st.global.b64 [%y], 0;"
    "ld.global.nc.b64 %d1, [%y];",
    "tensor cores read shared memory without a proxy fence": "",
    "descriptor of a matrix in shared memory": "",
}


def wgmma(descriptor: str, fence: str) -> str:
    """One product of a warp group with B in shared memory; the block has two warps, which is enough for it here."""
    sums = ", ".join(f"%r{k}" for k in range(4))
    return f"""{SHARED} mov.b32 %r1, memory; mad.lo.u32 %r2, %tid, 4, %r1; st.shared.b32 [%r2], 0; {fence} bar.sync 0;
        shr.u32 %r3, %r1, 4; cvt.u64.u32 %d1, %r3; or.b64 %d1, %d1, {1 << 16 | 1 << 32}; {descriptor}
        mov.u32 %r10, 0; mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0;
        wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{{sums}}}, {{%r10, %r11, %r12, %r13}}, %d1, 0, 1, 1, 0;
        wgmma.wait_group.sync.aligned 0;"""


ALLOCATED = """mov.b32 %r1, memory; setp.lt.u32 %p1, %tid, 32; shl.b32 %r2, %tid, 16; and.b32 %r2, %r2, 2097152;
    @%p1 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32; bar.sync 0;"""
FREED = "bar.sync 0; @%p1 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r3, 32;"
HALF_DEFINED = "mov.u16 %h1, 7; mov.b32 %r1, {%h1, %h2}; mov.b32 %r2, %r1;"
"""%r2 has 7 in its lower half, and nothing was written to the upper one."""
STORED = "tcgen05.st.sync.aligned.16x32bx2.x1.b32 [%r2], 1, {%tid};"
PROGRAMS["outside of the tensor memory that was allocated, or not freed"] = ALLOCATED
PROGRAMS["tensor memory used before its product or store was waited for"] = (
    f"{ALLOCATED} {STORED} tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {{%r4}}, [%r2], 1; {FREED}"
)
PROGRAMS["race in tensor memory"] = f"{ALLOCATED} mov.u32 %r2, 0; {STORED} tcgen05.wait::st.sync.aligned; {FREED}"
PROGRAMS["tensor cores read shared memory without a proxy fence"] = wgmma("", "")
PROGRAMS["descriptor of a matrix in shared memory"] = wgmma("or.b64 %d1, %d1, 562949953421312;", "fence.proxy.async;")


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_program_for_each_kind_of_finding_is_reported(kind):
    _, findings = execute(PROGRAMS[kind], grid=2, undefined=kind == "undefined bytes read")
    found = [finding for finding in findings if finding.kind == kind]
    assert found, [finding.kind for finding in findings]
    assert found[0].kernel == "kernel" and found[0].count > 0 and found[0].ptx
    assert (kind in HARMLESS) == (not faults(found))


@pytest.mark.parametrize(
    "read",
    [
        "mov.b32 {%h3, %h4}, %r2; st.global.b16 [%y], %h4;",
        "st.global.b32 [%y], %r2;",
        "prmt.b32 %r3, %r2, %tid, 0x2041U; st.global.b32 [%y], %r3;",
    ],
    ids=["half", "whole", "byte"],
)
def test_an_undefined_half_of_a_register_is_undefined(read):
    _, findings = execute(f"{HALF_DEFINED} {read}")
    assert [finding.kind for finding in findings] == ["undefined value stored"]


def test_every_kind_of_finding_has_a_program():
    assert set(PROGRAMS) == set(KINDS)


@pytest.mark.parametrize(
    "body",
    [
        f"{SHARED} st.shared.b32 [%r2], %tid; bar.sync 0; xor.b32 %r3, %tid, 32; mad.lo.u32 %r4, %r3, 4, %r1;"
        "ld.shared.b32 %r5, [%r4]; st.global.b32 [%y], %r5;",
        f"{SHARED} st.shared.b32 [%r2], %tid; bar.warp.sync -1; xor.b32 %r3, %tid, 1; mad.lo.u32 %r4, %r3, 4, %r1;"
        "ld.shared.b32 %r5, [%r4]; st.global.b32 [%y], %r5;",
        "atom.global.add.u32 %r1, [%out], 1;",
        "setp.lt.u32 %p1, %tid, 64; ld.global.b64 %d1, [%x]; @%p1 st.global.b64 [%y], %d1;",
        wgmma("", "fence.proxy.async;"),
        f"{ALLOCATED} {STORED} tcgen05.wait::st.sync.aligned;"
        f"tcgen05.ld.sync.aligned.16x32bx2.x1.b32 {{%r4}}, [%r2], 1; st.global.b32 [%y], %r4; {FREED}",
        f"{HALF_DEFINED} mov.b32 {{%h3, %h4}}, %r2; st.global.b16 [%y], %h3;",
        f"{HALF_DEFINED} prmt.b32 %r3, %r2, %tid, 0x1041U; st.global.b32 [%y], %r3;",
    ],
    ids=[
        "barrier",
        "warp barrier",
        "atomics",
        "guard",
        "proxy fence",
        "tensor memory",
        "defined half of a register",
        "bytes of it",
    ],
)
def test_correct_programs_give_no_finding(body):
    for quantum in (0, 3):
        _, findings = execute(body, quantum=quantum, seed=5)
        assert not findings, findings
