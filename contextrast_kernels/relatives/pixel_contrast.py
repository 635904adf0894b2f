"""ContrastiveSeg: pixels against pixels of the batch, or of a memory bank (Wang et al., ICCV 2021, arXiv 2101.11939).

    L = mean over sampled pixels i of 1/|P_i| Σ_{j∈P_i} softplus(Z_i - s_ij),   Z_i = log Σ_{j∈N_i} exp(s_ij)

s_ij = v_i · v_j / τ. P_i are the other sampled pixels of i's class in all images, N_i those of other classes. With a
bank both sets consist of its entries instead.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks
from contextrast_kernels.anchors import class_anchors
from contextrast_kernels.backend import unchanged_by_autocast
from contextrast_kernels.embedding import unit
from contextrast_kernels.hashing import image_hash, pixel_hash
from contextrast_kernels.info_nce import info_nce
from contextrast_kernels.relatives._loss import Rows, SampledLoss, one_map
from contextrast_kernels.relatives.memory_bank import MemoryBank, check_bank
from contextrast_kernels.relatives.samplers import (
    STREAM_BANK,
    STREAM_MINED_NEGATIVES,
    STREAM_MINED_POSITIVES,
    STREAM_ROWS,
    Sampler,
    images_of,
    rank_in_segment,
    sampled_rows,
)

MINING = ("none", "semi-hard")
CODE_BASE_TEMPERATURE = 0.07


class PixelContrastLoss(SampledLoss):
    """The pixel contrast of ContrastiveSeg. Add 0.1 of it to the cross-entropy (the paper's bank form: 1).

    Where the official code (tfzhou/ContrastiveSeg) and the paper differ:

    * Factor: the code multiplies by τ / 0.07; the paper and we do not. ``parity=True`` does.
    * Mining: the paper draws semi-hard pairs; the code takes all columns. Our default is all columns, which gave the
      code's published numbers; ``mining="semi-hard"`` is that of the paper.
    * Bank: the code's pixel queue advances by one place for ten written, takes pixels of other classes, overwrites its
      newest entries at the end, leaves class 0 out, starts with random vectors, drops the diagonal of the matrix of
      sampled pixels x bank entries and loses the entries of all ranks but the first. ``MemoryBank`` does none of these.
      The paper's region memory has one place for each training image; ours, as the code's, is a queue.
    * No class with more than ``max_views`` pixels, or more pairs (image, class) than ``max_samples``: the code raises.
      Here the loss is 0, still attached to the autograd graph, in the first case, and each pair has one pixel in the
      second.
    * A row without a positive: NaN in the code. Here it is 0 and counts in the mean.

    Args:
        num_classes: N.
        ignore_index: the label of ignored pixels.
        temperature: τ.
        sampler: "hard-easy" (the published quota), "bane", "common-count" or "uniform" (see ``Sampler``), or any
            callable with the same signature. It may choose more pixels than "hard-easy" can; then that number is drawn
            from them.
        max_samples, max_views, min_pixels: as in ``Sampler``. As published, a class with at most ``max_views`` pixels
            in an image is left out there; for small images set ``min_pixels``.
        bank: a MemoryBank. Its entries replace the batch's pixels as columns, and each training forward writes the
            batch's region centres and pixels into it. Until the first write the loss is 0.
        bank_pixels: the number of pixels of each (image, class) that are written.
        mining: "none": all columns; "semi-hard": of each row's columns the ``hardest`` share (negatives most similar,
            positives least similar), of which ``mined_negatives`` and ``mined_positives`` are drawn. Stores rows x
            columns numbers.
        hardest, mined_positives, mined_negatives: the paper's 10 %, 1024 and 2048.
        normalize: embeddings are x / ‖x‖₂ over D.
        layer: the index of the layer, if the features are a list; 0 is the highest resolution, as in the paper.
        parity: multiply by τ / 0.07, which gives the official code's value for the same pixels.
        seed: the first seed, which advances by one in each training forward, as in ``ContextrastLoss``.

    After a forward ``last`` holds detached scalars: "loss" and "samples", the number of rows.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        ignore_index: int = 255,
        temperature: float = 0.1,
        sampler: str | Callable = "hard-easy",
        max_samples: int = 1024,
        max_views: int = 100,
        min_pixels: int | None = None,
        bank: MemoryBank | None = None,
        bank_pixels: int = 10,
        mining: str = "none",
        hardest: float = 0.1,
        mined_positives: int = 1024,
        mined_negatives: int = 2048,
        normalize: bool = True,
        layer: int = 0,
        parity: bool = False,
        seed: int | Tensor = 0,
    ):
        super().__init__(num_classes, ignore_index, temperature, normalize, seed)
        self.rows = Rows(sampler, Sampler("hard-easy", max_samples, max_views, min_pixels))
        if bank is not None:
            check_bank(bank, num_classes)
        checks.integer("bank_pixels", bank_pixels, low=0)
        checks.choice("mining", mining, MINING)
        checks.real("hardest", hardest, low=0.0, high=1.0, open_low=True)
        checks.integer("mined_positives", mined_positives, low=1)
        checks.integer("mined_negatives", mined_negatives, low=1)
        checks.integer("layer", layer)
        checks.flag("parity", parity)
        self.bank, self.bank_pixels, self.layer = bank, bank_pixels, layer
        self.mining = None if mining == "none" else (hardest, mined_positives, mined_negatives)
        self.factor = temperature / CODE_BASE_TEMPERATURE if parity else 1.0

    @checks.takes_subclasses
    def forward(self, features: Tensor | Sequence[Tensor], labels: Tensor, predictions: Tensor) -> Tensor:
        """The loss of one batch.

        Args:
            features: projected features (B, D, h, w), or a list of them.
            labels: (B, H, W) or (B, 1, H, W) integers. For volumes all three arguments have one axis more.
            predictions: logits (B, N, H', W') or a class map (B, H', W'). No gradient.

        Returns:
            A scalar, float32, or float64 for float64 features.
        """
        x = one_map(features, self.layer)
        labels, predictions = self._batch([x], labels, predictions)
        if self.bank is not None:
            self.bank.check_dim("features", x)
        seed = self._draw(x.device)
        targets, predicted = self._at_layer(x, labels, predictions)
        rows, row_labels = self.rows(x, targets, predicted, self.num_classes, seed, STREAM_ROWS, self.normalize)
        columns, column_labels = (None, None) if self.bank is None else self.bank.copied_columns(rows)
        if self.mining is None:
            loss = info_nce(rows, row_labels, columns, column_labels, temperature=self.temperature)
        else:
            loss = semi_hard_nce(rows, row_labels, columns, column_labels, self.temperature, *self.mining, seed=seed)
        loss = self.factor * loss
        self.last = {"loss": loss.detach(), "samples": (row_labels >= 0).sum()}
        if self.bank is not None and self.training:
            self._remember(self.bank, x.detach(), targets, seed)
        return loss

    @torch.no_grad()
    def _remember(self, bank: MemoryBank, x: Tensor, targets: Tensor, seed: Tensor) -> None:
        """Write the batch's region centres and ``bank_pixels`` random pixels of each (image, class) into the bank."""
        centres, classes = region_centres(x, targets, self.num_classes, self.normalize)
        bank.push("regions", centres, classes)
        B, N, size = x.shape[0], self.num_classes, x.shape[2:]
        image = images_of(targets)
        pair = torch.where(targets >= 0, image * N + targets, B * N)
        order = image_hash(seed, STREAM_BANK, size, x.device).expand_as(pair)
        chosen = rank_in_segment(pair, B * N, order) < self.bank_pixels
        most = min(B * N * self.bank_pixels, targets.numel())
        bank.push("pixels", *sampled_rows(x, targets, chosen, most, self.normalize))


def region_centres(x: Tensor, targets: Tensor, num_classes: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """The region centre of every image and class, (B · N, D), and its class (B · N,), -1 without pixels."""
    B, N = x.shape[0], num_classes
    image = images_of(targets)
    pair = torch.where(targets >= 0, image * N + targets, -1)
    means, counts = class_anchors(x, pair, max(B * N, 1), ignore_index=-1, normalize=normalize)
    classes = torch.arange(N, device=x.device).repeat(B)
    return unit(means[: B * N]), torch.where(counts[: B * N] > 0, classes, -1)


@unchanged_by_autocast
def semi_hard_nce(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    temperature: float,
    hardest: float,
    positives: int,
    negatives: int,
    seed: int | Tensor,
) -> Tensor:
    """``info_nce`` over mined columns: semi-hard mining as the ContrastiveSeg paper describes it.

    For every row ``negatives`` columns are drawn at random from the ``hardest`` share of its negatives, those with the
    largest similarity, and ``positives`` from the share of its positives with the smallest similarity. Shares are
    rounded up. Three matrices of rows x columns numbers are held at once, and more if ``hardest`` is above its
    default. If ``columns`` is None, the rows are the columns.
    """
    itself = columns is None
    if columns is None or column_labels is None:
        columns, column_labels = rows, row_labels
    valid = row_labels >= 0
    similarity = rows / temperature @ columns.T
    with torch.no_grad():
        same = row_labels.unsqueeze(1) == column_labels
        is_pair = valid.unsqueeze(1) & (column_labels >= 0)
        if itself:
            is_pair.fill_diagonal_(False)
        of_negatives, is_negative = _mined(
            similarity, is_pair & ~same, hardest, negatives, seed, STREAM_MINED_NEGATIVES, largest=True
        )
        of_positives, is_positive = _mined(
            similarity, is_pair & same, hardest, positives, seed, STREAM_MINED_POSITIVES, largest=False
        )
    # One gather, so that the gradient is one matrix.
    drawn = similarity.gather(1, torch.cat([of_negatives, of_positives], 1))
    s_negative, s_positive = drawn.split([of_negatives.shape[1], of_positives.shape[1]], 1)
    has_negative = is_negative.any(1, keepdim=True)
    lse = torch.where(is_negative, s_negative, -torch.inf)
    lse = torch.where(has_negative, lse, 0.0).logsumexp(1, keepdim=True)
    term = torch.where(is_positive & has_negative, -F.logsigmoid(s_positive - lse), 0.0)
    of_row = term.sum(1) / is_positive.sum(1).clamp(min=1)
    # 0 · x propagates a NaN or inf of a row that is in no term, and keeps the graph.
    return of_row.sum() / valid.sum().clamp(min=1) + (0.0 * rows).sum()


def _mined(
    similarity: Tensor, among: Tensor, hardest: float, draw: int, seed: int | Tensor, stream: int, *, largest: bool
) -> tuple[Tensor, Tensor]:
    """The columns of ``draw`` random pairs of each row's hardest share, and which of them exist: (R, draw) or fewer."""
    R, C = similarity.shape
    most = math.ceil(hardest * C)
    outside = -torch.inf if largest else torch.inf
    hard = torch.where(among, similarity, outside).topk(most, dim=1, largest=largest).indices
    share = (among.sum(1, keepdim=True).double() * hardest).ceil()
    place = torch.arange(most, device=similarity.device)
    eligible = place < share
    if draw < most:
        pair = torch.arange(R, device=similarity.device).unsqueeze(1) * most + place
        key = torch.where(eligible, pixel_hash(seed, stream, pair & 0xFFFFFFFF), 2**32)
        kept = key.topk(draw, dim=1, largest=False).indices
        hard, eligible = hard.gather(1, kept), eligible.gather(1, kept)
    return hard, eligible
