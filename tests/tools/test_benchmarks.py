"""The benchmarks: the schema of the results, the measurements, the runner and the report."""

import contextlib
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import contextrast_kernels as ck
from benchmarks import report, results, run
from contextrast_kernels import cases, measure
from contextrast_kernels.backend import _requested

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
        assert row in results.read(results.path_of(row.device))


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
        {"batch": 1.5},
    ],
)
def test_rows_that_violate_the_schema_are_refused(tmp_path, change):
    with pytest.raises(results.SchemaError, match="expected"):
        results.record(tmp_path / "x.csv", replace(ROW, **change))
    assert not (tmp_path / "x.csv").exists()


def test_an_interrupted_write_does_not_change_the_file(tmp_path, monkeypatch):
    path = tmp_path / "gpu.csv"
    results.record(path, ROW)
    before = path.read_bytes()

    def full(table, cells):
        table.writer.writerow(["op"])
        raise OSError("no space left on device")

    monkeypatch.setattr(results.csv.DictWriter, "writerows", full)
    with pytest.raises(OSError, match="no space"):
        results.record(path, replace(ROW, by="another"))
    assert path.read_bytes() == before


def test_a_file_of_a_different_schema_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("row,case\na,b\n")
    with pytest.raises(results.SchemaError, match="expected the columns"):
        results.read(path)
    path.write_text(",".join(results.COLUMNS) + "\na,b\n")
    with pytest.raises(results.SchemaError, match="line 2"):
        results.read(path)
    for content, sentence in (
        (b"", "expected a line of columns, got an empty file: delete it."),
        (b"\x89PNG\r\n", "expected comma-separated text, got another kind of file"),
        (",".join(results.COLUMNS).encode() + b"\n" + b"a" * 200000, "expected comma-separated text"),
    ):
        path.write_bytes(content)
        with pytest.raises(results.SchemaError, match=f"{path}: {sentence}"):
            results.read(path)


@pytest.mark.parametrize("buffered", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_closed_pipe_is_not_an_error(buffered):
    """The pipe is that of `bench --plan | head -1`."""
    command = [sys.executable, "-m", "contextrast_kernels", "bench", "--plan"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environment = os.environ | {"PYTHONUNBUFFERED": "" if buffered else "1"}
    with subprocess.Popen(command, **pipes, cwd=report.ROOT, env=environment) as bench:
        bench.stdout.close()
        assert bench.stderr.read() == b"" and bench.wait() == 1


# --------------------------------------------------------------------------------------------------------- measuring


def test_a_result_beyond_the_contract_raises_differs():
    def loss(features):
        return (features[0] ** 3).sum()

    x = torch.linspace(0.1, 1, 7, dtype=torch.float16)
    exact = measure.truth(loss, [x])
    value, gradients = measure.evaluate(loss, [x])
    assert gradients[0].dtype == torch.float16
    assert measure.check(value, gradients, exact) == (exact.own_value, exact.own_gradient)
    assert measure.check(None, [3 * x.double() ** 2], exact).gradient < 1e-12
    twice, thrice = ([exact.gradients[0] * (1 + times * exact.own_gradient)] for times in (2, 3))
    assert exact.own_gradient > 1e-5 and measure.check(None, twice, exact)
    for wrong in ((value * 1.01, None), (None, thrice), (value * float("nan"), None)):
        with pytest.raises(measure.Differs, match="allowed"):
            measure.check(*wrong, exact)


def test_time_is_the_median_of_all_copies():
    seen = []
    timing = measure.time_calls([lambda: seen.append(0), lambda: seen.append(1)], torch.device("cpu"), seconds=1e-5)
    assert timing.repeats >= 5 and timing.median_ms > 0 and timing.iqr_ms >= 0
    assert abs(seen.count(0) - seen.count(1)) <= 2


@pytest.mark.parametrize(("mebibytes", "copies"), [(0, 16), (1, 16), (15, 11), (16, 11), (149, 3), (150, 2), (4000, 2)])
def test_copies_of_the_inputs_exceed_the_cache_three_times_over(monkeypatch, mebibytes, copies):
    """The cache has 50 MiB here. Reading the other copies evicts one from the cache; sixteen copies are enough."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 * 2**20))
    assert measure.copies(mebibytes * 2**20, torch.device("cuda")) == copies
    assert measure.copies(mebibytes * 2**20, torch.device("cpu")) == 1


def test_peak_memory_is_above_what_the_call_returns():
    def call():
        big = torch.ones(2**18)
        return (big + 1).sum(), torch.zeros(2**16)

    found = measure.peak_mib(call, torch.device("cpu"))
    assert abs(found - 1.75) < 0.01  # two of a MiB at once, less the quarter that is returned


# --------------------------------------------------------------------------------------------------------- the runner


def runs(folder, *arguments, cases=("camvid",)):
    return run.main(["--out", str(folder), "--tiny", "--cases", *cases, *arguments])


def rows_in(folder):
    return results.read(results.path_of(results.environment()["device"], folder))


cpu_only = pytest.mark.skipif(
    torch.cuda.is_available(), reason="rows are timed where there is a GPU: make gpu runs them"
)


@pytest.fixture
def one_volume(monkeypatch):
    """Distances of one volume alone: all rows take the same way through the runner."""
    [case, *_] = run.distances.cases(16)
    monkeypatch.setattr(run.distances, "cases", lambda side: [case])


@pytest.fixture
def small(monkeypatch):
    """A network of four convolutions among those that are timed."""

    def build(num_classes):
        convolutions = [torch.nn.Conv2d(3, 8, 3, 4, 1), *(torch.nn.Conv2d(8, 8, 3, 2, 1) for _ in range(3))]
        up = torch.nn.Upsample(scale_factor=32, mode="bilinear")
        network = torch.nn.Sequential(*convolutions, torch.nn.Conv2d(8, num_classes, 1), up)
        network.layers = [str(i) for i in range(4)]
        return network

    monkeypatch.setitem(run.NETWORKS, "small", build)


@cpu_only
@pytest.mark.long
def test_the_runner_measures_every_row_once(tmp_path, capsys):
    parts = ("--parts", "distances", "peers", "host")
    assert runs(tmp_path, *parts, "--minutes", "0") == 0
    assert rows_in(tmp_path) == []
    expected = int(capsys.readouterr().out.split(";")[-1].split()[0])
    assert runs(tmp_path, *parts) == 0
    assert capsys.readouterr().out.endswith("complete\n")
    rows = rows_in(tmp_path)
    assert len(rows) == expected > 10
    for row in rows:
        assert row.status == "untimed" or row.status.startswith("absent: "), row
        assert row.case in ("camvid tiny", "cityscapes", "16^3", "") and row.device and row.torch
    ran = {(row.what, row.by) for row in rows if row.status == "untimed"}
    ours = run.distances.OURS
    assert {("edge_distance", ours), ("distance_transform", ours), ("distance_transform", "SciPy")} <= ran
    assert {(f"host time, {pass_}", run.host.PLAIN) for pass_ in (run.FORWARD, run.BOTH)} <= ran
    runs(tmp_path, *parts)
    assert capsys.readouterr().out == "0 rows failed; complete\n"


@cpu_only
def test_a_cpu_times_the_reference_in_each_layout_with_the_threads_of_the_row(tmp_path, monkeypatch, one_volume):
    seen = set()
    monkeypatch.setattr(run.Machine, "sized", lambda self, name: replace(cases.CASES[name].tiny(), dtype=torch.float32))
    monkeypatch.setattr(run.measure, "peak_mib", lambda *_: seen.add(torch.get_num_threads()) or 0)
    for counted in ("launches", "syncs"):  # a profiler's start takes seconds
        monkeypatch.setattr(measure, counted, lambda *_: 0)
    before = torch.get_num_threads()
    assert run.main(["--out", str(tmp_path), "--parts", "loss", "distances", "--seconds", "0.001"]) == 0
    rows = rows_in(tmp_path)
    assert all(row.status == "ok" or row.status.startswith("absent: ") for row in rows), rows
    of_loss = [row for row in rows if row.what == f"{run.LOSS} {run.BOTH}"]
    assert {(row.by, row.layout) for row in of_loss} == {("reference", layout) for layout in cases.LAYOUTS}
    assert {row.threads for row in rows if row.by == run.distances.OURS} == seen == {1, 2}
    assert torch.get_num_threads() == before


@cpu_only
def test_a_part_that_needs_a_gpu_is_refused_on_a_cpu(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(["--out", str(tmp_path), "--parts", "scaling"])
    assert "--parts: torch sees no GPU" in capsys.readouterr().err


@cpu_only
@pytest.mark.slow
@pytest.mark.parametrize("networks", [("small",), run.NETWORKS_TIMED], ids=["small", "all"])
def test_the_runner_measures_training_steps_and_compilers(tmp_path, monkeypatch, small, networks):
    monkeypatch.setattr(run, "NETWORKS_TIMED", networks)
    assert runs(tmp_path, "--parts", "step", "compiled") == 0
    rows = rows_in(tmp_path)
    for row in rows:
        assert row.status == "untimed" or row.status.startswith("absent: "), row
    ran = {(row.what, row.by) for row in rows if row.status == "untimed"}
    assert {("training step", "small"), ("contextrast_loss forward+backward", "torch.compile")} <= ran


@cpu_only
@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--peers", "/nowhere"], "--peers: expected a folder"),
        (["--minutes", "nan"], "--minutes: expected 0 to 86400"),
        (["--row-seconds", "-1"], "--row-seconds: expected 0 to 86400"),
        (["--parts", "everything"], "invalid choice"),
    ],
)
def test_bad_arguments_of_the_runner_are_clear_errors(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        runs(tmp_path, *arguments)
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_results_of_a_different_schema_are_not_changed(tmp_path, capsys):
    path = results.path_of(results.environment()["device"], tmp_path)
    path.write_text("row,case\na,b\n")
    with pytest.raises(SystemExit, match="2"):
        runs(tmp_path)
    assert "--out: " in capsys.readouterr().err and path.read_text() == "row,case\na,b\n"


@cpu_only
@pytest.mark.long
def test_rows_that_differ_or_crash_are_recorded_as_failed(tmp_path, monkeypatch, capsys):
    exact = ck.edge_distance

    def broken(classes, **options):
        if _requested() == "reference":
            return exact(classes, **options)
        if classes.dtype == torch.int8:
            raise RuntimeError("no\nsuch luck")
        return exact(classes, **options) + 1

    monkeypatch.setattr(ck, "edge_distance", broken)
    assert runs(tmp_path, "--parts", "distances") == 1
    found = {(row.what, row.dtype): row.status for row in rows_in(tmp_path) if row.by == run.distances.OURS}
    assert found["distance_transform", "uint8"] == "untimed"
    assert found["edge_distance", "int64"].startswith("failed: differs from the reference: ")
    assert found["edge_distance", "int8"] == "failed: RuntimeError: no"
    monkeypatch.undo()
    assert runs(tmp_path, "--parts", "distances") == 0  # failed rows are tried again and replaced
    assert not any(row.status.startswith("failed") for row in rows_in(tmp_path))
    assert len({row.measured for row in rows_in(tmp_path)}) == len(rows_in(tmp_path))


@cpu_only
@pytest.mark.parametrize(
    ("part", "broken"), [("step", "with contextrast"), pytest.param("loss", "triton", marks=pytest.mark.slow)]
)
def test_a_loss_that_differs_from_the_reference_is_not_timed(tmp_path, monkeypatch, small, part, broken):
    pytest.importorskip("triton")
    monkeypatch.setattr(run, "NETWORKS_TIMED", ("small",))
    exact = ck.contextrast_loss
    monkeypatch.setattr(
        ck, "contextrast_loss", lambda *inputs, **o: exact(*inputs, **o) * (1.01 if _requested() == "triton" else 1)
    )
    assert runs(tmp_path, "--parts", part) == 1
    rows = [row for row in rows_in(tmp_path) if not row.status.startswith("absent")]
    differs = [
        row for row in rows if row.status.startswith("failed: differs from the reference: relative error of the")
    ]
    assert differs == [row for row in rows if broken in (row.by, row.mode)] != []


@cpu_only
def test_rows_after_a_device_failure_run_first_in_the_next_call(tmp_path, monkeypatch, capsys, one_volume):
    def broken(*_, **__):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr(run.distances, "ours", broken)
        patch.setattr(measure, "answers", lambda device: False)
        assert runs(tmp_path, "--parts", "distances") == 1
    [first] = rows_in(tmp_path)
    assert first.status.startswith("failed: RuntimeError: CUDA error") and "rows left" in capsys.readouterr().out
    assert runs(tmp_path, "--parts", "distances") == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) >= 4 and printed[-2].startswith(first.what) and first.by in printed[-2]
    assert rows_in(tmp_path)[-1].measured == first.measured and rows_in(tmp_path)[-1].status == "untimed"


@cpu_only
def test_absent_rows_are_retried(tmp_path, capsys):
    assert runs(tmp_path, "--parts", "peers") == 0
    assert {row.by for row in rows_in(tmp_path) if "no checkout" in row.status} == set(run.peers.RELATIVES)
    assert {row.by for row in rows_in(tmp_path) if row.status == "untimed"} == {
        f"{name}, this package" for name in run.peers.RELATIVES
    }
    capsys.readouterr()
    assert runs(tmp_path, "--parts", "peers") == 0
    assert capsys.readouterr().out == "0 rows failed; complete\n"
    (tmp_path / "peers" / "PNE_Loss").mkdir(parents=True)
    assert runs(tmp_path, "--parts", "peers", "--peers", str(tmp_path / "peers")) == 0
    assert [row.by for row in rows_in(tmp_path) if row.status.startswith("failed: ModuleNotFoundError")] == ["PNE_Loss"]


@cpu_only
def test_rows_that_take_too_long_are_stopped(tmp_path, monkeypatch, one_volume):
    monkeypatch.setattr(run.distances, "ours", lambda *_: time.sleep(10))
    assert runs(tmp_path, "--parts", "distances", "--row-seconds", "0.2") == 1
    assert rows_in(tmp_path)[0].status == "failed: TimeoutError: took more than 0.2 s"


def test_row_timeout_is_signalled_repeatedly():
    """One signal is not enough: an exception inside a callback of the garbage collector is lost."""
    with pytest.raises(TimeoutError, match=r"took more than 0\.05 s"), run.at_most(0.05):
        with contextlib.suppress(TimeoutError):
            time.sleep(20)
        time.sleep(20)


# --------------------------------------------------------------------------------------------------------- the report


def made_up_rows():
    """Rows of a made-up GPU: every kind of row that the report knows, from the runner's own list."""
    machine = run.Machine("cpu", tiny=False, seconds=1.0)
    machine.on_gpu = True
    gpu = {"device": "A GPU", "driver": "580.1", "torch": "2.11.0", "triton": "3.6.0", "commit": "0123456"}
    rows = []
    for job in run.jobs_of(machine, run.PARTS, list(cases.CASES), None):
        row = replace(job.row, **gpu)
        work = (row.batch or 1) * (row.height or 1) * (row.width or 1) * (row.channels or 1) / 1e9
        slow = {"triton": 1.0, "contextrast": 1.0, "reference": 20.0}.get(row.by, 7.0)
        outcome = {
            "median_ms": work * slow,
            "iqr_ms": work / 50,
            "launches": 14,
            "syncs": 0,
            "peak_mib": 3.0 * slow,
        }
        if row.by == "kornia on edges":
            rows.append(replace(row, status="failed: RuntimeError: too slow"))
            continue
        plan = {"plan_mb": 900 * work, "copy_gb_s": 4300.0} if row.by == "triton" else {}
        rows.append(replace(row, **outcome, **plan))
    return rows


def made_up_cpu_rows():
    """Rows of a made-up CPU: one map, one thread."""
    milliseconds = {
        "trained": {"contextrast native": 0.5, "edt multi-label": 6.0, "OpenCV precise on edges": 500.0},
        "noise": {"contextrast native": 0.4, "OpenCV precise on edges": 5.0, "edt multi-label": 20.0},
    }
    return [
        results.Row(
            what="edge_distance", by=by, mode="isotropic", case="cityscapes", regime=regime,
            batch=1, height=512, width=1024, classes=19,
            dtype="int64", threads=1, exact="no" if by == "edt multi-label" else "yes", median_ms=median, iqr_ms=0.01,
            device="A CPU", torch="2.11.0", commit="0123456",
        )
        for regime, of_regime in milliseconds.items()
        for by, median in of_regime.items()
    ]  # fmt: skip


def report_into(root, *devices):
    """Copy README.md and docs/ to a folder, and write the rows of these devices there as results."""
    (root / "docs").mkdir()
    (root / "results").mkdir()
    for name in ("README.md", "docs/method.md", "docs/distance.md"):
        (root / name).write_text((report.ROOT / name).read_text())
    for name in results.OTHER_SCHEMA:
        (root / "results" / name).write_text((results.FOLDER / name).read_text())
    for rows in devices:
        results.write(results.path_of(rows[0].device, root / "results"), rows)
    return ["--root", str(root), "--results", str(root / "results")]


def test_committed_tables_and_plots_match_the_results(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_stale_pages_and_plots_are_found(tmp_path, capsys):
    rows = made_up_cpu_rows()
    where = report_into(tmp_path, rows)
    assert report.main([*where, "--check"]) == 1  # no page yet
    assert report.main(where) == 0
    assert report.main([*where, "--check"]) == 0
    assert "| 0.5 ms | 6 ms (edt multi-label) | 12 |" in (tmp_path / "README.md").read_text()
    faster = [replace(row, median_ms=0.3) if row.median_ms == 0.5 else row for row in rows]
    results.write(results.path_of("A CPU", tmp_path / "results"), faster)
    (tmp_path / "docs" / "camvid" / "of_nothing.png").write_bytes(b"")
    capsys.readouterr()
    assert report.main([*where, "--check"]) == 1
    found = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert found == {"README.md", "docs/distance.md", "docs/camvid/of_nothing.png"}
    assert "| 0.5 ms |" in (tmp_path / "README.md").read_text()
    assert report.main(where) == 0
    assert report.main([*where, "--check"]) == 0
    assert "| 0.3 ms | 6 ms (edt multi-label) | 20 |" in (tmp_path / "README.md").read_text()


def test_a_report_of_every_kind_of_row(tmp_path):
    rows = made_up_rows()
    where = report_into(tmp_path, rows, made_up_cpu_rows())
    assert report.main(where) == 0
    page, readme = (tmp_path / "docs" / "performance.md").read_text(), (tmp_path / "README.md").read_text()
    assert page.count(report.NOT_YET) == 1 and "nan" not in page  # there is no loss on the CPU among these rows
    [line] = [line for line in readme.splitlines() if line.startswith("| cityscapes, trained | bfloat16, nchw")]
    fused, reference = (
        next(row for row in rows if (row.what, row.by) == (report.BOTH, by) and row.mode == "eager")
        for by in ("triton", "reference")
    )
    assert f"{fused.median_ms:.3g} ms" in line and f"| {reference.median_ms / fused.median_ms:.3g} |" in line
    assert f"{fused.plan_mb / fused.median_ms / 43:.3g} %" in line
    assert line.endswith(f"| {fused.median_ms / (4 * 348160 * 256 * 2 / 4300e6):.3g} |")
    assert "failed: RuntimeError: too slow" in page
    assert page.count(report.COLUMNS.format(ours="`triton`, `contextrast` or `contextrast native`")) == 1
    assert "relative's loss" not in page and "torch.compile, eager" not in page and "_Loss" not in page
    assert "Not measured" not in readme
    assert "driver 580.1, torch 2.11.0, Triton 3.6.0, commit 0123456" in readme


def columns_of(page, what, by):
    """Cells of the lines of a table that have this in their first two columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    return [cells for cells in lines if cells[0] == what and cells[1].startswith(by)]


def test_ratios_are_within_one_device_and_commit(tmp_path):
    """Another CPU with fewer rows, and ours measured again at a later commit, change no line of the first."""
    here = made_up_cpu_rows()
    there = [replace(row, device="Another CPU", median_ms=row.median_ms / 1000) for row in here[1:]]
    where = report_into(tmp_path, here, there)
    later = next(row for row in here if row.by in report.OURS)
    path = results.path_of("A CPU", tmp_path / "results")
    results.record(path, replace(later, commit="fedcba9", median_ms=later.median_ms / 10))
    assert report.main(where) == 0
    readme = (tmp_path / "README.md").read_text()
    assert "| 512 × 1024 error map, noise | 0.4 ms | 5 ms (OpenCV precise on edges) | 12.5 |" in readme
    assert report.distances.spoken(later) not in readme


def test_distances_are_listed_beside_the_fastest_peer_with_as_many_threads(tmp_path):
    [case, *_] = run.distances.cases()
    rows = [
        results.Row(by=by, threads=threads, median_ms=time, iqr_ms=0.0, **case.columns, device="A CPU", torch="2.11.0")
        for by, threads, time in ((report.OURS[0], 1, 200.0), ("edt", 1, 500.0), ("SciPy", 1, 3e3), ("edt", 2, 300.0))
    ]
    rows += [replace(row, regime="noise", median_ms=2 * row.median_ms) for row in rows if row.by != "edt"]
    rows += [replace(rows[0], threads=2, median_ms=125.0), replace(rows[2], mode="isotropic, indices")]
    rows += [replace(rows[0], mode="isotropic, indices", median_ms=300.0)]
    assert report.main(report_into(tmp_path, rows)) == 0
    page = (tmp_path / "docs" / "distance.md").read_text()
    assert "| 256³ mask, trained-like | isotropic | 200 ms | 500 ms, edt | 2.5 | 125 ms | 300 ms, edt | 2.4 |" in page
    assert "one thread this library is 2.5 to 15 (median 8.8) times as fast as the fastest peer." in page
    assert "two threads it is 2.4 times as fast" in page
    assert "the second thread makes it 1.6 times as fast" in page
    assert "Without indices SciPy takes 15 times as long. With indices SciPy takes 10 times as long." in page


def test_edt_has_one_name_for_several_labels_in_maps_and_volumes():
    volume, image = (
        next(c for c in run.distances.cases() if (c.what, c.is_volume) == kind)
        for kind in (("edge_distance", True), ("edge_distance", False))
    )
    rows = [
        results.Row(by=by, threads=1, median_ms=time, iqr_ms=0.0, **case.columns)
        for case, peer in ((volume, "edt"), (image, "edt multi-label"))
        for by, time in ((run.distances.OURS, 200.0), (peer, 500.0))
    ]
    lines = run.distances.table(rows).splitlines()
    assert sum("| 200 ms | 500 ms, edt multi-label | 2.5 |" in line for line in lines) == 2


def test_relative_times_are_ratios_to_ours(tmp_path):
    rows = made_up_rows()
    where = report_into(tmp_path, rows)
    assert report.main(where) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    whose = [f"PNE ({code})" for code in ("official code", "this package")]
    relatives = [cells for by in whose for cells in columns_of(page, f"related loss {run.BOTH}", by)]
    assert len(relatives) == 2 * len(cases.CASES) and {cells[4] for cells in relatives} == {"7"}
    results.write(
        results.path_of(rows[0].device, tmp_path / "results"), [row for row in rows if row.what.startswith("relative")]
    )
    assert report.main(where) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert [{cells[4] for cells in columns_of(page, f"related loss {run.BOTH}", by)} for by in whose] == [{"–"}] * 2


def test_host_times_are_ratios_to_the_plain_op(tmp_path):
    what = f"host time, {run.FORWARD}"
    gpu = {"device": "A GPU", "driver": "580.1", "torch": "2.11.0"}
    times = {run.host.PLAIN: 0.5, "contextrast_loss": 3.0}
    rows = [results.Row(what, by, median_ms=time, iqr_ms=0.0, **gpu) for by, time in times.items()]
    assert report.main(report_into(tmp_path, rows)) == 0
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert {by: columns_of(page, what, by)[0][4] for by in times} == {run.host.PLAIN: "1", "contextrast_loss": "6"}


def test_a_later_untimed_row_does_not_hide_a_measurement():
    later = replace(ROW, commit="7654321", status="untimed", median_ms=None, iqr_ms=None)
    again = replace(ROW, commit="7654321", median_ms=3.0)
    assert report.latest([ROW, later]) == [ROW]
    assert report.latest([ROW, again]) == [again]


def test_figures_appear_only_in_generated_parts():
    """Times, rates and memory in the pages come from rows."""
    figure = re.compile(r"\d(?:\.\d+)?\s*(?:ms|µs|us|[GTM]B/s|MiB|GiB|× faster|x faster|times faster)\b")
    for path in (report.ROOT / "README.md", *sorted((report.ROOT / "docs").glob("*.md"))):
        if path.name not in ("performance.md", "camvid.md"):
            text = report.BLOCK.sub("", path.read_text())
            assert not figure.findall(text), f"{path.name}: {figure.search(text)} comes from no row of results"
