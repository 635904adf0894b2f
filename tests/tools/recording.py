"""Record the launches of compiled kernels without a GPU, and count what a step calls.

Everything up to the launch is real, including Triton's binding of arguments. Only the driver's call is missing, and so
are results: they are undefined. Use it in a process in which TRITON_INTERPRET is unset.
"""

import contextlib
import os
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import jit
from triton.runtime.driver import driver

import contextrast_kernels as ck
from benchmarks import host

# What the ops import later has to be there before launches_recorded sets TRITON_INTERPRET.
from contextrast_kernels.kernels import anchors, contextrast  # noqa: F401


@contextlib.contextmanager
def launches_recorded() -> Iterator[list[str]]:
    """Replace Triton's driver by one of an H200 that records each kernel's name. Kernels take CPU tensors and count as
    compiled."""
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


class Counts(NamedTuple):
    """What one step launches and calls, forward and backward."""

    launches: list[str]
    """Triton kernels in order."""
    ops: dict[str, int]
    """ATen ops that ours call, by name; not those that ATen's own call."""


def count(call: Callable[[], Tensor], launched: list[str]) -> Counts:
    host.step(call)
    launched.clear()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        host.step(call)
    events = [event for event in profile.events() if event.name.startswith("aten::")]
    ours = [e.name for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return Counts(list(launched), dict(Counter(ours)))
