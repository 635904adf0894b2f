"""The losses and heads as modules."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from contextrast_kernels import checks, maps, ranks
from contextrast_kernels.contextrast import Options, check_inputs, total_loss
from contextrast_kernels.embedding import compute_dtype
from contextrast_kernels.state import lasting


class ProjectionHead(nn.Sequential):
    """Projects one encoder layer's features to the common embedding size: (B, in_channels, h, w) → (B, dim, h, w).

    With ``spatial_dims=3`` it projects features (B, in_channels, z, h, w) of volumes.

    Two 1x1 convolutions with ReLU and batch normalisation between them, as in MS/CS (docs/method.md says why). The
    output is not normalised, because the loss does that. The head is used in training only.

    Args:
        in_channels: channels of the layer.
        dim: D, the same for all layers.
        spatial_dims: 2 for features of maps, 3 for features of volumes.

    Raises:
        TypeError, ValueError: an argument is not an integer or out of range; the error names it.
    """

    def __init__(self, in_channels: int, dim: int = 256, *, spatial_dims: int = 2):
        checks.integer("in_channels", in_channels, low=1)
        checks.integer("dim", dim, low=1)
        checks.integer("spatial_dims", spatial_dims, low=2, high=3)
        convolution, norm = (nn.Conv2d, nn.BatchNorm2d) if spatial_dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        super().__init__(
            convolution(in_channels, in_channels, 1, bias=False),
            nn.ReLU(),
            norm(in_channels),
            convolution(in_channels, dim, 1),
        )


class ContextrastLoss(nn.Module):
    """``contextrast_loss`` (Eq. 4) as a module that stores the options and advances the seed in training.

    Args:
        num_classes: N.
        debug: also check values (label range, finite features), which synchronises with the device.
        seed: the first seed. It is kept in an int64 buffer, which moves to the labels' device and advances by one in
            each training-mode forward, so that a saved state continues the same draws. Keep the loss outside
            activation checkpointing: its second forward would use the next seed.

    The other arguments are those of ``contextrast_loss``.

    After a forward ``last`` holds detached tensors of shape (layers,): "loss" (L_i, unweighted), "classes" (classes
    present), "positives" (valid pixels), "negatives" (chosen and base pixels) and "errors" (wrongly predicted
    pixels). Only reading their values synchronises.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.

    Examples:
        >>> criterion = ContextrastLoss(num_classes=19)
        >>> loss = cross_entropy(logits, labels, ignore_index=255) + 0.1 * criterion(features, labels, logits)
    """

    seed: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
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
        debug: bool = False,
    ):
        super().__init__()
        self.options = Options(
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
        checks.seed(seed, seed.device if isinstance(seed, Tensor) else None)
        checks.flag("debug", debug)
        self.debug = debug
        self.register_buffer("seed", lasting(torch.tensor(int(seed), dtype=torch.int64)))
        self.last: dict[str, Tensor] = {}

    @checks.takes_subclasses
    def forward(self, features: Sequence[Tensor], labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss of one batch: see ``contextrast_loss``."""
        if self.debug:
            self._check_values(features, labels, predictions)
        if isinstance(labels, Tensor) and self.seed.device != labels.device:
            self.seed = lasting(self.seed, labels.device)  # later steps find it there and copy nothing
        # Clone the seed, because the buffer advances below.
        loss, self.last = total_loss(features, labels, predictions, self.options, self.seed.clone())
        if self.training:
            self.seed.add_(1)
        return loss

    def _check_values(self, features: Sequence[Tensor], labels: Tensor, predictions: Tensor) -> None:
        labels, predictions = check_inputs(features, labels, predictions, self.options)
        num_classes, ignore_index = self.options.num_classes, self.options.ignore_index
        for name, classes in (("labels", labels), ("predictions", predictions)):
            if classes.is_floating_point():
                continue
            classes = classes.long()
            wrong = ((classes < 0) | (classes >= num_classes)) & (classes != ignore_index)
            if wrong.any():
                share = f"{int(wrong.sum())} of {classes.numel()} pixels are out of range"
                raise ValueError(
                    f"{name}: expected values in 0..{num_classes - 1} or ignore_index {ignore_index}, "
                    f"got {classes[wrong][0].item()} ({share}). "
                    "Map other values to ignore_index, or raise num_classes."
                )
        for i, x in enumerate(features):
            valid = maps.targets(labels, x.shape[2:], num_classes, ignore_index) >= 0
            broken = ~x.isfinite().all(1) & valid
            if broken.any():
                raise ValueError(
                    f"features[{i}]: expected finite values at every valid pixel, got NaN or inf at "
                    f"{int(broken.sum())} of {int(valid.sum())} pixels. Look for an overflow before the loss."
                )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())


class ContextrastCriterion(nn.Module):
    """The training objective in one call: cross-entropy + weight · L_PA (Eq. 5).

    Args:
        num_classes: N.
        weight: α, the factor of the contrastive loss L_PA.
        class_weights: N factors of the classes in the cross-entropy, a list or tensor; None: all 1.
        label_smoothing: label smoothing of the cross-entropy, in [0, 1].
        **contrast: options of ``ContextrastLoss``: ignore_index, layer_weights, ratio, ...

    The cross-entropy is the mean over the valid pixels, weighted by class as in ``torch.nn.CrossEntropyLoss``. Without
    a valid pixel it is 0, still attached to the autograd graph. It is computed in float32, or in float64 for float64
    logits. Labels outside 0..N-1 are ignored.

    After a forward ``last`` holds detached tensors: the scalars "cross_entropy" and "contrast" (L_PA, unweighted), and
    the entries of ``ContextrastLoss.last`` for each layer.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.

    Examples:
        >>> criterion = ContextrastCriterion(num_classes=19)
        >>> loss = criterion(tap.features(), labels, logits)
    """

    class_weights: Tensor | None

    def __init__(
        self,
        num_classes: int,
        weight: float = 0.1,
        *,
        class_weights: Sequence[float] | Tensor | None = None,
        label_smoothing: float = 0.0,
        **contrast,
    ):
        super().__init__()
        self.contrast = ContextrastLoss(num_classes, **contrast)
        checks.real("weight", weight, low=0.0)
        checks.real("label_smoothing", label_smoothing, low=0.0, high=1.0)
        self.weight = weight
        self.label_smoothing = label_smoothing
        if class_weights is not None:
            if isinstance(class_weights, str) or not isinstance(class_weights, Sequence | Tensor):
                raise TypeError(
                    f"class_weights: expected a list or tensor of {num_classes} numbers, "
                    f"got {checks.describe(class_weights)}. Pass a list."
                )
            try:
                class_weights = torch.as_tensor(checks.plain(class_weights), dtype=torch.float32).clone()
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"class_weights: expected {num_classes} finite numbers, one for each class, "
                    f"got {checks.describe(class_weights)}. Pass floats."
                ) from error
            if class_weights.shape != (num_classes,) or not (class_weights.isfinite() & (class_weights >= 0)).all():
                raise ValueError(
                    f"class_weights: expected {num_classes} finite numbers of at least 0, one for each class, "
                    f"got {checks.describe(class_weights)}. Set those of classes without effect to zero."
                )
            class_weights = lasting(class_weights)
        self.register_buffer("class_weights", class_weights)
        self.last: dict[str, Tensor] = {}

    @checks.takes_subclasses
    def forward(
        self, features: Sequence[Tensor], labels: Tensor, logits: Tensor, *, soft_labels: Tensor | None = None
    ) -> Tensor:
        """The objective of one batch.

        Args:
            features, labels: as in ``contextrast_loss``.
            logits: the network's logits (B, N, H', W'), or (B, N, Z', H', W') of a volume. At a different size than
                the labels they are resized bilinearly, or trilinearly for a volume (align_corners=False), both for the
                cross-entropy and for the predictions of the contrastive loss.
            soft_labels: class probabilities (B, N, H, W), or (B, N, Z, H, W) of a volume, at the labels' size, such
                as those of mixup or of a teacher. They replace the labels in the cross-entropy, which is then the
                plain mean over the pixels with a valid label. The contrastive loss uses the labels.

        Returns:
            A scalar, float32, or float64 for float64 features and logits.
        """
        options = self.contrast.options
        dims = checks.dims_of(logits, labels)
        labels = checks.class_map("labels", labels, dims=dims)
        logits = checks.logits("logits", logits, options.num_classes, dims)
        checks.together("labels", labels, "logits", logits)
        size = labels.shape[1:]
        checks.samples_from("logits", logits, *size)
        logits = logits.to(compute_dtype(logits.dtype))
        if logits.shape[2:] != size:
            logits = maps.resized(logits, size)
        if soft_labels is not None:
            soft_labels = checks.soft_labels("soft_labels", soft_labels, logits.shape)
            checks.together("labels", labels, "soft_labels", soft_labels)
        contrast = self.contrast(features, labels, logits)
        targets = maps.targets(labels, size, options.num_classes, options.ignore_index)
        entropy = self._cross_entropy(logits, targets, soft_labels)
        self.last = {"cross_entropy": entropy.detach(), "contrast": contrast.detach(), **self.contrast.last}
        return entropy + self.weight * contrast

    def _cross_entropy(self, logits: Tensor, targets: Tensor, soft_labels: Tensor | None) -> Tensor:
        weights = self.class_weights
        if weights is not None:
            if weights.device != logits.device:
                self.class_weights = weights = lasting(weights, logits.device)  # later steps copy nothing
            weights = weights.to(logits.dtype)
        # A NaN at an ignored pixel must not reach the gradient.
        valid = targets >= 0
        logits = torch.where(valid.unsqueeze(1), logits, 0.0)
        if soft_labels is not None:
            soft_labels = torch.where(valid.unsqueeze(1), soft_labels.to(logits.dtype), 0.0)
            losses = cross_entropy(logits, soft_labels, weights, reduction="none", label_smoothing=self.label_smoothing)
            return torch.where(valid, losses, 0.0).sum() / valid.sum().clamp(min=1)
        # The sum is taken here, because torch's mean is 0 / 0 without a valid pixel and its sum is not deterministic on
        # CUDA.
        losses = cross_entropy(
            logits, targets, weights, ignore_index=-1, reduction="none", label_smoothing=self.label_smoothing
        )
        share = valid.to(losses.dtype) if weights is None else weights[targets.clamp(min=0)] * valid
        total = share.sum()
        return losses.sum() / torch.where(total > 0, total, 1)

    def extra_repr(self) -> str:
        return f"weight={self.weight}, label_smoothing={self.label_smoothing}"
