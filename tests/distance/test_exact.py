"""The distance transform and the edge distance equal brute force bit for bit, and agree with SciPy, MONAI and edt."""

import itertools
import math
import pathlib
import re

import distance_cases as volumes
import numpy as np
import pytest
import torch
from distance_cases import SAMPLINGS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

import contextrast_kernels as ck
from contextrast_kernels import native

BACKENDS = ["reference"] + (["native"] if native.status("cpu") == "ok" else [])


def transformed(mask, sampling, spatial_dims=None):
    """Return squared distances and indices, and check that all four calls agree."""
    mask = torch.as_tensor(mask)
    dims = {"spatial_dims": mask.ndim - 1 if spatial_dims is None else spatial_dims, "sampling": sampling}
    squared, indices = ck.distance_transform(mask, squared=True, return_indices=True, **dims)
    distance, indices_again = ck.distance_transform(mask, return_indices=True, **dims)
    assert torch.equal(indices, indices_again)
    assert torch.equal(ck.distance_transform(mask, squared=True, **dims), squared)
    assert torch.equal(ck.distance_transform(mask, **dims), distance)
    assert squared.dtype == (torch.int32 if sampling is None else torch.float64)
    assert distance.dtype == torch.float32 and indices.dtype == torch.int32
    nothing = squared == (volumes.NO_EDGE if sampling is None else math.inf)
    in_pixels = torch.where(nothing, math.inf, squared.double().sqrt()).float()
    assert torch.equal(distance, in_pixels)
    return squared.numpy(), indices.numpy()


def check(mask, sampling, first_in_memory=True):
    """Compare masks with brute force. If first_in_memory, each index must be the first of equally near zeros."""
    squared, number = volumes.brute_force(mask == 0, sampling)
    ours, indices = transformed(mask, sampling)
    assert (ours == squared).all()
    shape = mask.shape[1:]
    if first_in_memory:
        assert (indices == volumes.coordinates(number, shape)).all()
        return
    flat = np.maximum(volumes.numbers(indices, shape), 0)
    for image, numbers, distances in zip(mask, flat, ours, strict=True):
        between = volumes.costs(shape, sampling)
        reached = between[np.arange(image.size), numbers.ravel()].reshape(shape)
        if (image == 0).any():
            assert (reached == distances).all() and (image.ravel()[numbers] == 0).all()


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ck.backend(request.param):
        yield request.param


# ---------------------------------------------------------------------------------------------------------- brute force


SMALLER = [shape for shape in itertools.product((1, 2, 3), (1, 2, 3), (1, 2)) if shape != (3, 3, 2)]


@pytest.mark.parametrize("shape", [(9,), (3, 4), (1, 5), (5, 1), (1, 2, 5), (2, 5, 1), (1, 1, 8), *SMALLER], ids=str)
def test_every_small_binary_map_equals_brute_force(backend, shape):
    sampling = (0.7, 1.3, 2.9)[-len(shape) :]
    for side in (None, sampling):
        check(volumes.every_map(shape, 2), side)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLINGS[:4])
def test_every_binary_volume_of_3x3x2_equals_brute_force(sampling):
    """There are 2^18 of them."""
    every = volumes.every_map((3, 3, 2), 2)
    for start in range(0, len(every), 2**13):
        check(every[start : start + 2**13], sampling, first_in_memory=sampling in SAMPLINGS[:2])


@pytest.mark.parametrize(
    ("shape", "symbols"),
    [
        *(((2, 2, 2), 3), ((3, 2, 2), 2)),
        *(pytest.param(shape, 3, marks=pytest.mark.slow) for shape in ((1, 3, 3), (3, 2, 2))),
    ],
)
def test_every_small_label_volume_equals_brute_force(backend, shape, symbols):
    """With lowest -1 the smallest symbol is outside of all classes. With 0 every symbol is a class."""
    every = volumes.every_map(shape, symbols).astype(np.int64)
    for start in range(0, len(every), 2**13):
        for lowest in (-1, 0):
            classes = every[start : start + 2**13] + lowest
            for sampling in (None, (0.7, 1.3, 2.9)):
                squared = ck.edge_distance(torch.from_numpy(classes), sampling=sampling, squared=True)
                expected = volumes.edge_distance(classes, sampling).reshape(squared.shape)
                assert (squared.numpy() == expected).all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("shape", [(6, 7, 9), (1, 20, 17), (33, 2, 5), (2, 40, 3)])
def test_every_family_equals_brute_force(backend, rng, shape, sampling):
    """The index is the first of equally near zeros. With a sampling such as 0.7 sums may be equal by rounding alone.
    The indices of such ties are not compared."""
    masks = np.stack(list(volumes.families(rng, shape).values()))
    check(masks, sampling, first_in_memory=sampling in SAMPLINGS[:2])


@pytest.mark.parametrize(
    ("shape", "sampling"),
    [
        ((17, 4), (1, 10000)),
        ((4, 17), (10000, 1)),
        ((40, 3), (1, 16000)),
        ((5, 3, 9), (3, 12345, 1)),
        ((2, 9), (2, 8191)),
    ],
)
def test_very_anisotropic_pixels_equal_brute_force(backend, rng, shape, sampling):
    """The sampling has integers whose squares nearly fill 32 bits on a short axis."""
    for share in (0.02, 0.2, 0.6, 0.95):
        check((rng.random((3, *shape)) >= share).astype(np.uint8), sampling)


@pytest.mark.parametrize(
    ("shape", "sampling", "zero"),
    [
        ((1000, 100), (25, 201), (0, 5)),
        ((1000, 100), (25, 201), (999, 94)),
        ((97, 1000), (201, 25), (3, 0)),
        ((700, 81, 3), (39, 221, 1), (0, 3, 1)),
        ((700, 3, 81), (39, 1, 221), (699, 1, 3)),
    ],
)
def test_costs_that_nearly_fill_32_bits_are_exact(backend, shape, sampling, zero):
    """With one zero the distances are known in closed form. The largest is just below 2^30, and that of a pixel beyond
    the end of a line would be above."""
    mask = np.ones((1, *shape), dtype=bool)
    mask[(0, *zero)] = False
    place = np.indices(shape)
    expected = sum((side * (axis - q)) ** 2 for side, axis, q in zip(sampling, place, zero, strict=True))
    assert 0.9 * 2**30 < expected.max() < 2**30
    squared, indices = transformed(mask, sampling)
    assert (squared[0] == expected).all()
    assert all((axis == q).all() for axis, q in zip(indices, zero, strict=True))


@pytest.mark.parametrize("spatial_dims", [1, 2])
def test_sampled_lines_and_maps_take_the_first_of_equal_costs(backend, rng, spatial_dims):
    """With two axes nothing is rounded before the last sum, so ties are exactly those of brute force."""
    shape = (200,) if spatial_dims == 1 else (17, 23)
    for percent in (5, 50, 95, 99, 100):
        mask = rng.random((6, *shape)) * 100 < percent
        for sampling in ((0.7,) * spatial_dims, (0.3, 1.1)[:spatial_dims]):
            check(mask, sampling)


@settings(max_examples=100, deadline=None)
@given(
    mask=arrays.arrays(bool, arrays.array_shapes(min_dims=2, max_dims=4, max_side=9), fill=st.booleans()),
    sides=st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3),
)
def test_fuzzed_masks_equal_brute_force(mask, sides):
    sampling = tuple(sides[: mask.ndim - 1])
    for backend in BACKENDS:
        with ck.backend(backend):
            check(mask, None)
            check(mask, sampling, first_in_memory=False)


def assert_volume_equals_the_reference(data):
    """These are too large for brute force: they have word borders, blocks and strips, and some are long and thin."""
    size = data.draw(st.sampled_from([(70, 40, 3), (3, 90, 35), (34, 33, 17), (2, 3, 300), (300, 1, 5), (40, 70, 9)]))
    zeros = data.draw(st.sampled_from([1, 3, 40, 2000]))
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    mask = np.ones((2, *size), dtype=bool)
    mask[tuple(generator.integers(0, n, zeros) for n in mask.shape)] = False
    sampling = data.draw(st.sampled_from(SAMPLINGS))
    results = []
    for backend in BACKENDS:
        with ck.backend(backend):
            results.append(transformed(mask, sampling))
            classes = torch.from_numpy(generator.integers(-1, 2, (2, *size)))
    for squared, indices in results[1:]:
        assert (squared == results[0][0]).all() and (indices == results[0][1]).all()
    labels = [ck.edge_distance(classes, sampling=sampling, squared=True)]
    with ck.backend("reference"):
        labels.append(ck.edge_distance(classes, sampling=sampling, squared=True))
    assert torch.equal(*labels)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_fuzzed_volumes_equal_the_reference(data):
    assert_volume_equals_the_reference(data)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_more_fuzzed_volumes_equal_the_reference(data):
    assert_volume_equals_the_reference(data)


# ---------------------------------------------------------------------------------------------------------------- peers


def check_against_scipy(mask, sampling):
    """Distances agree to one unit in the last place of float32, and each index is a nearest zero."""
    squared, indices = transformed(mask[None], sampling)
    distance, scipys = ndimage.distance_transform_edt(mask, sampling, return_indices=True)
    ours = ck.distance_transform(torch.from_numpy(mask), spatial_dims=mask.ndim, sampling=sampling).numpy()
    np.testing.assert_array_max_ulp(ours, distance.astype(np.float32), 1)
    sides = np.reshape(1.0 if sampling is None else sampling, (-1,) + (1,) * mask.ndim)
    place = np.indices(mask.shape)
    for nearest in (indices[:, 0], scipys):
        assert not mask[tuple(nearest)].any()
        reached = np.sqrt((((nearest - place) * sides) ** 2).sum(0))
        np.testing.assert_allclose(reached, np.sqrt(squared[0]), rtol=1e-14)


@pytest.mark.parametrize("sampling", [None, (1.0, 1.0, 2.5), (0.7, 0.7, 3.0)])
def test_every_family_equals_scipy(backend, rng, sampling):
    for name, mask in volumes.families(rng, (11, 33, 35)).items():
        if name != "no zero":
            check_against_scipy(mask, sampling)


def ring_and_helix():
    """(40, 60, 70): 1 in a torus, 2 in a helix through it, else 0."""
    z, y, x = np.mgrid[:40, :60, :70]
    ring = (np.hypot(y - 30, x - 35) - 20) ** 2 + (z - 20) ** 2 < 64
    helix = (y - 30 - 20 * np.cos(z / 5)) ** 2 + (x - 35 - 20 * np.sin(z / 5)) ** 2 < 30
    return np.where(helix, 2, np.where(ring, 1, 0))


def check_against_edt_and_monai(mask, sampling):
    ours = ck.distance_transform(torch.from_numpy(mask), spatial_dims=3, sampling=sampling).numpy()
    edt = pytest.importorskip("edt")
    theirs = edt.edt(mask, anisotropy=sampling or (1.0, 1.0, 1.0), black_border=False)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    monai = pytest.importorskip("monai.transforms.utils")
    theirs = monai.distance_transform_edt(torch.from_numpy(mask)[None], sampling=sampling)
    np.testing.assert_allclose(ours, np.asarray(theirs)[0], rtol=1e-6)


@pytest.mark.parametrize("sampling", [None, (2.5, 1.0, 1.0)])
def test_a_ring_and_a_helix_equal_scipy_edt_and_monai(sampling):
    image = ring_and_helix()
    for mask in (image > 0, image != 2):
        check_against_scipy(mask, sampling)
        check_against_edt_and_monai(mask, sampling)


@pytest.mark.parametrize("name", ["anatomical.nii", "example4d.nii.gz"])
def test_real_heads_equal_scipy_edt_and_monai(name):
    """Magnetic resonance images of heads that nibabel ships, cut at three intensities, in voxels and in millimetres."""
    nibabel = pytest.importorskip("nibabel")
    scan = nibabel.load(pathlib.Path(nibabel.__file__).parent / "tests/data" / name)
    image = np.asarray(scan.dataobj)
    if image.ndim == 4:
        image = image[..., 0]
    millimetres = tuple(float(side) for side in scan.header.get_zooms()[:3])
    for share in (0.5, 0.75, 0.95):
        mask = np.ascontiguousarray(image > np.quantile(image, share))
        assert 0 < mask.mean() < 1
        for sampling in (None, millimetres):
            check_against_scipy(mask, sampling)
            check_against_edt_and_monai(mask, sampling)


def test_edge_distance_of_a_volume_is_a_transform_for_each_class(backend):
    classes = torch.from_numpy(ring_and_helix()[None]) - 1
    squared = ck.edge_distance(classes, squared=True)[0].numpy()
    of_edge = volumes.edges(classes.numpy()[:, 5:15, 5:25, 5:30])[0]  # brute force is slow: a part is enough
    part = squared[5:15, 5:25, 5:30]
    assert (part[of_edge] == 0)[1:].all()
    for value in (0, 1):
        region = classes[0].numpy() == value
        inner = ndimage.binary_erosion(region, border_value=1)
        expected = ndimage.distance_transform_edt(inner | ~region) ** 2
        assert (squared[region] == np.rint(expected[region])).all()


# -------------------------------------------------------------------------------------------------------------- extents


@pytest.mark.parametrize("shape", [(16384, 2, 2), (2, 16384, 2), (2, 2, 16384)])
def test_longest_sides_of_a_volume_have_exact_distances(shape):
    """With one zero in a corner the distances are known in closed form."""
    mask = torch.ones(shape, dtype=torch.uint8)
    mask[0, 0, 0] = 0
    squared = sum(torch.arange(n).reshape([-1 if a == b else 1 for b in range(3)]) ** 2 for a, n in enumerate(shape))
    distance, indices = ck.distance_transform(mask, spatial_dims=3, squared=True, return_indices=True)
    assert torch.equal(distance, squared.int())
    assert not indices.any()


@pytest.mark.slow
def test_a_volume_of_2_to_the_31_zeros_has_distance_zero():
    """The last voxel's number is the largest int32. The test needs 13 GB."""
    memory = pathlib.Path("/proc/meminfo")
    if not memory.exists() or int(re.search(r"MemAvailable: +(\d+)", memory.read_text()).group(1)) < 14 * 2**20:
        pytest.skip("needs 14 GB of free memory")
    mask = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(2048, 1024, 1024)
    assert not ck.distance_transform(mask, spatial_dims=3, squared=True).any()
