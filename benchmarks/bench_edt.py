"""Edge distance of one 512 x 1024 map on the CPU, side by side with what people use today.

    pytest benchmarks/bench_edt.py --benchmark-enable

Rows: this library, from an int64 class map to squared distances; `edt`, multi-label, which answers another question
(distance to the nearest pixel outside) from int32 labels; OpenCV's precise transform, `edt` and SciPy's on the
complement of the edges, which they are given; SciPy as the definition reads, one transform for each class, edges
included; kornia's approximation, given the edges. What a row is given, it does not pay for. Every exact row is compared
with SciPy for each class before it is timed.

Medians and interquartile ranges go to results/<cpu>.csv. ratio_to_fastest_peer is the median of the fastest peer in the
same regime, on at most as many threads, divided by the row's own: above 1 is faster than every peer.
"""

import csv
import functools
import pathlib
import platform
import re
import subprocess

import numpy as np
import pytest
import torch
from scipy import ndimage

import contextrast_kernels as ck
from contextrast_kernels import native

cv2 = pytest.importorskip("cv2")
edt = pytest.importorskip("edt")
kornia = pytest.importorskip("kornia")

H, W, N = 512, 1024, 19
CASE = f"edge_distance {H}x{W} N{N}"
OURS = "contextrast native"
COLUMNS = (
    *("row", "case", "regime", "threads", "median_ms", "iqr_ms", "ratio_to_fastest_peer"),
    *("cpu", "torch", "commit"),
)


@functools.cache
def fields(sigma, seed):
    """N smooth random fields; their arg-max is a map of N classes in regions about sigma pixels wide."""
    rng = np.random.default_rng(seed)
    smooth = np.stack([ndimage.gaussian_filter(f, sigma) for f in rng.standard_normal((N, H, W)).astype(np.float32)])
    return smooth / smooth.std(axis=(1, 2), keepdims=True)


def error_map(regime):
    """Wrongly predicted classes, -1 elsewhere; the lowest 40 rows are ignored, like the bonnet of a car."""
    labels = fields(24, 1).argmax(0)
    predictions = {
        "trained (9 % errors)": lambda: (fields(24, 1) + 0.10 * fields(6, 2)).argmax(0),
        "trained (13 % errors)": lambda: (fields(24, 1) + 0.15 * fields(6, 2)).argmax(0),
        "half trained (34 % errors)": lambda: (fields(24, 1) + 0.45 * fields(6, 2)).argmax(0),
        "large wrong regions": lambda: fields(40, 5).argmax(0),
        "collapsed to one class": lambda: np.full((H, W), 3),
        "noise": lambda: np.random.default_rng(3).integers(0, N, (H, W)),
    }[regime]()
    errors = np.where(predictions != labels, predictions, -1)
    errors[-40:] = -1
    return errors


REGIMES = (
    *("trained (9 % errors)", "trained (13 % errors)", "half trained (34 % errors)"),
    *("large wrong regions", "collapsed to one class", "noise"),
)


@functools.cache
def inputs(regime):
    errors = error_map(regime)
    return {
        "distance": scipy_for_each_class(errors),
        "classes": torch.from_numpy(errors)[None],
        "int32 labels": np.ascontiguousarray(errors + 1, dtype=np.int32),
        "not edges": np.ascontiguousarray(native.edge_distance(torch.from_numpy(errors)[None], True)[0].numpy() != 0),
    }


def scipy_for_each_class(classes):
    distance = np.full(classes.shape, -1.0)
    for n in np.unique(classes[classes >= 0]):
        inside = classes == n
        edge = inside & ~ndimage.binary_erosion(inside, border_value=1)
        distance[inside] = ndimage.distance_transform_edt(~edge)[inside]
    return distance


def contender(row, given, threads):
    """The call that is timed, and whether its values at error pixels are the exact edge distances."""
    classes, not_edges = given["classes"], given["not edges"]
    if row == OURS:
        return lambda: ck.edge_distance(classes, squared=True), True
    if row == "edt multi-label":
        return lambda: edt.edt(given["int32 labels"], black_border=False, parallel=threads), False
    if row == "edt on edges":
        return lambda: edt.edt(not_edges, black_border=False, parallel=threads), True
    if row == "OpenCV precise on edges":
        image = not_edges.astype(np.uint8)
        return lambda: cv2.distanceTransform(image, cv2.DIST_L2, cv2.DIST_MASK_PRECISE), True
    if row == "SciPy on edges":
        return lambda: ndimage.distance_transform_edt(not_edges), True
    if row == "SciPy for each class":
        return lambda: scipy_for_each_class(classes[0].numpy()), True
    edges = torch.from_numpy(~not_edges).float()[None, None]
    return lambda: kornia.contrib.distance_transform(edges), False


ROUNDS = {
    **{OURS: 200, "edt multi-label": 40, "edt on edges": 40, "OpenCV precise on edges": 40},
    **{"SciPy on edges": 15, "SciPy for each class": 5, "kornia on edges": 1},
}
# SciPy has one thread; kornia takes seconds.
ONE_THREAD = ("SciPy on edges", "SciPy for each class", "kornia on edges")


@pytest.fixture(scope="module")
def results():
    rows = []
    yield rows
    if rows:
        write(rows)


def cpu_name():
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
        return re.search(r"model name\s*:\s*(.*)", text)[1].strip()
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def write(rows):
    folder = pathlib.Path(__file__).parent
    git = ["git", "-C", folder, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    path = folder / "results" / f"{re.sub(r'[^a-z0-9]+', '-', cpu_name().lower()).strip('-')}.csv"
    others = []
    if path.exists():
        with path.open(newline="") as file:
            others = [row for row in csv.DictReader(file) if row["case"] != CASE]
    for row in rows:
        peers = [
            other["median_ms"]
            for other in rows
            if other["row"] != OURS and other["regime"] == row["regime"] and other["threads"] <= row["threads"]
        ]
        row["ratio_to_fastest_peer"] = f"{min(peers) / row['median_ms']:.3g}" if peers else ""
    for row in rows:
        row |= {"case": CASE, "cpu": cpu_name(), "torch": torch.__version__, "commit": commit}
        row |= {name: f"{row[name]:.3f}" for name in ("median_ms", "iqr_ms")}
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(others + rows)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("row", ROUNDS)
@pytest.mark.parametrize("regime", REGIMES)
def test_edge_distance(benchmark, results, regime, row, threads):
    if native.status("cpu") != "ok":
        pytest.skip(f"native, cpu: {native.status('cpu')}")
    if threads > 1 and row in ONE_THREAD:
        pytest.skip(f"{row}: one thread only")
    given = inputs(regime)
    call, exact = contender(row, given, threads)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        if exact:
            distance = np.asarray(call(), dtype=np.float64).reshape(H, W)
            inside = given["distance"] >= 0
            expected = given["distance"][inside]
            if row == OURS:
                assert np.array_equal(distance[inside], np.rint(expected**2))
            else:
                assert np.allclose(distance[inside], expected, rtol=1e-6, atol=0)
        benchmark.pedantic(call, rounds=ROUNDS[row], warmup_rounds=min(3, ROUNDS[row] - 1))
    finally:
        torch.set_num_threads(before)
        cv2.setNumThreads(-1)
    if benchmark.stats is not None:  # None where benchmarks are off: then this is a test of the rows
        stats = benchmark.stats.stats
        results.append(
            {
                "row": row,
                "regime": regime,
                "threads": threads,
                "median_ms": 1e3 * stats.median,
                "iqr_ms": 1e3 * stats.iqr,
            }
        )
