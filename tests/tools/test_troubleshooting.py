"""docs/troubleshooting.md: every row of its table is reproduced."""

import math
import pathlib
import re

import pytest
import torch
from torch import nn

import contextrast_kernels as ck

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()
N, LAYERS = 4, ((16, 16), (8, 8), (4, 4), (2, 2))


def quadrants(H=64, W=64):
    """Labels of four classes, one a quadrant."""
    rows, columns = torch.arange(H)[:, None] // (H // 2), torch.arange(W)[None] // (W // 2)
    return (2 * rows + columns).repeat(2, 1, 1)


def noise(seed=0, D=6):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, D, *size, generator=generator, requires_grad=True) for size in LAYERS]


def mistaken(labels, by=1, share=0.3):
    """Predictions that take some pixels of every class for another one of the labels."""
    wrong = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) < share
    return torch.where(wrong, (labels + by) % N, labels)


def run(features, labels, predictions, **options):
    criterion = ck.ContextrastLoss(options.pop("num_classes", N), **options)
    loss = criterion(features, labels, predictions)
    if loss.requires_grad:
        loss.backward()
    return loss.item(), criterion.last


def test_the_healthy_case_matches_no_row_of_the_table():
    features, labels = noise(), quadrants()
    loss, last = run(features, labels, mistaken(labels))
    assert loss > 1 and last.keys() == {"loss", "classes", "positives", "negatives", "errors"}
    assert (last["loss"] > 0).all() and (last["classes"] == 4).all()
    assert (last["negatives"] > 0).all() and (last["negatives"] <= last["errors"]).all()
    assert (last["errors"] < 0.8 * last["positives"]).all()
    assert all(x.grad.abs().max() > 0 for x in features)


def row_1():
    labels = quadrants() + 7  # such as labelIds
    loss, last = run(noise(), labels, mistaken(quadrants()))
    assert loss == 0 and not last["positives"].any()
    with pytest.raises(ValueError, match=r"labels: expected values in 0\.\.3 or ignore_index 255, got 7"):
        run(noise(), labels, mistaken(quadrants()), debug=True)
    assert run(noise(), labels - 7, mistaken(quadrants()))[0] > 0


def row_2():
    labels = quadrants()
    loss, last = run(noise(), labels, labels)
    assert loss == 0 and (last["positives"] > 0).all() and not last["errors"].any()
    assert run(noise(), labels, labels, base_rate=0.5)[0] > 0


def row_3():
    labels = quadrants() // 2  # classes 0 and 1 alone
    predictions = torch.where(mistaken(labels, share=0.4) != labels, labels + 2, labels)
    loss, last = run(noise(), labels, predictions)
    assert loss == 0 and (last["errors"] > 0).all() and (last["negatives"] > 0).all() and (last["classes"] == 2).all()
    assert run(noise(), labels, predictions, base_rate=0.5)[0] > 0


def row_4():
    labels = torch.zeros_like(quadrants())
    for base_rate in (0.0, 1.0):
        loss, last = run(noise(), labels, mistaken(labels), base_rate=base_rate)
        assert loss == 0 and (last["classes"] == 1).all() and (last["negatives"] > 0).all()


def row_5():
    labels = quadrants()
    loss, last = run(noise(), labels, mistaken(labels), layer_weights=(0, 0, 0, 0))
    assert loss == 0 and (last["loss"] > 0).all()


def row_6():
    labels = quadrants()
    for equal in (torch.zeros(1, 6, 1, 1), torch.arange(6.0).view(1, 6, 1, 1)):
        features = [equal.expand(2, 6, *size).clone().requires_grad_() for size in LAYERS]
        _, last = run(features, labels, mistaken(labels))
        for i, size in enumerate(LAYERS):
            chosen = ck.bane_negatives(mistaken(labels), labels, num_classes=N, size=size)
            expected = sum(math.log(1 + (chosen == n).sum().item()) for n in range(N)) / N
            assert last["loss"][i].item() == pytest.approx(expected, rel=1e-5)
            assert features[i].grad.abs().max() < 1e-6


def row_7():
    encoder, heads = (nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in LAYERS) for _ in range(2))
    encoder.requires_grad_(False)
    labels, x = quadrants(), [layer.detach() for layer in noise()]
    for parameters, moves in (((), False), (heads.parameters(), True)):
        optimizer = torch.optim.SGD([*encoder.parameters(), *parameters], lr=0.1)
        criterion = ck.ContextrastLoss(N).eval()  # the same draws at every step
        seen = []
        for _ in range(3):
            optimizer.zero_grad()
            criterion([h(e(f)) for h, e, f in zip(heads, encoder, x)], labels, mistaken(labels)).backward()
            optimizer.step()
            seen.append(criterion.last["loss"])
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in heads.parameters() if p.ndim > 1)
        assert torch.equal(seen[0], seen[2]) is not moves


def row_8():
    labels, criterion = quadrants(), ck.ContextrastLoss(N)
    loss = criterion([x.detach() for x in noise()], labels, mistaken(labels))
    assert not loss.requires_grad and (criterion.last["loss"] > 0).all() and (criterion.last["negatives"] > 0).all()
    with torch.no_grad():
        assert not criterion(noise(), labels, mistaken(labels)).requires_grad


def row_9():
    labels, features = quadrants(), noise()
    losses, errors, negatives = [], [], []
    for share in (0.4, 0.1, 0.01, 0.0005):
        loss, last = run(features, labels, mistaken(labels, share=share))
        losses.append(loss)
        errors.append(last["errors"].sum().item())
        negatives.append(last["negatives"].sum().item())
    for values in (losses, errors, negatives):
        assert values == sorted(values, reverse=True) and values[-1] < 0.1 * values[0]


def row_10():
    labels = quadrants()
    predictions = labels.clone()
    predictions[:, 4:60:8, 4:60] = (labels[:, 4:60:8, 4:60] + 1) % N  # rows that stride 4 meets, and 8 to 32 do not
    _, last = run(noise(), labels, predictions)
    assert last["errors"][0] > 0 and last["errors"][-1] == 0 and last["loss"][-1] == 0


def row_11():
    labels = quadrants()
    for predictions in ((labels + 1) % N, labels.flip(1, 2), torch.where(labels == 3, 0, labels + 1)):
        loss, last = run(noise(), labels, predictions)
        assert loss > 1 and (last["errors"] >= 0.9 * last["positives"]).all()
    transposed = labels.clone()
    transposed[:, :, :16] = 2  # not symmetric
    assert (run(noise(), labels, transposed.mT)[1]["errors"] > 0).all()


def row_12():
    labels, features = quadrants(), noise()
    for broken in (math.nan, math.inf):
        with torch.no_grad():
            features[1][0, 0, 2, 2] = broken
        loss, last = run(features, labels, mistaken(labels))
        assert math.isnan(loss) and last["loss"].isnan().tolist() == [False, True, False, False]
        with pytest.raises(ValueError, match=r"features\[1\]: expected finite values .* at 1 of 128 pixels"):
            run(features, labels, mistaken(labels), debug=True)


def row_13():
    labels, features = quadrants(), noise()
    with torch.no_grad():
        features[3][0, 0, 1, 1] = math.nan
    loss, last = run(features, labels, mistaken(labels))
    assert math.isnan(loss) and last["loss"].isnan().all()


ROWS = [row_1, row_2, row_3, row_4, row_5, row_6, row_7, row_8, row_9, row_10, row_11, row_12, row_13]


@pytest.mark.parametrize("produce", ROWS, ids=lambda row: row.__name__)
def test_a_row_of_the_table(produce):
    produce()


def test_every_row_of_the_table_is_produced():
    assert [int(n) for n in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)] == list(range(1, len(ROWS) + 1))


def test_the_names_on_the_page_exist():
    for name in re.findall(r"`ck\.([\w.]+)`", PAGE):
        value = ck
        for part in name.split("."):
            value = getattr(value, part)
    _, last = run(noise(), quadrants(), mistaken(quadrants()))
    named = set(re.findall(r"`(loss|classes|positives|errors|negatives)`", PAGE))
    assert named == last.keys()
