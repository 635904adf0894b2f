"""Label and prediction maps: brought to a layer's size, with everything that is no class turned into -1."""

import torch
from torch import Tensor
from torch.nn.functional import interpolate


def to_size(values: Tensor, height: int, width: int) -> Tensor:
    """Nearest sampling of ``values`` (..., H, W) to (..., height, width): row r takes source row (r * H) // height.

    Exact integer arithmetic, unlike ``interpolate(mode="nearest")``, whose float32 scale is off by a row at some sizes.
    """
    source_height, source_width = values.shape[-2:]
    if (source_height, source_width) == (height, width):
        return values
    rows = torch.arange(height, device=values.device) * source_height // max(height, 1)
    columns = torch.arange(width, device=values.device) * source_width // max(width, 1)
    return values[..., rows[:, None], columns]


def targets(labels: Tensor, height: int, width: int, num_classes: int | None, ignore_index: int) -> Tensor:
    """Labels (B, H, W) at a layer's size: int64 (B, height, width), the class, or -1 where the pixel takes no part.

    A label outside 0..N-1 counts as ignored. Labels are widened before any comparison, so that ``ignore_index=-100``
    never meets a uint8 156.
    """
    classes = to_size(labels, height, width).long()
    valid = (classes >= 0) & (classes != ignore_index)
    if num_classes is not None:
        valid = valid & (classes < num_classes)
    return torch.where(valid, classes, -1)


def predicted_classes(predictions: Tensor, height: int, width: int, ignore_index: int) -> Tensor:
    """Class map or logits at a size: int64 (B, height, width). Ties of the argmax go to the lowest class.

    Where ``ignore_index`` is predicted, the class is -1. Logits are sampled first, so that only the pixels which are
    needed are compared.
    """
    sampled = to_size(predictions, height, width)
    classes = sampled.argmax(1) if predictions.is_floating_point() else sampled.long()
    return torch.where(classes == ignore_index, -1, classes)


_CLASSES_AT_ONCE = 4


def resized_classes(predictions: Tensor, height: int, width: int, ignore_index: int) -> Tensor:
    """``predicted_classes`` for scoring: logits are resized bilinearly (align_corners=False) before the argmax.

    A few classes are resized at a time, so that the logits are never held at the larger size.
    """
    same_size = predictions.shape[-2:] == (height, width)
    if not predictions.is_floating_point() or same_size or height * width == 0:
        return predicted_classes(predictions, height, width, ignore_index)
    dtype = torch.promote_types(predictions.dtype, torch.float32)
    largest = classes = None
    for first, logits in enumerate(predictions.split(_CLASSES_AT_ONCE, 1)):
        logits = interpolate(logits.to(dtype), (height, width), mode="bilinear")
        value, place = logits.max(1)
        place = place + first * _CLASSES_AT_ONCE
        if first == 0:
            largest, classes = value, place
            continue
        larger = (value > largest) | (value.isnan() & ~largest.isnan())  # NaN counts as the largest, as in argmax
        largest, classes = torch.where(larger, value, largest), torch.where(larger, place, classes)
    return torch.where(classes == ignore_index, -1, classes)
