"""Set-up of all tests: the interpreter switch, common fixtures, the order of the files, and a list of skipped tests."""

import os
from collections import Counter

import torch

# If the suite runs in several processes, each uses one core, and so do the processes that its tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

# Without this setting PyTorch raises or warns at every CUDA matrix product while deterministic algorithms are on.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Triton reads this when a kernel's module is imported, so it is decided before any test is collected.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest
from interpreter import set_up

import contextrast_kernels as ck

pytest.register_assert_rewrite("kernel_checks")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if os.environ.get("TRITON_INTERPRET") == "1":
    set_up()


LONGEST = (
    *("test_native_library", "test_resources", "test_group", "test_volumes", "test_benchmarks", "test_demo"),
    *("test_viz", "test_cuda_budgets", "test_relatives", "test_every_metric", "test_bane", "test_exact"),
    *("test_kernels", "test_memory_bank", "test_bounds", "test_info_nce_kernel", "test_native"),
)
"""The files that take longest. They run first, so that all processes of the suite end at about the same time. The file
that compiles csrc's CUDA code for others, test_cuda_budgets, is among them."""


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False"))


def pytest_terminal_summary(terminalreporter):
    reasons = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skipped, and why")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5d}  {reason}")


@pytest.fixture(params=["reference", "native"])
def map_backend(request):
    """Runs a test of the integer maps (errors, distances, selection) on every backend that has them on this machine."""
    if ck.available()[request.param] != "ok":
        pytest.skip(f"backend {request.param}: {ck.available()[request.param]}")
    with ck.backend(request.param):
        yield request.param


@pytest.fixture
def reference():
    """Runs a test on the reference in plain PyTorch, whatever else is installed."""
    with ck.backend("reference"):
        yield


@pytest.fixture(scope="module")
def one_thread():
    """Runs a test on one thread: its tensors are so small that a second thread would only wait for a core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_rank():
    """torch.distributed with one gloo rank, which a test may itself destroy."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo to run ranks on")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture
def rng():
    return np.random.default_rng(20240)
