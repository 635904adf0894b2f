"""Distances of maps and volumes on a CPU, side by side with the transforms that people use today.

    python -m benchmarks.distances [--only WORDS] [--seconds S] [--threads 1 2] [--record]
    python -m benchmarks.distances --page       writes the table of docs/distance.md from results/distances.csv

``cases()`` lists the inputs, ``rows(case)`` lists what is timed on one of them: this library first, then its peers. All
of them get the same voxels in the layout and type that serves them best. A peer that computes the same function is
compared with our result before it is timed. Rows of one case are timed in turn, so that they meet the same machine.
"""

import argparse
import functools
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import contextrast_kernels as ck
from benchmarks import peers, results
from benchmarks.peers import Peer
from benchmarks.results import Row
from contextrast_kernels import cases as maps

OURS = "contextrast native"
SIDE, CLASSES = 256, 32
ANISOTROPIC = (2.5, 1.0, 1.0)
SLOW = ("SciPy", "MONAI", "kornia")
"""What takes seconds: timed once, with one thread."""


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
    """The number of voxels along each side of a volume."""

    def __str__(self):
        size = f"{self.side}^3" if self.is_volume else "512 x 1024"
        sampling = f", sampling {' x '.join(f'{s:g}' for s in self.sampling)}" if self.sampling else ""
        return f"{self.what} {size} {self.regime}{sampling}{', indices' if self.indices else ''}"


def cases() -> list[DistanceCase]:
    found = []
    for regime in MASKS:
        mask = DistanceCase("distance_transform", regime)
        found += [mask, replace(mask, sampling=ANISOTROPIC), replace(mask, indices=True)]
        found += [replace(mask, sampling=ANISOTROPIC, indices=True)]
    for regime in LABELS:
        found += [DistanceCase("edge_distance", regime), DistanceCase("edge_distance", regime, ANISOTROPIC)]
    found += [DistanceCase("edge_distance", regime, is_volume=False) for regime in maps.REGIMES]
    return found


# --- inputs


@functools.cache
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
    inputs = replace(maps.CASES["cityscapes"], batch=1, regime=case.regime)
    labels, predictions = inputs.label_maps()
    return ck.error_map(predictions, labels, num_classes=inputs.num_classes).long()


# --- rows


def rows(case: DistanceCase, image: Tensor) -> list[Peer]:
    """This library, then everything that can be asked the same. Calls read torch's number of threads."""
    if not case.is_volume:
        ours = Peer(OURS, lambda: ck.edge_distance(image), "int64 in", True)
        return [ours, *peers.edge_distances(image)]
    volume, sampling = image[0].numpy(), case.sampling
    if case.what == "edge_distance":
        given = np.where(volume < 0, 0, volume + 1).astype(np.uint8)
        note = "multi-label: distance to the nearest voxel outside, a different order of voxels"
        ours = Peer(OURS, lambda: ck.edge_distance(image, sampling=sampling)[0], "int8 in", True)
        return [ours, peers._row("edt", "edt", note, False, functools.partial(_edt, given, case))]
    asked = {"sampling": sampling, "return_indices": case.indices}
    ours = Peer(OURS, lambda: ck.distance_transform(image[0], spatial_dims=3, **asked), "uint8 in", True)
    found = [
        peers._row("SciPy", "scipy.ndimage", "", True, lambda m: lambda: m.distance_transform_edt(volume, **asked))
    ]
    if not case.indices:  # the others give distances alone
        found.insert(0, peers._row("edt", "edt", "", True, functools.partial(_edt, volume, case)))
        found.append(
            peers._row("MONAI", "monai", "SciPy's code on a CPU", True, functools.partial(_monai, volume, case))
        )
    return [ours, *found]


def _edt(volume: np.ndarray, case: DistanceCase, module) -> Callable:
    sides = case.sampling or (1.0, 1.0, 1.0)
    return lambda: module.edt(volume, anisotropy=sides, black_border=False, parallel=torch.get_num_threads())


def _monai(mask: np.ndarray, case: DistanceCase, module) -> Callable:
    return lambda: module.transforms.utils.distance_transform_edt(mask[None], sampling=case.sampling)[0]


def check(case: DistanceCase, name: str, result, expected) -> None:
    """Raises where a peer that computes the same function has another result."""
    if isinstance(result, tuple):
        result, expected = result[0], expected[0]
    difference = np.abs(np.asarray(result, dtype=np.float64) - np.asarray(expected, dtype=np.float64)).max()
    if not difference <= 1e-4:
        raise AssertionError(f"{case}: {name} differs by {difference:g}")


def measure(case: DistanceCase, threads: int, seconds: float, with_slow: bool) -> Iterator[Row]:
    """Times all rows of a case in turn for about so many seconds; slow ones once."""
    image = image_of(case)
    timed = [row for row in rows(case, image) if row.call is not None]
    timed = [row for row in timed if with_slow or not row.name.startswith(SLOW)]
    expected = timed[0].call()
    spent: dict[str, list[float]] = {row.name: [] for row in timed}
    for row in timed[1:]:
        start = time.perf_counter()
        result = row.call()
        if row.name.startswith(SLOW):
            spent[row.name].append(time.perf_counter() - start)
        if row.exact and case.is_volume:
            check(case, row.name, result, expected)
    del expected
    end, turns = time.perf_counter() + seconds, 0
    while turns < 3 or time.perf_counter() < end:
        for row in timed:
            if row.name.startswith(SLOW):
                continue
            start = time.perf_counter()
            result = row.call()
            spent[row.name].append(time.perf_counter() - start)
            del result
        turns += 1
    for row in timed:
        times = sorted(1e3 * one for one in spent[row.name])
        quartiles = statistics.quantiles(times, n=4) if len(times) > 2 else (0.0, 0.0, 0.0)
        yield Row(
            what=case.what,
            by=row.name,
            mode=", ".join(
                [" x ".join(f"{s:g}" for s in case.sampling or ()) or "isotropic", *["indices"] * case.indices]
            ),
            case=f"{case.side}^3" if case.is_volume else "cityscapes",
            regime=case.regime,
            batch=1,
            height=image.shape[-2],
            width=image.shape[-1],
            dtype=str(image.dtype).removeprefix("torch."),
            threads=threads,
            exact="yes" if row.exact else "no",
            median_ms=statistics.median(times),
            iqr_ms=quartiles[2] - quartiles[0],
            note=row.note,
            **results.environment(),
        )


# ----------------------------------------------------------------------------------------------------------------- page

PAGE = pathlib.Path(__file__).parents[1] / "docs/distance.md"
BLOCK = re.compile(r"(<!-- measured: distances -->\n).*?(<!-- end -->)", re.DOTALL)
SPOKEN = {"distance_transform": "mask", "edge_distance": "32 labels"}


def with_table(text: str) -> str:
    """The page's text with the table that the results file gives."""
    found = results.read(results.DISTANCES)
    return BLOCK.sub(lambda match: f"{match[1]}{table(found)}\n{match[2]}", text)


def table(found: list[Row]) -> str:
    """A line for each input and question: our time with one and two threads, and the fastest peer's with as many."""
    cells: dict[tuple, dict[int, list[Row]]] = {}
    for row in found:
        size = "512 × 1024 labels" if row.case == "cityscapes" else f"256³ {SPOKEN[row.what]}"
        key = (f"{size}, {row.regime}", row.mode)
        cells.setdefault(key, {}).setdefault(row.threads, []).append(row)
    lines = ["| input | sampling | 1 thread | fastest peer | ratio | 2 threads | fastest peer | ratio |"]
    lines.append("|---|---|--:|--:|--:|--:|--:|--:|")
    for (name, mode), by_threads in sorted(cells.items()):
        values = []
        for threads in (1, 2):
            of_threads = by_threads.get(threads, [])
            ours = next((row for row in of_threads if row.by == OURS), None)
            others = sorted((row for row in of_threads if row.by != OURS), key=lambda row: row.median_ms)
            values += [_ms(ours)] if ours else ["–"]
            values += [f"{_ms(others[0])}, {others[0].by}"] if others else ["–"]
            values += [f"{others[0].median_ms / ours.median_ms:.1f}"] if ours and others else ["–"]
        lines.append(f"| {name} | {mode.replace(' x ', ' × ')} | {' | '.join(values)} |")
    sources = sorted({f"{row.device}, PyTorch {row.torch}, commit {row.commit}" for row in found})
    return "\n".join([*lines, "", f"Measured on {'; '.join(sources)}."])


def _ms(row: Row) -> str:
    return f"{row.median_ms:.3g} ms" if row.median_ms < 100 else f"{row.median_ms:.0f} ms"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=(), metavar="WORD", help="cases whose name has all of these words")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time each case for")
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--slow", action="store_true", help="also what takes seconds a call: SciPy, MONAI, kornia")
    parser.add_argument("--no-indices", action="store_true", help="leave out cases with indices")
    parser.add_argument("--record", action="store_true", help="write the rows to results/distances.csv")
    parser.add_argument("--page", action="store_true", help="write the table of docs/distance.md, and time nothing")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    for case in cases():
        words = str(case).replace(",", "").split()
        if not all(word in words for word in options.only) or (options.no_indices and case.indices):
            continue
        for threads in options.threads:
            torch.set_num_threads(threads)
            cv2, _ = peers.module("cv2")
            if cv2:
                cv2.setNumThreads(threads)
            measured = list(measure(case, threads, options.seconds, options.slow and threads == 1))
            ours = measured[0].median_ms
            others = ", ".join(f"{row.by} {row.median_ms:.4g} ({row.median_ms / ours:.2f})" for row in measured[1:])
            print(f"{case}, {threads} thread(s): {ours:.4g} ms; {others}", flush=True)
            if options.record:
                for row in measured:
                    results.record(results.DISTANCES, row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
