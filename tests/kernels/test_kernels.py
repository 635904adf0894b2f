"""The Triton kernels against the reference: values and gradients, in the interpreter where there is no GPU."""

import numpy as np
import pytest
import torch
from inputs import crossed
from kernel_checks import (
    DEVICE,
    DTYPES,
    NEEDS_TRITON,
    ON_COMPILED_CODE,
    assert_like_the_reference,
    feature_map,
    labels_and_predictions,
    negative_maps,
    poisoned_memory,  # noqa: F401 - a fixture for all tests here
    pyramid,
    relative,
    run,
    total,
)
from torch.autograd import gradcheck

import contextrast_kernels as ck
from contextrast_kernels import bane, contextrast

pytestmark = NEEDS_TRITON


# ------------------------------------------------------------------------------------------------------ class anchors

# B, D, N, size, layout: channels below, between and above the chunks; one class, more classes than slots; odd
# sizes, one pixel, a row longer than a tile.
ANCHOR_CASES = [
    (2, 20, 5, (3, 5), "nchw"),
    (1, 40, 40, (5, 8), "channels_last"),
    (2, 48, 5, (3, 5), "slices"),
    (1, 8, 1, (1, 1), "nchw"),
    (1, 8, 3, (2, 70), "nchw"),
    (1, 80, 4, (3, 4), "nchw"),
]


@ON_COMPILED_CODE
@pytest.mark.parametrize(("case", "dtype"), crossed(ANCHOR_CASES, DTYPES))
def test_class_anchors_meet_the_contract(rng, case, dtype):
    B, D, N, size, layout = case
    x = feature_map(rng, B, D, *size, dtype, layout)
    labels, _ = labels_and_predictions(rng, B, N, 11, 13)
    assert_like_the_reference(lambda x: ck.class_anchors(x, labels, N)[0], [x])
    with ck.backend("triton"):
        _, counts = ck.class_anchors(x, labels, N)
    with ck.backend("reference"):
        _, expected = ck.class_anchors(x, labels, N)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected.tolist()


@pytest.mark.parametrize(("scale", "dtype"), crossed([1e-20, 1.0, 1e15], DTYPES[:2]))
def test_class_anchors_without_normalisation_take_their_scale_from_the_data(rng, scale, dtype):
    labels, _ = labels_and_predictions(rng, 1, 3, 9, 11)
    x = feature_map(rng, 1, 12, 3, 5, dtype, scale=scale)
    assert_like_the_reference(lambda x: ck.class_anchors(x, labels, 3, normalize=False)[0] / scale, [x])


@pytest.mark.parametrize(
    ("ignore_index", "dtype"),
    crossed([255, 0, -1, -100, 1], [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]),
)
def test_label_codes_of_every_integer_type(rng, dtype, ignore_index):
    """Exact sampling from the labels' own size and strides; out-of-range labels and ignore_index count as ignored."""
    info = torch.iinfo(dtype)
    values = [0, 1, 2, 3, 4, 100, info.min, info.max, *([2**32 + 1, 2**16 + 2] if dtype == torch.int64 else [])]
    labels = torch.from_numpy(rng.choice(values, (2, 13, 11))).to(dtype).to(DEVICE).mT
    x = feature_map(rng, 2, 4, 3, 5)
    with ck.backend("triton"):
        anchors, counts = ck.class_anchors(x, labels, 4, ignore_index=ignore_index)
    with ck.backend("reference"):
        expected, expected_counts = ck.class_anchors(x, labels, 4, ignore_index=ignore_index)
    assert counts.tolist() == expected_counts.tolist()
    torch.testing.assert_close(anchors, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("num_classes", [255, 256])
def test_the_largest_numbers_of_classes(rng, num_classes):
    """255 classes still fit one byte beside the mark of no class; 256 need two."""
    labels = torch.from_numpy(rng.choice([0, 253, 254, 255, 256], (1, 6, 7))).to(DEVICE)
    x = feature_map(rng, 1, 4, 6, 7)
    with ck.backend("triton"):
        anchors, counts = ck.class_anchors(x, labels, num_classes, ignore_index=-1)
    with ck.backend("reference"):
        expected, expected_counts = ck.class_anchors(x, labels, num_classes, ignore_index=-1)
    assert counts.tolist() == expected_counts.tolist()
    torch.testing.assert_close(anchors, expected, rtol=0, atol=1e-14)


@pytest.mark.slow  # in float64 gradients are the reference's, which are checked every day
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_of_class_anchors_equals_finite_differences(rng, normalize):
    x = feature_map(rng, 1, 8, 2, 3).requires_grad_()
    labels = torch.tensor([[[0, 1, 0], [2, 255, 0]]], device=DEVICE)
    with ck.backend("triton"):
        assert gradcheck(lambda x: ck.class_anchors(x, labels, 3, normalize=normalize)[0], [x], fast_mode=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_a_nonfinite_vector_affects_only_its_class(rng, bad, normalize):
    labels = torch.tensor([[[0, 1, 1, 255]]], device=DEVICE)
    x = feature_map(rng, 1, 8, 1, 4)
    with ck.backend("triton"):
        clean, _ = ck.class_anchors(x, labels, 2, normalize=normalize)
        ignored = x.clone()
        ignored[0, 3, 0, 3] = bad
        ignored.requires_grad_()
        anchors, _ = ck.class_anchors(ignored, labels, 2, normalize=normalize)
        assert torch.equal(anchors, clean)
        (gradient,) = torch.autograd.grad(anchors.sum(), ignored)
        assert gradient.isfinite().all()
        assert not gradient[..., 3].any()
        broken = x.clone()
        broken[0, 3, 0, 0] = bad
        anchors, _ = ck.class_anchors(broken, labels, 2, normalize=normalize)
        assert not anchors[0].isfinite().any()
        assert torch.equal(anchors[1], clean[1])


def test_vectors_without_direction_pass_no_gradient(rng):
    x = torch.zeros(1, 8, 1, 4, dtype=torch.float64, device=DEVICE)
    x[0, 0, 0] = torch.tensor([0.0, 0.9e-12, 1.1e-12, 2.0])
    labels = torch.tensor([[[0, 0, 1, 2]]], device=DEVICE)
    assert_like_the_reference(lambda x: ck.class_anchors(x, labels, 3)[0], [x])
    with ck.backend("triton"):
        x.requires_grad_()
        anchors, _ = ck.class_anchors(x, labels, 3)
        (gradient,) = torch.autograd.grad(anchors.sum(), x)
    assert not anchors[0].any()
    assert not gradient[..., :2].any()


# -------------------------------------------------------------------------------------------------- pixel-anchor loss


@ON_COMPILED_CODE
@pytest.mark.parametrize(("kind", "dtype"), crossed(["hard", "base", "both", "neither"], DTYPES))
def test_pixel_anchor_loss_meets_the_contract(rng, kind, dtype):
    x = feature_map(rng, 2, 20, 3, 5, dtype)
    labels, _ = labels_and_predictions(rng, 2, 5, 11, 13)
    rows = feature_map(rng, 5, 20, 1, 1, torch.promote_types(dtype, torch.float32)).reshape(5, 20)
    maps = negative_maps(rng, kind, 2, 5, (3, 5))
    assert_like_the_reference(lambda x, a: ck.pixel_anchor_loss(x, labels, a, **maps), [x, rows])


@ON_COMPILED_CODE
@pytest.mark.parametrize("kind", ["hard", "neither"])
@pytest.mark.parametrize(
    "case",
    [
        (1, 40, 40, (3, 8), "channels_last", {}),
        (2, 48, 5, (2, 5), "slices", {"temperature": 0.02}),
        (1, 8, 1, (1, 1), "nchw", {}),
        (1, 72, 17, (1, 35), "nchw", {}),
        (2, 20, 5, (2, 5), "channels_last", {"normalize": False, "temperature": 1}),
    ],
    ids=str,
)
def test_pixel_anchor_loss_at_the_edges(rng, case, kind):
    B, D, N, size, layout, options = case
    x = feature_map(rng, B, D, *size, torch.float32, layout)
    labels, _ = labels_and_predictions(rng, B, N, 11, 13)
    rows = feature_map(rng, N, D, 1, 1).reshape(N, D)
    maps = negative_maps(rng, kind, B, N, size)
    assert_like_the_reference(lambda x: ck.pixel_anchor_loss(x, labels, rows.to(x.dtype), **maps, **options), [x])


@pytest.mark.slow  # in float64 gradients are the reference's, which are checked every day
@pytest.mark.parametrize(("kind", "normalize"), crossed(["hard", "both", "neither"], [True, False]))
def test_gradient_of_pixel_anchor_loss_equals_finite_differences(rng, kind, normalize):
    x = feature_map(rng, 1, 8, 2, 3).requires_grad_()
    labels = torch.tensor([[[0, 1, 0], [2, 255, 0]]], device=DEVICE)
    rows = feature_map(rng, 3, 8, 1, 1).reshape(3, 8).requires_grad_()
    maps = negative_maps(rng, kind, 1, 3, (2, 3))
    with ck.backend("triton"):
        assert gradcheck(
            lambda x, a: ck.pixel_anchor_loss(x, labels, a, **maps, normalize=normalize, temperature=0.5),
            [x, rows],
            fast_mode=True,
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_well_separated_classes_keep_their_small_losses(rng, dtype):
    """Every term near e^-18 in float32: log(1 + u) would be zero, and a fixed point without room below one as
    well."""
    labels = torch.tensor([[[0, 1] * 4, [1, 0] * 4]], device=DEVICE)
    x = feature_map(rng, 1, 8, 2, 8, dtype) * 0.01
    x[0, 0] += (1 - 2 * labels[0]).to(dtype)
    rows = torch.zeros(2, 8, device=DEVICE)
    rows[0, 0], rows[1, 0] = 1, -1
    assert_like_the_reference(lambda x: ck.pixel_anchor_loss(x, labels, rows.to(x.dtype)), [x])


def test_anchors_of_absent_classes_are_in_no_term(rng):
    x = feature_map(rng, 1, 8, 2, 3).requires_grad_()
    labels = torch.tensor([[[0, 1, 0], [1, 255, 0]]], device=DEVICE)
    rows = torch.from_numpy(rng.standard_normal((3, 8))).to(DEVICE)
    negatives = torch.tensor([[[1, 2, 2], [0, 1, -1]]], device=DEVICE)
    rows[2] = torch.nan
    rows.requires_grad_()
    results = []
    for name in ("triton", "reference"):
        with ck.backend(name):
            loss = ck.pixel_anchor_loss(x, labels, rows, negatives=negatives)
            results.append((loss.detach(), *torch.autograd.grad(loss, [x, rows])))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("bad", "kind"), crossed([float("nan"), float("inf")], ["hard", "neither"]))
def test_a_nonfinite_vector_is_never_hidden(rng, bad, kind):
    """At an ignored pixel it has no effect; at a valid one the loss is NaN, also where its class has no negative."""
    labels = torch.tensor([[[0, 1, 0], [1, 255, 0]]], device=DEVICE)
    x = feature_map(rng, 1, 8, 2, 3)
    rows = feature_map(rng, 2, 8, 1, 1).reshape(2, 8)
    negatives = torch.tensor([[[1, -1, -1], [-1, 0, -1]]], device=DEVICE) if kind == "hard" else None
    with ck.backend("triton"):
        clean = run(lambda x: ck.pixel_anchor_loss(x, labels, rows, negatives=negatives), [x])
        ignored = x.clone()
        ignored[0, 2, 1, 1] = bad
        dirty = run(lambda x: ck.pixel_anchor_loss(x, labels, rows, negatives=negatives), [ignored])
        assert torch.equal(dirty[0], clean[0])
        assert torch.equal(dirty[1], clean[1])
        broken = x.clone()
        broken[0, 2, 0, 1] = bad  # of class 1, which has one negative; class 0 has none where kind is hard
        assert ck.pixel_anchor_loss(broken, labels, rows, negatives=negatives).isnan()
        broken = x.clone()
        broken[0, 2, 0, 2] = bad
        assert ck.pixel_anchor_loss(broken, labels, rows, negatives=negatives).isnan()
        x[:, 5] = x[:, 5].abs()  # similarities of +inf, which softplus(Z - s) would turn into 0
        for row in rows:
            row[5] = bad
            assert ck.pixel_anchor_loss(x, labels, rows, negatives=negatives).isnan()
            row[5] = 1


# ----------------------------------------------------------------------------------------------------- the whole loss


CONTEXTRAST_CASES = {
    "as the paper": {},
    "normalised anchors": {"normalize_anchors": True},
    "stopped at the anchors": {"detach_anchors": True},
    "not normalised": {"normalize": False, "temperature": 1.0, "normalize_anchors": True},
    "with base pixels": {"base_rate": 0.3, "seed": 2**40 + 5},
    "all pixels": {"negatives": "none", "base_rate": 1},
    "semi-hard": {"negatives": "semi-hard", "ratio": 0.3, "seed": 7},
}


@ON_COMPILED_CODE
@pytest.mark.parametrize("options", CONTEXTRAST_CASES.values(), ids=list(CONTEXTRAST_CASES))
def test_contextrast_loss_meets_the_contract(rng, options):
    xs = pyramid(rng, 2, 12, [(3, 4), (2, 2)])
    labels, predictions = labels_and_predictions(rng, 2, 4, 11, 13)
    assert_like_the_reference(total(labels, predictions, 4, 2, **options), xs)


@pytest.mark.parametrize(("scale", "dtype"), crossed([1e-4, 1.0, 1e4], DTYPES[1:]))
def test_every_dtype_and_scale_meets_the_contract(rng, dtype, scale):
    xs = pyramid(rng, 1, 24, [(4, 5), (2, 2)], dtype, scale=scale)
    labels, predictions = labels_and_predictions(rng, 1, 4, 10, 12)
    assert_like_the_reference(total(labels, predictions, 4, 2), xs)


def test_tiny_float16_features(rng):
    """1/‖x‖ is far above the largest float16 there."""
    xs = pyramid(rng, 1, 24, [(5, 6)], torch.float16, scale=1e-6)
    labels, predictions = labels_and_predictions(rng, 1, 4, 10, 12)
    loss = total(labels, predictions, 4, 1)
    with ck.backend("reference"):
        expected = loss(*[x.double() for x in xs])
    with ck.backend("triton"):
        torch.testing.assert_close(loss(*xs).double(), expected, rtol=1e-6, atol=0)


def test_normalised_anchors_that_were_short_keep_their_loss(rng):
    """Vectors of a class that nearly cancel leave a mean of length 0.02, and an anchor of 1: similarities of up to 1/τ
    whatever the mean was."""
    h, w, D = 15, 17, 8
    lower = 1e-3 * torch.from_numpy(rng.standard_normal((1, D, h, w)))
    lower[:, 0] -= 1
    lower[0, :, -1, -1] = torch.eye(D)[5]  # of class 1, predicted as 0
    top = torch.zeros(1, D, 3, w)
    top[:, 0] = 0.02
    top[:, 1] = 1 - 2 * (torch.arange(w) % 2 == 0).double()
    top[..., -1] = 0
    labels = torch.zeros(1, h, w, dtype=torch.int64, device=DEVICE)
    labels[0, -1, -1] = 1
    loss = total(labels, torch.zeros_like(labels), 2, 2, normalize_anchors=True, fusion_weight=1.0, temperature=0.02)
    assert_like_the_reference(loss, [x.float().to(DEVICE) for x in (lower, top)])


@pytest.mark.parametrize("outlier", [1.0, 3e4])
def test_one_long_vector_leaves_the_gradients_of_other_classes_fine(rng, outlier):
    """Without normalisation, in 16 bits: the fixed point of all classes' sums follows the longest vector."""
    x = 0.3 * feature_map(rng, 1, 16, 12, 24, torch.float16)
    labels = torch.from_numpy(rng.integers(1, 3, (1, 12, 24))).to(DEVICE)
    predictions = torch.from_numpy(rng.integers(0, 3, (1, 12, 24))).to(DEVICE)
    x[0, 5, 3, 7], labels[0, 3, 7] = outlier, 0
    loss = total(labels, predictions, 3, 1, normalize=False, temperature=1.0)
    assert_like_the_reference(lambda x: 1e3 * loss(x), [x])


def test_the_pull_of_anchors_in_sixteen_bits(rng):
    """T, before the rounding of dx hides what the words that A⁺ and A⁻ share have lost."""
    xs = pyramid(rng, 1, 24, [(12, 20), (6, 10)], torch.float16)
    labels, predictions = labels_and_predictions(rng, 1, 4, 24, 40)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    sizes = [x.shape[2:] for x in xs]
    e, _ = bane.negative_codes(predictions, labels, sizes, 4, 0.5, "bane", "layer", 255, seed)
    options = (4, 255, [1.0, 0.5], 0.1, 0.7, 0.0, True, False, False, None, None, None)
    pulls = []
    for features in (xs, [x.double() for x in xs]):
        *_, pull = contextrast._contextrast_loss(features, labels, e, [], seed, *options)
        pulls.append(pull[..., :24].double())
    # A⁻, at most 1 long, is counted in steps of 2⁻²⁴, and every block rounds once.
    assert relative(*pulls) < 2e-6


def test_layers_with_different_memory_layouts(rng):
    """NCHW of two widths, channels_last and a slice in one loss: several launches, one result."""
    xs = [
        feature_map(rng, 1, 16, 3, 8, torch.float32, "nchw"),
        feature_map(rng, 1, 16, 3, 5, torch.float32, "channels_last"),
        feature_map(rng, 1, 16, 2, 3, torch.float32, "slices"),
        feature_map(rng, 1, 16, 1, 1, torch.float32, "nchw"),
    ]
    labels, predictions = labels_and_predictions(rng, 1, 4, 11, 13)
    assert_like_the_reference(total(labels, predictions, 4, 4), xs)


def test_logits_as_predictions_meet_the_contract(rng):
    xs = pyramid(rng, 1, 16, [(4, 5), (2, 3)])
    labels, predictions = labels_and_predictions(rng, 1, 4, 11, 13)
    logits = torch.nn.functional.one_hot(predictions, 4).movedim(-1, 1).float()
    assert_like_the_reference(total(labels, logits, 4, 2), xs)


@ON_COMPILED_CODE
def test_two_runs_agree_bit_by_bit(rng):
    xs = pyramid(rng, 1, 12, [(4, 5), (2, 2)], torch.float32)
    labels, predictions = labels_and_predictions(rng, 1, 4, 10, 12)
    with ck.backend("triton"):
        for options in ({}, {"base_rate": 0.5}):
            first, second = (run(total(labels, predictions, 4, 2, **options), xs) for _ in range(2))
            assert torch.equal(first[0], second[0])
            assert torch.equal(first[1], second[1])


@pytest.mark.slow
@pytest.mark.parametrize("options", ["as the paper", "not normalised", "with base pixels"])
def test_gradient_of_contextrast_loss_equals_finite_differences(rng, options):
    xs = [x.requires_grad_() for x in pyramid(rng, 1, 8, [(2, 3), (2, 2)])]
    labels, predictions = labels_and_predictions(rng, 1, 3, 6, 6, wrong=0.6)
    with ck.backend("triton"):
        assert gradcheck(total(labels, predictions, 3, 2, **CONTEXTRAST_CASES[options]), xs, fast_mode=True)


@pytest.mark.parametrize("dense", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["hard", "dense"])
def test_the_fused_loss_is_the_sum_of_its_parts(rng, dense):
    """One op for all layers against class_anchors, fuse_anchors and pixel_anchor_loss layer by layer, all on
    Triton."""
    xs = pyramid(rng, 1, 16, [(4, 5), (2, 3)])
    labels, predictions = labels_and_predictions(rng, 1, 4, 10, 12)

    def composed(*xs):
        parts = [ck.class_anchors(x, labels, 4) for x in xs]
        fused = [ck.fuse_anchors(*parts[0], *parts[1]), parts[1][0]]
        losses = []
        for x, rows in zip(xs, fused):
            chosen = None
            if not dense:
                chosen = ck.bane_negatives(predictions, labels, num_classes=4, size=x.shape[2:])
            losses.append(ck.pixel_anchor_loss(x, labels, rows, negatives=chosen))
        return losses[0] + 0.7 * losses[1]

    options = {"negatives": "none", "base_rate": 1} if dense else {}
    with ck.backend("triton"):
        value, gradient = run(total(labels, predictions, 4, 2, **options), xs)
        expected, expected_gradient = run(composed, xs)
    assert relative(value, expected) < 1e-13
    assert relative(gradient, expected_gradient) < 1e-12


DEGENERATE = [
    "nothing valid", "no errors", "everything wrong", "one class", "one pixel", "empty batch",
    "top layer lacks a class", "vectors without direction",
]  # fmt: skip


@pytest.mark.parametrize("what", DEGENERATE)
def test_degenerate_batches(rng, what):
    B = 0 if what == "empty batch" else 1
    xs = pyramid(rng, B, 8, [(1, 1), (1, 1)] if what == "one pixel" else [(3, 4), (2, 2)])
    labels = torch.from_numpy(rng.integers(0, 3, (B, 8, 8))).to(DEVICE)
    predictions = torch.from_numpy(rng.integers(0, 3, (B, 8, 8))).to(DEVICE)
    if what == "nothing valid":
        labels[:] = 255
    elif what == "no errors":
        predictions = labels.clone()
    elif what == "everything wrong":
        predictions = (labels + 1) % 3
    elif what == "one class":
        labels[:] = 1
    elif what == "top layer lacks a class":
        labels[:, ::4, ::4] = 1
        labels[:, 2, 2] = 0  # seen by the first layer alone
    elif what == "vectors without direction":  # a positive and, where it is an error, a negative without any gradient
        labels[:, :2, :2], predictions[:, :2, :2] = 0, 1
        for x in xs:
            x[:, :, 0, 0] = 0
            x[:, :, -1, -1] *= 1e-14
    loss = total(labels, predictions, 3, 2)
    with ck.backend("triton"):
        value, gradient = run(loss, xs)
    if what in ("nothing valid", "no errors", "empty batch"):
        assert value == 0
        assert not gradient.any()
    with ck.backend("reference"):
        expected, expected_gradient = run(loss, xs)
    assert relative(value, expected) < 1e-13
    assert relative(gradient, expected_gradient) < 1e-12
    if what == "vectors without direction":
        first = gradient[: xs[0].numel()].view_as(xs[0])
        assert first.any() and not first[:, :, 0, 0].any() and not first[:, :, -1, -1].any()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"base_rate": 0.5}], ids=["hard", "dense"])
def test_codes_of_two_bytes_meet_the_contract(rng, options):
    """256 classes, the last of which does not fit a byte beside the mark of no class."""
    xs = pyramid(rng, 1, 8, [(6, 7), (3, 3)])
    values = [0, 1, 253, 254, 255]
    labels, predictions = (torch.from_numpy(rng.choice(values, (1, 12, 14))).to(DEVICE) for _ in range(2))
    assert_like_the_reference(total(labels, predictions, 256, 2, ignore_index=-1, **options), xs)


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_nonfinite_valid_pixel_gives_nan_in_any_layer(rng, layer):
    labels, predictions = labels_and_predictions(rng, 1, 3, 8, 8, ignored=0)
    labels[0, 0, 0] = 255
    xs = pyramid(rng, 1, 8, [(4, 4), (2, 2)])
    loss = total(labels, predictions, 3, 2)
    with ck.backend("triton"):
        clean = run(loss, xs)
        xs[layer][0, 1, 0, 0] = torch.nan  # ignored
        dirty = run(loss, xs)
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])
        xs[layer][0, 1, 1, 1] = torch.nan
        assert loss(*xs).isnan()


def test_reports_of_the_module_equal_the_reference(rng):
    xs = pyramid(rng, 2, 8, [(4, 5), (2, 3)], torch.float32)
    labels, predictions = labels_and_predictions(rng, 2, 4, 11, 13)
    reports = []
    for name in ("reference", "triton"):
        criterion = ck.ContextrastLoss(4, layer_weights=(1.0, 0.5), base_rate=0.2, seed=3)
        with ck.backend(name):
            criterion(xs, labels, predictions)
        reports.append(criterion.last)
    for key in ("classes", "positives", "negatives", "errors"):
        assert reports[0][key].tolist() == reports[1][key].tolist(), key
    torch.testing.assert_close(reports[0]["loss"], reports[1]["loss"], rtol=1e-6, atol=0)
    assert not reports[1]["loss"].requires_grad


# ------------------------------------------------------------------------------------------------------ larger


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_four_layers_meet_the_contract(rng, dtype, layout):
    xs = pyramid(rng, 1, 64, [(9, 34), (5, 17), (3, 9), (2, 5)], dtype, layout)
    labels, predictions = labels_and_predictions(rng, 1, 19, 36, 136)
    for options in ({}, {"base_rate": 0.5}):
        assert_like_the_reference(total(labels, predictions, 19, 4, **options), xs)


@pytest.mark.slow
@pytest.mark.parametrize("D", [200, 256, 300, 720, 1024])
def test_many_channels_meet_the_contract(rng, D):
    xs = pyramid(rng, 1, D, [(4, 5), (2, 3)], torch.float32)
    labels, predictions = labels_and_predictions(rng, 1, 7, 8, 10)
    for options in ({}, {"base_rate": 0.5}):
        assert_like_the_reference(total(labels, predictions, 7, 2, **options), xs)


@pytest.mark.slow
def test_a_block_with_every_class_meets_the_contract(rng):
    """150 classes in one block: ten rounds over sixteen slots."""
    labels = torch.from_numpy(rng.permutation(150 * 4).reshape(1, 20, 30) % 150).to(DEVICE)
    predictions = torch.from_numpy(rng.integers(0, 150, (1, 20, 30))).to(DEVICE)
    xs = pyramid(rng, 1, 16, [(20, 30), (10, 15)], torch.float32)
    assert_like_the_reference(total(labels, predictions, 150, 2), xs)
    assert np.unique(labels.cpu()).size == 150
