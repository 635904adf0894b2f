"""What a call of the fused loss costs the host: Python, dispatch, and the preparation of launches.

    python -m benchmarks.host

Sizes are so small that the arithmetic takes no time. Costs are multiples of a plain `torch.library.custom_op` with a
gradient, called in turn with the loss in the same run, so that the machine's speed cancels out. On a GPU the calls are
the real ones, and the time until they return is measured. Without a GPU everything up to the launch is real, including
Triton's binding of arguments. The driver's call and the device's allocator are missing, and the time is the CPU time of
the thread.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import contextrast_kernels as ck
from contextrast_kernels import bane

PLAIN = "plain custom_op"


@torch.library.custom_op("contextrast_benchmarks::plain", mutates_args=())
def plain(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("contextrast_benchmarks::plain_backward", mutates_args=())
def plain_backward(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


plain.register_autograd(lambda ctx, gradient: plain_backward(gradient))


# ------------------------------------------------------------------------------------------------------- without a GPU


@contextlib.contextmanager
def launches_recorded() -> Iterator[list[str]]:
    """Replace Triton's driver by one of an H200 that records each kernel's name and launches nothing.

    Kernels take CPU tensors and count as compiled. Their results are undefined. RuntimeError in a process whose kernels
    are interpreted.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import jit
    from triton.runtime.driver import driver

    # What the ops import later has to be there before the variable below is set: contextrast brings in the rest.
    from contextrast_kernels.kernels import anchors, contextrast  # noqa: F401

    if not any(isinstance(member, jit.JITFunction) for member in vars(anchors).values()):
        raise RuntimeError("Triton interprets its kernels in this process: unset TRITON_INTERPRET before Python starts")
    launched: list[str] = []
    touched = []

    class Compiled:
        function = packed_metadata = None
        __getitem__ = compiler.CompiledKernel.__getitem__

        def _init_handles(self):
            pass

        def launch_metadata(self, *_):
            pass

    def already_compiled(kernel, key, signature, device, *_):
        compiled = Compiled()
        compiled.run = lambda *_: launched.append(kernel.__name__)
        kernel.device_caches[device][0][key] = compiled
        touched.append(kernel)
        return compiled

    recording_driver = types.SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
    )
    with (
        mock.patch.object(jit.JITFunction, "_do_compile", already_compiled),
        mock.patch.object(driver, "_active", recording_driver),
        mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),  # read by ours, which else refuses CPU tensors
        ck.backend("triton"),
    ):
        try:
            yield launched
        finally:
            for kernel in touched:
                kernel.device_caches.clear()


def launching(device: torch.device):
    """The context in which the fused loss can be called on a device."""
    return contextlib.nullcontext([]) if device.type == "cuda" else launches_recorded()


# ----------------------------------------------------------------------------------------------------------- the calls


def calls(device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """Forward calls by name, the plain op first. Those that return a tensor with a graph also run backward."""
    # A row of 64 pixels, then 32, 16, 8: as with real sizes, every row can be read 16 bytes at a time.
    features = [torch.randn(1, 16, 1, 64 >> i, device=device).requires_grad_() for i in range(4)]
    labels = torch.randint(0, 4, (1, 4, 256), device=device)
    logits = torch.randn(1, 4, 1, 64, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    x = torch.randn(8, device=device).requires_grad_()
    sizes = [tuple(f.shape[2:]) for f in features]
    criterion = ck.ContextrastLoss(4).to(device)
    chosen = (4, 0.5, "bane", "layer", 255, seed)
    return {
        PLAIN: lambda: plain(x),
        "contextrast_loss": lambda: ck.contextrast_loss(features, labels, logits, num_classes=4, seed=seed),
        "ContextrastLoss": lambda: criterion(features, labels, logits),
        "class_anchors": lambda: ck.class_anchors(features[0], labels, 4)[0],
        "negatives, native": lambda: bane.layer_negatives(logits, labels, sizes, *chosen)[1],
    }


def step(call: Callable[[], Tensor]) -> None:
    out = call()
    if out.requires_grad:
        out.backward(torch.ones_like(out))


class Counts(NamedTuple):
    """What one step launches and allocates, forward and backward."""

    launches: list[str]
    """Triton kernels in order; empty on a GPU."""
    ops: dict[str, int]
    """ATen ops that ours call, by name; not those that ATen's own call."""
    allocations: int


def count(call: Callable[[], Tensor], launched: list[str]) -> Counts:
    step(call)
    launched.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step(call)
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    ours = [e.name for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return Counts(list(launched), dict(Counter(ours)), sum(e.name.startswith("aten::empty") for e in events))


# ---------------------------------------------------------------------------------------------------------- the measure


class Cost(NamedTuple):
    """The cost of one call and phase."""

    name: str
    phase: str
    multiple: float
    """In multiples of the plain op's same phase: the median over the rounds' ratios."""
    median_ms: float
    iqr_ms: float


def measure(device: torch.device, rounds: int = 30, repeats: int = 20) -> list[Cost]:
    """Every round takes all calls in turn, so that a change of the machine's speed affects all of them. A round's time
    is the median of its ``repeats``."""
    named, samples = calls(device), {}
    for call in named.values():
        for _ in range(3):
            step(call)
    for _ in range(rounds):
        for name, call in named.items():
            for phase, milliseconds in _round(call, device, repeats).items():
                samples.setdefault((name, phase), []).append(milliseconds)
    costs = []
    for (name, phase), times in samples.items():
        yardstick = samples[PLAIN, phase]
        low, median, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        multiple = statistics.median(time / unit for time, unit in zip(times, yardstick, strict=True))
        costs.append(Cost(name, phase, multiple, median, high - low))
    return costs


def _round(call: Callable[[], Tensor], device: torch.device, repeats: int) -> dict[str, float]:
    # A backward pass on a GPU runs on a thread of its own.
    now = time.perf_counter if device.type == "cuda" else time.thread_time
    forward, backward = [], []
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # with a full queue the host would wait for the device
    for _ in range(repeats):
        start = now()
        out = call()
        forward.append(1e3 * (now() - start))
        if out.requires_grad:
            gradient = torch.ones_like(out)
            start = now()
            out.backward(gradient)
            backward.append(1e3 * (now() - start))
    if not backward:
        return {"forward": statistics.median(forward)}
    both = [a + b for a, b in zip(forward, backward, strict=True)]
    phases = {"forward": forward, "backward": backward, "forward+backward": both}
    return {phase: statistics.median(times) for phase, times in phases.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="of 20 calls each (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    try:
        with launching(device) as launched:
            counts = {name: count(call, launched) for name, call in calls(device).items()}
            costs = measure(device, options.rounds)
    except (RuntimeError, ImportError) as error:
        sys.exit(f"host.py: {error}")
    for name, of_step in counts.items():
        launches = "" if device.type == "cuda" else f"{len(of_step.launches)} launches, "
        print(f"{name:24}{launches}{sum(of_step.ops.values())} ATen ops, {of_step.allocations} allocations a step")
    print(f"\n{'call':24}{'phase':18}{'x plain':>9}{'median us':>12}{'iqr us':>9}")
    for cost in costs:
        print(f"{cost.name:24}{cost.phase:18}{cost.multiple:9.1f}{1e3 * cost.median_ms:12.1f}{1e3 * cost.iqr_ms:9.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
