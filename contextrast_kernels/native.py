"""The native library of csrc/: opened on first use, with one op for each function it exports.

``native.edge_distance`` is the op ``contextrast::edge_distance``, and so on. The ops take CPU and CUDA tensors of any
strides without a copy and are not differentiable. csrc/contextrast.h documents the functions; their callers in
distance.py and bane.py check the arguments.
"""

import contextlib
import ctypes
import functools
import math
import pathlib
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from contextrast_kernels.loops import one_call_per_sample

_PATH = pathlib.Path(__file__).with_name("_native.so")
_ERROR_SIZE = 256
_INTERFACE = 4
_TYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_TYPE_CODES = {dtype: code for code, dtype in enumerate(_TYPES)} | {torch.bool: _TYPES.index(torch.uint8)}
BANE_ENQUEUES = ("memset", "find_errors", "mark", "solve", "place", "choose")
"""The launches of one CUDA call of bane_negatives or bane_codes, with "bane" at "layer"."""

MOST_CLASSES, MOST_LAYERS = 2**20, 16
"""The most classes of a selection, and the most layers of one call of bane_negatives or bane_codes."""

_NEGATIVES = ("bane", "semi-hard")
_DISTANCE_AT = ("layer", "full")


class _Map(ctypes.Structure):
    """ContextrastMap: pointer, sizes, strides and type of a tensor (B, H, W) or (B, N, H, W)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("stride_batch", "stride_channel", "stride_row", "stride_column")),
        ("type", ctypes.c_int32),
    )

    def __init__(self, tensor: Tensor):
        channels, stride_channel = (tensor.shape[1], tensor.stride(1)) if tensor.ndim == 4 else (0, 0)
        super().__init__(
            *(tensor.data_ptr(), tensor.shape[0], channels, *tensor.shape[-2:]),
            *(tensor.stride(0), stride_channel, *tensor.stride()[-2:], _TYPE_CODES[tensor.dtype]),
        )


class _Volume(ctypes.Structure):
    """ContextrastVolume: pointer, sizes, strides and type of a tensor (B, W), (B, H, W) or (B, Z, H, W)."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64 * 3),
        ("stride_batch", ctypes.c_int64),
        ("stride", ctypes.c_int64 * 3),
        ("type", ctypes.c_int32),
    )

    def __init__(self, tensor: Tensor):
        missing = 4 - tensor.ndim
        size, stride = (1,) * missing + tensor.shape[1:], (0,) * missing + tensor.stride()[1:]
        batch = (tensor.shape[0], size, tensor.stride(0), stride)
        super().__init__(tensor.data_ptr(), *batch, _TYPE_CODES[tensor.dtype])


class _Distance(ctypes.Structure):
    """ContextrastDistance: the options and outputs of a distance transform. indices: None, or (axes, B, ...)."""

    _fields_ = (
        ("sampling", ctypes.c_double * 3),
        ("sampled", ctypes.c_int32),
        ("squared", ctypes.c_int32),
        ("distance", ctypes.c_void_p),
        ("nearest", ctypes.c_void_p * 3),
    )

    def __init__(self, sampling: Sequence[float] | None, squared: bool, distance: Tensor, indices: Tensor | None):
        missing = 4 - distance.ndim
        sides = (1.0,) * 3 if sampling is None else (1.0,) * missing + tuple(sampling)
        axes = () if indices is None else (axis.data_ptr() for axis in indices)
        nearest = (None,) * 3 if indices is None else (*(None,) * missing, *axes)
        super().__init__(sides, sampling is not None, squared, distance.data_ptr(), nearest)


class _Layer(ctypes.Structure):
    """ContextrastLayer: a layer's size and the output for its negatives."""

    _fields_ = (("height", ctypes.c_int64), ("width", ctypes.c_int64), ("negatives", ctypes.c_void_p))


_MAP, _LAYERS = ctypes.POINTER(_Map), ctypes.POINTER(_Layer)
_VOLUME, _DISTANCE = ctypes.POINTER(_Volume), ctypes.POINTER(_Distance)
_POINTER, _INT64, _INT, _DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
# Argument types that the CPU and the CUDA version of a function share, and those of its scratch functions.
_ARGUMENTS = {
    "error_map": (_MAP, _MAP, _INT64, _INT64, _POINTER),
    "edge_distance": (_VOLUME, _DISTANCE, _POINTER),
    "distance_transform": (_VOLUME, _DISTANCE, _POINTER),
    "select_nearest": (_MAP, _MAP, _DOUBLE, _INT64, _POINTER, _POINTER, _POINTER),
    "bane_negatives": (
        *(_MAP, _MAP, _INT64, _INT64, _LAYERS, _INT, _INT, _POINTER),
        *(_DOUBLE, _INT, _INT, _POINTER, _POINTER),
    ),
}
_SCRATCH_ARGUMENTS = {
    "distance": (_VOLUME, _DISTANCE, _INT),
    "select_nearest": (_INT64, _INT64, _INT64, _INT64),
    "bane_negatives": (_MAP, _INT64, _LAYERS, _INT, _INT, _INT),
}


def is_built() -> bool:
    """Whether the library's file exists. It is not opened."""
    return _PATH.exists()


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The opened library, or the reason why it cannot be opened."""
    if not is_built():
        for folder in sys.path:
            if pathlib.Path(folder, _PATH.parent.name, _PATH.name).exists():
                return (
                    f"Python imported contextrast_kernels from {_PATH.parent.parent}, which hides the one installed in "
                    f"{folder}: start Python in another folder"
                )
        return (
            "the native library is not built: install a C++17 compiler and reinstall contextrast_kernels with "
            "CONTEXTRAST_NATIVE=1, which says what is missing"
        )
    try:
        library = ctypes.CDLL(str(_PATH))
        if not hasattr(library, "contextrast_interface") or library.contextrast_interface() != _INTERFACE:
            return (
                f"the native library {_PATH.name} was built from another version of csrc/: "
                "reinstall contextrast_kernels with CONTEXTRAST_NATIVE=1"
            )
        for device in "cpu", "cuda":
            if not hasattr(library, f"contextrast_error_map_{device}"):
                continue  # built without nvcc
            for name, arguments in _ARGUMENTS.items():
                where = (_INT,) if device == "cpu" else (_INT, _POINTER)
                getattr(library, f"contextrast_{name}_{device}").argtypes = (*arguments, *where, ctypes.c_char_p)
            for name, arguments in _SCRATCH_ARGUMENTS.items():
                scratch = getattr(library, f"contextrast_{name}_scratch_{device}")
                scratch.argtypes, scratch.restype = (*arguments, _INT) if device == "cpu" else arguments, _INT64
    except (OSError, AttributeError) as error:
        return f"the native library {_PATH.name} cannot be opened ({error}): reinstall contextrast_kernels"
    return library


@functools.cache
def status(device_type: str) -> str:
    """ "ok", or the reason why the library cannot serve tensors on "cpu" or "cuda"."""
    library = _library()
    if isinstance(library, str):
        return library
    if device_type == "cpu":
        return "ok"  # do not touch CUDA here: a data loader's worker must not initialise it
    if device_type != "cuda":
        return f"the native library has no code for {device_type} tensors"
    if not hasattr(library, "contextrast_cuda_status"):
        return "the native library was built without CUDA: put nvcc on PATH and reinstall contextrast_kernels"
    if not torch.cuda.is_available():
        return "no CUDA device: torch.cuda.is_available() is False"
    for device in range(torch.cuda.device_count()):
        text = ctypes.create_string_buffer(_ERROR_SIZE)
        if library.contextrast_cuda_status(device, text):
            return text.value.decode(errors="replace")
    return "ok"


def _function(name: str, device: torch.device):
    library = _library()
    if isinstance(library, str) or not hasattr(library, f"contextrast_{name}_{device.type}"):
        raise RuntimeError(
            f"backend: expected a native library for {device.type} tensors, got none: {status(device.type)}. "
            "Use backend('reference')."
        )
    return getattr(library, f"contextrast_{name}_{device.type}")


def _call(name: str, device: torch.device, arguments: tuple, scratch: tuple = ()) -> None:
    """Call a function of the library with torch's number of threads, or on the current stream.

    scratch: the name and arguments of the function that returns the scratch size, if scratch memory is needed.
    """
    where: tuple[int, ...] = (torch.get_num_threads(),)
    on_device: contextlib.AbstractContextManager = contextlib.nullcontext()
    if device.type == "cuda":
        where, on_device = (device.index, torch.cuda.current_stream(device).cuda_stream), torch.cuda.device(device)
    if scratch:
        scratch_name, *scratch_arguments = scratch
        threads = where if device.type == "cpu" else ()
        size = _function(f"{scratch_name}_scratch", device)(*scratch_arguments, *threads)
        # On CUDA the allocator reuses this memory only for later work on the same stream.
        memory = torch.empty(size, dtype=torch.uint8, device=device)
        arguments = (*arguments, memory.data_ptr())
    text = ctypes.create_string_buffer(_ERROR_SIZE)
    with on_device:
        code = _function(name, device)(*arguments, *where, text)
    if code:
        message = text.value.decode(errors="replace")
        raise ValueError(message) if code == 1 else RuntimeError(f"{name}: {message}.")


def _device(**tensors: Tensor) -> torch.device:
    """The common device of the tensors. A pointer to another device's memory would be read as if it were local."""
    (first, tensor), *others = tensors.items()
    for name, other in others:
        if other.device != tensor.device:
            raise ValueError(
                f"{name}: expected a tensor on {tensor.device}, where {first} is, got one on {other.device}. "
                "Move it there."
            )
    return tensor.device


@torch.library.custom_op("contextrast::error_map", mutates_args=())
def error_map(predictions: Tensor, labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """predictions (B, H', W') integers or (B, N, H', W') floats, labels (B, H, W) → int32 (B, H, W), -1 = no error.
    Volumes have an axis Z before H.

    num_classes -1: the channels of the logits, or every value >= 0.
    """
    device = _device(labels=labels, predictions=predictions)
    errors = torch.empty(labels.shape, dtype=torch.int32, device=device)
    pairs = [(predictions, labels, errors)]
    if labels.ndim == 4:  # errors do not depend on neighbours, so a volume is a batch of its planes
        pairs = [(_planes(p, y.shape[0]), y, e) for p, y, e in zip(predictions, labels, errors, strict=True)]
    for predicted, labelled, into in pairs:
        arguments = (_Map(predicted), _Map(labelled), num_classes, ignore_index, into.data_ptr())
        _call("error_map", device, arguments)
    return errors


def _planes(predictions: Tensor, depth: int) -> Tensor:
    """A volume's class map (Z', H', W') or logits (N, Z', H', W') as ``depth`` planes, by nearest sampling."""
    planes = predictions if predictions.ndim == 3 else predictions.movedim(1, 0)
    if len(planes) == depth:
        return planes
    return planes[torch.arange(depth, device=planes.device) * len(planes) // max(depth, 1)]


@error_map.register_fake
def _(predictions, labels, num_classes, ignore_index):
    return torch.empty(labels.shape, dtype=torch.int32, device=labels.device)


def _empty_distance(image: Tensor, squared: bool, sampling: Sequence[float] | None = None) -> Tensor:
    dtype = torch.float32 if not squared else torch.int32 if sampling is None else torch.float64
    return torch.empty(image.shape, dtype=dtype, device=image.device)


def _empty_indices(image: Tensor) -> Tensor:
    return torch.empty((image.ndim - 1, *image.shape), dtype=torch.int32, device=image.device)


def _distance(
    name: str, image: Tensor, squared: bool, sampling: Sequence[float] | None, indices: Tensor | None = None
) -> Tensor:
    distance = _empty_distance(image, squared, sampling)
    arguments = _Volume(image), _Distance(sampling, squared, distance, indices)
    _call(name, image.device, arguments, ("distance", *arguments, name == "edge_distance"))
    return distance


@torch.library.custom_op("contextrast::edge_distance", mutates_args=())
def edge_distance(classes: Tensor, squared: bool, sampling: Sequence[float] | None = None) -> Tensor:
    """(B, H, W) or (B, Z, H, W) integers → the same shape in float32, or squared in int32 (with sampling float64); -1
    where the class is negative."""
    return _distance("edge_distance", classes, squared, sampling)


@torch.library.custom_op("contextrast::distance_transform", mutates_args=())
def distance_transform(mask: Tensor, squared: bool, sampling: Sequence[float] | None = None) -> Tensor:
    """(B, W), (B, H, W) or (B, Z, H, W) of any real dtype → distances as above, 0 on zeros."""
    return _distance("distance_transform", mask, squared, sampling)


@torch.library.custom_op("contextrast::nearest_zero", mutates_args=())
def nearest_zero(mask: Tensor, squared: bool, sampling: Sequence[float] | None = None) -> tuple[Tensor, Tensor]:
    """``distance_transform``, and int32 (axes, B, ...) with the place of the nearest zero; -1 where there is none."""
    indices = _empty_indices(mask)
    return _distance("distance_transform", mask, squared, sampling, indices), indices


edge_distance.register_fake(_empty_distance)
distance_transform.register_fake(_empty_distance)


@nearest_zero.register_fake
def _(mask, squared, sampling=None):
    return _empty_distance(mask, squared, sampling), _empty_indices(mask)


@torch.library.custom_op("contextrast::select_nearest", mutates_args=())
def select_nearest(classes: Tensor, distance_sq: Tensor, ratio: float, num_classes: int, seed: Tensor) -> Tensor:
    """(B, h, w) integers, (B, h, w) int32, int64 of one element on the same device → bool (B, h, w)."""
    device = _device(classes=classes, distance_sq=distance_sq, seed=seed)
    selected = torch.empty(classes.shape, dtype=torch.bool, device=device)
    arguments = (_Map(classes), _Map(distance_sq), ratio, num_classes, seed.data_ptr(), selected.data_ptr())
    _call("select_nearest", device, arguments, ("select_nearest", *classes.shape, num_classes))
    return selected


@select_nearest.register_fake
def _(classes, distance_sq, ratio, num_classes, seed):
    return torch.empty(classes.shape, dtype=torch.bool, device=classes.device)


def _bane_negatives(
    predictions: Tensor,
    labels: Tensor,
    num_classes: int,
    layers: list[Tensor],
    errors: Tensor,
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: Tensor,
) -> None:
    """Write the chosen negatives of every layer into ``layers``, (B, h, w) each, and the numbers of errors into
    ``errors`` (layers,)."""
    device = _device(labels=labels, predictions=predictions, seed=seed)
    descriptors = (_Layer * len(layers))(*(_Layer(*layer.shape[1:], layer.data_ptr()) for layer in layers))
    labels_map, at = _Map(labels), _DISTANCE_AT.index(distance_at)
    described = (descriptors, len(layers), _TYPE_CODES[layers[0].dtype] if layers else _TYPE_CODES[torch.int32])
    which = (errors.data_ptr(), ratio, _NEGATIVES.index(negatives), at, seed.data_ptr())
    _call(
        "bane_negatives",
        device,
        (_Map(predictions), labels_map, num_classes, ignore_index, *described, *which),
        ("bane_negatives", labels_map, num_classes, *described, at),
    )


def _pairs(sizes: list[int]) -> list[tuple[int, int]]:
    return list(zip(sizes[::2], sizes[1::2], strict=True))


def _empty_layers(labels: Tensor, sizes: list[int]) -> list[Tensor]:
    return [labels.new_empty(labels.shape[0], h, w, dtype=torch.int32) for h, w in _pairs(sizes)]


def code_dtype(num_classes: int) -> torch.dtype:
    """The dtype of label codes: one or two bytes. The largest number means no class."""
    return torch.uint8 if num_classes <= 255 else torch.int16


def _empty_codes(labels: Tensor, num_classes: int, sizes: list[int]) -> Tensor:
    pixels = labels.shape[0] * sum(h * w for h, w in _pairs(sizes))
    return labels.new_empty(pixels, dtype=code_dtype(num_classes))


def _empty_errors(labels: Tensor, sizes: list[int]) -> Tensor:
    # The library does not write the count of a layer without pixels.
    allocate = labels.new_zeros if 0 in (labels.shape[0], *sizes) else labels.new_empty
    return allocate(len(sizes) // 2, dtype=torch.int64)


@torch.library.custom_op("contextrast::bane_negatives", mutates_args=())
def bane_negatives(
    predictions: Tensor,
    labels: Tensor,
    num_classes: int,
    sizes: list[int],
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Errors, distances and selection of several layers; sizes h_0, w_0, h_1, w_1, … → int32 (B, h_i, w_i), -1 = none,
    and the number of error pixels in each layer, int64 (layers,).

    negatives "bane" or "semi-hard"; distance_at "layer" or "full"; seed int64 of one element on the same device.
    """
    layers, errors = _empty_layers(labels, sizes), _empty_errors(labels, sizes)
    _bane_negatives(predictions, labels, num_classes, layers, errors, ratio, negatives, distance_at, ignore_index, seed)
    return layers, errors


@bane_negatives.register_fake
def _(predictions, labels, num_classes, sizes, *_):
    return _empty_layers(labels, sizes), _empty_errors(labels, sizes)


def chosen_codes(
    predictions: Tensor,
    labels: Tensor,
    num_classes: int,
    sizes: list[int],
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """``bane_negatives`` as the fused loss reads it: label codes (``code_dtype``) of all layers end to end.
    num_classes is N. This is what the op ``bane_codes`` runs."""
    codes, errors = _empty_codes(labels, num_classes, sizes), _empty_errors(labels, sizes)
    shapes = [(labels.shape[0], h, w) for h, w in _pairs(sizes)]
    pieces = codes.split([math.prod(shape) for shape in shapes])
    layers = [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]
    _bane_negatives(predictions, labels, num_classes, layers, errors, ratio, negatives, distance_at, ignore_index, seed)
    return codes, errors


bane_codes = torch.library.custom_op("contextrast::bane_codes", chosen_codes, mutates_args=())


def bane_scratch(labels: Tensor, num_classes: int, sizes: Sequence[tuple[int, int]]) -> int | None:
    """Bytes of scratch of ``bane_codes`` on CUDA, at "layer"; labels may be on the meta device. None where the library
    has no CUDA code."""
    function = getattr(_library(), "contextrast_bane_negatives_scratch_cuda", None)
    if function is None:
        return None
    layers = (_Layer * len(sizes))(*(_Layer(h, w, None) for h, w in sizes))
    type_code, at = _TYPE_CODES[code_dtype(num_classes)], _DISTANCE_AT.index("layer")
    return function(_Map(labels), num_classes, layers, len(sizes), type_code, at)


@bane_codes.register_fake
def _(predictions, labels, num_classes, sizes, *_):
    return _empty_codes(labels, num_classes, sizes), _empty_errors(labels, sizes)


for _op in (error_map, edge_distance, distance_transform, select_nearest, bane_negatives, bane_codes):
    one_call_per_sample(_op)
