"""The host's side of a step: how many kernels are launched, ops called and tensors allocated. Counts, not times.

In a process of its own, since here Triton's kernels are interpreted.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from benchmarks import results

pytest.importorskip("triton")

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = """
import json, sys, torch
from benchmarks import host
sys.argv = ["host.py", "--rounds", "2", "--out", sys.argv[1]]
code = host.main()
device = torch.device("cpu")
with host.launching(device) as launched:
    counts = {name: host.count(call, launched)._asdict() for name, call in host.calls(device).items()}
print(json.dumps(counts))
sys.exit(code)
"""


def run(*arguments, **environment):
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}  # what is asked here is the same on every machine
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=inherited | hidden | environment
    )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    done = run("-c", PROGRAM, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    [counts] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(counts), results.read_all(folder)


@pytest.mark.parametrize(
    ("name", "launches", "ops", "allocations"),
    [("plain custom_op", 0, 4, 6), ("contextrast_loss", 9, 42, 25), ("class_anchors", 4, 25, 12)],
)
def test_a_step_takes_no_more_than_it_took(outcome, name, launches, ops, allocations):
    """What it takes today is the limit: lower it when it falls."""
    counted = outcome[0][name]
    assert len(counted["launches"]) <= launches, counted["launches"]
    assert sum(counted["ops"].values()) <= ops, counted["ops"]
    assert counted["allocations"] <= allocations, counted["ops"]


def test_the_module_adds_two_ops_to_the_function(outcome):
    """Its seed is copied, then advanced."""
    of_module, of_function = (sum(outcome[0][name]["ops"].values()) for name in ("ContextrastLoss", "contextrast_loss"))
    assert of_module - of_function <= 2


def test_every_cost_becomes_a_row(outcome):
    rows = {(row.what, row.mode): row for row in outcome[1]}
    row = rows["host cost of contextrast_loss", "forward+backward"]
    assert row.expected == "<= 15" and row.unit == "x plain custom_op" and row.launches <= 9 and "ATen ops" in row.note
    assert row.value > 1 and row.median_ms > 0
    assert rows["host cost of plain custom_op", "forward"].value == 1
    assert {mode for what, mode in rows if what.endswith("native")} == {"forward"}


def test_a_process_that_interprets_is_told_so():
    done = run("-m", "benchmarks.host", "--rounds", "1", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset TRITON_INTERPRET" in done.stderr.splitlines()[-1]
