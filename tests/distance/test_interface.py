"""Dtypes, strides, batches, empty axes, compilation and errors of ``distance_transform`` and ``edge_distance``."""

import itertools
import math

import numpy as np
import pytest
import torch
from distance_cases import NO_EDGE

import contextrast_kernels as ck
from contextrast_kernels import native

BACKENDS = ["reference"] + (["native"] if native.status("cpu") == "ok" else [])
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOATS += [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with ck.backend(request.param):
        yield request.param


@pytest.fixture
def mask(rng):
    return torch.from_numpy(rng.random((2, 3, 9, 17, 21)) < 0.9)


@pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS, *FLOATS])
def test_every_dtype_of_a_mask_gives_the_same_distances(backend, mask, dtype):
    expected = ck.distance_transform(mask, spatial_dims=3)
    assert torch.equal(ck.distance_transform(mask.to(dtype), spatial_dims=3), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_nan_is_nonzero_and_minus_zero_is_zero(backend, dtype):
    line = torch.tensor([math.nan, -0.0, 1e-7, math.inf], dtype=dtype)
    assert ck.distance_transform(line, spatial_dims=1).tolist() == [1, 0, 1, 2]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_classes_of_every_dtype_are_compared_at_full_width(backend, dtype):
    high = torch.iinfo(dtype).max
    classes = torch.tensor(
        [[[high, high, high - 1], [high, high, high - 1]]], dtype=torch.uint64 if high > 2**63 else None
    )
    distance = ck.edge_distance(classes.to(dtype), squared=True)
    assert distance.tolist() == [[[1, 0, 0], [1, 0, 0]]]


def test_strides_and_leading_axes_do_not_change_results(backend, mask):
    expected, indices = ck.distance_transform(mask, spatial_dims=3, return_indices=True)
    assert indices.shape == (3, *mask.shape)
    last = mask.contiguous(memory_format=torch.channels_last_3d)
    turned = mask.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    spread = torch.ones(2, 3, 18, 17, 63, dtype=torch.bool)
    spread[:, :, 1::2, :, ::3] = mask
    for view in (last, turned, spread[:, :, 1::2, :, ::3]):
        got = ck.distance_transform(view, spatial_dims=3, return_indices=True)
        assert torch.equal(got[0], expected) and torch.equal(got[1], indices)
    assert torch.equal(ck.distance_transform(mask[1, 2], spatial_dims=3), expected[1, 2])
    assert torch.equal(ck.distance_transform(mask[None], spatial_dims=3)[0], expected)
    assert torch.equal(
        ck.distance_transform(mask[:, :, :, :, ::2], spatial_dims=3)[1],
        ck.distance_transform(mask[1, :, :, :, ::2], spatial_dims=3),
    )


def test_a_volume_of_depth_one_is_a_map_and_a_map_of_one_row_is_a_line(backend, mask):
    plane = mask[:, :, 0]
    distance, indices = ck.distance_transform(plane, sampling=(0.7, 1.3), squared=True, return_indices=True)
    deep, deep_indices = ck.distance_transform(
        plane[:, :, None], spatial_dims=3, sampling=(9.0, 0.7, 1.3), squared=True, return_indices=True
    )
    assert torch.equal(deep[:, :, 0], distance) and torch.equal(deep_indices[1:, :, :, 0], indices)
    line = plane[:, :, 0]
    assert torch.equal(ck.distance_transform(line[:, :, None])[:, :, 0], ck.distance_transform(line, spatial_dims=1))
    classes = plane[:, 0].long()
    assert torch.equal(ck.edge_distance(classes[:, None]), ck.edge_distance(classes))
    assert torch.equal(
        ck.edge_distance(classes[:, None], sampling=(1, 1, 2))[:, 0], ck.edge_distance(classes, sampling=(1, 2))
    )


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (0,) * 4])
def test_empty_input_gives_empty_output(backend, shape):
    empty = torch.zeros(shape, dtype=torch.int64)
    for sampling in (None, 2.0):
        distance, indices = ck.distance_transform(empty, spatial_dims=3, sampling=sampling, return_indices=True)
        assert distance.shape == shape and indices.shape == (3, *shape)
        assert ck.edge_distance(empty, sampling=sampling).shape == shape


def test_without_a_zero_distances_are_infinite_and_indices_are_minus_one(backend):
    ones = torch.ones(2, 3, 4)
    assert (ck.distance_transform(ones, squared=True) == NO_EDGE).all()
    distance, indices = ck.distance_transform(ones, sampling=0.5, squared=True, return_indices=True)
    assert (distance == math.inf).all() and (indices == -1).all() and distance.dtype == torch.float64
    assert (ck.edge_distance(ones[:, None].long(), sampling=(1, 1, 1), squared=True) == math.inf).all()


def test_results_do_not_depend_on_the_threads(rng):
    mask, classes = (
        torch.from_numpy(rng.random((40, 70, 90)) < 0.995),
        torch.from_numpy(rng.integers(-1, 2, (1, 40, 70, 90))),
    )
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5, 64):
            torch.set_num_threads(threads)
            sampled = ck.distance_transform(mask, spatial_dims=3, sampling=(0.7, 1.1, 3.0), return_indices=True)
            results.append((*sampled, ck.distance_transform(mask, spatial_dims=3), ck.edge_distance(classes)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not built")
@pytest.mark.parametrize("threads", [1, 2, 64])
def test_scratch_is_at_most_five_quarters_of_the_output(threads):
    """This holds for sides of at least 32, as docs/distance.md says. The test allocates no memory."""
    sides = (32, 33, 65, 256, 1000, 4000)
    sizes = itertools.product((1, *sides), sides, sides)
    for size in (*sizes, (16384, 1, 32), (1, 32, 16384), (2048, 1024, 1024)):
        mask = torch.empty(1, dtype=torch.uint8).expand(1, *size)
        if mask.numel() > 2**31:
            continue
        for sampling, squared in ((None, False), ((0.7, 1.0, 1.0), False), ((1.0, 0.7, 1.0), True)):
            distance = torch.empty(1, dtype=torch.float64 if squared and sampling else torch.float32).expand(mask.shape)
            assert native_scratch(mask, distance, sampling, squared, threads) <= 1.25
            assert native_scratch(mask, distance, sampling, squared, threads, edges=True) <= 1.25
            assert native_scratch(mask, distance, sampling, squared, threads, axes=3) <= 1.25


def native_scratch(mask, distance, sampling, squared, threads, *, edges=False, axes=0):
    """Bytes of scratch per byte of output. Nothing is read or written."""
    indices = torch.empty(axes, dtype=torch.int32) if axes else None
    wanted = native._Distance(sampling, squared, distance, indices)
    size = native._library().contextrast_distance_scratch_cpu(native._Volume(mask), wanted, edges, threads)
    return size / (mask.numel() * (distance.itemsize + 4 * axes))


def test_compiles_with_fullgraph(backend, mask):
    def both(mask, classes):
        distance, indices = ck.distance_transform(mask, spatial_dims=3, sampling=(2.5, 1.0, 1.0), return_indices=True)
        return distance, indices, ck.edge_distance(classes, squared=True), ck.distance_transform(mask)

    classes = mask[:, 0].long()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(compiled(mask, classes), both(mask, classes), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.skipif("native" not in BACKENDS, reason="the native library is not built")
@pytest.mark.slow
def test_ops_pass_opcheck(mask):
    for op in (native.distance_transform, native.nearest_zero):
        torch.library.opcheck(op, (mask[0, :, :4], True, [2.0, 1.0, 1.0]))
        torch.library.opcheck(op, (mask[0, :, 0], False))
    torch.library.opcheck(native.edge_distance, (mask[0].long(), True, [2.0, 1.0, 1.0]))


SHAPE = (2, 5, 6)
REFUSALS = {
    "spatial_dims 0": (lambda x: ck.distance_transform(x, spatial_dims=0), ValueError, "spatial_dims.*1 and 3, got 0"),
    "spatial_dims 4": (lambda x: ck.distance_transform(x, spatial_dims=4), ValueError, "spatial_dims.*1 and 3, got 4"),
    "spatial_dims 2.5": (lambda x: ck.distance_transform(x, spatial_dims=2.5), TypeError, "spatial_dims.*integer"),
    "too few axes": (lambda x: ck.distance_transform(x[0], spatial_dims=3), ValueError, "mask.*at least 3 axes"),
    "complex": (lambda x: ck.distance_transform(x.to(torch.complex64)), TypeError, "mask.*real"),
    "a list": (lambda x: ck.distance_transform(x.tolist()), TypeError, "mask.*list"),
    "too many sides": (lambda x: ck.distance_transform(x, sampling=(1, 1, 1)), ValueError, "sampling.*2 numbers.*3"),
    "a tensor of sides": (lambda x: ck.distance_transform(x, sampling=torch.ones(2)), TypeError, "sampling.*number"),
    "text": (lambda x: ck.distance_transform(x, sampling="11"), TypeError, "sampling.*'11'"),
    "a flag": (lambda x: ck.distance_transform(x, sampling=(True, 1)), TypeError, "sampling.*number"),
    "a long side": (lambda x: ck.distance_transform(x[:1, :1, :1].expand(1, 1, 16385)), ValueError, "mask.*16384"),
    "many voxels": (
        lambda x: ck.distance_transform(x[:1, :1, :1].expand(2048, 1024, 1025), spatial_dims=3),
        ValueError, r"mask.*2\*\*31",
    ),
    "a long side of classes": (
        lambda x: ck.edge_distance(x[:1, None, :1, :1].expand(1, 2, 16385, 1)), ValueError, "classes.*16384",
    ),
    "many voxels of classes": (
        lambda x: ck.edge_distance(x[:1, None, :1, :1].expand(1, 2048, 1024, 1025)), ValueError, r"classes.*2\*\*31",
    ),
    "squared 1": (lambda x: ck.distance_transform(x, squared=1), TypeError, "squared.*True or False"),
    "return_indices None": (lambda x: ck.distance_transform(x, return_indices=None), TypeError, "return_indices"),
    "classes of floats": (lambda x: ck.edge_distance(x.float()), TypeError, r"classes.*\.long\(\)"),
    "classes without a batch": (lambda x: ck.edge_distance(x[0]), ValueError, r"classes.*classes\[None\]"),
    "sides of a map": (lambda x: ck.edge_distance(x.expand(2, 2, 5, 6), sampling=(1, 1)), ValueError, "sampling.*3"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_invalid_arguments_raise_clear_errors(backend, name):
    call, exception, sentence = REFUSALS[name]
    with pytest.raises(exception, match=f"^{sentence}") as caught:
        call(torch.zeros(SHAPE, dtype=torch.int64))
    assert "\n" not in str(caught.value)


def test_exactly_2_to_the_31_voxels_are_accepted():
    """The tensors have no data. The library reports its scratch for this many voxels and refuses more."""
    for call, shape in ((ck.edge_distance, (1, 2048, 1024, 1024)), (deep_transform, (2048, 1024, 1024))):
        assert call(torch.empty(shape, dtype=torch.uint8, device="meta")).shape == shape
    if "native" not in BACKENDS:
        return
    output = torch.empty(1, dtype=torch.float32)
    for width, is_accepted in ((1024, True), (1025, False)):
        volume = native._Volume(torch.zeros(1, dtype=torch.uint8).expand(1, 2048, 1024, width))
        for edges in 0, 1:
            wanted = native._Distance(None, False, output, None)
            scratch = native._library().contextrast_distance_scratch_cpu(volume, wanted, edges, 1)
            assert (scratch > 2**31 // 8) == is_accepted and (scratch > 0) == is_accepted


def deep_transform(mask):
    return ck.distance_transform(mask, spatial_dims=3)


@pytest.mark.parametrize("side", [0, -1.0, math.nan, math.inf, 1e-101, 1e101])
def test_a_side_must_be_positive_and_finite(backend, side):
    for sampling in (side, (1.0, side)):
        for call in (ck.distance_transform, ck.edge_distance):
            with pytest.raises(ValueError, match=r"^sampling: expected a finite number"):
                call(torch.zeros(SHAPE, dtype=torch.int64), sampling=sampling)
    assert ck.distance_transform(torch.ones(1, 2, 2), sampling=np.float32(2)).isinf().all()
