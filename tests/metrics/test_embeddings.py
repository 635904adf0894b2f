"""Scores of embeddings equal literal loops, and are NaN if an embedding is NaN or infinite."""

import math

import literal
import literal_metrics as loops
import numpy as np
import pytest
import torch
from metric_cases import N, close, embeddings, maps

from contextrast_kernels.metrics import (
    AlignmentUniformity,
    AnchorSimilarity,
)


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
    # Without the factor for pairs of a pixel with itself the mean would be off by 1/12, at least ten standard errors.
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
    assert quality.compute()["uniformity"].isnan()  # there is only one class


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_nan_or_infinite_embedding_gives_nan(broken):
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


def test_a_nan_cosine_gives_nan():
    labels, predictions, _ = maps()
    x = embeddings()
    x[0][:, :, 3] = math.nan
    similarity = AnchorSimilarity(N, 3)
    similarity.update(x, labels, predictions)
    assert similarity.compute()["true_class"][0, 0].isnan()
