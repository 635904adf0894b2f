"""The pixel-anchor loss of one layer (Eqs. 3-4).

    s_np = a^n · v_p / τ                              similarity of anchor n and pixel p
    Z_n  = log Σ_{p negative of n} exp(s_np)           -inf if class n has no negative
    L    = 1/|C| Σ_{n∈C} 1/|P^n| Σ_{p∈P^n} softplus(Z_n - s_np)

P^n are the pixels with label n, and C the classes with at least one pixel. softplus(Z - s) = -log e^s / (e^s + Σ_neg
e^{s'}) is InfoNCE whose denominator holds one positive and all negatives, but not the other positives.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

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
def pixel_anchor_loss(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    *,
    negatives: Tensor | None = None,
    base: Tensor | None = None,
    temperature: float = 0.1,
    ignore_index: int = 255,
    normalize: bool = True,
) -> Tensor:
    """InfoNCE between class anchors and the pixels of one layer (Eqs. 3-4).

    The negatives of anchor n are the pixels with ``negatives == n`` and the pixels of ``base`` whose label is not n,
    each once. If neither map is given, every pixel of a different class is a negative.

    Args:
        features: (B, D, h, w), or (B, D, z, h, w) of a volume; float16, bfloat16, float32 or float64, any strides.
        labels: (B, H, W) or (B, 1, H, W) integers, brought to (h, w) by nearest sampling; for volumes (B, Z, H, W)
            or (B, 1, Z, H, W). Pixels with a label outside 0..N-1 or equal to ``ignore_index`` are
            ignored, even if they are in ``negatives`` or ``base``.
        anchors: (N, D), as ``class_anchors`` or ``fuse_anchors`` returns them; differentiable.
        negatives: a class map, not the name of a rule: (B, h, w) or (B, z, h, w) integers, the class each pixel is a
            negative of, or any value outside 0..N-1 for none.
        base: (B, h, w) or (B, z, h, w) bool.
        temperature: τ.
        ignore_index: the label of ignored pixels.
        normalize: embeddings are x / ‖x‖₂ over D.

    Returns:
        A scalar, float32, or float64 for float64 features. Without a valid pixel it is 0, still attached to the
        autograd graph. NaN or inf at a valid pixel gives NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    checks.feature_map("features", features)
    checks.ignore_index(ignore_index)
    checks.real("temperature", temperature, low=0.0, open_low=True)
    checks.flag("normalize", normalize)
    dims = features.ndim - 2
    labels = checks.class_map("labels", labels, dims=dims)
    checks.together("features", features, "labels", labels)
    batch, channels, *size = features.shape
    checks.samples_from("labels", labels, *size)
    checks.tensor("anchors", anchors, "floating-point anchors (N, D)")
    if not anchors.is_floating_point():
        raise TypeError(
            f"anchors: expected floating-point anchors (N, D), got {checks.describe(anchors)}. "
            "Pass those that class_anchors returns."
        )
    if anchors.ndim != 2 or anchors.shape[0] == 0 or anchors.shape[1] != channels:
        raise ValueError(
            f"anchors: expected shape (N, {channels}) with the channels of features and N of at least 1, "
            f"got {checks.describe(anchors)}. Pass those that class_anchors returns for these features."
        )
    checks.together("features", features, "anchors", anchors, batch=False)
    layer = (batch, *size)
    if negatives is not None:
        negatives = checks.class_map("negatives", negatives, shape=layer, dims=dims).long()
        checks.together("features", features, "negatives", negatives)
    if base is not None:
        checks.tensor("base", base, "a bool map (B, h, w)")
        if base.dtype != torch.bool:
            raise TypeError(f"base: expected a bool map (B, h, w), got {checks.describe(base)}. Pass base != 0.")
        if tuple(base.shape) != layer:
            raise ValueError(
                f"base: expected shape {layer}, that of the features, got {checks.describe(base)}. "
                "Resample it to this size."
            )
        checks.together("features", features, "base", base)
    if choose_kernels([features], anchors.shape[0]) == "triton":
        return _pixel_anchor_loss(
            maps.plane_stack(features),
            labels,
            anchors,
            negatives,
            base,
            float(temperature),
            ignore_index,
            normalize,
            maps.volume_sides([features]),
        )[0]
    if negatives is None and base is None:
        base = torch.ones(layer, dtype=torch.bool, device=features.device)
    targets = maps.targets(labels, tuple(size), anchors.shape[0], ignore_index)
    embeddings = pixel_embeddings(features, targets >= 0, normalize)
    return anchor_info_nce(embeddings, targets, anchors, negatives, base, temperature)


def anchor_info_nce(
    embeddings: Embeddings,
    targets: Tensor,
    anchors: Tensor,
    negatives: Tensor | None,
    base: Tensor | None,
    temperature: float,
) -> Tensor:
    """The reference of Eqs. 3-4. targets (B, *size) holds the class of each pixel, -1 for none."""
    label = targets.flatten().clamp(min=0)
    counts = label.new_zeros(anchors.shape[0]).index_add(0, label, (targets >= 0).flatten().long())
    contrast = anchor_contrast(embeddings, targets, anchors, counts, negatives, base, temperature)
    return positive_terms(contrast, contrast.Z, contrast.has_negative, counts).sum()


class Contrast(NamedTuple):
    """Similarities of one layer's P pixels to the N anchors."""

    valid: Tensor
    """(P,) bool, False for an ignored pixel."""
    label: Tensor
    """(P,) its class; 0 for an ignored pixel."""
    own: Tensor
    """(P,) similarity to the anchor of its class."""
    Z: Tensor
    """(N,) log-sum-exp of the negatives; valid where ``has_negative``."""
    has_negative: Tensor
    """(N,) bool."""


@unchanged_by_autocast
def anchor_contrast(
    embeddings: Embeddings,
    targets: Tensor,
    anchors: Tensor,
    counts: Tensor,
    negatives: Tensor | None,
    base: Tensor | None,
    temperature: float,
) -> Contrast:
    """Similarities and Z_n of these pixels. ``counts`` are those of the whole batch, on all ranks."""
    x, scale, moderate = embeddings
    target = targets.flatten(1)  # (B, P)
    valid, label = target >= 0, target.clamp(min=0)
    classes = torch.arange(anchors.shape[0], device=x.device)

    # The anchor of a class without pixels is in no term; a NaN there must not leak into the others' gradients.
    anchors = torch.where((counts > 0).unsqueeze(1), anchors.to(x.dtype), 0.0)
    similarity = torch.bmm(anchors.expand(x.shape[0], -1, -1), x) * (scale / temperature)  # (B, N, P)
    own = similarity.gather(1, label.unsqueeze(1))

    # Without base pixels few pixels are negatives. Where values may be read, only these are looked at.
    looked_at = valid & (negatives.flatten(1) >= 0) if moderate and negatives is not None and base is None else None

    def pixels(values: Tensor) -> Tensor:
        return values.flatten(0, 1) if looked_at is None else values[looked_at]

    is_negative = torch.zeros_like(classes, dtype=torch.bool)
    if negatives is not None:
        is_negative = is_negative | (pixels(negatives.flatten(1)).unsqueeze(1) == classes)
    if base is not None:
        is_negative = is_negative | (pixels(base.flatten(1)).unsqueeze(1) & (pixels(label).unsqueeze(1) != classes))
    is_negative = is_negative & pixels(valid).unsqueeze(1)  # (pixels, N)
    has_negative = is_negative.any(0)
    # logsumexp has no derivative where all terms are -inf: classes without negatives are replaced before and after it.
    z = torch.where(is_negative, pixels(similarity.mT), -torch.inf)
    z = torch.where(has_negative, torch.where(has_negative, z, 0.0).logsumexp(0), 0.0)
    return Contrast(valid.flatten(), label.flatten(), own.flatten(), z, has_negative)


def positive_terms(contrast: Contrast, Z: Tensor, has_negative: Tensor, counts: Tensor) -> Tensor:
    """Each pixel's term (P,) of the loss, for Z and counts of the whole batch, on all ranks."""
    label, own = contrast.label, contrast.own
    # -log σ(s - Z) = softplus(Z - s), numerically stable for both signs. 0 · s propagates a NaN or inf of a pixel whose
    # class has no negative.
    term = torch.where(has_negative[label], -F.logsigmoid(own - Z[label]), 0.0) + 0.0 * own
    return _positive_weight(contrast, counts) * term


def slope_of_log_sums(contrast: Contrast, Z: Tensor, has_negative: Tensor, counts: Tensor) -> Tensor:
    """G (N,), the derivative of Σ ``positive_terms`` with respect to Z: Σ σ(Z_n - s_np) / (|C| |P^n|) over the
    positives."""
    label = contrast.label
    share = torch.where(has_negative[label], torch.sigmoid(Z[label] - contrast.own), 0.0)
    return torch.zeros_like(Z).index_add(0, label, _positive_weight(contrast, counts) * share)


def _positive_weight(contrast: Contrast, counts: Tensor) -> Tensor:
    return contrast.valid.to(contrast.own.dtype) / (counts[contrast.label] * (counts > 0).sum()).clamp(min=1)


@torch.library.custom_op("contextrast::pixel_anchor_loss", mutates_args=())
def _pixel_anchor_loss(
    features: Tensor,
    labels: Tensor,
    anchors: Tensor,
    negatives: Tensor | None,
    base: Tensor | None,
    temperature: float,
    ignore_index: int,
    normalize: bool,
    volume: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, dL/danchors, and what the backward pass reads: codes y of the labels and e of the negatives,
    base pixels or the similarity of hard negatives, â, Z, coefficients. volume: as in ``class_anchors``."""
    from contextrast_kernels.kernels import pixel_anchor

    with on_device(features):
        loss, pull, y, terms = pixel_anchor.forward(
            features, labels, anchors, negatives, base, temperature, ignore_index, normalize, volume
        )
    per_pixel: Any = terms.similarity if terms.base is None else terms.base  # one of the two is a tensor
    return loss, pull, y, terms.e, per_pixel, terms.table, terms.Z, terms.coefficients


@_pixel_anchor_loss.register_fake
def _(features, labels, anchors, negatives, base, temperature, ignore_index, normalize, volume):
    (N, D), dtype = anchors.shape, compute_dtype(features.dtype)
    dense = base is not None or negatives is None
    rows = [features.new_empty(shape, dtype=dtype) for shape in ((1, N, D), (1, N), (1, 2, N))]
    codes = [empty_codes([features], N, kind) for kind in (None, None, torch.uint8 if dense else dtype)]
    return features.new_empty((), dtype=dtype), features.new_empty((N, D), dtype=dtype), *codes, *rows


@torch.library.custom_op("contextrast::pixel_anchor_loss_backward", mutates_args=())
def _pixel_anchor_loss_backward(
    gradient: Tensor,
    features: Tensor,
    y: Tensor,
    e: Tensor,
    per_pixel: Tensor,
    table: Tensor,
    Z: Tensor,
    coefficients: Tensor,
    temperature: float,
    normalize: bool,
) -> Tensor:
    from contextrast_kernels.kernels import pixel_anchor

    base, similarity = (per_pixel, None) if per_pixel.dtype == torch.uint8 else (None, per_pixel)
    terms = pixel_anchor.Terms(e, base, similarity, table, Z, coefficients)
    with on_device(features):
        return pixel_anchor.backward(gradient, features, y, terms, temperature, normalize)


@_pixel_anchor_loss_backward.register_fake
def _(gradient, features, *_):
    return torch.empty_like(features)


differentiable_once("pixel_anchor_loss", _pixel_anchor_loss_backward)


def _save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # otherwise torch allocates zero gradients for all outputs
    features, _labels, anchors, _negatives, _base, ctx.temperature, _ignore_index, ctx.normalize, _volume = inputs
    ctx.save_for_backward(features, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.anchors_dtype = anchors.dtype


def _backward(ctx, gradient, *_):
    if gradient is None:
        return (None,) * 9
    features, pull, *saved = ctx.saved_tensors
    dx = danchors = None
    if ctx.needs_input_grad[0]:
        dx = _pixel_anchor_loss_backward(gradient, features, *saved, ctx.temperature, ctx.normalize)
    if ctx.needs_input_grad[2]:
        danchors = (gradient * pull).to(ctx.anchors_dtype)
    return dx, None, danchors, *(None,) * 6


_pixel_anchor_loss.register_autograd(_backward, setup_context=_save_for_backward)
one_call_per_sample(_pixel_anchor_loss)
one_call_per_sample(_pixel_anchor_loss_backward)
