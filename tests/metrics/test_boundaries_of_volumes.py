"""Boundary metrics of volumes equal literal loops, and those of a volume of depth one equal those of the map."""

import literal_metrics as loops
import numpy as np
import pytest
import torch

from contextrast_kernels.metrics import BoundaryF1, BoundaryIoU, TrimapIoU
from contextrast_kernels.metrics.boundaries import boundary_mask

N = 3


@pytest.fixture
def scene(rng):
    """Labels and predictions (2, 6, 8, 7): cubes of two voxels, some ignored, some of no class."""
    coarse = rng.integers(0, N, (2, 2, 3, 4, 4))
    labels, predictions = coarse.repeat(2, 2).repeat(2, 3).repeat(2, 4)[..., :7]
    labels[rng.random(labels.shape) < 0.05] = 255
    predictions = np.where(rng.random(labels.shape) < 0.7, labels, predictions)
    predictions[rng.random(labels.shape) < 0.02] = N + 1
    return torch.from_numpy(labels), torch.from_numpy(predictions)


def per_class(metric, labels, predictions):
    metric.update(predictions, labels)
    [values] = [value for name, value in metric.compute().items() if name.endswith("_per_class")]
    return values


def check(got, expected):
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("radius", [0, 1.5, 3])
def test_trimap_iou_of_volumes_against_literal_loops(scene, radius):
    trimaps = [loops.trimap(volume, radius, N) for volume in scene[0].numpy()]
    check(per_class(TrimapIoU(N, (radius,)), *scene), loops.iou(*(t.numpy() for t in scene), N, trimaps))
    for mask, expected in zip(boundary_mask(scene[0], radius, num_classes=N), trimaps, strict=True):
        assert {tuple(voxel) for voxel in mask.nonzero().tolist()} == expected


@pytest.mark.parametrize("width", [1, 2, 9])
def test_boundary_iou_of_volumes_against_literal_erosion(scene, width):
    check(per_class(BoundaryIoU(N, (width,)), *scene), loops.boundary_iou(*(t.numpy() for t in scene), N, width))


@pytest.mark.parametrize("radius", [0, 1.5, None])
def test_boundary_f1_of_volumes_against_literal_loops(scene, radius):
    check(per_class(BoundaryF1(N, radius), *scene), loops.boundary_f1(*(t.numpy() for t in scene), N, radius))


def test_shares_of_the_diagonal_span_all_three_sides():
    """The volume has 160 voxels along z and few along y and x, so the share exceeds a voxel only if z counts."""
    labels = torch.zeros(1, 160, 3, 4, dtype=torch.uint8)
    labels[:, 80:] = 1
    shifted = torch.cat((labels[:, :1], labels[:, :-1]), 1)
    check(per_class(BoundaryF1(2), shifted, labels), [1, 1])  # 0.75 % of 160 are 1.2 voxels
    expected = loops.boundary_iou(labels.numpy(), shifted.numpy(), 2, 2)  # 1.26 % of 160 are 2.02 voxels
    check(per_class(BoundaryIoU(2, (0.0126,)), labels, shifted), expected)


@pytest.mark.parametrize("make", [lambda: TrimapIoU(N, (1,)), lambda: BoundaryIoU(N, (2, 0.1)), lambda: BoundaryF1(N)])
def test_a_volume_of_depth_one_scores_as_the_map(scene, make):
    labels, predictions = (t[:, 2] for t in scene)
    logits = torch.nn.functional.one_hot(predictions.clamp(max=N - 1), N).movedim(-1, 1).double()
    of_map, of_volume = make(), make()
    of_map.update(logits, labels)
    of_volume.update(logits[:, :, None], labels[:, None])
    for name, value in of_map.compute().items():
        torch.testing.assert_close(of_volume.compute()[name], value, rtol=0, atol=0, equal_nan=True)
