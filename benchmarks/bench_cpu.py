"""The runner's rows for a CPU under pytest-benchmark: `make bench`.

    [CONTEXTRAST_PEERS=<folder of checkouts>] pytest benchmarks --benchmark-enable

Every row is validated as benchmarks/run.py does it, timed by pytest-benchmark beside the others of its case, and
written to build/results/<cpu>.csv. Volumes have 128 voxels a side, maps 256 x 512 pixels. Larger ones, two threads,
samplings, indices and what takes seconds a call are left to ``python -m benchmarks.run``.
"""

import os
import pathlib

import pytest

from benchmarks import results, run
from contextrast_kernels import measure

SLOW = ("kornia", "MONAI", "SciPy", "torch.compile")
RESULTS = pathlib.Path(__file__).parents[1] / "build" / "results"
PEERS = os.environ.get("CONTEXTRAST_PEERS")
MACHINE = run.Machine("cpu", tiny=False, seconds=0.5, side=128)
JOBS = [
    job
    for job in run.jobs_of(MACHINE, run.ON_CPU, ["cityscapes"], PEERS and pathlib.Path(PEERS))
    if not job.row.by.startswith(SLOW)
    and (job.row.mode == "eager" or (job.row.mode == "isotropic" and job.row.threads == 1))
]


def named(job: run.Job) -> str:
    row = job.row
    return ", ".join(filter(None, (row.what, row.case, row.regime, row.dtype, row.layout, row.by)))


@pytest.mark.parametrize("job", JOBS, ids=named)
def test_row(benchmark, monkeypatch, job):
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled: --benchmark-enable")
    benchmark.group, _, benchmark.name = named(job).rpartition(", ")

    def timed(calls, device, seconds):
        benchmark.pedantic(calls[0], rounds=5, warmup_rounds=1)
        stats = benchmark.stats.stats
        return measure.Timing(1e3 * stats.median, 1e3 * stats.iqr, stats.rounds)

    monkeypatch.setattr(MACHINE, "time", timed)
    row = run.measured(job, MACHINE, 300.0)
    if row.status.startswith("absent"):
        pytest.skip(row.status)
    assert row.status == "ok", row.status
    results.record(results.path_of(row.device, RESULTS), row)
