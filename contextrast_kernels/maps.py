"""Sample label and prediction maps to a layer's size; values that are not a class become -1.

A map has two spatial axes (h, w) or, as a volume, three (z, h, w). A size has one number for each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def to_size(values: Tensor, *size: int) -> Tensor:
    """Sample the last axes of ``values`` to ``size``: index i of m takes source index (i * n) // m of n.

    Exact integer arithmetic, unlike ``interpolate(mode="nearest")``, whose float32 scale is off by a row at some sizes.
    """
    source = values.shape[values.ndim - len(size) :]
    if source == size:
        return values
    index = [torch.arange(m, device=values.device) * n // max(m, 1) for m, n in zip(size, source)]
    broadcast: list[Any] = [i.view(-1, *(1,) * (len(size) - 1 - axis)) for axis, i in enumerate(index)]
    return values[(..., *broadcast)]


def targets(labels: Tensor, size: tuple[int, ...], num_classes: int | None, ignore_index: int) -> Tensor:
    """Labels at a layer's size: int64 (B, *size), the class of each pixel, or -1 for an ignored pixel.

    A label outside 0..N-1 counts as ignored. Labels become int64 before any comparison, so that a uint8 label 156 is
    not taken for ``ignore_index=-100``.
    """
    classes = to_size(labels, *size).long()
    valid = (classes >= 0) & (classes != ignore_index)
    if num_classes is not None:
        valid = valid & (classes < num_classes)
    return torch.where(valid, classes, -1)


def predicted_classes(predictions: Tensor, size: tuple[int, ...], ignore_index: int) -> Tensor:
    """Class map or logits at a size: int64 (B, *size). Ties of the argmax go to the lowest class.

    Where ``ignore_index`` is predicted, the class is -1. Logits are sampled first, so the argmax is taken only at the
    sampled pixels.
    """
    sampled = to_size(predictions, *size)
    classes = sampled.argmax(1) if predictions.is_floating_point() else sampled.long()
    return torch.where(classes == ignore_index, -1, classes)


def resized(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    """Logits at a size, interpolated linearly along each axis (align_corners=False)."""
    if len(size) == 3 and logits.shape[2] == size[0] == 1:  # a volume of depth one gives the same bits as a map
        return resized(logits.squeeze(2), size[1:]).unsqueeze(2)
    return interpolate(logits, size, mode="bilinear" if len(size) == 2 else "trilinear", align_corners=False)


_CLASSES_AT_ONCE = 4


def resized_classes(predictions: Tensor, size: tuple[int, ...], ignore_index: int) -> Tensor:
    """``predicted_classes`` for scoring: logits are resized bilinearly (of volumes trilinearly,
    align_corners=False) before the argmax.

    A few classes are resized at a time, so that the logits of all classes never exist at the larger size.
    """
    same_size = predictions.shape[2:] == size
    if not predictions.is_floating_point() or same_size or 0 in size:
        return predicted_classes(predictions, size, ignore_index)
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    first, *others = predictions.split(_CLASSES_AT_ONCE, 1)
    largest, classes = resized(first.to(dtype), size).max(1)
    for i, logits in enumerate(others, 1):
        value, place = resized(logits.to(dtype), size).max(1)
        place = place + i * _CLASSES_AT_ONCE
        larger = (value > largest) | (value.isnan() & ~largest.isnan())  # NaN counts as the largest, as in argmax
        largest, classes = torch.where(larger, value, largest), torch.where(larger, place, classes)
    return torch.where(classes == ignore_index, -1, classes)


def volume_sides(features: Sequence[Tensor]) -> list[int] | None:
    """The sides z, h, w of each layer's volume, one layer after the other; None for maps."""
    return None if features[0].ndim == 4 else [side for x in features for side in x.shape[2:]]


def plane_stack(features: Tensor) -> Tensor | None:
    """Features of a volume (B, D, z, h, w) as a map (B, D, rows, columns) with the pixels in the same order: a view.

    Either the rows of all planes form one axis, or every plane is one row. None where the strides allow neither, as
    in a block that is cut out of a larger volume in both h and w. Features of a map are returned as they are.
    """
    if features.ndim == 4:
        return features
    for axis in (2, 3):
        size, below = features.shape[axis : axis + 2]
        stride, stride_below = features.stride()[axis : axis + 2]
        if 0 in features.shape or size == 1 or below == 1 or stride == below * stride_below:
            return features.flatten(axis, axis + 1)
    return None
