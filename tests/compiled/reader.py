"""Reads PTX: the parameters, registers and instructions of one kernel, and where lanes that part meet again.

``Kernel(text)`` has everything that the engine needs to run it. ``lowering.py`` says what each opcode means; an opcode
that it does not know raises Unknown.
"""

import re
from dataclasses import dataclass, field

BYTES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}
SPECIAL = [
    *("%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%tid.x", "%tid.y", "%tid.z"),
    *("%ntid.x", "%ntid.y", "%ntid.z", "%laneid", "%warpid"),
]
"""In the order of run.cpp."""

SHARED_BASE = 1024
"""Where a block's shared memory begins; the system keeps what lies below, as on Hopper."""


class Unknown(Exception):
    """The PTX has something that this machine does not know."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Special:
    number: int


@dataclass(frozen=True)
class Constant:
    width: int
    """In bytes; 1 for a predicate."""
    bits: int


Operand = Register | Special | Constant | None
"""None is a sink, ``_``."""


@dataclass
class Instruction:
    opcode: str
    arguments: list[str]
    guard: str | None
    negated: bool
    line: int
    """The line of the PTX."""
    source: str
    """The line of the kernel: the innermost inlined line, and where it was inlined."""
    text: str
    blocks: list[int]
    """Numbers of the blocks that it stands in, the kernel's own first."""

    # What lowering.py finds.
    handler: str = ""
    """Its name in the engine, or one of the four that CONTROL names."""
    operands: list[Operand] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    kind: str = ""
    """The column of the tables of counts."""

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass(frozen=True)
class Parameter:
    name: str
    size: int
    offset: int
    pointer: bool


@dataclass(frozen=True)
class Variable:
    """An array in shared memory."""

    offset: int
    size: int


class Kernel:
    """One ``.entry`` of a PTX module: the one named, else the only one."""

    def __init__(self, text: str, name: str | None = None):
        from . import lowering

        self.text = text
        self.registers: dict[str, str] = {}
        """Type of each register, by its name or by the prefix that a range shares."""
        self.parameters: list[Parameter] = []
        self.instructions: list[Instruction] = []
        self.labels: dict[tuple[str, int], int] = {}
        """By name and number of the block."""
        self.shared: dict[str, Variable] = {}
        self.static_shared = 0
        self.threads: tuple[int, int, int] | None = None
        """What .reqntid asks for."""
        self.files = {int(n): file for n, file in re.findall(r'^\s*\.file\s+(\d+)\s+"[^"]*?([^/"]+)"', text, re.M)}
        entry = self._find(name)
        self._read_shared(text[: entry.start()], re.split(r"^}", text[entry.end() :], maxsplit=1, flags=re.M)[0])
        self._read_parameters(entry[2])
        self._read_body(entry)
        for instruction in self.instructions:
            try:
                lowering.lower(self, instruction)
            except (Unknown, KeyError, TypeError, IndexError, ValueError, StopIteration) as error:
                place = f"PTX line {instruction.line}: {instruction.text!r}"
                raise Unknown(f"{self.name}: {place}: {type(error).__name__} {error}") from error
        self._place_registers()
        self.joins = joins(self)

    # --------------------------------------------------------------------------------------------------- declarations

    def _find(self, name: str | None) -> re.Match:
        found = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", self.text, re.S))
        found = [entry for entry in found if name in (None, entry[1])]
        if len(found) != 1:
            raise Unknown(f"entry: expected one named {name or 'anything'}, got {[entry[1] for entry in found]}")
        self.name = found[0][1]
        if threads := re.search(r"\.reqntid\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", found[0][3]):
            self.threads = tuple(int(n or 1) for n in threads.groups())
        return found[0]

    def _read_parameters(self, text: str) -> None:
        offset = 0
        for declared in filter(None, (part.strip() for part in text.split(","))):
            kind = re.search(r"\.param\s+\.(?:align\s+(\d+)\s+\.)?([a-z]\d+)", declared)
            name, length = re.search(r"([\w$]+)(?:\[(\d+)\])?$", declared).groups()
            element = BYTES[kind[2][1:]]
            size, align = element * int(length or 1), int(kind[1] or element)
            offset = -(-offset // align) * align
            self.parameters.append(Parameter(name, size, offset, ".ptr" in declared))
            offset += size
        self.parameter_bytes = offset

    def _read_shared(self, before: str, body: str) -> None:
        """Arrays of known size one after the other, and the one whose size the launch gives behind them: those that the
        body declares, and of those before it what the body names."""
        pattern = r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.[a-z](\d+)\s+([\w$]+)(?:\[(\d*)\])?\s*;"
        declared = re.findall(pattern, before + body)
        for align, bits, name, length in sorted(declared, key=lambda found: found[3] == ""):
            if not re.search(rf"\b{re.escape(name)}\b", body):
                continue
            step = int(align or BYTES[bits])
            self.static_shared = -(-self.static_shared // step) * step
            size = BYTES[bits] * int(length or 0)
            self.shared[name] = Variable(SHARED_BASE + self.static_shared, size)
            self.static_shared += size

    # --------------------------------------------------------------------------------------------------- instructions

    def _read_body(self, entry: re.Match) -> None:
        number = self.text[: entry.end()].count("\n")
        # For each open block: its number, and its own registers with their names here.
        scopes: list[tuple[int, dict[str, str]]] = [(0, {})]
        pending, source, began, blocks = "", "", 0, 0
        for line in self.text[entry.end() :].split("\n"):
            number += 1
            line = line.split("//")[0].strip()
            if not pending and line.startswith(".loc"):
                source = self._source(line)
                continue
            if not pending and line.startswith(".pragma"):
                continue
            while line:
                if not pending:
                    if line[0] in "{}":
                        if line[0] == "{":
                            blocks += 1
                            scopes.append((blocks, {}))
                        else:
                            scopes.pop()
                        line = line[1:].strip()
                        if not scopes:
                            return
                        continue
                    if label := re.match(r"([$\w]+):", line):
                        self.labels[label[1], scopes[-1][0]] = len(self.instructions)
                        line = line[label.end() :].strip()
                        continue
                    began = number
                if ";" not in line:
                    pending, line = pending + line + " ", ""
                    continue
                head, line = line.split(";", 1)
                self._read_statement((pending + head).strip(), began, source, scopes)
                pending, line = "", line.strip()

    def _source(self, line: str) -> str:
        file, row = re.match(r"\.loc\s+(\d+)\s+(\d+)", line).groups()
        where = f"{self.files.get(int(file), '?')}:{row}"
        if inlined := re.search(r"inlined_at\s+(\d+)\s+(\d+)", line):
            where += f" in {self.files.get(int(inlined[1]), '?')}:{inlined[2]}"
        return where

    def _read_statement(self, text: str, line: int, source: str, scopes: list[tuple[int, dict[str, str]]]) -> None:
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text):
            for name in (part.strip() for part in declared[2].split(",")):
                if len(scopes) > 1 and "<" not in name:  # it hides a register of that name outside of its block
                    name = scopes[-1][1].setdefault(name, f"{name}${len(self.registers)}")
                self.registers[re.sub(r"<\d+>", "", name)] = declared[1]
        elif text.startswith(".shared"):
            pass  # _read_shared has it
        elif text.startswith("."):
            raise Unknown(f"{self.name}: PTX line {line}: {text!r}")
        elif text:
            if names := {outer: inner for _, own in scopes for outer, inner in own.items()}:
                text = re.sub(r"%?[A-Za-z_$][\w$]*", lambda found: names.get(found[0], found[0]), text)
            guard, negated = None, False
            if found := re.match(r"@(!?)(%?[\w$]+)\s+", text):
                guard, negated, text = found[2], bool(found[1]), text[found.end() :]
            opcode, _, rest = text.replace("\t", " ").partition(" ")
            blocks = [number for number, _ in scopes]
            self.instructions.append(Instruction(opcode, split(rest), guard, negated, line, source, text, blocks))

    def target(self, branch: Instruction) -> int:
        """The instruction that a branch goes to: the label of the innermost block that has it."""
        label = branch.arguments[-1]
        return next(self.labels[label, n] for n in reversed(branch.blocks) if (label, n) in self.labels)

    def type_of(self, register: str) -> str:
        if register in self.registers:
            return self.registers[register]
        return self.registers[re.match(r"%?[A-Za-z_$]+", register)[0]]

    def is_register(self, text: str) -> bool:
        prefix = re.match(r"%?[A-Za-z_$]+", text)
        return text in self.registers or (prefix is not None and prefix[0] in self.registers)

    def width(self, register: str) -> int:
        """Bytes of a register; 1 for a predicate."""
        kind = self.type_of(register)
        return 1 if kind == "pred" else max(int(re.search(r"\d+", kind)[0]) // 8, 2)

    def _place_registers(self) -> None:
        """Every operand gets a place in a warp's register file and a word for its undefined bits. A register of 32 or
        64 bits has a word for each half, because compilers pack a value beside one that is never read."""
        self.places: dict[Operand, tuple[int, int, int]] = {}
        self.register_bytes = self.register_words = 0
        for instruction in self.instructions:
            operands = [*instruction.operands, *([Register(instruction.guard)] if instruction.guard else [])]
            for operand in operands:
                if operand is None or operand in self.places:
                    continue
                if isinstance(operand, Register):
                    width = self.width(operand.name)
                else:
                    width = 4 if isinstance(operand, Special) else operand.width
                words = 2 if width == 8 or (width == 4 and isinstance(operand, Register)) else 1
                self.places[operand] = self.register_bytes, self.register_words, self.register_words + words - 1
                self.register_words += words
                self.register_bytes += 64 if width <= 2 else 32 * width


def split(text: str) -> list[str]:
    """What commas separate outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def joins(kernel: Kernel) -> dict[int, int]:
    """For each branch the first instruction of its basic block's immediate post-dominator, where its lanes meet again;
    -1 where they only meet at the end."""
    code, labels = kernel.instructions, kernel.labels
    ends = ("branch", "return", "trap")
    starts = {0, *labels.values(), *(k + 1 for k, i in enumerate(code) if i.handler in ends)}
    leaders = sorted(starts - {len(code)})
    number = {first: block for block, first in enumerate(leaders)}
    end = len(leaders)  # stands for the end of the program
    successors: list[set[int]] = []
    for block in range(end):
        after = leaders[block + 1] if block + 1 < end else len(code)
        last, following = code[after - 1], number.get(after, end)
        if last.handler == "branch":
            targets = {number.get(kernel.target(last), end)}
        elif last.handler in ends:
            targets = {end}
        else:
            targets = {following}
        successors.append(targets | ({following} if last.guard else set()))
    # passed[b] has a bit for each block that every path from b to the end passes.
    everything = (1 << (end + 1)) - 1
    passed = [everything] * end + [1 << end]
    changed = True
    while changed:
        changed = False
        for block in reversed(range(end)):
            common = everything
            for successor in successors[block]:
                common &= passed[successor]
            if (found := common | 1 << block) != passed[block]:
                passed[block], changed = found, True
    where, block = {}, -1
    for k, instruction in enumerate(code):
        block += k in number
        if instruction.handler == "branch":
            later = [b for b in range(end + 1) if passed[block] >> b & 1 and b != block]
            nearest = max(later, key=lambda b: passed[b].bit_count())  # the others all lie behind it
            where[k] = leaders[nearest] if nearest < end else -1
    return where
