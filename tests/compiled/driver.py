"""A Triton driver whose launches run on the CPU, from the PTX that Triton compiled for a GPU.

    with emulated(arch=90) as gpu:
        loss = ck.contextrast_loss(...)     # CPU tensors
    assert not gpu.faults()

Everything before the launch is Triton's own: binding and specialisation of arguments, the kernel cache, the compiler
down to PTX. Parameters are packed here by the rules of triton/backends/nvidia/driver.c and compared with the parameters
that the PTX declares. A device's number follows from its architecture, so that each architecture has its own kernel
cache, which lives as long as the process, as in a training.
"""

import contextlib
import functools
import importlib.util
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from contextrast_kernels.backend import backend

from . import engine, reader
from .checks import Finding, faults

SHARED_OF_BLOCK = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that a block may have."""


def missing() -> str:
    """Why Triton's kernels cannot run here, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        from triton import knobs
        from triton.backends.compiler import GPUTarget  # noqa: F401
        from triton.compiler.compiler import CompiledKernel
        from triton.runtime.driver import driver
    except ImportError as error:
        return f"this Triton has another driver interface: {error}"
    if knobs.runtime.interpret:
        return "TRITON_INTERPRET is set, so that kernels are interpreted; run tests/compiled with TRITON_INTERPRET=0"
    if not hasattr(CompiledKernel, "_init_handles") or not hasattr(driver, "_active"):
        return "this Triton has another driver interface: no CompiledKernel._init_handles or driver._active"
    return engine.missing()


# -------------------------------------------------------------------------------------------------- memory of tensors


class Poison:
    """Tensors from ``torch.empty`` and its like: filled with NaN or a number that codes and counts do not take, with a
    mark for each byte that was never written."""

    def __init__(self):
        self.known: dict[int, tuple[Tensor, np.ndarray, int]] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        if type(tensor) is not Tensor:  # a fake tensor holds no memory
            return tensor
        size = tensor.untyped_storage().nbytes()
        if tensor.device.type == "cpu" and size:
            byte = 0xFF if tensor.is_floating_point() else 0xA5
            memory(tensor)[:] = byte
            # Kept alive, so that no other tensor gets the address.
            self.known[tensor.untyped_storage().data_ptr()] = tensor, np.ones(size, np.uint8), byte
        return tensor

    def marks(self, tensor: Tensor) -> np.ndarray | None:
        """The undefined bytes of a tensor's storage. An element is defined once the host has changed it."""
        if tensor.untyped_storage().data_ptr() not in self.known:
            return None
        made, marks, byte = self.known[tensor.untyped_storage().data_ptr()]
        size = made.element_size()
        marks &= np.repeat((memory(made).reshape(-1, size) == byte).all(1), size)
        return marks

    def wrap(self, function: Callable) -> Callable:
        return functools.wraps(function)(lambda *args, **kwargs: self(function(*args, **kwargs)))


def memory(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's storage."""
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def extents(tensors: list[tuple[str, Tensor]], poison: Poison) -> list[engine.Extent]:
    """What the launch may touch: from the first to the last element of each tensor, merged where they overlap."""
    spans = []
    for name, tensor in tensors:
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            begin = tensor.data_ptr()
            spans.append((begin, begin + (last + 1) * tensor.element_size(), name, tensor))
    merged: list[engine.Extent] = []
    for begin, end, name, tensor in sorted(spans, key=lambda span: span[:2]):
        if merged and begin < merged[-1].end:
            known = merged[-1]
            known.grain = min(known.grain, tensor.element_size())
            if end <= known.end:
                continue
            known.end, known.name = end, f"{known.name} and {name}"
        else:
            known = engine.Extent(begin, end, grain=tensor.element_size())
            known.name = f"{name}: {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            merged.append(known)
        marks = poison.marks(tensor)
        if marks is not None:
            first = known.begin - tensor.untyped_storage().data_ptr()
            known.undefined = marks[first : first + known.end - known.begin]
    return merged


# ----------------------------------------------------------------------------------------------------------- arguments

FORMATS = {
    "i1": "<b", "u1": "<B", "i8": "<b", "u8": "<B", "i16": "<h", "u16": "<H", "i32": "<i", "u32": "<I",
    "i64": "<q", "u64": "<Q", "fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d",
}  # fmt: skip


class Mispacked(AssertionError):
    """The arguments are not those that the PTX declares."""


def flatten(signature, arguments, name: str = "") -> Iterator[tuple[str, object, str]]:
    """(type, value, name) of everything that is no constant."""
    for k, (kind, value) in enumerate(zip(signature, arguments, strict=True)):
        if isinstance(kind, tuple):
            yield from flatten(kind, value, f"{name}{k}.")
        elif kind != "constexpr":
            yield kind, value, f"{name}{k}"


def pack(kernel: reader.Kernel, arguments: list[tuple[str, object, str]]) -> bytes:
    """The parameters as the driver lays them out, each of the declared size and kind."""
    if len(arguments) != len(kernel.parameters):
        raise Mispacked(f"{kernel.name}: {len(arguments)} arguments for {len(kernel.parameters)} parameters")
    packed = bytearray(kernel.parameter_bytes)
    for (kind, value, name), parameter in zip(arguments, kernel.parameters):
        pointer = kind[0] == "*"
        if pointer:
            address = 0 if value is None else value.data_ptr() if isinstance(value, Tensor) else value
            data = struct.pack("<Q", address)
        else:
            data = struct.pack(FORMATS[kind], value)  # raises where the number does not fit
        if len(data) != parameter.size or pointer != parameter.pointer:
            raise Mispacked(f"{kernel.name}: argument {name} is {kind}, the parameter {parameter}")
        packed[parameter.offset : parameter.offset + parameter.size] = data
    return bytes(packed)


# -------------------------------------------------------------------------------------------------------------- driver


@dataclass
class Launched:
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    program: engine.Program
    result: engine.Result
    cubin: bytes


@dataclass
class GPU:
    """The active driver, and what its launches gave."""

    arch: int
    schedule: engine.Schedule
    l1_share: Callable[["Launcher"], int] | None = None
    """From a launch to the bytes of L1 cache that a block has. Where it is given, memory requests are counted."""
    mutate: Callable[[str, str], str] | None = None
    """From a kernel's name and its PTX to the PTX that runs: a planted fault."""
    machine_code: bool = False
    launches: list[Launched] = field(default_factory=list)
    poison: Poison = field(default_factory=Poison)
    compile_seconds: float = 0.0
    compiled_kernels: int = 0

    def compiled(self, *, times, cache_hit: bool, **_) -> None:
        """Triton's listener, called for each kernel that was compiled or read from its cache on disk."""
        if not cache_hit:
            self.compile_seconds += times.total / 1e6
            self.compiled_kernels += 1

    def findings(self) -> list[Finding]:
        return [finding for launched in self.launches for finding in launched.result.findings]

    def faults(self) -> list[Finding]:
        return faults(self.findings())

    def launch(self, launcher: "Launcher", grid: tuple[int, int, int], arguments) -> None:
        metadata, ptx = launcher.metadata, launcher.ptx
        if self.mutate:
            ptx = self.mutate(metadata.name, ptx)
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise reader.Unknown(f"{metadata.name}: scratch memory in global memory")
        program = program_of(ptx)
        block = (32 * metadata.num_warps, 1, 1)
        if program.kernel.threads != block:
            raise Mispacked(f"{metadata.name}: {block} threads are launched, the PTX asks for {program.kernel.threads}")
        values = list(flatten(launcher.source.signature.values(), arguments))
        tensors = [(f"argument {name}", value) for _, value, name in values if isinstance(value, Tensor)]
        scratch = [("*i8", None, "scratch"), ("*i8", None, "profile")]
        result = program.run(
            arch=self.arch,
            grid=grid,
            block=block,
            parameters=pack(program.kernel, [*values, *scratch]),
            extents=extents(tensors, self.poison),
            shared=metadata.shared,
            schedule=self.schedule,
            count_memory=self.l1_share is not None,
            l1_bytes=self.l1_share(launcher) if self.l1_share else 0,
        )
        self.launches.append(
            Launched(metadata.name, grid, metadata.num_warps, metadata.shared, program, result, launcher.cubin)
        )

    # What Triton asks of a driver.

    @property
    def utils(self):
        return self

    @property
    def launcher_cls(self):
        return Launcher

    def get_current_device(self) -> int:
        return self.arch + 1000 * self.machine_code

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_device_properties(self, device: int) -> dict:
        return {"max_shared_mem": SHARED_OF_BLOCK[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def load_binary(self, name, cubin, shared, device):
        return 1, name, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module) -> None:
        pass


class Launcher:
    """Launch one compiled kernel; ``with_texts`` gives it the PTX."""

    def __init__(self, source, metadata):
        self.source, self.metadata = source, metadata

    def __call__(self, x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
        from triton.runtime.driver import driver

        driver.active.launch(self, (x, y, z), arguments)


@functools.cache
def program_of(ptx: str) -> engine.Program:
    return engine.Program(ptx)


def with_texts(init_handles: Callable) -> Callable:
    def init(kernel):
        new = kernel.module is None
        init_handles(kernel)
        if new:
            kernel._run.ptx, kernel._run.cubin = kernel.asm["ptx"], kernel.asm["cubin"]

    return init


def separated(zeros: Callable) -> Callable:
    """Accumulators of which each has memory of its own, so that no overrun of one lands in the next."""

    def made(*args, **kwargs):
        return type(sums := zeros(*args, **kwargs))(*(None if t is None else torch.zeros_like(t) for t in sums))

    return made


@contextlib.contextmanager
def emulated(
    arch: int = 90,
    schedule: engine.Schedule = engine.IN_ORDER,
    *,
    l1_share: Callable[[Launcher], int] | None = None,
    mutate: Callable[[str, str], str] | None = None,
    machine_code: bool = False,
) -> Iterator[GPU]:
    """Inside the block the package's Triton kernels run on CPU tensors, from their PTX, and ``torch.empty`` gives
    memory whose undefined bytes are known. machine_code: ptxas compiles the PTX, too."""
    from triton import knobs
    from triton.backends import backends
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime.driver import driver

    from contextrast_kernels.kernels import _sums, anchors, contextrast, pixel_anchor

    gpu = GPU(arch, schedule, l1_share, mutate, machine_code)
    compiler = backends["nvidia"].compiler
    compiler_hash = compiler.hash
    patches = [
        mock.patch.object(driver, "_active", gpu),
        mock.patch.object(knobs.compilation, "listener", gpu.compiled),
        mock.patch.object(CompiledKernel, "_init_handles", with_texts(CompiledKernel._init_handles)),
        mock.patch.object(importlib.import_module(backend.__module__), "_triton_status", lambda device_type: "ok"),
        backend("triton"),
    ]
    for place, names in ((torch, ("empty", "empty_like", "empty_strided")), (Tensor, ("new_empty",))):
        patches += [mock.patch.object(place, name, gpu.poison.wrap(getattr(place, name))) for name in names]
    if not machine_code:
        # In Triton's cache such kernels have keys of their own.
        patches += [
            mock.patch.object(compiler, "make_cubin", lambda self, ptx, *_: b""),
            mock.patch.object(compiler, "hash", lambda self: f"{compiler_hash(self)}-ptx"),
        ]
    zeros = separated(_sums.zeros)
    patches += [mock.patch.object(module, "zeros", zeros) for module in (anchors, contextrast, pixel_anchor)]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield gpu
