"""MS/CS (Pissas et al., ECCV 2022, arXiv 2203.13409): pixels of one scale against each other, and pixels of the finest
scale against those of the coarsest.

    L = Σ_s w_s NCE(X_s, X_s) + w_low NCE(X_1, X_S) + w_mid NCE(X_1, X_{S-1})

NCE is ``info_nce`` with ``positives="each"``, without self pairs within a scale. X_s are the sampled embeddings of
scale s, from high to low resolution. The last term needs three scales, and the term before it two.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from contextrast_kernels import checks
from contextrast_kernels.contextrast import check_layers, weighted_sum
from contextrast_kernels.info_nce import info_nce
from contextrast_kernels.relatives._loss import Rows, SampledLoss
from contextrast_kernels.relatives.samplers import STREAM_ROWS, Sampler


class MultiScaleContrastLoss(SampledLoss):
    """The multi-scale and cross-scale contrastive loss of MS/CS. Add 0.1 of it to the cross-entropy.

    For the same pixels the value is that of the official code (RViMLab/MS_CS_ContrSeg). The differences:

    * Labels are sampled with exact integers at any size; the code interpolates floats to W // scale.
    * We use all N classes; the code drops the last class of a data set without an ignored label.
    * ``max_views=1`` is a limit of one; in the code it means no limit.
    * No class with ``min_pixels``: the code raises; here the loss is 0, still attached to the autograd graph.
    * A row without a positive: within a scale it is NaN in the code and 0 here; across scales it is 0 in both and
      counts in the mean.
    * Neither has a separate temperature across scales, although the code's configuration names one.

    Args:
        num_classes: N.
        ignore_index: the label of ignored pixels.
        layer_weights: w_s, one for each layer, from high to low resolution.
        cross_weights: w_low and w_mid.
        temperature: τ.
        sampler: "common-count" (published), or any sampler of ``PixelContrastLoss``; each scale is drawn separately.
        max_samples, max_views, min_pixels: as in ``Sampler``. On a CPU the reference stores rows x rows numbers, so
            set ``max_samples`` to about a thousand there.
        detach_deepest: no gradient through the columns of the cross-scale terms.
        normalize: embeddings are x / ‖x‖₂ over D.
        seed: the first seed, which advances by one in each training forward, as in ``ContextrastLoss``.

    After a forward ``last`` holds detached tensors: "loss", of each scale and then each cross-scale term, unweighted,
    and "samples", the rows of each scale.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        layer_weights: Sequence[float] = (1.0, 0.7, 0.4, 0.1),
        cross_weights: Sequence[float] = (1.0, 1.0),
        temperature: float = 0.1,
        sampler: str | Callable = "common-count",
        max_samples: int = 10000,
        max_views: int = 2500,
        min_pixels: int = 5,
        detach_deepest: bool = False,
        normalize: bool = True,
        seed: int | Tensor = 0,
    ):
        super().__init__(num_classes, ignore_index, temperature, normalize, seed)
        checks.weights("layer_weights", layer_weights)
        checks.weights("cross_weights", cross_weights)
        if len(cross_weights) != 2:
            raise ValueError(
                f"cross_weights: expected two weights, of the coarsest and of the second coarsest scale, "
                f"got {len(cross_weights)}. Pass two; a weight of zero leaves its term out."
            )
        checks.flag("detach_deepest", detach_deepest)
        self.layer_weights, self.cross_weights = tuple(layer_weights), tuple(cross_weights)
        self.detach_deepest = detach_deepest
        self.rows = Rows(sampler, Sampler("common-count", max_samples, max_views, min_pixels))

    @checks.takes_subclasses
    def forward(self, features: Sequence[Tensor], labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            features: projected features (B, D, h_s, w_s), one map per scale, from high to low resolution; the same D
                and dtype in all.
            labels: (B, H, W) or (B, 1, H, W) integers. For volumes all three arguments have one axis more.
            predictions: logits (B, N, H', W') or a class map (B, H', W'); only some samplers use it. No gradient.

        Returns:
            A scalar, float32, or float64 for float64 features.
        """
        check_layers(features, self.layer_weights)
        labels, predictions = self._batch(features, labels, predictions)
        seed = self._draw(features[0].device)
        scales = []
        for i, x in enumerate(features):
            targets, predicted = self._at_layer(x, labels, predictions)
            scales.append(self.rows(x, targets, predicted, self.num_classes, seed, STREAM_ROWS + i, self.normalize))
        losses = [info_nce(*scale, temperature=self.temperature) for scale in scales]
        for rows, row_labels in scales[:0:-1][:2]:
            columns = rows.detach() if self.detach_deepest else rows
            losses.append(info_nce(*scales[0], columns, row_labels, temperature=self.temperature))
        self.last = {
            "loss": torch.stack(losses).detach(),
            "samples": torch.stack([(row_labels >= 0).sum() for _, row_labels in scales]),
        }
        return weighted_sum(losses, (*self.layer_weights, *self.cross_weights))
