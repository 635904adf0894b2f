"""The Contextrast loss: anchors → fusion → negatives → pixel-anchor loss, summed over the encoder's layers.

    L_PA = Σ_i λ_i L_i        Eq. 4; the objective is the cross-entropy + 0.1 · L_PA (Eq. 5)

i counts the layers from high to low resolution.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from contextrast_kernels import bane, checks, maps, ranks
from contextrast_kernels.anchors import class_sums, fuse_anchors, means
from contextrast_kernels.backend import choose_kernels, differentiable_once, empty_codes, is_eager, on_device
from contextrast_kernels.distance import check_sampling
from contextrast_kernels.embedding import compute_dtype, pixel_embeddings, unit
from contextrast_kernels.hashing import STREAM_BASE, image_hash, seed_tensor
from contextrast_kernels.loops import one_call_per_sample
from contextrast_kernels.pixel_anchor import anchor_contrast, positive_terms, slope_of_log_sums


@checks.takes_subclasses
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
    base_sampler: Callable | None = None,
    distance_at: str = "layer",
    normalize: bool = True,
    normalize_anchors: bool = False,
    detach_anchors: bool = False,
    sampling: float | Sequence[float] | None = None,
    seed: int | Tensor = 0,
    group=None,
) -> Tensor:
    """The pixel-anchor loss of all encoder layers, L_PA = Σ_i λ_i L_i (Eq. 4). Add 0.1 of it to the cross-entropy.

    Args:
        features: projected feature maps (B, D, h_i, w_i), one per layer, from high to low resolution, or those of
            volumes (B, D, z_i, h_i, w_i). All have the same D and dtype (float16, bfloat16, float32 or float64), and
            any strides.
        labels: (B, H, W) or (B, 1, H, W) integers, brought to each layer by nearest sampling. A label outside 0..N-1
            counts as ignored. For volumes (B, Z, H, W) or (B, 1, Z, H, W); (B, 1, H, W) is then a volume of depth
            one.
        predictions: the network's final logits (B, N, H', W') or class map (B, H', W'), of any size, or those of
            volumes. They get no gradient.
        num_classes: N, at least 2. With 2, logits may have one channel, as those of a binary network: class 1 is
            predicted where it is positive.
        ignore_index: the label of ignored pixels. If it is one of 0..N-1, that class is also left out of the
            predictions.
        layer_weights: λ_i, one for each layer.
        temperature: τ.
        fusion_weight: w_h, the share of the last layer in the anchors of the lower ones.
        negatives: the name of the rule that chooses the hard negatives, "bane", "semi-hard" or "none", as in
            ``bane_negatives``.
        ratio, distance_at, sampling: as in ``bane_negatives``.
        base_rate: the share of the valid pixels that are negatives of every class but their own, in addition to the
            hard negatives; 0: none, 1: all.
        base_sampler: a callable that chooses these pixels in each layer instead of base_rate, such as
            ``Sampler("common-count", 10000, 2500)`` of MS/CS. With a group it chooses among the rank's own pixels.
        normalize: embeddings are x / ‖x‖₂ over D.
        normalize_anchors: L2-normalise the anchors after fusion.
        detach_anchors: no gradient through the anchors.
        seed: int, or an int64 tensor of one element on the features' device; neither synchronises. It must be
            the same on all ranks of a group.
        group: a torch.distributed process group. All its ranks must call this together, and the loss is that of the
            pixels of all ranks (docs/distributed.md). None: the loss of this process alone.

    Returns:
        A scalar, float32, or float64 for float64 features. If nothing can be contrasted it is 0, still attached to
        the autograd graph, with zero gradients. NaN or inf at a valid pixel gives NaN. With a group every rank gets the
        same loss, and the mean of the ranks' gradients, as DDP forms it, is the gradient of one process.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
            Every rank raises if ranks differ in options, layers, channels or dtype.
        RuntimeError: the requested backend cannot run, or torch.distributed does not know the group.
    """
    options = Options(
        num_classes=num_classes,
        ignore_index=ignore_index,
        layer_weights=layer_weights,
        temperature=temperature,
        fusion_weight=fusion_weight,
        negatives=negatives,
        ratio=ratio,
        base_rate=base_rate,
        base_sampler=base_sampler,
        distance_at=distance_at,
        normalize=normalize,
        normalize_anchors=normalize_anchors,
        detach_anchors=detach_anchors,
        sampling=sampling,
        group=ranks.name_of(group),
    )
    loss, _ = total_loss(features, labels, predictions, options, seed)
    return loss


@dataclass(frozen=True)
class Options:
    """The keywords of ``contextrast_loss``, after every check that needs no batch."""

    num_classes: int
    ignore_index: int
    layer_weights: Sequence[float]
    temperature: float
    fusion_weight: float
    negatives: str
    ratio: float
    base_rate: float
    base_sampler: Callable | None
    distance_at: str
    normalize: bool
    normalize_anchors: bool
    detach_anchors: bool
    sampling: float | Sequence[float] | None
    group: str | None
    """The name of the process group."""

    def __post_init__(self):
        checks.several_classes(self.num_classes)
        checks.ignore_index(self.ignore_index)
        checks.weights("layer_weights", self.layer_weights)
        checks.real("temperature", self.temperature, low=0.0, open_low=True)
        checks.real("fusion_weight", self.fusion_weight, low=0.0, high=1.0)
        bane.check_selection(self.ratio, self.negatives, self.distance_at)
        checks.real("base_rate", self.base_rate, low=0.0, high=1.0)
        checks.flag("normalize", self.normalize)
        checks.flag("normalize_anchors", self.normalize_anchors)
        checks.flag("detach_anchors", self.detach_anchors)
        check_sampling(self.sampling, 2 if isinstance(self.sampling, Sequence) and len(self.sampling) == 2 else 3)
        if self.base_sampler is not None and (not callable(self.base_sampler) or self.base_rate > 0):
            raise ValueError(
                f"base_sampler: expected a callable, such as a ck.Sampler, together with base_rate=0, "
                f"got {checks.describe(self.base_sampler)} and base_rate={self.base_rate}. Set only one of them."
            )
        if self.base_sampler is None and self.base_rate == 0 and (self.negatives == "none" or self.ratio == 0):
            raise ValueError(
                f"negatives: expected some source of negatives, got negatives={self.negatives!r}, ratio={self.ratio} "
                "and base_rate=0. Set base_rate above 0, or choose 'bane' or 'semi-hard' with a ratio above 0."
            )


def check_layers(features, layer_weights: Sequence[float] | None = None) -> None:
    """Check the feature maps: one for each weight, of one dtype and D, from high to low resolution."""
    if not isinstance(features, Sequence) or len(features) == 0:
        hint = "Pass [x] for one map, list(features.values()) for a dict"
        if callable(features):  # the tap or its method was passed instead of the list that it returns
            hint = "Call it, as in tap.features()"
        raise TypeError(
            "features: expected a list of feature maps (B, D, h, w), one a layer, "
            f"got {checks.describe(features)}. {hint}."
        )
    for i, x in enumerate(features):
        checks.feature_map(f"features[{i}]", x)
    if layer_weights is not None and len(features) != len(layer_weights):
        raise ValueError(
            f"layer_weights: expected {len(features)} weights, one for each layer in features, "
            f"got {len(layer_weights)}. Set layer_weights, such as (1.0, 0.7, 0.4) for three layers."
        )
    first = features[0]
    for i, x in enumerate(features):
        name = f"features[{i}]"
        checks.together("features[0]", first, name, x)
        if x.shape[1] != first.shape[1] or x.dtype != first.dtype:
            raise ValueError(
                f"{name}: expected {first.shape[1]} channels of {checks.name_of(first.dtype)}, as features[0] has, "
                f"got {checks.describe(x)}. Project all layers to one size and dtype."
            )
        before = tuple(features[max(i - 1, 0)].shape[2:])
        if x.ndim != first.ndim:
            raise ValueError(
                f"{name}: expected a layer with {first.ndim - 2} spatial axes, as features[0] has, "
                f"got {checks.describe(x)}. Pass maps or volumes, not both."
            )
        if any(side > above for side, above in zip(x.shape[2:], before)):
            raise ValueError(
                f"{name}: expected at most the size {before} of the layer before, got {tuple(x.shape[2:])}. "
                "List the layers from high to low resolution."
            )


def check_inputs(features, labels, predictions, options: Options) -> tuple[Tensor, Tensor]:
    """Check a batch; return labels and predictions without a channel axis of one."""
    check_layers(features, options.layer_weights)
    first = features[0]
    dims = first.ndim - 2
    labels = checks.class_map("labels", labels, dims=dims)
    predictions = checks.predictions("predictions", predictions, options.num_classes, dims)
    for name, value in (("labels", labels), ("predictions", predictions)):
        checks.together("features[0]", first, name, value)
        checks.samples_from(name, value, *first.shape[2:])
    return labels, predictions


def total_loss(
    features: Sequence[Tensor], labels: Tensor, predictions: Tensor, options: Options, seed: int | Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """L_PA, and a report of detached tensors (I,), one entry per layer.

    loss: L_i; classes: |C|; positives: valid pixels; negatives: chosen and base pixels; errors: wrong pixels.
    """
    labels, predictions = check_inputs(features, labels, predictions, options)
    checks.seed(seed, labels.device)
    sizes = [tuple(x.shape[2:]) for x in features]
    seed = seed_tensor(seed, labels.device)
    selection = (
        predictions.detach(),
        labels,
        sizes,
        options.num_classes,
        options.ratio,
        options.negatives,
        options.distance_at,
        options.ignore_index,
        seed,
        check_sampling(options.sampling, len(sizes[0])),
    )
    backend = choose_kernels(features, options.num_classes)
    if options.group is not None:
        _agree(options.group, features, options, backend)
    if backend == "triton":
        sampled = _sampled_pixels(features, labels, predictions.detach(), options, seed)
        return _fused_loss(features, labels, *bane.negative_codes(*selection), sampled, options, seed)
    hard, errors = bane.layer_negatives(*selection)
    return _reference_loss(features, labels, predictions.detach(), hard, errors, options, seed)


def _fused_anchors(
    anchors: Sequence[Tensor] | Tensor, counts: Sequence[Tensor] | Tensor, options: Options
) -> list[Tensor]:
    if options.detach_anchors:
        anchors = [a.detach() for a in anchors]
    *lower, (top, top_counts) = zip(anchors, counts, strict=True)
    fused = [*(fuse_anchors(a, n, top, top_counts, options.fusion_weight) for a, n in lower), top]
    return [unit(a) for a in fused] if options.normalize_anchors else fused


def weighted_sum(losses: Sequence[Tensor] | Tensor, weights: Sequence[float]) -> Tensor:
    """Σ w_i L_i. The weights stay numbers: a tensor of them would be copied to the device in every step."""
    return torch.stack([weight * loss for weight, loss in zip(weights, losses)]).sum()


def _sampled_pixels(
    features: Sequence[Tensor], labels: Tensor, predictions: Tensor, options: Options, seed: Tensor
) -> list[Tensor]:
    """The base pixels (B, *size) of every layer, bool, that ``base_sampler`` chooses; an empty list without one."""
    if options.base_sampler is None:
        return []
    N, ignore_index, chosen = options.num_classes, options.ignore_index, []
    for i, x in enumerate(features):
        target = maps.targets(labels, x.shape[2:], N, ignore_index)
        predicted = maps.predicted_classes(predictions, x.shape[2:], ignore_index)
        base = options.base_sampler(target, predicted, N, seed, STREAM_BASE + i)
        chosen.append(checks.chosen("base_sampler", base, target.shape) & (target >= 0))
    return chosen


def _drawn_pixels(targets: Sequence[Tensor], options: Options, seed: Tensor) -> list[Tensor]:
    """The base pixels of every layer that ``base_rate`` draws; an empty list for a rate of 0."""
    if options.base_rate == 0:
        return []
    # For an integer, hash < rate · 2³² is the same as hash < ⌈rate · 2³²⌉, and comparing integers does not round.
    limit = math.ceil(options.base_rate * 2.0**32)
    return [
        (image_hash(seed, STREAM_BASE + i, target.shape[1:], target.device) < limit) & (target >= 0)
        for i, target in enumerate(targets)
    ]


def _agree(group: str, features: Sequence[Tensor], options: Options, backend: str) -> None:
    """Check that all ranks have the same options, layers, channels and dtype; their reductions depend on them."""
    first = features[0]
    shapes = f"{int(first.shape[1])} channels in {len(features)} layers of {checks.name_of(first.dtype)}"
    flags = f"normalize={options.normalize}; normalize_anchors={options.normalize_anchors}"
    signature = f"num_classes={options.num_classes}; {shapes}; {flags}; detach_anchors={options.detach_anchors}"
    signature += f"; backend {backend!r}"
    numbers = ("ignore_index", "layer_weights", "temperature", "fusion_weight", "base_rate")
    selection = ("negatives", "ratio", "distance_at", "sampling")
    signature += f"; base_sampler={'None' if options.base_sampler is None else 'given'}"
    settings = "; ".join([signature, *(f"{name}={getattr(options, name)!r}" for name in numbers + selection)])
    # The temperature may follow a schedule, so the signature holds only whether it takes one more reduction.
    ranks.agree(group, f"{signature}; {ranks.close_enough(1 / options.temperature)}", settings)


def _reference_loss(
    features: Sequence[Tensor],
    labels: Tensor,
    predictions: Tensor,
    hard: list[Tensor],
    errors: Tensor,
    options: Options,
    seed: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference, for given hard negatives (B, *size) of every layer.

    With a group it is the loss over the pixels of all ranks, with three reductions forward and one backward. Let l_i be
    a rank's share of L_i, so that L_i = Σ_ranks l_i. The gradient of L_i with respect to a similarity of this rank is

        dL/ds = ∂l/∂s + Σ_n G_n ∂Z_n/∂s,    G_n = ∂L/∂Z_n = -Σ_ranks Σ_{p∈P^n} ∂l/∂s_np,    ∂Z_n/∂s = ∂E_n/∂s

    where E_n is the rank's Σ exp(s - Z_n) over its negatives, with Z_n as a constant. G is reduced together with the
    loss, so the gradient through Z needs no reduction backward; the gradient through the anchors needs one.
    """
    N, group, weights = options.num_classes, options.group, options.layer_weights
    # Widened once, so that a half-precision gradient is summed in float32 and rounded once.
    features = [x.to(compute_dtype(x.dtype)) for x in features]
    if group is not None:
        features = [ranks.DifferentiableOnce.apply(x) for x in features]
    targets = [maps.targets(labels, x.shape[2:], N, options.ignore_index) for x in features]
    embeddings = [pixel_embeddings(x, y >= 0, options.normalize) for x, y in zip(features, targets)]
    base = _sampled_pixels(features, labels, predictions, options, seed) or _drawn_pixels(targets, options, seed)
    bases: Sequence[Tensor | None] = base or [None] * len(features)
    drawn = torch.stack(
        [(chosen >= 0 if base is None else (chosen >= 0) | base).sum() for chosen, base in zip(hard, bases)]
    )

    # 1. Anchors.
    sums, counts = map(torch.stack, zip(*(class_sums(v, y, N) for v, y in zip(embeddings, targets))))
    if group is not None:  # in float64, which holds the numbers of the report exactly
        parts = [sums.double(), counts.double(), drawn.double(), errors.double()]
        total = ranks.Total.apply(torch.cat([part.flatten() for part in parts]), group)
        total, *numbers = total.split([part.numel() for part in parts])
        sums = total.view_as(sums)
        counts, drawn, errors = (x.detach().round().long().view_as(y) for x, y in zip(numbers, (counts, drawn, errors)))
    anchors = means(sums, counts).to(features[0].dtype)
    fused = _fused_anchors(anchors, counts, options)

    # 2. Z.
    contrasts = [
        anchor_contrast(v, y, a, n, chosen, base, options.temperature)
        for v, y, a, n, chosen, base in zip(embeddings, targets, fused, counts, hard, bases)
    ]
    Z = local = torch.stack([contrast.Z for contrast in contrasts])
    has_negative = exists = torch.stack([contrast.has_negative for contrast in contrasts])
    if group is not None:
        bound = 1 / options.temperature if options.normalize else None  # ‖â‖ ≤ 1 and ‖v‖ ≤ 1
        Z = ranks.log_sum_exp(torch.where(exists, local, -torch.inf), group, bound)
        has_negative = ~Z.isneginf()
        Z = torch.where(has_negative, Z, 0.0)

    # 3. The loss.
    layers = list(zip(contrasts, Z, has_negative, counts))
    losses = torch.stack([positive_terms(*layer).sum() for layer in layers])
    loss = weighted_sum(losses, weights)
    if group is not None:
        slopes = torch.cat([slope_of_log_sums(*layer) for layer in layers])
        total = ranks.reduced(torch.cat([losses.double(), slopes.double()]), group)
        total, G = total.to(losses.dtype).split([losses.numel(), slopes.numel()])
        E = torch.where(exists, torch.where(exists, local - Z, 0.0).exp(), 0.0)
        share = weighted_sum(losses + (G.view_as(E) * E).sum(1), weights)
        # The value is the loss of all ranks. The gradient is that of this rank's share times the number of ranks,
        # because DDP divides by that number.
        losses = total
        loss = weighted_sum(losses, weights) + ranks.size(group) * (share - share.detach())
    report = {
        "loss": losses.detach(),
        "classes": (counts > 0).sum(1),
        "positives": counts.sum(1),
        "negatives": drawn,
        "errors": errors,
    }
    return loss, report


def _fused_loss(
    features: Sequence[Tensor],
    labels: Tensor,
    hard: Tensor,
    errors: Tensor,
    sampled: list[Tensor],
    options: Options,
    seed: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss by the fused kernels, for given codes of the hard negatives and given base pixels."""
    planes = (maps.plane_stack(x) for x in features)
    stacks = [x for x in planes if x is not None]  # choose_kernels took the reference where one is None
    arguments = (
        labels,
        hard,
        sampled,
        seed,
        options.num_classes,
        options.ignore_index,
        [float(weight) for weight in options.layer_weights],
        float(options.temperature),
        float(options.fusion_weight),
        float(options.base_rate),
        options.normalize,
        options.normalize_anchors,
        options.detach_anchors,
        errors if options.group is not None else None,
        options.group,
        maps.volume_sides(features),
    )
    if is_eager(features):
        loss, losses, report = _Direct.apply(arguments, *stacks)
    else:
        loss, losses, report, *_ = _contextrast_loss(stacks, *arguments)
    if options.group is not None:
        errors = report[3]
    return loss, {
        "loss": losses,
        "classes": report[0],
        "positives": report[1],
        "negatives": report[2],
        "errors": errors,
    }


def _forward(
    features: list[Tensor],
    labels: Tensor,
    e: Tensor,
    base: list[Tensor],
    seed: Tensor,
    num_classes: int,
    ignore_index: int,
    layer_weights: list[float],
    temperature: float,
    fusion_weight: float,
    base_rate: float,
    normalize: bool,
    normalize_anchors: bool,
    detach_anchors: bool,
    errors: Tensor | None,
    group: str | None,
    volumes: list[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, L_i of every layer, the report (3, layers) of classes, positives and negatives, and what the
    backward pass reads: label codes y, base pixels or the similarity of hard negatives, â, Z, coefficients, T.

    e: the codes of the hard negatives of all layers, end to end.

    base: bool maps of the base pixels of every layer. If the list is empty, base_rate draws them.

    With a group the ranks reduce inside the op, between its phases, and a fourth row of the report has the errors of
    all ranks. One op with reductions inside is simpler than three ops with reductions between them: the phases add to
    the same accumulators in place, and the backward pass, which needs no reduction, does not change.

    volumes: z, h, w of each layer in turn, where the features are ``maps.plane_stack`` of volumes and the labels
    (B, Z, H, W).
    """
    from contextrast_kernels.kernels import contextrast

    with on_device(features[0]):
        outcome, y, terms = contextrast.forward(
            features,
            labels,
            e,
            base,
            seed,
            num_classes,
            ignore_index,
            layer_weights,
            temperature,
            fusion_weight,
            base_rate,
            normalize,
            normalize_anchors,
            errors,
            group,
            volumes,
        )
    per_pixel: Any = terms.similarity if terms.base is None else terms.base  # one of the two is a tensor
    saved = (y, per_pixel, terms.table, terms.Z, outcome.coefficients, outcome.pull)
    return outcome.loss, outcome.losses, outcome.report, *saved


_contextrast_loss = torch.library.custom_op("contextrast::contextrast_loss", _forward, mutates_args=())


@_contextrast_loss.register_fake
def _(features, labels, e, base, seed, num_classes, *options):
    given = _by_name((features, labels, e, base, seed, num_classes, *options))
    dense, group = bool(base) or given["base_rate"] > 0, given["group"]
    first, L, N = features[0], len(features), num_classes
    D, dtype = first.shape[1], compute_dtype(first.dtype)
    floats = [first.new_empty(shape, dtype=dtype) for shape in ((), (L,), (L, N, D), (L, N), (L, 2, N), (L, N, D))]
    codes = [empty_codes(features, N, kind) for kind in (None, torch.uint8 if dense else dtype)]
    return *floats[:2], first.new_empty((3 if group is None else 4, L), dtype=torch.int64), *codes, *floats[2:]


def _feature_gradients(
    gradient: Tensor,
    features: list[Tensor],
    e: Tensor,
    y: Tensor,
    per_pixel: Tensor,
    table: Tensor,
    Z: Tensor,
    coefficients: Tensor,
    pull: Tensor,
    temperature: float,
    normalize: bool,
    detach_anchors: bool,
) -> list[Tensor]:
    """dL/dx of every layer, from what ``_forward`` returns to be saved."""
    from contextrast_kernels.kernels import contextrast

    base, similarity = (per_pixel, None) if per_pixel.dtype == torch.uint8 else (None, per_pixel)
    terms = contextrast.Terms(e, base, similarity, table, Z, coefficients)
    with on_device(features[0]):
        return contextrast.backward(
            gradient, features, y, terms, None if detach_anchors else pull, temperature, normalize
        )


_contextrast_loss_backward = torch.library.custom_op(
    "contextrast::contextrast_loss_backward", _feature_gradients, mutates_args=()
)


@_contextrast_loss_backward.register_fake
def _(gradient, features, *_):
    return [torch.empty_like(x) for x in features]


differentiable_once("contextrast_loss", _contextrast_loss_backward)


def _by_name(inputs: Sequence) -> dict:
    """Inputs of the op by the names of its parameters."""
    return dict(zip(_PARAMETERS, inputs))


_PARAMETERS = tuple(inspect.signature(_forward).parameters)


def _save_for_backward(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # otherwise torch allocates zero gradients for all outputs
    given = _by_name(inputs)
    ctx.options = [given[name] for name in ("temperature", "normalize", "detach_anchors")]
    ctx.group, ctx.layers = given["group"], len(given["features"])
    # The gradients of all inputs after the features, in the form that autograd expects. None of them has one.
    ctx.others = [[None] * len(given["base"]) if name == "base" else None for name in _PARAMETERS[1:]]
    _loss, *others = output
    _losses, _report, *saved = others
    ctx.save_for_backward(*given["features"], given["e"], *saved)
    ctx.mark_non_differentiable(*others)


def _backward(ctx, gradient, *_):
    if gradient is None:
        return [None] * ctx.layers, *ctx.others
    if ctx.group is not None:
        gradient = gradient * ranks.size(ctx.group)  # DDP divides by the number of ranks
    features, saved = list(ctx.saved_tensors[: ctx.layers]), ctx.saved_tensors[ctx.layers :]
    # If gradients are recorded here, a second derivative may follow, and only the op raises a clear error for it.
    direct = not torch.is_grad_enabled() and is_eager([gradient, *features])
    gradients = _feature_gradients if direct else _contextrast_loss_backward
    return gradients(gradient, features, *saved, *ctx.options), *ctx.others


_contextrast_loss.register_autograd(_backward, setup_context=_save_for_backward)
one_call_per_sample(_contextrast_loss)
one_call_per_sample(_contextrast_loss_backward)


class _Direct(torch.autograd.Function):
    """The op without PyTorch's dispatcher, which takes the host longer than all launches of a step."""

    @staticmethod
    def forward(ctx, arguments, *features):
        output = _forward(features, *arguments)
        _save_for_backward(ctx, (features, *arguments), output)
        return output[:3]

    @staticmethod
    def backward(ctx, gradient, *_):
        of_features, *_ = _backward(ctx, gradient)
        return None, *of_features
