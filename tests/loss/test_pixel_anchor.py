"""Eqs. 3-4: the pixel-anchor loss against loops, hand-worked numbers and central differences."""

import math

import literal
import numpy as np
import pytest
import torch
from inputs import leaves, scene
from torch.autograd import gradcheck, gradgradcheck

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference")

# float64: sums of a few hundred terms of size <= 1/tau.
TIGHT = {"rel": 1e-12, "abs": 1e-13}


def case(rng, B=2, D=3, N=4, h=5, w=6, H=11, W=13, dtype=torch.float64):
    labels, _ = scene(rng, B=B, N=N, H=H, W=W)
    features = torch.from_numpy(rng.standard_normal((B, D, h, w))).to(dtype)
    anchors = torch.from_numpy(rng.standard_normal((N, D)) * 0.5).to(dtype)
    negatives = torch.from_numpy(rng.integers(-1, N, (B, h, w)))
    base = torch.from_numpy(rng.random((B, h, w)) < 0.4)
    return features, labels, anchors, negatives, base


def literal_loss(features, labels, anchors, negatives=None, base=None, **options):
    numpy = [
        None if x is None else x.detach().double().numpy() if x.is_floating_point() else x.numpy()
        for x in (features, labels, anchors, negatives, base)
    ]
    numpy[1] = numpy[1].reshape(len(numpy[1]), *numpy[1].shape[-2:])
    return literal.pixel_anchor_loss(*numpy, **options)


def softplus(z):
    return math.log1p(math.exp(z))


def test_hand_worked_loss_with_every_other_pixel_as_negative():
    """Pixels v = 1 (class 0) and v = -1 (class 1), anchors 1 and -1, tau = 1: s_00 = s_11 = 1, s_01 = s_10 = -1.

    Class 0 has the one negative Z = -1, so softplus(-1 - 1); class 1 likewise; their mean is log(1 + e^-2).
    """
    features = torch.tensor([[[[1.0, -1.0]]]], dtype=torch.float64)
    labels = torch.tensor([[[0, 1]]])
    anchors = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    assert ck.pixel_anchor_loss(features, labels, anchors, temperature=1.0).item() == pytest.approx(
        math.log(1 + math.exp(-2))
    )
    assert ck.pixel_anchor_loss(features, labels, anchors, temperature=0.5).item() == pytest.approx(
        math.log(1 + math.exp(-4))
    )
    assert ck.pixel_anchor_loss(features, labels, anchors).item() == pytest.approx(softplus(-20), rel=1e-12)


def test_hand_worked_loss_counts_pixels_inside_classes_and_classes_equally():
    """D = 1, tau = 1, not normalised. Class 0: pixels 2 and 1, anchor 1, so s = 2, 1. Class 1: pixel 3, anchor -1, s =
    -3.

    Negatives given: the pixel of value 3 (label 1) for class 0, so Z_0 = 3. Class 1 has none and adds 0, but is
    counted. L = 1/2 [ (softplus(3 - 2) + softplus(3 - 1)) / 2 + 0 ].
    """
    features = torch.tensor([[[[2.0, 1.0, 3.0]]]], dtype=torch.float64)
    labels = torch.tensor([[[0, 0, 1]]])
    anchors = torch.tensor([[1.0], [-1.0], [100.0]], dtype=torch.float64)
    negatives = torch.tensor([[[-1, -1, 0]]])
    loss = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, temperature=1.0, normalize=False)
    assert loss.item() == pytest.approx((softplus(1) + softplus(2)) / 4)
    # The same pixel drawn as base pixel too counts once; a base pixel is never a negative of its own class.
    base = torch.tensor([[[False, False, True]]])
    both = ck.pixel_anchor_loss(
        features, labels, anchors, negatives=negatives, base=base, temperature=1.0, normalize=False
    )
    assert both.item() == pytest.approx(loss.item())
    # Every pixel as base: class 1 gets Z_1 = log(e^-2 + e^-1) against s = -3, class 0 keeps Z_0 = 3.
    everything = ck.pixel_anchor_loss(
        features, labels, anchors, base=torch.ones_like(base), temperature=1.0, normalize=False
    )
    z1 = math.log(math.exp(-2) + math.exp(-1))
    assert everything.item() == pytest.approx(((softplus(1) + softplus(2)) / 2 + softplus(z1 + 3)) / 2)


@pytest.mark.parametrize("given", ["neither", "negatives", "base", "both"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("size", [(5, 6), (11, 13), (1, 1), (22, 5)])
def test_loss_equals_the_loops(rng, given, normalize, size):
    features, labels, anchors, negatives, base = case(rng, h=size[0], w=size[1])
    options = {
        "negatives": negatives if given in ("negatives", "both") else None,
        "base": base if given in ("base", "both") else None,
        "normalize": normalize,
        "temperature": 0.2,
    }
    loss = ck.pixel_anchor_loss(features, labels, anchors, **options)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(literal_loss(features, labels, anchors, **options), **TIGHT)


def test_gradient_equals_central_differences_of_the_loops(rng):
    """Every coordinate of features and anchors, through the literal loops: step 1e-5, truncation error ~ 1e-10 /
    tau^3.
    """
    features, labels, anchors, negatives, base = case(rng, B=1, h=2, w=3, N=3)
    features, anchors = leaves([features, anchors])
    ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, base=base, temperature=0.5).backward()
    for x in (features, anchors):
        values = x.detach()
        flat = values.view(-1)
        numeric = torch.empty_like(flat)
        for i in range(len(flat)):
            kept = flat[i].item()
            sides = []
            for step in (1e-5, -1e-5):
                flat[i] = kept + step
                sides.append(literal_loss(features, labels, anchors, negatives, base, temperature=0.5))
            flat[i] = kept
            numeric[i] = (sides[0] - sides[1]) / 2e-5
        torch.testing.assert_close(x.grad.view(-1), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("given", ["neither", "negatives", "both"])
def test_loss_is_twice_differentiable(rng, normalize, given):
    features, labels, anchors, negatives, base = case(rng, h=3, w=3)
    features, anchors = leaves([features, anchors])

    def loss(x, a):
        return ck.pixel_anchor_loss(
            x,
            labels,
            a,
            negatives=negatives if given != "neither" else None,
            base=base if given == "both" else None,
            temperature=0.5,
            normalize=normalize,
        )

    assert gradcheck(loss, (features, anchors))
    assert gradgradcheck(loss, (features, anchors), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_label_and_negatives_dtype(rng, dtype):
    features, labels, anchors, negatives, base = case(rng)
    expected = literal_loss(features, labels, anchors, negatives, base)
    ignore_index = -1 if dtype == torch.int8 else 255
    labels = labels.to(dtype)  # 255 becomes -1 in int8
    signed = negatives.to(torch.int64 if dtype == torch.uint8 else dtype)
    for label_map in (labels, labels[:, None]):
        loss = ck.pixel_anchor_loss(
            features, label_map, anchors, negatives=signed, base=base, ignore_index=ignore_index
        )
        assert loss.item() == pytest.approx(expected, **TIGHT)


def test_uint8_negatives_mean_classes_and_255_means_none(rng):
    """uint8 has no -1. A value outside the classes, here 255, makes a pixel a negative of none."""
    features, labels, anchors, negatives, _ = case(rng)
    expected = literal_loss(features, labels, anchors, negatives)
    loss = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives.to(torch.uint8))
    assert loss.item() == pytest.approx(expected, **TIGHT)


@pytest.mark.parametrize("wild", [4, 255, 2**31, 2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_values_outside_the_classes_change_nothing(rng, wild):
    features, labels, anchors, negatives, base = case(rng)
    expected = literal_loss(features, labels, anchors, negatives, base)
    labels = torch.where(labels == 255, wild, labels)
    negatives = torch.where(negatives < 0, wild, negatives)
    loss = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, base=base)
    assert loss.item() == pytest.approx(expected, **TIGHT)


def test_an_ignored_pixel_has_no_effect_even_as_a_negative(rng):
    """Its features, NaN included, change neither value nor gradient, though negatives and base both name it."""
    features, labels, anchors, negatives, base = case(rng, h=11, w=13)
    ignored = (labels == 255).unsqueeze(1).expand_as(features)
    negatives, base = torch.where(labels == 255, 1, negatives), base | (labels == 255)
    results = []
    for value in (0.0, 5.0, float("nan"), float("inf"), 1e300):
        (x,), (a,) = leaves([torch.where(ignored, value, features)]), leaves([anchors])
        loss = ck.pixel_anchor_loss(x, labels, a, negatives=negatives, base=base)
        loss.backward()
        assert not x.grad[ignored].any()
        results.append((loss.item(), x.grad, a.grad))
    for value, gradient, anchor_gradient in results[1:]:
        assert value == results[0][0]
        assert torch.equal(gradient, results[0][1])
        assert torch.equal(anchor_gradient, results[0][2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("given", ["neither", "no negatives", "one class"])
def test_nan_or_inf_at_a_valid_pixel_is_never_hidden(rng, bad, normalize, given):
    """Also where no class has a negative, so that every term would be softplus(-inf) = 0."""
    features, labels, anchors, negatives, _ = case(rng, h=11, w=13)
    negatives = None if given == "neither" else torch.full_like(negatives, -1)
    if given == "one class":
        labels, negatives = torch.zeros_like(labels), None
    b, r, c = (labels < 4).nonzero()[17].tolist()
    features[b, 1, r, c] = bad
    assert ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, normalize=normalize).isnan()
    features[b, :, r, c] = bad
    assert ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, normalize=normalize).isnan()


@pytest.mark.parametrize("normalize", [True, False])
def test_opposite_infinities_and_zero_anchors_hide_nothing(rng, normalize):
    features, labels, anchors, _, _ = case(rng, h=11, w=13)
    b, r, c = (labels < 4).nonzero()[3].tolist()
    features[b, 0, r, c] = float("inf")
    assert ck.pixel_anchor_loss(features, labels, torch.zeros_like(anchors), normalize=normalize).isnan()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (0, 3, 4, 5), (1, 3, 1, 1)])
def test_nothing_valid_gives_zero_and_a_live_graph(rng, shape):
    features = torch.from_numpy(rng.standard_normal(shape)).requires_grad_()
    anchors = torch.ones(4, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.full((shape[0], 8, 8), 255)
    for negatives in (None, torch.zeros(shape[0], *shape[2:], dtype=torch.int64)):
        loss = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives)
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, (features, anchors))
        assert [g.shape for g in gradients] == [features.shape, anchors.shape]
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 1, 1)])
def test_no_negatives_gives_zero_and_zero_gradients(rng, shape):
    """One class only, or maps that name no class: every term is softplus(-inf) = 0."""
    features = torch.from_numpy(rng.standard_normal(shape)).requires_grad_()
    anchors = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    B, _, h, w = shape
    one_class = torch.ones(B, h, w, dtype=torch.int64)
    nobody = torch.full((B, h, w), -1)
    nowhere = torch.zeros(B, h, w, dtype=torch.bool)
    for options in ({}, {"negatives": nobody}, {"base": nowhere}, {"negatives": nobody, "base": nowhere}):
        loss = ck.pixel_anchor_loss(features, one_class, anchors, **options)
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, (features, anchors))
        assert not any(g.any() for g in gradients)


def test_zero_vectors_are_pixels_without_direction(rng):
    """s = 0 for them; they count in |P^n| and as negatives (e^0), and their gradient is zero."""
    features, labels, anchors, negatives, base = case(rng)
    features[:, :, 1] = 0
    features[:, :, 2] *= 1e-13
    (x,) = leaves([features])
    loss = ck.pixel_anchor_loss(x, labels, anchors, negatives=negatives, base=base)
    assert loss.item() == pytest.approx(literal_loss(features, labels, anchors, negatives, base), **TIGHT)
    loss.backward()
    assert not x.grad[:, :, 1:3].any()
    assert x.grad.any()


def test_rows_of_absent_classes_do_not_matter(rng):
    features, labels, anchors, negatives, base = case(rng)
    anchors = torch.cat((anchors, anchors.new_full((1, 3), 7.0)))
    expected = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, base=base)
    for value in (0.0, -1e30, float("nan")):
        anchors[4] = value
        (a,) = leaves([anchors])
        loss = ck.pixel_anchor_loss(features, labels, a, negatives=negatives, base=base)
        assert torch.equal(loss, expected)
        loss.backward()
        assert not a.grad[4].any()
        assert a.grad[:4].isfinite().all()


def test_large_similarities_neither_overflow_nor_vanish(rng):
    """s up to ±1000/0.01: softplus(z) is z for large z and 0 for very negative z, in float32 too."""
    features, labels, anchors, negatives, base = case(rng, dtype=torch.float32)
    for scale in (1e3, 1e-3):
        x, a = leaves([features * scale, anchors * scale])
        loss = ck.pixel_anchor_loss(x, labels, a, negatives=negatives, base=base, normalize=False, temperature=0.01)
        expected = literal_loss(
            features * scale, labels, anchors * scale, negatives, base, normalize=False, temperature=0.01
        )
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        assert x.grad.isfinite().all()
        assert a.grad.isfinite().all()


def test_layout_does_not_matter(rng):
    features, labels, anchors, negatives, base = case(rng, B=4, D=6, h=12, w=14)
    views = [
        features.contiguous(memory_format=torch.channels_last),
        features.repeat_interleave(2, 1)[:, ::2],
        features.mT.contiguous().mT,
        features[:1].expand(4, -1, -1, -1),
        features[:, :, :1, :].expand(-1, -1, 12, -1),
        features.flip(3).flip(3),
    ]
    for view in views:
        arguments = [labels.mT.contiguous().mT, anchors.mT.contiguous().mT]
        masks = {"negatives": negatives.repeat_interleave(3, 2)[..., ::3], "base": base.mT.contiguous().mT}
        masks["negatives"] = negatives.repeat_interleave(3, 2)[:, :, ::3]
        (x,), (y,) = leaves([view]), leaves([view.contiguous()])
        loss = ck.pixel_anchor_loss(x, *arguments, **masks)
        plain = ck.pixel_anchor_loss(y, labels, anchors, negatives=negatives, base=base)
        torch.testing.assert_close(loss, plain, rtol=1e-13, atol=0)
        loss.backward()
        plain.backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
def test_half_precision_is_as_good_as_its_inputs(rng, dtype, normalize):
    """The loss is float32 and right to float32 rounding of the exact half inputs; gradients are correctly rounded to
    their dtype.

    Loss: similarities up to 1/tau = 10 (normalised), each off by a few 2^-24 relative, so about 1e-6 absolute: 5e-6 is
    allowed. Gradient: half a unit in the last place of the dtype, its smallest subnormal, and 2e-5 of the largest for
    float32 arithmetic.
    """
    features, labels, anchors, negatives, base = case(rng, D=16, h=11, w=13, dtype=dtype)
    x, a = leaves([features, anchors])
    loss = ck.pixel_anchor_loss(x, labels, a, negatives=negatives, base=base, normalize=normalize, temperature=0.2)
    loss.backward()
    assert loss.dtype == torch.float32
    assert (x.grad.dtype, a.grad.dtype) == (dtype, dtype)
    X, A = leaves([features.double(), anchors.double()])
    exact = ck.pixel_anchor_loss(X, labels, A, negatives=negatives, base=base, normalize=normalize, temperature=0.2)
    exact.backward()
    size = max(1.0, exact.item())
    assert abs(loss.item() - exact.item()) <= 5e-6 * size
    info = torch.finfo(dtype)
    for got, want in ((x.grad.double(), X.grad), (a.grad.double(), A.grad)):
        bound = info.eps / 2 * want.abs() + info.smallest_normal * info.eps + 2e-5 * want.abs().max()
        assert ((got - want).abs() <= bound).all()
        assert torch.cosine_similarity(got.flatten(), want.flatten(), dim=0) >= 1 - max(1e-6, info.eps**2)


def test_float32_anchors_with_half_features_give_the_same_loss(rng):
    """class_anchors returns float32 for half features; both together are the normal call."""
    features, labels, _, negatives, _ = case(rng, dtype=torch.float16)
    (x,) = leaves([features])
    anchors, _ = ck.class_anchors(x, labels, 4)
    loss = ck.pixel_anchor_loss(x, labels, anchors, negatives=negatives)
    expected = literal_loss(features, labels, anchors, negatives)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert x.grad.dtype == torch.float16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_of_the_features_does_not_matter_when_normalised(rng, dtype):
    """Powers of two near 1e-4 and 1e4 are exact in every dtype; the loss is too, but for the rounding of the norm."""
    features, labels, anchors, negatives, base = case(rng, dtype=dtype)
    plain = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, base=base)
    for exponent in (-13, 13):
        scaled = ck.pixel_anchor_loss(features * 2.0**exponent, labels, anchors, negatives=negatives, base=base)
        assert scaled.item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_1e15_do_not_overflow(rng, dtype):
    features, labels, anchors, negatives, base = case(rng, D=256, dtype=dtype)
    (x,) = leaves([features.sign() * 1e15])
    loss = ck.pixel_anchor_loss(x, labels, anchors, negatives=negatives, base=base)
    expected = ck.pixel_anchor_loss(features.sign(), labels, anchors, negatives=negatives, base=base)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(rng, autocast_dtype):
    features, labels, anchors, negatives, base = case(rng, D=16, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        x, a = leaves([features, anchors])
        with torch.autocast("cpu", autocast_dtype, enabled=enabled):
            own, _ = ck.class_anchors(x, labels, 4)
            loss = ck.pixel_anchor_loss(x, labels, own + a, negatives=negatives, base=base)
        loss.backward()
        results.append((loss.detach(), own.detach(), x.grad, a.grad))
    for plain, under_autocast in zip(*results, strict=True):
        assert plain.dtype == under_autocast.dtype
        assert torch.equal(plain, under_autocast)


def test_two_runs_are_bitwise_equal(rng):
    features, labels, anchors, negatives, base = case(rng, D=16, h=40, w=50, dtype=torch.float32)
    runs = []
    for _ in range(2):
        x, a = leaves([features, anchors])
        loss = ck.pixel_anchor_loss(x, labels, a, negatives=negatives, base=base)
        loss.backward()
        runs.append((loss.detach(), x.grad, a.grad))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_only_requested_gradients_are_computed(rng):
    features, labels, anchors, _, _ = case(rng)
    (a,) = leaves([anchors])
    loss = ck.pixel_anchor_loss(features, labels, a)
    loss.backward()
    assert a.grad.any()
    (x,) = leaves([features])
    ck.pixel_anchor_loss(x, labels, anchors).backward()
    assert x.grad.any()
    assert not ck.pixel_anchor_loss(features, labels, anchors).requires_grad


def test_inputs_are_not_modified(rng):
    inputs = case(rng)
    before = [x.clone() for x in inputs]
    features, labels, anchors, negatives, base = inputs
    ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, base=base)
    assert all(torch.equal(x, kept) for x, kept in zip(inputs, before, strict=True))


def test_loss_does_not_depend_on_the_order_of_images_pixels_or_classes(rng):
    features, labels, anchors, negatives, base = case(rng, h=11, w=13)
    loss = ck.pixel_anchor_loss(features, labels, anchors, negatives=negatives, base=base)
    order = [1, 0]
    shuffled = ck.pixel_anchor_loss(
        features[order], labels[order], anchors, negatives=negatives[order], base=base[order]
    )
    flipped = ck.pixel_anchor_loss(features.mT, labels.mT, anchors, negatives=negatives.mT, base=base.mT)
    new = torch.tensor(np.random.default_rng(1).permutation(4))
    table = torch.full((256,), 255).index_copy(0, torch.arange(4), new)
    renamed = ck.pixel_anchor_loss(
        features,
        table[labels],
        anchors.new_empty(anchors.shape).index_copy(0, new, anchors),
        negatives=torch.where(negatives >= 0, table[negatives.clamp(min=0)], -1),
        base=base,
    )
    for other in (shuffled, flipped, renamed):
        torch.testing.assert_close(other, loss, rtol=1e-13, atol=0)
