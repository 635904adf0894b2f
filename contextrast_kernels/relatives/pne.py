"""PNE (Wang et al., Neurocomputing 2023, arXiv 2207.01417): mispredicted pixels against the right pixels of their class
and of the class they were mistaken for.

For image b and classes j ≠ k that are both in its labels:

    H = {p : predicted j, label k}    P = {right pixels of k}    N = {right pixels of j}, or H if there is none
    l_i = log(1 + Σ_{n∈N} e^{cos(x_i, x_n) / τ} / Σ_{m∈P} c_m e^{cos(x_i, x_m) / τ}),   i ∈ H
    L   = mean over pairs (b, j, k) and their i of l_i, times the mean of |H| over the pairs / S

c is the probability of the predicted class. Every set contributes S pixels; a smaller set repeats its pixels until it
has S. Pairs with an empty P or more than ``max_hard`` pixels in H are left out. P and N get no gradient.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks, maps
from contextrast_kernels.hashing import image_hash
from contextrast_kernels.info_nce import info_nce
from contextrast_kernels.relatives._loss import SampledLoss, one_map
from contextrast_kernels.relatives.samplers import (
    STREAM_SETS,
    images_of,
    indices_of,
    rank_in_segment,
    segment_counts,
    take_rows,
    thinned,
)


class PNELoss(SampledLoss):
    """The positive-negative equal contrast of PNE. Add 1.3 of it to the cross-entropy.

    We had no access to the paper's equations. This follows the formula of the official code (jingw193/PNE_Loss), except
    for these points:

    * Sets larger than S: the code takes their first S pixels in raster order, at the top of the image; we take S random
      ones. ``parity=True`` takes the first.
    * Gradient: the code treats a hard pixel's norm as a constant, so that a part of the gradient only changes the norm;
      we differentiate the cosine. ``parity=True`` treats it as a constant.
    * A feature of length zero: NaN in the code, cosine 0 here.
    * Label 254: the code leaves out the hard pixels of this class; here it is an ordinary class.
    * No pair: the code returns 1e-16 times sums of logits and features, which propagates any pixel's inf or NaN; here
      the loss is 0, still attached to the autograd graph.
    * The code's default arguments fail (a comparison function does not exist); only its configuration runs, whose
      settings are the defaults here.

    Args:
        num_classes: N.
        ignore_index: the label of ignored pixels.
        temperature: τ.
        set_size: S.
        max_hard: pairs with a larger |H| are left out.
        max_samples: the most rows of a batch. If there are more hard pixels, this number of them is drawn, and the mean
            is taken over these.
        layer: the index of the layer, if the features are a list; 0 is the highest resolution.
        parity: give the official code's value and gradient (its ``loss_weight`` is 1.3 times that), as long as there
            are at most ``max_samples`` hard pixels.
        seed: the first seed, which advances by one in each training forward, as in ``ContextrastLoss``.

    After a forward ``last`` holds detached scalars: "loss", "samples" (rows) and "pairs".

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        temperature: float = 1.0,
        set_size: int = 100,
        max_hard: int = 199,
        max_samples: int = 4096,
        layer: int = 0,
        parity: bool = False,
        seed: int | Tensor = 0,
    ):
        super().__init__(num_classes, ignore_index, temperature, True, seed)
        checks.integer("set_size", set_size, low=1)
        checks.integer("max_hard", max_hard, low=1)
        checks.integer("max_samples", max_samples, low=1)
        checks.integer("layer", layer)
        checks.flag("parity", parity)
        self.set_size, self.max_hard, self.max_samples = set_size, max_hard, max_samples
        self.layer, self.parity = layer, parity

    @checks.takes_subclasses
    def forward(self, features: Tensor | Sequence[Tensor], labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            features: projected features (B, D, h, w), or a list of them.
            labels: (B, H, W) or (B, 1, H, W) integers. For volumes all three arguments have one axis more.
            predictions: logits (B, N, H', W'), or a class map (B, H', W'), for which every c is 1. No gradient.

        Returns:
            A scalar, float32, or float64 for float64 features.
        """
        x = one_map(features, self.layer)
        labels, predictions = self._batch([x], labels, predictions)
        seed = self._draw(x.device)
        label, predicted = self._at_layer(x, labels, predictions)
        B, N, S, size = x.shape[0], self.num_classes, self.set_size, x.shape[2:]

        # The sets: right pixels of (b, class), and hard pixels of (b, j, k). Each pixel is in at most one of them.
        image = images_of(label)
        is_class = (predicted >= 0) & (predicted < N)
        own = image * N + label
        right = torch.where((label >= 0) & (predicted == label), own, B * N)
        taken_for = image * N + predicted.clamp(0, N - 1)
        hard = torch.where((label >= 0) & is_class & (predicted != label), taken_for * N + label, B * N * N)
        right_count, hard_count = segment_counts(right, B * N), segment_counts(hard, B * N * N)
        present = segment_counts(torch.where(label >= 0, own, B * N), B * N) > 0
        used = (hard_count > 0) & (hard_count <= self.max_hard)
        used = used.reshape(B, N, N) & present.reshape(B, N, 1) & (right_count > 0).reshape(B, 1, N)
        used = F.pad(used.flatten(), (0, 1))

        order = torch.arange(math.prod(size), device=x.device).reshape(size)
        if not self.parity:
            order = image_hash(seed, STREAM_SETS, size, x.device)
        order = order.expand_as(label)
        right_times = self._times(right, right_count, order)
        hard_times = self._times(hard, hard_count, order) * used[hard]

        row, is_row = self._rows(hard_times > 0, order)
        column, is_column = indices_of(right_times > 0, min(B * N * S, label.numel()))
        # With constant norms: x / ‖x‖, whose norm autograd does not see.
        rows = take_rows(x, row, is_row, normalize=not self.parity)
        if self.parity:
            norm = rows.detach().norm(dim=1, keepdim=True)
            rows = torch.where(norm > 0, rows / norm.clamp(min=torch.finfo(norm.dtype).tiny), 0.0)
        columns = take_rows(x.detach(), column, is_column, normalize=True)

        def at(values: Tensor, index: Tensor, filled: Tensor) -> Tensor:
            return torch.where(filled, values.flatten()[index], -1)

        # A right pixel is a positive and a negative with different weights, so it is two columns. Hard pixels are
        # columns of their own pair too, if N is empty. No row has the label `no_label`.
        no_label = B * N
        of_row, pair, against = at(own, row, is_row), at(hard, row, is_row), at(taken_for, row, is_row)
        of_column = at(own, column, is_column)
        has_right = F.pad(right_count > 0, (0, 1))[against]
        itself = torch.where(is_row, no_label + pair, -1)
        times = torch.where(is_column, right_times.flatten()[column], 0).to(rows.dtype)
        row_times = torch.where(is_row, hard_times.flatten()[row], 0).to(rows.dtype)
        sure = torch.where(is_column, self._confidence(predictions, *size).flatten()[column], 0.0).to(rows.dtype)
        loss = info_nce(
            rows,
            of_row,
            torch.cat([columns, columns, rows.detach()]),
            torch.cat([of_column, torch.where(is_column, no_label, -1), torch.where(is_row, no_label, -1)]),
            temperature=self.temperature,
            positives="pooled",
            row_negatives=torch.where(is_row & ~has_right, itself, against),
            column_negatives=torch.cat([torch.full_like(of_column, -1), of_column, itself]),
            column_weights=torch.cat([times * sure, times, row_times]),
            reduction="none",
        )
        pairs = used.sum()
        mean_hard = (hard_count * used[:-1]).sum() / pairs.clamp(min=1).to(loss.dtype)
        mean_loss = (row_times * loss).sum() / row_times.sum().clamp(min=1)
        loss = mean_loss * mean_hard / S
        self.last = {"loss": loss.detach(), "samples": is_row.sum(), "pairs": pairs}
        return loss

    def _times(self, segment: Tensor, counts: Tensor, order: Tensor) -> Tensor:
        """How often each pixel counts, so that every set counts S pixels: S // n, and once more for the first ones."""
        count = F.pad(counts, (0, 1))[segment].clamp(min=1)
        rank = rank_in_segment(segment, counts.shape[0], order)
        times = self.set_size // count + (rank < self.set_size % count)
        return torch.where(segment < counts.shape[0], times, 0)

    def _rows(self, hard: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        most = min(hard.numel(), hard.shape[0] * self.num_classes * (self.num_classes - 1) * self.set_size)
        if most > self.max_samples:
            most = self.max_samples
            hard = thinned(hard, most, order)
        return indices_of(hard, most)

    @staticmethod
    def _confidence(predictions: Tensor, *size: int) -> Tensor:
        """The largest class probability of every pixel: (B, *size)."""
        sampled = maps.to_size(predictions, *size)
        if not sampled.is_floating_point():
            return torch.ones(sampled.shape, device=sampled.device)
        return sampled.to(torch.promote_types(sampled.dtype, torch.float32)).softmax(1).amax(1)
