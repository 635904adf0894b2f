"""Every Triton kernel compiled ahead of time for each architecture, within the stack (where registers are spilled to)
and the shared memory that tests/budgets.json grants.

No GPU is needed. Compiling runs in a process of its own (tests/aot.py), because Triton decides at import whether
kernels are interpreted. ``python tests/aot.py --help`` prints the table.
"""

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
ARCHITECTURES = (80, 90, 100)
SWEEPS = {"_class_anchors_fwd", "_hard_similarities", "_pixel_anchor_fwd", "_features_bwd"}
TENSOR_CORES = {"_class_anchors_fwd", "_pixel_anchor_fwd", "_dense_similarities", "_features_bwd_dense"}


def compiled(*arguments) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, HERE / "aot.py", "--json", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout)


def assert_within_budget(rows):
    """Stack (where registers are spilled to) and shared memory in bytes; products on the tensor cores."""
    assert rows
    over = []
    for row in rows:
        budget = BUDGETS[row["kernel"]][row["dtype"]]
        case = f"{row['kernel']} {row['dtype']} {row['layout']} D {row['D']} N {row['N']} sm_{row['arch']}"
        over += [f"{case}: {what} {row[what]} > {budget[what]}" for what in budget if row[what] > budget[what]]
        if row["kernel"] in TENSOR_CORES and row["mma"] == 0:
            over.append(f"{case}: no product on the tensor cores")
    assert not over, "\n".join(over)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_path_of_cityscapes(layout):
    """bfloat16, 256 channels, 19 classes: hardly a spill, every load of features 16 bytes wide."""
    rows = compiled("--op", "contextrast_loss", "--layout", layout)
    assert_within_budget(rows)
    sweeps = {row["kernel"]: row for row in rows if row["kernel"] in SWEEPS}
    assert set(sweeps) == SWEEPS
    for row in sweeps.values():
        assert row["stack"] <= 128
        assert row["wide_loads"] > 0
        assert not row["loads"].get("LDG.E.U16"), f"{row['kernel']} reads features two bytes at a time"


def test_many_classes_and_dense_negatives_on_other_architectures():
    rows = compiled("--op", "contextrast_loss", "--classes", 150, "--layout", "nchw", "--arch", 80)
    rows += compiled("--op", "contextrast_loss_dense", "--layout", "channels_last", "--arch", 100)
    assert_within_budget(rows)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 256, 720, 1024])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel(dtype, D, arch):
    assert_within_budget(compiled("--dtype", dtype, "--channels", D, "--arch", arch))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_more_classes_cost_nothing(layout):
    rows = [compiled("--op", "contextrast_loss", "--layout", layout, "--classes", N) for N in (19, 150)]
    for few, many in zip(*rows, strict=True):
        if few["kernel"] in SWEEPS:
            assert many["instructions"] < 1.25 * few["instructions"], few["kernel"]


def test_the_plan_counts_launches_and_bytes():
    """Per forward and backward pass: at most 12 launches of kernels; hard negatives read the features three times
    and a part, and write them once."""
    if ck.available()["triton"] != "ok":
        pytest.skip(ck.available()["triton"])
    import torch

    from contextrast_kernels.kernels.contextrast import plan

    sizes = [(128, 256), (64, 128), (32, 64), (16, 32)]
    launches = plan(8, sizes, 256, 19)
    F = sum(8 * 256 * h * w * 2 for h, w in sizes)
    sweeps = [launch for launch in launches if launch.reads >= F]
    assert len(launches) <= 12
    assert len(sweeps) == 4
    assert sum(launch.writes for launch in sweeps) == F
    small = sum(launch.reads + launch.writes for launch in launches if launch not in sweeps)
    assert small < 0.15 * F
    # Layers whose rows cannot be read 16 bytes at a time share one more launch of each sweep.
    camvid = plan(16, [(90, 120), (45, 60), (23, 30), (12, 15)], 256, 11, torch.bfloat16)
    assert len(camvid) == len(launches) + len(sweeps)
