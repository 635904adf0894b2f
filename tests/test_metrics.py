"""Metrics against hand numbers, literal loops (``literal_metrics.py``), torchmetrics and OpenCV; and what all of them
promise: any split into batches, any number of ranks, no waiting, no effect of ignored pixels."""

import copy
import math
import pickle

import literal
import literal_metrics as loops
import numpy as np
import pytest
import torch
from inputs import pyramid, scene
from test_compile import Dispatched

from contextrast_kernels import metrics
from contextrast_kernels.metrics import (
    AlignmentUniformity,
    AnchorSimilarity,
    BoundaryF1,
    BoundaryIoU,
    ConfusionMatrix,
    InstanceIoU,
    TrimapIoU,
    boundary_mask,
)

N = 4
INSTANCE_SIZES = (None, 30.0, 11.5, 7.0)
CATEGORIES = (0, 1, 1, 2)


def maps(seed=0, B=3, H=14, W=17, classes=N):
    """Labels with ignored pixels, a prediction with pixels of no class, instance ids."""
    rng = np.random.default_rng(seed)
    labels, predictions = scene(rng, B=B, N=classes, H=H, W=W, ignored=0.05)
    labels[:, 2:5, 3:7] = 255
    labels[0, 0, 0] = -7
    predictions[:, -1, :4] = torch.tensor([-1, classes, 255, 10**6])
    instances = torch.from_numpy(rng.integers(0, 4, (B, H // 4 + 1, W // 4 + 1)))
    instances = instances.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, :H, :W]
    return labels, predictions, instances


def embeddings(seed=0, B=3, D=5, sizes=((7, 9), (4, 5), (2, 3)), dtype=torch.float32):
    return pyramid(np.random.default_rng(seed), B=B, D=D, sizes=sizes, dtype=dtype)


# How each metric is built, and the arguments of an update.
METRICS = {
    "ConfusionMatrix": (lambda **o: ConfusionMatrix(N, **o), lambda y, p, ids, x: (p, y)),
    "TrimapIoU": (lambda **o: TrimapIoU(N, (0, 1.5, 3), **o), lambda y, p, ids, x: (p, y)),
    "BoundaryIoU": (lambda **o: BoundaryIoU(N, (1, 3), **o), lambda y, p, ids, x: (p, y)),
    "BoundaryF1": (lambda **o: BoundaryF1(N, 1.5, **o), lambda y, p, ids, x: (p, y)),
    "InstanceIoU": (
        lambda **o: InstanceIoU(N, INSTANCE_SIZES, categories=CATEGORIES, **o),
        lambda y, p, ids, x: (p, y, ids),
    ),
    "AlignmentUniformity": (lambda **o: AlignmentUniformity(N, (1, 3), samples=8, **o), lambda y, p, ids, x: (x[0], y)),
    "AnchorSimilarity": (lambda **o: AnchorSimilarity(N, 4, **o), lambda y, p, ids, x: (x, y, p)),
}
ON_MAPS = ["ConfusionMatrix", "TrimapIoU", "BoundaryIoU", "BoundaryF1", "InstanceIoU"]
every_metric = pytest.mark.parametrize("name", METRICS)


def arguments(name, seed=0, B=3, **options):
    y, p, ids = maps(seed, B=B, **options)
    return METRICS[name][1](y, p, ids, embeddings(seed, B=B))


def images_of(arguments, some):
    return tuple([x[some] for x in a] if isinstance(a, list) else a[some] for a in arguments)


def evaluated(name, *batches, **options):
    metric = METRICS[name][0](**options)
    for batch in batches:
        metric.update(*batch)
    return metric.compute()


EMBEDDED = ("AlignmentUniformity", "AnchorSimilarity")
"""Metrics of anchors, which are matrix products in float32: their rounding depends on strides, threads and tracing."""


def same(one, other, exact=True):
    assert one.keys() == other.keys()
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], equal_nan=True, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def close(got, expected, tolerance=1e-12):
    torch.testing.assert_close(
        got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance, equal_nan=True
    )


def images(*tensors):
    return tuple(list(t.numpy()) for t in tensors)


# ------------------------------------------------------------------------------------------------------- one by one


def test_iou_of_a_map_worked_by_hand():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 255]]])
    predictions = torch.tensor([[[0, 1, 1, 1], [0, 1, 0, 2]]])
    matrix = ConfusionMatrix(4)
    matrix.update(predictions, labels)
    # 0: 2 hits, 3 labelled, 3 predicted. 1: 2 hits, 3 and 4. 2: no hit, 1 and 0, as void does not count. 3: absent.
    assert matrix.counts.tolist() == [[2, 1, 0, 0, 0], [1, 2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    scores = matrix.compute()
    assert scores["iou_per_class"][:3].tolist() == [2 / 4, 2 / 5, 0.0]
    assert math.isnan(scores["iou_per_class"][3])
    assert scores["miou"].item() == pytest.approx((2 / 4 + 2 / 5 + 0) / 3, abs=1e-15)
    assert scores["pixel_accuracy"].item() == 4 / 7
    assert scores["mean_accuracy"].item() == pytest.approx((2 / 3 + 2 / 3 + 0) / 3, abs=1e-15)


def test_a_mask_restricts_the_pixels():
    labels, predictions, _ = maps()
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    matrix = ConfusionMatrix(N)
    matrix.update(predictions, labels, mask=mask)
    counted = [{tuple(pixel) for pixel in image.nonzero().tolist()} for image in mask]
    close(matrix.compute()["iou_per_class"], loops.iou(*images(labels, predictions), N, counted))


def test_trimap_iou_against_literal_loops():
    labels, predictions, _ = maps()
    radii = (0, 1, 1.5, 4)
    scores = TrimapIoU(N, radii)
    scores.update(predictions, labels)
    for radius in radii:
        trimaps = [loops.trimap(image, radius, N) for image in labels.numpy()]
        expected = loops.iou(*images(labels, predictions), N, trimaps)
        close(scores.compute()[f"trimap_iou_{radius:g}px_per_class"], expected)
        close(scores.compute()[f"trimap_miou_{radius:g}px"], loops.mean(expected))


@pytest.mark.parametrize("radius", [0, 1, 1.5, 3, 100])
def test_boundary_mask_against_literal_loops(radius):
    generator = torch.Generator().manual_seed(7)
    for H, W in ((1, 1), (1, 9), (9, 1), (11, 8)):
        coarse = torch.randint(0, 4, (3, -(-H // 3), -(-W // 3)), generator=generator)
        labels = coarse.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :H, :W].clone()
        labels[labels == 3] = 255
        for image, mask in zip(labels, boundary_mask(labels, radius)):
            assert {tuple(pixel) for pixel in mask.nonzero().tolist()} == loops.trimap(image.numpy(), radius, 3)


def test_the_border_of_void_is_no_boundary():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :, 4] = 255
    assert not boundary_mask(labels, 3).any()
    labels[:, :, 5:] = 1
    assert not boundary_mask(labels, 3).any()
    labels[:, 6:, :4] = 1
    assert boundary_mask(labels, 0)[0].nonzero().tolist() == [[y, x] for y in (5, 6) for x in range(4)]


def test_no_boundary_means_no_pixel_whatever_the_radius():
    assert not boundary_mask(torch.zeros(2, 5, 5, dtype=torch.long), 1e9).any()
    assert not boundary_mask(torch.zeros(2, 5, 5, dtype=torch.long), 1e300).any()
    assert boundary_mask(torch.zeros(0, 5, 5, dtype=torch.long), 3).shape == (0, 5, 5)


@pytest.mark.parametrize("width", [1, 2, 5, 40])
@pytest.mark.parametrize("void", [False, True])
def test_boundary_iou_against_literal_erosion(width, void):
    labels, predictions, _ = maps(B=2, H=11, W=13)
    if not void:
        labels = torch.where((labels >= 0) & (labels < N), labels, 0)
    scores = BoundaryIoU(N, (width,))
    scores.update(predictions, labels)
    close(
        scores.compute()[f"boundary_iou_{width}px_per_class"],
        loops.boundary_iou(*images(labels, predictions), N, width),
    )


def test_boundary_iou_against_opencv_erosion():
    """The authors' own way to the band: padded by a pixel of zeros, eroded d times with a 3x3 kernel."""
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    labels, predictions = scene(np.random.default_rng(3), B=2, N=N, H=64, W=97, ignored=0)
    scores = BoundaryIoU(N, (2, 7))
    scores.update(predictions, labels)

    def band(mask, width):
        padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        return mask & (cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=width)[1:-1, 1:-1] == 0)

    for width in (2, 7):
        expected = []
        for n in range(N):
            bands = [[band(image == n, width) for image in t.numpy()] for t in (labels, predictions)]
            true, predicted = map(np.stack, bands)
            expected.append((true & predicted).sum() / (true | predicted).sum())
        close(scores.compute()[f"boundary_iou_{width}px_per_class"], expected)


@pytest.mark.parametrize("radius", [0, 1.5, 3, None])
def test_boundary_f1_against_literal_loops(radius):
    labels, predictions, _ = maps(H=12, W=15)
    labels[2], predictions[2] = 1, 3  # no boundary in either
    predictions[1] = 2  # an empty prediction: no boundary where the labels have some
    scores = BoundaryF1(6, radius)
    scores.update(predictions, labels)
    expected = loops.boundary_f1(*images(labels, predictions), 6, radius)
    assert math.isnan(expected[5]) and 0 < loops.mean(expected) < 1
    close(scores.compute()["boundary_f1_per_class"], expected)
    close(scores.compute()["boundary_f1"], loops.mean(expected))


def test_the_tolerance_of_boundary_f1_follows_the_diagonal():
    labels = torch.zeros(1, 300, 400, dtype=torch.uint8)
    labels[:, :, 200:] = 1
    for shift, expected in ((3, 1.0), (4, 0.0)):  # 0.75 % of 500 px are 3.75
        scores = BoundaryF1(2)
        scores.update(labels.roll(shift, 2).where(torch.arange(400) >= shift, 0), labels)
        assert scores.compute()["boundary_f1"].item() == expected


def test_instance_iou_worked_by_hand():
    labels = torch.tensor([[[1, 1, 1, 1, 0, 0, 1]]])
    instances = torch.tensor([[[1000, 1000, 1000, 1001, 7, 7, 24]]])  # the last pixel is of a crowd
    predictions = torch.tensor([[[1, 0, 0, 1, 1, 0, 0]]])
    scores = InstanceIoU(2, (None, 6.0), first_instance=1000)
    scores.update(predictions, labels, instances)
    # The instance of 3 pixels: each weighs 2, one hit, two misses. That of 1 pixel weighs 6, a hit. One false alarm.
    assert scores.compute()["iiou_per_class"].tolist()[1] == pytest.approx((2 + 6) / (2 + 6 + 1 + 4), abs=1e-9)
    assert math.isnan(scores.compute()["iiou_per_class"][0])
    assert scores.compute()["iiou"].item() == pytest.approx(8 / 13, abs=1e-9)


@pytest.mark.parametrize("first", [1, 2, -5])
def test_instance_iou_against_literal_loops(first):
    labels, predictions, instances = maps(B=4)
    if first < 0:
        instances = instances * 2**40 - 2**33  # ids use all 64 bits
        first = -(2**35)
    scores = InstanceIoU(N, INSTANCE_SIZES, categories=CATEGORIES, first_instance=first)
    scores.update(predictions[:1], labels[:1], instances[:1])
    scores.update(predictions[1:], labels[1:], instances[1:])
    every = *images(labels, predictions, instances), INSTANCE_SIZES, first
    per_class, per_category = loops.instance_iou(*every), loops.instance_iou(*every, CATEGORIES)
    assert math.isnan(per_class[0]) and not math.isnan(per_class[1]) and not math.isnan(per_category[1])
    # Shares are rounded to 2**-32.
    close(scores.compute()["iiou_per_class"], per_class, 1e-8)
    close(scores.compute()["iiou_per_category"], per_category, 1e-8)
    close(scores.compute()["iiou"], loops.mean(per_class), 1e-8)
    close(scores.compute()["category_iiou"], loops.mean(per_category), 1e-8)


def test_one_id_in_several_classes_and_images_is_as_many_instances():
    labels, predictions, instances = maps()
    instances[:] = 1
    scores = InstanceIoU(N, INSTANCE_SIZES)
    scores.update(predictions, labels, instances)
    expected = loops.instance_iou(*images(labels, predictions, instances), INSTANCE_SIZES, 1)
    close(scores.compute()["iiou_per_class"], expected, 1e-8)


def test_the_figures_of_cityscapes_fit_its_classes():
    scores = InstanceIoU(
        19, metrics.CITYSCAPES_INSTANCE_SIZES, categories=metrics.CITYSCAPES_CATEGORIES, first_instance=1000
    )
    labels = torch.arange(19).view(1, 1, 19)
    scores.update(labels, labels, labels * 1000)
    results = scores.compute()
    assert results["iiou_per_class"].isnan().tolist() == [True] * 11 + [False] * 8
    assert results["iiou_per_category"].isnan().tolist() == [True] * 5 + [False] * 2  # human, vehicle
    assert results["iiou"] == results["category_iiou"] == 1


def class_vectors(x, labels, classes=N):
    """The embeddings of each class, as lists."""
    labels = literal.resize(labels.numpy(), x.shape[-2:])
    rows = x.double().movedim(1, -1).numpy()
    return [[loops.at_unit_length(v) for v in rows[labels == n].tolist()] for n in range(classes)]


def test_alignment_and_uniformity_against_literal_loops():
    labels, _, _ = maps()
    labels[labels == 3] = 5
    labels[0, 0, 0] = 3  # a single pixel
    [x] = embeddings(sizes=((7, 9),))
    x[0, :, 3, 3] = 0  # a vector without a direction
    quality = AlignmentUniformity(7, (1, 2, 3, 4, 5), samples=1000)
    quality.update(x, labels)
    vectors = class_vectors(x, labels, 7)
    centres = [loops.at_unit_length([sum(axis) for axis in zip(*v)]) for v in vectors if v]
    results = quality.compute()
    expected = [loops.alignment(v) if v else math.nan for v in vectors]
    assert expected[3] == 0 and math.isnan(expected[4])
    close(results["alignment_per_class"], expected, 1e-6)
    close(results["alignment"], loops.mean(expected), 1e-6)
    close(results["uniformity"], loops.uniformity(centres), 1e-6)
    for k in (1, 2, 3, 4, 5):
        close(results[f"uniformity_{k}"], loops.uniformity(centres, k), 1e-6)
    assert not math.isnan(results["uniformity_4"]) and math.isnan(results["uniformity_5"])


def test_alignment_of_a_sample_is_unbiased():
    labels = torch.zeros(2, 12, 12, dtype=torch.long)
    [x] = embeddings(B=2, sizes=((12, 12),))
    exact = AlignmentUniformity(2, samples=288)
    exact.update(x, labels)
    exact = exact.compute()["alignment"].item()
    estimates = []
    for seed in range(60):
        quality = AlignmentUniformity(2, samples=12, seed=seed)
        quality.update(x, labels)
        estimates.append(quality.compute()["alignment"].item())
    error = np.std(estimates, ddof=1) / math.sqrt(len(estimates))
    assert 0.002 < error < 0.02 * exact
    # Without the factor for pairs of a pixel with itself it would be off by 1/12, ten errors and more.
    assert abs(np.mean(estimates) - exact) < 4 * error


def test_the_sample_is_spread_over_all_batches():
    quality = AlignmentUniformity(2, samples=400)
    for value in range(10):
        x = torch.zeros(1, 10, 20, 20)
        x[:, value] = 1
        quality.update(x, torch.zeros(1, 20, 20, dtype=torch.long))
    share = quality.state_dict()["sampled"].sum((0, 1))  # of each batch among the 400
    assert share.sum() == 400
    chi_square = ((share - 40) ** 2 / 40).sum().item()
    assert chi_square < 27.9  # 99.9 % of 9 degrees of freedom


def test_identical_embeddings_have_alignment_zero():
    quality = AlignmentUniformity(2)
    quality.update(torch.full((1, 64, 8, 8), 0.3, dtype=torch.float16), torch.zeros(1, 8, 8, dtype=torch.long))
    assert quality.compute()["alignment"].item() == 0
    assert quality.compute()["uniformity"].isnan()  # one class has no other


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_embedding_is_not_hidden(broken):
    labels = torch.arange(4).repeat_interleave(16).view(1, 8, 8) // 2  # classes 0 and 1
    labels[0, 0, 0] = 255
    [x] = embeddings(B=1, sizes=((8, 8),))
    x[0, 0, 0, 0] = broken  # ignored: no effect
    good = AlignmentUniformity(3, (1,), samples=4)
    good.update(x, labels)
    assert all(value.isfinite() for name, value in good.compute().items() if name != "alignment_per_class")
    x[0, 0, 7, 7] = broken
    bad = AlignmentUniformity(3, (1,), samples=4)
    bad.update(x, labels)
    assert all(bad.compute()[name].isnan() for name in ("alignment", "uniformity", "uniformity_1"))


def test_similarity_to_anchors_against_literal_loops():
    labels, predictions, _ = maps(seed=4, H=28, W=36)
    predictions[:, 6:26, 8:34] = 2
    labels[1, 6:26, 8:34] = 0
    labels[labels == 2] = 1  # no pixel is labelled 2: those mistaken for it have no anchor to be compared with
    x = embeddings(sizes=((14, 18), (7, 9)), dtype=torch.float64)
    similarity = AnchorSimilarity(N, 4, fusion_weight=0.6)
    similarity.update(x, labels, predictions)
    results = similarity.compute()
    assert results["distance"].tolist() == [0, 1, 2, 3]

    y, p = labels.numpy(), predictions.numpy()
    anchors = [literal.class_anchors(layer.numpy(), y, N) for layer in x]
    for i, layer in enumerate(x):
        a, counts = anchors[i]
        if i == 0:
            a = literal.fuse_anchors(a, counts, *anchors[1], 0.6)
        size = layer.shape[-2:]
        truth, guess = literal.resize(y, size), literal.resize(p, size)
        errors = literal.error_map(guess, truth, N)
        distances = literal.edge_distance_sq(errors)
        curves = {"true_class": [[] for _ in range(4)], "predicted_class": [[] for _ in range(4)]}
        for b, r, c in zip(*np.nonzero(errors >= 0)):
            v = loops.at_unit_length(layer[b, :, r, c].tolist())
            bin_ = min(math.isqrt(int(distances[b, r, c])), 3)
            for curve, n in (("true_class", truth[b, r, c]), ("predicted_class", errors[b, r, c])):
                if counts[n]:
                    anchor = loops.at_unit_length(list(a[n]))
                    curves[curve][bin_].append(sum(s * t for s, t in zip(v, anchor)))
        assert [len(values) for values in curves["true_class"]] == results["pixels"][i].tolist()
        assert len(curves["predicted_class"][0]) < len(curves["true_class"][0])
        for curve, values in curves.items():
            close(results[curve][i], [loops.mean(v) for v in values], 1e-8)  # rounded to 2**-30
    assert results["pixels"][0].min() > 0


def test_an_error_region_without_an_edge_has_no_distance():
    similarity = AnchorSimilarity(2, 3)
    similarity.update([torch.randn(1, 4, 5, 5)], torch.zeros(1, 5, 5, dtype=torch.long), torch.ones(1, 5, 5).long())
    assert similarity.compute()["pixels"].tolist() == [[0, 0, 0]]


def test_a_broken_cosine_is_not_hidden():
    labels, predictions, _ = maps()
    x = embeddings()
    x[0][:, :, 3] = math.nan
    similarity = AnchorSimilarity(N, 3)
    similarity.update(x, labels, predictions)
    assert similarity.compute()["true_class"][0, 0].isnan()


# ---------------------------------------------------------------------------------------------- against torchmetrics


def test_miou_equals_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")
    labels, predictions, _ = maps(B=4)
    predictions = predictions.remainder(N)
    labels[labels < 0] = 255
    labels[labels == 2] = 255  # absent from the labels, and with the next line from both
    predictions[predictions == 2] = 1
    peer = classification.MulticlassJaccardIndex(N, ignore_index=255)
    per_class = classification.MulticlassJaccardIndex(N, ignore_index=255, average=None)
    accuracy = classification.MulticlassAccuracy(N, ignore_index=255, average="micro")
    ours = ConfusionMatrix(N)
    for some in (slice(0, 1), slice(1, 4)):
        for metric in (peer, per_class, accuracy, ours):
            metric.update(predictions[some], labels[some])
    results = ours.compute()
    assert math.isnan(results["iou_per_class"][2])
    close(results["miou"], peer.compute().item(), 1e-6)  # theirs is float32
    close(results["iou_per_class"].nan_to_num(), per_class.compute().tolist(), 1e-6)
    close(results["pixel_accuracy"], accuracy.compute().item(), 1e-6)


# ---------------------------------------------------------------------------------------------------- all of them


@every_metric
def test_any_split_into_batches_gives_the_same(name):
    whole = arguments(name, B=4)
    parts = [images_of(whole, slice(b, b + 1)) for b in range(4)]
    if name == "AnchorSimilarity":  # its anchors are those of a batch
        same(evaluated(name, whole, whole), evaluated(name, whole, whole))
        return
    same(evaluated(name, whole), evaluated(name, *parts), exact=name not in ("AlignmentUniformity", "BoundaryF1"))


@every_metric
def test_merged_reset_saved_and_copied(name):
    first, second = arguments(name, 1), arguments(name, 2)
    both = evaluated(name, first, second)
    one, other = (METRICS[name][0]() for _ in range(2))
    one.update(*first)
    other.update(*second)
    saved = copy.deepcopy(one).state_dict()
    one.merge(other)
    exact = name != "AlignmentUniformity"  # it draws again
    if exact:
        same(one.compute(), both, exact=name != "BoundaryF1")
    other.load_state_dict(saved)
    for value in (*saved.values(), *other.state_dict().values()):
        value.zero_()  # what was saved is a copy, and so is what was loaded
    same(other.compute(), evaluated(name, first))
    other.update(*second)
    same(other.compute(), both)
    same(pickle.loads(pickle.dumps(other)).compute(), both)
    other.reset()
    assert other.state_dict() == {}
    other.update(*first)
    same(other.compute(), evaluated(name, first))


@every_metric
def test_nothing_seen_is_nan_not_zero(name):
    everything_ignored = arguments(name)
    everything_ignored = tuple(torch.full_like(a, 255) if i == 1 else a for i, a in enumerate(everything_ignored))
    no_images = images_of(arguments(name), slice(0, 0))
    for results in (evaluated(name), evaluated(name, no_images), evaluated(name, everything_ignored, no_images)):
        for key, value in results.items():
            if key == "pixels":
                assert value.sum() == 0
            elif key != "distance":
                assert value.isnan().all(), key
    same(evaluated(name, arguments(name), no_images), evaluated(name, arguments(name)))


@every_metric
def test_maps_of_one_pixel(name):
    labels = torch.zeros(2, 1, 1, dtype=torch.uint8)
    x = [torch.ones(2, 3, 1, 1)]
    results = evaluated(name, METRICS[name][1](labels, labels, labels.int() + 1, x))
    if name == "ConfusionMatrix":
        assert results["miou"] == 1


@pytest.mark.parametrize("name", ON_MAPS)
def test_a_right_prediction_scores_one_whatever_is_predicted_at_ignored_pixels(name):
    labels, _, instances = maps(seed=3)
    valid = (labels >= 0) & (labels < N)
    for noise in (0, 1, N, -1):
        predictions = torch.where(valid, labels, noise)
        results = evaluated(name, METRICS[name][1](labels, predictions, instances, None))
        for key, value in results.items():
            assert (value.isnan() | (value == 1)).all(), (noise, key)
            assert value.ndim or not value.isnan(), key


@pytest.mark.parametrize("name", [name for name in METRICS if name != "AlignmentUniformity"])
def test_predictions_at_ignored_pixels_have_no_effect(name):
    labels, predictions, instances = maps(seed=5)
    x = embeddings(sizes=((14, 17),))
    noisy = torch.where((labels >= 0) & (labels < N), predictions, torch.arange(17) % N)
    assert (noisy != predictions).any()
    same(
        evaluated(name, METRICS[name][1](labels, predictions, instances, x)),
        evaluated(name, METRICS[name][1](labels, noisy, instances, x)),
    )


@pytest.mark.parametrize("name", [name for name in METRICS if name != "AlignmentUniformity"])
def test_logits_and_class_maps_of_other_sizes(name):
    labels, _, instances = maps(H=13, W=17)
    small = maps(seed=8, H=6, W=9)[1].remainder(N)
    x = embeddings(sizes=((13, 17),))
    grown = torch.from_numpy(literal.resize(small.numpy(), (13, 17)))
    expected = evaluated(name, METRICS[name][1](labels, grown, instances, x))
    same(evaluated(name, METRICS[name][1](labels, small, instances, x)), expected)

    logits = torch.from_numpy(np.random.default_rng(0).standard_normal((3, N, 6, 9)))
    if name == "AnchorSimilarity":  # it looks at the loss's errors, and samples as the loss does
        resized = literal.resize(logits.numpy(), (13, 17))
    else:
        resized = literal.resize_bilinear(logits.numpy(), (13, 17))
    resized = torch.from_numpy(literal.predicted_classes(resized))
    expected = evaluated(name, METRICS[name][1](labels, resized, instances, x))
    same(evaluated(name, METRICS[name][1](labels, logits, instances, x)), expected)
    same(evaluated(name, METRICS[name][1](labels, logits.float(), instances, x)), expected)


@every_metric
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_label_types_and_strides(name, dtype):
    labels, predictions, instances = maps(seed=6)
    labels[labels < 0], predictions = 255, predictions.remainder(N)
    x = embeddings()
    expected = evaluated(name, METRICS[name][1](labels, predictions, instances, x))

    def strided(t):
        return torch.stack((t, t), -1)[..., 0]

    typed = (strided(t.to(dtype)) for t in (labels.unsqueeze(1), predictions, instances))
    x = [strided(layer).to(memory_format=torch.channels_last) for layer in x]
    same(evaluated(name, METRICS[name][1](*typed, x)), expected, exact=name not in EMBEDDED)


@pytest.mark.parametrize("name", ["AlignmentUniformity", "AnchorSimilarity"])
def test_half_precision_is_computed_in_float32_under_autocast_too(name):
    labels, predictions, instances = maps()
    x = [layer.half() for layer in embeddings()]
    expected = evaluated(name, METRICS[name][1](labels, predictions, instances, [layer.float() for layer in x]))
    same(evaluated(name, METRICS[name][1](labels, predictions, instances, x)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        same(evaluated(name, METRICS[name][1](labels, predictions, instances, x)), expected)


@every_metric
def test_counts_made_in_inference_mode_are_added_to_outside_of_it(name):
    batch = arguments(name)
    metric = METRICS[name][0]()
    with torch.inference_mode():
        metric.update(*batch)
    for a in batch:
        for t in a if isinstance(a, list) else [a]:
            if t.is_floating_point():
                t.requires_grad_()
    metric.update(*batch)
    assert not any(value.requires_grad for value in metric.state_dict().values())
    same(metric.compute(), evaluated(name, batch, batch))


@every_metric
def test_an_update_never_waits_for_the_device(name):
    batch = arguments(name)
    metric = METRICS[name][0]()
    with Dispatched():
        metric.update(*batch)
        metric.update(*batch)
        metric.compute()


SLOW_TO_COMPILE = ("AnchorSimilarity", "BoundaryF1", "InstanceIoU")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_TO_COMPILE else name for name in METRICS]
)
def test_an_update_compiles_into_one_graph(name):
    torch._dynamo.reset()
    batch = arguments(name)
    metric = METRICS[name][0]()
    compiled = torch.compile(metric.update, fullgraph=True, backend="aot_eager")
    compiled(*batch)
    compiled(*batch)
    same(metric.compute(), evaluated(name, batch, batch), exact=name not in EMBEDDED)


def test_results_are_float64_scalars_and_vectors_under_names_that_do_not_clash():
    names = []
    for name in METRICS:
        results = evaluated(name, arguments(name))
        names += results
        for key, value in results.items():
            if key not in ("distance", "pixels"):
                assert value.dtype == torch.float64
            if name != "AnchorSimilarity":
                assert value.shape == ((N,) if key.endswith("per_class") else (3,) if key.endswith("category") else ())
    assert len(set(names)) == len(names)


@pytest.mark.gpu
@every_metric
def test_a_gpu_gives_the_same_without_waiting(name):
    batch = arguments(name)
    on_gpu = tuple([t.cuda() for t in a] if isinstance(a, list) else a.cuda() for a in batch)
    metric = METRICS[name][0]()
    metric.update(*on_gpu)  # the first compiles kernels and moves options
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    results = metric.compute()
    assert all(value.is_cuda for value in results.values())
    exact = name not in ("AlignmentUniformity", "AnchorSimilarity", "BoundaryF1")
    expected = evaluated(name, batch, batch)
    same({key: value.cpu() for key, value in results.items()}, expected, exact)
    again = evaluated(name, on_gpu, on_gpu)
    same(again, results)  # bit for bit


# ------------------------------------------------------------------------------------------------------------- ranks


def on_rank(rank, folder, ranks):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    outcome = {}
    for name in METRICS:
        metric = METRICS[name][0]()
        outcome[name, "nothing"] = metric.compute()
        if rank == 1:  # the other rank has seen nothing yet
            metric.update(*arguments(name, 1))
        outcome[name, "one"] = metric.compute()
        metric.update(*arguments(name, 2 + rank, B=1 + rank))
        outcome[name, "both"] = metric.compute()
        outcome[name, "state"] = metric.state_dict()
        alone = METRICS[name][0](group=None)
        alone.load_state_dict(metric.state_dict())
        outcome[name, "alone"] = alone.compute()
        given = METRICS[name][0](group=dist.group.WORLD)
        given.load_state_dict(metric.state_dict())
        outcome[name, "given"] = given.compute()
        only_first = dist.new_group([0])
        if rank == 0:
            subset = METRICS[name][0](group=only_first)
            subset.load_state_dict(metric.state_dict())
            outcome[name, "subset"] = subset.compute()
    maps = torch.zeros(1, 2, 2).long(), torch.zeros(1, 2, 2).long()
    features = torch.ones(1, 2 + rank, 2, 2), maps[1]
    for what, metric, batch in (
        ("classes", ConfusionMatrix(4 + rank), maps),
        ("radii", TrimapIoU(4, radii=(1, 2 + rank)), maps),
        ("kind", (ConfusionMatrix, BoundaryF1)[rank](4), maps),
        ("nothing seen", ConfusionMatrix(4, ignore_index=255 - rank), None if rank else maps),
        ("channels", AlignmentUniformity(4), features),
    ):
        if batch is not None:
            metric.update(*batch)
        try:
            metric.compute()
        except ValueError as error:
            outcome["disagreement", what] = str(error)
    torch.save(outcome, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_see_what_one_process_sees(tmp_path):
    torch.multiprocessing.spawn(on_rank, (str(tmp_path), 2), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name in METRICS:
        for when in ("nothing", "one", "both", "given"):
            same(first[name, when], second[name, when])
        one, other = (METRICS[name][0]() for _ in range(2))
        one.load_state_dict(first[name, "state"])
        other.load_state_dict(second[name, "state"])
        same(first[name, "alone"], one.compute())
        same(first[name, "subset"], one.compute())
        same(second[name, "alone"], other.compute())
        one.merge(other)
        same(first[name, "both"], one.compute())
        same(first[name, "given"], one.compute())
        if name == "AlignmentUniformity":
            for key in ("uniformity", "uniformity_1", "uniformity_3"):
                batches = arguments(name, 2, B=1), arguments(name, 1), arguments(name, 3, B=2)
                torch.testing.assert_close(first[name, "both"][key], evaluated(name, *batches)[key])
        else:
            same(first[name, "one"], evaluated(name, arguments(name, 1)), exact=name not in EMBEDDED)
            batches = arguments(name, 2, B=1), arguments(name, 1), arguments(name, 3, B=2)
            same(first[name, "both"], evaluated(name, *batches), exact=name not in (*EMBEDDED, "BoundaryF1"))
        same(first[name, "nothing"], evaluated(name))
    for what in ("classes", "radii", "kind", "nothing seen"):
        for said in (first["disagreement", what], second["disagreement", what]):
            assert ": expected the same metric and options on every rank, got others on the ranks [1]" in said
    said = first["disagreement", "channels"]
    assert said == second["disagreement", "channels"] and "expected the same channels and layers on every rank" in said


def test_ranks_draw_different_samples():
    drawn = []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "is_initialized", lambda: True)
            patch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
            quality = AlignmentUniformity(N, samples=8)
            quality.update(*arguments("AlignmentUniformity"))
        drawn.append(quality.state_dict()["priority"])
    assert not torch.equal(*drawn)
