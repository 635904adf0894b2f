"""The benchmarks: one schema for all results, and that the runner runs."""

from dataclasses import replace

import pytest

from benchmarks import results
from contextrast_kernels import cases

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
    results.append(path, ROW)
    results.append(path, absent)
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
        results.append(tmp_path / "x.csv", replace(ROW, **change))
    assert not (tmp_path / "x.csv").exists()


def test_a_file_of_another_schema_is_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("row,case\na,b\n")
    with pytest.raises(results.SchemaError, match="expected the columns"):
        results.read(path)
    path.write_text(",".join(results.COLUMNS) + "\na,b\n")
    with pytest.raises(results.SchemaError, match="line 2"):
        results.read(path)
