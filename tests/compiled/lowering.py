"""What each PTX opcode means: the engine's instruction, its operands and its numbers.

``lower`` looks up the part of the opcode before the first dot. To add an instruction, write a function under
``@opcode("...")`` that returns a Lowered, and define its name in the engine. A modifier that a function does not
expect raises Unknown: nothing is ignored.
"""

import re
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .reader import SPECIAL, Constant, Instruction, Kernel, Operand, Register, Special, Unknown


class Lowered(NamedTuple):
    handler: str
    operands: Sequence[Operand] = ()
    numbers: Sequence[int] = ()
    kind: str = "integer"


OPCODES: dict[str, Callable[[Kernel, Instruction], Lowered]] = {}


def opcode(*names: str):
    def enter(function):
        OPCODES.update(dict.fromkeys(names, function))
        return function

    return enter


def lower(kernel: Kernel, instruction: Instruction) -> None:
    found = OPCODES[instruction.parts[0]](kernel, instruction)
    instruction.handler, instruction.kind = found.handler, found.kind
    instruction.operands, instruction.numbers = list(found.operands), list(found.numbers)


# ----------------------------------------------------------------------------------------------------------- operands


class Type(NamedTuple):
    letter: str
    """u, s, b, f or bf."""
    bits: int

    @property
    def bytes(self) -> int:
        return self.bits // 8

    @property
    def floating(self) -> bool:
        return self.letter in ("f", "bf")

    @property
    def width(self) -> int:
        """Bytes of the narrowest register that holds it."""
        return max(self.bytes, 2)


def type_named(text: str) -> Type:
    found = re.fullmatch(r"(bf|[usbf])(\d+)", text)
    if not found:
        raise Unknown(f"type {text}")
    return Type(found[1], int(found[2]))


def constant(text: str, width: int, floating: bool = False) -> int | None:
    """The bits of a constant in a register of ``width`` bytes; None if the text is no constant."""
    if found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
        return int(found[1], 16)
    if found := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
        bits = int(found[1], 16)
        return bits if width == 8 else float_bits(struct.unpack("<d", struct.pack("<Q", bits))[0], width)
    if found := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?", text):
        value = int(found[2], 0) if found[2][:2].lower() == "0x" else int(found[2])
        value = -value if found[1] else value
        return float_bits(value, width) if floating else value & ((1 << 8 * width) - 1)
    return None


def float_bits(value: float, width: int) -> int:
    code, integer = {2: ("<e", "<H"), 4: ("<f", "<I"), 8: ("<d", "<Q")}[width]
    return struct.unpack(integer, struct.pack(code, value))[0]


def operand(kernel: Kernel, text: str, width: int, floating: bool = False) -> Operand:
    """A register, a special register, a constant, or the address of a parameter or a shared array."""
    if text == "_":
        return None
    if text in SPECIAL:
        return Special(SPECIAL.index(text))
    if kernel.is_register(text):
        return Register(text)
    bits = constant(text, width, floating)
    if bits is None:
        name, _, plus = (part.strip() for part in text.partition("+"))
        places = {p.name: p.offset for p in kernel.parameters} | {n: v.offset for n, v in kernel.shared.items()}
        if name not in places:
            raise Unknown(f"operand {text}")
        bits = places[name] + int(plus or "0", 0)
    return Constant(width, bits)


def operands(kernel: Kernel, kind: Type, *texts: str, width: int | None = None) -> list[Operand]:
    return [operand(kernel, text, width or kind.width, kind.floating) for text in texts]


def group(text: str) -> list[str]:
    """The registers of ``{a, b}``, or the one that stands alone."""
    return [part.strip() for part in text.strip("{} ").split(",")]


def predicate(text: str) -> tuple[Register, int]:
    """A predicate, and whether it is negated."""
    return Register(text.lstrip("!")), int(text.startswith("!"))


class Address(NamedTuple):
    base: Operand
    offset: int
    width: int
    """Bytes of the address itself: 4 in a shared memory window, else 8."""


def address(kernel: Kernel, text: str) -> Address:
    base, offset = text.strip()[1:-1].strip(), 0
    if found := re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", base):
        base, offset = found[1].strip(), int(found[2], 0)
    width = kernel.width(base) if kernel.is_register(base) else 8
    return Address(operand(kernel, base, width), offset, width)


def expect(instruction: Instruction, *allowed: str, of: list[str] | None = None) -> None:
    """Every part of the opcode between its name and its type is one of these."""
    unknown = set(instruction.parts[1:-1] if of is None else of) - set(allowed)
    if unknown:
        raise Unknown(f"modifier {sorted(unknown)}")


def one_of(parts: list[str], table: dict[str, int]) -> int:
    return next(table[part] for part in parts if part in table)


# ------------------------------------------------------------------------------------------------------------ control


@opcode("bra")
def _branch(kernel, i):
    return Lowered("branch", kind="control")


@opcode("ret", "exit")
def _return(kernel, i):
    return Lowered("return", kind="control")


@opcode("trap")
def _trap(kernel, i):
    return Lowered("trap", kind="control")


@opcode("bar", "barrier")
def _barrier(kernel, i):
    if "warp" in i.parts:
        return Lowered("warp.barrier", kind="control")
    if i.parts[1:] == ["red", "or", "pred"] and i.arguments[1] == "0" and len(i.arguments) == 3:
        asked, negated = predicate(i.arguments[2])
        return Lowered("barrier", [Register(i.arguments[0]), asked], [1, negated], "barrier")
    if "sync" not in i.parts or len(i.arguments) > 1:
        raise Unknown("a barrier of some threads")
    return Lowered("barrier", kind="barrier")


@opcode("membar", "fence")
def _fence(kernel, i):
    if "proxy" in i.parts:
        return Lowered("fence.proxy", kind="control")
    device = i.opcode in ("membar.gl", "membar.sys", "fence.acq_rel.gpu", "fence.sc.gpu")
    return Lowered("fence.device" if device else "nop", kind="control")


# ------------------------------------------------------------------------------------------------------------- memory

CACHE_HINTS = ("volatile", "relaxed", "weak", "nc", "ca", "cg", "cs", "cta", "gpu", "sys", "L1", "evict_first")


@opcode("ld", "ldu", "st")
def _transfer(kernel, i):
    loads = i.parts[0] != "st"
    parts = i.opcode.replace("shared::cta", "shared").replace("L1::", "").split(".")
    # A generic address is taken for one of global memory: any other lies outside of every tensor.
    space = next((part for part in parts if part in ("global", "shared", "param")), "global")
    expect(i, space, "v2", "v4", "v8", "evict_last", "no_allocate", *CACHE_HINTS, of=parts[1:-1])
    kind = type_named(parts[-1])
    value, where = i.arguments if loads else reversed(i.arguments)
    values, at = group(value), address(kernel, where)
    if len(values) != next((int(part[1]) for part in parts if re.fullmatch(r"v\d", part)), 1):
        raise Unknown("vector")
    width = next((kernel.width(v) for v in values if kernel.is_register(v)), kind.width)
    moved = [operand(kernel, v, width, kind.floating) for v in values]
    numbers = [kind.bytes, int(kind.letter == "s"), len(values), width, at.offset, at.width, int("nc" in parts)]
    name = "ld" if loads else "st"
    return Lowered(f"{name}.{space}", [*moved, at.base] if loads else [at.base, *moved], numbers, f"{name} {space}")


UPDATES = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5, "exch": 6, "cas": 7}


@opcode("atom", "red")
def _atomic(kernel, i):
    parts = i.opcode.replace("shared::cta", "shared").split(".")
    spaces = [part for part in parts if part in ("global", "shared")]
    if len(spaces) != 1:
        raise Unknown("state space")
    expect(i, *spaces, *UPDATES, "relaxed", "acq_rel", "acquire", "release", "cta", "gpu", "sys", of=parts[1:-1])
    kind = type_named(parts[-1])
    if kind.floating and kind.bits < 32:
        raise Unknown(f"type {parts[-1]}")
    old, where, *values = i.arguments if parts[0] == "atom" else ["_", *i.arguments]
    at = address(kernel, where)
    taken = [operand(kernel, old, kind.width), at.base, *operands(kernel, kind, *values)]
    number = {"s": 1, "f": 2}.get(kind.letter, 0)
    numbers = [kind.bytes, number, one_of(parts, UPDATES), int(spaces[0] == "shared"), at.offset, at.width]
    return Lowered("atom", taken, numbers, f"atom {spaces[0]}")


@opcode("cp")
def _copy_async(kernel, i):
    parts = i.opcode.replace("shared::cta", "shared").split(".")
    if parts[1:] == ["async", "commit_group"]:
        return Lowered("cp.async.commit", kind="control")
    if parts[1:] == ["async", "wait_group"]:
        return Lowered("cp.async.wait", numbers=[int(i.arguments[0], 0)], kind="control")
    if parts[1] != "async" or parts[3:] != ["shared", "global"]:
        raise Unknown("a copy of another kind")
    expect(i, "ca", "cg", of=parts[2:3])
    to, source = address(kernel, i.arguments[0]), address(kernel, i.arguments[1])
    size = operand(kernel, i.arguments[-1], 4)
    numbers = [int(i.arguments[2], 0), 0, 0, 0, to.offset, to.width, source.offset, source.width]
    return Lowered("cp.async", [to.base, source.base, size], numbers, "ld global to shared")


@opcode("ldmatrix", "stmatrix")
def _matrix(kernel, i):
    loads = i.parts[0] == "ldmatrix"
    if "m8n8" not in i.parts or i.parts[-1] != "b16":
        raise Unknown("shape")
    value, where = i.arguments if loads else reversed(i.arguments)
    at = address(kernel, where)
    values = [operand(kernel, v, 4) for v in group(value)]
    numbers = [len(values), int("trans" in i.parts), 0, 0, at.offset, at.width]
    taken = [*values, at.base] if loads else [at.base, *values]
    return Lowered(i.parts[0], taken, numbers, "ld shared" if loads else "st shared")


# ------------------------------------------------------------------------------------------------------- tensor cores

MATRIX_TYPES = {"f16": 0, "bf16": 1, "tf32": 2, "f64": 3}


@opcode("mma")
def _mma(kernel, i):
    expect(
        i, "sync", "aligned", "row", "col", *MATRIX_TYPES, of=[p for p in i.parts[1:-1] if not re.match(r"m\d|f32", p)]
    )
    shape = next(found for part in i.parts if (found := re.fullmatch(r"m(\d+)n8k(\d+)", part)))
    M, K = map(int, shape.groups())
    result, a, b, c = i.parts[i.parts.index("col") + 1 :]
    if result != c or a != b or result not in ("f32", "f64") or "row" not in i.parts:
        raise Unknown("types")
    double = a == "f64"
    registers = [operand(kernel, r, 8 if double else 4, True) for part in i.arguments for r in group(part)]
    per = 2 if MATRIX_TYPES[a] < 2 else 1
    sums = M // 8 * 2 if double else 4
    parts = M // 8 * K // 4 + K // 4 if double else K // (2 * per) + K // (4 * per)
    if len(registers) != 2 * sums + parts or (not double and M != 16):
        raise Unknown("fragments")
    return Lowered("mma.f64" if double else "mma", registers, [MATRIX_TYPES[a], K, M], "tensor core")


@opcode("wgmma")
def _wgmma(kernel, i):
    if "wait_group" in i.parts:
        return Lowered("wgmma.wait", numbers=[int(i.arguments[0])], kind="control")
    if "mma_async" not in i.parts:
        expect(i, "fence", "commit_group", "sync", of=i.parts[1:-1])
        return Lowered("nop", kind="control")
    shape = next(found for part in i.parts if (found := re.fullmatch(r"m64n(\d+)k(\d+)", part)))
    N, K = map(int, shape.groups())
    result, a, b = i.parts[-3:]
    if result != "f32" or a != b:
        raise Unknown("types")
    sums, A, B, accumulate, scale_a, scale_b, *transposed = i.arguments
    if (scale_a, scale_b) != ("1", "1") or len(group(sums)) != N // 2:
        raise Unknown("negation or fragments")
    shared_a = not A.startswith("{")
    if MATRIX_TYPES[a] == 2:
        a_transposed = b_transposed = 0
    else:
        a_transposed, b_transposed = map(int, transposed if shared_a else ["0", *transposed])
    registers: list[Operand] = [Register(r) for r in (*group(sums), *group(A), B)]
    fixed = constant(accumulate, 4)
    if fixed is None:
        registers.append(Register(accumulate))
    numbers = [MATRIX_TYPES[a], N, K, int(shared_a), a_transposed, b_transposed, fixed or 0, int(fixed is None)]
    return Lowered("wgmma", registers, numbers, "tensor core")


# ------------------------------------------------------------------------------------------ Blackwell's tensor memory


@opcode("tcgen05")
def _tensor_memory(kernel, i):
    what, arguments = i.parts[1], i.arguments
    if what in ("relinquish_alloc_permit", "wait::ld") or what.startswith("fence"):
        return Lowered("nop", kind="control")
    if what == "wait::st":
        return Lowered("tcgen05.wait::st", kind="control")
    if what == "dealloc":
        return Lowered("tcgen05.dealloc", numbers=[int(arguments[1])], kind="control")
    at = address(kernel, arguments[1] if what == "ld" else arguments[0])
    where = [at.offset, at.width]
    if what == "alloc":
        return Lowered("tcgen05.alloc", [at.base], [int(arguments[1]), 0, 0, 0, *where], "control")
    if what == "commit":
        expect(i, "cta_group::1", "mbarrier::arrive::one", "shared::cluster", of=i.parts[2:-1])
        return Lowered("tcgen05.commit", [at.base], [0, 0, 0, 0, *where], "control")
    if what in ("ld", "st"):
        expect(i, "sync", "aligned", "16x32bx2", *(p for p in i.parts if re.fullmatch(r"x\d+", p)), of=i.parts[2:-1])
        half, values = (arguments[2], arguments[0]) if what == "ld" else (arguments[1], arguments[2])
        registers = [operand(kernel, r, 4) for r in group(values)]
        taken = [*registers, at.base] if what == "ld" else [at.base, *registers]
        return Lowered(f"tcgen05.{what}", taken, [len(registers), int(half), 0, 0, *where], f"{what} tensor")
    if what != "mma" or len(arguments) != 5:
        raise Unknown(what)
    kinds = {"kind::f16": 0, "kind::tf32": 2}
    expect(i, "cta_group::1", *kinds, of=i.parts[2:])
    _, a, b, descriptor, accumulate = arguments
    in_tensor_memory = a.startswith("[")
    A = address(kernel, a) if in_tensor_memory else Address(operand(kernel, a, 8), 0, 8)
    taken = [at.base, A.base, operand(kernel, b, 8), operand(kernel, descriptor, 4), Register(accumulate)]
    numbers = [one_of(i.parts, kinds), int(in_tensor_memory), A.offset, 0, *where]
    return Lowered("tcgen05.mma", taken, numbers, "tensor core")


@opcode("mbarrier")
def _mbarrier(kernel, i):
    what = i.parts[1]
    expect(i, "parity", "shared::cta", "shared", of=i.parts[2:-1])
    at = address(kernel, i.arguments[what == "try_wait"])
    numbers = [int(i.arguments[1]) if what == "init" else 0, 0, 0, 0, at.offset, at.width]
    taken = [at.base]
    if what == "try_wait":
        taken = [Register(i.arguments[0]), at.base, operand(kernel, i.arguments[2], 4)]
    return Lowered(f"mbarrier.{what}", taken, numbers, "control")


@opcode("elect")
def _elect(kernel, i):
    target, chosen = i.arguments[0].split("|")
    return Lowered("elect", [operand(kernel, target, 4), Register(chosen), operand(kernel, i.arguments[1], 4)])


# ------------------------------------------------------------------------------------------------------ between lanes


@opcode("shfl")
def _shuffle(kernel, i):
    mode = one_of(i.parts, {"bfly": 0, "idx": 1, "up": 2, "down": 3})
    target, *valid = i.arguments[0].split("|")
    taken = operands(kernel, Type("b", 32), target, *i.arguments[1:])
    return Lowered("shfl", [*taken, *map(Register, valid)], [mode], "shuffle")


@opcode("redux")
def _reduction(kernel, i):
    name, kind = i.parts[2], type_named(i.parts[-1])
    expect(i, "sync", name)
    if kind.floating:
        modes = {"min": 8, "max": 9}
    else:
        signed = kind.letter == "s"
        modes = {"add": 0, "and": 5, "or": 6, "xor": 7, "min": 1 if signed else 3, "max": 2 if signed else 4}
    return Lowered("redux", operands(kernel, Type("b", 32), *i.arguments), [modes[name]], "shuffle")


@opcode("match")
def _match(kernel, i):
    expect(i, "any", "sync")
    kind = type_named(i.parts[-1])
    target, source, mask = i.arguments
    taken = [operand(kernel, target, 4), operand(kernel, source, kind.width), operand(kernel, mask, 4)]
    return Lowered(f"match.any.{i.parts[-1]}", taken, kind="shuffle")


@opcode("vote")
def _vote(kernel, i):
    mode = one_of(i.parts, {"ballot": 0, "any": 1, "all": 2, "uni": 3})
    asked, negated = predicate(i.arguments[1])
    taken = [Register(i.arguments[0]), asked, operand(kernel, i.arguments[2], 4)]
    return Lowered("vote", taken, [mode, negated], "shuffle")


# --------------------------------------------------------------------------------- comparisons, selections, predicates


@opcode("setp")
def _comparison(kernel, i):
    combine = {"and": 1, "or": 2, "xor": 3}
    kind = type_named(i.parts[-1])
    expect(i, *combine, of=i.parts[2:-1])
    compared = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(i.parts[1], i.parts[1])
    signed = kind.letter == "s" and compared not in ("eq", "ne")
    letter = kind.letter if kind.floating else "s" if signed else "u"
    target, *inverse = i.arguments[0].split("|")
    taken = [Register(target), *operands(kernel, kind, *i.arguments[1:3])]
    how, negated = next((combine[part] for part in i.parts if part in combine), 0), 0
    if how:
        other, negated = predicate(i.arguments[3])
        taken.append(other)
    taken += map(Register, inverse)
    name = f"setp.{compared}.{letter}{kind.bits}"
    return Lowered(name, taken, [how, negated, len(inverse)], "float" if kind.floating else "integer")


@opcode("selp")
def _selection(kernel, i):
    kind = type_named(i.parts[-1])
    return Lowered(f"selp.u{kind.bits}", [*operands(kernel, kind, *i.arguments[:3]), Register(i.arguments[3])])


def predicate_logic(kernel, i):
    mode = {"mov": 0, "not": 1, "and": 2, "or": 3, "xor": 4}[i.parts[0]]
    target, *sources = i.arguments
    bits = [constant(text, 1) for text in sources]
    taken = [Register(text) if bit is None else Constant(1, bit) for text, bit in zip(sources, bits)]
    return Lowered("pred", [Register(target), *taken], [mode])


# ------------------------------------------------------------------------------------------------- moving, converting


@opcode("mov", "cvta")
def _move(kernel, i):
    if i.parts[-1] == "pred":
        return predicate_logic(kernel, i)
    kind = type_named(i.parts[-1])
    target, source = i.arguments
    if target.startswith("{") or source.startswith("{"):
        whole, several = (source, target) if target.startswith("{") else (target, source)
        parts = group(several)
        size = kind.bytes // len(parts)
        taken = [operand(kernel, whole, kind.width), *(operand(kernel, part, max(size, 2)) for part in parts)]
        return Lowered("unpack" if several is target else "pack", taken, [size, len(parts)])
    return Lowered(f"mov.u{kind.bits}", operands(kernel, kind, target, source))


ROUNDINGS = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")


@opcode("cvt")
def _conversion(kernel, i):
    *modifiers, to, of = i.parts[1:]
    expect(i, *ROUNDINGS, "ftz", of=modifiers)
    rounding = [part for part in modifiers if part in ROUNDINGS]
    if to in ("bf16x2", "f16x2"):
        target, *sources = i.arguments
        taken = [operand(kernel, target, 4), *(operand(kernel, text, 4, True) for text in sources)]
        return Lowered(f"cvt.{rounding[0]}.{to}.{of}", taken, kind="float")
    target, source = i.arguments
    if to == "tf32":
        return Lowered(f"cvt.{rounding[0]}.tf32.f32", operands(kernel, Type("f", 32), target, source), kind="float")
    into, from_ = type_named(to), type_named(of)
    taken = [operand(kernel, target, into.width), operand(kernel, source, from_.width, from_.floating)]
    if not into.floating and not from_.floating:
        widths = [kernel.width(text) if kernel.is_register(text) else from_.width for text in (source, target)]
        if (widths[0], widths[1]) == (from_.bytes, into.bytes):
            return Lowered(f"cvt.{to}.{of}", taken)
        numbers = [widths[0], from_.bytes, int(from_.letter == "s"), widths[1], into.bytes, int(into.letter == "s")]
        return Lowered("cvt.bytes", [Register(target), operand(kernel, source, widths[0])], numbers)
    flushed = ["ftz"] if "ftz" in modifiers and to == of else []  # no subnormal float32 is the rounding of another type
    return Lowered(".".join(["cvt", *rounding, *flushed, to, of]), taken, kind=kind_of(into, from_))


def kind_of(*types: Type) -> str:
    return "float64" if 64 in (t.bits for t in types if t.floating) else "float"


# --------------------------------------------------------------------------------------------------------- arithmetic

SPECIAL_FUNCTIONS = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "div", "sin", "cos")
SIGN_FREE = ("add", "sub", "and", "or", "xor", "not", "shl")


@opcode(
    *(
        "add",
        "sub",
        "mul",
        "mad",
        "fma",
        "div",
        "rem",
        "abs",
        "neg",
        "min",
        "max",
        "and",
        "or",
        "xor",
        "not",
        "shl",
        "shr",
    ),
    *("ex2", "lg2", "rcp", "sqrt", "rsqrt", "tanh", "copysign", "bfe", "bfi", "popc", "clz", "brev", "bfind", "prmt"),
)
def _arithmetic(kernel, i):
    name, last = i.parts[0], i.parts[-1]
    if last == "pred":
        return predicate_logic(kernel, i)
    if last in ("f16x2", "bf16x2"):
        expect(i)
        return Lowered(i.opcode, [operand(kernel, text, 4) for text in i.arguments], kind="float")
    if last == "f32x2":
        expect(i, "rn")
        return Lowered(f"{name}.f32x2", [operand(kernel, text, 8) for text in i.arguments], kind="float")
    kind = type_named(last)
    if i.parts[-2] == "f32":
        return mixed_precision(kernel, i, kind)
    return float_arithmetic(kernel, i, kind) if kind.floating else integer_arithmetic(kernel, i, kind)


def mixed_precision(kernel, i, kind):
    """Blackwell's sums of float32 and a number of 16 bits, which is the first source, or the first two."""
    expect(i, "rn", "f32")
    narrow = 2 if i.parts[0] == "fma" else 1
    target, *sources = i.arguments
    taken = [operand(kernel, text, 2 if k < narrow else 4, k >= narrow) for k, text in enumerate(sources)]
    return Lowered(f"{i.parts[0]}.f32.{i.parts[-1]}", [operand(kernel, target, 4), *taken], kind="float")


def float_arithmetic(kernel, i, kind):
    name, modifiers = i.parts[0], i.parts[1:-1]
    expect(i, "rn", "ftz", "approx", "full", "NaN")
    kept = [part for part in modifiers if part != "rn"]
    if name in ("div", "rcp", "sqrt") and not {"approx", "full"} & set(kept):
        kept = ["rn", *kept]
    if name in ("min", "max") and len(i.arguments) == 4:
        name = f"{name}3"
    counted = "special function" if name in SPECIAL_FUNCTIONS else kind_of(kind)
    return Lowered(".".join([name, *kept, i.parts[-1]]), operands(kernel, kind, *i.arguments), kind=counted)


def integer_arithmetic(kernel, i, kind):
    name, middle = i.parts[0], i.parts[1:-1]
    expect(i, "lo", "hi", "wide", "shiftamt")
    if name in SIGN_FREE or middle == ["lo"] or (kind.letter == "b" and name != "neg"):
        letter = "u"
    else:
        letter = "s" if name in ("neg", "abs") else kind.letter
    target, *sources = i.arguments
    # Widths of the operands, where they are not all the type's.
    widths = [kind.width] * len(i.arguments)
    if middle == ["wide"]:
        widths = [2 * kind.width, kind.width, kind.width, 2 * kind.width][: len(widths)]
    elif name in ("shl", "shr"):
        widths[2] = 4
    elif name == "bfe":
        widths[2:] = 4, 4
    elif name == "bfi":
        widths[3:] = 4, 4
    elif name in ("popc", "clz", "bfind"):
        widths[0] = 4
    taken = [operand(kernel, text, width) for text, width in zip((target, *sources), widths)]
    return Lowered(".".join([name, *middle, f"{letter}{kind.bits}"]), taken)


@opcode("lop3")
def _logic3(kernel, i):
    return Lowered("lop3.u32", operands(kernel, Type("b", 32), *i.arguments[:4]), [int(i.arguments[4], 0)])


@opcode("shf")
def _funnel_shift(kernel, i):
    return Lowered(f"shf.{i.parts[1]}.{i.parts[2]}.u32", operands(kernel, Type("b", 32), *i.arguments))
