"""Eqs. 6-7 and the selection: integer maps, so every comparison is exact."""

import functools
import itertools
import math

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inputs import families, logits_of, scene
from native_cases import scipy_edge_distance_sq
from scipy import ndimage, stats

import contextrast_kernels as ck

NO_EDGE = 2**31 - 1


def edge_distance_sq(classes):
    squared = ck.edge_distance(torch.from_numpy(classes), squared=True)
    assert squared.dtype == torch.int32
    return squared.numpy()


# ----------------------------------------------------------------------------------------------------- error map, Eq. 6


def test_hand_worked_errors(map_backend):
    """Right, wrong, ignored, a label outside the classes (7), a prediction outside the classes (5), wrong."""
    labels = torch.tensor([[[0, 1, 255, 7, 2, 2]]])
    predictions = torch.tensor([[[0, 2, 1, 1, 5, 0]]])
    assert ck.error_map(predictions, labels, num_classes=3).tolist() == [[[-1, 2, -1, -1, -1, 0]]]
    # Without num_classes every value >= 0 is a class; 255 stays ignored.
    assert ck.error_map(predictions, labels).tolist() == [[[-1, 2, -1, 1, 5, 0]]]
    assert ck.error_map(predictions, labels, num_classes=3, ignore_index=1).tolist() == [[[-1, -1, -1, -1, -1, 0]]]


def test_equal_logits_predict_the_lowest_class(map_backend):
    logits = torch.zeros(1, 4, 1, 3)
    logits[0, :, 0, 1] = torch.tensor([-1.0, 2.0, 2.0, 2.0])
    logits[0, :, 0, 2] = torch.tensor([-1.0, -2.0, -3.0, -1.0])
    assert ck.error_map(logits, torch.full((1, 1, 3), 3)).tolist() == [[[0, 1, 0]]]


@pytest.mark.parametrize("size", [(17, 23), (5, 7), (34, 23), (40, 50), (1, 1)])
@pytest.mark.parametrize("num_classes", [4, 3, None])
@pytest.mark.parametrize("ignore_index", [255, 0, -100])
def test_errors_equal_the_loops_at_any_size(map_backend, rng, size, num_classes, ignore_index):
    labels, _ = scene(rng, H=17, W=23, ignore_index=ignore_index)
    _, predictions = scene(rng, H=size[0], W=size[1])
    expected = literal.error_map(predictions.numpy(), labels.numpy(), num_classes, ignore_index)
    errors = ck.error_map(predictions, labels, num_classes=num_classes, ignore_index=ignore_index)
    assert not errors.is_floating_point()
    assert errors.tolist() == expected.tolist()
    assert (expected >= 0).any()
    assert (expected < 0).any()


def test_class_map_equals_logits(map_backend, rng):
    labels, predictions = scene(rng, H=12, W=13)
    logits = logits_of(predictions, 4, rng)
    expected = ck.error_map(predictions, labels, num_classes=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert torch.equal(ck.error_map(logits.to(dtype), labels), expected)
        assert torch.equal(ck.error_map(logits.to(dtype), labels, num_classes=4), expected)
    strided = logits.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert torch.equal(ck.error_map(strided, labels[:, None]), expected)


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("label_dtype", DTYPES)
@pytest.mark.parametrize("prediction_dtype", DTYPES)
def test_any_pair_of_integer_dtypes(map_backend, rng, label_dtype, prediction_dtype):
    """Extreme values of every dtype, compared as integers wide enough for both."""

    def values(dtype):
        info = torch.iinfo(dtype)
        return torch.from_numpy(rng.choice([0, 1, 2, 3, 100, 127, info.min, info.max], (2, 5, 6))).to(dtype)

    labels, predictions = values(label_dtype), values(prediction_dtype)
    for num_classes, ignore_index in itertools.product((3, 101, 200), (255, -1, -100, 100, 2)):
        expected = literal.error_map(predictions.numpy(), labels.numpy(), num_classes, ignore_index)
        errors = ck.error_map(predictions, labels, num_classes=num_classes, ignore_index=ignore_index)
        assert errors.tolist() == expected.tolist()


def test_uint8_156_is_not_taken_for_ignore_index_minus_100(map_backend):
    labels = torch.full((1, 1, 2), 156, dtype=torch.uint8)
    predictions = torch.tensor([[[155, 156]]], dtype=torch.uint8)
    assert ck.error_map(predictions, labels, num_classes=200, ignore_index=-100).tolist() == [[[155, -1]]]


@pytest.mark.parametrize(
    "wild", [2**8, 2**8 + 1, 2**16 + 1, 2**31, 2**32, 2**32 + 1, -(2**32) + 1, 2**63 - 1, -(2**63)]
)
def test_huge_values_are_outside_the_classes_and_never_wrap(map_backend, wild):
    labels, predictions = torch.tensor([[[wild, 0, 1]]]), torch.tensor([[[1, wild, 0]]])
    assert ck.error_map(predictions, labels, num_classes=2).tolist() == [[[-1, -1, 0]]]


# ------------------------------------------------------------------------------------------------- edge distance, Eq. 7


def test_hand_worked_edge_distance(map_backend):
    """The map on which edge distance and distance to the outside disagree about the order.

    Edge pixels are those with an outside 4-neighbour: (0,1) (1,2) (1,3) (2,3) (3,2). From (2,0) the nearest are (0,1),
    (1,2) and (3,2), all at 5; from (3,0) it is (3,2) at 4. To the nearest outside pixel it would be 8 and 9.
    """
    o = -1
    classes = torch.tensor([[[1, 1, o, o], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, o]]])
    expected = [[1, 0, o, o], [2, 1, 0, 0], [5, 2, 1, 0], [4, 1, 0, o]]
    assert ck.edge_distance(classes, squared=True).tolist() == [expected]
    distance = ck.edge_distance(classes)
    assert distance.dtype == torch.float32
    assert distance[0, 2, 0].item() == np.float32(math.sqrt(5))
    assert distance[0, 0].tolist() == [1, 0, -1, -1]


def test_a_class_that_fills_the_image_has_no_edge(map_backend):
    """The image border is not an edge, so the class has no edge pixel. The other image is not affected."""
    classes = torch.stack((torch.full((5, 6), 3), torch.full((5, 6), -1)))
    classes[1, 2, 2] = 3
    assert ck.edge_distance(classes, squared=True)[0].tolist() == [[NO_EDGE] * 6] * 5
    assert ck.edge_distance(classes)[0].tolist() == [[math.inf] * 6] * 5
    assert ck.edge_distance(classes)[1].unique().tolist() == [-1, 0]


@pytest.mark.parametrize("size", [(13, 17), (16, 9), (1, 14), (14, 1), (2, 2), (1, 1)])
def test_edge_distance_equals_brute_force_on_every_family(map_backend, rng, size):
    for name, classes in families(rng, *size).items():
        expected = literal.edge_distance_sq(classes[None])
        assert (edge_distance_sq(classes[None]) == expected).all(), name


SIZES = [
    (31, 33),
    (32, 64),
    (33, 31),
    (63, 65),
    (64, 128),
    (65, 127),
    (128, 32),
    (65, 257),
    (3, 1025),
    (1025, 2),
    (1, 2050),
]


@pytest.mark.parametrize("size", SIZES)
def test_edge_distance_equals_one_scipy_transform_per_class(map_backend, rng, size):
    """All families as one batch, at sizes around the borders of words and tiles."""
    classes = np.stack(list(families(rng, *size).values()))
    assert (edge_distance_sq(classes) == scipy_edge_distance_sq(classes)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [(128, 256), (360, 480), (512, 1024), (1023, 129), (1024, 1025), (3, 4100), (4100, 3), (2, 16384)]
)
def test_edge_distance_equals_scipy_at_real_sizes(map_backend, rng, size):
    for name, classes in families(rng, *size).items():
        assert (edge_distance_sq(classes[None]) == scipy_edge_distance_sq(classes[None])).all(), name


@pytest.mark.parametrize(
    ("shape", "symbols"),
    [((2, 4), 3), ((4, 2), 3), ((1, 8), 3), ((8, 1), 3), ((3, 3), 2)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in [((3, 3), 3), ((4, 4), 2), ((2, 5), 3), ((2, 9), 2)]],
)
def test_edge_distance_of_every_small_map(map_backend, shape, symbols):
    """Exhaustive: every map of this shape over outside, class 0 and, with three symbols, class 1."""
    maps = np.array(list(itertools.product(range(-1, symbols - 1), repeat=shape[0] * shape[1])))
    maps = maps.reshape(-1, *shape)
    assert (edge_distance_sq(maps) == literal.edge_distance_sq(maps)).all()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    arrays.arrays(
        st.sampled_from([np.int8, np.int16, np.int32, np.int64]),
        st.tuples(st.integers(0, 3), st.integers(1, 9), st.integers(1, 9)),
        elements=st.integers(-2, 2),
    )
)
def test_edge_distance_of_random_maps(classes):
    expected = literal.edge_distance_sq(classes)
    for backend in ("reference", "native"):
        if ck.available()[backend] == "ok":
            with ck.backend(backend):
                assert (edge_distance_sq(classes) == expected).all()


def test_edge_pixels_are_exactly_the_zeros(map_backend, rng):
    for classes in families(rng, 14, 19).values():
        assert ((edge_distance_sq(classes[None])[0] == 0) == literal.edge_pixels(classes)).all()


def test_distance_is_the_rounded_root_of_the_square(map_backend, rng):
    classes = torch.from_numpy(np.stack(list(families(rng, 20, 30).values())))
    squared = ck.edge_distance(classes, squared=True).double()
    expected = torch.where(squared == NO_EDGE, math.inf, torch.where(squared < 0, -1, squared.clamp(min=0).sqrt()))
    assert torch.equal(ck.edge_distance(classes), expected.float())


def test_edge_distance_of_unusual_values_and_dtypes(map_backend, rng):
    """Classes that agree in their low 8, 16 or 32 bits are still different classes; any negative number is outside."""
    small = rng.integers(-1, 3, (2, 9, 11))
    expected = literal.edge_distance_sq(small)
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        info = torch.iinfo(dtype)
        for values in ((info.max, 0, 1), (3, info.max, info.max - 1)):
            table = torch.tensor([*values, info.min], dtype=dtype)  # index -1 is the minimum
            assert ck.edge_distance(table[torch.from_numpy(small)], squared=True).tolist() == expected.tolist()
    for step in (2**8, 2**16, 2**32):
        table = torch.tensor([1, 1 + step, 1 + 2 * step, -step])
        assert ck.edge_distance(table[torch.from_numpy(small)], squared=True).tolist() == expected.tolist()
    inside = torch.from_numpy(small + 1).to(torch.uint8)  # no number is negative: every pixel has a class
    assert ck.edge_distance(inside, squared=True).tolist() == literal.edge_distance_sq(small + 1).tolist()


def test_distances_are_equivariant_to_rotations_and_flips(map_backend, rng):
    classes = torch.from_numpy(np.stack(list(families(rng, 17, 20).values())))
    squared = ck.edge_distance(classes, squared=True)
    assert torch.equal(ck.edge_distance(classes.mT, squared=True), squared.mT)
    assert torch.equal(ck.edge_distance(classes.flip(1), squared=True), squared.flip(1))
    assert torch.equal(ck.edge_distance(classes.flip(2), squared=True), squared.flip(2))
    assert torch.equal(ck.edge_distance(classes.flip(0), squared=True), squared.flip(0))


# --------------------------------------------------------------------------------------------------- distance transform


def test_hand_worked_distance_transform(map_backend):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert ck.distance_transform(mask, squared=True).tolist() == [[5, 2, 1], [4, 1, 0]]
    assert ck.distance_transform(mask)[0, 0].item() == np.float32(math.sqrt(5))


@pytest.mark.parametrize("size", [(13, 17), (1, 14), (14, 1), (1, 1), (2, 2)])
def test_distance_transform_equals_brute_force(map_backend, rng, size):
    for name, classes in families(rng, *size).items():
        mask = classes >= 0
        squared = ck.distance_transform(torch.from_numpy(mask), squared=True)
        assert squared.dtype == torch.int32
        assert (squared.numpy() == literal.distance_transform_sq(mask)).all(), name


@pytest.mark.parametrize("size", SIZES[::2])
def test_distance_transform_equals_scipy(map_backend, rng, size):
    masks = np.stack([m for m in (c >= 0 for c in families(rng, *size).values()) if not m.all()])
    squared = ck.distance_transform(torch.from_numpy(masks), squared=True).numpy()
    for mask, got in zip(masks, squared, strict=True):
        nearest = ndimage.distance_transform_edt(mask, return_distances=False, return_indices=True)
        assert (got == ((nearest - np.indices(size)) ** 2).sum(0)).all()


def test_distance_transform_takes_any_dtype_and_leading_axes(map_backend, rng):
    mask = torch.from_numpy(rng.random((2, 3, 8, 9)) < 0.8)
    mask[1, 1] = True
    expected = ck.distance_transform(mask)
    assert expected.dtype == torch.float32
    assert expected[1, 1].eq(math.inf).all()
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.float32):
        assert torch.equal(ck.distance_transform(mask.to(dtype) * 2), expected)
    assert torch.equal(ck.distance_transform(mask.float() * 0.25), expected)  # nonzero, though it truncates to 0
    assert torch.equal(ck.distance_transform(mask[0]), expected[0])
    assert torch.equal(ck.distance_transform(mask[0, 0]), expected[0, 0])
    assert torch.equal(
        ck.distance_transform(mask.mT.contiguous().mT[:, :, 1:, ::2]),
        ck.distance_transform(mask[:, :, 1:, ::2].clone()),
    )
    assert ck.distance_transform(mask[:0]).shape == (0, 3, 8, 9)


# ------------------------------------------------------------------------------------------------------------ selection


def test_hand_worked_selection(map_backend):
    """Three tied pixels: hash(0, 0, 0..2) = 4cb04c27 < 671abcbb < 6b7d565f, so pixel 0 comes first, then 1."""
    classes, tied = torch.zeros(1, 1, 3, dtype=torch.int64), torch.full((1, 1, 3), NO_EDGE, dtype=torch.int32)
    for ratio, expected in (
        (0, [0, 0, 0]),
        (1 / 3, [1, 0, 0]),
        (0.34, [1, 1, 0]),
        (0.5, [1, 1, 0]),
        (0.67, [1, 1, 1]),
        (1, [1, 1, 1]),
    ):
        assert ck.select_nearest(classes, tied, ratio, num_classes=1).int().tolist() == [[expected]]
    nearer = torch.tensor([[[9, 4, 4]]], dtype=torch.int32)
    assert ck.select_nearest(classes, nearer, 0.3, num_classes=1).int().tolist() == [[[0, 1, 0]]]
    assert ck.select_nearest(classes, nearer, 0.5, num_classes=1).int().tolist() == [[[0, 1, 1]]]


def test_k_is_the_ceiling_of_one_float64_product(map_backend):
    """0.07 * 100 = 7.000000000000001 in float64, so k = 8, where float32 arithmetic would give 7."""
    for ratio in (0.07, 0.1, 0.3, 1 / 3, 0.29, 0.5, 0.7, 0.9, 1e-9, 1 - 1e-12, 1.0):
        counts = torch.arange(1, 201)
        classes = torch.where(torch.arange(200) < counts[:, None], 0, -1)[:, None]
        squared = torch.where(classes < 0, -1, 0).int()
        selected = ck.select_nearest(classes, squared, ratio, num_classes=1)
        assert selected.sum((1, 2)).tolist() == [math.ceil(ratio * n) for n in range(1, 201)]
    assert math.ceil(0.07 * 100) == 8


@pytest.mark.parametrize("seed", [0, 7, -1, 2**40 + 5])
@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.1, 1 / 3, 0.5, 0.9, 1.0])
def test_selection_equals_sorting_by_distance_and_hash(map_backend, rng, seed, ratio):
    """Random distances with many ties, both ends of the 32-bit range, classes in and out of range."""
    classes = rng.integers(-2, 5, (3, 9, 11))
    squared = rng.choice([0, 0, 0, 1, 2, 4, 5, 1000, NO_EDGE], classes.shape)
    for num_classes in (5, 3):
        expected = literal.select_nearest(classes, squared, ratio, num_classes, seed)
        args = torch.from_numpy(classes), torch.from_numpy(squared).int(), ratio
        selected = ck.select_nearest(*args, num_classes=num_classes, seed=seed)
        assert selected.dtype == torch.bool
        assert selected.tolist() == expected.tolist()
        assert torch.equal(ck.select_nearest(*args, num_classes=num_classes, seed=torch.tensor(seed)), selected)
        assert torch.equal(ck.select_nearest(*args, num_classes=num_classes, seed=torch.tensor([seed])), selected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8])
def test_selection_takes_every_class_dtype(map_backend, rng, dtype):
    classes = rng.integers(0, 5, (2, 7, 8))
    squared = edge_distance_sq(classes)
    expected = literal.select_nearest(classes, squared, 0.4, 4)
    selected = ck.select_nearest(torch.from_numpy(classes).to(dtype), torch.from_numpy(squared), 0.4, num_classes=4)
    assert selected.tolist() == expected.tolist()


def test_exactly_k_and_never_a_farther_pixel_before_a_nearer_one(map_backend, rng):
    for name, classes in families(rng, 21, 30).items():
        squared = edge_distance_sq(classes[None])
        for ratio in (0.1, 0.5, 0.77):
            selected = ck.select_nearest(
                torch.from_numpy(classes[None]), torch.from_numpy(squared), ratio, num_classes=256, seed=3
            ).numpy()[0]
            assert not selected[classes < 0].any(), name
            for n in np.unique(classes[classes >= 0]):
                members = classes == n
                chosen, left = squared[0][members & selected], squared[0][members & ~selected]
                assert len(chosen) == math.ceil(ratio * members.sum()), name
                assert chosen.max() <= left.min(initial=NO_EDGE), name


def test_every_tie_is_broken_by_hash(map_backend, rng):
    """All pixels equally far: in every image the k smallest unsigned hashes of the index inside the image."""
    classes = torch.zeros(3, 12, 10, dtype=torch.int64)
    tied = torch.full_like(classes, 4).int()
    for seed in (0, 1, 99):
        order = sorted(range(120), key=lambda p: literal.hash32(seed, 0, p))
        for k in (1, 13, 60, 119):
            selected = ck.select_nearest(classes, tied, k / 120, num_classes=1, seed=seed)
            assert selected.flatten(1).sum(1).tolist() == [k] * 3
            for image in selected:
                assert image.flatten().nonzero().flatten().tolist() == sorted(order[:k])


def test_ties_are_not_biased_by_position(map_backend):
    """How often each of 8 x 12 tied pixels is among the 24 chosen, over 400 seeds.

    Under uniform choice of k of P pixels, Σ (count - S k/P)² / (S k/P (1 - k/P)) · (P - 1)/P follows χ² with P - 1
    degrees of freedom (counts of one draw are hypergeometric). The seeds are fixed, so the outcome never changes; 1e-6
    on either side was chosen beforehand. Choosing by position instead gives S (P - 1) = 38 000, two hundred times the
    threshold.
    """
    P, k, seeds = 96, 24, 400
    classes = torch.zeros(1, 8, 12, dtype=torch.int64)
    tied = torch.zeros(1, 8, 12, dtype=torch.int32)
    counts = sum(
        ck.select_nearest(classes, tied, k / P, num_classes=1, seed=seed).double() for seed in range(seeds)
    ).flatten()
    expected = seeds * k / P
    statistic = ((counts - expected) ** 2).sum().item() / (expected * (1 - k / P)) * (P - 1) / P
    assert stats.chi2.ppf(1e-6, P - 1) < statistic < stats.chi2.isf(1e-6, P - 1)


def test_neighbouring_ties_are_chosen_independently(map_backend):
    """Left-right neighbours both chosen: k (k - 1) / (P (P - 1)) of the pairs, within 5 standard errors."""
    P, k, seeds = 96, 24, 400
    classes = torch.zeros(1, 8, 12, dtype=torch.int64)
    tied = torch.zeros(1, 8, 12, dtype=torch.int32)
    pairs = torch.tensor(
        [
            (lambda m: (m[..., 1:] & m[..., :-1]).sum())(
                ck.select_nearest(classes, tied, k / P, num_classes=1, seed=seed)
            )
            for seed in range(seeds)
        ]
    ).double()
    expected = 8 * 11 * k * (k - 1) / (P * (P - 1))
    assert abs(pairs.mean() - expected) < 5 * pairs.std() / seeds**0.5


def test_selection_depends_only_on_its_image_and_class(map_backend, rng):
    """Neither other classes or images nor the order of images or the names of classes change a choice."""
    classes = torch.from_numpy(rng.integers(-1, 4, (3, 15, 16)))
    squared = ck.edge_distance(classes, squared=True)
    selected = ck.select_nearest(classes, squared, 0.4, num_classes=4, seed=5)
    for b in range(3):
        alone = ck.select_nearest(classes[b : b + 1], squared[b : b + 1], 0.4, num_classes=4, seed=5)
        assert torch.equal(alone[0], selected[b])
    order = [2, 0, 1]
    reordered = ck.select_nearest(classes[order], squared[order], 0.4, num_classes=4, seed=5)
    assert torch.equal(reordered, selected[order])
    renamed = torch.tensor([2, 3, 0, 1, -1])[classes]
    assert torch.equal(ck.select_nearest(renamed, squared, 0.4, num_classes=4, seed=5), selected)
    far_apart = torch.tensor([5, 149, 77, 10**6, -1])[classes]
    assert torch.equal(ck.select_nearest(far_apart, squared, 0.4, num_classes=10**6 + 1, seed=5), selected)
    only = torch.where(classes == 2, 2, -1)
    assert torch.equal(ck.select_nearest(only, squared, 0.4, num_classes=4, seed=5), selected & (classes == 2))


def test_selection_takes_any_strides(map_backend, rng):
    classes = torch.from_numpy(rng.integers(-1, 3, (4, 20, 24)))
    squared = ck.edge_distance(classes, squared=True)
    for view in (
        lambda x: x.mT,
        lambda x: x[::2, 3:, ::3],
        lambda x: x[:1].expand(3, -1, -1),
        lambda x: x[:, :, :1].expand(-1, -1, 9),
    ):
        expected = ck.select_nearest(view(classes).contiguous(), view(squared).contiguous(), 0.5, num_classes=3)
        assert torch.equal(ck.select_nearest(view(classes), view(squared), 0.5, num_classes=3), expected)
        assert torch.equal(ck.edge_distance(view(classes)), ck.edge_distance(view(classes).contiguous()))


# ------------------------------------------------------------------------------------------------------------ negatives


@functools.cache
def looped_negatives(negatives, distance_at, size):
    """Predictions, labels, options and what the loops make of them, once for all backends."""
    rng, cases = np.random.default_rng(20240), []
    labels, _ = scene(rng, H=17, W=23)
    for prediction_size in ((17, 23), (11, 29)):
        _, predictions = scene(rng, H=prediction_size[0], W=prediction_size[1])
        for ratio, seed in ((0.5, 0), (0.13, -3)):
            options = {"size": size, "ratio": ratio, "negatives": negatives, "distance_at": distance_at, "seed": seed}
            expected = literal.bane_negatives(predictions.numpy(), labels.numpy(), 4, **options)
            cases.append((predictions, labels, options, expected))
    return cases


@pytest.mark.parametrize("negatives", ["bane", "semi-hard", "none"])
@pytest.mark.parametrize("distance_at", ["layer", "full"])
@pytest.mark.parametrize("size", [None, (17, 23), (9, 12), (5, 4), (1, 1), (20, 30)])
def test_negatives_equal_the_loops(map_backend, negatives, distance_at, size):
    for predictions, labels, options, expected in looped_negatives(negatives, distance_at, size):
        chosen = ck.bane_negatives(predictions, labels, num_classes=4, **options)
        assert not chosen.is_floating_point()
        assert chosen.tolist() == expected.tolist()


@pytest.mark.parametrize("distance_at", ["layer", "full"])
def test_negatives_in_thick_regions_equal_the_loops(map_backend, rng, distance_at):
    """A collapsed prediction: errors many pixels deep, so that squared distances 1, 2, 4, 5, 8, 9 are told apart."""
    labels, _ = scene(rng, H=24, W=30, ignored=0.01)
    predictions = torch.where(torch.arange(24)[:, None] < 20, 5, labels)
    for size, ratio in itertools.product((None, (17, 22)), (0.4, 0.6, 0.8, 0.95)):
        options = {"size": size, "ratio": ratio, "distance_at": distance_at}
        expected = literal.bane_negatives(predictions.numpy(), labels.numpy(), 6, **options)
        assert ck.bane_negatives(predictions, labels, num_classes=6, **options).tolist() == expected.tolist()


def test_full_resolution_distances_rank_the_layer_differently(map_backend):
    """Label 0 everywhere, class 1 predicted on columns 1-7 of eight, one row; the layer is every second column.

    At full size the error run has its edge at column 1 only (the border is none), so columns 2, 4, 6 lie 1, 3, 5 away
    and the two nearest of three are columns 2 and 4. At the layer the run covers pixels 1-3 and its edge is pixel 1: D
    = 0, 1, 2.
    """
    labels = torch.zeros(1, 1, 8, dtype=torch.int64)
    predictions = torch.tensor([[[0, 1, 1, 1, 1, 1, 1, 1]]])
    for distance_at in ("layer", "full"):
        chosen = ck.bane_negatives(predictions, labels, num_classes=2, size=(1, 4), distance_at=distance_at)
        assert chosen.tolist() == [[[-1, 1, 1, -1]]]
    # Errors on columns 0-1 and 4-7: at the layer pixels 0, 2, 3 with edges 0 and 2; at full size edges 1 and 4, so D² =
    # 1, 0, 4.
    predictions = torch.tensor([[[1, 1, 0, 0, 1, 1, 1, 1]]])
    assert ck.bane_negatives(
        predictions, labels, num_classes=2, size=(1, 4), ratio=0.1, distance_at="full"
    ).tolist() == [[[-1, -1, 1, -1]]]
    # There both edges tie at 0: hash(seed, 0, 0) against hash(seed, 0, 2) decides, and seed 0 puts pixel 0 first.
    assert ck.bane_negatives(predictions, labels, num_classes=2, size=(1, 4), ratio=0.1).tolist() == [[[1, -1, -1, -1]]]


def test_negatives_from_logits_equal_negatives_from_classes(map_backend, rng):
    labels, predictions = scene(rng, H=12, W=13)
    logits = logits_of(predictions, 4, rng)
    for distance_at, size in itertools.product(("layer", "full"), (None, (5, 6), (24, 7))):
        expected = ck.bane_negatives(predictions, labels, num_classes=4, size=size, distance_at=distance_at)
        assert torch.equal(ck.bane_negatives(logits, labels, size=size, distance_at=distance_at), expected)
        assert torch.equal(
            ck.bane_negatives(logits.half(), labels[:, None], size=size, distance_at=distance_at), expected
        )


def test_negatives_do_not_depend_on_class_names_or_batch_order(map_backend, rng):
    labels, predictions = scene(rng, B=3)
    chosen = ck.bane_negatives(predictions, labels, num_classes=4, size=(9, 10))
    assert (chosen >= 0).any()
    new = torch.tensor([2, 0, 3, 1])
    table = torch.full((256,), 255).index_copy(0, torch.arange(4), new)
    renamed = ck.bane_negatives(table[predictions], table[labels], num_classes=4, size=(9, 10))
    assert renamed.tolist() == torch.where(chosen >= 0, table[chosen.long().clamp(min=0)], -1).tolist()
    order = [1, 2, 0]
    assert torch.equal(ck.bane_negatives(predictions[order], labels[order], num_classes=4, size=(9, 10)), chosen[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distance_at", ["layer", "full"])
def test_negatives_of_every_dtype_and_stride(map_backend, rng, dtype, distance_at):
    labels, predictions = scene(rng, B=4, H=12, W=14)
    options = {"num_classes": 4, "size": (5, 9), "distance_at": distance_at}
    expected = ck.bane_negatives(predictions, labels, **options)
    ignore_index = -1 if dtype == torch.int8 else 255  # 255 becomes -1 in int8
    labels, predictions = labels.to(dtype), predictions.to(dtype)
    for view in (
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, 2)[..., ::2],
        lambda x: x[:, None],
    ):
        chosen = ck.bane_negatives(predictions.mT.contiguous().mT, view(labels), ignore_index=ignore_index, **options)
        assert chosen.tolist() == expected.tolist()


@pytest.mark.parametrize("distance_at", ["layer", "full"])
@pytest.mark.parametrize("negatives", ["bane", "semi-hard"])
def test_degenerate_scenes(map_backend, distance_at, negatives):
    """Nothing valid, no error, everything wrong, one pixel, an empty batch."""
    options = {"num_classes": 3, "distance_at": distance_at, "negatives": negatives}
    zeros, ones = torch.zeros(2, 6, 8, dtype=torch.int64), torch.ones(2, 6, 8, dtype=torch.int64)
    for size in (None, (3, 4), (1, 1)):
        assert (ck.bane_negatives(ones, torch.full_like(zeros, 255), size=size, **options) == -1).all()
        assert (ck.bane_negatives(ones, ones, size=size, **options) == -1).all()
        h, w = size or (6, 8)
        wrong = ck.bane_negatives(ones, zeros, size=size, **options)
        assert (wrong == 1).sum((1, 2)).tolist() == [math.ceil(h * w / 2)] * 2
        assert ck.bane_negatives(ones[:0], zeros[:0], size=size, **options).shape == (0, h, w)
        assert (ck.bane_negatives(ones, zeros, size=size, ratio=0, **options) == -1).all()
        assert (ck.bane_negatives(ones, zeros, size=size, ratio=1, **options) == 1).all()


@pytest.mark.parametrize(
    "function", ["edge_distance", "distance_transform", "select_nearest", "error_map", "bane_negatives"]
)
def test_an_empty_batch_is_empty_everywhere(map_backend, function):
    empty = torch.zeros(0, 5, 7, dtype=torch.int64)
    calls = {
        "edge_distance": lambda: ck.edge_distance(empty),
        "distance_transform": lambda: ck.distance_transform(empty),
        "select_nearest": lambda: ck.select_nearest(empty, empty.int(), 0.5, num_classes=2),
        "error_map": lambda: ck.error_map(empty, empty),
        "bane_negatives": lambda: ck.bane_negatives(empty, empty, num_classes=2),
    }
    assert calls[function]().shape == (0, 5, 7)


def test_inputs_are_not_modified_and_two_runs_agree(map_backend, rng):
    labels, predictions = scene(rng)
    before = labels.clone(), predictions.clone()
    first = ck.bane_negatives(predictions, labels, num_classes=4, size=(8, 9))
    assert torch.equal(ck.bane_negatives(predictions, labels, num_classes=4, size=(8, 9)), first)
    assert torch.equal(labels, before[0])
    assert torch.equal(predictions, before[1])


def test_seeds_change_the_ties_and_nothing_else(map_backend, rng):
    labels, predictions = scene(rng, H=32, W=40)
    maps = [ck.bane_negatives(predictions, labels, num_classes=4, size=(16, 20), seed=seed) for seed in range(4)]
    assert len({tuple(m.flatten().tolist()) for m in maps}) == 4
    assert len({tuple((m == n).sum().item() for n in range(4)) for m in maps}) == 1
