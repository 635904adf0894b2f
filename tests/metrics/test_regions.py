"""Scores of regions equal numbers worked by hand, literal loops (``literal_metrics.py``) and torchmetrics."""

import math

import literal_metrics as loops
import pytest
import torch
from metric_cases import CATEGORIES, INSTANCE_SIZES, N, close, images, maps

from contextrast_kernels import metrics
from contextrast_kernels.metrics import (
    ConfusionMatrix,
    InstanceIoU,
)


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


def test_instance_iou_worked_by_hand():
    labels = torch.tensor([[[1, 1, 1, 1, 0, 0, 1]]])
    instances = torch.tensor([[[1000, 1000, 1000, 1001, 7, 7, 24]]])  # the last pixel is of a crowd
    predictions = torch.tensor([[[1, 0, 0, 1, 1, 0, 0]]])
    scores = InstanceIoU(2, (None, 6.0), first_instance=1000)
    scores.update(predictions, labels, instances)
    # Each of the 3 pixels of the first instance weighs 2: one hit, two misses. The other's pixel weighs 6: a hit. There
    # is one false positive.
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


def test_one_id_in_several_classes_and_images_means_several_instances():
    labels, predictions, instances = maps()
    instances[:] = 1
    scores = InstanceIoU(N, INSTANCE_SIZES)
    scores.update(predictions, labels, instances)
    expected = loops.instance_iou(*images(labels, predictions, instances), INSTANCE_SIZES, 1)
    close(scores.compute()["iiou_per_class"], expected, 1e-8)


def test_the_constants_of_cityscapes_fit_its_classes():
    scores = InstanceIoU(
        19, metrics.CITYSCAPES_INSTANCE_SIZES, categories=metrics.CITYSCAPES_CATEGORIES, first_instance=1000
    )
    labels = torch.arange(19).view(1, 1, 19)
    scores.update(labels, labels, labels * 1000)
    results = scores.compute()
    assert results["iiou_per_class"].isnan().tolist() == [True] * 11 + [False] * 8
    assert results["iiou_per_category"].isnan().tolist() == [True] * 5 + [False] * 2  # human, vehicle
    assert results["iiou"] == results["category_iiou"] == 1


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
