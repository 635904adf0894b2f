"""Geometry of the embeddings: alignment and uniformity (the paper's table of A and U), and similarity to anchors by
edge distance (its figure 5)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from contextrast_kernels import checks, maps
from contextrast_kernels.anchors import class_anchors, fuse_anchors
from contextrast_kernels.backend import unchanged_by_autocast
from contextrast_kernels.bane import error_map
from contextrast_kernels.contextrast import check_layers
from contextrast_kernels.distance import edge_distance
from contextrast_kernels.embedding import compute_dtype, unit
from contextrast_kernels.hashing import pixel_hash
from contextrast_kernels.metrics.streaming import Metric, count, from_fixed, to_fixed

STREAM_SAMPLES = 2**20
"""Rank r draws its samples from stream STREAM_SAMPLES + r (``hashing.py``)."""


class AlignmentUniformity(Metric):
    """Alignment A, uniformity U and neighbourhood uniformity U_k (Li et al., CVPR 2022) of pixel embeddings.

        A   = 1/C Σ_i 1/|F_i|² Σ_{v, v' ∈ F_i} ‖v - v'‖₂        the spread of a class: lower is better
        U   = 1/(C(C-1)) Σ_i Σ_{j≠i} ‖c_i - c_j‖₂               the distance between classes: higher is better
        U_k = 1/(C k) Σ_i Σ_{j ∈ the k nearest of i} ‖c_i - c_j‖₂

    F_i are the embeddings v = x / ‖x‖₂ of the pixels with label i, c_i is their mean at unit length, and C is the
    number of classes present. The centres use every pixel. A uses the pairs of ``samples`` pixels per class, drawn at
    random from all batches and ranks. It is exact for a class with at most this many pixels, else an unbiased estimate.
    If one process merges several metrics, pixels at the same position of their streams are drawn together, which gives
    a bias of the order of 1 / ``samples``.

    ``compute()`` gives "alignment", "alignment_per_class" (N,), "uniformity" and "uniformity_{k}". They are NaN
    if there are too few classes, or if the features of a valid pixel are NaN or inf.

    Args:
        num_classes: N.
        nearest: the k of U_k.
        samples: the number of pixels of each class that are kept for A, N·samples·D float32 in all.
        seed: the seed of the draw.
        ignore_index, group: as in ``ConfusionMatrix``.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.

    Examples:
        >>> quality = AlignmentUniformity(19)
        >>> quality.update(features, labels)  # the layer before the segmentation head, as in the paper
    """

    def __init__(
        self,
        num_classes: int,
        nearest: Sequence[int] = (3, 5),
        *,
        samples: int = 256,
        seed: int = 0,
        ignore_index: int = 255,
        group: object = "auto",
    ):
        super().__init__(num_classes, ignore_index, group)
        if not isinstance(nearest, Sequence) or isinstance(nearest, str):
            raise TypeError(
                f"nearest: expected a list of integers, such as (3, 5), got {checks.describe(nearest)}. "
                "Put a single number into a list."
            )
        for k in nearest:
            checks.integer("nearest", k, low=1)
        checks.integer("samples", samples, low=2)
        checks.seed(seed, None)
        N = num_classes
        self._layout = {
            "sums": ((N, None), torch.float64),
            "counts": ((N,), torch.int64),
            "sampled": ((N, samples, None), torch.float32),
            "priority": ((N, samples), torch.int64),  # 2**32 minus the hash that drew the sample; 0 is an empty place
            "seen": ((1,), torch.int64),  # pixels, which numbers them for the draw
        }
        self.nearest = tuple(nearest)
        self.samples = samples
        self.seed = seed

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: (B, D, h, w) floats of one layer, with the same D in every batch.
            labels: (B, H, W) or (B, 1, H, W) integers of any size, brought to (h, w) by nearest sampling.
        """
        N = self.num_classes
        anchors, counts = class_anchors(features, labels, N, ignore_index=self.ignore_index)
        checks.maps_alone("features", features)
        labels = checks.class_map("labels", labels)
        classes = maps.targets(labels, features.shape[2:], N, self.ignore_index).flatten()
        seen = self._state["seen"].to(features.device) if self._state else 0
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        numbers = (seen + torch.arange(len(classes), device=features.device)) % 2**32
        priority = 2**32 - pixel_hash(self.seed, STREAM_SAMPLES + rank, numbers)
        drawn, priority = _highest(priority, torch.where(classes >= 0, classes, N), N, self.samples)
        height, width = features.shape[-2:]
        if len(classes):
            x = features[drawn // (height * width), :, drawn // width % height, drawn % width]
        else:
            x = features.new_zeros(*drawn.shape, features.shape[1])
        x = torch.where(priority.unsqueeze(-1) > 0, unit(x.to(compute_dtype(x.dtype))), 0.0)
        self._add(
            {
                "sums": anchors.double() * counts.unsqueeze(1),
                "counts": counts,
                "sampled": x.float(),
                "priority": priority,
                "seen": counts.new_full((1,), len(classes)),
            }
        )

    def _combine(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
        both = {name: one[name] + other[name] for name in ("sums", "counts", "seen")}
        priority = torch.cat((one["priority"], other["priority"]), 1)
        both["priority"], place = priority.sort(dim=1, descending=True, stable=True)
        place = place[:, : self.samples].unsqueeze(-1).expand(-1, -1, one["sampled"].shape[-1])
        both["priority"] = both["priority"][:, : self.samples]
        both["sampled"] = torch.cat((one["sampled"], other["sampled"]), 1).gather(1, place)
        return both

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        counts, x = state["counts"], state["sampled"].double()
        present = counts > 0
        held = state["priority"] > 0
        # One class at a time, so that only samples² distances are held at once. cdist must not use matrix products:
        # ‖v‖² + ‖v'‖² - 2 v·v' would lose the distance of vectors that are nearly equal.
        pairs = torch.stack(
            [
                torch.where(
                    h & h.unsqueeze(1), torch.cdist(v, v, compute_mode="donot_use_mm_for_euclid_dist"), 0.0
                ).sum()
                for v, h in zip(x, held)
            ]
        )
        n = held.sum(1)
        # A pixel's pair with itself counts in A: it is (|F|-1)/|F| times the mean over pairs of different pixels.
        alignment = pairs / (n * (n - 1)).clamp(min=1) * (counts - 1) / counts
        broken = ~state["sums"].isfinite().all(1)
        alignment = torch.where(broken, torch.nan, alignment)
        results = {
            "alignment": _mean_where(alignment, present),
            "alignment_per_class": torch.where(present, alignment, torch.nan),
        }

        centres = unit(state["sums"])
        C = present.sum()
        distances = torch.cdist(centres, centres, compute_mode="donot_use_mm_for_euclid_dist")
        others = present.unsqueeze(0) & ~torch.eye(len(centres), dtype=torch.bool, device=centres.device)
        to_others = torch.where(others, distances, 0.0).sum(1) / (C - 1)
        results["uniformity"] = _mean_where(to_others, present)  # 0 / 0 = NaN for fewer than two classes
        from_nearest = torch.where(others, distances, torch.inf).sort(dim=1).values
        for k in self.nearest:
            mean = _mean_where(from_nearest[:, :k].mean(1), present)
            results[f"uniformity_{k}"] = torch.where((k < C) & ~broken.any(), mean, torch.nan)
        return results


class AnchorSimilarity(Metric):
    """Cosine similarity of wrongly predicted pixels to their anchors, by the distance to their error region's edge.

    It is the paper's figure 5 and shows whether the pixels near the edge are harder.

    ``compute()`` gives "distance", int64 (bins,), the lower ends of the bins of 1 px; the last bin is open. For each
    layer it gives "true_class" (layers, bins), the mean cosine to the anchor of the label's class, "predicted_class"
    (layers, bins), that to the anchor of the class the pixel was mistaken for, and "pixels", int64 (layers, bins), the
    number of pixels. The cosines of a bin without pixels are NaN. An error region that fills the image has no edge and
    is left out. "predicted_class" also leaves out pixels mistaken for a class that is in no label of the batch. Anchors
    are the fused ones of each batch (Eq. 1).

    Args:
        num_classes: N.
        bins: number of bins.
        fusion_weight: w_h, as in ``contextrast_loss``.
        ignore_index, group: as in ``ConfusionMatrix``.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        bins: int = 16,
        *,
        fusion_weight: float = 0.7,
        ignore_index: int = 255,
        group: object = "auto",
    ):
        super().__init__(num_classes, ignore_index, group)
        checks.integer("bins", bins, low=1, high=2 * checks.MAX_SIDE)
        checks.real("fusion_weight", fusion_weight, low=0.0, high=1.0)
        shape = (None, 2, bins)  # layers; true and predicted class
        self._layout = dict.fromkeys(("cosines", "pixels", "broken"), (shape, torch.int64))
        self.bins = bins
        self.fusion_weight = fusion_weight

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, features: Sequence[Tensor], labels: Tensor, predictions: Tensor) -> None:
        """Add a batch; arguments as in ``contextrast_loss``, which samples labels and predictions to each layer too."""
        check_layers(features)
        checks.maps_alone("features", features[0])
        N = self.num_classes
        predictions = checks.predictions("predictions", predictions, N)
        labels = checks.class_map("labels", labels)
        for name, value in (("labels", labels), ("predictions", predictions)):
            checks.together("features[0]", features[0], name, value)
            checks.samples_from(name, value, *features[0].shape[2:])
        anchors, counts = zip(*(class_anchors(x, labels, N, ignore_index=self.ignore_index) for x in features))
        layers = []
        for i, x in enumerate(features):
            a = anchors[i]
            if i < len(features) - 1:
                a = fuse_anchors(a, counts[i], anchors[-1], counts[-1], self.fusion_weight)
            classes = maps.targets(labels, x.shape[2:], N, self.ignore_index)
            predicted = maps.predicted_classes(predictions, x.shape[2:], self.ignore_index)
            errors = error_map(predicted, classes, num_classes=N, ignore_index=-1)
            squared = edge_distance(errors, squared=True).double()
            distance = squared.clamp(min=0).sqrt().floor().clamp(max=self.bins - 1).long()  # exact below 2**52
            similarity = _cosines(x, a)
            wrong = (errors >= 0) & (squared < torch.iinfo(torch.int32).max)
            has_anchor = (counts[i] > 0)[errors.clamp(min=0).long()]
            layers.append(
                [
                    self._binned(similarity, of_class.clamp(min=0).long(), distance, counted)
                    for of_class, counted in ((classes, wrong), (errors, wrong & has_anchor))
                ]
            )
        cosines, pixels, broken = (
            torch.stack([torch.stack([curve[k] for curve in layer]) for layer in layers]) for k in range(3)
        )
        self._add({"cosines": cosines, "pixels": pixels, "broken": broken})

    def _binned(self, similarity: Tensor, of_class: Tensor, distance: Tensor, counted: Tensor) -> tuple[Tensor, ...]:
        """The sum of cosines in fixed point, the pixels, and those without a finite cosine: int64 (bins,) each."""
        cosine = similarity.gather(1, of_class.unsqueeze(1)).squeeze(1)
        finite = cosine.isfinite()
        fixed = torch.where(counted & finite, to_fixed(cosine.nan_to_num(), _BITS), 0).flatten()
        sums = torch.zeros(self.bins, dtype=torch.int64, device=fixed.device).scatter_add(0, distance.flatten(), fixed)
        return sums, count(distance, counted, self.bins), count(distance, counted & ~finite, self.bins)

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        cosines = from_fixed(state["cosines"], _BITS) / state["pixels"]
        cosines = torch.where(state["broken"] > 0, torch.nan, cosines)
        return {
            "distance": torch.arange(self.bins, device=cosines.device),
            "true_class": cosines[:, 0],
            "predicted_class": cosines[:, 1],
            "pixels": state["pixels"][:, 0],
        }


_BITS = 30  # fractional bits of the cosines in fixed point, so that 2**33 pixels fit into a bin


@unchanged_by_autocast
def _cosines(features: Tensor, anchors: Tensor) -> Tensor:
    """The cosine of every pixel with every anchor: (B, N, h, w)."""
    embeddings = unit(features.movedim(1, -1).to(anchors.dtype))
    return (embeddings @ unit(anchors).T).movedim(-1, 1)


def _highest(priority: Tensor, classes: Tensor, num_classes: int, k: int) -> tuple[Tensor, Tensor]:
    """The k pixels of highest priority of each class: indices and priorities (N, k); priority 0 where there are fewer.

    Class N means no class. The pixels are sorted by class, then by priority, so all shapes are static.
    """
    N, P = num_classes, len(classes)
    key, order = (classes * 2**33 - priority).sort()
    begin = torch.searchsorted(key, torch.arange(N + 1, device=key.device) * 2**33 - 2**32)
    place = begin[:-1, None] + torch.arange(k, device=key.device)
    exists = place < begin[1:, None]
    place = place.clamp(max=max(P - 1, 0))
    if P == 0:
        return place, torch.zeros_like(place)
    drawn = order[place]
    return drawn, torch.where(exists, priority[drawn], 0)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values at ``where``, NaN if there are none. Unlike nanmean, it does not skip a NaN among them."""
    return torch.where(where, values, 0.0).sum() / where.sum()
