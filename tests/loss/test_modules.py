"""The modules: a seed that advances and survives checkpoints, the last batch's numbers, debug checks, training."""

import copy
import pickle
from itertools import pairwise

import literal
import numpy as np
import pytest
import torch
from inputs import leaves, logits_of, pyramid, scene
from observers import Crossings
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference")

WEIGHTS = (1.0, 0.7, 0.4, 0.1)


def case(rng, **options):
    labels, predictions = scene(rng, **options)
    return pyramid(rng, B=len(labels)), labels, predictions


# ------------------------------------------------------------------------------------------------------ ContextrastLoss


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "ignore_index": 1,
            "temperature": 0.3,
            "fusion_weight": 0.2,
            "negatives": "semi-hard",
            "ratio": 0.3,
            "base_rate": 0.1,
        },
        {"distance_at": "full", "normalize": False, "temperature": 1.0},
        {"normalize_anchors": True, "detach_anchors": True, "layer_weights": [1, 2, 3, 4]},
    ],
)
def test_module_equals_function(rng, options):
    """Value and gradient, with every option passed on."""
    batch = case(rng)
    features, others = leaves(batch[0]), leaves(batch[0])
    loss = ck.ContextrastLoss(4, seed=5, **options).eval()(features, *batch[1:])
    expected = ck.contextrast_loss(others, *batch[1:], num_classes=4, seed=5, **options)
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(features, others, strict=True))


def test_seed_advances_by_one_each_training_forward_and_in_evaluation_never(rng):
    batch = case(rng)
    criterion = ck.ContextrastLoss(4, seed=7, base_rate=0.3)
    assert criterion.seed.dtype == torch.int64
    values = []
    for step in range(3):
        assert criterion.seed.item() == 7 + step
        values.append(criterion(*batch).item())
    assert len(set(values)) == 3
    assert values == [ck.contextrast_loss(*batch, num_classes=4, seed=7 + i, base_rate=0.3).item() for i in range(3)]
    criterion.eval()
    assert criterion(*batch) == criterion(*batch)
    assert criterion.seed.item() == 10


def test_seed_wraps_instead_of_failing(rng):
    batch = case(rng)
    criterion = ck.ContextrastLoss(4, seed=2**63 - 1)
    criterion(*batch)
    assert criterion.seed.item() == -(2**63)
    assert criterion(*batch).isfinite()


def test_backward_after_the_seed_advanced(rng):
    """Gradient accumulation: two forwards, then one backward, is the sum of both gradients."""
    batch = case(rng)
    features = leaves(batch[0])
    criterion = ck.ContextrastLoss(4, base_rate=0.3)
    (criterion(features, *batch[1:]) + criterion(features, *batch[1:])).backward()
    others = leaves(batch[0])
    for seed in (0, 1):
        ck.contextrast_loss(others, *batch[1:], num_classes=4, base_rate=0.3, seed=seed).backward()
    for x, y in zip(features, others, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-13, atol=1e-15)


def test_state_dict_round_trip_continues_the_same_draws(rng, tmp_path):
    batch = case(rng)
    criterion = ck.ContextrastLoss(4, seed=3)
    criterion(*batch)
    torch.save(criterion.state_dict(), tmp_path / "checkpoint.pt")
    expected = [criterion(*batch).item() for _ in range(3)]
    resumed = ck.ContextrastLoss(4)
    missing, unexpected = resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert (missing, unexpected) == ([], [])
    assert resumed.seed.item() == 4
    assert [resumed(*batch).item() for _ in range(3)] == expected


def test_module_has_no_parameters_and_copies(rng):
    batch = case(rng)
    criterion = ck.ContextrastLoss(4, seed=3)
    criterion(*batch)
    assert list(criterion.parameters()) == []
    twins = [copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    expected = criterion(*batch).item()
    assert [twin(*batch).item() for twin in twins] == [expected, expected]


def test_casting_the_module_does_not_change_the_seed(rng):
    """model.half() and model.bfloat16() cast buffers, but only those of floating point."""
    criterion = ck.ContextrastLoss(4, seed=2**40 + 1).half().bfloat16().double()
    assert criterion.seed.dtype == torch.int64
    assert criterion.seed.item() == 2**40 + 1
    assert criterion(*case(rng)).isfinite()


def test_last_holds_the_numbers_of_each_layer(rng):
    batch = case(rng)
    features = leaves(batch[0])
    for negatives, seed in (("bane", 0), ("semi-hard", 4)):
        criterion = ck.ContextrastLoss(4, negatives=negatives, ratio=0.3, seed=seed)
        loss = criterion(features, *batch[1:])
        last = criterion.last
        assert set(last) >= {"loss", "classes", "positives", "negatives", "errors"}
        for value in last.values():
            assert value.shape == (4,)
            assert not value.requires_grad
        arrays = [x.numpy() for x in batch[0]], batch[1].numpy(), batch[2].numpy()
        losses = literal.contextrast_layer_losses(*arrays, num_classes=4, negatives=negatives, ratio=0.3, seed=seed)
        assert last["loss"].tolist() == pytest.approx(losses, rel=1e-12)
        assert sum(w * v for w, v in zip(WEIGHTS, last["loss"].tolist(), strict=True)) == pytest.approx(
            loss.item(), rel=1e-12
        )
        for i, x in enumerate(batch[0]):
            size = tuple(x.shape[-2:])
            y, p = literal.resize(arrays[1], size), literal.resize(arrays[2], size)
            chosen = literal.bane_negatives(arrays[2], arrays[1], 4, size, 0.3, negatives, seed=seed)
            assert last["classes"][i] == len(np.unique(y[y < 4]))
            assert last["positives"][i] == (y < 4).sum()
            assert last["errors"][i] == (literal.error_map(p, y, 4) >= 0).sum()
            assert last["negatives"][i] == (chosen >= 0).sum()


def test_last_of_a_batch_with_nothing_in_it(rng):
    features, labels, predictions = case(rng)
    criterion = ck.ContextrastLoss(4)
    criterion(features, torch.full_like(labels, 255), predictions)
    assert all(value.tolist() == [0] * 4 for value in criterion.last.values())


def test_options_are_shown(rng):
    text = repr(ck.ContextrastLoss(19, ratio=0.3, negatives="semi-hard"))
    assert "19" in text
    assert "0.3" in text
    assert "semi-hard" in text


# ------------------------------------------------------------------------------------------------------------ debug


@pytest.mark.parametrize("bad", [4, 37, -1, 2**32 + 1])
def test_debug_finds_a_label_outside_the_classes(rng, bad):
    features, labels, predictions = case(rng)
    labels[1, 3, 4] = bad
    assert ck.ContextrastLoss(4)(features, labels, predictions).isfinite()
    with pytest.raises(ValueError, match=rf"^labels.*{bad}"):
        ck.ContextrastLoss(4, debug=True)(features, labels, predictions)


def test_debug_finds_a_prediction_outside_the_classes(rng):
    features, labels, predictions = case(rng)
    predictions[0, 3, 4] = 99
    with pytest.raises(ValueError, match=r"^predictions.*99"):
        ck.ContextrastLoss(4, debug=True)(features, labels, predictions)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_debug_finds_a_feature_that_is_not_finite_and_names_its_layer(rng, bad):
    features, labels, predictions = case(rng, ignored=0)
    features[2][1, 0, 1, 1] = bad
    with pytest.raises(ValueError, match=r"^features\[2\]"):
        ck.ContextrastLoss(4, debug=True)(features, labels, predictions)


def test_debug_accepts_valid_input_and_changes_no_result(rng):
    features, labels, predictions = case(rng)
    labels[0, :9] = 255
    features[0][0, :, :2] = float("nan")  # at ignored pixels, where it has no effect
    loss = ck.ContextrastLoss(4, debug=True)(features, labels, predictions)
    assert loss.isfinite()
    assert torch.equal(loss, ck.ContextrastLoss(4)(features, labels, predictions))
    assert ck.ContextrastLoss(4, debug=True)([x[:0] for x in features], labels[:0], predictions[:0]) == 0


def test_a_refused_batch_does_not_advance_the_seed(rng):
    features, labels, predictions = case(rng)
    labels[0, 0, 0] = 77
    criterion = ck.ContextrastLoss(4, debug=True)
    with pytest.raises(ValueError, match="labels"):
        criterion(features, labels, predictions)
    assert criterion.seed.item() == 0


# ------------------------------------------------------------------------------------------------- ContextrastCriterion


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_criterion_is_cross_entropy_and_contrast(rng, smoothing, weighted):
    """Against torch's own mean, and ContextrastLoss; the parts are there for the log."""
    features, labels, predictions = case(rng)
    logits = logits_of(predictions, 4, rng).double().requires_grad_()
    weights = torch.tensor([0.5, 2.0, 1.0, 0.0]) if weighted else None
    criterion = ck.ContextrastCriterion(4, 0.3, class_weights=weights, label_smoothing=smoothing, base_rate=0.2)
    loss = criterion(features, labels, logits)
    entropy = nn.functional.cross_entropy(
        logits, labels, None if weights is None else weights.double(), ignore_index=255, label_smoothing=smoothing
    )
    contrast = ck.contextrast_loss(features, labels, logits, num_classes=4, base_rate=0.2)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, entropy + 0.3 * contrast, rtol=1e-12, atol=0)
    torch.testing.assert_close(criterion.last["cross_entropy"], entropy.detach(), rtol=1e-12, atol=0)
    assert torch.equal(criterion.last["contrast"], contrast.detach())
    assert not any(value.requires_grad for value in criterion.last.values())
    assert criterion.last["errors"].shape == (4,)
    [gradient] = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(entropy, logits)[0], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("weights", [["a"] * 4, [[1.0], [1.0, 2.0]], [1.0, None, 1.0, 1.0]])
def test_invalid_class_weights_raise_a_clear_error(weights):
    with pytest.raises(TypeError, match=r"^class_weights: expected 4 finite numbers, one for each class, got list \["):
        ck.ContextrastCriterion(4, class_weights=weights)


def test_criterion_resizes_small_logits(rng):
    features, labels, _ = case(rng, H=24, W=32)
    small = torch.randn(2, 4, 6, 8, dtype=torch.float16, requires_grad=True)
    large = nn.functional.interpolate(small.float(), (24, 32), mode="bilinear", align_corners=False)
    criterion = ck.ContextrastCriterion(4)
    loss = criterion([x.float() for x in features], labels[:, None].to(torch.uint8), small)
    assert loss.dtype == criterion.last["cross_entropy"].dtype == torch.float32
    torch.testing.assert_close(
        criterion.last["cross_entropy"], nn.functional.cross_entropy(large, labels, ignore_index=255)
    )
    expected = ck.contextrast_loss([x.float() for x in features], labels, large, num_classes=4)
    assert torch.equal(criterion.last["contrast"], expected.detach())
    loss.backward()
    assert small.grad.isfinite().all() and small.grad.any()


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("batch", ["ignored", "empty", "out of range"])
def test_criterion_without_a_valid_pixel_is_zero_with_a_live_graph(rng, batch, weights, smoothing):
    features, labels, predictions = case(rng)
    labels = torch.full_like(labels, 255 if batch != "out of range" else -7)
    logits = logits_of(predictions, 4, rng)
    if batch == "empty":
        features, labels, logits = [x[:0] for x in features], labels[:0], logits[:0, :, :3, :3]
    features, [logits] = leaves(features), leaves([logits])
    loss = ck.ContextrastCriterion(4, class_weights=weights, label_smoothing=smoothing)(features, labels, logits)
    assert loss == 0
    loss.backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (*features, logits))


def test_criterion_ignores_labels_outside_the_classes(rng):
    """With such labels torch's cross-entropy would read out of bounds, or stop the device."""
    features, labels, predictions = case(rng)
    logits = logits_of(predictions, 4, rng)
    wild = torch.where(labels == 255, torch.tensor([-100, 4, 254, 2**40])[labels % 4], labels)
    values = [ck.ContextrastCriterion(4)(features, y, logits) for y in (labels, wild)]
    assert torch.equal(*values)


def test_criterion_does_not_hide_nan(rng):
    features, labels, predictions = case(rng)
    logits = logits_of(predictions, 4, rng)
    logits[0, 0][labels[0] != 255] = float("nan")
    assert ck.ContextrastCriterion(4)(features, labels, logits).isnan()


def test_criterion_saves_its_state_and_compiles(rng):
    features, labels, predictions = case(rng)
    logits = logits_of(predictions, 4, rng)
    features = features[:2]
    criterion = ck.ContextrastCriterion(4, class_weights=[1, 2, 3, 4], base_rate=0.3, layer_weights=(1.0, 0.5))
    assert set(criterion.state_dict()) == {"contrast.seed", "class_weights"}
    twin = copy.deepcopy(criterion)
    compiled = torch.compile(twin, backend="eager", fullgraph=True)
    for _ in range(2):
        assert torch.equal(compiled(features, labels, logits), criterion(features, labels, logits))
    assert twin.contrast.seed == criterion.contrast.seed == 2


# ------------------------------------------------------------------------------------------------------- ProjectionHead


def test_projection_head_maps_channels_and_keeps_the_size():
    head = ck.ProjectionHead(24)
    assert head(torch.randn(2, 24, 5, 7)).shape == (2, 256, 5, 7)
    small = ck.ProjectionHead(6, dim=3)
    x = torch.randn(2, 6, 4, 4, requires_grad=True)
    small(x).square().sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_projection_head_maps_each_pixel_independently():
    """Only 1x1 convolutions: in evaluation a pixel's embedding depends on that pixel."""
    head = ck.ProjectionHead(6, dim=3).eval()
    x = torch.randn(1, 6, 4, 4)
    changed = x.clone()
    changed[..., 2, 1] += 1
    differs = (head(x) != head(changed)).any(1)
    assert differs.nonzero().tolist() == [[0, 2, 1]]


# ------------------------------------------------------------------------------------------------------------ training


class Network(nn.Module):
    """Four strided stages, a classifier on the first, and a projection head on each."""

    def __init__(self, num_classes):
        super().__init__()
        widths = (3, 8, 12, 16, 16)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in pairwise(widths)
        )
        self.heads = nn.ModuleList(ck.ProjectionHead(width, dim=8) for width in widths[1:])
        self.classifier = nn.Conv2d(widths[1], num_classes, 1)

    def forward(self, x):
        maps = [x := stage(x) for stage in self.stages]
        logits = nn.functional.interpolate(self.classifier(maps[0]), scale_factor=2.0)
        return [head(m) for head, m in zip(self.heads, maps, strict=True)], logits


def training_batch():
    torch.manual_seed(0)
    labels, _ = scene(np.random.default_rng(3), B=2, N=4, H=32, W=48)
    colours = torch.randn(4, 3)
    images = colours[labels.clamp(max=3)].permute(0, 3, 1, 2) + 0.8 * torch.randn(2, 3, 32, 48)
    return Network(4), images, labels


def test_ten_lines_in_a_training_loop_make_the_loss_fall():
    """Eq. 5 on one batch. The contrast is judged at fixed predictions: with fewer errors it shrinks by itself."""
    network, images, labels = training_batch()
    criterion = ck.ContextrastLoss(num_classes=4)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    fixed = network(images)[1].argmax(1)

    def contrast():
        with torch.no_grad():
            return ck.contextrast_loss(network(images)[0], labels, fixed, num_classes=4).item()

    before, totals = contrast(), []
    for _ in range(25):
        optimizer.zero_grad()
        features, logits = network(images)
        loss = nn.functional.cross_entropy(logits, labels, ignore_index=255) + 0.1 * criterion(features, labels, logits)
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert before > 0
    assert totals[-1] < 0.8 * totals[0]
    assert contrast() < 0.8 * before


def test_gradients_reach_every_encoder_stage_and_projection_head():
    """The gradients are those of the contrast alone, since cross-entropy would reach the first stage by itself. The
    classifier must get none."""
    network, images, labels = training_batch()
    features, logits = network(images)
    ck.ContextrastLoss(num_classes=4, base_rate=0.2)(features, labels, logits).backward()
    for i, (stage, head) in enumerate(zip(network.stages, network.heads, strict=True)):
        for name, parameter in (*stage.named_parameters(), *head.named_parameters()):
            assert parameter.grad is not None, (i, name)
            assert parameter.grad.isfinite().all(), (i, name)
        assert stage[0].weight.grad.any(), i
        assert head[-1].weight.grad.any(), i
    assert all(parameter.grad is None for parameter in network.classifier.parameters())


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16])
def test_a_training_step_under_autocast_has_a_float32_loss(autocast_dtype):
    """Features come out of the network in half precision; the loss is float32 all the same."""
    network, images, labels = training_batch()
    with torch.autocast("cpu", autocast_dtype):
        features, logits = network(images)
        assert features[0].dtype == autocast_dtype
        loss = ck.ContextrastLoss(num_classes=4)(features, labels, logits)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(stage[0].weight.grad.isfinite().all() for stage in network.stages)


def test_memory_format_of_a_training_step_does_not_matter():
    network, images, labels = training_batch()
    losses = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        twin = copy.deepcopy(network).to(memory_format=memory_format)
        features, _ = twin(images.to(memory_format=memory_format))
        fixed = (labels + 1).clamp(max=3)
        loss = ck.contextrast_loss(features, labels, fixed, num_classes=4)
        loss.backward()
        losses.append(loss.item())
        assert all(stage[0].weight.grad.any() for stage in twin.stages)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA, not even for fake tensors")
def test_no_tensor_crosses_from_host_to_device():
    """On fake CUDA tensors: the loss built on the host follows its labels once, and from then on copies nothing."""
    with FakeTensorMode(), ck.backend("reference"):
        criterion = ck.ContextrastLoss(4, base_rate=0.3)
        features = [torch.empty(2, 8, 32 // s, 32 // s, device="cuda", requires_grad=True) for s in (2, 4, 8, 16)]
        labels = torch.zeros(2, 64, 64, dtype=torch.int64, device="cuda")
        logits = torch.empty(2, 4, 64, 64, device="cuda")
        counted = []
        for _ in range(3):
            with Crossings() as crossings:
                criterion(features, labels, logits)
            counted.append(crossings.seen)
        with Crossings() as crossings:
            ck.contextrast_loss(features, labels, logits, num_classes=4, base_rate=0.3, seed=7)
    assert counted == [["aten._to_copy.default"], [], []]
    assert crossings.seen == []
