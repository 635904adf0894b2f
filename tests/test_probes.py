"""benchmarks/probes.py: variations of the kernels are what they say, run, and compile for the GPU they are for."""

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import results
from contextrast_kernels import cases, native

pytest.importorskip("triton")

from benchmarks import probes
from contextrast_kernels.kernels.step import training_step

ROOT = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = replace(cases.CASES["cityscapes"].tiny(), batch=1, height=16, width=32, strides=(4, 8))
AOT = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import aot, torch
from benchmarks import probes
from contextrast_kernels.kernels.step import training_step
batch, sizes = aot.SIZES["cityscapes"]
rows = []
for layout in sys.argv[2].split(","):
    for probe in probes.PROBES:
        step = lambda: training_step(batch, sizes, 256, 19, torch.bfloat16, layout=layout)
        launches = probes.recorded(step, dict.fromkeys(probe.kernels, probe.tiles or {}))
        for launch in launches:
            if launch.kernel.__name__ in probe.kernels:
                found = aot.resources(probes.varied(probe, launch, {}), 90)
                rows.append({"layout": layout, "question": probe.question, "variation": probe.variation, **found})
                print(rows[-1], file=sys.stderr, flush=True)
print(json.dumps(rows))
"""


@pytest.fixture
def step():
    """On the meta device: what it launches is recorded."""
    return lambda: training_step(1, [(8, 16), (4, 8)], 16, 19, torch.float32)


def find(question, variation=probes.AS_IT_IS):
    [probe] = [probe for probe in probes.PROBES if (probe.question, probe.variation) == (question, variation)]
    return probe


def test_every_probe_varies_kernels_that_the_step_launches(step):
    launched = {launch.kernel.__name__ for launch in probes.recorded(step)}
    for probe in probes.PROBES:
        assert set(probe.kernels) <= launched, probe
        for launch in probes.recorded(step):
            if launch.kernel.__name__ in probe.kernels and probe.helpers:
                assert set(probe.helpers) & set(launch.kernel.fn.__globals__), probe


def test_tiles_reach_the_kernels_they_are_meant_for(step):
    probe = find("issue rate, moments", "8 warps")
    for launch in probes.recorded(step, dict.fromkeys(probe.kernels, probe.tiles)):
        assert (launch.constants.get("num_warps") == 8) == (launch.kernel.__name__ in probe.kernels)


def test_a_replaced_helper_is_called_and_the_product_stays_as_it_is():
    """Backwards through the blocks, the sums are the same to the last bit; without the features they are not."""
    step = probes.loss_step(SMALL, DEVICE)
    expected = step()
    with probes.substituted(find("sweep order", "moments from the end")):
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    with probes.substituted(find("issue rate, moments", "without the second read and its products")):
        assert not torch.equal(step()[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))


def test_small_probes_become_rows_once(tmp_path, capsys):
    bench = probes.Bench(tmp_path, CPU, True, "")
    probes.map_probes(bench, SMALL)
    rows = results.read_all(tmp_path)
    assert {row.what for row in rows} == {f"probe: {question}" for question in probes.MAPS}
    assert {row.status for row in rows} == {"untimed", "absent: needs a GPU"} and not bench.failed
    assert any(row.expected == "26-32 us" for row in rows)
    probes.map_probes(probes.Bench(tmp_path, CPU, True, ""), SMALL)
    assert len(results.read_all(tmp_path)) == len(rows)

    broken = probes.Bench(tmp_path, CPU, True, "")
    broken.probe("selection", "broken", SMALL, "", lambda: 1 / 0)
    assert broken.failed and results.read_all(tmp_path)[-1].status == "failed: ZeroDivisionError: division by zero"


def test_a_probe_that_takes_the_device_down_does_not_keep_the_others_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(probes.measure, "answers", lambda device: False)
    with pytest.raises(SystemExit, match="run again for the other probes"):
        probes.Bench(tmp_path, CPU, True, "").probe("selection", "fatal", SMALL, "", lambda: 1 / 0)
    again = probes.Bench(tmp_path, CPU, True, "")
    again.probe("selection", "fatal", SMALL, "", lambda: 1 / 0)
    again.probe("selection", "other", SMALL, "", lambda: {"status": "untimed"})
    assert [row.by for row in results.read_all(tmp_path)] == ["fatal", "other"] and not again.failed


def test_another_library_is_used_inside_the_block_alone(tmp_path):
    before = native.status("cpu")
    with probes.another_library(tmp_path / "none.so"):
        assert "not built" in native.status("cpu")
    assert native.status("cpu") == before


@pytest.mark.slow
def test_every_probe_runs_in_the_interpreter(tmp_path):
    assert probes.main(["--tiny", "--out", str(tmp_path)]) == 0
    rows = results.read_all(tmp_path)
    assert len(rows) > 2 * len(probes.PROBES)
    assert {row.status.split(":")[0] for row in rows} <= {"ok", "untimed", "absent"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_every_variation_compiles_for_hopper(layout):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", AOT, str(ROOT), layout]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert {(row["question"], row["variation"]) for row in rows} == {
        (probe.question, probe.variation) for probe in probes.PROBES if probe.kernels
    }
    of_sums = {row["variation"]: row for row in rows if row["kernel"] == probes.SUMS}
    assert of_sums["without the second read and its product"]["instructions"] < of_sums["as it is"]["instructions"]


@pytest.mark.slow
def test_libraries_with_other_windows_build(tmp_path):
    try:
        [library] = probes.build_windows(tmp_path, "sm_90", [2]).values()
    except probes.Absent as reason:
        pytest.skip(str(reason))
    with probes.another_library(library):
        assert native.status("cpu") == "ok"
