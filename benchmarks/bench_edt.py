"""Edge distance and selection of one Cityscapes crop on the CPU, side by side with what people use today.

    pytest benchmarks/bench_edt.py --benchmark-enable

Rows: this library, from an int64 class map to squared distances, and to the nearest half of each class; the peers of
peers.py, which says what each is given and need not pay for. What is exact is compared with SciPy for each class, or
with the definition, before it is timed. Medians and interquartile ranges go to results/<cpu>.csv.
"""

import contextlib
import functools
from dataclasses import replace

import pytest
import torch

import contextrast_kernels as ck
from benchmarks import peers, results
from benchmarks.results import Row
from contextrast_kernels import cases, native

RATIO, SEED = 0.5, 5
OURS = "contextrast native"
SLOW = {"kornia on edges": 1, "SciPy for each class": 5, "MONAI on edges": 15, "SciPy on edges": 15}
"""Rounds of what takes long; none of these has more than one thread."""
ROUNDS = 40
CASES = {regime: replace(cases.CASES["cityscapes"], batch=1, regime=regime) for regime in cases.REGIMES}


@functools.cache
def errors(regime: str) -> torch.Tensor:
    labels, predictions = CASES[regime].label_maps()
    return ck.error_map(predictions, labels, num_classes=CASES[regime].num_classes).long()


@functools.cache
def distances(regime: str) -> torch.Tensor:
    """Squared, by SciPy for each class; by the definition where there is no edge to measure to."""
    [scipy] = [row for row in peers.edge_distances(errors(regime)) if row.name == "SciPy for each class"]
    if scipy.call is not None:
        return peers.squared(scipy.call(), errors(regime))
    with ck.backend("reference"):
        return ck.edge_distance(errors(regime), squared=True)


@functools.cache
def selected(regime: str) -> torch.Tensor:
    with ck.backend("reference"):
        N = CASES[regime].num_classes
        return ck.select_nearest(errors(regime), distances(regime), RATIO, num_classes=N, seed=SEED)


def names(found: list[peers.Peer]) -> list[str]:
    return [OURS, *(peer.name for peer in found)]


ANY = torch.zeros(1, 4, 4, dtype=torch.int64)
DISTANCE_ROWS = names(peers.edge_distances(ANY))
SELECTION_ROWS = names(peers.selections(ANY, ANY.int(), RATIO, 1, SEED))


@contextlib.contextmanager
def threads_of(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    cv2, _ = peers.module("cv2")
    if cv2:
        cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cv2:
            cv2.setNumThreads(-1)


def one(found: list[peers.Peer], name: str) -> peers.Peer:
    peer = next((peer for peer in found if peer.name == name), None)
    if peer is None or peer.call is None:
        pytest.skip(f"{name}: {peer.note if peer else 'its keys do not hold these distances'}")
    return peer


def timed(benchmark, what: str, regime: str, threads: int, peer: peers.Peer) -> None:
    benchmark.pedantic(peer.call, rounds=SLOW.get(peer.name, ROUNDS), warmup_rounds=0 if peer.name in SLOW else 3)
    if benchmark.stats is None:  # benchmarks are off: then this is a test of the rows
        return
    stats = benchmark.stats.stats
    row = Row(
        **results.of_case(CASES[regime]) | {"channels": None, "strides": "", "dtype": "int64", "layout": ""},
        what=what,
        by=peer.name,
        threads=threads,
        exact="yes" if peer.exact else "no",
        note=peer.note,
        median_ms=1e3 * stats.median,
        iqr_ms=1e3 * stats.iqr,
        **results.environment(),
    )
    results.record(results.path_of(row.device), row)


def needs_native() -> None:
    if native.status("cpu") != "ok":
        pytest.skip(f"native, cpu: {native.status('cpu')}")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("row", DISTANCE_ROWS)
@pytest.mark.parametrize("regime", CASES)
def test_edge_distance(benchmark, regime, row, threads):
    if threads > 1 and row in SLOW:
        pytest.skip(f"{row}: one thread only")
    classes = errors(regime)
    with threads_of(threads):
        if row == OURS:
            needs_native()
            peer = peers.Peer(OURS, lambda: ck.edge_distance(classes, squared=True), "int64 in, squared out", True)
            assert torch.equal(peer.call(), distances(regime))
        else:
            peer = one(peers.edge_distances(classes), row)
            if peer.exact:
                assert torch.equal(peers.squared(peer.call(), classes), distances(regime))
        timed(benchmark, "edge_distance", regime, threads, peer)


@pytest.mark.parametrize("row", SELECTION_ROWS)
@pytest.mark.parametrize("regime", CASES)
def test_select_nearest(benchmark, regime, row):
    given = (errors(regime), distances(regime), RATIO)
    with threads_of(1):
        if row == OURS:
            needs_native()
            call = functools.partial(ck.select_nearest, *given, seed=SEED)
            peer = peers.Peer(OURS, call, "", True)
        else:
            peer = one(peers.selections(*given, CASES[regime].num_classes, SEED), row)
        if peer.exact:
            assert torch.equal(peer.call(), selected(regime))
        timed(benchmark, "select_nearest", regime, 1, peer)
