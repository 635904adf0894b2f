"""Eq. 1 and the fusion: class anchors against loops and hand-worked numbers."""

import literal
import numpy as np
import pytest
import torch
from inputs import scene
from torch.autograd import gradcheck, gradgradcheck

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference")


def features_like(rng, B, D, h, w, dtype=torch.float64):
    return torch.from_numpy(rng.standard_normal((B, D, h, w))).to(dtype)


def assert_anchors(features, labels, num_classes, **options):
    anchors, counts = ck.class_anchors(features, labels, num_classes, **options)
    expected, expected_counts = literal.class_anchors(
        features.double().numpy(), labels.reshape(len(labels), *labels.shape[-2:]).numpy(), num_classes, **options
    )
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected_counts.tolist()
    assert anchors.shape == expected.shape
    # float64: a sum of at most a few hundred unit vectors, each rounded a few times.
    np.testing.assert_allclose(anchors.numpy(), expected, rtol=0, atol=1e-13 * max(1.0, abs(expected).max(initial=0)))


def test_hand_worked_anchors():
    """(3,4)/5 and (4,3)/5 average to (0.7, 0.7); (0,2)/2 is alone; the last pixel is ignored; class 2 has no pixel."""
    features = torch.tensor([[[[3.0, 4.0, 0.0, 9.0]], [[4.0, 3.0, 2.0, 9.0]]]], dtype=torch.float64)
    labels = torch.tensor([[[0, 0, 1, 255]]])
    anchors, counts = ck.class_anchors(features, labels, 3)
    assert counts.tolist() == [2, 1, 0]
    torch.testing.assert_close(anchors, torch.tensor([[0.7, 0.7], [0, 1], [0, 0]], dtype=torch.float64))
    plain, _ = ck.class_anchors(features, labels, 3, normalize=False)
    assert plain.tolist() == [[3.5, 3.5], [0, 2], [0, 0]]


def test_hand_worked_fusion():
    """0.3 a + 0.7 a_I where both exist; a where the top layer lacks the class; nothing where this layer lacks it."""
    anchors = torch.tensor([[1.0, 0.0], [2.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    top = torch.tensor([[0.0, 1.0], [0.0, 0.0], [5.0, 5.0], [0.0, 0.0]], dtype=torch.float64)
    counts, top_counts = torch.tensor([3, 1, 0, 0]), torch.tensor([1, 0, 2, 0])
    fused = ck.fuse_anchors(anchors, counts, top, top_counts)
    expected = torch.tensor([[0.3, 0.7], [2.0, 4.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(fused, expected)
    torch.testing.assert_close(
        ck.fuse_anchors(anchors, counts, top, top_counts, weight=0.25)[0], expected.new_tensor([0.75, 0.25])
    )
    assert ck.fuse_anchors(anchors, counts, top, top_counts, weight=0)[:2].tolist() == anchors[:2].tolist()
    assert ck.fuse_anchors(anchors, counts, top, top_counts, weight=1)[:2].tolist() == [[0, 1], [2, 4]]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [(17, 23), (5, 7), (9, 23), (1, 1), (34, 46), (20, 3)])
def test_anchors_equal_the_loops(rng, size, normalize):
    labels, _ = scene(rng, N=4)
    assert_anchors(features_like(rng, 2, 3, *size), labels, 4, normalize=normalize)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, 0, -1, -100, 100])
def test_every_label_dtype_and_ignore_index(rng, dtype, ignore_index):
    info = torch.iinfo(dtype)
    values = torch.from_numpy(rng.choice([0, 1, 2, 3, 4, 100, info.min, info.max], (2, 6, 7))).to(dtype)
    assert_anchors(features_like(rng, 2, 3, 4, 5), values, 4, ignore_index=ignore_index)
    assert_anchors(features_like(rng, 2, 3, 4, 5), values[:, None], 4, ignore_index=ignore_index)


def test_uint8_156_is_not_taken_for_ignore_index_minus_100(rng):
    """156 - 256 = -100: compared in uint8 the two would be equal, and class 156 would vanish."""
    labels = torch.full((1, 2, 2), 156, dtype=torch.uint8)
    _, counts = ck.class_anchors(features_like(rng, 1, 3, 2, 2), labels, 200, ignore_index=-100)
    assert counts[156] == 4


def test_int8_minus_1_is_not_taken_for_ignore_index_255(rng):
    labels = torch.tensor([[[-1, 0], [1, -1]]], dtype=torch.int8)
    assert_anchors(features_like(rng, 1, 3, 2, 2), labels, 2)


@pytest.mark.parametrize("label", [2**32, 2**32 + 1, -(2**32) + 1, 2**63 - 1, -(2**63), 2**16, 2**8 + 1])
def test_a_huge_label_is_ignored_not_wrapped(rng, label):
    labels = torch.full((1, 2, 2), label)
    labels[0, 0, 0] = 1
    _, counts = ck.class_anchors(features_like(rng, 1, 3, 2, 2), labels, 3)
    assert counts.tolist() == [0, 1, 0]


def test_layout_does_not_matter(rng):
    """channels_last, slices, transposes, expanded and flipped views give what a contiguous copy gives."""
    labels, _ = scene(rng)
    big = features_like(rng, 4, 6, 12, 14)
    views = [
        big.contiguous(memory_format=torch.channels_last)[:2],
        big[::2, 1::2, 2:10, ::3],
        big.transpose(2, 3)[1:3],
        big[:1, :3, :5, :7].expand(2, -1, -1, -1),
        big[:2, :, :1, :].expand(-1, -1, 6, -1),
        big[2:].permute(0, 2, 3, 1)[..., :4].permute(0, 3, 1, 2),
    ]
    maps = [labels, labels.mT.contiguous().mT, labels.repeat_interleave(2, 1)[:, ::2], labels[:1].expand(2, -1, -1)]
    for view in views:
        for label_map in maps:
            assert_anchors(view, label_map, 4)
            anchors, _ = ck.class_anchors(view, label_map, 4)
            torch.testing.assert_close(
                anchors, ck.class_anchors(view.contiguous(), label_map.contiguous(), 4)[0], rtol=0, atol=1e-14
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_sums_in_float32(rng, dtype):
    """2 000 pixels of one class: a half-precision sum would stall at 2048 (float16) or 256 (bfloat16)."""
    features = (features_like(rng, 5, 4, 20, 20) * 0.1 + 1).to(dtype)
    labels = torch.zeros(5, 20, 20, dtype=torch.int64)
    for normalize in (True, False):
        anchors, counts = ck.class_anchors(features, labels, 1, normalize=normalize)
        assert anchors.dtype == torch.float32
        assert counts.tolist() == [2000]
        expected, _ = ck.class_anchors(features.double(), labels, 1, normalize=normalize)
        # The inputs are exact in float32; 2 000 float32 additions of numbers near 1, in any order, stay below this.
        torch.testing.assert_close(anchors.double(), expected, rtol=2000 * 2.0**-24, atol=0)


def test_zero_and_tiny_vectors_have_a_zero_embedding_and_pass_no_gradient():
    """|x| <= 1e-12 gives v = 0: x / 1e-12 would have the derivative 1e12. Just above, v is a unit vector."""
    features = torch.zeros(1, 2, 1, 4, dtype=torch.float64)
    features[0, 0, 0] = torch.tensor([0.0, 0.9e-12, 1.1e-12, 2.0])
    features.requires_grad_()
    anchors, counts = ck.class_anchors(features, torch.tensor([[[0, 0, 1, 2]]]), 3)
    assert counts.tolist() == [2, 1, 1]
    torch.testing.assert_close(
        anchors.detach(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    )
    # d v_1 / d x_1 = 1/|x| across the direction of x: 0, 0, 1/1.1e-12, 1/2.
    (gradient,) = torch.autograd.grad(anchors[:, 1].sum(), features)
    assert gradient[0, :, 0, :2].abs().max() == 0
    torch.testing.assert_close(gradient[0, 1, 0, 2:], torch.tensor([1 / 1.1e-12, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_affects_only_its_class_and_nothing_when_ignored(rng, bad, normalize):
    features = features_like(rng, 1, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [1, 255]]])
    clean, _ = ck.class_anchors(features, labels, 2, normalize=normalize)
    dirty = features.clone()
    dirty[0, 1, 1, 1] = bad
    dirty.requires_grad_()
    ignored, _ = ck.class_anchors(dirty, labels, 2, normalize=normalize)
    assert torch.equal(ignored, clean)
    (gradient,) = torch.autograd.grad(ignored.sum(), dirty)
    assert gradient.isfinite().all()
    assert gradient[0, :, 1, 1].abs().max() == 0
    dirty = features.clone()
    dirty[0, 1, 0, 0] = bad
    poisoned, _ = ck.class_anchors(dirty, labels, 2, normalize=normalize)
    assert not poisoned[0].isfinite().all()
    assert torch.equal(poisoned[1], clean[1])


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 4, 4)])
def test_nothing_valid_gives_zero_rows_and_a_live_graph(shape):
    features = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    labels = torch.full((shape[0], 8, 8), 255)
    anchors, counts = ck.class_anchors(features, labels, 5)
    assert anchors.tolist() == [[0.0] * 3] * 5
    assert counts.tolist() == [0] * 5
    anchors.sum().backward()
    assert features.grad.shape == shape
    assert not features.grad.any()


@pytest.mark.parametrize("normalize", [True, False])
def test_anchors_are_twice_differentiable(rng, normalize):
    labels, _ = scene(rng, N=3, H=5, W=6)
    features = features_like(rng, 2, 3, 4, 3).requires_grad_()

    def anchors(x):
        return ck.class_anchors(x, labels, 3, normalize=normalize)[0]

    assert gradcheck(anchors, (features,))
    if normalize:  # without, the map is linear and has no second derivative to check
        assert gradgradcheck(anchors, (features,), fast_mode=True)


def test_fusion_is_differentiable_in_both(rng):
    anchors, top = (torch.from_numpy(rng.standard_normal((4, 3))).requires_grad_() for _ in range(2))
    counts, top_counts = torch.tensor([1, 2, 0, 0]), torch.tensor([1, 0, 2, 0])

    def fuse(a, b):
        return ck.fuse_anchors(a, counts, b, top_counts, 0.6)

    assert gradcheck(fuse, (anchors, top))
    jacobian, top_jacobian = torch.autograd.functional.jacobian(lambda a, b: fuse(a, b).sum(1), (anchors, top))
    assert jacobian.sum((1, 2)).tolist() == pytest.approx([3 * 0.4, 3, 0, 0])
    assert top_jacobian.sum((1, 2)).tolist() == pytest.approx([3 * 0.6, 0, 0, 0])


def test_fusion_ignores_rows_of_classes_without_pixels():
    """A caller's own anchors may hold anything, also NaN, in rows whose count is zero."""
    nan = float("nan")
    anchors = torch.tensor([[1.0, 2.0], [nan, nan]], requires_grad=True)
    top = torch.tensor([[nan, nan], [1.0, 1.0]], requires_grad=True)
    fused = ck.fuse_anchors(anchors, torch.tensor([1, 0]), top, torch.tensor([0, 1]))
    assert fused.tolist() == [[1, 2], [0, 0]]
    fused.sum().backward()
    assert anchors.grad.tolist() == [[1, 1], [0, 0]]
    assert top.grad.tolist() == [[0, 0], [0, 0]]


def test_inputs_are_not_modified(rng):
    labels, _ = scene(rng)
    features = features_like(rng, 2, 3, 5, 7)
    before = features.clone(), labels.clone()
    ck.class_anchors(features, labels, 4)
    assert torch.equal(features, before[0])
    assert torch.equal(labels, before[1])
