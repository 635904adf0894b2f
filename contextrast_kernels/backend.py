"""Choose the implementation of an op: by the device of its tensors, or as the caller demands.

reference
    plain PyTorch, on any device; the result that all others are compared with
triton
    fused kernels of the losses
native
    the compiled library of csrc/: error map, edge distance, distance transform, selection
auto
    the fastest backend that can run on the tensor's device
"""

import contextlib
import contextvars
import functools
import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from contextrast_kernels import maps, native

_P = ParamSpec("_P")
_R = TypeVar("_R")
_First = TypeVar("_First", bound="Tensor | tuple")
CHOICES = ("auto", "reference", "triton", "native")

MOST_CLASSES, MOST_CHANNELS = 256, 1024
"""The most classes and channels that the Triton kernels support."""

AMD = torch.version.hip is not None
"""PyTorch built for ROCm calls AMD GPUs "cuda" too."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("contextrast_kernels.backend", default=None)


class _Traced(threading.local):
    """The backend that a function traced by torch.compile forces.

    Dynamo lets a traced function set this attribute, and guards on it. It cannot set a ContextVar.
    """

    def __init__(self) -> None:
        self.forced: str | None = None


_traced = _Traced()

_DYNAMO_READS_CONTEXT = torch.__version__ >= "2.14"
"""Whether a traced function can read a ContextVar. Where it cannot, ``_traced`` also has the backend forced outside,
and tasks of asyncio that share a thread share it in compiled code."""


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend for the ops that have it, inside the ``with`` block.

    Ops that do not have it choose as "auto" does: the fastest that can run. The choice holds for the current thread or
    asyncio task only. Outside any block the environment variable CONTEXTRAST_BACKEND decides; it is read at each call.

    Args:
        name: "auto", "reference", "triton" or "native".

    Raises:
        ValueError: ``name`` is not one of these.
        RuntimeError: from an op inside the block, if the backend has the op but cannot run on the given tensors.
    """
    if name not in CHOICES:
        raise ValueError(
            f"backend: expected one of {', '.join(map(repr, CHOICES))}, got {name!r}. "
            "Use backend('auto') for the fastest that can run."
        )
    if torch.compiler.is_compiling():
        previous, _traced.forced = _traced.forced, name
        try:
            yield
        finally:
            _traced.forced = previous
        return
    token = _forced.set(name)
    _show_to_dynamo()
    try:
        yield
    finally:
        _forced.reset(token)
        _show_to_dynamo()


def _show_to_dynamo() -> None:
    if not _DYNAMO_READS_CONTEXT:
        _traced.forced = _forced.get()


def _requested() -> str:
    compiling = torch.compiler.is_compiling()
    forced = _traced.forced if compiling else None
    if forced is None and (_DYNAMO_READS_CONTEXT or not compiling):
        forced = _forced.get()
    name = forced if forced is not None else os.environ.get("CONTEXTRAST_BACKEND", "auto")
    if name not in CHOICES:
        raise ValueError(
            f"CONTEXTRAST_BACKEND: expected one of {', '.join(map(repr, CHOICES))}, got {name!r}. Correct or unset it."
        )
    return name


def _native_status(device_type: str) -> str:
    return native.status(device_type)


# What torch.compiler.assume_constant_result does, without its import of the whole compiler (and Triton): whether the
# library opens does not change within a process, and torch.compile need not look into how.
_native_status._dynamo_marked_constant = True  # type: ignore[attr-defined]  # Dynamo reads the mark


def _triton_status(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. Install it: pip install triton"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return (
            "Triton's kernels need a CUDA device. To run them slowly on the CPU, as the tests do, set "
            "TRITON_INTERPRET=1 before Python starts"
        )
    return "ok" if device_type in ("cpu", "cuda") else f"Triton's kernels are written for CUDA, not for {device_type}"


_triton_status._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as above


def _status(name: str, device_type: str) -> str:
    """Why backend ``name`` cannot run on this kind of device, or "ok"."""
    return {"native": _native_status, "triton": _triton_status}[name](device_type)


def available() -> dict[str, str]:
    """Each backend's state on this machine: "ok", or the reason why it cannot run here.

    On an AMD GPU "triton" says that its kernels are compiled for it and have never been run: "auto" takes the
    reference there, and ``backend("triton")`` runs them.
    """
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    triton = _status("triton", device_type)
    return {
        "reference": "ok",
        "triton": untried_on_amd() if triton == "ok" and device_type == "cuda" and AMD else triton,
        "native": _status("native", device_type),
    }


def untried_on_amd() -> str:
    return (
        "Triton's kernels compile for AMD GPUs but have never been run on one. "
        "Run them with backend('triton'), and check their results with python -m contextrast_kernels doctor"
    )


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def _slower(name: str, status: str) -> str:
    of = "error maps, distances and negatives" if name == "native" else "the losses"
    return (
        f"contextrast_kernels: the {name} backend cannot run, so a slower one is used for {of}: {status}. "
        "CONTEXTRAST_BACKEND=reference silences this warning."
    )


def warn_if_not_built() -> None:
    """Say at the import that pip built no native library, which pip itself says only with -v."""
    if not native.is_built() and os.environ.get("CONTEXTRAST_BACKEND") != "reference":
        _warn_once(_slower("native", _native_status("cpu")))


def _transform(name: str) -> str:
    """The reason why a backend cannot run inside the active transforms of torch.func, or ""."""
    if name != "triton" or torch.compiler.is_compiling():
        return ""
    functorch = torch._C._functorch
    differentiating = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    if not any(level.key() in differentiating for level in functorch.get_interpreter_stack() or ()):
        return ""
    return "torch.func can map its kernels over samples, but not differentiate them"


def choose(tensor: Tensor, offered: tuple[str, ...], unfit: str = "") -> str:
    """Choose the backend that runs an op on ``tensor``.

    Args:
        tensor: the argument whose device decides.
        offered: the fast backends that have the op, best first.
        unfit: the reason why they cannot take these arguments, or "".
    """
    device_type = tensor.device.type
    name = _requested()
    if name == "reference":
        return name
    if name in offered:
        status = unfit or _transform(name) or _status(name, device_type)
        if status != "ok":
            raise RuntimeError(
                f"backend: expected one that can run this on {device_type} tensors, got {name!r}: {status}. "
                "Use backend('auto') or backend('reference')."
            )
        return name
    for candidate in offered:
        if candidate == "triton" and device_type == "cpu":
            continue  # the interpreter is for tests and runs only on request
        status = unfit or _transform(candidate) or _status(candidate, device_type)
        if status == "ok" and candidate == "triton" and AMD:
            status = untried_on_amd()
        if status == "ok":
            return candidate
        if device_type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            _warn_once(_slower(candidate, status))
    return "reference"


def choose_kernels(features: Sequence[Tensor], num_classes: int) -> str:
    """Choose the backend of a loss. Its Triton kernels take a limited number of classes and channels, and only volumes
    that can be viewed as rows with one stride."""
    unfit, first = "", features[0]
    if num_classes > MOST_CLASSES or first.shape[1] > MOST_CHANNELS:
        unfit = (
            f"its kernels take at most {MOST_CLASSES} classes and {MOST_CHANNELS} channels, "
            f"got {num_classes} and {first.shape[1]}"
        )
    for x in features:
        if maps.plane_stack(x) is None:
            unfit = (
                "its kernels read a volume as rows with one stride, as in contiguous and "
                f"channels_last_3d memory, got strides {x.stride()} for the shape {tuple(x.shape)}. "
                "Call .contiguous() on the features"
            )
    return choose(first, ("triton",), unfit)


def empty_codes(features: list[Tensor], num_classes: int, dtype: torch.dtype | None = None) -> Tensor:
    """An empty map with one number per pixel of all layers, which the Triton kernels keep for the backward pass.

    Its dtype is that of label codes unless one is given.
    """
    pixels = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in features)
    return features[0].new_empty(pixels, dtype=dtype or native.code_dtype(num_classes))


def may_read_values(tensor: Tensor) -> bool:
    """Whether a value of ``tensor`` may decide a shape: True for eager CPU code, where reading it costs nothing.

    On a device a read synchronises, and whatever traces or batches a call needs shapes that no value decides.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False  # ranks exchange rows, whose number must be the same in all of them
    return tensor.device.type == "cpu" and is_eager([tensor])


def is_eager(tensors: Sequence[Tensor]) -> bool:
    """Whether plain PyTorch runs the ops on these tensors: nothing traces, transforms or watches them."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0  # a dispatch mode traces or counts the ops
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
        and all(type(x) is Tensor or type(x) is Parameter for x in tensors)  # a fake tensor holds no values
    )


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context manager that makes the tensor's device the current one, so that kernels are launched there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def differentiable_once(name: str, backward_op) -> None:
    """Make double backward of ``name`` raise a clear error; ``backward_op`` computes its gradient."""

    def refuse(ctx, *_):
        raise RuntimeError(
            f"{name}: the fused kernels do not support double backward. Call it under ``with backend('reference'):``."
        )

    backward_op.register_autograd(refuse)


def unchanged_by_autocast(
    function: Callable[Concatenate[_First, _P], _R],
) -> Callable[Concatenate[_First, _P], _R]:
    """Decorate a function that chooses its own precision: turn autocast off inside.

    Its first argument is a tensor, or a tuple that begins with one.
    """

    @functools.wraps(function)
    def wrapper(first: _First, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        device_type = (first if isinstance(first, Tensor) else first[0]).device.type
        if device_type == "meta":  # torch.autocast refuses it
            return function(first, *args, **kwargs)
        with torch.autocast(device_type, enabled=False):
            return function(first, *args, **kwargs)

    return wrapper
