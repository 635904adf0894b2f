"""Mutation testing of the core: change one expression at a time, and see whether a test fails.

    python -m tests.mutants --sample 150              print the survivors and the share of mutants that tests kill
    python -m tests.mutants --only anchors --list     the mutants of one file, without running a test

Every mutant is written into a copy of the committed tree and tested in a process of its own, forked from one that has
imported torch. The tests of the file run first and the first failure ends them. A test that hangs counts as a failure.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).parents[1]
QUICK = (
    *("loss/test_contextrast.py", "loss/test_contextrast_inputs.py", "interface/test_errors.py"),
    *("interface/test_eager.py", "interface/test_number_types.py", "loss/test_binary.py", "loss/test_soft_labels.py"),
    *("relatives/test_ablation.py", "relatives/test_samplers.py", "kernels/test_option_cases.py"),
)
SLOW = (
    *("kernels/test_kernels.py", "kernels/test_kernel_ops.py", "interface/test_backend.py", "loss/test_modules.py"),
    *("interface/test_compile.py", "interface/test_vmap.py", "interface/test_subclasses.py", "loss/test_volumes.py"),
    *("interface/test_inference_and_meta.py", "relatives/test_relatives.py", "loss/test_group.py"),
)
COMPILED = ("compiled/test_ops.py",)
"""The compiled kernels under opcheck, without the interpreter."""
OWN = {
    "anchors": ("loss/test_anchors.py",),
    "pixel_anchor": ("loss/test_pixel_anchor.py",),
    "contextrast": ("loss/test_contextrast.py",),
    "bane": ("loss/test_bane.py",),
    "info_nce": ("loss/test_info_nce.py", "kernels/test_info_nce_kernel.py"),
    "hashing": ("loss/test_hashing.py",),
    "maps": ("loss/test_bane.py", "distance/test_interface.py"),
}
"""The files of the core, and the tests that most likely kill their mutants. The groups above run after them."""
LIMIT = 900.0
"""Seconds until the tests of a mutant count as hanging."""
SWAPPED = {
    **{ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult},
    **{ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr},
    **{ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And},
    **{ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In},
}


@dataclass(frozen=True)
class Mutant:
    """One changed expression."""

    module: str
    line: int
    start: int
    end: int
    """Bytes of the file that are replaced."""
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.module}.py:{self.line}: {self.before}  ->  {self.after}"


def expressions(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions below a node, without annotations, decorators, texts and the messages of errors."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr | ast.Raise):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                if isinstance(child, ast.expr):
                    yield child
                yield from expressions(child)


def changed(node: ast.expr) -> ast.expr | None:
    """The expression with one operator, sign or number changed; None if it has none."""
    match node:
        case ast.BinOp(left, operator, right) if type(operator) in SWAPPED:
            return ast.BinOp(left, SWAPPED[type(operator)](), right)
        case ast.BoolOp(operator, values):
            return ast.BoolOp(SWAPPED[type(operator)](), values)
        case ast.Compare(left, [operator, *more], right) if type(operator) in SWAPPED:
            return ast.Compare(left, [SWAPPED[type(operator)](), *more], right)
        case ast.UnaryOp(_, operand):
            return operand
        case ast.IfExp(test, body, other):
            return ast.IfExp(test, other, body)
        case ast.Constant(bool() as value):
            return ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            return ast.Constant(value + 1)
    return None


def mutants(module: str) -> list[Mutant]:
    """All mutants of a file, in the order of the file's syntax tree."""
    source = (ROOT / "contextrast_kernels" / f"{module}.py").read_bytes()
    begins = [0]
    for line in source.splitlines(keepends=True):
        begins.append(begins[-1] + len(line))
    found = []
    for node in expressions(ast.parse(source)):
        other = changed(node)
        if other is not None:
            start = begins[node.lineno - 1] + node.col_offset
            end = begins[node.end_lineno - 1] + node.end_col_offset
            found.append(Mutant(module, node.lineno, start, end, ast.unparse(node), ast.unparse(other)))
    return found


@contextlib.contextmanager
def written(mutant: Mutant, tree: pathlib.Path) -> Iterator[None]:
    """The tree has the mutant inside the block."""
    path = tree / "contextrast_kernels" / f"{mutant.module}.py"
    source = path.read_bytes()
    path.write_bytes(source[: mutant.start] + f"({mutant.after})".encode() + source[mutant.end :])
    try:
        yield
    finally:
        path.write_bytes(source)


def passes(tree: pathlib.Path, tests: Sequence[str]) -> bool:
    """Whether the tests pass in a tree. They run in a forked process."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)  # for the processes that tests start
        os.environ["TRITON_INTERPRET"] = "0" if tests == COMPILED else "1"
        sys.path[:] = [str(tree), *(path for path in sys.path if pathlib.Path(path or ".").resolve() != ROOT)]
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        status = 1
        try:
            import pytest

            status = pytest.main(["-x", *(f"tests/{name}" for name in tests)])
        finally:
            os._exit(status)
    ends = time.monotonic() + LIMIT
    try:
        while time.monotonic() < ends:
            finished, status = os.waitpid(child, os.WNOHANG)
            if finished:
                return status == 0
            time.sleep(0.05)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with what the tests started


def own_tree() -> pathlib.Path:
    """A copy of the committed tree for this process."""
    tree = pathlib.Path(os.environ["MUTANTS"], str(os.getpid()))
    if not tree.exists():
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(tree)], check=True)
        for library in (ROOT / "contextrast_kernels").glob("*.so"):
            shutil.copy(library, tree / "contextrast_kernels")
    return tree


def survives(mutant: Mutant, more: Sequence[Sequence[str]]) -> tuple[Mutant, bool]:
    """Whether a mutant passes the tests of its file and ``more`` groups of tests."""
    tree = own_tree()
    with written(mutant, tree):
        return mutant, all(passes(tree, tests) for tests in (OWN[mutant.module], *more))


def passes_unchanged(tests: Sequence[str]) -> bool:
    return passes(own_tree(), tests)


def count(text: str) -> int:
    """An option's number of at least 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=OWN, default=list(OWN), help="files of the core")
    parser.add_argument("--sample", type=count, metavar="COUNT", help="test this many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample (default: 0)")
    parser.add_argument("--processes", type=count, default=2, help="tests that run side by side (default: 2)")
    parser.add_argument("--quick", action="store_true", help="run only the quicker tests, which kill fewer mutants")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    options = parser.parse_args()
    chosen = [mutant for module in options.only for mutant in mutants(module)]
    if options.sample is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.sample, len(chosen)))
    if options.list:
        print(*chosen, sep="\n")
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # else a mutant of the same size could be taken for the file before it
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import torch  # noqa: F401

    with contextlib.ExitStack() as held:
        os.environ["MUTANTS"] = held.enter_context(tempfile.TemporaryDirectory())
        fork = multiprocessing.get_context("fork")
        pool = held.enter_context(concurrent.futures.ProcessPoolExecutor(options.processes, fork))
        more = (QUICK,) if options.quick else (QUICK, COMPILED, SLOW)
        groups = dict.fromkeys([*(OWN[module] for module in options.only), *more])
        for tests, is_fine in zip(groups, pool.map(passes_unchanged, groups)):
            if not is_fine:
                print(f"a test fails without a mutant: {' '.join(tests)}")
                return 1
        survivors = 0
        tested = concurrent.futures.as_completed([pool.submit(survives, mutant, more) for mutant in chosen])
        for done, (mutant, alive) in enumerate((future.result() for future in tested), 1):
            survivors += alive
            print(f"{done}/{len(chosen)}", "SURVIVED" if alive else "killed", mutant, flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed, {1 - survivors / len(chosen):.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
