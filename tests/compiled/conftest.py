"""These tests need a process in which Triton compiles: TRITON_INTERPRET=0 python -m pytest tests/compiled."""

from collections import defaultdict

import pytest

from . import driver


def pytest_collection_modifyitems(items):
    reason = driver.missing()
    for item in items:
        if reason and "compiled" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason=f"compiled kernels: {reason}"))


@pytest.fixture(autouse=True)
def one_thread_each(one_thread):
    """The engine has one thread."""


def pytest_terminal_summary(terminalreporter):
    """The largest errors by op, dtype and architecture, as fractions of the allowed error, and the compiler's time."""
    worst, kernels, seconds = defaultdict(lambda: [0.0, 0.0, 0]), 0, 0.0
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, found in getattr(report, "user_properties", []):
                if name == "errors":
                    key, value, gradient = found
                    row = worst[tuple(key)]
                    row[:] = max(row[0], value), max(row[1], gradient), row[2] + 1
                elif name == "compiled":
                    kernels, seconds = kernels + found[0], seconds + found[1]
    if worst:
        terminalreporter.section("largest errors of compiled kernels, in shares of what is allowed")
        for (op, dtype, arch), (value, gradient, cases) in sorted(worst.items()):
            terminalreporter.line(
                f"{op:18s} {dtype:9s} sm_{arch}  value {value:5.2f}  gradient {gradient:5.2f}  cases {cases}"
            )
        terminalreporter.line(f"{kernels} kernels were compiled in {seconds:.0f} s; the rest came from Triton's cache")
