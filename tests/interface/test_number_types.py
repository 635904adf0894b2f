"""Maps of every integer type, and distances of every type, mean the numbers they hold."""

import literal
import numpy as np
import pytest
import torch

import contextrast_kernels as ck

INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def extremes(dtype):
    """Numbers of a type in no order. Narrower types cannot tell some of them apart."""
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        step = 1 + info.eps
        values = [0.0, -0.0, 1.0, step, -step, -1.0, info.max, info.min, info.tiny, -info.tiny, float("inf")]
        values += [info.smallest_normal * info.eps, -float("inf"), 3.0, 3.0 * step]
    else:
        info = torch.iinfo(dtype)
        values = [info.min, info.max, info.max - 1, info.min + 1, 0, 1, 2, 100, info.max // 2, info.max // 2 + 1]
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_selection_compares_distances_of_every_type_exactly(map_backend, rng, dtype):
    """This holds also for numbers that differ only in the last place of their type, and for equal ones."""
    values = extremes(dtype)
    distances = values[torch.from_numpy(rng.integers(0, len(values), (3, 7, 12)))]
    classes = torch.from_numpy(rng.integers(-1, 3, (3, 7, 12)))
    exact = distances.double() if dtype.is_floating_point else distances  # NumPy has no bfloat16
    for ratio in (0.1, 0.5, 0.9):
        expected = literal.select_nearest(classes.numpy(), exact.numpy(), ratio, 3, 5)
        assert ck.select_nearest(classes, distances, ratio, num_classes=3, seed=5).tolist() == expected.tolist()
        strided = distances.mT.contiguous().mT
        assert ck.select_nearest(classes, strided, ratio, num_classes=3, seed=5).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_distances_are_selected_last(map_backend, dtype):
    distances = torch.tensor([[[float("nan"), float("inf"), 2.0, float("nan")]]], dtype=dtype)
    classes = torch.zeros(1, 1, 4, dtype=torch.int64)
    assert ck.select_nearest(classes, distances, 0.25, num_classes=1).tolist() == [[[False, False, True, False]]]
    assert ck.select_nearest(classes, distances, 0.5, num_classes=1).tolist() == [[[False, True, True, False]]]
    # hash(0, 0, 0) < hash(0, 0, 3): equal ones by hash
    order = ck.select_nearest(classes, torch.zeros(1, 1, 4), 0.25, num_classes=1)[0, 0].tolist().index(True)
    assert order == 0
    chosen = ck.select_nearest(classes, distances, 0.75, num_classes=1)
    assert chosen.tolist() == [[[True, True, True, False]]]


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_distances_are_equal_to_each_other(map_backend, dtype):
    classes = torch.zeros(1, 4, 4, dtype=torch.int64)
    by_hash = ck.select_nearest(classes, torch.zeros(1, 4, 4), 0.5, num_classes=1)
    nan = torch.full((1, 4, 4), float("nan"), dtype=dtype)
    assert torch.equal(ck.select_nearest(classes, nan, 0.5, num_classes=1), by_hash)


def test_selection_by_wide_distances_of_an_empty_map(map_backend):
    for shape in ((0, 4, 5), (2, 0, 5), (2, 4, 0)):
        classes = torch.zeros(shape, dtype=torch.int64)
        assert ck.select_nearest(classes, classes.double(), 0.5, num_classes=1).shape == shape


def test_selection_by_wide_distances_does_not_depend_on_the_batch(map_backend, rng):
    classes = torch.from_numpy(rng.integers(-1, 3, (4, 6, 9)))
    distances = torch.from_numpy(rng.integers(0, 5, (4, 6, 9)) / 3)
    together = ck.select_nearest(classes, distances, 0.4, num_classes=3)
    alone = [ck.select_nearest(classes[b : b + 1], distances[b : b + 1], 0.4, num_classes=3) for b in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert np.array_equal(together, literal.select_nearest(classes.numpy(), distances.numpy(), 0.4))


# ----------------------------------------------------------------------------------------------- maps of unsigned types


def scene_in(dtype, rng, N=4):
    """Labels, class map and logits. One label in ten is the type's largest number, which is outside the classes."""
    labels = rng.integers(0, N, (2, 12, 16))
    labels[rng.random(labels.shape) < 0.1] = min(torch.iinfo(dtype).max, 2**63 - 1)
    predictions = rng.integers(0, N, (2, 12, 16))
    return torch.from_numpy(labels), torch.from_numpy(predictions)


UNSIGNED = [torch.uint16, torch.uint32, torch.uint64]
FEATURES = [torch.randn(2, 5, 12 // s, 16 // s, generator=torch.Generator().manual_seed(0)) for s in (1, 2, 4, 4)]
RELATIVES = {
    "PixelContrastLoss": lambda: ck.PixelContrastLoss(4, max_samples=64, max_views=8, min_pixels=1),
    "MultiScaleContrastLoss": lambda: ck.MultiScaleContrastLoss(4, max_samples=64, max_views=8),
    "PNELoss": lambda: ck.PNELoss(4, set_size=8),
}


def scored(metric):
    return lambda labels, predictions: (metric.update(predictions, labels), list(metric.compute().values()))[1]


def relative(name):
    return lambda labels, predictions: RELATIVES[name]()(FEATURES, labels, predictions)


USES = {
    "error_map": lambda y, p: ck.error_map(p, y, num_classes=4),
    "edge_distance": lambda y, p: ck.edge_distance(p, squared=True),
    "distance_transform": lambda y, p: ck.distance_transform(p),
    "select_nearest": lambda y, p: ck.select_nearest(p, y, 0.5, num_classes=4),
    "bane_negatives": lambda y, p: ck.bane_negatives(p, y, num_classes=4, size=(6, 8)),
    "bane_negatives, full": lambda y, p: ck.bane_negatives(p, y, num_classes=4, size=(6, 8), distance_at="full"),
    "class_anchors": lambda y, p: ck.class_anchors(FEATURES[1], y, 4),
    "pixel_anchor_loss": lambda y, p: ck.pixel_anchor_loss(FEATURES[0], y, torch.ones(4, 5), negatives=p),
    "contextrast_loss": lambda y, p: ck.contextrast_loss(FEATURES, y, p, num_classes=4),
    "ContextrastLoss, debug": lambda y, p: ck.ContextrastLoss(4, debug=True)(FEATURES, p, p),
    "ContextrastCriterion": lambda y, p: ck.ContextrastCriterion(4)(FEATURES, y, FEATURES[0][:, :4]),
    **{name: relative(name) for name in RELATIVES},
    "info_nce": lambda y, p: ck.info_nce(FEATURES[3].flatten(2).mT.flatten(0, 1), p[:, :3, :4].flatten()),
    "MemoryBank": lambda y, p: (
        (bank := ck.MemoryBank(4, 5)).push("pixels", FEATURES[3].flatten(2).mT.flatten(0, 1), p[:, :3, :4].flatten()),
        bank.counts,
    )[1],
    "Sampler": lambda y, p: ck.Sampler("bane", 40, 10, 1)(y, p, 4, 0),
    "ConfusionMatrix": lambda y, p: scored(ck.metrics.ConfusionMatrix(4))(y, p),
    "TrimapIoU": lambda y, p: scored(ck.metrics.TrimapIoU(4, (1, 2)))(y, p),
    "BoundaryIoU": lambda y, p: scored(ck.metrics.BoundaryIoU(4, (1, 2)))(y, p),
    "BoundaryF1": lambda y, p: scored(ck.metrics.BoundaryF1(4, 1))(y, p),
    "boundary_mask": lambda y, p: ck.metrics.boundary_mask(y, 1, num_classes=4),
    "InstanceIoU": lambda y, p: (
        (metric := ck.metrics.InstanceIoU(4, [10.0] * 4)).update(p, y, p),
        list(metric.compute().values()),
    )[1],
    "AlignmentUniformity": lambda y, p: (
        (metric := ck.metrics.AlignmentUniformity(4, samples=8)).update(FEATURES[1], y),
        list(metric.compute().values()),
    )[1],
    "AnchorSimilarity": lambda y, p: (
        (metric := ck.metrics.AnchorSimilarity(4, bins=3)).update(FEATURES, y, p),
        list(metric.compute().values()),
    )[1],
}


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("name", USES)
def test_maps_of_unsigned_types_give_what_int64_gives(name, dtype, rng):
    labels, predictions = scene_in(dtype, rng)
    expected = USES[name](labels, predictions)
    got = USES[name](labels.to(dtype), predictions.to(dtype))
    for a, b in zip(*(x if isinstance(x, tuple | list) else [x] for x in (got, expected)), strict=True):
        assert torch.equal(a.nan_to_num(-7.0), b.nan_to_num(-7.0))


def test_the_largest_unsigned_numbers_are_outside_the_classes(map_backend):
    """2**64 - 1 must not be taken for -1, the number of no error, nor for a class."""
    labels = torch.tensor([[[0, 1, 1, 0]]], dtype=torch.uint64)
    predictions = torch.from_numpy(np.array([[[0, 2**64 - 1, 0, 2**63]]], dtype=np.uint64))
    assert ck.error_map(predictions, labels, num_classes=2).tolist() == [[[-1, -1, 0, -1]]]
    assert ck.distance_transform(predictions[0], squared=True).tolist() == [[0, 1, 0, 1]]
