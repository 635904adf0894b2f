"""Base classes of the relatives: the three inputs and a seed that advances."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from contextrast_kernels import checks, maps
from contextrast_kernels.hashing import image_hash
from contextrast_kernels.relatives.samplers import SAMPLERS, Sampler, sampled_rows, thinned
from contextrast_kernels.state import lasting


class RelativeLoss(nn.Module):
    """Checks the options that all relatives share and every batch, and holds ``last``."""

    def __init__(self, num_classes: int, ignore_index: int, temperature: float, normalize: bool):
        super().__init__()
        checks.several_classes(num_classes)
        checks.ignore_index(ignore_index)
        checks.real("temperature", temperature, low=0.0, open_low=True)
        checks.flag("normalize", normalize)
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.temperature, self.normalize = temperature, normalize
        self.last: dict[str, Tensor] = {}

    def _batch(self, layers: Sequence[Tensor], labels, predictions) -> tuple[Tensor, Tensor]:
        """Check one batch; return its label map and predictions."""
        dims = layers[0].ndim - 2
        labels = checks.class_map("labels", labels, dims=dims)
        predictions = checks.predictions("predictions", predictions, self.num_classes, dims)
        for i, x in enumerate(layers):
            for name, value in (("labels", labels), ("predictions", predictions)):
                checks.together(f"features[{i}]", x, name, value)
                checks.samples_from(name, value, *x.shape[2:])
        return labels, predictions.detach()

    def _at_layer(self, x: Tensor, labels: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Targets (-1: ignored) and predicted classes at a layer's size: int64 (B, *size)."""
        size = x.shape[2:]
        targets = maps.targets(labels, size, self.num_classes, self.ignore_index)
        return targets, maps.predicted_classes(predictions, size, self.ignore_index)

    def extra_repr(self) -> str:
        types = int | float | str | tuple | Rows
        shown = {name: value for name, value in vars(self).items() if isinstance(value, types)}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if name[0] != "_" and name != "training")


class SampledLoss(RelativeLoss):
    """A relative that draws at random, with a ``seed`` as in ``ContextrastLoss``."""

    seed: Tensor

    def __init__(self, num_classes: int, ignore_index: int, temperature: float, normalize: bool, seed: int | Tensor):
        super().__init__(num_classes, ignore_index, temperature, normalize)
        checks.seed(seed, seed.device if isinstance(seed, Tensor) else None)
        self.register_buffer("seed", lasting(torch.tensor(int(seed), dtype=torch.int64)))

    def _draw(self, device: torch.device) -> Tensor:
        """This step's seed; in training the seed then advances."""
        if self.seed.device != device:
            self.seed = lasting(self.seed, device)  # later steps find it there and copy nothing
        seed = self.seed.clone()
        if self.training:
            self.seed.add_(1)
        return seed


class Rows:
    """Choose rows of a layer with a sampler, and read them.

    The number of rows is static. Eager code on a CPU, without ranks, drops unused rows instead (``may_read_values``).
    """

    def __init__(self, sampler: str | Callable, default: Sampler):
        if not callable(sampler):
            checks.choice("sampler", sampler, SAMPLERS)
            sampler = replace(default, kind=sampler)
        self.sampler, self.default = sampler, default

    def __repr__(self) -> str:
        return repr(self.sampler)

    def __call__(
        self,
        x: Tensor,
        targets: Tensor,
        predicted: Tensor,
        num_classes: int,
        seed: Tensor,
        stream: int,
        normalize: bool,
    ) -> tuple[Tensor, Tensor]:
        """Embeddings (R, D) and labels (R,), -1 in unused rows."""
        chosen = self.sampler(targets, predicted, num_classes, seed, stream)
        checks.chosen("sampler", chosen, targets.shape)
        limit = self.sampler if isinstance(self.sampler, Sampler) else self.default
        most = limit.most(x.shape[0], num_classes, math.prod(x.shape[2:]))
        if limit is not self.sampler:  # a user's sampler may choose more
            order = image_hash(seed, stream, x.shape[2:], x.device).expand_as(targets)
            chosen = thinned(chosen & (targets >= 0), most, order)
        return sampled_rows(x, targets, chosen, most, normalize)


def one_map(features, layer: int) -> Tensor:
    """The feature map of a loss that uses one layer: the tensor itself, or one of a list."""
    if isinstance(features, Sequence) and not isinstance(features, str):
        if not -len(features) <= layer < len(features):
            raise ValueError(
                f"layer: expected the index of one of {len(features)} layers, got {layer}. "
                "Pass a smaller index, or more layers in features."
            )
        checks.feature_map(f"features[{layer}]", features[layer])
        return features[layer]
    checks.feature_map("features", features)
    return features
