"""The total loss on every kind of input of a training run: types, layouts, degenerate batches, NaN and large values."""

import inspect

import literal
import pytest
import torch
from inputs import leaves, logits_of, pyramid, scene
from test_contextrast import TIGHT, case, literal_loss, run

import contextrast_kernels as ck

TAKE_IGNORE_INDEX = (
    *("class_anchors", "pixel_anchor_loss", "contextrast_loss", "error_map", "bane_negatives", "ContextrastLoss"),
    *("PixelContrastLoss", "MultiScaleContrastLoss", "RegionContrastLoss", "PNELoss"),
)

pytestmark = pytest.mark.usefixtures("reference")


def test_class_map_equals_logits_bitwise(rng):
    features, labels, predictions = case(rng)
    expected = run(features, labels, predictions, num_classes=4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        loss, gradients = run(features, labels, logits_of(predictions, 4, rng).to(dtype), num_classes=4)
        assert torch.equal(loss, expected[0])
        assert all(torch.equal(g, e) for g, e in zip(gradients, expected[1], strict=True))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_label_dtype_and_rank(rng, dtype):
    features, labels, predictions = case(rng)
    expected = ck.contextrast_loss(features, labels, predictions, num_classes=4, base_rate=0.2)
    ignore_index = -1 if dtype == torch.int8 else 255  # 255 becomes -1 in int8
    for y in (labels.to(dtype), labels.to(dtype)[:, None]):
        loss = ck.contextrast_loss(
            features, y, predictions.to(dtype), num_classes=4, base_rate=0.2, ignore_index=ignore_index
        )
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_ignore_minus_100_with_class_156(rng, dtype):
    """N = 200 and labels 156: in uint8, -100 would wrap to 156 and ignore everything."""
    features, labels, predictions = case(rng)
    far = torch.where(labels == 255, 255, labels + 153)
    options = {"num_classes": 200, "ignore_index": -100}
    loss = ck.contextrast_loss(features, far.to(dtype), (predictions + 153).to(dtype), **options)
    assert loss.item() == pytest.approx(
        ck.contextrast_loss(features, labels, predictions, num_classes=4).item(), rel=1e-13
    )


@pytest.mark.parametrize("wild", [4, 5, 254, -1, -100, 2**31, 2**32 + 1, 2**63 - 1, -(2**63)])
def test_labels_outside_the_classes_count_as_ignored(rng, wild):
    features, labels, predictions = case(rng)
    expected = run(features, labels, predictions, num_classes=4, base_rate=0.2)
    loss, gradients = run(features, torch.where(labels == 255, wild, labels), predictions, num_classes=4, base_rate=0.2)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(g, e) for g, e in zip(gradients, expected[1], strict=True))


@pytest.mark.parametrize("wild", [4, 255, -1, 2**32 + 1, -(2**63)])
def test_predictions_outside_the_classes_are_not_errors(rng, wild):
    features, labels, predictions = case(rng)
    predictions = torch.where(predictions == 3, wild, predictions)
    loss = ck.contextrast_loss(features, labels, predictions, num_classes=4)
    assert loss.item() == pytest.approx(literal_loss(features, labels, predictions, num_classes=4), **TIGHT)


def test_layout_does_not_matter(rng):
    features, labels, predictions = case(rng)
    logits = logits_of(predictions, 4, rng)
    expected, expected_gradients = run(features, labels, logits, num_classes=4)
    layouts = [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.mT.contiguous().mT,
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch.nn.functional.pad(x, (1, 2, 3, 4))[:, :, 3:-4, 1:-2],
    ]
    for layout in layouts:
        loss, gradients = run([layout(x) for x in features], labels.mT.contiguous().mT, layout(logits), num_classes=4)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        for gradient, want in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, want, rtol=0, atol=1e-14)


def test_expanded_features_and_labels_equal_copies(rng):
    features, labels, predictions = case(rng)
    expanded = [x[:1].expand(3, -1, -1, -1) for x in features]
    maps = [x[:1].expand(3, -1, -1) for x in (labels, predictions)]
    copies = [x.contiguous() for x in expanded]
    loss, gradients = run(copies, *(y.contiguous() for y in maps), num_classes=4)
    assert ck.contextrast_loss(expanded, *maps, num_classes=4).item() == pytest.approx(loss.item(), rel=1e-13)
    (x,) = leaves([features[0][:1]])
    ck.contextrast_loss([x.expand(3, -1, -1, -1), *expanded[1:]], *maps, num_classes=4).backward()
    torch.testing.assert_close(x.grad, gradients[0].sum(0, keepdim=True), rtol=1e-12, atol=1e-14)


def test_features_may_be_a_tuple_of_any_number_of_layers(rng):
    features, labels, predictions = case(rng)
    for layers in (1, 2, 3):
        chosen = tuple(features[:layers])
        weights = (1.0, 0.7, 0.4)[:layers]
        loss = ck.contextrast_loss(chosen, labels, predictions, num_classes=4, layer_weights=list(weights))
        expected = literal_loss(chosen, labels, predictions, num_classes=4, layer_weights=weights)
        assert loss.item() == pytest.approx(expected, **TIGHT)


def test_layers_of_equal_size_equal_the_loops(rng):
    """DeepLab's dilated stages share a stride; their base pixels still come from different streams."""
    labels, predictions = scene(rng)
    features = pyramid(rng, sizes=((9, 12), (5, 6), (5, 6), (5, 6)))
    loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, base_rate=0.3)
    assert loss.item() == pytest.approx(
        literal_loss(features, labels, predictions, num_classes=4, base_rate=0.3), **TIGHT
    )


def test_seed_as_int_equals_seed_as_tensor(rng):
    features, labels, predictions = case(rng)
    values = set()
    for seed in (0, 1, -1, 2**40 + 5, 2**63 - 1, -(2**63)):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, base_rate=0.3, seed=seed)
        for tensor in (torch.tensor(seed), torch.tensor([seed])):
            assert torch.equal(
                ck.contextrast_loss(features, labels, predictions, num_classes=4, base_rate=0.3, seed=tensor), loss
            )
        values.add(loss.item())
    assert len(values) == 6


def test_loss_does_not_depend_on_batch_order_or_class_names(rng):
    features, labels, predictions = case(rng, B=3)
    loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, base_rate=0.3)
    order = [2, 0, 1]
    shuffled = ck.contextrast_loss(
        [x[order] for x in features], labels[order], predictions[order], num_classes=4, base_rate=0.3
    )
    table = torch.full((256,), 255).index_copy(0, torch.arange(4), torch.tensor([2, 3, 1, 0]))
    renamed = ck.contextrast_loss(features, table[labels], table[predictions], num_classes=4, base_rate=0.3)
    for other in (shuffled, renamed):
        torch.testing.assert_close(other, loss, rtol=1e-13, atol=0)


def test_unused_classes_do_not_matter(rng):
    features, labels, predictions = case(rng)
    loss = ck.contextrast_loss(features, labels, predictions, num_classes=4)
    assert ck.contextrast_loss(features, labels, predictions, num_classes=150).item() == pytest.approx(
        loss.item(), rel=1e-13
    )


def test_inputs_are_not_modified(rng):
    features, labels, predictions = case(rng)
    before = [x.clone() for x in (*features, labels, predictions)]
    ck.contextrast_loss(features, labels, predictions, num_classes=4)
    assert all(torch.equal(x, kept) for x, kept in zip((*features, labels, predictions), before, strict=True))


# ----------------------------------------------------------------------------------------------------- degenerate input


def assert_zero_with_live_graph(features, *args, **kwargs):
    loss, gradients = run(features, *args, **kwargs)
    assert loss.item() == 0
    assert [g.shape for g in gradients] == [x.shape for x in features]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize(
    "options", [{}, {"negatives": "none", "base_rate": 1}, {"normalize_anchors": True}, {"distance_at": "full"}]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_degenerate_batches_give_zero_and_a_live_graph(rng, options, dtype):
    features, labels, predictions = case(rng)
    features = [x.to(dtype) for x in features]
    options = {"num_classes": 4, **options}
    assert_zero_with_live_graph(features, torch.full_like(labels, 255), predictions, **options)
    assert_zero_with_live_graph(features, torch.full_like(labels, -7), torch.full_like(predictions, -7), **options)
    assert_zero_with_live_graph(
        features, torch.ones_like(labels), predictions.clamp(max=0), **options
    )  # one class, all wrong
    assert_zero_with_live_graph(
        features, torch.ones_like(labels), torch.ones_like(labels), **options
    )  # one class, all right
    assert_zero_with_live_graph([x[:0] for x in features], labels[:0], predictions[:0], **options)
    assert_zero_with_live_graph([x[:, :, :0] for x in features], labels, predictions, **options)
    assert_zero_with_live_graph(
        [x[:1, :, :1, :1] for x in features], labels[:1, :1, :1], predictions[:1, :1, :1], **options
    )
    if "base_rate" not in options:
        assert_zero_with_live_graph(features, labels, torch.where(labels == 255, 0, labels), **options)  # no error


def test_all_pixels_wrong_equals_the_loops(rng):
    features, labels, _ = case(rng, ignored=0.0)
    predictions = (labels + 1) % 4
    for options in ({}, {"distance_at": "full"}, {"ratio": 1.0}):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, **options)
        assert loss.item() == pytest.approx(
            literal_loss(features, labels, predictions, num_classes=4, **options), **TIGHT
        )
        assert loss > 0


def test_a_collapsed_prediction_equals_the_loops(rng):
    """One predicted class everywhere, and one image whose error fills it: no edge at all there."""
    features, labels, predictions = case(rng, ignored=0.0)
    labels[0] = 1
    predictions = torch.zeros_like(predictions)
    for distance_at in ("layer", "full"):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, distance_at=distance_at)
        expected = literal_loss(features, labels, predictions, num_classes=4, distance_at=distance_at)
        assert loss.item() == pytest.approx(expected, **TIGHT)


def test_layers_of_one_pixel_equal_the_loops(rng):
    features, labels, predictions = pyramid(rng, B=3, sizes=((1, 1),) * 4), *scene(rng, B=3, ignored=0)
    for options in ({}, {"negatives": "none", "base_rate": 1.0}):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, **options)
        assert loss.item() == pytest.approx(
            literal_loss(features, labels, predictions, num_classes=4, **options), **TIGHT
        )


def test_zero_vectors_equal_the_loops(rng):
    features, labels, predictions = case(rng)
    for x in features:
        x[:, :, 0] = 0
    features[3][:] = 0  # a top layer without direction: its anchors are zero, its classes are present
    for options in ({}, {"normalize_anchors": True}):
        loss, gradients = run(features, labels, predictions, num_classes=4, **options)
        assert loss.item() == pytest.approx(
            literal_loss(features, labels, predictions, num_classes=4, **options), **TIGHT
        )
        assert all(g.isfinite().all() for g in gradients)
        assert not gradients[3].any()
        assert not any(g[:, :, 0].any() for g in gradients)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_nan_or_inf_at_a_valid_pixel_is_never_hidden(rng, bad, layer, normalize):
    """This holds also without any error, where no class has a negative, and in half precision."""
    for dtype in (torch.float16, torch.float32):
        features, labels, predictions = case(rng, ignored=0)
        features = [x.to(dtype) for x in features]
        features[layer][1, 2, 1, 1] = bad
        for given in (predictions, labels):
            for detach in (False, True):
                loss = ck.contextrast_loss(
                    features, labels, given, num_classes=4, normalize=normalize, temperature=1.0, detach_anchors=detach
                )
                assert loss.isnan()


@pytest.mark.parametrize("options", [{}, {"base_rate": 1.0, "normalize": False}, {"normalize_anchors": True}])
def test_an_ignored_pixel_has_no_effect_on_value_or_gradient(rng, options):
    features, labels, predictions = case(rng, B=2)
    labels[1, :, 11:] = 255
    results = []
    for value in (0.0, 1.0, float("nan"), float("inf"), -1e300):
        changed = [x.clone() for x in features]
        masks = []
        for x in changed:
            h, w = x.shape[-2:]
            y = torch.from_numpy(literal.resize(labels.numpy(), (h, w)))
            masks.append((y == 255).unsqueeze(1).expand_as(x))
            assert masks[-1].any()
            x[masks[-1]] = value
        results.append(run(changed, labels, predictions, num_classes=4, **options))
        assert not any(g[mask].any() for g, mask in zip(results[-1][1], masks, strict=True))
    for loss, gradients in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(g, e) for g, e in zip(gradients, results[0][1], strict=True))
    assert results[0][0] > 0


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{}, {"base_rate": 0.3, "normalize_anchors": True}, {"normalize": False, "temperature": 1.0}]
)
def test_precision_of_float32_and_half(rng, dtype, options):
    """Against float64 on the same inputs. Loss: float32 arithmetic on similarities up to 1/tau leaves about 1e-6; 5e-6
    is allowed.

    Gradient: half a unit in the last place of its dtype and the smallest subnormal, and 5e-5 of the largest for
    float32 arithmetic (exp of differences up to 2/tau, each off by a few 2^-24 relative to 1/tau).
    """
    features, labels, predictions = case(rng)
    features = [x.to(dtype) for x in pyramid(rng, D=32)]
    loss, gradients = run(features, labels, predictions, num_classes=4, **options)
    exact, exact_gradients = run([x.double() for x in features], labels, predictions, num_classes=4, **options)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= 5e-6 * max(1.0, exact.item())
    info = torch.finfo(dtype)
    for got, want in zip(gradients, exact_gradients, strict=True):
        assert got.dtype == dtype
        bound = info.eps / 2 * want.abs() + info.smallest_normal * info.eps + 5e-5 * want.abs().max()
        assert ((got.double() - want).abs() <= bound).all()
        assert torch.cosine_similarity(got.double().flatten(), want.flatten(), dim=0) >= 1 - max(1e-6, info.eps**2)


@pytest.mark.parametrize("exponent", [-13, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_scale_of_the_features_does_not_matter(rng, exponent, dtype):
    """2^-13 and 2^13 are about 1e-4 and 1e4, and exact; the gradient scales inversely."""
    features, labels, predictions = case(rng)
    features = [x.to(dtype) for x in features]
    plain, gradients = run(features, labels, predictions, num_classes=4)
    scaled, scaled_gradients = run([x * 2.0**exponent for x in features], labels, predictions, num_classes=4)
    assert scaled.item() == pytest.approx(plain.item(), rel=2e-6)
    for gradient, scaled_gradient in zip(gradients, scaled_gradients, strict=True):
        difference = scaled_gradient.double() * 2.0**exponent - gradient.double()
        assert difference.abs().max() <= 2 * torch.finfo(dtype).eps * gradient.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_of_1e15_do_not_overflow(rng, dtype):
    _, labels, predictions = case(rng)
    features = [(x.sign() * 1e15).to(dtype) for x in pyramid(rng, D=256)]
    loss, gradients = run(features, labels, predictions, num_classes=4)
    ones, _ = run([x.sign() for x in features], labels, predictions, num_classes=4)
    assert loss.item() == pytest.approx(ones.item(), rel=1e-5)
    assert all(g.isfinite().all() for g in gradients)


def test_large_float16_features_do_not_overflow(rng):
    """65504 squared is far beyond float16: norms and products are accumulated in float32."""
    _, labels, predictions = case(rng)
    features = [(x.sign() * 65504).to(torch.float16) for x in pyramid(rng, D=64)]
    loss, gradients = run(features, labels, predictions, num_classes=4)
    ones, _ = run([x.sign() for x in features], labels, predictions, num_classes=4)
    assert loss.item() == pytest.approx(ones.item(), rel=1e-5)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_autocast_changes_nothing(rng, autocast_dtype, dtype):
    features, labels, predictions = case(rng)
    features = [x.to(dtype) for x in features]
    logits = logits_of(predictions, 4, rng)
    plain, gradients = run(features, labels, logits, num_classes=4)
    features = leaves(features)
    with torch.autocast("cpu", autocast_dtype):
        loss = ck.contextrast_loss(features, labels, logits, num_classes=4)
    assert loss.dtype == plain.dtype
    assert torch.equal(loss, plain)
    assert all(torch.equal(g, e) for g, e in zip(torch.autograd.grad(loss, features), gradients, strict=True))


def test_the_default_dtype_changes_nothing(rng):
    features, labels, predictions = case(rng)
    expected = [
        run([x.to(dtype) for x in features], labels, predictions, num_classes=4, base_rate=0.3)
        for dtype in (torch.float32, torch.float64)
    ]
    torch.set_default_dtype(torch.float64)
    try:
        again = [
            run([x.to(dtype) for x in features], labels, predictions, num_classes=4, base_rate=0.3)
            for dtype in (torch.float32, torch.float64)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    for (loss, gradients), (want, want_gradients) in zip(again, expected, strict=True):
        assert loss.dtype == want.dtype
        assert torch.equal(loss, want)
        assert all(torch.equal(g, e) for g, e in zip(gradients, want_gradients, strict=True))


def test_two_runs_are_bitwise_equal_also_with_poisoned_memory(rng):
    """Deterministic mode fills uninitialised memory with NaN, so a value that is never written shows."""
    labels, predictions = scene(rng, H=64, W=96)
    features = pyramid(rng, D=16, sizes=((32, 48), (16, 24), (8, 12), (4, 6)), dtype=torch.float32)
    first = run(features, labels, predictions, num_classes=4, base_rate=0.1)
    second = run(features, labels, predictions, num_classes=4, base_rate=0.1)
    torch.use_deterministic_algorithms(True)
    try:
        poisoned = run(features, labels, predictions, num_classes=4, base_rate=0.1)
    finally:
        torch.use_deterministic_algorithms(False)
    for other in (second, poisoned):
        assert torch.equal(other[0], first[0])
        assert all(torch.equal(g, e) for g, e in zip(other[1], first[1], strict=True))


def test_no_graph_without_requires_grad(rng):
    features, labels, predictions = case(rng)
    assert not ck.contextrast_loss(features, labels, predictions, num_classes=4).requires_grad
    with torch.no_grad():
        assert not ck.contextrast_loss(leaves(features), labels, predictions, num_classes=4).requires_grad
    with torch.inference_mode():
        assert ck.contextrast_loss(features, labels, predictions, num_classes=4) > 0


def test_a_frozen_layer_takes_part_without_a_gradient(rng):
    features, labels, predictions = case(rng)
    features[0].requires_grad_()
    ck.contextrast_loss(features, labels, predictions, num_classes=4).backward()
    assert features[0].grad.any()
    assert all(x.grad is None for x in features[1:])


def test_bane_is_the_sum_of_its_parts(rng):
    """The total is made of the public parts: anchors, fusion, negatives, pixel-anchor loss."""
    features, labels, predictions = case(rng)
    top = ck.class_anchors(features[-1], labels, 4)
    total = 0.0
    for weight, x in zip((1.0, 0.7, 0.4, 0.1), features, strict=True):
        anchors, counts = ck.class_anchors(x, labels, 4)
        fused = top[0] if x is features[-1] else ck.fuse_anchors(anchors, counts, *top)
        negatives = ck.bane_negatives(predictions, labels, num_classes=4, size=x.shape[-2:], seed=5)
        total += weight * ck.pixel_anchor_loss(x, labels, fused, negatives=negatives)
    loss = ck.contextrast_loss(features, labels, predictions, num_classes=4, seed=5)
    torch.testing.assert_close(loss, total, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", TAKE_IGNORE_INDEX)
def test_label_255_is_ignored_by_default(name):
    default = inspect.signature(getattr(ck, name)).parameters["ignore_index"].default
    assert default == 255
