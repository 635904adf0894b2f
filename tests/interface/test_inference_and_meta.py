"""A first batch under inference_mode leaves ordinary tensors behind, and tensors on the meta device have shapes."""

import pytest
import torch

import contextrast_kernels as ck

SIZES = ((8, 8), (4, 4), (2, 2), (1, 1))


def batch(device="cpu"):
    features = [torch.randn(2, 5, *size, device=device) for size in SIZES]
    labels = torch.zeros(2, 16, 16, dtype=torch.int64, device=device)
    return features, labels, torch.randn(2, 4, 16, 16, device=device)


def bank():
    return ck.MemoryBank(4, 5, pixels=3, regions=3)


LOSSES = {
    "ContextrastLoss": lambda: ck.ContextrastLoss(4),
    "ContextrastCriterion": lambda: ck.ContextrastCriterion(4, class_weights=[1, 2, 3, 4]),
    "PixelContrastLoss": lambda: ck.PixelContrastLoss(4, max_samples=40, max_views=4, min_pixels=1, bank=bank()),
    "MultiScaleContrastLoss": lambda: ck.MultiScaleContrastLoss(4, max_samples=40),
    "RegionContrastLoss": lambda: ck.RegionContrastLoss(4, bank()),
    "PNELoss": lambda: ck.PNELoss(4, set_size=8),
}


def kept(module):
    """Every tensor that a module keeps between batches."""
    parts = list(module.modules())
    attributes = [value for part in parts for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return [*module.buffers(), *attributes]


@pytest.mark.parametrize("name", LOSSES)
def test_a_first_batch_under_inference_mode_leaves_ordinary_tensors(name):
    """The meta device stands for one that the module is not on yet."""
    loss = LOSSES[name]()
    for training in (False, True):
        with torch.inference_mode():
            loss.train(training)(*batch("meta"))
    assert kept(loss) and all(value.device.type == "meta" for value in kept(loss))
    assert not any(value.is_inference() for value in kept(loss))
    features, labels, logits = batch("meta")
    loss([x.requires_grad_() for x in features], labels, logits.requires_grad_()).backward()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_made_under_inference_mode_can_be_trained(name):
    with torch.inference_mode():
        loss = LOSSES[name]()
        loss(*batch())
    assert not any(value.is_inference() for value in kept(loss))
    features, labels, logits = batch()
    loss([x.requires_grad_() for x in features], labels, logits).backward()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ContextrastLoss", "ContextrastCriterion"])
def test_a_first_batch_of_a_compiled_loss_under_inference_mode(name, reference):
    torch.compiler.reset()
    loss = LOSSES[name]()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    with torch.inference_mode():
        compiled(*batch("meta"))
    assert not any(value.is_inference() for value in kept(loss))
    torch.compiler.reset()


# ------------------------------------------------------------------------------------------------------------- meta


def on_meta():
    features, labels, logits = batch("meta")
    rows, row_labels = torch.randn(9, 5, device="meta"), torch.zeros(9, dtype=torch.int64, device="meta")
    anchors, counts = torch.randn(4, 5, device="meta"), torch.ones(4, dtype=torch.int64, device="meta")
    distances = torch.zeros(2, 16, 16, device="meta")
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    yield "class_anchors", lambda: ck.class_anchors(features[0], labels, 4)[0], (4, 5)
    yield "fuse_anchors", lambda: ck.fuse_anchors(anchors, counts, anchors, counts), (4, 5)
    yield "pixel_anchor_loss", lambda: ck.pixel_anchor_loss(features[0], labels, anchors), ()
    yield "error_map", lambda: ck.error_map(logits, labels), (2, 16, 16)
    yield "edge_distance", lambda: ck.edge_distance(labels), (2, 16, 16)
    yield "distance_transform", lambda: ck.distance_transform(labels), (2, 16, 16)
    yield (
        "select_nearest",
        lambda: ck.select_nearest(labels, distances.double(), 0.5, num_classes=4, seed=seed),
        (2, 16, 16),
    )
    yield "bane_negatives", lambda: ck.bane_negatives(logits, labels, size=(4, 4)), (2, 4, 4)
    yield "contextrast_loss", lambda: ck.contextrast_loss(features, labels, logits, num_classes=4), ()
    yield "info_nce", lambda: ck.info_nce(rows, row_labels), ()
    yield "info_nce, columns", lambda: ck.info_nce(rows, row_labels, rows, row_labels, reduction="none"), (9,)


@pytest.mark.parametrize("name", [name for name, *_ in on_meta()])
def test_meta_tensors_give_shapes(name):
    [(function, shape)] = [row[1:] for row in on_meta() if row[0] == name]
    result = function()
    assert result.device.type == "meta"
    assert result.shape == shape
    with torch.autocast("cpu", torch.bfloat16):
        assert function().shape == shape


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_run_forward_and_backward_on_meta(name):
    features, labels, logits = batch("meta")
    leaves = [x.requires_grad_() for x in (*features, logits)]
    loss = LOSSES[name]()
    loss(features, labels, logits)
    loss(features, labels, logits).backward()
    assert leaves[0].grad.shape == leaves[0].shape


def test_a_model_on_meta_can_be_attached(capsys):
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Conv2d(a, b, 3, 4, 1) for a, b in ((3, 8), (8, 12), (12, 4))))
    tap = ck.attach(model, dim=5)
    assert "0      4       8         64 x 80  NCHW" in capsys.readouterr().out
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(2, 3, 64, 64, device="meta"))
        features = tap.features()
    assert [(x.shape, x.device.type) for x in features] == [((2, 5, 16, 16), "meta"), ((2, 5, 4, 4), "meta")]
