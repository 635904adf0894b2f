"""Distances of maps and volumes: the inputs, and the transforms that people use today.

``cases()`` lists the inputs, ``transforms(case, image)`` what is timed on one of them: this library first, then its
peers. All of them get the same pixels in the layout and type that serves them best. `python -m benchmarks.run --parts
distances` times them, and `python -m benchmarks.report` writes the table of docs/distance.md.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import contextrast_kernels as ck
from benchmarks.results import Absent, Row
from contextrast_kernels import cases as maps

OURS = "contextrast native"
MULTI_LABEL = "edt multi-label"
SIDE, CLASSES = 256, 32
ANISOTROPIC = (2.5, 1.0, 1.0)


@dataclass(frozen=True)
class DistanceCase:
    """One input and one question about it."""

    what: str
    """ "distance_transform" of a binary mask, or "edge_distance" of classes."""
    regime: str
    sampling: tuple[float, ...] | None = None
    indices: bool = False
    is_volume: bool = True
    side: int = SIDE
    """The number of voxels along each side of a volume, or a quarter of a map's width."""

    @property
    def columns(self) -> dict:
        """The columns of a row that the case fills."""
        sampling = " x ".join(f"{s:g}" for s in self.sampling or ()) or "isotropic"
        height, width = (
            (self.side, self.side) if self.is_volume else (512 * self.side // SIDE, 1024 * self.side // SIDE)
        )
        return {
            "what": self.what,
            "mode": f"{sampling}, indices" if self.indices else sampling,
            "case": f"{self.side}^3" if self.is_volume else "cityscapes",
            "regime": self.regime,
            "batch": 1,
            "height": height,
            "width": width,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def dtype(self) -> torch.dtype:
        if not self.is_volume:
            return torch.int64
        return torch.int8 if self.what == "edge_distance" else torch.uint8


def cases(side: int = SIDE) -> list[DistanceCase]:
    found = []
    for regime in MASKS:
        mask = DistanceCase("distance_transform", regime, side=side)
        found += [mask, replace(mask, sampling=ANISOTROPIC), replace(mask, indices=True)]
        found += [replace(mask, sampling=ANISOTROPIC, indices=True)]
    for regime in LABELS:
        labels = DistanceCase("edge_distance", regime, side=side)
        found += [labels, replace(labels, sampling=ANISOTROPIC)]
    found += [DistanceCase("edge_distance", regime, is_volume=False, side=side) for regime in maps.REGIMES]
    return found


# --------------------------------------------------------------------------------------------------------------- inputs


@functools.lru_cache(2)
def organs(side: int, classes: int) -> Tensor:
    """uint8 (side, side, side): regions with smooth borders, some 30 voxels wide in 256."""
    generator = torch.Generator().manual_seed(0)
    highest, labels = torch.full((side,) * 3, -torch.inf), torch.zeros((side,) * 3, dtype=torch.uint8)
    for n in range(classes):
        coarse = torch.randn(1, 1, 9, 9, 9, generator=generator)
        field = F.interpolate(coarse, (side,) * 3, mode="trilinear", align_corners=True)[0, 0]
        labels = torch.where(field > highest, n, labels)
        highest = torch.maximum(highest, field)
    return labels


def borders(labels: Tensor, thickness: int) -> Tensor:
    """bool: voxels at most ``thickness`` steps along z, y or x from another label. A network errs there."""
    near = torch.zeros_like(labels, dtype=torch.bool)
    for axis in range(3):
        for step in range(1, thickness + 1):
            size = labels.shape[axis] - step
            differ = labels.narrow(axis, 0, size) != labels.narrow(axis, step, size)
            near.narrow(axis, step - step // 2, size)[differ] = True
    return near


def noise(side: int, share: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand((side,) * 3, generator=generator) < share


def ball(side: int) -> Tensor:
    """bool: a ball near one corner, 2 % of the volume."""
    z, y, x = torch.meshgrid(*[torch.arange(side) - side // 4] * 3, indexing="ij")
    return z * z + y * y + x * x < (0.17 * side) ** 2


MASKS: dict[str, Callable[[int], Tensor]] = {
    "trained-like": lambda side: borders(organs(side, 8), 4),
    "organs": lambda side: organs(side, 2) != 0,
    "sparse": lambda side: ~noise(side, 1e-3),
    "collapsed": lambda side: ~ball(side),
    "noise": lambda side: noise(side, 0.5),
}
"""Binary volumes, True where a distance is asked for."""

LABELS: dict[str, Callable[[int], Tensor]] = {
    "trained-like": lambda side: torch.where(borders(organs(side, CLASSES), 2), organs(side, CLASSES).char(), -1),
    "organs": lambda side: organs(side, CLASSES).char(),
    "sparse": lambda side: torch.where(noise(side, 1e-3), organs(side, CLASSES).char(), 0),
    "collapsed": lambda side: torch.where(organs(side, CLASSES) != 3, 3, -1).char(),
    "noise": lambda side: torch.randint(
        CLASSES, (side,) * 3, generator=torch.Generator().manual_seed(2), dtype=torch.int8
    ),
}
"""int8 volumes of 32 classes, -1 outside: errors, and whole label volumes."""


def image_of(case: DistanceCase) -> Tensor:
    """(1, z, y, x) uint8 or int8, or (1, y, x) int64."""
    if case.is_volume and case.what == "edge_distance":
        return LABELS[case.regime](case.side)[None]
    if case.is_volume:
        return MASKS[case.regime](case.side)[None].byte()
    size = {name: case.columns[name] for name in ("height", "width")}
    inputs = replace(maps.CASES["cityscapes"], batch=1, regime=case.regime, **size)
    labels, predictions = inputs.label_maps()
    return ck.error_map(predictions, labels, num_classes=inputs.num_classes).long()


# ----------------------------------------------------------------------------------------------------------- transforms


class Transform(NamedTuple):
    name: str
    make: Callable[[Any], Callable[[], Any]]
    """Makes the call that is timed from the library's module."""
    needs: str = "torch"
    note: str = ""
    exact: bool = True
    """Whether it computes the same function. If not, the note says what it computes."""

    @property
    def is_slow(self) -> bool:
        """Whether a call takes seconds with any number of threads."""
        return self.name.startswith(("SciPy", "MONAI", "kornia"))


def names(case: DistanceCase, device: torch.device) -> list[tuple[str, bool]]:
    """The names of the transforms that are timed on a device, and whether each is slow."""
    nothing = torch.zeros((1, *(4,) * (3 if case.is_volume else 2)), dtype=case.dtype, device=device)
    return [(row.name, row.is_slow) for row in transforms(case, nothing)]


def ours(case: DistanceCase, image: Tensor) -> Any:
    """One call of this library, on the image's device. Distances come first where there are indices too."""
    if case.what == "edge_distance":
        return ck.edge_distance(image, sampling=case.sampling)
    dims = image.ndim - 1
    return ck.distance_transform(image, spatial_dims=dims, sampling=case.sampling, return_indices=case.indices)


def transforms(case: DistanceCase, image: Tensor) -> list[Transform]:
    """This library, then everything that can be asked the same. Calls read torch's number of threads."""
    found = [Transform(OURS, lambda _: lambda: ours(case, image), note=f"{case.columns['dtype']} in")]
    if case.what == "distance_transform":
        return found + _of_mask(image, case.sampling, case.indices)
    if not image.is_cuda:
        found += _of_labels(case, image)
    on_edges = (~edges(image)).byte()
    return found + [_given_edges(row, on_edges) for row in _of_mask(on_edges, case.sampling)]


def _of_mask(mask: Tensor, sampling: tuple[float, ...] | None, indices: bool = False) -> list[Transform]:
    """The peers' transforms of a mask, uint8 (1, ...). Those that cannot give indices are left out if they are asked
    for, and those that know only square pixels if there is a sampling."""
    asked = {"sampling": sampling, "return_indices": indices}
    monai = Transform(
        "MONAI",
        lambda m: lambda: m.distance_transform_edt(mask, **asked),
        *("monai.transforms.utils", "cuCIM's code on a GPU" if mask.is_cuda else "SciPy's code on a CPU"),
    )
    if mask.is_cuda:
        return [
            Transform("CuPy", lambda m: _on_cupy(m, mask, asked), "cupyx.scipy.ndimage"),
            Transform("cuCIM", lambda m: _on_cupy(m, mask, asked), "cucim.core.operations.morphology"),
            monai._replace(make=lambda m: _on_cucim(m, monai)),
        ]
    image = mask[0].numpy()
    found = [Transform("SciPy", lambda m: lambda: m.distance_transform_edt(image, **asked), "scipy.ndimage"), monai]
    if indices:
        return found
    # Of uint8, because edt takes twice as long for a mask of bool.
    found.append(Transform("edt", lambda m: lambda: _edt(m, image, sampling), "edt"))
    if image.ndim == 2 and sampling is None:
        found += [
            Transform(
                "OpenCV precise",
                lambda m: lambda: m.distanceTransform(image, m.DIST_L2, m.DIST_MASK_PRECISE),
                *("cv2", "DIST_MASK_PRECISE"),
            ),
            Transform(
                "kornia",
                lambda m: lambda: m.contrib.distance_transform((mask == 0).float()[:, None])[:, 0],
                *("kornia", "approximate, by repeated convolution", False),
            ),
        ]
    return found


def _edt(module, image: np.ndarray, sampling=None) -> np.ndarray:
    sides = sampling or (1.0,) * image.ndim
    return module.edt(image, anisotropy=sides, black_border=False, parallel=torch.get_num_threads())


def _on_cupy(module, mask: Tensor, asked: dict) -> Callable[[], Tensor]:
    import cupy

    def call():
        found = module.distance_transform_edt(cupy.from_dlpack(mask[0]), **asked, float64_distances=False)
        return torch.from_dlpack(found[0] if asked["return_indices"] else found)

    return call


def _on_cucim(module, row: Transform) -> Callable[[], Any]:
    for needed in ("cupy", "cucim"):
        if importlib.util.find_spec(needed) is None:
            raise Absent(f"{needed} is not installed, without which MONAI moves the mask to the CPU")
    return row.make(module)


def _given_edges(row: Transform, on_edges: Tensor) -> Transform:
    """The transform of a mask as one of labels whose edges are known. To find them is most of a naive user's work."""

    def make(module):
        if bool(on_edges.all()):
            raise Absent("an image without an edge, for which its result means nothing")
        return row.make(module)

    note = "; ".join(filter(None, ("given edges", row.note)))
    return row._replace(name=f"{row.name} on edges", make=make, note=note)


def _of_labels(case: DistanceCase, classes: Tensor) -> list[Transform]:
    """The peers that take the labels themselves, (1, ...) with -1 outside."""
    image = classes[0].numpy()
    labels = np.where(image < 0, 0, image + 1).astype(np.uint8 if case.is_volume else np.int32)
    outside = "multi-label: distance to the nearest pixel outside, a different order of pixels"
    name = "edt" if case.is_volume else MULTI_LABEL
    found = [Transform(name, lambda m: lambda: _edt(m, labels, case.sampling), "edt", outside, False)]
    if not case.is_volume:  # for the classes of a volume it takes minutes
        note = "the reference: mask, edges and transform of each class"
        call = Transform("SciPy for each class", lambda m: lambda: for_each_class(m, image), "scipy.ndimage", note)
        found.append(call)
    return found


def edges(classes: Tensor) -> Tensor:
    """Edge pixels of classes (B, ...), -1 outside: a neighbour inside the image has another number."""
    found = torch.zeros_like(classes, dtype=torch.bool)
    for axis in range(1, classes.ndim):
        size = classes.shape[axis] - 1
        differ = classes.narrow(axis, 0, size) != classes.narrow(axis, 1, size)
        found.narrow(axis, 0, size).logical_or_(differ)
        found.narrow(axis, 1, size).logical_or_(differ)
    return found & (classes >= 0)


def for_each_class(ndimage, classes: np.ndarray) -> np.ndarray:
    distance = np.full(classes.shape, -1.0)
    for n in np.unique(classes[classes >= 0]):
        inside = classes == n
        edge = inside & ~ndimage.binary_erosion(inside, border_value=1)
        distance[inside] = ndimage.distance_transform_edt(~edge)[inside] if edge.any() else np.inf
    return distance


def difference(found: Any, expected: Any, image: Tensor) -> float:
    """The largest difference of two results where the image has a class: peers may have any number elsewhere."""
    found, expected = (x[0] if isinstance(x, tuple | list) else x for x in (found, expected))
    found, expected = (torch.as_tensor(x).double().cpu().view(image.shape) for x in (found, expected))
    return torch.where(found == expected, 0.0, (found - expected).abs())[image.cpu() >= 0].max().item()


# ---------------------------------------------------------------------------------------------------------------- table


def spoken(row: Row) -> str:
    """A row's input in words that a reader understands without the cases."""
    words = {"mid": "half trained", "collapsed": "collapsed to one class", "whole-image": "one wrong class everywhere"}
    share = maps.ERROR_SHARES.get(row.regime)
    regime = words.get(row.regime, row.regime) + (f" ({100 * share:.0f} % errors)" if share else "")
    if row.case == "cityscapes":
        return f"512 × 1024 error map, {regime}"
    kind = {"distance_transform": "mask", "edge_distance": f"{CLASSES} labels"}[row.what]
    return f"{row.case.replace('^3', '³')} {kind}, {regime}"


def peer(row: Row) -> str:
    """A row's library. On several labels edt measures another distance, in volumes too, whose rows say only "edt"."""
    return MULTI_LABEL if (row.what, row.by) == ("edge_distance", "edt") else row.by


def table(rows: list[Row]) -> str:
    """A summary, then a line for each input and question: our time with one and two threads, and the fastest peer's
    with as many."""
    cells: dict[tuple, dict[int | None, list[Row]]] = {}
    for row in rows:
        cells.setdefault((spoken(row), row.mode), {}).setdefault(row.threads, []).append(row)
    lines = ["| input | sampling | 1 thread | fastest peer | ratio | 2 threads | fastest peer | ratio |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    fastest: dict[int, list[float]] = {1: [], 2: []}
    second, scipy, with_indices = [], [], []
    for (name, mode), by_threads in sorted(cells.items()):
        values, ours = [], {}
        for threads in (1, 2):
            of_threads = by_threads.get(threads, [])
            mine = ours[threads] = next((row for row in of_threads if row.by == OURS), None)
            others = sorted((row for row in of_threads if row.by != OURS), key=lambda row: row.median_ms)
            values += [_ms(mine)] if mine else ["–"]
            values += [f"{_ms(others[0])}, {peer(others[0])}"] if others else ["–"]
            values += [f"{others[0].median_ms / mine.median_ms:.1f}"] if mine and others else ["–"]
            ratios = {row.by: row.median_ms / mine.median_ms for row in others} if mine else {}
            (with_indices if "indices" in mode else scipy).extend(ratios[by] for by in ratios if by == "SciPy")
            if ratios and "indices" not in mode:
                fastest[threads].append(min(ratios.values()))
        if ours[1] and ours[2] and "³" in name:
            second.append(ours[1].median_ms / ours[2].median_ms)
        lines.append(f"| {name} | {mode.replace(' x ', ' × ')} | {' | '.join(values)} |")
    summary = [
        f"{subject} {_span(found)} times as {comparison}."
        for subject, comparison, found in (
            ("With one thread this library is", "fast as the fastest peer", fastest[1]),
            ("With two threads it is", "fast as the fastest peer", fastest[2]),
            ("On a volume the second thread makes it", "fast", second),
            ("Without indices SciPy takes", "long", scipy),
            ("With indices SciPy takes", "long", with_indices),
        )
        if found
    ]
    sources = sorted({f"{row.device}, PyTorch {row.torch}, commit {row.commit}" for row in rows})
    return "\n".join([" ".join(summary), "", *lines, "", f"Measured on {'; '.join(sources)}."])


def _span(values: list[float]) -> str:
    low, middle, high = (f"{f(values):.2g}" for f in (min, statistics.median, max))
    return low if low == high else f"{low} to {high} (median {middle})"


def _ms(row: Row) -> str:
    return f"{row.median_ms:.3g} ms" if row.median_ms < 100 else f"{row.median_ms:.0f} ms"
