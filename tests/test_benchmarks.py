"""The benchmarks: one schema for all results, and that the runner runs."""

import time
from dataclasses import replace

import pytest
import torch

import contextrast_kernels as ck
from benchmarks import results, run
from contextrast_kernels import cases, measure

ROW = results.Row(
    what="contextrast_loss forward",
    by="triton",
    **results.of_case(cases.CASES["ade20k"]),
    median_ms=0.25,
    iqr_ms=0.01,
    launches=9,
    plan_mb=400.0,
    copy_gb_s=4000.0,
    **{"device": "A GPU (SXM)", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456"},
)


def test_every_committed_result_follows_the_schema():
    rows = results.read_all()
    assert rows
    assert len({row.measured for row in rows}) == len(rows)
    for row in rows:
        assert row.commit and not row.commit.endswith("+")
        assert results.path_of(row.device).exists()


def test_rows_come_back_as_they_were_written(tmp_path):
    path = results.path_of(ROW.device, tmp_path)
    assert path.name == "a-gpu-sxm.csv"
    absent = replace(ROW, by="CuPy", status="absent: No module named\n 'cupy'", median_ms=None, iqr_ms=None)
    results.record(path, ROW)
    results.record(path, absent)
    assert results.read(path) == [ROW, replace(absent, status="absent: No module named 'cupy'")]
    results.write(path, [ROW])
    assert results.read(path) == results.read_all(tmp_path) == [ROW]
    assert ROW.percent_of_copy == pytest.approx(40.0)
    assert results.read(tmp_path / "none.csv") == []


@pytest.mark.parametrize(
    "change",
    [
        {"status": "absent: no such module"},
        {"status": "fine"},
        {"median_ms": None},
        {"iqr_ms": None},
        {"device": ""},
        {"value": 2.0},
        {"batch": 1.5},
    ],
)
def test_a_row_against_the_schema_is_refused(tmp_path, change):
    with pytest.raises(results.SchemaError, match="expected"):
        results.record(tmp_path / "x.csv", replace(ROW, **change))
    assert not (tmp_path / "x.csv").exists()


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("row,case\na,b\n")
    with pytest.raises(results.SchemaError, match="expected the columns"):
        results.read(path)
    path.write_text(",".join(results.COLUMNS) + "\na,b\n")
    with pytest.raises(results.SchemaError, match="line 2"):
        results.read(path)


# --------------------------------------------------------------------------------------------------------- measuring


def test_agreement_is_held_to_the_contract():
    def loss(features):
        return (features[0] ** 2).sum()

    x = torch.linspace(-1, 1, 7, dtype=torch.float16)
    exact = measure.truth(loss, [x])
    value, gradients = measure.evaluate(loss, [x])
    assert gradients[0].dtype == torch.float16
    assert measure.check(value, gradients, exact) == (exact.own_value, exact.own_gradient)
    assert measure.check(None, [2 * x.double()], exact).gradient < 1e-12
    for wrong in ((value * 1.01, None), (None, [gradients[0] * 1.01]), (value * float("nan"), None)):
        with pytest.raises(measure.Differs, match="allowed"):
            measure.check(*wrong, exact)


def test_time_is_the_median_of_all_copies():
    seen = []
    timing = measure.time_calls([lambda: seen.append(0), lambda: seen.append(1)], torch.device("cpu"), seconds=1e-5)
    assert timing.repeats >= 5 and timing.median_ms > 0 and timing.iqr_ms >= 0
    assert abs(seen.count(0) - seen.count(1)) <= 2


def test_peak_memory_is_above_what_the_call_returns():
    def call():
        big = torch.ones(2**18)
        return (big + 1).sum(), torch.zeros(2**16)

    found = measure.peak_mib(call, torch.device("cpu"))
    assert 2.0 - 0.25 <= found <= 2.01  # two of a MiB at once, before a quarter is returned


# --------------------------------------------------------------------------------------------------------- the runner


def runs(folder, *arguments, cases=("camvid",)):
    return run.main(["--out", str(folder), "--cases", *cases, *arguments])


def rows_in(folder):
    return results.read(results.path_of(results.environment()["device"], folder))


cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="rows are timed where there is a GPU: on_gpu.sh runs them"
)


@cpu_only
def test_the_runner_goes_through_maps_peers_steps_and_compilers(tmp_path, capsys):
    parts = ("--parts", "edt", "peers", "step", "compiled")
    assert runs(tmp_path, *parts, "--minutes", "0") == 0
    assert rows_in(tmp_path) == []
    assert int(capsys.readouterr().out.split(";")[-1].split()[0]) == 33
    assert runs(tmp_path, *parts) == 0
    assert capsys.readouterr().out.endswith("complete\n")
    rows = rows_in(tmp_path)
    assert len(rows) == 33
    for row in rows:
        assert row.status == "untimed" or row.status.startswith("absent: "), row
        assert row.case == "camvid tiny" and row.device and row.torch
    ran = {(row.what, row.by) for row in rows if row.status == "untimed"}
    assert {
        ("edge_distance", "contextrast"),
        ("select_nearest", "sort of 64-bit keys"),
        ("training step", "demo network"),
        ("contextrast_loss forward+backward", "torch.compile"),
    } <= ran
    runs(tmp_path, *parts)
    assert capsys.readouterr().out == "0 rows failed; complete\n"


@cpu_only
def test_the_runner_times_the_fused_loss(tmp_path):
    pytest.importorskip("triton")
    assert runs(tmp_path, "--parts", "loss") == 0
    rows = rows_in(tmp_path)
    assert {row.by for row in rows} == {"triton", "reference"}
    assert {row.status for row in rows} == {"untimed"}
    assert {row.syncs for row in rows} == {0}
    assert all(row.plan_mb for row in rows if row.by == "triton")


@cpu_only
@pytest.mark.slow
def test_the_runner_goes_through_every_case(tmp_path):
    pytest.importorskip("triton")
    assert runs(tmp_path, "--parts", "loss", "parts", "scaling", "--row-seconds", "600", cases=tuple(cases.CASES)) == 0
    assert {row.case for row in rows_in(tmp_path)} == {f"{name} tiny" for name in cases.CASES}


@cpu_only
def test_a_row_that_differs_or_crashes_is_written_down_as_failed(tmp_path, monkeypatch, capsys):
    exact = ck.edge_distance

    def broken(classes, squared=False):
        if classes.dtype == torch.int8:
            raise RuntimeError("no\nsuch luck")
        return exact(classes, squared=squared) + (classes.dtype == torch.int32)

    monkeypatch.setattr(ck, "edge_distance", broken)
    assert runs(tmp_path, "--parts", "edt") == 1
    found = {
        row.dtype: row.status for row in rows_in(tmp_path) if row.by == "contextrast" and row.what == "edge_distance"
    }
    assert found["int64"] == "untimed"
    assert found["int32"].startswith("failed: differs from the definition: ")
    assert found["int8"] == "failed: RuntimeError: no"
    monkeypatch.undo()
    assert runs(tmp_path, "--parts", "edt") == 0  # what failed is tried again, and takes its row
    assert not any(row.status.startswith("failed") for row in rows_in(tmp_path))
    assert len({row.measured for row in rows_in(tmp_path)}) == len(rows_in(tmp_path))


@cpu_only
def test_a_row_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(ck, "edge_distance", lambda *_, **__: time.sleep(10))
    began = time.monotonic()
    assert runs(tmp_path, "--parts", "edt", "--row-seconds", "0.2", "--minutes", "0.01") == 1
    assert time.monotonic() - began < 8
    assert rows_in(tmp_path)[0].status == "failed: TimeoutError: took more than 0.2 s"
