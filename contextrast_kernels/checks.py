"""Checks of arguments. An error names the argument, what was expected, what was passed and what to do.

No check synchronises with the device.
"""

import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import pad

MAX_SIDE = 16384
"""The longest side of a map. Squared distances and their sums then fit into 32 bits."""
MAX_VOXELS = 2**31
"""The most voxels of a volume. Their indices then fit into 32 bits."""

WITHOUT_FLOAT64 = "Counts and distances need float64, which MPS does not have. Move it with .cpu()."
"""The reason why nothing runs on Apple's GPUs."""

_P = ParamSpec("_P")
_R = TypeVar("_R")

_WHOLE: Any = numbers.Integral | torch.SymInt
_REAL: Any = numbers.Real | torch.SymFloat | torch.SymInt
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *_WIDER)


def plain(value):
    """Unwrap a tensor subclass (MONAI's MetaTensor, torchvision's Mask, ...), also inside a list.

    Everything else is returned unchanged. So are subclasses with their own dispatch, such as FakeTensor and DTensor,
    which may not hold a single tensor. torch.compile cannot unwrap a subclass: convert it before the compiled
    function.
    """
    if torch.compiler.is_compiling():
        return value
    if isinstance(value, Tensor):
        kind = type(value)
        if kind is Tensor or kind is Parameter or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return value
        return value.as_subclass(Tensor)
    if isinstance(value, list | tuple) and any(plain(x) is not x for x in value):
        return list(map(plain, value))
    return value


def takes_subclasses(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a public function so that it gets plain tensors in place of tensor subclasses."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        plain_kwargs: Any = {name: plain(value) for name, value in kwargs.items()}
        return function(*map(plain, args), **plain_kwargs)

    return wrapper


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def describe(value) -> str:
    """Describe a value for an error message: dtype, shape and device of a tensor, else its type and value."""
    if isinstance(value, Tensor):
        return f"{name_of(value.dtype)} of shape {tuple(value.shape)} on {value.device}"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 and "\n" not in text else type(value).__name__


def is_integer(dtype: torch.dtype) -> bool:
    return dtype in _INTEGERS


def is_floating(dtype: torch.dtype) -> bool:
    return dtype in _FLOATS


def tensor(name: str, value, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__}. Pass a torch.Tensor.")


def signed(value: Tensor) -> Tensor:
    """Convert unsigned integers of more than 8 bits, which few PyTorch ops support, to a signed type.

    A number of 2**63 or more becomes negative, which is not a class.
    """
    return value.to(_WIDER[value.dtype]) if value.dtype in _WIDER else value


def has_float64(name: str, value: Tensor) -> None:
    if value.device.type == "mps":
        raise RuntimeError(
            f"{name}: expected a tensor on the CPU or a CUDA device, got {describe(value)}. {WITHOUT_FLOAT64}"
        )


def sides(name: str, value: Tensor, dims: int = 2) -> None:
    has_float64(name, value)
    size = value.shape[value.ndim - dims :]
    if any(side > MAX_SIDE for side in size):
        raise ValueError(
            f"{name}: expected sides of at most {MAX_SIDE} pixels, got {describe(value)}. Crop or downsample it."
        )
    if dims == 3 and math.prod(size) > MAX_VOXELS:
        raise ValueError(
            f"{name}: expected volumes of at most 2**31 voxels, got {describe(value)}. Crop or downsample it."
        )


def dims_of(predictions, labels, size=None) -> int:
    """The number of spatial axes of predictions and labels: 2 for maps, 3 for volumes.

    Logits decide by their number of axes. Without logits, labels or class maps decide, unless their shape is
    (B, 1, H, W), which can be either. Then the length of ``size`` decides, and without a size they are maps.
    """
    if isinstance(predictions, Tensor) and predictions.is_floating_point() and predictions.ndim in (4, 5):
        return predictions.ndim - 2
    for value in (labels, predictions):
        is_map = isinstance(value, Tensor) and value.ndim in (3, 4, 5) and not value.is_floating_point()
        if is_map and (value.ndim != 4 or value.shape[1] != 1):
            return 2 if value.ndim == 3 else 3
    return 3 if isinstance(size, tuple | list) and len(size) == 3 else 2


def feature_map(name: str, value) -> None:
    expected = "a floating-point feature map (B, D, h, w), or (B, D, z, h, w) of a volume"
    tensor(name, value, expected)
    if value.dtype not in _FLOATS:
        hint = "Take .real or .abs()." if value.is_complex() else "Call .float()."
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    if value.ndim not in (4, 5):
        hint = f"For one image pass {name}[None]." if value.ndim == 3 else "Reshape it."
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    if value.shape[1] == 0:
        raise ValueError(
            f"{name}: expected at least one channel, got {describe(value)}. Drop this layer from the list."
        )
    sides(name, value, value.ndim - 2)


def maps_alone(name: str, value: Tensor) -> None:
    if value.ndim != 4:
        raise ValueError(f"{name}: expected feature maps (B, D, h, w), got {describe(value)}. Pass planes as a batch.")


def class_map(name: str, value, *, shape: tuple | None = None, dims: int = 2) -> Tensor:
    """Check a map of class numbers (B, H, W), or (B, Z, H, W) with ``dims=3``.

    Returns the map without a channel axis of one, and in a signed type.
    """
    expected, channel = "an integer map (B, H, W)", "(B, 1, H, W)"
    if dims == 3:
        expected, channel = "an integer map (B, Z, H, W) of a volume", "(B, 1, Z, H, W)"
    tensor(name, value, expected)
    if value.dtype not in _INTEGERS:
        hint = "Take the argmax, or call .long()." if value.is_floating_point() else "Call .long()."
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    if value.ndim == dims + 2 and value.shape[1] == 1:
        value = value[:, 0]
    if value.ndim != dims + 1:
        hint = f"Add the batch axis, {name}[None]." if value.ndim == dims else "Pass class numbers, one for each pixel."
        if dims == 3 and value.ndim == 3:
            hint = "Pass a volume, because the features, logits or size are those of a volume."
        raise ValueError(f"{name}: expected {expected} or {channel}, got {describe(value)}. {hint}")
    sides(name, value, dims)
    if shape is not None and tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)}, got {describe(value)}. Pass a map of the same images at this size."
        )
    return signed(value)


def distances(name: str, value, shape: tuple) -> Tensor:
    """Check a map with one number per pixel; return it without a channel axis of one."""
    expected = f"integers or floats of shape {tuple(shape)}"
    hint = "Pass distances, such as those of edge_distance(classes, squared=True)."
    tensor(name, value, expected)
    if value.dtype not in _INTEGERS + _FLOATS:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    if value.ndim == len(shape) + 1 and value.shape[1] == 1:
        value = value[:, 0]
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    return value


def chosen(name: str, value, shape: tuple) -> Tensor:
    """Check the map that a sampler returned."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != shape:
        raise ValueError(
            f"{name}: expected it to return a bool map of shape {tuple(shape)}, got {describe(value)}. "
            "Return True at the sampled pixels and False at the others."
        )
    return value


def predictions(name: str, value, num_classes: int | None, dims: int = 2) -> Tensor:
    """Check a class map (B, H', W') of integers or logits (B, N, H', W') of floats; with ``dims=3`` those of volumes.

    Logits of one channel z for two classes are those of a binary network and become the two channels (0, z).
    """
    axes = "H', W'" if dims == 2 else "Z', H', W'"
    expected = f"a class map (B, {axes}) of integers or logits (B, N, {axes}) of floats"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected {expected}, got {type(value).__name__}. Pass a tensor, such as output['out']."
        )
    if value.dtype in _INTEGERS:
        return class_map(name, value, dims=dims)
    if value.dtype not in _FLOATS:
        hint = "Call .long() on a class map, .float() on logits."
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    if value.ndim != dims + 2:
        hint = f"Pass logits with a batch axis, a channel axis and {dims} spatial axes."
        if value.ndim == dims + 1:
            hint = "Call .long() on a class map; add the batch axis to logits of one image."
        raise ValueError(f"{name}: expected {expected}, got {describe(value)}. {hint}")
    sides(name, value, dims)
    if value.shape[1] == 1 and num_classes == 2:
        return pad(value, (*(0, 0) * dims, 1, 0))  # sigmoid(z) is the softmax of (0, z)
    if value.shape[1] < 2 or (num_classes is not None and value.shape[1] != num_classes):
        channels = "at least 2 channels" if num_classes is None else f"{num_classes} channels (num_classes)"
        remedy = "Pass the classifier's output"
        if value.shape[1] == 1:
            remedy += ", or num_classes=2 for a binary network with one channel"
        raise ValueError(f"{name}: expected logits with {channels}, got {describe(value)}. {remedy}.")
    return value


def logits(name: str, value, num_classes: int, dims: int = 2) -> Tensor:
    if isinstance(value, Tensor) and value.dtype in _INTEGERS:
        raise TypeError(
            f"{name}: expected logits (B, N, H', W') of floats, got {describe(value)}. Pass them before the argmax."
        )
    return predictions(name, value, num_classes, dims)


def soft_labels(name: str, value, shape: tuple) -> Tensor:
    """Check class probabilities for logits of this shape. For two classes that of class 1, (B, 1, H, W), is enough."""
    expected = f"floating-point class probabilities of shape {tuple(shape)}"
    tensor(name, value, expected)
    if value.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}. Pass class numbers as labels.")
    if value.ndim == len(shape) and value.shape[1] == 1 and shape[1] == 2:
        value = torch.cat([1 - value, value], 1)
    if value.shape != shape:
        raise ValueError(
            f"{name}: expected {expected}, one for each class and label, got {describe(value)}. "
            "Pass them at the size of the labels, with a channel for each class."
        )
    return value


def together(first_name: str, first: Tensor, name: str, value: Tensor, *, batch: bool = True) -> None:
    """Check that two arguments are on one device and, with ``batch``, that they have the same batch size."""
    if first.device != value.device:
        raise ValueError(
            f"{name}: expected a tensor on {first.device}, where {first_name} is, got {describe(value)}. Move it there."
        )
    if batch and first.shape[0] != value.shape[0]:
        raise ValueError(
            f"{name}: expected batch size {first.shape[0]}, that of {first_name}, got {describe(value)}. "
            "Pass maps of the same images."
        )


def samples_from(name: str, value: Tensor, *size: int) -> None:
    """Check that a map has pixels, unless the size that it is sampled to has none."""
    if math.prod(size) > 0 and math.prod(value.shape[value.ndim - len(size) :]) == 0:
        raise ValueError(f"{name}: expected a map with at least one pixel, got {describe(value)}. Pass a larger crop.")


def integer(name: str, value: Any, *, low: int | None = None, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, _WHOLE):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}. Pass an int.")
    if (low is not None and value < low) or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        fix = "Pass a larger one." if low is not None and value < low else "Pass a smaller one."
        raise ValueError(f"{name}: expected an integer {limits}, got {value}. {fix}")


def num_classes(value) -> None:
    integer("num_classes", value, low=1, high=2**31 - 1)


def several_classes(value) -> None:
    """Check the number of classes where classes are contrasted or scored: at least 2."""
    num_classes(value)
    if value == 1:
        raise ValueError(
            "num_classes: expected at least 2, got 1. A single class has nothing to be contrasted with. For a network "
            "with one output channel set num_classes=2: class 1 is where its logits (B, 1, H, W) are positive."
        )


def ignore_index(value) -> None:
    integer("ignore_index", value, low=-(2**63), high=2**63 - 1)


def size(name: str, value, dims: int = 2) -> None:
    if not isinstance(value, tuple | list) or len(value) != dims:
        expected = "a pair (height, width)" if dims == 2 else "three sides (depth, height, width) of a volume"
        raise TypeError(
            f"{name}: expected {expected}, got {describe(value)}. Pass a tuple, such as features.shape[2:]."
        )
    for side in value:
        integer(name, side, low=1, high=MAX_SIDE)


def real(name: str, value: Any, *, low: float, high: float = math.inf, open_low: bool = False) -> None:
    """Check that a number is finite and in [low, high], or in (low, high] with ``open_low``."""
    if isinstance(value, bool) or not isinstance(value, _REAL):
        raise TypeError(f"{name}: expected a number, got {describe(value)}. Pass a float or an int.")
    above = value > low if open_low else value >= low
    if not (above and value <= high and value < math.inf):
        bound = f"above {low:g}" if open_low else f"of at least {low:g}"
        bound += "" if high == math.inf else f" and at most {high:g}"
        fix = "Pass a fraction, not a percentage." if value > high == 1 else "Pass a number in this range."
        raise ValueError(f"{name}: expected a finite number {bound}, got {value}. {fix}")


def weights(name: str, value) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) == 0:
        raise TypeError(
            f"{name}: expected a list of numbers, one for each layer, got {describe(value)}. "
            "Pass one, such as (1.0, 0.7) for two layers."
        )
    for weight in value:
        real(name, weight, low=0.0)


def flag(name: str, value) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}. Pass a bool.")


def choice(name: str, value, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(
            f"{name}: expected one of {', '.join(map(repr, options))}, got {value!r}. Choose one of these."
        )


def seed(value, device: torch.device | None) -> None:
    if isinstance(value, Tensor):
        if value.dtype != torch.int64 or value.numel() != 1:
            raise TypeError(
                f"seed: expected an int or an int64 tensor of one element, got {describe(value)}. "
                "Pass one element, and call .long() on it."
            )
        if value.device != device:
            raise ValueError(
                f"seed: expected a tensor on {device}, where the maps are, got {describe(value)}. Move it there."
            )
        return
    integer("seed", value, low=-(2**63), high=2**63 - 1)
