"""Mean IoU and the trimap, against hand numbers and literal loops."""

import math

import pytest
import torch

from contextrast_kernels.metrics import ConfusionMatrix, boundary_mask


def test_iou_of_a_map_worked_by_hand():
    labels = torch.tensor([[[0, 0, 1, 1], [0, 2, 1, 255]]])
    predictions = torch.tensor([[[0, 1, 1, 1], [0, 1, 0, 2]]])
    matrix = ConfusionMatrix(4)
    matrix.update(predictions, labels)
    # 0: 2 hits, 3 labelled, 3 predicted. 1: 2 hits, 3 and 4. 2: no hit, 1 and 0, as void does not count. 3: absent.
    assert matrix.counts.tolist() == [[2, 1, 0, 0, 0], [1, 2, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert matrix.iou()[:3].tolist() == [2 / 4, 2 / 5, 0.0]
    assert math.isnan(matrix.iou()[3])
    assert matrix.mean_iou().item() == pytest.approx((2 / 4 + 2 / 5 + 0) / 3, abs=1e-15)


def test_batches_add_up_and_a_mask_restricts():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (4, 7, 9), generator=generator)
    predictions = torch.randint(-2, 8, (4, 7, 9), generator=generator)
    mask = torch.rand(4, 7, 9, generator=generator) < 0.4
    labels[0, :3] = 255
    labels[1, 0] = -100  # outside 0..N-1: ignored as well

    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(predictions, labels, mask=mask)
    for b in range(4):
        parts.update(predictions[b : b + 1], labels[b : b + 1], mask=mask[b : b + 1])
    assert torch.equal(whole.counts, parts.counts)

    for n in range(5):
        hits = misses = false_alarms = 0
        for y, p, m in zip(labels.flatten().tolist(), predictions.flatten().tolist(), mask.flatten().tolist()):
            if m and 0 <= y < 5:
                hits += y == p == n
                misses += y == n != p
                false_alarms += p == n != y
        assert whole.iou()[n].item() == hits / (hits + misses + false_alarms)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_label_types(dtype):
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([[[0, 1, 1]]], dtype=dtype), torch.tensor([[[0, 0, 255]]], dtype=dtype))
    assert matrix.counts.tolist() == [[1, 1, 0], [0, 0, 0]]


def test_nothing_valid_is_nan_not_zero():
    matrix = ConfusionMatrix(3)
    assert math.isnan(matrix.mean_iou())
    matrix.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.full((1, 2, 2), 255))
    matrix.update(torch.zeros(0, 2, 2, dtype=torch.long), torch.zeros(0, 2, 2, dtype=torch.long))
    assert math.isnan(matrix.mean_iou())


def test_wrong_arguments_are_named():
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"predictions: expected shape \(1, 4, 4\)"):
        matrix.update(torch.zeros(1, 2, 2, dtype=torch.long), labels)
    with pytest.raises(TypeError, match="predictions: expected an integer map"):
        matrix.update(torch.zeros(1, 4, 4), labels)
    with pytest.raises(ValueError, match=r"mask: expected bool of shape \(1, 4, 4\), got int64"):
        matrix.update(labels, labels, mask=labels)
    with pytest.raises(ValueError, match="num_classes"):
        ConfusionMatrix(0)
    with pytest.raises(ValueError, match="radius"):
        boundary_mask(labels, -1)


def literal_boundary_mask(labels: list[list[int]], radius: float) -> list[list[bool]]:
    H, W = len(labels), len(labels[0])
    pixels = [(y, x) for y in range(H) for x in range(W) if labels[y][x] != 255]
    boundary = []
    for y, x in pixels:
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if (v, u) in pixels and labels[v][u] != labels[y][x]:
                boundary.append((y, x))
    near = [[False] * W for _ in range(H)]
    for y, x in pixels:
        near[y][x] = any((y - v) ** 2 + (x - u) ** 2 <= radius**2 for v, u in boundary)
    return near


@pytest.mark.parametrize("radius", [0, 1, 1.5, 3, 100])
def test_boundary_mask_against_literal_loops(radius):
    generator = torch.Generator().manual_seed(7)
    for H, W in ((1, 1), (1, 9), (9, 1), (11, 8)):
        coarse = torch.randint(0, 4, (3, -(-H // 3), -(-W // 3)), generator=generator)
        labels = coarse.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :H, :W].clone()
        labels[labels == 3] = 255
        expected = [literal_boundary_mask(image, radius) for image in labels.tolist()]
        assert boundary_mask(labels, radius).tolist() == expected


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
    assert boundary_mask(torch.zeros(0, 5, 5, dtype=torch.long), 3).shape == (0, 5, 5)
