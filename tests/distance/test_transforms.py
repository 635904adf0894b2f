"""Peers that benchmarks/distances.py and docs/distance.md call exact compute the same distances as this library.

The inputs of the benchmark have the stated dtypes and sizes, and every peer is compared in every regime.
"""

import pathlib
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import contextrast_kernels as ck
from benchmarks import distances, peers
from benchmarks.results import Absent

CASES = [replace(case, side=16) for case in distances.cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(map(str, case.columns.values())))
def test_transforms_that_are_listed_as_exact_equal_ours(case):
    image = distances.image_of(case)
    columns = case.columns
    assert image.dtype == case.dtype
    assert image.shape[-2:] == (columns["height"], columns["width"]) and len(image) == columns["batch"]
    expected = distances.ours(case, image)
    rows = distances.transforms(case, image)
    assert [(row.name, row.is_slow) for row in rows] == distances.names(case, image.device)
    for row in rows:
        library, _ = peers.module(row.needs)
        if library is None or row.name.startswith("kornia"):  # an approximation that takes seconds
            continue
        try:
            found = row.make(library)()
        except Absent:
            assert case.regime == "whole-image"
            continue
        agrees = distances.difference(found, expected, image) <= 1e-4
        assert agrees or not row.exact, row.name


def test_a_wrong_distance_is_a_difference():
    classes = torch.tensor([[[0, 0, -1, 1]]])
    expected = ck.edge_distance(classes)
    assert distances.difference(expected.numpy(), expected, classes) == 0
    assert distances.difference(torch.where(classes < 0, 7.0, expected), expected, classes) == 0
    assert distances.difference(expected + 0.5, expected, classes) == 0.5
    assert not distances.difference(expected * float("nan"), expected, classes) <= 1e-4


def test_every_peer_is_compared_in_every_regime():
    """Each library is compared wherever it can compute the result."""
    everywhere = {"SciPy", "MONAI"}
    for case in CASES:
        suffix = "" if case.what == "distance_transform" else " on edges"
        on_cpu = everywhere if case.indices else everywhere | {"edt"}
        if not case.is_volume:
            on_cpu = on_cpu | {"OpenCV precise", "kornia"}
        names = {name for name, _ in distances.names(case, torch.device("cpu"))}
        assert {name + suffix for name in on_cpu} <= names
        given = distances.image_of(case)
        mask = given if case.what == "distance_transform" else (~distances.edges(given)).byte()
        on_gpu = distances._of_mask(SimpleNamespace(is_cuda=True, image=mask), case.sampling, case.indices)
        assert [row.name for row in on_gpu] == ["CuPy", "cuCIM", "MONAI"]


@pytest.mark.parametrize("case", [CASES[-1], CASES[20]], ids=["map", "volume"])
def test_edges_are_where_the_edge_distance_is_zero(case):
    classes = distances.image_of(replace(case, regime="trained" if not case.is_volume else "trained-like"))
    assert distances.edges(classes).any()
    assert torch.equal(distances.edges(classes), ck.edge_distance(classes) == 0)


def replaced_calls():
    """Their calls and ours in the page's table, without cuCIM, which needs a GPU, and without edt's other distance."""
    page = (pathlib.Path(__file__).parents[2] / "docs" / "distance.md").read_text()
    table = page[page.index("| You call |") : page.index("Differences that matter")]
    calls = re.findall(r"^\| `(.+?)`.*?\| `(.+?)`", table, re.MULTILINE)
    assert len(calls) == 8
    return [pair for pair in calls if "cucim" not in pair[0] and "labels" not in pair[0]]


@pytest.mark.parametrize(("theirs", "ours"), replaced_calls(), ids=lambda call: call.split("(")[0])
def test_each_call_of_the_page_equals_its_replacement(theirs, ours, rng):
    """Distances agree to float32's precision. Those of kornia are approximate and differ by up to a third."""
    name = theirs.split("(")[0].rpartition(".")[0]
    pytest.importorskip(name)
    is_kornia, has_channels = "kornia" in name, "monai" in name
    tolerance = {"rtol": 0.4 if is_kornia else 1e-6, "atol": 0}
    x = torch.from_numpy(rng.random((1, 3, 20, 30)) < (0.05 if is_kornia else 0.95))
    root = name.split(".")[0]
    for given in (x, x[..., :17]) if is_kornia or has_channels else (x[0], x[0, 0]):
        names = {root: sys.modules[root], "ck": ck, "s": (2.5, 1.0, 0.5)[: given.ndim - has_channels], "x": given}
        names["x"] = given.float() if is_kornia else given if has_channels else given.numpy()
        found, expected = eval(theirs, names), eval(ours, names | {"x": given})
        found, expected = (r[0] if isinstance(r, tuple) else r for r in (found, expected))
        torch.testing.assert_close(torch.as_tensor(found).double(), expected.double(), **tolerance)
