"""Class anchors and their fusion across layers.

    a^n   = Σ_p v_p [y_p = n] / Σ_p [y_p = n]         Eq. 1: the mean embedding of the batch's pixels with label n
    â_i^n = (1 - w_h) a_i^n + w_h a_I^n,  â_I = a_I   the last layer's anchor is mixed into those of the other layers

v are the pixel embeddings of ``embedding.py``, i is a layer and I the last one.
"""

import torch
from torch import Tensor

from contextrast_kernels import checks, maps
from contextrast_kernels.backend import (
    choose_kernels,
    differentiable_once,
    empty_codes,
    on_device,
    unchanged_by_autocast,
)
from contextrast_kernels.embedding import Embeddings, compute_dtype, pixel_embeddings
from contextrast_kernels.loops import one_call_per_sample


@checks.takes_subclasses
def class_anchors(
    features: Tensor, labels: Tensor, num_classes: int, *, ignore_index: int = 255, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """The mean embedding of every class over the batch (Eq. 1).

    Args:
        features: (B, D, h, w), or (B, D, z, h, w) of a volume; float16, bfloat16, float32 or float64, any strides.
        labels: (B, H, W) or (B, 1, H, W) integers of any size, brought to (h, w) by nearest sampling. For volumes
            (B, Z, H, W) or (B, 1, Z, H, W); (B, 1, H, W) is then a volume of depth one.
        num_classes: N. A label outside 0..N-1 counts as ignored.
        ignore_index: the label of ignored pixels.
        normalize: embeddings are x / ‖x‖₂ over D; without it, x itself.

    Returns:
        anchors: (N, D), float32, or float64 for float64 features. A class without pixels has a zero row.
        counts: (N,) int64, the number of pixels of each class.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size or device; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    checks.feature_map("features", features)
    checks.num_classes(num_classes)
    checks.ignore_index(ignore_index)
    checks.flag("normalize", normalize)
    labels = checks.class_map("labels", labels, dims=features.ndim - 2)
    checks.together("features", features, "labels", labels)
    size = features.shape[2:]
    checks.samples_from("labels", labels, *size)
    if choose_kernels([features], num_classes) == "triton":
        anchors, counts, _ = _class_anchors(
            maps.plane_stack(features),
            labels,
            num_classes,
            ignore_index,
            normalize,
            maps.volume_sides([features]),
        )
        return anchors, counts
    targets = maps.targets(labels, size, num_classes, ignore_index)
    return mean_embeddings(pixel_embeddings(features, targets >= 0, normalize), targets, num_classes)


def mean_embeddings(embeddings: Embeddings, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """The reference of Eq. 1. targets (B, *size) holds the class of each pixel, -1 for none."""
    sums, counts = class_sums(embeddings, targets, num_classes)
    return means(sums, counts), counts


@unchanged_by_autocast
def class_sums(embeddings: Embeddings, targets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Σ_p v_p (N, D) and the number of pixels (N,) of every class."""
    x, scale, moderate = embeddings
    target = targets.flatten(1)
    if moderate and num_classes <= x.shape[1]:
        is_class = target.unsqueeze(1) == torch.arange(num_classes, device=x.device).unsqueeze(1)  # (B, N, P)
        return torch.bmm(x, (is_class * scale).mT).sum(0).T, is_class.sum((0, 2))
    # A matrix product would spread a NaN from one class to all. Pixels without a class are added to an extra row N.
    row = torch.where(target >= 0, target, num_classes).flatten()
    sums = x.new_zeros(num_classes + 1, x.shape[1]).index_add(0, row, (x * scale).mT.flatten(0, 1))[:-1]
    counts = row.new_zeros(num_classes + 1).index_add(0, row, torch.ones_like(row))[:-1]
    return sums, counts


def means(sums: Tensor, counts: Tensor) -> Tensor:
    """Divide sums (..., N, D) by counts (..., N); a class without pixels gets zero."""
    return sums / counts.clamp(min=1).unsqueeze(-1)


@checks.takes_subclasses
def fuse_anchors(
    anchors: Tensor, counts: Tensor, top_anchors: Tensor, top_counts: Tensor, weight: float = 0.7
) -> Tensor:
    """Mix a lower layer's anchors with the last layer's (below Eq. 1): (1 - weight) * anchors + weight * top_anchors.

    A class without pixels in the last layer keeps its own anchor; a class without pixels in the lower layer has none
    (a zero row).

    Args:
        anchors, counts: (N, D) and (N,) of the lower layer, as ``class_anchors`` returns them.
        top_anchors, top_counts: the same of the last layer.
        weight: w_h, the share of the last layer, between 0 and 1.

    Returns:
        (N, D) fused anchors.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
    """
    _check_anchors("anchors", anchors)
    for name, value in (("counts", counts), ("top_anchors", top_anchors), ("top_counts", top_counts)):
        checks.tensor(name, value, "a tensor as class_anchors returns it")
        checks.together("anchors", anchors, name, value, batch=False)
    _check_anchors("top_anchors", top_anchors)
    if top_anchors.shape != anchors.shape:
        raise ValueError(
            f"top_anchors: expected shape {tuple(anchors.shape)}, that of anchors, got {checks.describe(top_anchors)}. "
            "Use the same N and D in all layers."
        )
    for name, value in (("counts", counts), ("top_counts", top_counts)):
        if value.is_floating_point():
            raise TypeError(
                f"{name}: expected integers, as class_anchors returns them, got {checks.describe(value)}. "
                "Pass its second output."
            )
        if tuple(value.shape) != (anchors.shape[0],):
            raise ValueError(
                f"{name}: expected shape ({anchors.shape[0]},), one for each anchor, got {checks.describe(value)}. "
                "Pass the counts that class_anchors returned with these anchors."
            )
    checks.real("weight", weight, low=0.0, high=1.0)
    mixed = (1 - weight) * anchors + weight * top_anchors
    fused = torch.where((top_counts > 0).unsqueeze(1), mixed, anchors)
    return torch.where((counts > 0).unsqueeze(1), fused, 0.0)


def _check_anchors(name: str, value: Tensor) -> None:
    checks.tensor(name, value, "floating-point anchors (N, D)")
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: expected floating-point anchors (N, D), got {checks.describe(value)}. "
            "Pass those that class_anchors returns."
        )
    if value.ndim != 2:
        raise ValueError(
            f"{name}: expected anchors (N, D), got {checks.describe(value)}. Pass those that class_anchors returns."
        )


@torch.library.custom_op("contextrast::class_anchors", mutates_args=())
def _class_anchors(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int,
    normalize: bool,
    volume: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors (N, D), counts (N,), and the label codes that the backward pass reads.

    volume: (z, h, w) of features that are the ``maps.plane_stack`` of a volume, whose labels are (B, Z, H, W).
    """
    from contextrast_kernels.kernels import anchors

    with on_device(features):
        return anchors.forward(features, labels, num_classes, ignore_index, normalize, volume)


@_class_anchors.register_fake
def _(features, labels, num_classes, ignore_index, normalize, volume):
    anchors = features.new_empty(num_classes, features.shape[1], dtype=compute_dtype(features.dtype))
    return anchors, features.new_empty(num_classes, dtype=torch.int64), empty_codes([features], num_classes)


@torch.library.custom_op("contextrast::class_anchors_backward", mutates_args=())
def _class_anchors_backward(
    gradient: Tensor, features: Tensor, counts: Tensor, codes: Tensor, normalize: bool
) -> Tensor:
    from contextrast_kernels.kernels import anchors

    with on_device(features):
        return anchors.backward(gradient, features, counts, codes, normalize)


@_class_anchors_backward.register_fake
def _(gradient, features, counts, codes, normalize):
    return torch.empty_like(features)


differentiable_once("class_anchors", _class_anchors_backward)


def _save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # otherwise torch allocates zero gradients for all outputs
    features, _labels, _num_classes, _ignore_index, ctx.normalize, _volume = inputs
    _, counts, codes = output
    ctx.save_for_backward(features, counts, codes)
    ctx.mark_non_differentiable(counts, codes)


def _backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 6
    features, counts, codes = ctx.saved_tensors
    return _class_anchors_backward(gradient, features, counts, codes, ctx.normalize), *(None,) * 5


_class_anchors.register_autograd(_backward, setup_context=_save_for_backward)
one_call_per_sample(_class_anchors)
one_call_per_sample(_class_anchors_backward)
