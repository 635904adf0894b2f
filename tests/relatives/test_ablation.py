"""The paper's ablation needs one argument for each cell: Contextrast and the relatives take each other's samplers."""

import literal
import literal_relatives
import numpy as np
import pytest
import torch
from inputs import leaves
from test_relatives import CLOSE, LOSSES, SIZES, N, at_layer, batch

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference", "one_thread")


def everywhere(labels, predictions, num_classes, seed, stream):
    return torch.ones_like(labels, dtype=torch.bool)


BASE = ck.Sampler("common-count", 40, 5, 2)


@pytest.mark.parametrize("negatives", ["none", "semi-hard", "bane"])
def test_base_sampler_draws_the_pixels_of_the_relatives_sampler(negatives):
    """The cells of the paper's ablation are one argument each: CCL alone, + semi-hard, + BANE, on the same base."""
    layers, labels, logits = batch()
    criterion = ck.ContextrastLoss(N, negatives=negatives, base_sampler=BASE, seed=3)
    value = criterion(layers, labels, logits)
    arrays, y = [x.numpy() for x in layers], labels.numpy()
    expected, counts = 0.0, []
    anchors = literal.layer_anchors(arrays, y, N)
    for i, size in enumerate(SIZES):
        targets, predicted = at_layer(labels, logits, size)
        chosen = literal_relatives.sample("common-count", targets, predicted, N, 3, 1 + i, 40, 5, 2)
        base = np.zeros(targets.shape, dtype=bool)
        base[tuple(np.array(sorted(chosen)).T)] = True
        hard = literal.bane_negatives(logits.numpy(), y, N, size, 0.5, negatives, seed=3)
        layer = literal.pixel_anchor_loss(arrays[i], targets, anchors[i], hard, base, ignore_index=-1)
        expected += (1.0, 0.7, 0.4, 0.1)[i] * layer
        counts.append(int(((hard >= 0) | base).sum()))
    assert value.item() == pytest.approx(expected, **CLOSE)
    assert criterion.last["negatives"].tolist() == counts


def test_a_sampler_of_every_pixel_is_a_base_rate_of_one():
    """A sampler may draw ignored pixels, which have no effect on the loss or the report."""
    layers, labels, logits = batch()
    for negatives in ("none", "bane"):
        by_rate, by_sampler = (
            ck.ContextrastLoss(N, negatives=negatives, **base)
            for base in ({"base_rate": 1.0}, {"base_sampler": everywhere})
        )
        assert torch.equal(by_rate(layers, labels, logits), by_sampler(layers, labels, logits))
        assert by_rate.last.keys() == by_sampler.last.keys()
        assert all(torch.equal(by_rate.last[name], by_sampler.last[name]) for name in by_rate.last)


def test_samplers_are_interchangeable():
    """ContrastiveSeg's cells: random pixels, half of them hard, and hard ones from the edges of the error regions."""
    layers, labels, logits = batch()
    halves = (torch.arange(24) >= 12).long().expand(2, 18, 24).contiguous()
    wrong = halves.clone()
    wrong[:, 3:16, 2:22] = 2
    values = {s: LOSSES["pixel"](sampler=s)(layers, halves, wrong).item() for s in ("uniform", "hard-easy", "bane")}
    assert len(set(values.values())) == 3
    for name in ("pixel", "multi-scale"):
        loss = LOSSES[name](sampler=BASE)
        assert torch.equal(
            loss(layers, labels, logits), LOSSES[name](sampler=lambda *inputs: BASE(*inputs))(layers, labels, logits)
        )


def test_a_sampler_above_the_limit_is_thinned_over_all_images():
    """If the pixels were cut off in raster order, the last images and the bottom of the others would be left out."""
    x, _, logits = batch(B=4)
    labels = torch.arange(4).reshape(4, 1, 1).expand(4, 18, 24).contiguous()  # an image, a class
    labels[:, :, ::4] = 255  # at the layer, every second column; these take no place
    loss = LOSSES["pixel"](sampler=everywhere, max_samples=40)
    features = leaves(x)
    loss(features, labels, logits).backward()
    assert loss.last["samples"] == 40
    drawn = features[0].grad.any(1)
    assert drawn.sum() == 40
    assert drawn.flatten(1).any(1).all()
    assert drawn[:, 5:].any()


def test_contextrasts_negatives_are_columns_of_info_nce():
    """Anchors are the rows and pixels the columns. The class that a pixel is a hard negative of is its entry in
    `column_negatives`."""
    (x, *_), labels, logits = batch()
    anchors, counts = ck.class_anchors(x, labels, N)
    hard = ck.bane_negatives(logits, labels, size=SIZES[0], seed=2)
    y = torch.from_numpy(at_layer(labels, logits, SIZES[0])[0])
    pixels = torch.nn.functional.normalize(x, dim=1).movedim(1, -1).flatten(0, 2)
    expected = ck.pixel_anchor_loss(x, labels, anchors, negatives=hard)
    rows = ck.info_nce(anchors, torch.arange(N), pixels, y.flatten(), column_negatives=hard.flatten(), reduction="none")
    assert (rows.sum() / (counts > 0).sum()).item() == pytest.approx(expected.item(), **CLOSE)
