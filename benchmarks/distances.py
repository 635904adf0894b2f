"""Distances of maps and volumes: the inputs, and the transforms that people use today.

``cases()`` lists the inputs, ``transforms(case, image)`` what is timed on one of them: this library first, then its
peers. All of them get the same pixels in the layout and type that serves them best. `python -m benchmarks.run --parts
distances` times them, and `python -m benchmarks.report` writes the table of docs/distance.md.
"""

import functools
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
    """From the library's module, the call that is timed."""
    needs: str = "torch"
    note: str = ""
    exact: bool = True
    """Whether it computes the same function; the note says what else it does."""

    @property
    def is_slow(self) -> bool:
        """It takes seconds, whatever the number of threads."""
        return self.name.startswith(("SciPy", "MONAI", "kornia"))


def names(case: DistanceCase, device: torch.device) -> list[tuple[str, bool]]:
    """What there is to time on a device, and whether it is slow."""
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
    if not case.is_volume:
        return found + _of_maps(image)
    if image.is_cuda:
        peer = Transform("CuPy", lambda m: _cupy(m, image, case.sampling, case.indices), "cupy")
        return found if case.what == "edge_distance" else [*found, peer]
    volume, sampling = image[0].numpy(), case.sampling
    if case.what == "edge_distance":
        note = "multi-label: distance to the nearest voxel outside, a different order of voxels"
        given = np.where(volume < 0, 0, volume + 1).astype(np.uint8)
        return [*found, Transform("edt", lambda m: lambda: _edt(m, given, sampling), "edt", note, False)]
    asked = {"sampling": sampling, "return_indices": case.indices}
    scipy = Transform("SciPy", lambda m: lambda: m.distance_transform_edt(volume, **asked), "scipy.ndimage")
    if case.indices:  # the others give distances alone
        return [*found, scipy]
    return [*found, Transform("edt", lambda m: lambda: _edt(m, volume, sampling), "edt"), scipy]


def _edt(module, volume: np.ndarray, sampling=None) -> np.ndarray:
    sides = sampling or (1.0,) * volume.ndim
    return module.edt(volume, anisotropy=sides, black_border=False, parallel=torch.get_num_threads())


def _cupy(cupy, image: Tensor, sampling=None, indices=False) -> Callable[[], Tensor]:
    from cupyx.scipy import ndimage

    options = {"sampling": sampling, "return_indices": indices, "float64_distances": False}

    def call():
        found = ndimage.distance_transform_edt(cupy.from_dlpack(image[0]), **options)
        return torch.from_dlpack(found[0] if indices else found)

    return call


def _of_maps(classes: Tensor) -> list[Transform]:
    """Edge distances of a class map (1, h, w), -1 outside. Those "on edges" are given the edges, which is most of the
    work of a naive user."""
    on_edges = ~edges(classes)
    note = "the reference: mask, edges and transform of each class"
    if classes.is_cuda:
        return [Transform("CuPy on edges", lambda m: _cupy(m, on_edges.byte()), "cupy", "given edges")]
    image, labels = on_edges[0].numpy(), (classes[0] + 1).clamp(min=0).int().numpy()
    outside = "multi-label: distance to the nearest pixel outside, another order of pixels"
    found = [
        Transform("SciPy on edges", lambda m: lambda: m.distance_transform_edt(image), "scipy.ndimage", "given edges"),
        Transform(
            "SciPy for each class", lambda m: lambda: for_each_class(m, classes[0].numpy()), "scipy.ndimage", note
        ),
        Transform(
            "OpenCV precise on edges",
            lambda m: lambda: m.distanceTransform(image.view(np.uint8), m.DIST_L2, m.DIST_MASK_PRECISE),
            *("cv2", "given edges, DIST_MASK_PRECISE"),
        ),
        Transform("edt on edges", lambda m: lambda: _edt(m, image), "edt", "given edges"),
        Transform("edt multi-label", lambda m: lambda: _edt(m, labels), "edt", outside, False),
        Transform(
            "kornia on edges",
            lambda m: lambda: m.contrib.distance_transform((~on_edges).float()[:, None])[:, 0],
            *("kornia", "given edges; approximate, by repeated convolution", False),
        ),
    ]

    def with_edges(row: Transform) -> Transform:
        def make(module):
            if bool(on_edges.all()):
                raise Absent("an image without an edge, for which its result means nothing")
            return row.make(module)

        return row._replace(make=make)

    return [row if row.name == "edt multi-label" else with_edges(row) for row in found]


def edges(classes: Tensor) -> Tensor:
    """Edge pixels of a class map (B, H, W), -1 outside: a 4-neighbour inside the image has another number."""
    x = F.pad(classes.double()[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    here = x[:, 1:-1, 1:-1]
    different = (x[:, :-2, 1:-1] != here) | (x[:, 2:, 1:-1] != here) | (x[:, 1:-1, :-2] != here)
    return (different | (x[:, 1:-1, 2:] != here)) & (classes >= 0)


def for_each_class(ndimage, classes: np.ndarray) -> np.ndarray:
    distance = np.full(classes.shape, -1.0)
    for n in np.unique(classes[classes >= 0]):
        inside = classes == n
        edge = inside & ~ndimage.binary_erosion(inside, border_value=1)
        distance[inside] = ndimage.distance_transform_edt(~edge)[inside]
    return distance


def difference(found: Any, expected: Any, image: Tensor) -> float:
    """The largest difference of two results where the image has a class: peers may have any number elsewhere."""
    found, expected = (x[0] if isinstance(x, tuple) else x for x in (found, expected))
    found, expected = (torch.as_tensor(x).double().cpu().view(image.shape) for x in (found, expected))
    return torch.where(found == expected, 0.0, (found - expected).abs())[image.cpu() >= 0].max().item()


# ---------------------------------------------------------------------------------------------------------------- table


def table(rows: list[Row]) -> str:
    """A line for each input and question: our time with one and two threads, and the fastest peer's with as many."""
    spoken = {"distance_transform": "mask", "edge_distance": "32 labels"}
    cells: dict[tuple, dict[int | None, list[Row]]] = {}
    for row in rows:
        size = "512 × 1024 labels" if row.case == "cityscapes" else f"256³ {spoken[row.what]}"
        cells.setdefault((f"{size}, {row.regime}", row.mode), {}).setdefault(row.threads, []).append(row)
    lines = ["| input | sampling | 1 thread | fastest peer | ratio | 2 threads | fastest peer | ratio |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for (name, mode), by_threads in sorted(cells.items()):
        values = []
        for threads in (1, 2):
            of_threads = by_threads.get(threads, [])
            mine = next((row for row in of_threads if row.by == OURS), None)
            others = sorted((row for row in of_threads if row.by != OURS), key=lambda row: row.median_ms)
            values += [_ms(mine)] if mine else ["–"]
            values += [f"{_ms(others[0])}, {others[0].by}"] if others else ["–"]
            values += [f"{others[0].median_ms / mine.median_ms:.1f}"] if mine and others else ["–"]
        lines.append(f"| {name} | {mode.replace(' x ', ' × ')} | {' | '.join(values)} |")
    sources = sorted({f"{row.device}, PyTorch {row.torch}, commit {row.commit}" for row in rows})
    return "\n".join([*lines, "", f"Measured on {'; '.join(sources)}."])


def _ms(row: Row) -> str:
    return f"{row.median_ms:.3g} ms" if row.median_ms < 100 else f"{row.median_ms:.0f} ms"
