"""Calls with valid arguments, one of which a row of an error table replaces, and the form that every error has."""

import re

import pytest
import torch

import contextrast_kernels as ck

FEATURES = torch.randn(2, 3, 8, 8)
LABELS = torch.zeros(2, 16, 16, dtype=torch.int64)
LOGITS = torch.randn(2, 4, 16, 16)
CLASSES = torch.zeros(2, 8, 8, dtype=torch.int64)
SQUARED = torch.zeros(2, 8, 8, dtype=torch.int32)
ANCHORS = torch.randn(4, 3)
COUNTS = torch.ones(4, dtype=torch.int64)
PYRAMID = [torch.randn(2, 3, n, n) for n in (8, 4, 2, 1)]
ROWS = torch.randn(5, 3)
ROW_LABELS = torch.zeros(5, dtype=torch.int64)
VOLUME = torch.randn(2, 3, 4, 8, 8)
DEEP_LABELS = torch.zeros(2, 4, 16, 16, dtype=torch.int64)
DEEP_LOGITS = torch.randn(2, 4, 4, 16, 16)
META = "meta"


def loss(features=PYRAMID, labels=LABELS, predictions=LOGITS, **options):
    return ck.contextrast_loss(features, labels, predictions, **{"num_classes": 4, **options})


def module(**options):
    return ck.ContextrastLoss(**{"num_classes": 4, **options})


def criterion(features=PYRAMID, labels=LABELS, logits=LOGITS, **options):
    return ck.ContextrastCriterion(**{"num_classes": 4, **options})(features, labels, logits)


def anchors(features=FEATURES, labels=LABELS, num_classes=4, **options):
    return ck.class_anchors(features, labels, num_classes, **options)


def fuse(a=ANCHORS, n=COUNTS, top=ANCHORS, top_n=COUNTS, **options):
    return ck.fuse_anchors(a, n, top, top_n, **options)


def pixel(features=FEATURES, labels=LABELS, a=ANCHORS, **options):
    return ck.pixel_anchor_loss(features, labels, a, **options)


def errors(predictions=LOGITS, labels=LABELS, **options):
    return ck.error_map(predictions, labels, **options)


def bane(predictions=LOGITS, labels=LABELS, **options):
    return ck.bane_negatives(predictions, labels, **options)


def select(classes=CLASSES, squared=SQUARED, ratio=0.5, **options):
    return ck.select_nearest(classes, squared, ratio, **{"num_classes": 4, **options})


def nce(rows=ROWS, labels=ROW_LABELS, *columns, **options):
    return ck.info_nce(rows, labels, *columns, **options)


def confusion(predictions=LOGITS, labels=LABELS, **options):
    return ck.metrics.ConfusionMatrix(4).update(predictions, labels, **options)


def instances(values=LABELS, sizes=(None, 1.0, 2.0, 3.0), **options):
    return ck.metrics.InstanceIoU(4, sizes, **options).update(LOGITS, LABELS, values)


def anchor_similarity(features=PYRAMID, labels=LABELS, predictions=LOGITS, **options):
    return ck.metrics.AnchorSimilarity(4, **options).update(features, labels, predictions)


def after(metric, *batches):
    for batch in batches:
        metric.update(*batch)


def swapped(i, x):
    return [*PYRAMID[:i], x, *PYRAMID[i + 1 :]]


def assert_one_sentence(call, exception, argument, quoted):
    """The message starts with the argument's name, quotes what was passed, ends with a fix, and is one short line."""
    with pytest.raises(exception, match=f"^{argument}.*{quoted}") as caught:
        call()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert "expected" in sentence
    assert re.search(r"\. [A-Z]\w", sentence)  # the fix follows the problem
    assert sentence.endswith(".")
    assert len(sentence) < 300
