"""Metrics at boundaries: IoU inside a trimap, Boundary IoU, boundary F1.

The paper's table of boundary mIoU at 5, 7 and 10 px does not say which of the first two it means, so both are here. In
all three an ignored pixel is not a boundary and makes none of its neighbours one, in labels and in predictions. The
prediction at an ignored pixel therefore has no effect, and a right prediction scores 1.

They score maps and volumes. In a volume a voxel has 6 neighbours, distances are between voxels of equal sides in three
dimensions, and a depth of one gives the scores of the map. To score planes instead, pass them as a batch, such as
``labels.flatten(0, 1)`` of (B, Z, H, W).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks
from contextrast_kernels.distance import NO_EDGE, distance_transform
from contextrast_kernels.maps import targets
from contextrast_kernels.metrics.regions import confusion, iou
from contextrast_kernels.metrics.streaming import Metric, count


@checks.takes_subclasses
def boundary_mask(labels: Tensor, radius: float, *, num_classes: int | None = None, ignore_index: int = 255) -> Tensor:
    """The trimap of a label map: the valid pixels at most ``radius`` px from a boundary between two classes.

    A boundary pixel is a valid pixel with a valid neighbour of a different class: one of 4 neighbours in a map, of 6 in
    a volume. Both sides of a boundary therefore belong to it, and the border of an ignored region is not a boundary.

    Args:
        labels: (B, H, W), (B, 1, H, W) or (B, Z, H, W) integers.
        radius: the Euclidean distance between pixel centres, in pixels; 0 gives only the boundary pixels.
        num_classes: N; values of N and above are ignored. None: every value >= 0 is a class.
        ignore_index: the label of ignored pixels.

    Returns:
        bool (B, H, W) or (B, Z, H, W).

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank or range; the error names it.
    """
    labels = checks.class_map("labels", labels, dims=checks.dims_of(None, labels))
    checks.real("radius", radius, low=0)
    if num_classes is not None:
        checks.num_classes(num_classes)
    checks.ignore_index(ignore_index)
    classes = targets(labels, labels.shape[1:], num_classes, ignore_index)
    return _within(_boundary(classes), radius) & (classes >= 0)


class TrimapIoU(Metric):
    """Mean IoU of the pixels near the boundaries of the labels: one reading of boundary mIoU.

    Only valid pixels at most r px from a label boundary count (``boundary_mask``), on both sides of it; r is half the
    width of the band. For each r ``compute()`` gives "trimap_miou_{r}px" and "trimap_iou_{r}px_per_class" (N,).

    Args:
        num_classes: N.
        radii: r, in pixels of the labels.
        ignore_index, group: as in ``ConfusionMatrix``.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self,
        num_classes: int,
        radii: Sequence[float] = (5, 7, 10),
        *,
        ignore_index: int = 255,
        group: object = "auto",
    ):
        super().__init__(num_classes, ignore_index, group)
        _check_list("radii", radii)
        for radius in radii:
            checks.real("radii", radius, low=0)
        self.radii = tuple(sorted(set(radii)))
        self._layout = {"counts": ((len(self.radii), num_classes, num_classes + 1), torch.int64)}

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch; arguments as in ``ConfusionMatrix.update``."""
        N = self.num_classes
        predicted, classes = _class_maps(self, predictions, labels)
        valid, distance = classes >= 0, _squared_distance_to(_boundary(classes))
        counts = [confusion(predicted, classes, valid & _reached(distance, radius), N) for radius in self.radii]
        self._add({"counts": torch.stack(counts)})

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return _by_width("trimap", [f"{radius:g}px" for radius in self.radii], iou(state["counts"]))


class BoundaryIoU(Metric):
    """Boundary IoU (Cheng et al., CVPR 2021) of each class against the rest: the other reading of boundary mIoU.

        |G_d ∩ P_d| / |G_d ∪ P_d|

    G_d are the pixels of a class's label mask at most d px from a pixel outside the mask, and P_d those of its
    predicted mask. They are found by d steps of 3x3 erosion (3x3x3 in volumes), so d is a chessboard distance. As in
    the authors' code the image border counts as outside. Pixels are counted over the whole data set. For each d
    ``compute()`` gives "boundary_miou_{d}px" and "boundary_iou_{d}px_per_class" (N,), or "boundary_miou_{d}diagonal"
    and so on for fractions of the diagonal.

    Args:
        num_classes: N.
        widths: d, an integer in pixels of the labels, or a number below 1, a fraction of the labels' diagonal that is
            rounded to at least one pixel. The authors' default is 0.02, and 0.005 for Cityscapes.
        ignore_index, group: as in ``ConfusionMatrix``.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self, num_classes: int, widths: Sequence[float] = (5, 7, 10), *, ignore_index: int = 255, group: object = "auto"
    ):
        super().__init__(num_classes, ignore_index, group)
        checks.integer("num_classes", num_classes, low=1, high=2**24)  # a class is held in a float32 below
        _check_list("widths", widths)
        for width in widths:
            if isinstance(width, float) and width < 1:
                checks.real("widths", width, low=0, high=1, open_low=True)
            else:
                checks.integer("widths", width, low=1, high=checks.MAX_SIDE)
        self.widths = tuple(sorted(set(widths)))
        self._layout = {"counts": ((len(self.widths), 3, num_classes), torch.int64)}

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch; arguments as in ``ConfusionMatrix.update``."""
        N = self.num_classes
        predicted, classes = _class_maps(self, predictions, labels)
        predicted = torch.where(classes >= 0, predicted, -1)
        counts = []
        diagonal = _diagonal(classes)
        for width in self.widths:
            pixels = int(width) if width >= 1 else max(1, round(width * diagonal))
            true_band, predicted_band = (_near_outside(c, pixels) for c in (classes, predicted))
            predicted_band = predicted_band & (predicted < N)
            both = true_band & predicted_band & (predicted == classes)
            bands = (classes, both), (classes, true_band), (predicted, predicted_band)
            counts.append(torch.stack([count(cells, band, N) for cells, band in bands]))
        self._add({"counts": torch.stack(counts)})

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        both, true_band, predicted_band = state["counts"].unbind(1)
        widths = [f"{width:g}px" if width >= 1 else f"{width:g}diagonal" for width in self.widths]
        return _by_width("boundary", widths, both.double() / (true_band + predicted_band - both))


class BoundaryF1(Metric):
    """Boundary F1 (after Csurka et al., BMVC 2013): how well the predicted contours of a class match the true ones.

    Precision is the share of a class's predicted boundary pixels with a true boundary pixel of the class within
    ``radius``; recall is the share of true ones with a predicted one. F1 is computed for each image and class. It is
    averaged over the images where the class has a boundary in labels or prediction (F1 = 0 if only one of them has),
    then over classes. A boundary pixel of a class has a valid 4-neighbour of a different class; the image border makes
    no boundary.

    ``compute()`` gives "boundary_f1" and "boundary_f1_per_class" (N,).

    Args:
        num_classes: N. The time is proportional to it: each class needs a distance transform of the batch.
        radius: the Euclidean tolerance in pixels. None: 0.75 % of the labels' diagonal, as in the paper.
        ignore_index, group: as in ``ConfusionMatrix``.

    Raises:
        TypeError, ValueError: an option or a batch cannot be used; the error names the argument.
    """

    def __init__(
        self, num_classes: int, radius: float | None = None, *, ignore_index: int = 255, group: object = "auto"
    ):
        super().__init__(num_classes, ignore_index, group)
        if radius is not None:
            checks.real("radius", radius, low=0)
        self.radius = radius
        self._layout = {"f1": ((num_classes,), torch.float64), "images": ((num_classes,), torch.int64)}

    @checks.takes_subclasses
    @torch.no_grad()
    def update(self, predictions: Tensor, labels: Tensor) -> None:
        """Add a batch; arguments as in ``ConfusionMatrix.update``."""
        predicted, classes = _class_maps(self, predictions, labels)
        radius = 0.0075 * _diagonal(classes) if self.radius is None else self.radius
        maps = torch.stack((torch.where(classes >= 0, predicted, -1), classes))
        boundary = _boundary(maps.flatten(0, 1)).view_as(maps)
        scores, images = [], []
        for n in range(self.num_classes):  # one class at a time, to hold one map of the batch and not N
            of_class = boundary & (maps == n)
            near = _within(of_class.flatten(0, 1), radius).view_as(maps)
            matched = (of_class & near.flip(0)).flatten(2).sum(2)
            total = of_class.flatten(2).sum(2)
            precision, recall = matched.double() / total.clamp(min=1)
            scores.append((2 * precision * recall / (precision + recall)).nan_to_num().sum())  # 0 / 0: nothing matched
            images.append((total.sum(0) > 0).sum())
        self._add({"f1": torch.stack(scores), "images": torch.stack(images)})

    def _results(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        per_class = state["f1"] / state["images"]
        return {"boundary_f1": per_class.nanmean(), "boundary_f1_per_class": per_class}


def _class_maps(metric: Metric, predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``Metric._class_maps`` of maps or volumes. Volumes of depth one become maps."""
    predicted, classes = metric._class_maps(predictions, labels, volumes=True)
    is_plane = classes.ndim == 4 and classes.shape[1] == 1
    return (predicted[:, 0], classes[:, 0]) if is_plane else (predicted, classes)


def _boundary(classes: Tensor) -> Tensor:
    """Pixels with a neighbour of a different class along an axis of a map or volume (B, ...), whose negative values are
    no class."""
    boundary = torch.zeros_like(classes, dtype=torch.bool)
    for axis in range(1, classes.ndim):
        length = classes.shape[axis]
        if length < 2:
            continue
        before, after = classes.narrow(axis, 0, length - 1), classes.narrow(axis, 1, length - 1)
        differs = (before != after) & (before >= 0) & (after >= 0)
        boundary.narrow(axis, 0, length - 1).logical_or_(differs)
        boundary.narrow(axis, 1, length - 1).logical_or_(differs)
    return boundary


def _squared_distance_to(pixels: Tensor) -> Tensor:
    return distance_transform(~pixels, spatial_dims=pixels.ndim - 1, squared=True)


def _diagonal(classes: Tensor) -> float:
    return sum(side**2 for side in classes.shape[1:]) ** 0.5


def _reached(squared_distance: Tensor, radius: float) -> Tensor:
    limit = NO_EDGE - 1 if radius >= 2 * checks.MAX_SIDE else int(radius**2)
    return squared_distance <= limit


def _within(pixels: Tensor, radius: float) -> Tensor:
    """Pixels (B, ...) at most ``radius`` from one of ``pixels`` in their image."""
    return _reached(_squared_distance_to(pixels), radius)


def _near_outside(classes: Tensor, width: int) -> Tensor:
    """Pixels with a different class, or the outside of the image, at most ``width`` px away along every axis.

    A window holds a different class exactly if its largest or its smallest class differs, so two maps are enough for
    all classes. Negative values are not classes.
    """
    if classes.numel() == 0:
        return torch.zeros_like(classes, dtype=torch.bool)
    valid = classes >= 0
    extremes = torch.stack((classes, -classes), 1).float()
    extremes = torch.where(valid.unsqueeze(1), extremes, -torch.inf)
    axes = classes.ndim - 1
    pool = F.max_pool2d if axes == 2 else F.max_pool3d
    for axis in range(axes):
        reach = [width if other == axis else 0 for other in range(axes)]
        extremes = pool(extremes, [2 * steps + 1 for steps in reach], 1, reach)
    highest, lowest = extremes.unbind(1)
    differs = (highest != classes) | (lowest != -classes)
    at_border = torch.ones_like(valid)
    at_border[(slice(None), *(slice(width, side - width) for side in classes.shape[1:]))] = False
    return valid & (differs | at_border)


def _by_width(name: str, widths: Sequence[str], per_class: Tensor) -> dict[str, Tensor]:
    """Name the entries of IoU (widths, N): for each width the mean and the classes."""
    results = {}
    for width, values in zip(widths, per_class):
        results[f"{name}_miou_{width}"] = values.nanmean()
        results[f"{name}_iou_{width}_per_class"] = values
    return results


def _check_list(name: str, values: object) -> None:
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) == 0:
        raise TypeError(
            f"{name}: expected a list of numbers, such as (5, 7, 10), got {checks.describe(values)}. "
            "Pass a list of at least one number."
        )
