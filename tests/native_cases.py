"""Calls of the native library: (op, arguments) by name, the same for its CPU code, its emulated kernels and a GPU."""

import numpy as np
import torch
from inputs import families, logits_of, scene
from scipy import ndimage

from contextrast_kernels import native

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
IGNORED = 7
NO_EDGE = 2**31 - 1


def seed(value=0):
    return torch.tensor([value])


def scipy_edge_distance_sq(classes):
    """One SciPy transform for each image and class, on the complement of that class's own edge pixels."""
    squared = np.full(classes.shape, -1)
    for image, out in zip(classes, squared, strict=True):
        for n in np.unique(image[image >= 0]):
            inside = image == n
            # With border_value=1 the image border is not an edge, as in Eq. 7.
            edge = inside & ~ndimage.binary_erosion(inside, border_value=1)
            if not edge.any():
                out[inside] = NO_EDGE
                continue
            nearest = ndimage.distance_transform_edt(~edge, return_distances=False, return_indices=True)
            out[inside] = ((nearest - np.indices(image.shape)) ** 2).sum(0)[inside]
    return squared


def call(op, arguments):
    """All tensors that an op of the native library returns."""
    result = getattr(native, op)(*arguments)
    if op == "bane_negatives":
        layers, errors = result
        return [*layers, errors]
    if op in ("bane_codes", "nearest_zero"):
        return list(result)
    return [result]


def stridden(tensor):
    """The same values at an odd offset, with the axes in reverse memory order and a step of 2."""
    flat = torch.zeros(2 * tensor.numel() + 3, dtype=tensor.dtype)
    view = flat[3::2][: tensor.numel()].reshape(tensor.shape[::-1]).permute(*reversed(range(tensor.ndim)))
    return view.copy_(tensor)


def distances(sizes, rng):
    """Every adversarial map and its mirror image as a batch of two, by size."""
    for H, W in sizes:
        for name, values in families(rng, H, W).items():
            classes = torch.from_numpy(np.stack([values, values[::-1, ::-1]]))
            yield f"{name}, {H}x{W}", "edge_distance", (classes, True)
            yield f"zeros of {name}, {H}x{W}", "distance_transform", (classes >= 0, True)


def distances_of_types(rng):
    values = torch.from_numpy(rng.integers(-1, 3, (3, 37, 45)))
    for dtype in INTEGERS:
        classes = values.to(dtype)  # -1 is the class 255 of uint8
        for squared in True, False:
            yield f"{dtype}, squared={squared}", "edge_distance", (classes, squared)
            yield f"{dtype} zeros, squared={squared}", "distance_transform", (classes, squared)
        yield f"{dtype} with strides", "edge_distance", (stridden(classes), True)
        yield f"{dtype} expanded", "edge_distance", (classes[:1, :, :1].expand(2, 37, 50), True)
    yield "far values", "edge_distance", (values * 2**40, True)
    yield "nothing to measure to", "distance_transform", (torch.ones(1, 40, 50, dtype=torch.bool), False)
    for shape in ((0, 5, 5), (2, 0, 5), (2, 5, 0)):
        yield f"shape {shape}", "edge_distance", (torch.zeros(shape, dtype=torch.int64), True)


def predictions_of(class_map, N, rng):
    """The same predictions as class maps and as logits of every type and layout; class_map is below N."""
    if N <= 127:
        for dtype in INTEGERS:
            yield str(dtype), class_map.to(dtype)
    logits = logits_of(class_map, N, rng)
    for dtype in FLOATS:
        yield f"{dtype} logits", logits.to(dtype)
    yield "channels_last logits", logits.to(memory_format=torch.channels_last)
    yield "logits with strides", stridden(logits)
    broken = logits.clone()
    broken[torch.from_numpy(rng.random(logits.shape) < 0.05)] = torch.nan
    broken[torch.from_numpy(rng.random(logits.shape) < 0.05)] = torch.inf
    broken[:, :, :2] = 0.0
    broken[:, ::2, :2] = -0.0
    for dtype in FLOATS:
        yield f"{dtype} logits with NaN, infinities and ties", broken.to(dtype)


def errors(rng):
    labels, predictions = scene(rng, 2, 5, 37, 50, ignore_index=IGNORED)
    for name, values in predictions_of(predictions, 5, rng):
        for labels_type in INTEGERS:
            yield f"{name} on {labels_type}", "error_map", (values, labels.to(labels_type), 5, IGNORED)
        yield f"{name}, classes by channels or values", "error_map", (values, labels, -1, IGNORED)
        yield f"{name}, fewer classes", "error_map", (values, labels, 3, IGNORED)
    small = predictions[:, ::2, ::3]
    yield "predictions sampled", "error_map", (small, stridden(labels), 5, IGNORED)
    for ignore_index in (-1, -100, 0, 255, 2**40):
        wild = torch.from_numpy(rng.choice([-(2**62), -100, -1, 0, 1, 156, 255, 2**31, 2**40, 2**62], (2, 2, 9, 13)))
        for num_classes in (-1, 0, 1, 200, 2**40):
            yield f"wild values, {num_classes}", "error_map", (wild[0], wild[1], num_classes, ignore_index)


def selections(rng):
    labels, predictions = scene(rng, 2, 4, 33, 41)
    classes = torch.where(labels == 255, -1, predictions)
    distance = torch.from_numpy(rng.integers(0, 4, (2, 33, 41))).int()
    for ratio in (0.0, 1e-9, 0.07, 1 / 3, 0.5, 1.0, float("nan")):
        yield f"ratio {ratio}", "select_nearest", (classes, distance, ratio, 4, seed(3))
    for dtype in INTEGERS:
        yield f"{dtype}", "select_nearest", (stridden(classes.to(dtype)), stridden(distance), 0.4, 256, seed(4))
    for num_classes in (0, 1, 3, 1024, 1025, 5000):
        yield f"{num_classes} classes", "select_nearest", (classes, distance, 0.3, num_classes, seed(2**40 + 5))
    every = torch.arange(2 * 33 * 41).reshape(2, 33, 41)
    yield "every pixel a class", "select_nearest", (every % (33 * 41), distance, 0.5, 33 * 41, seed(-1))
    yield "values beyond the classes", "select_nearest", (every % 7 * 2**59 + 3, distance, 0.5, 2**20, seed(-1))
    rows = torch.from_numpy(rng.integers(-1, 3, (1, 20000, 2)))  # as those of all planes of a volume
    yield "more rows than a side has", "select_nearest", (rows, rows.int() + 1, 0.5, 3, seed(6))
    yield "no pixel", "select_nearest", (torch.full((2, 33, 41), -1), distance, 0.5, 4, seed())
    yield "no image", "select_nearest", (classes[:0], distance[:0], 0.5, 4, seed())


def long_segments(rng, H=150, W=200):
    """Segments longer than a block reads at once, with distances that take the search through all its rounds."""
    shape = (1, H, W)
    anything = torch.from_numpy(rng.integers(-(2**31), 2**31 - 1, shape)).int()
    for name, distance in {
        "one distance": torch.zeros(shape, dtype=torch.int32),
        "one far distance": torch.full(shape, 700_001, dtype=torch.int32),
        "no edge": torch.full(shape, NO_EDGE, dtype=torch.int32),
        "lowest distance": torch.full(shape, -(2**31), dtype=torch.int32),
        "small distances": anything % 7,
        "small distances and no edge": torch.where(anything % 3 == 0, NO_EDGE, anything % 200),
        "distances around 0": anything % 7 - 3,
        "every distance": anything,
        "far distances": anything % 2**20,
    }.items():
        for ratio in (1 / (H * W), 0.3, 0.9999):
            yield f"{name}, ratio {ratio:.2g}", "select_nearest", (
                torch.zeros(shape, dtype=torch.int64), distance, ratio, 1, seed(11),
            )  # fmt: skip
    classes = torch.from_numpy(rng.integers(0, 3, shape))
    yield "three classes", "select_nearest", (classes, anything % 50, 0.5, 3, seed(12))


def negatives(rng):
    labels, predictions = scene(rng, 2, 19, 45, 70)
    sizes = [45, 70, 23, 35, 12, 18, 9, 1, 1, 1]
    for at in "layer", "full":
        for which in "bane", "semi-hard":
            for name, values in predictions_of(predictions[:, ::2, ::3], 19, rng):
                yield f"{name}, {which}, {at}", "bane_negatives", (
                    values, labels, 19, sizes, 0.3, which, at, 255, seed(2**33),
                )  # fmt: skip
            for num_classes in (7, 3000):
                yield f"{num_classes} classes, {which}, {at}", "bane_negatives", (
                    predictions, labels.to(torch.int16), num_classes, sizes, 0.5, which, at, 255, seed(-9),
                )  # fmt: skip
            for num_classes in (19, 255, 3000):
                yield f"codes of {num_classes} classes, {which}, {at}", "bane_codes", (
                    predictions + num_classes - 19, labels, num_classes, sizes, 0.5, which, at, 255, seed(-9),
                )  # fmt: skip
        rest = (0.5, "bane", at, 255, seed())
        yield f"no image, {at}", "bane_negatives", (predictions[:0], labels[:0], 19, sizes, *rest)
        yield f"no layer, {at}", "bane_negatives", (predictions, labels, 19, [], *rest)
        wrong_everywhere = torch.zeros_like(labels)
        yield (
            f"one wrong class everywhere, {at}",
            "bane_negatives",
            (*(wrong_everywhere, wrong_everywhere + 1, 19, sizes, *rest),),
        )


def everything(rng, sizes=((1, 1), (1, 40), (40, 1), (2, 2), (31, 33), (33, 64), (65, 31))):
    yield from distances(sizes, rng)
    yield from distances_of_types(rng)
    yield from errors(rng)
    yield from selections(rng)
    yield from long_segments(rng)
    yield from negatives(rng)


VOLUME_TYPES = (*INTEGERS, torch.uint16, torch.uint32, torch.uint64, torch.bool, *FLOATS)
SIGNED_OR_NOT = tuple(dtype for dtype in VOLUME_TYPES if not dtype.is_floating_point and dtype != torch.bool)
SAMPLINGS = (None, (1.0, 1.0, 2.5), (0.3, 0.7, 1.1), (3.0, 1.0, 1.0), (1e-9, 1.0, 1e9), (1e-80, 1e80, 1.0))


def volumes(rng, shapes=((1, 1, 1), (5, 4, 3), (33, 2, 1), (1, 35, 7), (3, 7, 70), (40, 9, 33))):
    """Distances of volumes, and of maps and lines, with every sampling and with indices."""
    for shape in shapes:
        for name, zeros in (("noise", 0.3), ("sparse", 0.01), ("one", 0.0), ("none", -1.0)):
            mask = rng.random((2, *shape)) >= zeros
            if name == "one":
                mask[:, -1, 0, 0] = False
            mask = torch.from_numpy(mask)
            for sampling in SAMPLINGS:
                for squared in True, False:
                    what = f"{name}, {shape}, {sampling}, squared={squared}"
                    yield f"zeros, {what}", "distance_transform", (mask, squared, sampling)
                    yield f"indices, {what}", "nearest_zero", (mask, squared, sampling)
                classes = torch.from_numpy(rng.integers(-1, 3, (2, *shape))).mul(mask)
                yield f"edges, {name}, {shape}, {sampling}", "edge_distance", (classes, name != "noise", sampling)
    for axes, sampling in ((1, None), (1, (0.3,)), (2, (0.3, 1.7)), (2, (1.0, 2.5))):
        mask = torch.from_numpy(rng.random((2, 37, 45)[: axes + 1]) < 0.9)
        yield f"{axes} axes, {sampling}", "nearest_zero", (mask, True, sampling)
        yield f"{axes} axes with strides, {sampling}", "distance_transform", (stridden(mask), False, sampling)


def volumes_of_types(rng):
    values = torch.from_numpy(rng.integers(-1, 3, (2, 5, 6, 7)))
    for dtype in VOLUME_TYPES:
        mask = values.to(dtype) * -1 if dtype.is_floating_point else values.to(dtype)  # -0 is a zero too
        yield f"{dtype} zeros", "distance_transform", (mask, True)
        yield f"{dtype} zeros of a map", "distance_transform", (mask[:, 0], True)
        if dtype in SIGNED_OR_NOT:
            yield f"{dtype} edges", "edge_distance", (mask, True)
            yield f"{dtype} edges of a map", "edge_distance", (mask[:, 0], False)
            yield f"{dtype} with strides", "edge_distance", (stridden(mask), True)
    broken = torch.full((1, 3, 4, 5), torch.nan)
    broken[0, 1, 2, 3] = 0
    yield "NaN is no zero", "nearest_zero", (broken, True)
    for shape in ((0, 5, 5, 5), (2, 0, 5, 5), (2, 5, 0, 5), (2, 5, 5, 0)):
        yield f"shape {shape}", "nearest_zero", (torch.zeros(shape), True)
