"""Scores of boundaries equal numbers worked by hand, literal loops (``literal_metrics.py``) and OpenCV."""

import math

import literal_metrics as loops
import numpy as np
import pytest
import torch
from inputs import scene
from metric_cases import N, close, images, maps

from contextrast_kernels.metrics import (
    BoundaryF1,
    BoundaryIoU,
    TrimapIoU,
    boundary_mask,
)


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


def test_the_border_of_ignored_pixels_is_not_a_boundary():
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[:, :, 4] = 255
    assert not boundary_mask(labels, 3).any()
    labels[:, :, 5:] = 1
    assert not boundary_mask(labels, 3).any()
    labels[:, 6:, :4] = 1
    assert boundary_mask(labels, 0)[0].nonzero().tolist() == [[y, x] for y in (5, 6) for x in range(4)]


def test_without_a_boundary_the_mask_is_empty_whatever_the_radius():
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
    """The authors compute the band by padding with a pixel of zeros and eroding d times with a 3x3 kernel."""
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
