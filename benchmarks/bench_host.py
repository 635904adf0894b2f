"""The host's cost of a call, beside that of a plain custom_op: benchmarks/host.py says what is timed.

    pytest benchmarks/bench_host.py --benchmark-enable

Launches, ops and allocations of a step are in the benchmarks' extra_info, which --benchmark-json writes down.
`python -m benchmarks.host` takes the calls in turn, and writes rows; its multiples are the ones to quote.
"""

import pytest
import torch

from benchmarks import host

pytest.importorskip("triton")
NAMES = ("plain custom_op", "contextrast_loss", "ContextrastLoss", "class_anchors", "negatives, native")


@pytest.fixture(scope="module")
def launching():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with host.launching(device) as launched:
            yield host.calls(device), launched
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_costs_the_host(benchmark, launching, name):
    calls, launched = launching
    assert set(calls) == set(NAMES)
    counts = host.count(calls[name], launched)
    benchmark.extra_info |= {
        "launches": len(counts.launches),
        "ATen ops": sum(counts.ops.values()),
        "allocations": counts.allocations,
    }
    benchmark.pedantic(host.step, (calls[name],), rounds=30, iterations=10, warmup_rounds=3)
