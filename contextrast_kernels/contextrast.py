"""The Contextrast loss: anchors → fusion → negatives → pixel-anchor loss, summed over the encoder's layers (Eqs. 1-4, 6-7).

    L_PA = Σ_i λ_i L_i
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from contextrast_kernels import bane, checks, maps
from contextrast_kernels.anchors import fuse_anchors, mean_embeddings
from contextrast_kernels.embedding import unit
from contextrast_kernels.hashing import STREAM_BASE, image_hash
from contextrast_kernels.pixel_anchor import anchor_info_nce


def contextrast_loss(
    features: Sequence[Tensor],
    labels: Tensor,
    predictions: Tensor,
    *,
    num_classes: int,
    ignore_index: int = 255,
    layer_weights: Sequence[float] = (1.0, 0.7, 0.4, 0.1),
    temperature: float = 0.1,
    fusion_weight: float = 0.7,
    negatives: str = "bane",
    ratio: float = 0.5,
    base_rate: float = 0.0,
    distance_at: str = "layer",
    normalize: bool = True,
    normalize_anchors: bool = False,
    detach_anchors: bool = False,
    seed: int | Tensor = 0,
) -> Tensor:
    """The pixel-anchor loss of all encoder layers, L_PA = Σ_i λ_i L_i (Eq. 4). Add 0.1 of it to the cross-entropy (Eq. 5).

    Args:
        features: projected feature maps (B, D, h_i, w_i), one a layer, from high to low resolution; the same D and dtype in
            all (float16, bfloat16, float32 or float64), any strides.
        labels: (B, H, W) or (B, 1, H, W) integers, brought to each layer by nearest sampling. A label outside 0..N-1 counts as
            ignored.
        predictions: the network's final logits (B, N, H', W') or their class map (B, H', W'), of any size. No gradient.
        num_classes: N.
        ignore_index: the label of pixels that take no part.
        layer_weights: λ_i, one for each layer.
        temperature: τ.
        fusion_weight: w_h, the share of the last layer in the anchors of the lower ones.
        negatives, ratio, distance_at: the hard negatives, as in ``bane_negatives``.
        base_rate: share of the valid pixels that are also negatives of every class but their own; 0 none, 1 all.
        normalize: embeddings are x / ‖x‖₂ over D.
        normalize_anchors: L2-normalise the anchors after fusion.
        detach_anchors: no gradient through the anchors.
        seed: int, or an int64 tensor of one element, which never synchronises.

    Returns:
        A scalar, float32, or float64 for float64 features. Where nothing can be contrasted it is 0 with a live graph and zero
        gradients. NaN or inf at a valid pixel gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, range or device; the sentence names it.
    """
    check_options(
        num_classes=num_classes,
        ignore_index=ignore_index,
        layer_weights=layer_weights,
        temperature=temperature,
        fusion_weight=fusion_weight,
        negatives=negatives,
        ratio=ratio,
        base_rate=base_rate,
        distance_at=distance_at,
        normalize=normalize,
        normalize_anchors=normalize_anchors,
        detach_anchors=detach_anchors,
    )
    checks.seed(seed)
    labels, predictions = check_inputs(features, labels, predictions, num_classes, len(layer_weights))
    loss, _ = total_loss(
        features,
        labels,
        predictions,
        num_classes=num_classes,
        ignore_index=ignore_index,
        layer_weights=layer_weights,
        temperature=temperature,
        fusion_weight=fusion_weight,
        negatives=negatives,
        ratio=ratio,
        base_rate=base_rate,
        distance_at=distance_at,
        normalize=normalize,
        normalize_anchors=normalize_anchors,
        detach_anchors=detach_anchors,
        seed=seed,
    )
    return loss


def check_options(
    *,
    num_classes,
    ignore_index,
    layer_weights,
    temperature,
    fusion_weight,
    negatives,
    ratio,
    base_rate,
    distance_at,
    normalize,
    normalize_anchors,
    detach_anchors,
) -> None:
    """Everything that can be said without a batch."""
    checks.num_classes(num_classes)
    checks.ignore_index(ignore_index)
    if not isinstance(layer_weights, Sequence) or isinstance(layer_weights, str) or len(layer_weights) == 0:
        raise TypeError(f"layer_weights: expected one number for each layer, got {checks.describe(layer_weights)}")
    for weight in layer_weights:
        checks.real("layer_weights", weight, low=0.0)
    checks.real("temperature", temperature, low=0.0, open_low=True)
    checks.real("fusion_weight", fusion_weight, low=0.0, high=1.0)
    bane.check_selection(ratio, negatives, distance_at)
    checks.real("base_rate", base_rate, low=0.0, high=1.0)
    for name, value in (
        ("normalize", normalize),
        ("normalize_anchors", normalize_anchors),
        ("detach_anchors", detach_anchors),
    ):
        checks.flag(name, value)
    if base_rate == 0 and (negatives == "none" or ratio == 0):
        raise ValueError(
            f"negatives: expected some source of negatives, got negatives={negatives!r} with ratio={ratio} and base_rate=0; "
            "set base_rate above 0, or choose 'bane' or 'semi-hard' with a ratio above 0"
        )


def check_inputs(features, labels, predictions, num_classes, layers) -> tuple[Tensor, Tensor]:
    """The batch; returns labels and predictions with their rank settled."""
    if not isinstance(features, Sequence) or len(features) == 0:
        raise TypeError(
            f"features: expected a list of feature maps (B, D, h, w), one a layer, got {checks.describe(features)}"
        )
    for i, x in enumerate(features):
        checks.feature_map(f"features[{i}]", x)
    if len(features) != layers:
        raise ValueError(f"layer_weights: expected {len(features)} weights, one for each layer in features, got {layers}")
    labels = checks.class_map("labels", labels)
    predictions = checks.predictions("predictions", predictions, num_classes)
    first = features[0]
    for i, x in enumerate(features):
        name = f"features[{i}]"
        checks.together("features[0]", first, name, x)
        if x.shape[1] != first.shape[1] or x.dtype != first.dtype:
            raise ValueError(
                f"{name}: expected {first.shape[1]} channels of {str(first.dtype).removeprefix('torch.')}, as features[0] has, "
                f"got {checks.describe(x)}; project all layers to one size and dtype"
            )
        previous = features[max(i - 1, 0)]
        if x.shape[2] > previous.shape[2] or x.shape[3] > previous.shape[3]:
            raise ValueError(
                f"{name}: expected at most the size {tuple(previous.shape[2:])} of the layer before, got {tuple(x.shape[2:])}; "
                "list the layers from high to low resolution"
            )
    for name, value in (("labels", labels), ("predictions", predictions)):
        checks.together("features[0]", first, name, value)
        checks.samples_from(name, value, *first.shape[-2:])
    return labels, predictions


def total_loss(
    features,
    labels,
    predictions,
    *,
    num_classes,
    ignore_index,
    layer_weights,
    temperature,
    fusion_weight,
    negatives,
    ratio,
    base_rate,
    distance_at,
    normalize,
    normalize_anchors,
    detach_anchors,
    seed,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_PA of checked arguments, and what happened in each layer: detached tensors (I,).

    loss: L_i; classes: |C|; positives: valid pixels; negatives: chosen and base pixels; errors: wrongly predicted pixels.
    """
    sizes = [tuple(x.shape[-2:]) for x in features]
    targets = [maps.targets(labels, *size, num_classes, ignore_index) for size in sizes]
    hard = bane.layer_negatives(
        predictions.detach(), labels, sizes, num_classes, ratio, negatives, distance_at, ignore_index, seed
    )

    anchors, counts = zip(
        *(mean_embeddings(x, target, num_classes, normalize) for x, target in zip(features, targets)), strict=True
    )
    if detach_anchors:
        anchors = [a.detach() for a in anchors]
    fused = [
        *(fuse_anchors(a, n, anchors[-1], counts[-1], fusion_weight) for a, n in zip(anchors[:-1], counts[:-1])),
        anchors[-1],
    ]
    if normalize_anchors:
        fused = [unit(a) for a in fused]

    losses, drawn = [], []
    for i, (x, target, a, (_, chosen), size) in enumerate(zip(features, targets, fused, hard, sizes)):
        base = None
        drawn_here = chosen >= 0
        if base_rate > 0:
            base = (image_hash(seed, STREAM_BASE + i, *size, x.device) < base_rate * 2.0**32) & (target >= 0)
            drawn_here = drawn_here | base
        losses.append(anchor_info_nce(x, target, a, chosen, base, temperature, normalize))
        drawn.append(drawn_here.sum())
    losses = torch.stack(losses)
    weights = losses.new_tensor(list(layer_weights))
    report = {
        "loss": losses.detach(),
        "classes": torch.stack([(n > 0).sum() for n in counts]),
        "positives": torch.stack([n.sum() for n in counts]),
        "negatives": torch.stack(drawn),
        "errors": torch.stack([(errors >= 0).sum() for errors, _ in hard]),
    }
    return (weights * losses).sum(), report
