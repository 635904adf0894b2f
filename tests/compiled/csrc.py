"""Runs the CUDA code of ``csrc/`` on the machine: its host code as compiled by nvcc, linked with ``runtime.cpp`` in the
place of CUDA's runtime, and its kernels from the PTX of the same compilation.

    gpu = Native(build(90))
    with gpu.on(tensors):                     # CPU tensors, all that the call reads
        native.edge_distance(classes, True)   # runs the CUDA code
    gpu.findings

Descriptors, tilings, grids, shared memory and the packing of arguments are those that a GPU would get.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from contextrast_kernels import native

from . import engine
from .checks import Finding

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = Path(__file__).with_name("runtime.cpp")
ARCHITECTURES = 80, 90, 100
SHARED_OF_BLOCK = {80: 166912, 90: 232448, 100: 232448}
"""Bytes of shared memory that a block may have, by architecture."""

POISON = 0xA5
MOST_GAPS = 4096
PIPED = {"capture_output": True, "text": True}
# -lineinfo: findings name lines of csrc. __SANITIZE_ADDRESS__: csrc/host.h says which bytes of scratch are nobody's.
FLAGS = (
    *("-std=c++17", "-lineinfo", "-cudart", "none", "-shared", "-Xcompiler", "-fPIC,-O0,-fvisibility=hidden"),
    *("-D__SANITIZE_ADDRESS__", "-I", str(ROOT / "csrc")),
)


def missing() -> str:
    """Why the CUDA code cannot run on the machine here, or an empty string."""
    if find_nvcc() is None:
        return "the CUDA kernels of csrc run on the machine from nvcc's PTX, and nvcc was not found"
    return engine.missing()


def find_nvcc() -> str | None:
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    places = [None, *(os.path.join(home, "bin") for home in (*homes, "/usr/local/cuda") if home)]
    return next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)


@dataclass(frozen=True)
class Built:
    library: Path
    ptx: dict[str, str]
    """The module's text by the name of its source file."""
    paths: dict[str, Path]
    """Where that text lies."""
    arch: int


def build(arch: int, sources: Iterable[Path] | None = None, folder: Path | None = None) -> Built:
    """Compile csrc/*.cu or other sources for an architecture, once for each text.

    folder: where results are kept; build/ptx of the project unless said otherwise.
    """
    sources = sorted((ROOT / "csrc").glob("*.cu")) if sources is None else list(sources)
    nvcc, folder = find_nvcc(), folder or ROOT / "build" / "ptx"
    read = [*sources, RUNTIME, *sorted((ROOT / "csrc").glob("*.*h"))]
    version = subprocess.run([nvcc, "--version"], check=True, **PIPED).stdout
    key = hashlib.sha256(b"\0".join([*(path.read_bytes() for path in read), repr((FLAGS, arch, version)).encode()]))
    target = folder / key.hexdigest()[:16]
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            kept, result = Path(scratch, "kept"), Path(scratch, "result")
            kept.mkdir()
            result.mkdir()
            code = f"-gencode=arch=compute_{arch},code=compute_{arch}"
            command = [nvcc, *FLAGS, code, "--threads", "2", "--keep", "--keep-dir", kept]
            done = subprocess.run([*command, *sources, RUNTIME, "-o", result / "library.so"], **PIPED)
            if done.returncode:
                raise RuntimeError(done.stderr)
            for source in sources:
                shutil.copy(kept / f"{source.stem}.ptx", result)
            with contextlib.suppress(OSError):  # another process was faster
                result.rename(target)
    ptx = {path.stem: path for path in target.glob("*.ptx")}
    return Built(target / "library.so", {name: path.read_text() for name, path in ptx.items()}, ptx, arch)


_Launch = ctypes.CFUNCTYPE(
    ctypes.c_int,
    *(ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint)),
    *(ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)),
)
_Memset = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


class Memory:
    """A tensor's bytes, first to last. ``undefined`` marks those that nobody has written, of a new tensor."""

    def __init__(self, tensor: Tensor, name: str, new: bool):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.tensor, self.name, self.new = tensor, name, new
        self.begin = tensor.data_ptr()
        self.end = self.begin + (last + 1) * tensor.element_size()
        self.undefined = np.ones(self.end - self.begin, np.uint8) if new else None
        if new:
            ctypes.memset(self.begin, POISON, self.end - self.begin)

    def extent(self, begin: int, end: int) -> engine.Extent:
        undefined = self.undefined[begin - self.begin : end - self.begin] if self.new else None
        grain = 1 if self.tensor.dtype == torch.uint8 else self.tensor.element_size()
        return engine.Extent(begin, end, undefined, grain, self.name)


def inputs(tensors: Iterable[Tensor]) -> list[Memory]:
    """The memory of the tensors. Tensors that share memory have one entry."""
    merged: list[Memory] = []
    all_of_them = [Memory(t, f"input {tuple(t.shape)}", False) for t in tensors if t.numel()]
    for memory in sorted(all_of_them, key=lambda memory: memory.begin):
        if merged and memory.begin < merged[-1].end:
            merged[-1].end = max(merged[-1].end, memory.end)
        else:
            merged.append(memory)
    return merged


@dataclass
class Launched:
    kernel: str
    grid: int
    block: int
    shared: int
    instructions: int


class Device:
    """A library of CUDA code, its memory and what its launches did."""

    def __init__(self, built: Built):
        self.built, self.schedule = built, engine.Schedule()
        self.mutate: Callable[[str, str], str] | None = None
        """(kernel, module) → the module that runs instead."""
        self.limit = 2**62
        """Instructions of warps, after which a launch is given up."""
        self.programs: dict[tuple[str, str], engine.Program] = {}
        self.findings: list[Finding] = []
        self.launches: list[Launched] = []
        self.memory: list[Memory] = []
        self.error: BaseException | None = None
        """What went wrong in a launch, and could not be raised through C."""
        self.library = library = ctypes.CDLL(str(built.library))
        self._callbacks = _Launch(self._launch), _Memset(self._memset)  # kept alive
        library.runtime_set(*self._callbacks, SHARED_OF_BLOCK[built.arch])
        library.runtime_gaps.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)

    def holds(self, memory: list[Memory], schedule: engine.Schedule) -> None:
        """What launches may touch from now on, and their order."""
        self.memory, self.schedule, self.error = memory, schedule, None

    # ------------------------------------------------------------------------------------- what runtime.cpp hands over

    def _kept(self, action) -> int:
        try:
            action()
            return 0
        except BaseException as error:
            self.error = error
            return 1

    def _memset(self, place, value, size) -> int:
        def action():
            [memory] = [m for m in self.memory if m.new and m.begin <= place and place + size <= m.end]
            ctypes.memset(place, value, size)
            memory.undefined[place - memory.begin : place - memory.begin + size] = 0

        return self._kept(action)

    def _launch(self, name, grid, block, shared, arguments) -> int:
        return self._kept(lambda: self._run(name.decode(), tuple(grid[:3]), tuple(block[:3]), shared, arguments))

    def _program(self, name: str) -> engine.Program:
        [text] = [text for text in self.built.ptx.values() if f".entry {name}(" in text]
        text = self.mutate(name, text) if self.mutate else text
        if (name, text) not in self.programs:
            self.programs[name, text] = engine.Program(text, name)
        return self.programs[name, text]

    def _run(self, name, grid, block, shared, arguments):
        program = self._program(name)
        packed = bytearray(program.kernel.parameter_bytes)
        for parameter, argument in zip(program.kernel.parameters, arguments[: len(program.kernel.parameters)]):
            packed[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(argument, parameter.size)
        result = program.run(
            arch=self.built.arch, grid=grid, block=block, shared=shared, parameters=bytes(packed),
            extents=self._extents(), schedule=self.schedule, limit=self.limit,
        )  # fmt: skip
        self.findings += result.findings
        instructions = sum(row["warps"] for row in result.counts)
        self.launches.append(Launched(name, grid[0] * grid[1] * grid[2], block[0], shared, instructions))

    def _extents(self) -> list[engine.Extent]:
        """Scratch comes in pieces, with gaps between them that nobody may touch."""
        pairs, extents = (ctypes.c_void_p * (2 * MOST_GAPS))(), []
        for memory in self.memory:
            count, begin = self.library.runtime_gaps(memory.begin, memory.end, pairs, MOST_GAPS), memory.begin
            gaps = [(pairs[2 * k], pairs[2 * k + 1]) for k in range(count)]
            for gap, after in [*sorted(gaps), (memory.end, memory.end)]:
                if begin < gap:
                    extents.append(memory.extent(begin, gap))
                begin = after
        return extents


class Native(Device):
    """csrc's CUDA code in the place of its CPU code: native's ops on CPU tensors run it inside ``with gpu.on(...)``."""

    def __init__(self, built: Built):
        super().__init__(built)
        self.index = 0
        """The device that is asked for; there is one, 0."""
        for name, arguments in native._ARGUMENTS.items():
            function = getattr(self.library, f"contextrast_{name}_cuda")
            function.argtypes = (*arguments, ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
        for name, arguments in native._SCRATCH_ARGUMENTS.items():
            function = getattr(self.library, f"contextrast_{name}_scratch_cuda")
            function.argtypes, function.restype = arguments, ctypes.c_int64

    @contextlib.contextmanager
    def on(self, tensors: Iterable[Tensor], schedule: engine.Schedule = engine.Schedule()):  # noqa: B008 - it is frozen
        """tensors: what the calls inside may read. What they allocate starts as poison."""
        self.holds(inputs(tensors), schedule)

        def watched(allocate):
            def function(*arguments, **keywords):
                tensor = allocate(*arguments, **keywords)
                if tensor.numel():
                    self.memory.append(Memory(tensor, f"allocation {len(self.memory)}", True))
                return tensor

            return function

        with (
            mock.patch.object(native, "_function", self._function),
            mock.patch.object(torch, "empty", watched(torch.empty)),
            mock.patch.object(Tensor, "new_empty", watched(Tensor.new_empty)),
        ):
            try:
                yield self
            finally:
                if self.error:
                    raise self.error

    def _function(self, name: str, device: torch.device):
        function = getattr(self.library, f"contextrast_{name}_cuda")
        if name.endswith("_scratch"):
            return lambda *arguments: function(*arguments[:-1])
        return lambda *arguments: function(*arguments[:-2], self.index, None, arguments[-1])

    def unwritten(self, results: Iterable[Tensor]) -> list[str]:
        """The results that were allocated inside of the last ``on`` and have bytes that nobody wrote."""
        places = {tensor.data_ptr() for tensor in results}
        return [m.name for m in self.memory if m.new and m.begin in places and m.undefined.any()]
