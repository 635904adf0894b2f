"""The runner's rows for a CPU under pytest-benchmark: `make bench`.

    [CONTEXTRAST_PEERS=<folder of checkouts>] pytest benchmarks --benchmark-enable

Every row is validated as benchmarks/run.py does it, timed by pytest-benchmark, and written to results/<cpu>.csv. What
takes seconds a call is left to ``python -m benchmarks.run``.
"""

import os
import pathlib

import pytest

from benchmarks import results, run
from contextrast_kernels import measure

SLOW = ("kornia", "MONAI", "SciPy for each class", "torch.compile")
PEERS = os.environ.get("CONTEXTRAST_PEERS")
MACHINE = run.Machine("cpu", tiny=False, seconds=0.5, frames=None)
JOBS = [
    job
    for job in run.jobs_of(MACHINE, run.ON_CPU, ["cityscapes"], PEERS and pathlib.Path(PEERS))
    if not job.row.by.startswith(SLOW)
]


def named(job: run.Job) -> str:
    row = job.row
    threads = f"{row.threads} threads"
    return ", ".join(filter(None, (row.what, row.by, row.regime, row.dtype, row.layout, threads)))


@pytest.mark.parametrize("job", JOBS, ids=named)
def test_row(benchmark, monkeypatch, job):
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled: --benchmark-enable")

    def timed(calls, device, seconds):
        benchmark.pedantic(calls[0], rounds=9, warmup_rounds=1)
        stats = benchmark.stats.stats
        return measure.Timing(1e3 * stats.median, 1e3 * stats.iqr, stats.rounds)

    monkeypatch.setattr(MACHINE, "time", timed)
    row = run.measured(job, MACHINE, 120.0)
    if row.status.startswith("absent"):
        pytest.skip(row.status)
    assert row.status == "ok", row.status
    results.record(results.path_of(row.device), row)
