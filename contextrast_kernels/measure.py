"""Measurements for ``bench`` and the benchmarks: agreement with the reference, then time, memory, launches, and how
often the host waits.

On CUDA calls are timed with events, on a CPU with the clock. The benchmarks time calls on several copies of the inputs,
which together exceed the L2 cache (``copies``); ``bench`` times calls on one.
"""

import gc
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

# -------------------------------------------------------------------------------------------------------- agreement


class Differs(Exception):
    """A result differs from the reference; the message says by how much."""


class Truth(NamedTuple):
    """Loss and gradients of the reference in float64, and the errors of the reference in the inputs' own dtype."""

    value: Tensor
    gradients: list[Tensor]
    own_value: float
    own_gradient: float


class Agreement(NamedTuple):
    """Relative errors against float64: that of the value, and that of all gradients as one vector."""

    value: float
    gradient: float


def evaluate(loss: Callable[[list[Tensor]], Tensor], features: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients at detached copies of the features."""
    leaves = [x.detach().requires_grad_() for x in features]
    value = loss(leaves)
    return value.detach(), list(torch.autograd.grad(value, leaves))


def truth(loss: Callable[[list[Tensor]], Tensor], features: Sequence[Tensor]) -> Truth:
    """The exact result of ``loss``. Call this under ``backend("reference")``."""
    value, gradients = evaluate(loss, [x.double() for x in features])
    exact = Truth(value, gradients, 0.0, 0.0)
    own = agreement(*evaluate(loss, features), exact)
    return exact._replace(own_value=own.value, own_gradient=own.gradient)


def agreement(value: Tensor | None, gradients: Sequence[Tensor] | None, exact: Truth) -> Agreement:
    """Compare a value and gradients with the exact ones. None is not compared."""
    return Agreement(
        0.0 if value is None else _relative([value], [exact.value]),
        0.0 if gradients is None else _relative(gradients, exact.gradients),
    )


def check(value: Tensor | None, gradients: Sequence[Tensor] | None, exact: Truth) -> Agreement:
    """Raise Differs if an error exceeds twice that of the reference in the inputs' own dtype, plus 1e-6."""
    found = agreement(value, gradients, exact)
    for name, error, own in zip(("loss", "gradient"), found, (exact.own_value, exact.own_gradient)):
        allowed = 2 * own + 1e-6
        if not error <= allowed:
            raise Differs(f"relative error of the {name}: {error:.1e}, allowed: {allowed:.1e}")
    return found


def _relative(tensors: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    difference = math.hypot(*(float((a.double() - b).norm()) for a, b in zip(tensors, exact, strict=True)))
    size = math.hypot(*(float(b.norm()) for b in exact))
    return difference / size if size > 0 else difference


# ------------------------------------------------------------------------------------------------------------- time


class Timing(NamedTuple):
    median_ms: float
    iqr_ms: float
    repeats: int


def copies(nbytes: int, device: torch.device) -> int:
    """The number of copies of inputs with ``nbytes`` bytes that together exceed three times the L2 cache, up to 16."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, 1 + -(-3 * cache // max(nbytes, 1)))


def time_calls(calls: Sequence[Callable[[], Any]], device: torch.device, seconds: float = 1.0) -> Timing:
    """Median and interquartile range of the time of a call. The calls take turns and do the same work."""
    warm_up = 2 * len(calls)
    for i in range(warm_up):
        calls[i % len(calls)]()
    one = _seconds(calls, device, len(calls))[-1]
    repeats = int(min(1000, max(5, seconds / max(one, 1e-7))))
    times = _seconds(calls, device, repeats)
    low, median, high = (1e3 * t for t in statistics.quantiles(times, n=4, method="inclusive"))
    return Timing(median, high - low, repeats)


def _seconds(calls: Sequence[Callable[[], Any]], device: torch.device, repeats: int) -> list[float]:
    if device.type == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        torch.cuda.synchronize(device)
        for i, (start, end) in enumerate(events):
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize(device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]
    times = []
    for i in range(repeats):
        began = time.perf_counter()
        calls[i % len(calls)]()
        times.append(time.perf_counter() - began)
    return times


def graphed(prepare: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """Capture the call that ``prepare()`` returns as a CUDA graph; return a function that replays it.

    Both run on the capturing stream, because a backward pass runs on the stream of its forward pass.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call = prepare()
        for _ in range(3):
            call()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = call()

    def replay():
        graph.replay()
        return result

    torch.cuda.current_stream().wait_stream(side)
    return replay


def copy_gb_s(device: torch.device) -> float:
    """Copy bandwidth: bytes read and written by a copy of a gibibyte, divided by its median time."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**24, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = time_calls([lambda: target.copy_(source)], device, 0.3)
    return 2 * source.numel() / timing.median_ms / 1e6


def answers(device: torch.device) -> bool:
    """False if an earlier error has made this process's CUDA context unusable."""
    try:
        return not torch.zeros(1, device=device).item()
    except RuntimeError:
        return False


# ----------------------------------------------------------------------------------------- memory, launches, waiting

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler reads it at its first use; it keeps stderr quiet


def nbytes(value: Any) -> int:
    """Bytes of the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(nbytes, value)) if isinstance(value, (list, tuple)) else 0


def peak_mib(call: Callable[[], Any], device: torch.device) -> float:
    """Peak memory of a call: the most that torch holds, above what it held before and what the call returns.

    On a CPU this does not include memory that the native library allocates itself.
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        most = torch.cuda.max_memory_allocated(device) - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            result = call()
        most = held = 0
        for event in profiler.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                most = max(most, held)
    return max(0, most - nbytes(result)) / 2**20


def launches(call: Callable[[], Any], device: torch.device) -> int | None:
    """The number of kernels, fills and copies on the device in one call; None without a device."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        call()
        torch.cuda.synchronize(device)
    events = profiler.profiler.kineto_results.events()
    return sum(event.device_type() == torch.autograd.DeviceType.CUDA and event.name() != "[memory]" for event in events)


class Waiting(TorchDispatchMode):
    """Counts ops whose value the host needs before it can continue."""

    OPS = frozenset(
        f"aten::{name}"
        for name in (
            *("_local_scalar_dense", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere"),
            *("masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive", "bincount", "histogram"),
        )
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += name in self.OPS
        if name in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"):
            self.count += any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        return func(*args, **(kwargs or {}))


def syncs(call: Callable[[], Any], device: torch.device) -> int:
    """How often the host waits for the device in one call.

    On CUDA torch reports it. On a CPU the ops that would wait are counted, without copies between host and device.
    """
    if device.type != "cuda":
        with Waiting() as mode:
            call()
        return mode.count
    torch.cuda.synchronize()
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
