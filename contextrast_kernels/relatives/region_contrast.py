"""RegionContrast: the region centres of the batch against a bank of region centres (Hu, Cui and Wang, ICCV 2021).

    q_b^n = unit( mean of x over the pixels of class n in image b )
    L = mean over (b, n) of 1/|P| Σ_{j∈P} softplus(Z - q · k_j / τ),   Z = log Σ_{j∉P} exp(q · k_j / τ)

q_b^n is the region centre of class n in image b. k_j are earlier region centres, and P those of class n.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from contextrast_kernels import checks
from contextrast_kernels.info_nce import info_nce
from contextrast_kernels.relatives._loss import RelativeLoss, one_map
from contextrast_kernels.relatives.memory_bank import MemoryBank, check_bank
from contextrast_kernels.relatives.pixel_contrast import region_centres

REGIONS = ("labels", "predictions")


class RegionContrastLoss(RelativeLoss):
    """The region contrast that RegionContrast describes. Add 0.1 of it to the cross-entropy.

    A region centre is the mean embedding of the pixels of one class in one image, scaled to unit length.

    Where the official code (hzhupku/RegionContrast) and the paper's stated intent differ, we follow the intent:

    * The code multiplies the mean embedding of a class with the bank channel by channel and takes a softmax over the
      bank for each of 256 channels, with queue place 0 as the target. Its value stays near classes x log(2 x places).
      Here similarities are inner products, and all region centres of a class are positives. There is no parity mode.
    * The code averages over the pixels of a class in all images of the batch; we average over those of one image.
    * The code's queue starts with random vectors, skips places for batches of more than one image, is written in
      evaluation too, keeps a growing autograd history and loses the entries of all ranks but the first.
    * The code takes a pixel's class from the predictions and does not use the labels. Our default is "labels", because
      the method is supervised; ``regions="predictions"`` is that of the code, without the ignored pixels.
    * The code sums over classes; we take the mean over region centres.

    Args:
        num_classes: N.
        bank: a MemoryBank with a queue of region centres. The paper's has 2975 places, one for each training image of
            Cityscapes. Until the first write the loss is 0.
        ignore_index: the label of ignored pixels.
        temperature: τ.
        regions: "labels" or "predictions", the map that gives the class of each pixel.
        normalize: average x / ‖x‖₂ instead of x, as the paper does. A region centre has unit length in both cases.
        layer: the index of the layer, if the features are a list; 0 is the highest resolution.

    After a forward ``last`` holds detached scalars: "loss" and "samples", the number of region centres.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        bank: MemoryBank,
        *,
        ignore_index: int = 255,
        temperature: float = 0.2,
        regions: str = "labels",
        normalize: bool = False,
        layer: int = 0,
    ):
        super().__init__(num_classes, ignore_index, temperature, normalize)
        check_bank(bank, num_classes)
        if bank.lengths[1] == 0:
            raise ValueError(
                "bank: expected a MemoryBank with a queue of region centres, got regions=0. Set regions above 0."
            )
        checks.choice("regions", regions, REGIONS)
        checks.integer("layer", layer)
        self.bank, self.regions, self.layer = bank, regions, layer

    @checks.takes_subclasses
    def forward(self, features: Tensor | Sequence[Tensor], labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            features: features (B, D, h, w), or a list of them. The paper takes the decoder's last features, without
                a projection head.
            labels: (B, H, W) or (B, 1, H, W) integers. For volumes all three arguments have one axis more.
            predictions: logits (B, N, H', W') or a class map (B, H', W'). No gradient.

        Returns:
            A scalar, float32, or float64 for float64 features.
        """
        x = one_map(features, self.layer)
        labels, predictions = self._batch([x], labels, predictions)
        self.bank.check_dim("features", x)
        region, predicted = self._at_layer(x, labels, predictions)
        if self.regions == "predictions":
            is_class = (predicted >= 0) & (predicted < self.num_classes)
            region = torch.where((region >= 0) & is_class, predicted, -1)
        centres, classes = region_centres(x, region, self.num_classes, self.normalize)
        loss = info_nce(centres, classes, *self.bank.copied_columns(centres), temperature=self.temperature)
        self.last = {"loss": loss.detach(), "samples": (classes >= 0).sum()}
        if self.training:
            self.bank.push("regions", centres.detach(), classes)
        return loss
