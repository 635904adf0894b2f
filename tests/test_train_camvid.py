"""The CamVid study: that it goes on where it stopped, compares like with like, and refuses what it cannot use."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import results, train_camvid
from benchmarks.camvid import arms, rows, training
from benchmarks.camvid.rows import Result
from contextrast_kernels.demo import scenes

SETTING = training.Setting("small", 64, iterations=4, batch=2, channels=8, learning_rate=0.05, scales=(1.0, 1.5))


@pytest.fixture(scope="module", autouse=True)
def threads():
    """Images this small gain nothing from a second thread, and lose where it must wait for a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def camvid(tmp_path_factory):
    """A folder in SegNet's layout: frames of coloured rectangles, whose classes they are."""
    root = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (12, 3))
    for split, count in (("train", 5), ("val", 3)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for n in range(count):
            labels = np.full((64, 96), rng.integers(11), np.uint8)
            for _ in range(8):
                y, x = rng.integers(0, 64), rng.integers(0, 96)
                labels[y : y + 24, x : x + 32] = rng.integers(12)
            Image.fromarray(labels).save(root / f"{split}annot" / f"{n}.png")
            image = colours[labels] + rng.integers(-20, 20, (64, 96, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / split / f"{n}.png")
    return root


@pytest.fixture
def study(camvid):
    data = scenes.CamVid(camvid, SETTING.height)
    environment = results.environment() | {"libraries": ""}
    return training.Study(SETTING, data, "plain", scenes.plain, environment)


def call(camvid, out, *arguments):
    """Two arms of four iterations."""
    small = ("--height", "64", "--iterations", "4", "--batch", "2", "--device", "cpu", "--seeds", "0")
    return train_camvid.main(
        ["--root", str(camvid), "--out", str(out), "--arms", "baseline", "bane", *small, *arguments]
    )


def trained(study, arm, folder, stops=()):
    """The row and the weights of a training that is stopped, and taken up by another process, at these iterations."""
    path = folder / f"{arm}.pt"
    for stop in (*stops, None):
        torch.manual_seed(99)  # what another process would have drawn before
        run = training.Training(arms.ARMS[arm], 1, study)
        if path.exists():
            run.resume(path)
        if stop is not None:
            while run.iteration < stop:
                run.step()
            run.save(path)
    row = run.advance(float("inf"), path, lambda done: None)
    return row, run


@pytest.mark.parametrize("arm", ["baseline", "bane", "pixel-contrast-bank", "sampled-bane"])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(study, tmp_path, arm):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    row, run = trained(study, arm, tmp_path / "whole")
    again, parts = trained(study, arm, tmp_path / "parts", stops=(1, 3))
    assert row == again and row.status == "ok"
    assert torch.equal(run.losses, parts.losses) and run.losses[:, 0].all()
    assert bool(run.losses[:, 1].any()) == (arm != "baseline")
    for name, value in run.network.state_dict().items():
        assert torch.equal(value, parts.network.state_dict()[name]), name


def test_a_training_of_dropout_draws_on_where_it_stopped(study, tmp_path, monkeypatch):
    class Dropped(training.NETWORKS["small"]):
        def logits(self, images):
            return torch.dropout(super().logits(images), 0.5, self.training)

    monkeypatch.setitem(training.NETWORKS, "small", Dropped)
    whole, _ = trained(study, "baseline", tmp_path)
    (tmp_path / "baseline.pt").unlink(missing_ok=True)
    parts, _ = trained(study, "baseline", tmp_path, stops=(2,))
    assert whole == parts


def test_all_arms_begin_with_the_same_weights_and_see_the_same_images(study, monkeypatch):
    weights, seen = {}, {}
    for name in ("baseline", "bane", "pixel-contrast-bank"):
        run = training.Training(arms.ARMS[name], 3, study)
        weights[name] = {key: value.clone() for key, value in run.network.network.state_dict().items()}
        images = []
        run.network.register_forward_pre_hook(lambda _, inputs, images=images: images.append(inputs[0].clone()))
        for _ in range(3):
            run.step()
        seen[name] = images
    assert not torch.equal(seen["bane"][0], seen["bane"][1])
    for name in ("bane", "pixel-contrast-bank"):
        assert all(torch.equal(weights["baseline"][key], value) for key, value in weights[name].items())
        assert all(map(torch.equal, seen["baseline"], seen[name]))
    other = training.Training(arms.ARMS["baseline"], 4, study)
    assert not torch.equal(other.network.classify.weight, weights["baseline"]["classify.weight"])


def test_every_frame_comes_once_before_any_comes_again():
    stream = torch.cat([training.frames(5, 3, 7, iteration) for iteration in range(10)]).tolist()
    epochs = [stream[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert stream[:3] != training.frames(5, 3, 8, 0).tolist()


def rows_in(out):
    return results.read(out / rows.FILE, Result)


def test_the_study_stops_in_time_goes_on_and_repeats_nothing(camvid, tmp_path, capsys, monkeypatch):
    assert call(camvid, tmp_path, "--minutes", "0") == 0
    printed = capsys.readouterr().out
    assert "left: baseline 0; bane 0" in printed and printed.endswith("2 rows left\n")
    assert "go on with: python -m benchmarks.train_camvid --root" in printed and rows_in(tmp_path) == []

    # The time is over in the third iteration of the second arm.
    step, steps = training.Training.step, []
    now = training.time.monotonic()

    def counted(run):
        steps.append((run.arm.name, run.iteration))
        return step(run)

    monkeypatch.setattr(training.Training, "step", counted)
    monkeypatch.setattr(training.time, "monotonic", lambda: now + 3600 * (len(steps) == 6))
    assert call(camvid, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "bane, seed 0: stopped after 2 of 4 iterations" in printed and "left: bane 0, begun" in printed
    assert [row.arm for row in rows_in(tmp_path)] == ["baseline"] and len(list(tmp_path.glob("*.pt"))) == 1

    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    steps.clear()
    assert call(camvid, tmp_path) == 0
    assert capsys.readouterr().out.endswith("0 trainings failed; complete\n")
    assert steps == [("bane", 2), ("bane", 3)] and not list(tmp_path.glob("*.pt"))
    baseline, bane = rows_in(tmp_path)
    assert (bane.protocol, bane.network, bane.height, bane.width) == ("shortened", "small", 64, 96)
    assert baseline.contrast is None and bane.contrast > 0 and bane.median_step_ms is None
    assert len(bane.iou_per_class.split()) == 11

    steps.clear()
    assert call(camvid, tmp_path) == 0
    assert not steps and rows_in(tmp_path) == [baseline, bane]
