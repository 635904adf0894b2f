"""The total loss against loops, hand-worked numbers and central differences."""

import math

import literal
import numpy as np
import pytest
import torch
from inputs import leaves, logits_of, pyramid, scene
from torch.autograd import gradcheck, gradgradcheck

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference")

# float64: means of softplus terms of size <= 2/tau over a few hundred pixels.
TIGHT = {"rel": 1e-12, "abs": 1e-13}


def case(rng, **options):
    """Four layers, four classes, labels of odd size. No layer's size divides that of the labels."""
    labels, predictions = scene(rng, **options)
    return pyramid(rng, B=len(labels)), labels, predictions


def literal_loss(features, labels, predictions, **options):
    return literal.contextrast_loss(
        [x.detach().double().numpy() for x in features], labels.numpy(), predictions.numpy(), **options
    )


def run(features, *args, **kwargs):
    """Loss and gradients, detached."""
    features = leaves(features)
    loss = ck.contextrast_loss(features, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, features)


OPTIONS = {
    "defaults": {},
    "semi-hard": {"negatives": "semi-hard"},
    "full-resolution distance": {"distance_at": "full"},
    "base 0.3 beside BANE": {"base_rate": 0.3},
    "base 1 beside BANE": {"base_rate": 1},
    "CCL, all pixels": {"negatives": "none", "base_rate": 1.0},
    "CCL, a sample": {"negatives": "none", "base_rate": 0.3},
    "ratio 0 with base": {"ratio": 0, "base_rate": 0.3},
    "ratio 1": {"ratio": 1.0},
    "ratio 0.07": {"ratio": 0.07, "base_rate": 0.01},
    "not normalised": {"normalize": False, "temperature": 0.7},
    "normalised anchors": {"normalize_anchors": True},
    "normalised anchors of plain features": {"normalize_anchors": True, "normalize": False, "temperature": 0.7},
    "no fusion": {"fusion_weight": 0.0},
    "only the last layer's anchors": {"fusion_weight": 1.0},
    "other weights": {"layer_weights": (0.1, 0.0, 2.0, 1.0), "fusion_weight": 0.3, "temperature": 0.25},
    "another seed": {"seed": -(2**40) - 7, "base_rate": 0.5},
    "everything": {
        "negatives": "semi-hard",
        "ratio": 0.3,
        "base_rate": 0.2,
        "distance_at": "full",
        "normalize_anchors": True,
        "seed": 3,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_equals_the_loops(rng, options):
    for size in ((17, 23), (9, 12)):
        features, labels, _ = case(rng)
        _, predictions = scene(rng, H=size[0], W=size[1])
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, **options)
        expected = literal_loss(features, labels, predictions, num_classes=4, **options)
        assert (loss.shape, loss.dtype) == ((), torch.float64)
        assert expected > 0.01
        assert loss.item() == pytest.approx(expected, **TIGHT)


@pytest.mark.parametrize("name", ["defaults", "semi-hard", "full-resolution distance", "base 0.3 beside BANE"])
def test_maps_of_the_native_library_give_the_same_loss_bitwise(rng, name):
    if ck.available()["native"] != "ok":
        pytest.skip(f"backend native: {ck.available()['native']}")
    features, labels, predictions = case(rng)
    expected = run(features, labels, predictions, num_classes=4, **OPTIONS[name])
    with ck.backend("native"):
        loss, gradients = run(features, labels, predictions, num_classes=4, **OPTIONS[name])
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected[1], strict=True))


def test_base_pixels_are_those_whose_hash_is_below_the_rate_to_the_last_bit(rng):
    """h / 2^32 is exact in float64: at this rate the pixel with hash h is not yet drawn, at (h + 1) / 2^32 it is."""
    labels, predictions = scene(rng, ignored=0)
    features = pyramid(rng, sizes=((9, 12),))
    options = {"num_classes": 4, "negatives": "none", "layer_weights": (1.0,)}
    h = sorted(literal.hash32(0, 1, p) for p in range(108))[30]
    losses = []
    for rate in (h / 2**32, (h + 1) / 2**32):
        losses.append(ck.contextrast_loss(features, labels, predictions, base_rate=rate, **options).item())
        expected = literal_loss(features, labels, predictions, base_rate=rate, **options)
        assert losses[-1] == pytest.approx(expected, **TIGHT)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_a_class_may_be_missing_from_any_layer(rng):
    """Class 3 is one pixel that only the first layer samples; class 2 is nowhere; the top layer lacks class 1."""
    features = pyramid(rng, B=1)
    labels, predictions = torch.zeros(1, 9, 12, dtype=torch.int64), torch.full((1, 9, 12), 1)
    labels[0, 2, 3] = 3
    labels[0, 4:7, 4:6] = 1
    predictions[0, :4] = 3
    predictions[0, 8] = 2
    counts = [ck.class_anchors(x, labels, 4)[1].tolist() for x in features]
    assert counts[0][3] == 1
    assert [c[3] for c in counts[1:]] == [0, 0, 0]
    assert [c[2] for c in counts] == [0, 0, 0, 0]
    assert counts[3][1] == 0
    assert counts[1][1] > 0
    for options in ({}, {"normalize_anchors": True}, {"base_rate": 1.0}):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, **options)
        assert loss.item() == pytest.approx(
            literal_loss(features, labels, predictions, num_classes=4, **options), **TIGHT
        )


def test_hand_worked_total_of_two_layers():
    """D = 1, not normalised, tau = 1, one image. Layer 1 is 1x2 with v = 1, 2; layer 2 is 1x1 with v = 4.

    Labels 0, 1; prediction 1, 1. Layer 1: a^0 = 1, a^1 = 2; the top layer samples label column 0, so a_I^0 = 4 and
    class 1 is missing there: fused anchors 0.3 + 0.7 * 4 = 3.1 and 2. Pixel 0 is the error, a negative of class 1: Z_1
    = 2 * 1 against s_11 = 2 * 2, so softplus(-2); class 0 has no negative and adds 0. L_1 = softplus(-2) / 2. Layer 2
    has class 0 only, whose one pixel is predicted 1: no negative of class 0, L_2 = 0.
    """
    features = [torch.tensor([[[[1.0, 2.0]]]], dtype=torch.float64), torch.tensor([[[[4.0]]]], dtype=torch.float64)]
    labels, predictions = torch.tensor([[[0, 1]]]), torch.tensor([[[1, 1]]])
    options = {"num_classes": 2, "layer_weights": (0.5, 9.0), "temperature": 1.0, "normalize": False}
    loss = ck.contextrast_loss(features, labels, predictions, **options)
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.exp(-2)) / 2)
    # Every other-class pixel: class 0 also has Z_0 = 3.1 * 2 against s_00 = 3.1.
    loss = ck.contextrast_loss(features, labels, predictions, negatives="none", base_rate=1, **options)
    expected = 0.5 * (math.log1p(math.exp(-2)) + math.log1p(math.exp(3.1))) / 2
    assert loss.item() == pytest.approx(expected)


# ------------------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize_anchors": True, "base_rate": 0.4}], ids=["defaults", "all terms"])
def test_gradient_equals_central_differences_of_the_loops(rng, detach, options):
    """The gradient passes through positives, negatives, anchors and the last layer's share in all anchors. Detached
    anchors are constants."""
    labels, predictions = scene(rng, B=1, N=3, H=5, W=6, wrong=0.4)
    features = pyramid(rng, B=1, D=2, sizes=((3, 4), (2, 2)))
    options = {"num_classes": 3, "layer_weights": (1.0, 0.7), "temperature": 0.5, **options}
    _, gradients = run(features, labels, predictions, detach_anchors=detach, **options)
    arrays = [x.numpy() for x in features]
    fixed = None
    if detach:
        fixed = literal.layer_anchors(
            arrays, labels.numpy(), 3, normalize_anchors=options.get("normalize_anchors", False)
        )
    for values, gradient in zip(arrays, gradients, strict=True):
        for at in np.ndindex(values.shape):
            kept, sides = values[at], []
            for step in (1e-5, -1e-5):
                values[at] = kept + step
                sides.append(
                    literal.contextrast_loss(arrays, labels.numpy(), predictions.numpy(), anchors=fixed, **options)
                )
            values[at] = kept
            assert gradient[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-8)
    assert gradients[0].any()
    assert gradients[1].any() or detach


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_is_twice_differentiable(rng, options):
    labels, predictions = scene(rng, B=1, N=3, H=5, W=6, wrong=0.4)
    features = leaves(pyramid(rng, B=1, D=2, sizes=((3, 4), (2, 2))))
    options = {"temperature": 0.5, **options, "layer_weights": (1.0, 0.7)}

    def loss(*x):
        return ck.contextrast_loss(x, labels, predictions, num_classes=3, **options)

    assert gradcheck(loss, features, fast_mode=True)
    assert gradgradcheck(loss, features, fast_mode=True)


def test_the_last_layer_learns_from_all_layers_unless_detached(rng):
    """With weight on the first layer only, the last layer's features enter through a_I alone."""
    features, labels, predictions = case(rng)
    options = {"num_classes": 4, "layer_weights": (1.0, 0.0, 0.0, 0.0)}
    value, gradients = run(features, labels, predictions, **options)
    assert [g.any().item() for g in gradients] == [True, False, False, True]
    detached, gradients = run(features, labels, predictions, detach_anchors=True, **options)
    assert torch.equal(value, detached)
    assert [g.any().item() for g in gradients] == [True, False, False, False]


def test_predictions_get_no_gradient(rng):
    features, labels, predictions = case(rng)
    logits = logits_of(predictions, 4, rng).requires_grad_()
    features = leaves(features)
    ck.contextrast_loss(features, labels, logits, num_classes=4).backward()
    assert logits.grad is None
    assert all(x.grad.any() for x in features)


# --------------------------------------------------------------------------------------------------------- what goes in
