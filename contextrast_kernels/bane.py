"""Boundary-aware negatives (BANE): wrongly predicted pixels, nearest to the edge of their error region.

    e(p)   = predicted class where the pixel is valid and wrong, else -1    Eq. 6: all N maps B^n = [e = n] in one
    D(p)   = min_{q ∈ E^n} ‖p - q‖₂,  n = e(p)                               Eq. 7: E^n are the edge pixels of B^n
    chosen = for every image and class, the ⌈ratio · |B^n|⌉ pixels of smallest (D, hash)

An edge pixel of B^n has a neighbour inside the image that is not in B^n (distance.py). Squared distances are integers,
and everything is decided on the integers.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks, maps, native
from contextrast_kernels.backend import choose
from contextrast_kernels.distance import NO_EDGE, edge_distance
from contextrast_kernels.hashing import STREAM_TIES, image_hash, seed_tensor

NEGATIVES = ("bane", "semi-hard", "none")
DISTANCE_AT = ("layer", "full")


def error_map(
    predictions: Tensor, labels: Tensor, *, num_classes: int | None = None, ignore_index: int = 255
) -> Tensor:
    """The wrongly predicted class of every pixel (Eq. 6).

    Args:
        predictions: class map (B, H', W') of integers or logits (B, N, H', W') of floats, brought to the labels' size
            by nearest sampling. Ties of the argmax go to the lowest class.
        labels: (B, H, W) or (B, 1, H, W) integers.
        num_classes: N; None takes the channels of the logits, and with a class map every value >= 0 (below 2**31) is
            a class.
        ignore_index: the label of pixels that take no part.

    Returns:
        int32 (B, H, W): the predicted class where the pixel is valid and the prediction is wrong, else -1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, range or device; the sentence names it.
        RuntimeError: a backend was asked for that cannot run.
    """
    predictions, labels, num_classes = _check_maps(predictions, labels, num_classes, ignore_index)
    height, width = labels.shape[-2:]
    checks.samples_from("predictions", predictions, height, width)
    return _error_map(predictions, labels, num_classes, ignore_index, height, width)


def select_nearest(
    classes: Tensor, distance_sq: Tensor, ratio: float, *, num_classes: int | None = None, seed: int | Tensor = 0
) -> Tensor:
    """Exactly ⌈ratio · |B^n|⌉ pixels of every image and class, nearest first, then by hash (section 3.3).

    Args:
        classes: (B, h, w) integers, negative = none; as ``error_map`` returns them.
        distance_sq: (B, h, w) int32, as ``edge_distance(squared=True)`` returns them.
        ratio: between 0 and 1. The product is rounded once, in float64.
        num_classes: N; values from N on are no class. None: every value >= 0 is a class.
        seed: int, or an int64 tensor of one element on the maps' device.

    Returns:
        bool (B, h, w). The same seed gives the same mask on every device and backend.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, range or device; the sentence names it.
        RuntimeError: a backend was asked for that cannot run.
    """
    classes = checks.class_map("classes", classes)
    distance_sq = checks.class_map("distance_sq", distance_sq, shape=classes.shape)
    if distance_sq.dtype != torch.int32:
        raise TypeError(
            f"distance_sq: expected int32, as edge_distance(squared=True) gives, got {checks.describe(distance_sq)}"
        )
    checks.together("classes", classes, "distance_sq", distance_sq)
    checks.real("ratio", ratio, low=0.0, high=1.0)
    if num_classes is not None:
        checks.num_classes(num_classes)
    checks.seed(seed, classes.device)
    if choose(classes, ("native",)) == "native":
        return native.select_nearest(
            classes, distance_sq, ratio, -1 if num_classes is None else num_classes, seed_tensor(seed, classes.device)
        )
    return _select_nearest(classes.long(), distance_sq.long(), ratio, num_classes, seed)


def bane_negatives(
    predictions: Tensor,
    labels: Tensor,
    *,
    num_classes: int | None = None,
    size: tuple[int, int] | None = None,
    ratio: float = 0.5,
    negatives: str = "bane",
    distance_at: str = "layer",
    ignore_index: int = 255,
    seed: int | Tensor = 0,
) -> Tensor:
    """The hard negatives of one layer (section 3.3): the class whose anchor each pixel is pushed away from.

    Args:
        predictions: class map (B, H', W') or logits (B, N, H', W').
        labels: (B, H, W) or (B, 1, H, W) integers.
        num_classes: as in ``error_map``.
        size: (h, w) of the layer; None is the labels' size.
        ratio: share of each image's and class's error pixels that is chosen, between 0 and 1.
        negatives: "bane" takes the pixels nearest to the edge of their error region, "semi-hard" as many at random,
            "none" none.
        distance_at: "layer" samples predictions and labels to the layer and measures there (the paper); "full"
            measures at the labels' size and samples errors and distances to the layer, so that one transform serves
            all layers.
        ignore_index: the label of pixels that take no part.
        seed: int, or an int64 tensor of one element on the maps' device.

    Returns:
        int32 (B, h, w): the wrongly predicted class of a chosen pixel, else -1.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, range or device; the sentence names it.
        RuntimeError: a backend was asked for that cannot run.
    """
    predictions, labels, num_classes = _check_maps(predictions, labels, num_classes, ignore_index)
    if size is None:
        size = labels.shape[-2:]
    checks.size("size", tuple(size) if isinstance(size, torch.Size) else size)
    check_selection(ratio, negatives, distance_at)
    checks.seed(seed, labels.device)
    for name, value in (("predictions", predictions), ("labels", labels)):
        checks.samples_from(name, value, *size)
    [chosen], _ = layer_negatives(
        predictions, labels, [tuple(size)], num_classes, ratio, negatives, distance_at, ignore_index, seed
    )
    return chosen


def check_selection(ratio: float, negatives: str, distance_at: str) -> None:
    """The arguments that choose the hard negatives."""
    checks.real("ratio", ratio, low=0.0, high=1.0)
    checks.choice("negatives", negatives, NEGATIVES)
    checks.choice("distance_at", distance_at, DISTANCE_AT)


def layer_negatives(
    predictions: Tensor,
    labels: Tensor,
    sizes: list[tuple[int, int]],
    num_classes: int | None,
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: int | Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Each layer's chosen negatives, int32 (B, h, w) with -1 for none, and number of errors, int64 (layers,)."""
    if choose(labels, ("native",)) == "native":
        limit = -1 if num_classes is None else num_classes
        return native.bane_negatives(
            *_native_arguments(predictions, labels, sizes, limit, ratio, negatives, distance_at, ignore_index, seed)
        )
    if distance_at == "full":
        # Predictions meet the labels at the labels' size; one distance map is then sampled to every layer.
        full_errors = _error_map(predictions, labels, num_classes, ignore_index, *labels.shape[-2:])
        full_distance = edge_distance(full_errors, squared=True) if negatives == "bane" else None
    layers, counts = [], []
    for height, width in sizes:
        if distance_at == "full":
            errors = maps.to_size(full_errors, height, width)
            distance = None if full_distance is None else maps.to_size(full_distance, height, width)
        else:
            errors = _error_map(predictions, labels, num_classes, ignore_index, height, width)
            distance = edge_distance(errors, squared=True) if negatives == "bane" else None
        if negatives == "none":
            chosen = torch.full_like(errors, -1)
        else:
            distance = torch.zeros_like(errors) if distance is None else distance  # semi-hard: by hash alone
            chosen = torch.where(select_nearest(errors, distance, ratio, seed=seed), errors, -1)
        layers.append(chosen)
        counts.append((errors >= 0).sum())
    return layers, torch.stack(counts)


def negative_codes(
    predictions: Tensor,
    labels: Tensor,
    sizes: list[tuple[int, int]],
    num_classes: int,
    ratio: float,
    negatives: str,
    distance_at: str,
    ignore_index: int,
    seed: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """``layer_negatives`` as the fused loss reads them: all layers end to end in one or two bytes a pixel
    (``native.code_dtype``), whose largest number is none."""
    selection = (predictions, labels, sizes, num_classes, ratio, negatives, distance_at, ignore_index, seed)
    if choose(labels, ("native",)) == "native":
        return native.bane_codes(*_native_arguments(*selection))
    layers, errors = layer_negatives(*selection)
    dtype = native.code_dtype(num_classes)
    chosen = torch.cat([layer.flatten() for layer in layers])
    return torch.where(chosen >= 0, chosen, torch.iinfo(dtype).max).to(dtype), errors


def _native_arguments(predictions, labels, sizes, num_classes, ratio, negatives, distance_at, ignore_index, seed):
    if negatives == "none":
        negatives, ratio = "semi-hard", 0.0  # none of the errors, but their number
    sides = [side for size in sizes for side in size]
    seed = seed_tensor(seed, labels.device)
    return predictions, labels, num_classes, sides, ratio, negatives, distance_at, ignore_index, seed


def _check_maps(predictions, labels, num_classes, ignore_index) -> tuple[Tensor, Tensor, int | None]:
    if num_classes is not None:
        checks.num_classes(num_classes)
    checks.ignore_index(ignore_index)
    predictions = checks.predictions("predictions", predictions, num_classes)
    labels = checks.class_map("labels", labels)
    checks.together("predictions", predictions, "labels", labels)
    if num_classes is None and predictions.is_floating_point():
        num_classes = predictions.shape[1]
    return predictions, labels, num_classes


def _error_map(
    predictions: Tensor, labels: Tensor, num_classes: int | None, ignore_index: int, height: int, width: int
) -> Tensor:
    """Eq. 6 at a size: labels and predictions are each sampled from their own size straight to it."""
    if choose(labels, ("native",)) == "native":
        sampled = maps.to_size(labels, height, width)
        return native.error_map(predictions, sampled, -1 if num_classes is None else num_classes, ignore_index)
    target = maps.targets(labels, height, width, num_classes, ignore_index)
    predicted = maps.predicted_classes(predictions, height, width)
    limit = NO_EDGE if num_classes is None else num_classes - 1
    wrong = (target >= 0) & (predicted != target) & (predicted >= 0) & (predicted <= limit)
    return torch.where(wrong, predicted, -1).int()


def _select_nearest(
    classes: Tensor, distance_sq: Tensor, ratio: float, num_classes: int | None, seed: int | Tensor
) -> Tensor:
    """Sort each image by (class, distance, hash); the first k of each class are chosen."""
    batch, height, width = classes.shape
    pixels = height * width
    if classes.numel() == 0:
        return torch.zeros_like(classes, dtype=torch.bool)
    is_class = classes >= 0 if num_classes is None else (classes >= 0) & (classes < num_classes)
    classes = torch.where(is_class, classes, -1).reshape(batch, pixels)
    order_in_class = (distance_sq << 32) + image_hash(seed, STREAM_TIES, height, width, classes.device)
    by_key = order_in_class.reshape(batch, pixels).argsort(1)
    sorted_classes, by_class = classes.gather(1, by_key).sort(dim=1, stable=True)
    order = by_key.gather(1, by_class)

    place = torch.arange(pixels, device=classes.device)
    changes = F.pad(sorted_classes[:, 1:] != sorted_classes[:, :-1], (1, 1), value=True)
    first = torch.where(changes[:, :-1], place, 0).cummax(1).values
    last = torch.where(changes[:, 1:], place, pixels).flip(1).cummin(1).values.flip(1)
    # One float64 product, rounded up: 0.07 · 100 gives 8.
    k = ((last - first + 1).double() * ratio).ceil()
    chosen = (place - first < k) & (sorted_classes >= 0)
    return torch.zeros_like(chosen).scatter(1, order, chosen).reshape(batch, height, width)
