"""What is specific to the native library. test_bane.py tests what holds for every backend.

The tests cover word borders every 32 rows, segments along rows, every type and stride, threads, selection at real
sizes, and errors. test_native_library.py runs them again with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import itertools
import pathlib

import literal
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from inputs import families, scene
from native_cases import call, scipy_edge_distance_sq

import contextrast_kernels as ck
from contextrast_kernels import native

ROOT = pathlib.Path(__file__).parents[2]
NO_EDGE = 2**31 - 1
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

pytestmark = pytest.mark.skipif(native.status("cpu") != "ok", reason=f"native, cpu: {native.status('cpu')}")


def distance_sq(classes):
    return native.edge_distance(torch.as_tensor(classes), True)


def seed(value):
    return torch.tensor(value)


def brute_force_sq(classes):
    """The squared distances of Eq. 7 as int32 (B, H, W), from every pair of pixels of small maps."""
    B, H, W = classes.shape
    edge = torch.zeros(classes.shape, dtype=torch.bool)
    for axis in (1, 2):
        n = classes.shape[axis] - 1
        differ = classes.narrow(axis, 1, n) != classes.narrow(axis, 0, n)
        edge.narrow(axis, 1, n).logical_or_(differ)
        edge.narrow(axis, 0, n).logical_or_(differ)
    edge, flat = (x.reshape(B, -1).T.contiguous() for x in (edge, classes))
    squared = torch.full((H * W, B), NO_EDGE, dtype=torch.int32)
    for p, q in itertools.product(range(H * W), repeat=2):
        apart = (p // W - q // W) ** 2 + (p % W - q % W) ** 2
        nearer = edge[q] & (flat[p] == flat[q]) & (squared[p] > apart)
        squared[p].masked_fill_(nearer, apart)
    return torch.where(flat < 0, -1, squared).T.reshape(B, H, W)


# -------------------------------------------------------------------------------------------------------- edge distance


@pytest.mark.parametrize(
    ("shape", "symbols"),
    [
        *(((1, 10), 3), ((10, 1), 3), ((2, 5), 3), ((3, 3), 3)),
        *(((2, 2), 4), ((4, 4), 2), ((2, 8), 2), ((8, 2), 2)),
        *(pytest.param(shape, 3, marks=pytest.mark.slow) for shape in ((3, 4), (4, 3), (2, 6), (6, 2))),
        pytest.param((2, 9), 2, marks=pytest.mark.slow),
    ],
)
def test_every_small_map_equals_brute_force(shape, symbols):
    """All maps of one shape, with the smallest symbol outside of all classes or with every symbol a class."""
    pixels = shape[0] * shape[1]
    code = torch.arange(symbols**pixels)
    maps = torch.stack([code // symbols**p % symbols for p in range(pixels)], 1).reshape(-1, *shape).to(torch.int8)
    for lowest in (-1, 0):
        assert torch.equal(distance_sq(maps + lowest), brute_force_sq(maps + lowest))


def check_against_scipy(maps):
    maps = np.stack(maps)
    squared = distance_sq(maps).numpy()
    expected = scipy_edge_distance_sq(maps)
    assert squared.dtype == np.int32
    assert (squared == expected).all(), np.argwhere(squared != expected)[:5]
    distance = native.edge_distance(torch.from_numpy(maps), False).numpy()
    with np.errstate(invalid="ignore"):
        rounded = np.where(expected < 0, -1.0, np.where(expected == NO_EDGE, np.inf, np.sqrt(expected))).astype(
            np.float32
        )
    assert (distance == rounded).all()


# The heights are around the borders of words, the widths around those of segments and vector registers.
@pytest.mark.parametrize("size", [(31, 33), (32, 16), (33, 15), (63, 17), (64, 64), (65, 48), (97, 31)])
def test_borders_of_words_and_segments_equal_scipy(rng, size):
    check_against_scipy(list(families(rng, *size).values()))


@pytest.mark.slow
@pytest.mark.parametrize("height", [1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129])
@pytest.mark.parametrize("width", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129])
def test_every_pair_of_borders_equals_scipy(rng, height, width):
    check_against_scipy(list(families(rng, height, width).values()))


@pytest.mark.parametrize("size", [(40, 1023), (33, 1025), (1024, 34), (3, 4100)])
def test_long_lines_equal_scipy(rng, size):
    named = families(rng, *size)
    check_against_scipy(
        [named[name] for name in ("hole in a corner", "two far sites", "parabola", "disc", "density 0.1 %")]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [(1023, 1025), (1025, 1023), (1024, 1024), (2050, 2050), (70, 4100), (4100, 70), (512, 1024), (360, 480)]
)
def test_every_family_at_real_sizes_equals_scipy(rng, size):
    for name, classes in families(rng, *size).items():
        if classes.size > 2**21 and name.startswith("random"):
            continue
        check_against_scipy([classes])


def test_largest_sides_have_exact_distances():
    """At 16384 a squared distance takes 29 bits. With one site in a corner distances are known in closed form."""
    side = 16384
    for shape in ((3, side), (side, 3)):
        r, c = np.mgrid[: shape[0], : shape[1]]
        for corner in ((0, 0), (shape[0] - 1, shape[1] - 1)):
            mask = torch.ones(1, *shape, dtype=torch.uint8)
            mask[0][corner] = 0
            expected = (r - corner[0]) ** 2 + (c - corner[1]) ** 2
            assert (native.distance_transform(mask, True)[0].numpy() == expected).all()


@pytest.mark.slow
def test_the_largest_image_has_exact_distances():
    side = 16384
    mask = torch.ones(1, side, side, dtype=torch.uint8)
    mask[0, 0, 0] = 0
    squared = native.distance_transform(mask, True)[0]
    line = torch.arange(side) ** 2
    assert squared[-1, -1] == 2 * (side - 1) ** 2
    for r in (0, 1, 31, 32, 8000, side - 1):
        assert torch.equal(squared[r].long(), line + r * r)


def test_maps_of_every_density_equal_scipy(rng):
    for percent in (0.05, 0.1, 0.3, 1, 3, 10, 30, 50, 70, 90, 97, 99, 99.7, 99.9, 99.95):
        random = np.where(rng.random((70, 130)) * 100 < percent, rng.integers(0, 3, (70, 130)), -1)
        check_against_scipy([random, np.minimum(random, 0)])


def test_tensors_on_two_devices_are_refused_before_anything_reads_them():
    """The package checks tensors before it calls the ops. A direct call with a mixed pair raises a clear error too."""
    here, there = torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, 4, 4, dtype=torch.int64, device="meta")
    assert native._device(labels=here, predictions=here) == here.device
    for op, arguments, name in (
        (native.error_map, (there, here, 4, 255), "predictions"),
        (native.select_nearest, (here, there.int(), 0.5, 4, seed(0)), "distance_sq"),
        (native.select_nearest, (here, here.int(), 0.5, 4, seed(0).to("meta")), "seed"),
        (native.bane_negatives, (there, here, 4, [2, 2], 0.5, "bane", "layer", 255, seed(0)), "predictions"),
        (native.bane_codes, (here, here, 4, [2, 2], 0.5, "bane", "layer", 255, seed(0).to("meta")), "seed"),
    ):
        with pytest.raises(
            ValueError, match=rf"{name}: expected a tensor on cpu, where .* is, got one on meta\. Move it"
        ):
            op._init_fn(*arguments)  # the op's code for CPU and CUDA, to which the dispatcher sends no meta tensor


@settings(max_examples=150, deadline=None)
@given(
    arrays.arrays(
        np.int8,
        st.tuples(*(st.integers(1, n) for n in (2, 40, 40))),
        elements=st.integers(-2, 2),
        fill=st.integers(-1, 1),
    )
)
def test_fuzzed_maps_equal_the_reference(classes):
    classes = torch.from_numpy(classes)
    mask = classes != 0
    with ck.backend("reference"):
        expected = ck.edge_distance(classes, squared=True), ck.distance_transform(mask, squared=True)
    assert torch.equal(native.edge_distance(classes, True), expected[0])
    assert torch.equal(native.distance_transform(mask, True), expected[1])


# ---------------------------------------------------------------------------------------------- types, strides, threads


def views(dense):
    """The same (B, H, W) values, laid out in other ways."""
    B, H, W = dense.shape
    spread = dense.new_full((B + 1, 2 * H + 1, 3 * W + 2), 1)
    spread[1:, 1::2, 2::3] = dense
    return {
        "dense": dense,
        "a transposed image": dense.transpose(1, 2).contiguous().transpose(1, 2),
        "every second row, every third column": spread[1:, 1::2, 2::3],
        "images interleaved": dense.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "one channel of four": torch.stack([dense.flip(1)] * 3 + [dense], -1)[..., 3],
    }


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_type_and_stride_gives_the_same_distances(rng, dtype):
    low = -3 if torch.iinfo(dtype).min else 0
    classes = rng.integers(low, 4, (2, 37, 41))
    classes[:, 10:30, 5:35] = 3
    expected = torch.from_numpy(scipy_edge_distance_sq(classes)).int()
    classes = torch.from_numpy(classes)
    with ck.backend("reference"):
        to_zero = ck.distance_transform(classes != 0, squared=True)
    for name, view in views(classes.to(dtype)).items():
        assert torch.equal(native.edge_distance(view, True), expected), name
        assert torch.equal(native.distance_transform(view, True), to_zero), name
    assert torch.equal(native.distance_transform(classes != 0, True), to_zero)


def test_expanded_inputs_equal_contiguous_ones(rng):
    row = torch.from_numpy(rng.integers(-1, 2, (1, 1, 50)))
    full = row.expand(3, 40, 50)
    assert torch.equal(distance_sq(full), distance_sq(full.contiguous()))
    labels, predictions = scene(rng)
    image = predictions[:1].expand(2, -1, -1)
    assert torch.equal(native.error_map(image, labels, 4, 255), native.error_map(image.contiguous(), labels, 4, 255))


@pytest.mark.parametrize("dtype", INTEGERS)
def test_extreme_values_are_compared_at_full_width(dtype):
    """No narrower type makes two different classes equal, and no value is used as an index."""
    limits = torch.iinfo(dtype)
    values = [limits.max, limits.max - 1, limits.min, 0]
    # Beyond 8 and 32 bits, and around numbers of classes.
    wide = (255, 256, 1023, 1024, 1025, 2**31, -(2**32), 2**32, 2**32 + 1)
    values += [v for v in wide if limits.min <= v <= limits.max]
    pairs = torch.tensor(list(itertools.product(values, repeat=2)), dtype=dtype)[:, None, :]
    expected = [[[(-1 if v < 0 else NO_EDGE if a == b else 0) for v in (a, b)]] for [[a, b]] in pairs.tolist()]
    assert distance_sq(pairs).tolist() == expected
    for num_classes in (256, 1024, 2**20):
        chosen = native.select_nearest(pairs, torch.zeros(pairs.shape, dtype=torch.int32), 1.0, num_classes, seed(0))
        ids = pairs.long()  # torch wraps num_classes to the type of the tensor that it is compared with
        assert torch.equal(chosen, (ids >= 0) & (ids < num_classes))
    errors = native.error_map(pairs.flip(2), pairs, -1, 255)
    wrong = [
        [[p if t >= 0 and p != t and 255 not in (t, p) and 0 <= p < 2**31 else -1 for t, p in ((a, b), (b, a))]]
        for [[a, b]] in pairs.tolist()
    ]
    assert errors.tolist() == wrong


@pytest.mark.parametrize("ignore_index", [255, -1, -100, 4, 0, 2**40])
@pytest.mark.parametrize(("label_type", "prediction_type"), [*itertools.product(INTEGERS, repeat=2)])
def test_the_error_map_of_every_pair_of_types_equals_the_reference(rng, label_type, prediction_type, ignore_index):
    def maps(dtype, shape):
        values = torch.from_numpy(rng.integers(-2, 7, shape))
        values[0, 0, :4] = torch.tensor([255, -100, 156, 2**40 + 1])
        return values.to(dtype)  # wraps: 156 may become -100, and back

    labels, predictions = maps(label_type, (2, 9, 300)), maps(prediction_type, (2, 5, 7))
    with ck.backend("reference"):
        expected = ck.error_map(predictions, labels, num_classes=5, ignore_index=ignore_index)
    assert (expected >= 0).any()
    for name, view in views(labels).items():
        assert torch.equal(native.error_map(predictions, view, 5, ignore_index), expected), name


@pytest.mark.parametrize("dtype", FLOATS)
def test_argmax_is_that_of_torch(rng, dtype):
    """Signed zeros tie, infinities do not, and the first NaN wins, in any memory format and size."""
    special = [0.0, -0.0, 1.0, -1.0, float("inf"), -float("inf"), float("nan"), -float("nan"), 6e-8, -6e-8, 1e-3]
    logits = torch.tensor(special)[torch.from_numpy(rng.integers(0, len(special), (2, 5, 13, 300)))].to(dtype)
    logits = torch.cat([logits, torch.from_numpy(rng.standard_normal((2, 5, 13, 300))).to(dtype)])
    labels = torch.full((4, 13, 300), 5)
    expected = logits.argmax(1)
    for logits_view in (
        logits,
        logits.contiguous(memory_format=torch.channels_last),
        logits.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert torch.equal(native.error_map(logits_view, labels, 6, 255).long(), expected)
    r, c = torch.arange(29) * 13 // 29, torch.arange(270) * 300 // 270
    sampled = native.error_map(logits, torch.full((4, 29, 270), 5), 6, 255)
    assert torch.equal(sampled.long(), expected[:, r][:, :, c])


def test_results_do_not_depend_on_the_threads(rng):
    labels, predictions = scene(rng, B=3, H=200, W=300)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7, 100):
            torch.set_num_threads(threads)
            errors = native.error_map(predictions, labels, 4, 255)
            squared = native.edge_distance(errors, True)
            chosen = native.select_nearest(errors, squared, 0.3, 4, seed(5))
            layers, counts = native.bane_negatives(
                predictions, labels, 4, [200, 300, 50, 75], 0.3, "bane", "full", 255, seed(5)
            )
            results.append((errors, squared, native.distance_transform(labels > 0, True), chosen, counts, *layers))
    finally:
        torch.set_num_threads(before)
    assert results[0][3].any()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_outputs_are_wholly_written_whatever_the_memory_held(rng):
    """Outputs and scratch come from torch.empty, which is filled with the largest values here."""
    labels, predictions = scene(rng, B=2, H=70, W=90)
    labels[1] = 255

    def everything():
        errors = native.error_map(predictions, labels, 4, 255)
        return (
            errors,
            *(native.edge_distance(errors, squared) for squared in (False, True)),
            *(native.distance_transform(labels == 2, squared) for squared in (False, True)),
            native.select_nearest(errors, native.edge_distance(errors, True), 0.5, 4, seed(1)),
            *call("bane_negatives", (predictions, labels, 4, [70, 90, 9, 11], 0.5, "bane", "layer", 255, seed(1))),
            *call("bane_negatives", (predictions, labels, 4, [0, 9, 9, 11], 0.5, "semi-hard", "full", 255, seed(1))),
        )

    expected = everything()
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1, dtype=torch.int32).item() == NO_EDGE  # the fill is on
        assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


# ------------------------------------------------------------------------------------------------------------ selection


def sorted_selection(classes, distance_sq, ratio, num_classes, seed):
    """Sort each image by (class, distance, hash) and select the first ceil(ratio |B^n|) of each class."""
    B, H, W = classes.shape
    pixel = np.arange(H * W, dtype=np.uint32)
    key = literal.mix(literal.mix(literal.mix(0x9E3779B9) ^ (seed >> 32 & 0xFFFFFFFF)) ^ (seed & 0xFFFFFFFF))
    x = pixel ^ np.uint32(key)
    for multiplier, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 12)):
        x = (x ^ x >> np.uint32(shift)) * np.uint32(multiplier)
    x = x ^ x >> np.uint32(15)
    selected = np.zeros((B, H * W), dtype=bool)
    for image, squared, out in zip(classes.reshape(B, -1), distance_sq.reshape(B, -1), selected, strict=True):
        order = np.lexsort((x, squared, image))
        for n in np.unique(image[image >= 0]):
            if n < num_classes:
                of_class = order[image[order] == n]
                out[of_class[: int(np.ceil(ratio * len(of_class)))]] = True
    return selected.reshape(B, H, W)


@pytest.mark.parametrize("ratio", [0.0, 1e-9, 0.1, 1 / 3, 0.5, 1.0])
@pytest.mark.parametrize("num_classes", [2**20, 19])
def test_selection_equals_a_full_sort(rng, ratio, num_classes):
    H, W = 96, 130
    cases = {
        "many classes": (rng.integers(-1, 19, (2, H, W)), rng.geometric(0.25, (2, H, W)) ** 2),
        "more classes than asked for": (rng.integers(-3, 30, (2, H, W)), rng.geometric(0.5, (2, H, W))),
        "one class, one distance": (np.zeros((1, H, W), int), np.full((1, H, W), 7)),
        "one class without an edge": (np.zeros((1, H, W), int), np.full((1, H, W), NO_EDGE)),
        "one class, deep": (np.zeros((1, H, W), int), rng.integers(0, 2 * 16383**2, (1, H, W))),
        "any int32 distance": (rng.integers(-1, 2, (1, H, W)), rng.integers(-(2**31), 2**31, (1, H, W))),
        "no class": (np.full((2, H, W), -1), np.zeros((2, H, W), int)),
        "a class for every pixel": (np.arange(1500).reshape(1, 30, 50), np.zeros((1, 30, 50), int)),
        "classes far apart": (rng.integers(0, 3, (2, H, W)) * 2**40 - 1, rng.integers(0, 4, (2, H, W))),
        "one pixel": (np.zeros((1, 1, 1), int), np.zeros((1, 1, 1), int)),
    }
    for name, (classes, squared) in cases.items():
        for value in (0, 2**40 + 5, -1):
            expected = sorted_selection(classes, squared, ratio, num_classes, value)
            of_class = torch.from_numpy(classes), torch.from_numpy(squared).int()
            selected = native.select_nearest(*of_class, ratio, num_classes, seed(value))
            assert selected.dtype == torch.bool
            assert (selected.numpy() == expected).all(), name


@pytest.mark.slow
def test_selection_equals_a_full_sort_at_real_sizes(rng):
    for N, size in ((19, (512, 1024)), (171, (2048, 2048)), (1, (2048, 2048))):
        classes = rng.integers(0, N, (1, *size))
        for squared in (rng.geometric(0.25, classes.shape) ** 2, np.zeros_like(classes)):
            for ratio in (0.1, 0.5):
                selected = native.select_nearest(
                    torch.from_numpy(classes), torch.from_numpy(squared).int(), ratio, N, seed(3)
                )
                assert (selected.numpy() == sorted_selection(classes, squared, ratio, N, 3)).all()


@pytest.mark.parametrize("dtype", INTEGERS)
def test_selection_takes_every_type_and_stride(rng, dtype):
    classes = rng.integers(0, 5, (2, 21, 33))
    squared = rng.integers(0, 6, classes.shape)
    expected = torch.from_numpy(sorted_selection(classes, squared, 0.4, 4, 9))
    distances = views(torch.from_numpy(squared).int())
    for name, view in views(torch.from_numpy(classes).to(dtype)).items():
        for other, distance in distances.items():
            assert torch.equal(native.select_nearest(view, distance, 0.4, 4, seed(9)), expected), (name, other)


# ------------------------------------------------------------------------------------------------------- bane_negatives


def sampled(values, h, w):
    H, W = values.shape[-2:]
    return values[..., (torch.arange(h) * H // h)[:, None], torch.arange(w) * W // w]


@pytest.mark.parametrize("distance_at", ["layer", "full"])
@pytest.mark.parametrize("negatives", ["bane", "semi-hard"])
@pytest.mark.parametrize("from_logits", [False, True])
def test_layers_in_one_call_equal_the_parts_one_by_one(rng, distance_at, negatives, from_logits):
    labels, predictions = scene(rng, B=3, N=5, H=66, W=91)
    predictions = sampled(predictions, 33, 47)
    given = predictions
    if from_logits:
        given = torch.nn.functional.one_hot(predictions, 5).movedim(-1, 1).to(torch.bfloat16)
    sizes = [(66, 91), (17, 23), (9, 12), (3, 3), (1, 1), (132, 100)]
    flat = [side for size in sizes for side in size]
    layers, counts = native.bane_negatives(given, labels, 5, flat, 0.3, negatives, distance_at, 255, seed(11))
    assert counts.dtype == torch.int64
    assert len(layers) == len(sizes)
    full_errors = native.error_map(predictions, labels, 5, 255)
    for size, layer, errors_of_layer in zip(sizes, layers, counts, strict=True):
        if distance_at == "full":
            errors, squared = sampled(full_errors, *size), sampled(distance_sq(full_errors), *size)
        else:
            errors = native.error_map(sampled(predictions, *size), sampled(labels, *size), 5, 255)
            squared = distance_sq(errors)
        squared = torch.zeros_like(squared) if negatives == "semi-hard" else squared
        chosen = native.select_nearest(errors, squared, 0.3, 1024, seed(11))
        assert torch.equal(layer, torch.where(chosen, errors, -1)), size
        assert errors_of_layer == (errors >= 0).sum(), size
    assert (layers[0] >= 0).any()


@pytest.mark.parametrize("num_classes", [5, 127, 129, 255, 256, 300])
@pytest.mark.parametrize("distance_at", ["layer", "full"])
def test_codes_hold_the_same_negatives_in_one_or_two_bytes(rng, num_classes, distance_at):
    """Some classes exceed int8 or are next to the type's largest number, which means no class."""
    labels, predictions = scene(rng, B=3, N=5, H=66, W=91)
    predictions = predictions + num_classes - 5  # the largest class among them
    sizes = [66, 91, 17, 23, 3, 3, 1, 1, 0, 4]
    ignored = 255 if num_classes <= 255 else -100  # an ignored class is no error
    arguments = (predictions, labels, num_classes, sizes, 0.3, "bane", distance_at, ignored, seed(11))
    layers, counts = native.bane_negatives(*arguments)
    codes, counts_again = native.bane_codes(*arguments)
    assert codes.dtype == (torch.uint8 if num_classes <= 255 else torch.int16)
    flat = torch.cat([layer.flatten() for layer in layers])
    assert torch.equal(torch.where(flat < 0, torch.iinfo(codes.dtype).max, flat), codes.int())
    assert torch.equal(counts, counts_again)
    assert flat.max() == num_classes - 1


# ---------------------------------------------------------------------------------------------- empties, fuzz, refusals


def test_empty_input_gives_empty_output():
    for shape in ((0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)):
        empty = torch.zeros(shape, dtype=torch.int64)
        for result in (
            native.edge_distance(empty, True),
            native.distance_transform(empty, False),
            native.select_nearest(empty, empty.int(), 0.5, 4, seed(0)),
            native.error_map(empty, empty, 4, 255),
            native.error_map(torch.zeros(shape[0], 3, *shape[1:]), empty, 3, 255),
        ):
            assert result.shape == shape
    batch = torch.zeros(0, 5, 7, dtype=torch.int64)
    layers, counts = native.bane_negatives(batch, batch, 4, [5, 7, 2, 3], 0.5, "bane", "full", 255, seed(0))
    assert [layer.shape for layer in layers] == [(0, 5, 7), (0, 2, 3)] and counts.tolist() == [0, 0]
    image = torch.zeros(2, 5, 7, dtype=torch.int64)
    layers, counts = native.bane_negatives(image, image, 4, [], 0.5, "bane", "layer", 255, seed(0))
    assert layers == [] and counts.shape == (0,)
    layers, counts = native.bane_negatives(image, image + 1, 4, [0, 3], 0.5, "bane", "layer", 255, seed(0))
    assert layers[0].shape == (2, 0, 3) and counts.tolist() == [0]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzzed_calls_stay_in_bounds(data):
    """Results of any values, type and size are in range. Under AddressSanitizer every access is in bounds."""

    def draw_map(shape, dtype):
        limits = np.iinfo(dtype)
        value = st.one_of(st.sampled_from([limits.min, limits.max, 0, 1]), st.integers(max(-3, limits.min), 6))
        return torch.from_numpy(data.draw(arrays.arrays(dtype, shape, elements=value)))

    size = st.tuples(st.integers(1, 40), st.integers(1, 40))
    dtype = st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.int64])
    B, N = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([0, 1, 4, 2**20]))
    labels = draw_map((B, *data.draw(size)), data.draw(dtype))
    predictions = draw_map((B, *data.draw(size)), data.draw(dtype))
    ratio, ignored = data.draw(st.floats(0, 1)), data.draw(st.integers(-(2**63), 2**63 - 1))
    flat = [side for layer in data.draw(st.lists(size, max_size=3)) for side in layer]

    errors = native.error_map(predictions, labels, data.draw(st.sampled_from([-1, N, 2**31, 2**62])), ignored)
    assert errors.min() >= -1
    for classes in (errors, labels, predictions):
        squared = native.edge_distance(classes, True)
        assert torch.equal(squared >= 0, classes >= 0)
        selected = native.select_nearest(classes, squared, ratio, N, seed(0))
        assert not selected[classes < 0].any()
        native.distance_transform(classes, False)
    for negatives, distance_at in itertools.product(("bane", "semi-hard"), ("layer", "full")):
        native.bane_negatives(predictions, labels, N, flat, ratio, negatives, distance_at, ignored, seed(0))


def test_invalid_arguments_raise_clear_errors():
    classes = torch.zeros(1, 2, 3, dtype=torch.int64)
    wide = torch.zeros(1, 1, 1, dtype=torch.int64).expand(1, 1, 16385)
    with pytest.raises(
        ValueError,
        match=r"^classes: expected sides of at most 16384 pixels, got 1 x 1 x 16385\. Crop or downsample it\.$",
    ):
        native.edge_distance(wide, True)
    with pytest.raises(ValueError, match="16384"):
        native.distance_transform(wide.transpose(1, 2), True)
    with pytest.raises(ValueError, match="16384"):
        native.bane_negatives(classes, classes, 4, [1, 16385], 0.5, "bane", "layer", 255, seed(0))
    with pytest.raises(ValueError, match=r"^layers: expected at most 16, got 17\. Make several calls\.$"):
        native.bane_negatives(classes, classes, 4, [1, 1] * 17, 0.5, "bane", "layer", 255, seed(0))
    with pytest.raises(ValueError, match="predictions: expected batch size 1, that of labels, got 2"):
        native.error_map(classes.expand(2, -1, -1), classes, 4, 255)
    with pytest.raises(ValueError, match="predictions: expected at least one pixel"):
        native.error_map(classes[:, :0], classes, 4, 255)
    with pytest.raises(ValueError, match="labels: expected at least one pixel, as layer 0 has 4 x 4"):
        native.bane_negatives(classes[:, :0], classes[:, :0], 4, [4, 4], 0.5, "bane", "layer", 255, seed(0))
    with pytest.raises(ValueError, match="classes: expected an integer type"):
        native.edge_distance(classes.float(), True)
    for num_classes in (-1, 2**20 + 1, 2**62):
        with pytest.raises(ValueError, match=f"num_classes: expected 0 to 1048576, got {num_classes}"):
            native.select_nearest(classes, classes.int(), 0.5, num_classes, seed(0))
        with pytest.raises(ValueError, match=f"num_classes: expected 0 to 1048576, got {num_classes}"):
            native.bane_negatives(classes, classes, num_classes, [2, 3], 0.5, "bane", "layer", 255, seed(0))
    with pytest.raises(ValueError, match=r"distance_sq: expected an int32 map .*, got type 4 and \(1, 2, 3\)\. Pass"):
        native.select_nearest(classes, classes, 0.5, 4, seed(0))
    with pytest.raises(ValueError, match="distance_sq: expected an int32 map"):
        native.select_nearest(classes, classes[:, :1].int(), 0.5, 4, seed(0))


# --------------------------------------------------------------------------------------------------------------- as ops


def test_ops_pass_opcheck(rng):
    labels, predictions = scene(rng, B=2, H=9, W=11)
    logits = torch.randn(2, 4, 5, 6, requires_grad=True)
    errors = native.error_map(predictions, labels, 4, 255)
    squared = native.edge_distance(errors, True)
    for op, arguments in (
        (native.error_map, (predictions, labels, 4, 255)),
        (native.error_map, (logits, labels, -1, 255)),
        (native.edge_distance, (errors, True)),
        (native.edge_distance, (errors, False)),
        (native.distance_transform, (labels > 0, True)),
        (native.select_nearest, (errors, squared, 0.5, 19, seed(1))),
        (native.bane_negatives, (logits, labels, 4, [9, 11, 3, 4], 0.5, "bane", "layer", 255, seed(1))),
    ):
        torch.library.opcheck(op, arguments)


def test_compiles_with_fullgraph(rng):
    labels, predictions = scene(rng, B=2, H=16, W=20)

    def negatives(predictions, labels, seed):
        errors = ck.error_map(predictions, labels, num_classes=4)
        return (
            errors,
            ck.edge_distance(errors),
            ck.bane_negatives(predictions, labels, num_classes=4, size=(8, 10), seed=seed),
        )

    with ck.backend("native"):
        compiled = torch.compile(negatives, fullgraph=True, backend="aot_eager")
        for value in (0, 1):
            for a, b in zip(
                compiled(predictions, labels, seed(value)), negatives(predictions, labels, seed(value)), strict=True
            ):
                assert torch.equal(a, b)
