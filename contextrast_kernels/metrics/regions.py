"""IoU of regions: from a confusion matrix, and Cityscapes' variant in which every instance has the same weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from contextrast_kernels import checks
from contextrast_kernels.metrics.streaming import Metric, count, from_fixed, to_fixed


class ConfusionMatrix(Metric):
    """Mean IoU over a data set, from the counts of (label, prediction) pairs.

    ``compute()`` gives "miou", "iou_per_class" (N,), "pixel_accuracy" and "mean_accuracy", the mean recall of the
    classes. A class in neither labels nor predictions has no IoU and is left out of the means.

    Args:
        num_classes: N.
        ignore_index: the label of ignored pixels; labels outside 0..N-1 are ignored too. If it is one of 0..N-1, that
            class has no IoU and is left out of the means, and predicting it is a miss.
        group: the ranks to sum over. "auto": all of them if torch.distributed is initialised; None: only this rank; or
            a process group.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.

    Examples:
        >>> scores = ConfusionMatrix(19)
        >>> for images, labels in loader:
        ...     scores.update(model(images), labels)
        >>> scores.compute()["miou"]
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, group: object = "auto"):
        super().__init__(num_classes, ignore_index, group)
        self._layout = {"counts": ((num_classes, num_classes + 1), torch.int64)}

    @property
    def counts(self) -> Tensor:
        """This rank's counts, int64 (N, N+1): row n holds the pixels with label n by predicted class. The last column
        holds those predicted as no class."""
        N = self.num_classes
        return self._state.get("counts", torch.zeros(N, N + 1, dtype=torch.int64))

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor, *, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            predictions: class map (B, H', W') of integers or logits (B, N, H', W') of floats. If
                their size differs from that of the labels, a class map is resized by nearest sampling, and logits
                bilinearly (align_corners=False) before the argmax. A predicted class outside 0..N-1 is a miss for the
                label's class and a false positive of no class.
            labels: (B, H, W) or (B, 1, H, W) integers. For volumes all have one axis more: labels are (B, Z, H, W).
            mask: bool, of the labels' size; only its True pixels count.
        """
        predicted, classes = self._class_maps(predictions, labels, volumes=True)
        counted = classes >= 0
        if mask is not None:
            checks.tensor("mask", mask, f"bool of shape {tuple(classes.shape)}")
            if mask.dtype != torch.bool or mask.shape != classes.shape:
                raise ValueError(
                    f"mask: expected bool of shape {tuple(classes.shape)}, got {checks.describe(mask)}. "
                    "Pass a comparison of a map of the labels' size, such as mask != 0."
                )
            checks.together("labels", labels, "mask", mask)
            counted = counted & mask
        self._add({"counts": confusion(predicted, classes, counted, self.num_classes)})

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        counts = state["counts"]
        hits, labelled = counts.diagonal(), counts.sum(1)
        per_class = iou(counts)
        return {
            "miou": per_class.nanmean(),
            "iou_per_class": per_class,
            "pixel_accuracy": hits.sum().double() / labelled.sum(),
            "mean_accuracy": (hits.double() / labelled).nanmean(),
        }


def confusion(predicted: Tensor, classes: Tensor, counted: Tensor, num_classes: int) -> Tensor:
    """Counts (N, N+1) of (true, predicted class) pairs at the ``counted`` pixels."""
    N = num_classes
    return count(classes * (N + 1) + predicted, counted, N * (N + 1)).view(N, N + 1)


def iou(counts: Tensor) -> Tensor:
    """IoU of each class from confusion counts (..., N, N+1): float64 (..., N); 0 / 0 is NaN."""
    hits = counts.diagonal(dim1=-2, dim2=-1)
    union = counts.sum(-1) + counts[..., :-1].sum(-2) - hits
    return hits.double() / union


CITYSCAPES_INSTANCE_SIZES = (
    *(None,) * 11,
    3462.4756337644,  # person
    3930.4788056518,  # rider
    12794.0202738185,  # car
    27855.1264367816,  # truck
    35732.1511111111,  # bus
    67583.7075812274,  # train
    6298.7200839748,  # motorcycle
    4672.3249222261,  # bicycle
)
"""Average size in pixels of an instance of each of the 19 classes that are evaluated (their trainId), None for a class
without instances. The figures are those of cityscapesScripts, evalPixelLevelSemanticLabeling.py."""

CITYSCAPES_CATEGORIES = (0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 6, 6, 6, 6, 6)
"""Category of each of the 19 classes: flat, construction, object, nature, sky, human, vehicle."""

_BITS = 32  # fractional bits of the shares in fixed point, so that 2**31 instances fit


class InstanceIoU(Metric):
    """Cityscapes' instance-level IoU, in which a small pedestrian has the same weight as a large one.

        iIoU = iTP / (iTP + FP + iFN)         Eq. 8

    Each pixel of an instance of size s adds s̄/s to iTP or iFN, where s̄ is the class's average size. FP are the valid
    pixels of other classes that were predicted as this one, unweighted. Pixels that belong to no single instance (a
    crowd) are in neither iTP nor iFN. At the category level a pixel is right if its category is, and a category is
    scored only if all its classes have instances. All this is as in cityscapesScripts.

    ``compute()`` gives "iiou" and "iiou_per_class" (N,), and with ``categories`` "category_iiou" and
    "iiou_per_category".

    Args:
        num_classes: N.
        instance_sizes: s̄ in pixels for each class, or None for a class without instances, such as
            ``CITYSCAPES_INSTANCE_SIZES``.
        categories: the number of its category for each class, such as ``CITYSCAPES_CATEGORIES``. None: categories are
            not scored.
        first_instance: the lowest id of an instance; pixels with a lower id belong to none. It is 1000 for the values
            of Cityscapes' ``*_instanceIds.png``.
        ignore_index, group: as in ``ConfusionMatrix``.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.

    Examples:
        >>> scores = InstanceIoU(19, CITYSCAPES_INSTANCE_SIZES, categories=CITYSCAPES_CATEGORIES, first_instance=1000)
        >>> scores.update(logits, labels, instances)
    """

    def __init__(
        self,
        num_classes: int,
        instance_sizes: Sequence[float | None],
        *,
        categories: Sequence[int] | None = None,
        first_instance: int = 1,
        ignore_index: int = 255,
        group: object = "auto",
    ):
        super().__init__(num_classes, ignore_index, group)
        checks.integer("first_instance", first_instance)
        _one_for_each_class("instance_sizes", instance_sizes, num_classes)
        for size in instance_sizes:
            if size is not None:
                checks.real("instance_sizes", size, low=0, open_low=True)
        if categories is not None:
            _one_for_each_class("categories", categories, num_classes)
            for category in categories:
                checks.integer("categories", category, low=0, high=2**31 - 1)
        N = num_classes
        shapes = {"counts": (N, N + 1), "instances": (N,), "recalled": (2, N)}
        self._layout = {name: (shape, torch.int64) for name, shape in shapes.items()}
        self.instance_sizes = tuple(instance_sizes)
        self.categories = None if categories is None else tuple(categories)
        self.first_instance = first_instance
        self._category = torch.tensor((*(range(N) if categories is None else categories), -1))

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor, instances: Tensor) -> None:
        """Add a batch.

        Args:
            predictions, labels: as in ``ConfusionMatrix.update``.
            instances: (B, H, W) or (B, 1, H, W) integers, the id of the instance at each pixel. An instance consists
                of the pixels with the same image, label and id.
        """
        N = self.num_classes
        predicted, classes = self._class_maps(predictions, labels)
        instances = checks.class_map("instances", instances, shape=classes.shape)
        checks.together("labels", labels, "instances", instances)

        self._category = category = self._category.to(classes.device)  # later batches find it there and copy nothing
        right = predicted == classes, category[predicted] == category[classes]

        # The pixels are sorted by image, class and id, so an instance is a run, numbered by a running sum. Its size and
        # hits are counted under its number. There are at most as many numbers as pixels, so all shapes are static.
        ids = instances.long()
        belongs = (classes >= 0) & (ids >= self.first_instance)
        image = torch.arange(len(classes), device=classes.device).view(-1, 1, 1)
        group = torch.where(belongs, image * N + classes, len(classes) * N).flatten()
        ids = ids.flatten()
        order = ids.argsort(stable=True)
        order = order[group[order].argsort(stable=True)]
        group, ids, belongs = group[order], ids[order], belongs.flatten()[order]
        begins = torch.ones_like(belongs)
        begins[1:] = (group[1:] != group[:-1]) | (ids[1:] != ids[:-1])
        number, P = begins.cumsum(0) - 1, len(ids)
        size = count(number, belongs, P)
        of_class = torch.zeros_like(size).scatter(0, number, classes.flatten()[order])
        hits = [count(number, belongs & r.flatten()[order], P) for r in right]
        shares = [to_fixed(h.double() / size.clamp(min=1), _BITS) for h in hits]
        exists = size > 0
        self._add(
            {
                "counts": confusion(predicted, classes, classes >= 0, N),
                "instances": count(of_class, exists, N),
                "recalled": torch.stack([_sums(share, of_class, exists, N) for share in shares]),
            }
        )

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        counts, instances = state["counts"], state["instances"]
        recalled, category_recalled = from_fixed(state["recalled"], _BITS)
        nan = float("nan")
        sizes = counts.new_tensor([nan if s is None else s for s in self.instance_sizes], dtype=torch.float64)
        false_alarms = counts[:, :-1].sum(0) - counts.diagonal()
        # iTP + iFN = s̄ · (number of instances), because the weights of an instance's pixels sum to s̄.
        per_class = sizes * recalled / (sizes * instances + false_alarms)
        results = {"iiou": per_class.nanmean(), "iiou_per_class": per_class}
        if self.categories is not None:
            is_member = counts.new_tensor(self.categories) == torch.arange(
                max(self.categories) + 1, device=counts.device
            ).unsqueeze(1)
            member = is_member.double()  # (categories, classes)
            confused = member @ counts[:, :-1].double() @ member.T
            false_alarms = confused.sum(0) - confused.diagonal()
            per_category = member @ (sizes.nan_to_num() * category_recalled)
            per_category = per_category / (member @ (sizes.nan_to_num() * instances) + false_alarms)
            unscored = (member @ sizes.isnan().double()) > 0
            per_category = torch.where(unscored, nan, per_category)
            results |= {"category_iiou": per_category.nanmean(), "iiou_per_category": per_category}
        return results


def _sums(values: Tensor, cells: Tensor, counted: Tensor, size: int) -> Tensor:
    """Sum of the int64 ``values`` of each cell 0..size-1 where ``counted``: int64 (size,)."""
    return values.new_zeros(size).scatter_add(0, torch.where(counted, cells, 0), torch.where(counted, values, 0))


def _one_for_each_class(name: str, values: object, num_classes: int) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(
            f"{name}: expected a list with one entry for each class, got {checks.describe(values)}. Pass a list."
        )
    if len(values) != num_classes:
        raise ValueError(
            f"{name}: expected {num_classes} entries (num_classes), got {len(values)}. Pass one entry for each class."
        )
