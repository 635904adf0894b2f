"""Every Triton kernel compiled ahead of time for each architecture and held to rules that do not depend on the version
of the compiler: hardly any stack (where registers are spilled to) on the paths of cityscapes and ade20k and a bound on
it elsewhere, products on the tensor cores, loads and stores of 16 bytes.

No GPU is needed. Compiling runs in processes of its own (tests/aot.py, and tests/aot_amd.py for AMD), because Triton
decides at import whether kernels are interpreted.
"""

import importlib.metadata
import importlib.util
import inspect
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

HERE = Path(__file__).parents[1]
MOST_STACK = {"bfloat16": 1024, "float16": 1024, "float32": 1024, "float64": 3072}
"""The most bytes of stack a thread in any case, by dtype. Triton before 3.9 multiplies float64 in registers, without
tensor cores."""
MOST_STACK_OF_PATHS = 32
"""The most bytes of stack a thread on the paths of cityscapes and ade20k, in bfloat16."""
MOST_STACK_OF_COPIES = {"_pixel_anchor_fwd": 256, "_features_bwd": 64}
"""The most bytes of stack a thread on the same paths, of kernels with a branch for copied rows and one for all other
blocks."""
SWEEPS = {
    "_class_anchors_fwd", "_hard_similarities", "_dense_similarities", "_pixel_anchor_fwd", "_features_bwd",
    "_features_bwd_dense",
}  # fmt: skip
PRODUCTS = {
    "_class_anchors_fwd": {"bfloat16": "BF16", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
    "_dense_similarities": {"bfloat16": "BF16", "float16": "TF32", "float32": "BF16", "float64": "DMMA"},
    "_pixel_anchor_fwd": {"bfloat16": "BF16", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
    "_features_bwd_dense": {"bfloat16": "TF32", "float16": "TF32", "float32": "TF32", "float64": "DMMA"},
}
"""A part of the name of the tensor-core instructions that each kernel multiplies with (``_tiles.dot_features``)."""
PARTS = 12


def here() -> tuple[int, ...]:
    """The version of this Triton."""
    return tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))


def compiled(*arguments, script="aot.py") -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / script, "--json", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(result.stdout)
    assert rows
    return rows


def name_of(row: dict) -> str:
    what = ("kernel", "op", "dtype", "layout", "sizes", "negatives", "D", "N", "arch")
    return " ".join(str(row[key]) for key in what)


def assert_lean(rows: list[dict]) -> None:
    """Bounded stack; products on the tensor cores; features read and written 16 bytes at a time where they lie so."""
    wrong = []
    for row in rows:
        kernel = row["kernel"]
        if row["stack"] > MOST_STACK[row["dtype"]]:
            wrong.append(f"{name_of(row)}: {row['stack']} B of stack")
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
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {"_class_anchors_fwd", "_hard_similarities", "_pixel_anchor_fwd", "_features_bwd"}
    for row in rows:
        assert row["stack"] <= MOST_STACK_OF_COPIES.get(row["kernel"], MOST_STACK_OF_PATHS), name_of(row)


def test_the_matrix_has_both_values_of_every_switch():
    """A kernel's constants follow from these switches of the loss, so both values of each must be compiled."""
    source = "import aot, json; print(json.dumps([case._asdict() for case in aot.matrix()]))"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", source], cwd=HERE, capture_output=True, text=True, env=environment, check=True
    )
    cases = [case for case in json.loads(result.stdout) if case["op"] == "contextrast_loss"]
    signature = inspect.signature(ck.contextrast_loss)
    switches = [name for name, parameter in signature.parameters.items() if isinstance(parameter.default, bool)]
    assert {"normalize", "normalize_anchors", "detach_anchors"} <= set(switches)
    for name in switches:
        assert {case[name] for case in cases} == {False, True}, name


def test_the_tile_table_serves_every_dtype_and_number_of_channels():
    """The dense sweeps must also have the same K (``_tile_table.DENSE``)."""
    import torch

    from contextrast_kernels.kernels._tile_table import DENSE, TABLE, tiles_of

    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for D in range(1, 1025):
            for kernel in TABLE:
                tiles = tiles_of(kernel, dtype, D)
                for name in ("P", "CHUNK", "K", "CLASSES"):
                    assert getattr(tiles, name).bit_count() == 1, (kernel, D, name)
                assert tiles.COLUMNS % tiles.K == 0
                if kernel == "_features_bwd":  # each thread has 16 bytes to load and store, down to one warp
                    assert tiles.num_warps == 1 or tiles.P * tiles.CHUNK * dtype.itemsize >= 512 * tiles.num_warps
                if kernel == "_features_bwd_dense":
                    assert tiles.COLUMNS.bit_count() == 1
            dense = [tiles_of(kernel, dtype, D) for kernel in DENSE]
            assert len({tiles.K for tiles in dense}) == 1
            assert max(tiles.CLASSES for tiles in dense) < 64


@pytest.mark.parametrize(
    "path",
    [
        pytest.param("--sizes cityscapes --layout nchw --arch 90", marks=pytest.mark.long),
        pytest.param("--sizes ade20k --classes 150 --layout channels_last --arch 80", marks=pytest.mark.slow),
    ],
)
def test_paper_paths_compile_within_limits(path):
    rows = compiled("--op", "contextrast_loss", "--negatives", "hard", *path.split())
    assert_lean(rows)
    assert_hardly_spilled(rows)


@pytest.mark.long
def test_dense_negatives_in_float32_compile_within_limits():
    rows = compiled(
        "--op", "contextrast_loss", "--negatives", "all", "--layout", "nchw", "--arch", "100", "--dtype", "float32"
    )
    assert_lean(rows)


MOST_SPILLED = {"gfx90a": 0, "gfx942": 0, "gfx1100": 32, "gfx1201": 0}
"""Vector registers of a thread on the path of cityscapes in bfloat16. Those of gfx1100 are ``_pixel_anchor_fwd``'s."""


def assert_compiled_for_amd(rows: list[dict]) -> None:
    for row in rows:
        assert row["spilled"] <= MOST_SPILLED[row["arch"]], row
        if row["kernel"] in PRODUCTS:
            assert any("bf16" in kind for kind in row["kinds"]), row


def test_class_anchors_compile_for_amd():
    rows = compiled("--arch", "gfx942", "--kernel", "_class_anchors_fwd", script="aot_amd.py")
    assert_compiled_for_amd(rows)


@pytest.mark.slow
@pytest.mark.parametrize("arch", MOST_SPILLED)
def test_the_path_of_cityscapes_compiles_for_amd(arch):
    assert_compiled_for_amd(compiled("--arch", arch, script="aot_amd.py"))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_cityscapes_and_ade20k_stay_within_spill_limits(arch):
    for sizes, N in (("cityscapes", 19), ("ade20k", 150)):
        path = ("--sizes", sizes, "--classes", N, "--layout", "nchw", "channels_last", "--arch", arch)
        rows = compiled("--op", "contextrast_loss", "--negatives", "hard", *path)
        assert_lean(rows)
        assert_hardly_spilled(rows)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_every_case_compiles_within_limits(part):
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
    from contextrast_kernels.plan import moved, training_step

    sizes = [(128, 256), (64, 128), (32, 64), (16, 32)]
    launches = [moved(launch) for launch in training_step(8, sizes, 256, 19).launches]
    F = sum(8 * 256 * h * w * 2 for h, w in sizes)
    sweeps = [(reads, writes) for reads, writes in launches if reads >= F]
    assert len(launches) <= 12
    assert len(sweeps) == 4
    assert F < sum(writes for _, writes in sweeps) < 1.02 * F
    small = sum(map(sum, launches)) - sum(map(sum, sweeps))
    assert small < 0.15 * F
    # Layers whose rows cannot be read 16 bytes at a time share one more launch of each sweep.
    camvid = training_step(16, [(90, 120), (45, 60), (23, 30), (12, 15)], 256, 11)
    assert len(camvid.launches) == len(launches) + len(sweeps)
