"""Every Triton kernel compiled ahead of time for each architecture, within the registers, the stack (where registers
are spilled to) and the shared memory that tests/budgets.json grants.

No GPU is needed. Compiling runs in a process of its own (tests/aot.py), because Triton decides at import whether
kernels are interpreted. Budgets have a column for each Triton that they were written with, since every compiler allots
registers in its own way; a Triton without one is held to what does not depend on that: instructions, and the stack on
the paths of cityscapes and ade20k. Budgets are written by

    for i in 0 1 2 3 4 5 6 7 8 9 10 11; do python tests/aot.py --matrix $i/12 --grant; done

and a column, removed first, comes back as low as it can be.
"""

import ast
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import contextrast_kernels as ck

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; pip install triton"
)

HERE = Path(__file__).parent
BUDGETS = json.loads((HERE / "budgets.json").read_text())
SWEEPS = {
    "_class_anchors_fwd", "_hard_similarities", "_dense_similarities", "_pixel_anchor_fwd", "_features_bwd",
    "_features_bwd_dense",
}  # fmt: skip
PRODUCTS = {
    "_class_anchors_fwd": {"bfloat16": "BF16", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
    "_dense_similarities": {"bfloat16": "BF16", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
    "_pixel_anchor_fwd": {"bfloat16": "BF16", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
    "_features_bwd_dense": {"bfloat16": "TF32", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
}
"""What an instruction of the tensor cores says where a kernel multiplies: see ``_tiles.dot_features``."""
PARTS = 12


def here() -> tuple[int, ...]:
    """The version of this Triton."""
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))


def column() -> dict | None:
    """The budgets of this Triton."""
    return BUDGETS.get(".".join(map(str, here())))


def compiled(*arguments) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "aot.py", "--json", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout)
    assert rows
    return rows


def name_of(row: dict) -> str:
    what = ("kernel", "op", "dtype", "layout", "sizes", "negatives", "D", "N", "arch")
    return " ".join(str(row[key]) for key in what)


def assert_lean(rows: list[dict]) -> None:
    """Within budget; products on the tensor cores; features read and written 16 bytes at a time where they lie so."""
    budgets, wrong = column(), []
    for row in rows:
        budget, kernel = {} if budgets is None else budgets.get(row["budget"]), row["kernel"]
        if budget is None:
            wrong.append(f"{name_of(row)}: no budget {row['budget']!r}")
            continue
        wrong += [f"{name_of(row)}: {what} {row[what]} > {budget[what]}" for what in budget if row[what] > budget[what]]
        expected = PRODUCTS.get(kernel, {}).get(row["dtype"])
        if row["dtype"] == "float64" and here() < (3, 9):
            expected = None  # see _tiles.FLOAT64_DOT
        # Blackwell's own instructions do not name the type.
        if expected and not any(expected in kind or kind.startswith("UTC") for kind in row["kinds"]):
            wrong.append(f"{name_of(row)}: no {expected} product, but {row['kinds']}")
        if kernel in SWEEPS and row["aligned"]:
            if row["wide_loads"] == 0:
                wrong.append(f"{name_of(row)}: no load of 16 bytes")
            if row["two_byte_loads"] and row["N"] < 256:  # whose codes have two bytes
                wrong.append(f"{name_of(row)}: {row['two_byte_loads']} loads of two bytes")
            if kernel.startswith("_features_bwd") and row["wide_stores"] == 0:
                wrong.append(f"{name_of(row)}: no store of 16 bytes")
    assert not wrong, "\n".join(wrong)


def assert_hardly_spilled(rows: list[dict]) -> None:
    """The aim for what cityscapes and ade20k run: at most 128 bytes of stack a thread."""
    assert {row["kernel"] for row in rows} >= {"_class_anchors_fwd", "_hard_similarities", "_pixel_anchor_fwd"}
    over = [f"{name_of(row)}: stack {row['stack']}" for row in rows if row["stack"] > 128]
    assert not over, "\n".join(over)


def test_every_kernel_has_a_budget():
    """What is launched, and no helper: kernels are handed to a launch, helpers are called by kernels."""
    kernels, called = set(), set()
    for source in sorted((HERE.parent / "contextrast_kernels/kernels").glob("*.py")):
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                kernels.add(node.name)
            elif isinstance(node, ast.Call):
                called.add(ast.unparse(node.func))
    for version, budgets in BUDGETS.items():
        assert {key.split()[0] for key in budgets} == kernels - called, version


def test_this_triton_has_budgets():
    if column() is None:
        pytest.skip(
            f"Triton {importlib.metadata.version('triton')} has no budgets; write them: tests/test_resources.py"
        )
    assert all(budget.keys() == {"registers", "stack", "shared"} for budget in column().values())


def test_the_tile_table_serves_every_dtype_and_number_of_channels():
    """And the dense sweeps multiply alike: see ``_tile_table.DENSE``."""
    import torch

    from contextrast_kernels.kernels._tile_table import DENSE, TABLE, tiles

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for D in range(1, 1025):
            for kernel in TABLE:
                taken = tiles(kernel, dtype, D, "K", "COLUMNS", "CLASSES")
                for name in ("P", "CHUNK", "K", "CLASSES"):
                    assert taken[name].bit_count() == 1, (kernel, D, name)
                assert taken["COLUMNS"] % taken["K"] == 0
                if kernel == "_features_bwd_dense":
                    assert taken["COLUMNS"].bit_count() == 1
            dense = [tiles(kernel, dtype, D, "K", "CLASSES") for kernel in DENSE]
            assert len({taken["K"] for taken in dense}) == 1
            assert max(taken["CLASSES"] for taken in dense) < 64


@pytest.mark.parametrize(
    "path",
    ["--sizes cityscapes --layout nchw --arch 90", "--sizes ade20k --classes 150 --layout channels_last --arch 80"],
)
def test_the_path_of(path):
    rows = compiled("--op", "contextrast_loss", "--negatives", "hard", *path.split())
    assert_lean(rows)
    assert_hardly_spilled(rows)


def test_dense_negatives_in_float32():
    rows = compiled(
        "--op", "contextrast_loss", "--negatives", "all", "--layout", "nchw", "--arch", "100", "--dtype", "float32"
    )
    assert_lean(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cityscapes_and_ade20k_hardly_spill(arch):
    for sizes, N in (("cityscapes", 19), ("ade20k", 150)):
        path = ("--sizes", sizes, "--classes", N, "--layout", "nchw", "channels_last", "--arch", arch)
        rows = compiled("--op", "contextrast_loss", "--negatives", "hard", *path)
        assert_lean(rows)
        assert_hardly_spilled(rows)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_case(part):
    """Minutes each on one core: ``-k "every_case and 3"`` runs one."""
    assert_lean(compiled("--matrix", f"{part}/{PARTS}"))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_more_classes_cost_nothing(layout):
    path = ("--op", "contextrast_loss", "--negatives", "hard", "--layout", layout)
    rows = [compiled(*path, "--classes", N) for N in (19, 150)]
    for few, many in zip(*rows, strict=True):
        if few["kernel"] in SWEEPS:
            assert many["instructions"] < 1.25 * few["instructions"], few["kernel"]


def test_the_plan_counts_launches_and_bytes():
    """Per forward and backward pass: at most 12 launches of kernels; hard negatives read the features three times
    and a part, and write them once."""
    if ck.available()["triton"] != "ok":
        pytest.skip(ck.available()["triton"])
    from contextrast_kernels.kernels.step import training_step

    sizes = [(128, 256), (64, 128), (32, 64), (16, 32)]
    launches = training_step(8, sizes, 256, 19).launches
    F = sum(8 * 256 * h * w * 2 for h, w in sizes)
    sweeps = [launch for launch in launches if launch.reads >= F]
    assert len(launches) <= 12
    assert len(sweeps) == 4
    assert F < sum(launch.writes for launch in sweeps) < 1.02 * F
    small = sum(launch.reads + launch.writes for launch in launches if launch not in sweeps)
    assert small < 0.15 * F
    # Layers whose rows cannot be read 16 bytes at a time share one more launch of each sweep.
    camvid = training_step(16, [(90, 120), (45, 60), (23, 30), (12, 15)], 256, 11)
    assert len(camvid.launches) == len(launches) + len(sweeps)
