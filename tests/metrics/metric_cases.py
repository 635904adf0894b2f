"""Inputs for the tests of metrics, every metric with the arguments of an update, and comparisons of results."""

import numpy as np
import pytest
import torch
from inputs import pyramid, scene

from contextrast_kernels.metrics import (
    AlignmentUniformity,
    AnchorSimilarity,
    BoundaryF1,
    BoundaryIoU,
    ConfusionMatrix,
    InstanceIoU,
    TrimapIoU,
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
"""Metrics from matrix products in float32, whose rounding depends on strides, threads and tracing."""


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
