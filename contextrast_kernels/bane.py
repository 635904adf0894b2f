"""Boundary-aware negatives (BANE): wrongly predicted pixels, nearest to the edge of their error region.

    e(p)   = predicted class where the pixel is valid and wrong, else -1    Eq. 6: e holds all N maps B^n = [e = n]
    D(p)   = min_{q ∈ E^n} ‖p - q‖₂,  n = e(p)                               Eq. 7: E^n are the edge pixels of B^n
    chosen = for every image and class, the ⌈ratio · |B^n|⌉ pixels of smallest (D, hash)

An edge pixel of B^n has a neighbour inside the image that is not in B^n (distance.py). Squared distances are
integers, so the order is exact; with ``sampling`` they are float64, with the same bits on every backend.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks, maps, native
from contextrast_kernels.backend import choose, is_eager
from contextrast_kernels.distance import NO_EDGE, check_sampling, edge_distance
from contextrast_kernels.hashing import STREAM_TIES, image_hash, seed_tensor

NEGATIVES = ("bane", "semi-hard", "none")
DISTANCE_AT = ("layer", "full")


@checks.takes_subclasses
def error_map(
    predictions: Tensor, labels: Tensor, *, num_classes: int | None = None, ignore_index: int = 255
) -> Tensor:
    """The wrongly predicted class of every pixel (Eq. 6).

    Args:
        predictions: class map (B, H', W') of integers or logits (B, N, H', W') of floats, brought to the labels' size
            by nearest sampling. Ties of the argmax go to the lowest class.
        labels: (B, H, W) or (B, 1, H, W) integers. Volumes have one axis more: labels (B, Z, H, W) with predictions
            (B, Z', H', W') or logits (B, N, Z', H', W'). (B, 1, H, W) is a volume of depth one if the logits are
            those of a volume, else a map.
        num_classes: N, at least 2; None takes the channels of the logits, and with a class map every value >= 0 (below
            2**31) is a class. With 2, logits may have one channel, as those of a binary network: class 1 is where it
            is positive.
        ignore_index: the label of ignored pixels. A prediction of this value is not an error either.

    Returns:
        int32, of the labels' size: the predicted class where the pixel is valid and the prediction is wrong, else -1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    dims = checks.dims_of(predictions, labels)
    predictions, labels, num_classes = _check_maps(predictions, labels, num_classes, ignore_index, dims)
    size = labels.shape[1:]
    checks.samples_from("predictions", predictions, *size)
    return _error_map(predictions, labels, num_classes, ignore_index, size)


@checks.takes_subclasses
def select_nearest(
    classes: Tensor, distance_sq: Tensor, ratio: float, *, num_classes: int, seed: int | Tensor = 0
) -> Tensor:
    """Select exactly ⌈ratio · |B^n|⌉ pixels of every image and class, the nearest first, ties by hash (section 3.3).

    Args:
        classes: (B, h, w) or (B, z, h, w) integers, negative = none; as ``error_map`` returns them. (B, 1, h, w) is
            read as maps with a channel axis.
        distance_sq: numbers of the same shape, of any integer or floating-point type, as
            ``edge_distance(squared=True)`` returns them. They are compared exactly; NaN comes last.
        ratio: between 0 and 1. The product is rounded once, in float64.
        num_classes: N; values of N and above are not classes.
        seed: int, or an int64 tensor of one element on the maps' device.

    Returns:
        bool, of the shape of classes. The same seed gives the same mask on every device and backend.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    classes = checks.class_map("classes", classes, dims=checks.dims_of(None, classes))
    distance_sq = checks.distances("distance_sq", distance_sq, classes.shape)
    checks.together("classes", classes, "distance_sq", distance_sq)
    checks.real("ratio", ratio, low=0.0, high=1.0)
    checks.num_classes(num_classes)
    checks.seed(seed, classes.device)
    return _selected(classes, distance_sq, ratio, num_classes, seed)


@checks.takes_subclasses
def bane_negatives(
    predictions: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    size: tuple[int, ...] | None = None,
    ratio: float = 0.5,
    negatives: str = "bane",
    distance_at: str = "layer",
    sampling: float | Sequence[float] | None = None,
    ignore_index: int = 255,
    seed: int | Tensor = 0,
) -> Tensor:
    """Choose the hard negatives of one layer (section 3.3): the class whose anchor each pixel is pushed away from.

    Args:
        predictions, labels: as in ``error_map``, for maps or volumes.
        num_classes: N, at least 2. None takes the number of channels of the logits; a class map needs a number.
        size: (h, w) of the layer, or (z, h, w); None is the labels' size.
        ratio: the share of the error pixels of each image and class that is chosen, between 0 and 1.
        negatives: the name of a rule: "bane" takes the pixels nearest to the edge of their error region, "semi-hard"
            the same number at random, "none" none.
        distance_at: "layer" samples predictions and labels to the layer and measures there (the paper); "full"
            measures at the labels' size and samples errors and distances to the layer, so that one transform serves
            all layers.
        sampling: the size of a pixel of the labels, a number or one for each axis, in which distances are measured.
            A pixel of a layer with h of the labels' H rows is H / h times as high. None: pixels are squares or cubes of
            side 1 in every layer.
        ignore_index: the label of ignored pixels.
        seed: int, or an int64 tensor of one element on the maps' device.

    Returns:
        int32 (B, h, w) or (B, z, h, w): the wrongly predicted class of a chosen pixel, else -1.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    dims = checks.dims_of(predictions, labels, size)
    predictions, labels, num_classes = _check_maps(predictions, labels, num_classes, ignore_index, dims)
    if num_classes is None:
        raise ValueError(
            "num_classes: expected the number of classes for a class map, got None. Pass num_classes=N, or logits."
        )
    size = labels.shape[1:] if size is None else size
    checks.size("size", tuple(size) if isinstance(size, torch.Size) else size, dims)
    check_selection(ratio, negatives, distance_at)
    sampling = check_sampling(sampling, dims)
    checks.seed(seed, labels.device)
    for name, value in (("predictions", predictions), ("labels", labels)):
        checks.samples_from(name, value, *size)
    [chosen], _ = layer_negatives(
        predictions, labels, [tuple(size)], num_classes, ratio, negatives, distance_at, ignore_index, seed, sampling
    )
    return chosen


def check_selection(ratio: float, negatives: str, distance_at: str) -> None:
    """Check the arguments that choose the hard negatives."""
    checks.real("ratio", ratio, low=0.0, high=1.0)
    checks.choice("negatives", negatives, NEGATIVES)
    checks.choice("distance_at", distance_at, DISTANCE_AT)


def layer_negatives(
    predictions: Tensor,
    labels: Tensor,
    sizes: list[tuple[int, ...]],
    num_classes: int,
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: int | Tensor,
    sampling: tuple[float, ...] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Each layer's chosen negatives, int32 (B, *size) with -1 for none, and number of errors, int64 (layers,)."""
    if _one_native_call(labels, sizes, num_classes, sampling):
        return native.bane_negatives(
            *_native_arguments(
                predictions, labels, sizes, num_classes, ratio, negatives, distance_at, ignore_index, seed
            )
        )
    full = labels.shape[1:]
    if distance_at == "full":
        # Errors are formed at the labels' size; one distance map is then sampled to every layer.
        full_errors = _error_map(predictions, labels, num_classes, ignore_index, full)
        full_distance = _distances(full_errors, sampling) if negatives == "bane" else None
    layers, counts = [], []
    for size in sizes:
        if distance_at == "full":
            errors = maps.to_size(full_errors, *size)
            distance = None if full_distance is None else maps.to_size(full_distance, *size)
        else:
            errors = _error_map(predictions, labels, num_classes, ignore_index, size)
            distance = None
            if negatives == "bane":
                pixel = None if sampling is None else tuple(s * (n / m) for s, n, m in zip(sampling, full, size))
                distance = _distances(errors, pixel)
        if negatives == "none":
            chosen = torch.full_like(errors, -1)
        else:
            distance = torch.zeros_like(errors) if distance is None else distance  # semi-hard: by hash alone
            chosen = torch.where(_selected(errors, distance, ratio, num_classes, seed), errors, -1)
        layers.append(chosen)
        counts.append((errors >= 0).sum())
    return layers, torch.stack(counts)


def negative_codes(
    predictions: Tensor,
    labels: Tensor,
    sizes: list[tuple[int, ...]],
    num_classes: int,
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: int | Tensor,
    sampling: tuple[float, ...] | None = None,
) -> tuple[Tensor, Tensor]:
    """``layer_negatives`` for the fused loss: all layers concatenated, with one or two bytes per pixel
    (``native.code_dtype``). The largest number means none."""
    selection = (predictions, labels, sizes, num_classes, ratio, negatives, distance_at, ignore_index, seed)
    if _one_native_call(labels, sizes, num_classes, sampling):
        arguments = _native_arguments(*selection)
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        return (native.chosen_codes if is_eager(tensors) else native.bane_codes)(*arguments)
    layers, errors = layer_negatives(*selection, sampling)
    dtype = native.code_dtype(num_classes)
    chosen = torch.cat([layer.flatten() for layer in layers])
    return torch.where(chosen >= 0, chosen, torch.iinfo(dtype).max).to(dtype), errors


def _one_native_call(labels: Tensor, sizes: Sequence, num_classes: int, sampling: tuple[float, ...] | None) -> bool:
    """Whether the library can take all layers in one call: for maps with square pixels. Volumes need several calls."""
    fits = len(sizes) <= native.MOST_LAYERS and num_classes <= native.MOST_CLASSES
    return fits and labels.ndim == 3 and sampling is None and choose(labels, ("native",)) == "native"


def _native_arguments(predictions, labels, sizes, num_classes, ratio, negatives, distance_at, ignore_index, seed):
    if negatives == "none":
        negatives, ratio = "semi-hard", 0.0  # chooses no pixel but counts the errors
    sides = [side for size in sizes for side in size]
    seed = seed_tensor(seed, labels.device)
    return predictions, labels, num_classes, sides, ratio, negatives, distance_at, ignore_index, seed


def _check_maps(predictions, labels, num_classes, ignore_index, dims) -> tuple[Tensor, Tensor, int | None]:
    if num_classes is not None:
        checks.several_classes(num_classes)
    checks.ignore_index(ignore_index)
    predictions = checks.predictions("predictions", predictions, num_classes, dims)
    labels = checks.class_map("labels", labels, dims=dims)
    checks.together("predictions", predictions, "labels", labels)
    if num_classes is None and predictions.is_floating_point():
        num_classes = predictions.shape[1]
    return predictions, labels, num_classes


def _error_map(
    predictions: Tensor, labels: Tensor, num_classes: int | None, ignore_index: int, size: tuple[int, ...]
) -> Tensor:
    """Eq. 6 at a size: labels and predictions are each sampled from their own size straight to it."""
    if choose(labels, ("native",)) == "native":
        sampled = maps.to_size(labels, *size)
        return native.error_map(predictions, sampled, -1 if num_classes is None else num_classes, ignore_index)
    target = maps.targets(labels, size, num_classes, ignore_index)
    predicted = maps.predicted_classes(predictions, size, ignore_index)
    limit = NO_EDGE if num_classes is None else num_classes - 1
    wrong = (target >= 0) & (predicted != target) & (predicted >= 0) & (predicted <= limit)
    return torch.where(wrong, predicted, -1).int()


def _distances(errors: Tensor, sampling: tuple[float, ...] | None) -> Tensor:
    """Squared edge distances. ``edge_distance`` takes (B, 1, h, w) for maps, so a volume of depth one becomes a map."""
    if errors.ndim == 4 and errors.shape[1] == 1:
        return _distances(errors[:, 0], None if sampling is None else sampling[1:]).unsqueeze(1)
    return edge_distance(errors, squared=True, sampling=sampling)


def _selected(classes: Tensor, distance_sq: Tensor, ratio: float, num_classes: int, seed: int | Tensor) -> Tensor:
    """``select_nearest`` of checked arguments: maps or volumes of one shape."""
    distance_sq = _in_order(distance_sq)
    unfit = ""
    if num_classes > native.MOST_CLASSES:
        unfit = f"its selection takes at most {native.MOST_CLASSES} classes, got {num_classes}"
    if choose(classes, ("native",), unfit) != "native":
        return _select_nearest(classes.long(), distance_sq.long(), ratio, num_classes, seed)
    shape = classes.shape
    if classes.ndim == 4:  # a selection depends on a pixel's index only, so the rows of all planes can form a map
        classes, distance_sq = classes.flatten(1, 2), distance_sq.flatten(1, 2)
    selected = native.select_nearest(classes, distance_sq, ratio, num_classes, seed_tensor(seed, classes.device))
    return selected.view(shape)


def _in_order(distances: Tensor) -> Tensor:
    """Numbers (B, ...) as int32 in the same order within each image; equal ones stay equal, and NaN comes last."""
    dtype = distances.dtype
    if not dtype.is_floating_point and (dtype.itemsize < 4 or dtype == torch.int32):
        return distances.int()
    # Before PyTorch 2.14 torch.func.vmap cannot map the view as integers, so the ranks below serve there.
    mapped = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if dtype.is_floating_point and dtype != torch.float64 and not mapped:
        bits = distances.float().view(torch.int32)
        # The bits of a number that is not negative have its order. -0 becomes 0.
        largest = torch.iinfo(torch.int32).max
        magnitude = bits & largest
        return torch.where(distances.isnan(), largest, torch.where(bits < 0, -magnitude, magnitude))
    if dtype.is_floating_point:
        image = distances
    else:
        image = distances.long()
        if dtype == torch.uint64:  # numbers of 2**63 and more became negative
            image = image ^ torch.iinfo(torch.int64).min
    # 64 bits do not fit: replace each value by its rank among the different values of its image.
    values, at = image.flatten(1).sort(1)  # NaN comes last
    above = (values[:, 1:] != values[:, :-1]) & ~values[:, :-1].isnan()
    place = F.pad(above.cumsum(1), (1, 0))[:, : values.shape[1]]
    return torch.zeros_like(at).scatter(1, at, place).int().reshape(distances.shape)


def _select_nearest(classes: Tensor, distance_sq: Tensor, ratio: float, num_classes: int, seed: int | Tensor) -> Tensor:
    """Sort each image by (class, distance, hash); the first k of each class are chosen."""
    batch, *size = classes.shape
    pixels = math.prod(size)
    if classes.numel() == 0:
        return torch.zeros_like(classes, dtype=torch.bool)
    is_class = (classes >= 0) & (classes < num_classes)
    shape, classes = classes.shape, torch.where(is_class, classes, -1).reshape(batch, pixels)
    order_in_class = (distance_sq << 32) + image_hash(seed, STREAM_TIES, tuple(size), classes.device)
    by_key = order_in_class.reshape(batch, pixels).argsort(1)
    sorted_classes, by_class = classes.gather(1, by_key).sort(dim=1, stable=True)
    order = by_key.gather(1, by_class)

    place = torch.arange(pixels, device=classes.device)
    changes = F.pad(sorted_classes[:, 1:] != sorted_classes[:, :-1], (1, 1), value=True)
    first = torch.where(changes[:, :-1], place, 0).cummax(1).values
    last = torch.where(changes[:, 1:], place, pixels).flip(1).cummin(1).values.flip(1)
    # One float64 product, rounded up: 0.07 · 100 gives 8, because the product is above 7.
    k = ((last - first + 1).double() * ratio).ceil()
    chosen = (place - first < k) & (sorted_classes >= 0)
    return torch.zeros_like(chosen).scatter(1, order, chosen).reshape(shape)
