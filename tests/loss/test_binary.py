"""Binary networks: logits of one channel with two classes, and one class alone, which is refused."""

import literal
import numpy as np
import pytest
import torch
from inputs import pyramid, scene
from torch.nn.functional import binary_cross_entropy_with_logits

import contextrast_kernels as ck

SIZES = ((8, 10), (4, 5), (2, 3), (1, 2))


def batch(seed=0, dtype=torch.float32):
    """Features, labels with void, and one logit a pixel at half the labels' size."""
    rng = np.random.default_rng(seed)
    labels, _ = scene(rng, B=2, N=2, H=16, W=20, ignored=0.05)
    z = torch.from_numpy(rng.standard_normal((2, 1, 8, 10))).to(dtype)
    return pyramid(rng, B=2, D=6, sizes=SIZES, dtype=dtype), labels, z


def class_map(z):
    return (z[:, 0] > 0).long()


def two_channels(z):
    """Logits whose softmax gives the probability sigmoid(z) to class 1."""
    return torch.cat([torch.zeros_like(z), z], 1)


LOSSES = {
    "contextrast_loss": lambda x, y, p: ck.contextrast_loss(x, y, p, num_classes=2),
    "contextrast_loss, full": lambda x, y, p: ck.contextrast_loss(x, y, p, num_classes=2, distance_at="full"),
    "contextrast_loss, sampler": lambda x, y, p: ck.contextrast_loss(
        x, y, p, num_classes=2, base_sampler=ck.Sampler("hard-easy", 40, 10, 1)
    ),
    "ContextrastLoss": lambda x, y, p: ck.ContextrastLoss(2, debug=True)(x, y, p),
    "PixelContrastLoss": lambda x, y, p: ck.PixelContrastLoss(2, max_samples=64, max_views=8, min_pixels=1)(x, y, p),
    "PixelContrastLoss, bane": lambda x, y, p: ck.PixelContrastLoss(
        2, sampler="bane", max_samples=64, max_views=8, min_pixels=1
    )(x, y, p),
    "MultiScaleContrastLoss": lambda x, y, p: ck.MultiScaleContrastLoss(2, sampler="hard-easy", max_samples=64)(
        x, y, p
    ),
    "RegionContrastLoss": lambda x, y, p: [
        (loss := ck.RegionContrastLoss(2, ck.MemoryBank(2, 6, regions=9), regions="predictions"))(x, y, p),
        loss(x, y, p),
    ][1],
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_take_one_logit_a_pixel_as_its_class(name):
    x, y, z = batch()
    expected = LOSSES[name](x, y, class_map(z))
    assert expected > 0
    assert LOSSES[name](x, y, z) == expected


def test_pne_weights_by_the_probability_of_the_predicted_class():
    x, y, z = batch()
    loss = LOSSES["MultiScaleContrastLoss"]
    assert loss(x, y, z) == loss(x, y, two_channels(z))
    pne = [ck.PNELoss(2, set_size=8, max_hard=10**6)(x, y, p) for p in (z, two_channels(z), class_map(z))]
    assert pne[0] == pne[1] != pne[2]


def test_the_maps_take_one_logit_a_pixel(map_backend):
    _, y, z = batch()
    expected = literal.error_map(class_map(z).numpy(), y.numpy(), 2)
    assert ck.error_map(z, y, num_classes=2).tolist() == expected.tolist()
    for at in ("layer", "full"):
        expected = literal.bane_negatives(class_map(z).numpy(), y.numpy(), 2, size=(4, 5), distance_at=at)
        assert ck.bane_negatives(z, y, num_classes=2, size=(4, 5), distance_at=at).tolist() == expected.tolist()


def test_a_logit_of_zero_is_class_zero(map_backend):
    labels = torch.ones(1, 1, 3, dtype=torch.int64)
    logits = torch.tensor([[[[0.0, -0.0, 1e-30]]]])
    assert ck.error_map(logits, labels, num_classes=2).tolist() == [[[0, 0, -1]]]


METRICS = {
    "ConfusionMatrix": lambda: ck.metrics.ConfusionMatrix(2),
    "TrimapIoU": lambda: ck.metrics.TrimapIoU(2, (1, 2)),
    "BoundaryIoU": lambda: ck.metrics.BoundaryIoU(2, (1, 2)),
    "BoundaryF1": lambda: ck.metrics.BoundaryF1(2, 1.5),
    "InstanceIoU": lambda: ck.metrics.InstanceIoU(2, [None, 20.0]),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_resize_binary_logits_before_taking_the_sign(name):
    _, y, z = batch()
    resized = literal.resize_bilinear(z.numpy().astype(np.float64), (16, 20))
    of_maps, of_logits = METRICS[name](), METRICS[name]()
    instances = [torch.ones_like(y)] if name == "InstanceIoU" else []
    of_maps.update(torch.from_numpy(resized[:, 0] > 0).long(), y, *instances)
    of_logits.update(z, y, *instances)
    for key, value in of_maps.compute().items():
        torch.testing.assert_close(of_logits.compute()[key], value, rtol=0, atol=0, equal_nan=True)
    if name == "ConfusionMatrix":
        valid = y != 255
        p, t = resized[:, 0] > 0, y.numpy() == 1
        both, either = (p & t)[valid].sum(), (p | t)[valid].sum()
        assert of_logits.compute()["iou_per_class"][1].item() == both / either


def test_anchor_similarity_takes_one_logit_a_pixel():
    x, y, z = batch()
    results = []
    for p in (z, class_map(z)):
        metric = ck.metrics.AnchorSimilarity(2, bins=3)
        metric.update(x, y, p)
        results.append(metric.compute())
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, rtol=0, atol=0, equal_nan=True)


def test_a_figure_takes_one_logit_a_pixel():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _, y, z = batch()
    image = torch.rand(3, 16, 20)
    drawn = []
    for p in (z[0], class_map(z)[0]):
        figure = ck.viz.negatives(image, y[0], p, num_classes=2, sizes=[(8, 10)])
        drawn.append([np.asarray(artist.get_array()) for axis in figure.axes for artist in axis.get_images()])
    for got, expected in zip(*drawn, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("class_weights", [None, [0.5, 3.0]])
def test_the_criterion_is_binary_cross_entropy(class_weights):
    """BCE over the valid pixels, class 1 weighted against class 0, and the contrast of the resized logits' signs."""
    x, y, z = batch(dtype=torch.float64)
    z.requires_grad_()
    criterion = ck.ContextrastCriterion(2, weight=0.1, class_weights=class_weights)
    objective = criterion(x, y, z)
    full = torch.nn.functional.interpolate(z, (16, 20), mode="bilinear", align_corners=False)[:, 0]
    valid = y != 255
    of_class = torch.tensor(class_weights or [1.0, 1.0], dtype=torch.float64)[y.clamp(max=1)]
    bce = binary_cross_entropy_with_logits(full, y.double(), of_class, reduction="none")
    expected = bce[valid].sum() / of_class[valid].sum()
    torch.testing.assert_close(criterion.last["cross_entropy"], expected)
    contrast = ck.contextrast_loss(x, y, (full > 0).long(), num_classes=2)
    torch.testing.assert_close(criterion.last["contrast"], contrast)
    torch.testing.assert_close(torch.autograd.grad(objective, z)[0], torch.autograd.grad(expected, z)[0])


def test_the_criterion_compiles_and_takes_half_precision():
    x, y, z = batch()
    x, criterion = x[:1], ck.ContextrastCriterion(2, layer_weights=(1.0,), negatives="semi-hard")
    expected = criterion.eval()(x, y, z.half().float())
    assert criterion(x, y, z.half()) == expected
    with ck.backend("reference"):
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, y, z.half()), expected)


# ------------------------------------------------------------------------------------------------------------ refused

ONE = torch.zeros(1, 8, 8, dtype=torch.int64)
REFUSED = {
    "contextrast_loss": lambda: ck.contextrast_loss([torch.randn(1, 4, 8, 8)], ONE, ONE, num_classes=1),
    "ContextrastLoss": lambda: ck.ContextrastLoss(1),
    "ContextrastCriterion": lambda: ck.ContextrastCriterion(1),
    "PixelContrastLoss": lambda: ck.PixelContrastLoss(1),
    "MultiScaleContrastLoss": lambda: ck.MultiScaleContrastLoss(1),
    "PNELoss": lambda: ck.PNELoss(1),
    "RegionContrastLoss": lambda: ck.RegionContrastLoss(1, ck.MemoryBank(2, 4)),
    "Sampler": lambda: ck.Sampler("bane", 8, 8)(ONE, ONE, 1, 0),
    "error_map": lambda: ck.error_map(ONE, ONE, num_classes=1),
    "bane_negatives": lambda: ck.bane_negatives(ONE, ONE, num_classes=1),
    "viz.negatives": lambda: ck.viz.negatives(torch.rand(3, 8, 8), ONE[0], ONE[0], num_classes=1, sizes=[(8, 8)]),
    "viz.anchor_similarity": lambda: ck.viz.anchor_similarity([torch.randn(1, 4, 8, 8)], ONE, num_classes=1),
    "ConfusionMatrix": lambda: ck.metrics.ConfusionMatrix(1),
    "TrimapIoU": lambda: ck.metrics.TrimapIoU(1),
    "BoundaryIoU": lambda: ck.metrics.BoundaryIoU(1),
    "BoundaryF1": lambda: ck.metrics.BoundaryF1(1),
    "InstanceIoU": lambda: ck.metrics.InstanceIoU(1, [None]),
    "AlignmentUniformity": lambda: ck.metrics.AlignmentUniformity(1),
    "AnchorSimilarity": lambda: ck.metrics.AnchorSimilarity(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_one_class_raises_an_error_with_the_fix(name):
    with pytest.raises(ValueError, match=r"num_classes: expected at least 2, got 1.*num_classes=2"):
        REFUSED[name]()


def test_one_logit_without_two_classes_raises_an_error_with_the_fix():
    logits = torch.randn(1, 1, 8, 8)
    for call in (
        lambda: ck.error_map(logits, ONE),
        lambda: ck.bane_negatives(logits, ONE),
        lambda: ck.error_map(logits, ONE, num_classes=3),
        lambda: ck.ContextrastCriterion(3, layer_weights=(1.0,))([torch.randn(1, 4, 8, 8)], ONE, logits),
        lambda: ck.metrics.ConfusionMatrix(3).update(logits, ONE),
    ):
        with pytest.raises(ValueError, match=r"channels.*got float32 of shape \(1, 1, 8, 8\).*num_classes=2"):
            call()
