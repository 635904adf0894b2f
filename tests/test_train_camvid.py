"""The CamVid study: that it goes on where it stopped, compares like with like, and refuses what it cannot use."""

import importlib.util
import itertools
import re
import resource
import shutil
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import contextrast_kernels as ck
from benchmarks import report, results, train_camvid
from benchmarks.camvid import arms, page, rows, training
from benchmarks.camvid.networks import NETWORKS, Segmenter
from benchmarks.camvid.rows import Result
from contextrast_kernels import measure
from contextrast_kernels.demo import scenes

pytestmark = pytest.mark.usefixtures("one_thread")
SETTING = training.Setting("small", 64, iterations=4, batch=2, channels=8, learning_rate=0.05, scales=(1.0, 1.5))


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
    augment, _ = scenes.augmentation()
    return training.Study(SETTING, data, "plain" if augment is scenes.plain else "kornia", augment, environment)


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
    monkeypatch.setattr(training, "frames", lambda *_: torch.tensor([0, 1]))
    run = training.Training(arms.ARMS["baseline"], 3, study)
    images = []
    run.network.register_forward_pre_hook(lambda _, inputs: images.append(inputs[0].clone()))
    run.step()
    run.step()
    assert not torch.equal(*images), "the same frames, changed otherwise"
    other = training.Training(arms.ARMS["baseline"], 4, study)
    assert not torch.equal(other.network.classify.weight, weights["baseline"]["classify.weight"])


def test_arms_differ_by_the_weighted_loss_alone(study):
    weightless = replace(arms.ARMS["bane"], weight=0.0)
    ends = []
    for arm in (arms.ARMS["baseline"], weightless, arms.ARMS["bane"], arms.ARMS["ccl"]):
        run = training.Training(arm, 3, study)
        for _ in range(2):
            run.step()
        ends.append(run.network.network.stages[0][0][0].weight.detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2]) and not torch.equal(ends[2], ends[3])


def test_the_optimizer_and_the_weights_are_the_papers(study):
    run = training.Training(arms.ARMS["baseline"], 3, study)
    [group] = run.optimizer.param_groups
    for done in range(4):
        assert group["lr"] == pytest.approx(0.05 * (1 - done / 4) ** 0.9)
        run.step()
    assert group["momentum"] == 0.9 and group["weight_decay"] == 5e-4
    assert {arm.weight for arm in arms.ARMS.values() if arm.name not in ("baseline", "pne")} == {0.1}
    assert arms.ARMS["pne"].weight == 1.3


def test_every_frame_comes_once_before_any_comes_again():
    stream = torch.cat([training.frames(5, 3, 7, iteration) for iteration in range(10)]).tolist()
    epochs = [stream[i : i + 5] for i in range(0, 30, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1
    assert stream[:3] != training.frames(5, 3, 8, 0).tolist()


def test_the_help_counts_the_iterations(capsys):
    with pytest.raises(SystemExit, match="0"):
        train_camvid.main(["--help"])
    text = capsys.readouterr().out
    assert f"All arms and seeds are {len(arms.ARMS) * 3 * 6000} iterations" in text
    assert f"one of their {len(arms.TABLES['components']) * 3 * 1500}\niterations" in text


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
    assert call(camvid, tmp_path, "--pictures") == 0  # of what is trained in this call: nothing
    assert not steps and not list(tmp_path.glob("*.png")) and rows_in(tmp_path) == [baseline, bane]


def test_an_evaluation_that_is_out_of_time_is_begun_anew_and_then_ends(camvid, tmp_path, capsys, monkeypatch):
    evaluate, now, late = training.evaluate, training.time.monotonic(), []
    monkeypatch.setattr(training.time, "monotonic", lambda: now + 3600 * len(late))

    def slow(*arguments):
        late.append(True)
        return evaluate(*arguments)

    monkeypatch.setattr(training, "evaluate", slow)
    assert call(camvid, tmp_path, "--arms", "bane") == 0
    assert "bane, seed 0: stopped after 4 of 4 iterations\nleft: bane 0, begun\n" in capsys.readouterr().out
    assert rows_in(tmp_path) == [] and len(late) == 1
    monkeypatch.setattr(training.time, "monotonic", lambda: now + 3600 * (len(late) - 1))
    assert call(camvid, tmp_path, "--arms", "bane") == 0  # it needs longer than a call may take, and is alone
    [row] = rows_in(tmp_path)
    assert row.status == "ok" and len(late) == 2 and not list(tmp_path.glob("*.pt"))


def test_a_checkpoint_of_other_options_is_not_gone_on_from(camvid, tmp_path, monkeypatch):
    step, now, steps = training.Training.step, training.time.monotonic(), []
    monkeypatch.setattr(training.Training, "step", lambda run: (steps.append(run.iteration), step(run)))
    monkeypatch.setattr(training.time, "monotonic", lambda: now + 3600 * (len(steps) == 2))
    assert call(camvid, tmp_path, "--arms", "bane") == 0 and steps == [0, 1]
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(arms.ARMS, "bane", replace(arms.ARMS["bane"], options={"ratio": 0.4}))
        assert call(camvid, tmp_path, "--arms", "bane") == 0 and steps == [0, 1, 0, 1, 2, 3]


def test_pictures_change_nothing(camvid, study, tmp_path):
    """They run the heads on validation frames; what is trained afterwards must not know."""
    runs = [training.Training(arms.ARMS["bane"], 0, study) for _ in range(2)]
    for run in runs:
        run.step()
    before = {name: value.clone() for name, value in runs[0].network.state_dict().items()}
    assert set(runs[0].pictures()) == {"figure-5", "negatives"}
    assert all(torch.equal(value, before[name]) for name, value in runs[0].network.state_dict().items())
    for run in runs:
        run.step()
    assert torch.equal(runs[0].losses, runs[1].losses)
    assert call(camvid, tmp_path, "--pictures", "--iterations", "1") == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"bane-figure-5.png", "bane-negatives.png"}


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("arm", ["baseline", "bane", "distance-at-full", "sampled-bane", "pixel-contrast-bank"])
def test_a_step_waits_for_nothing(camvid, study, arm, device):
    data = scenes.CamVid(camvid, SETTING.height, device=device)
    run = training.Training(arms.ARMS[arm], 0, replace(study, data=data, augmentation="plain", augment=scenes.plain))
    run.step()  # the first brings seeds to the device
    run.step()
    assert measure.syncs(run.step, torch.device(device)) == 0
    assert run.iteration == 3 and run.losses[:3, 0].all()


@pytest.mark.parametrize("before", [False, True])
def test_cudnn_tries_its_algorithms_while_shapes_are_fixed(study, tmp_path, monkeypatch, before):
    seen = []

    def step(run):
        seen.append(torch.backends.cudnn.benchmark)
        run.iteration += 1
        if run.iteration == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Training, "step", step)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with pytest.raises(KeyboardInterrupt):
        training.Training(arms.ARMS["baseline"], 0, study).advance(float("inf"), tmp_path / "a.pt", lambda done: None)
    assert seen == [True] * 3 and torch.backends.cudnn.benchmark == before


@pytest.mark.gpu
def test_on_a_gpu_a_training_is_stopped_and_ends_with_a_time(camvid, tmp_path, monkeypatch):
    def on_gpu(*arguments):
        return call(camvid, tmp_path, "--arms", "bane", "--device", "cuda", "--network", "small", *arguments)

    step, now = training.Training.step, training.time.monotonic()
    done = []
    monkeypatch.setattr(training.Training, "step", lambda run: (done.append(run.iteration), step(run)))
    monkeypatch.setattr(training.time, "monotonic", lambda: now + 3600 * (len(done) == 2))
    assert on_gpu() == 0 and rows_in(tmp_path) == []
    done.append(None)
    assert on_gpu() == 0 and done == [0, 1, None, 2, 3]
    [row] = rows_in(tmp_path)
    assert row.status == "ok" and row.median_step_ms > 0 and row.precision == "bfloat16 autocast" and row.driver


# ------------------------------------------------------------------------------------------------- what it cannot use


def test_a_training_that_fails_or_diverges_stops_no_other(camvid, tmp_path, capsys, monkeypatch):
    step = training.Training.step

    def broken(run):
        if run.arm.name == "baseline":
            raise torch.OutOfMemoryError("out of\nmemory")
        step(run)
        run.losses[2:, 1] = float("nan")

    monkeypatch.setattr(training.Training, "step", broken)
    assert call(camvid, tmp_path) == 1
    printed = capsys.readouterr().out
    assert "baseline, seed 0 failed: OutOfMemoryError: out of\nbane, seed 0: diverged: " in printed
    assert "left: baseline 0, failed\n" in printed
    assert printed.endswith("1 trainings failed, to be tried again; 1 rows left\n")
    [row] = rows_in(tmp_path)
    assert (row.arm, row.status, row.miou) == ("bane", "diverged: the loss is not finite from iteration 3 on", None)
    assert "1 diverged" in page.page([row], [])
    more = ("--arms", "baseline", "bane", "ccl")
    assert call(camvid, tmp_path, *more) == 1  # what failed comes last
    printed = capsys.readouterr().out
    assert printed.index("ccl, seed 0: diverged: ") < printed.index("baseline, seed 0 failed: ")
    monkeypatch.undo()
    assert call(camvid, tmp_path, *more) == 0  # what failed is tried again, what diverged is not
    ended = [("bane", False), ("ccl", False), ("baseline", True)]
    assert [(row.arm, row.status == "ok") for row in rows_in(tmp_path)] == ended
    assert not list(tmp_path.glob("*.failed"))


def test_weights_that_broke_in_the_last_step_are_a_divergence(camvid, tmp_path, monkeypatch):
    """The losses were finite, and the scores of such weights would be numbers, too, but for A and U."""
    step = training.Training.step

    def broken(run):
        step(run)
        if run.iteration == 4:
            next(run.network.parameters()).data.fill_(float("nan"))

    monkeypatch.setattr(training.Training, "step", broken)
    assert call(camvid, tmp_path, "--arms", "baseline") == 0
    [row] = rows_in(tmp_path)
    assert row.status.startswith("diverged: no finite alignment, uniformity") and row.miou is None


def test_two_calls_do_not_train_into_one_folder(camvid, tmp_path, capsys, monkeypatch):
    """The second is refused while the first trains: in its step."""
    step = training.Training.step

    def twice(run):
        for folders in ([], ["--out", str(tmp_path / "other"), "--keep", str(tmp_path)]):
            with pytest.raises(SystemExit, match="2"):
                call(camvid, tmp_path, *folders)
        step(run)

    monkeypatch.setattr(training.Training, "step", twice)
    assert call(camvid, tmp_path, "--iterations", "1", "--arms", "baseline") == 0
    printed = capsys.readouterr().err.splitlines()
    assert (
        sum(f"{tmp_path / train_camvid.LOCK}: another call trains here; wait for it" in line for line in printed) == 2
    )
    assert len(rows_in(tmp_path)) == 1


def test_ctrl_c_keeps_the_last_tenth(camvid, tmp_path, capsys, monkeypatch):
    step = training.Training.step

    def interrupted(run):
        if run.iteration == 3:
            raise KeyboardInterrupt
        step(run)

    monkeypatch.setattr(training.Training, "step", interrupted)
    assert call(camvid, tmp_path) == 130
    printed = capsys.readouterr().out
    assert "baseline, seed 0: interrupted; what is kept is the last tenth that was finished\n" in printed
    assert "left: baseline 0, begun; bane 0\n" in printed
    monkeypatch.setattr(training.Training, "step", lambda run: (_ for _ in ()).throw(KeyboardInterrupt))
    assert call(camvid, tmp_path, "--arms", "bane") == 130
    assert "bane, seed 0: interrupted; nothing of it is kept" in capsys.readouterr().out
    monkeypatch.setattr(training.Training, "step", step)
    assert call(camvid, tmp_path) == 0 and len(rows_in(tmp_path)) == 2


@pytest.mark.parametrize("most", [2000, 20000], ids=["row", "checkpoint"])
def test_a_full_disk_is_a_sentence_and_loses_nothing(camvid, tmp_path, capsys, monkeypatch, most):
    """Files above a size cannot be written, as where the disk is full: rows, or checkpoints alone."""
    assert call(camvid, tmp_path, "--arms", "baseline") == 0
    if most < 20000:
        results.write(tmp_path / rows.FILE, [replace(rows_in(tmp_path)[0], seed=seed) for seed in range(1, 9)], Result)
        monkeypatch.setattr(training.Training, "save", lambda run, path: None)
    before = (tmp_path / rows.FILE).read_text()
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, unlimited[1]))
    try:
        status = call(camvid, tmp_path, "--arms", "bane")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    printed = capsys.readouterr().out
    assert status == 1 and printed.endswith("0 trainings failed; 1 rows left\n")
    assert "bane, seed 0: " + ("[Errno 27]" if most < 20000 else "torch could not write ") in printed
    assert (tmp_path / rows.FILE).read_text() == before
    monkeypatch.undo()
    assert call(camvid, tmp_path, "--arms", "bane") == 0 and rows_in(tmp_path)[-1].arm == "bane"


def test_without_tqdm_there_is_no_bar(camvid, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    found = importlib.util.find_spec("benchmarks.train_camvid")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    monkeypatch.setattr(train_camvid, "main", module.main)
    assert call(camvid, tmp_path, "--arms", "bane", "--iterations", "1") == 0 and len(rows_in(tmp_path)) == 1


@pytest.mark.parametrize("commit", ["", "0123456"])
def test_rows_that_will_name_no_commit_are_announced(camvid, tmp_path, capsys, monkeypatch, commit):
    monkeypatch.setattr(results, "commit", lambda: commit)
    assert call(camvid, tmp_path, "--minutes", "0") == 0
    assert ("will name no commit" in capsys.readouterr().err) == (not commit)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", "bne"], "--arms: expected one of the tables components, relatives, "),
        (["--arms", "bne"], "baseline, ccl, semi-hard, bane, "),
        (["--root", "/nowhere"], "no folder /nowhere: expected CamVid's"),
        (["--seeds", "0", "0"], "--seeds: expected different numbers"),
        (["--seeds", "-1"], "--seeds: expected different numbers"),
        (["--minutes", "nan"], "--minutes: expected 0 to 100000"),
        (["--height", "31"], "--height: expected 32 to 720, got 31"),
        (["--iterations", "0"], "--iterations: expected 1 to 1000000, got 0"),
        (["--network", "unet"], "invalid choice: 'unet'"),
        (["--keep", __file__], "--keep: expected a folder, got the file"),
        (["--keep", f"{__file__}/folder"], "Not a directory"),
    ],
)
def test_bad_arguments_are_one_sentence(camvid, tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit, match="2"):
        call(camvid, tmp_path / "out", *arguments)
    assert sentence in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.glob("out/*"))


def few_classes(root):
    for path in (root / "valannot").iterdir():
        Image.fromarray(np.repeat(np.uint8([[0, 3, 11]]), 32, 1).repeat(64, 0)).save(path)


def bad_label(root):
    Image.fromarray(np.full((64, 96), 12, np.uint8)).save(root / "valannot" / "1.png")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (lambda root: shutil.rmtree(root / "valannot"), "valannot: SegNet's layout has train"),
        (lambda root: [path.unlink() for path in (root / "train").iterdir()], "no .png or .jpg image in"),
        (few_classes, "--root: expected validation frames of at least 6 classes, got 2"),
        (bad_label, "1.png holds the value 12; expected 0..10 for the classes and 11 for void"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named(camvid, tmp_path, capsys, harm, sentence):
    root = shutil.copytree(camvid, tmp_path / "camvid")
    harm(root)
    with pytest.raises(SystemExit, match="2"):
        call(root, tmp_path / "out")
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_damaged_checkpoint_and_a_row_half_written_are_named(camvid, tmp_path, capsys, study):
    assert call(camvid, tmp_path, "--arms", "bane") == 0
    [row] = rows_in(tmp_path)
    text = (tmp_path / rows.FILE).read_text()
    for broken, sentence in (
        (text[:-40], "line 2: expected"),
        (text.replace(f"{row.miou:.5g}", "", 1), "expected a finite miou of a finished training: take the row out"),
        (text.replace("shortened", "full"), "protocol: expected full"),
        (text.replace(",bane,", ",", 1).replace("bane,", ","), "arm: expected one of baseline, ccl, "),
        ("", "expected a line of columns, got an empty file: delete it."),
    ):
        (tmp_path / rows.FILE).write_text(broken)
        with pytest.raises(SystemExit, match="2"):
            call(camvid, tmp_path)
        assert sentence in capsys.readouterr().err.splitlines()[-1] and (tmp_path / rows.FILE).read_text() == broken

    (tmp_path / rows.FILE).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.time, "monotonic", iter([0, 0, 0, 0, 1, *[1e9] * 9]).__next__)
        call(camvid, tmp_path, "--arms", "bane")
    [checkpoint] = tmp_path.glob("*.pt")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    capsys.readouterr()
    assert call(camvid, tmp_path, "--arms", "bane") == 1
    assert f"CheckpointError: cannot go on from {checkpoint} (" in capsys.readouterr().out


def test_frames_too_narrow_for_the_network_are_refused(camvid, tmp_path, capsys):
    root = shutil.copytree(camvid, tmp_path / "camvid")
    for path in root.rglob("*.png"):
        Image.open(path).crop((0, 0, 30, 64)).save(path)
    with pytest.raises(SystemExit, match="2"):
        call(root, tmp_path / "out")
    assert "expected frames of at least 32 x 32 px, got 64 x 30" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "small"])
def test_a_network_whose_library_is_missing_is_a_sentence(camvid, tmp_path, capsys, monkeypatch, name):
    library = "timm" if name.startswith("hrnet") else "torchvision"
    for module in (library, *(module for module in sys.modules if module.startswith(f"{library}."))):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit, match="2"):
        call(camvid, tmp_path, "--network", name)
    assert f"{name} needs {library} (" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("error", [RuntimeError, OSError])
@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_library_built_for_another_torch_is_a_sentence(camvid, tmp_path, capsys, monkeypatch, library, error):
    """torchvision raises a RuntimeError of several lines, or an OSError of its shared object."""
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text(f"raise {error.__name__}('no operator nms\\nof many')")
    for module in [module for module in sys.modules if module.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    assert call(camvid, tmp_path / "small", "--minutes", "0") == 0, "no other network needs it"
    network = "hrnet_w18" if library == "timm" else "deeplabv3_resnet50"
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        call(camvid, tmp_path / "out", "--network", network)
    [said] = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"{network} needs {library} (no operator nms): install the one that fits torch" in said


@pytest.mark.parametrize(("name", "library"), [("hrnet_w18", "timm"), ("deeplabv3_resnet50", "torchvision")])
def test_the_papers_networks_are_trained(camvid, tmp_path, name, library):
    pytest.importorskip(library, reason=f"{library} is not installed")
    assert call(camvid, tmp_path, "--arms", "bane", "--network", name, "--iterations", "1") == 0
    [row] = rows_in(tmp_path)
    assert row.network == name and row.status == "ok"


# ------------------------------------------------------------------------------------------------------ arms and report


def test_every_arm_is_a_loss_and_in_a_table():
    assert {name for table in arms.TABLES.values() for name in table} == set(arms.ARMS)
    for arm in arms.ARMS.values():
        assert arm.against in arms.ARMS and (arm.build(11, 8, 0, "cuda") is None) == (arm.name == "baseline")
        assert arm.build(11, 8, 0, "cpu") is None or arm.text
    groups = arms.chosen(["components", "relatives", "bane", "ratio-10"])
    assert [len(group) for group in groups] == [4, 5, 0, 1]


PAPERS = {
    **{
        "layer_weights": (1.0, 0.7, 0.4, 0.1),
        "temperature": 0.1,
        "fusion_weight": 0.7,
        "negatives": "bane",
        "ratio": 0.5,
    },
    **{"base_rate": 0.0, "base_sampler": None, "distance_at": "layer"},
    **{"normalize": True, "normalize_anchors": False, "detach_anchors": False},
}
OF_MS_CS = ck.Sampler("common-count", 10000, 2500)
CCL = {"negatives": "none", "base_rate": 1.0}
BUILT = {
    "bane": {},
    "ccl": CCL,
    "semi-hard": {"negatives": "semi-hard"},
    "sampled-ccl": {"negatives": "none", "base_sampler": OF_MS_CS},
    "sampled-semi-hard": {"negatives": "semi-hard", "base_sampler": OF_MS_CS},
    "sampled-bane": {"base_sampler": OF_MS_CS},
    **{f"fusion-{weight:g}": CCL | {"fusion_weight": weight} for weight in (0.0, 0.3, 0.5, 1.0)},
    **{f"ratio-{percent}": {"ratio": percent / 100} for percent in (10, 30, 70, 100)},
    "normalize-anchors": {"normalize_anchors": True},
    "base-rate-0.01": {"base_rate": 0.01},
    "base-rate-0.1": {"base_rate": 0.1},
    "temperature-0.07": {"temperature": 0.07},
    "weights-reversed": {"layer_weights": (0.1, 0.4, 0.7, 1.0)},
    "detach-anchors": {"detach_anchors": True},
    "distance-at-full": {"distance_at": "full"},
}
"""Of each arm of the paper's loss, what is not as in PAPERS."""
OF_CONTRASTIVE_SEG = {"temperature": 0.07, "mining": None, "factor": 1.0, "layer": 0}
RELATIVES = {
    "pixel-contrast": (ck.PixelContrastLoss, 0.1, OF_CONTRASTIVE_SEG, None),
    "pixel-contrast-bank": (ck.PixelContrastLoss, 0.1, OF_CONTRASTIVE_SEG | {"bank_pixels": 10}, (5000, 5000)),
    "multi-scale": (
        *(ck.MultiScaleContrastLoss, 0.1),
        {
            "temperature": 0.1,
            "layer_weights": (1.0, 0.7, 0.4, 0.1),
            "cross_weights": (1.0, 1.0),
            "detach_deepest": False,
        },
        None,
    ),
    "region-contrast": (ck.RegionContrastLoss, 0.1, {"temperature": 0.2, "regions": "labels"}, (0, 367)),
    "pne": (ck.PNELoss, 1.3, {"temperature": 1.0, "set_size": 100, "max_hard": 199, "max_samples": 4096}, None),
}
"""Kind, weight, attributes, and the places of the bank."""


def test_every_arm_trains_what_its_name_says():
    assert {*BUILT, *RELATIVES, "baseline"} == set(arms.ARMS)
    for name, changes in BUILT.items():
        for device in ("cuda", "cpu"):
            options = vars(arms.ARMS[name].build(11, 8, 0, device).options)
            assert {key: options[key] for key in PAPERS} == PAPERS | changes, name
        assert arms.ARMS[name].weight == 0.1, name
    for name, (kind, weight, attributes, places) in RELATIVES.items():
        loss = arms.ARMS[name].build(11, 8, 0, "cuda")
        assert type(loss) is kind and arms.ARMS[name].weight == weight, name
        assert {key: getattr(loss, key) for key in attributes} == attributes, name
        assert (loss.bank.lengths if places else getattr(loss, "bank", None)) == places, name
    assert all(one != other for one, other in itertools.combinations(BUILT.values(), 2))


def test_the_full_protocol_is_the_papers():
    paper = {
        "height": 360,
        "iterations": 6000,
        "batch": 16,
        "scales": (0.75, 1.0, 1.25, 1.5, 1.75, 2.0),
        "momentum": 0.9,
    }
    open_there = {"network": "hrnet_w18", "channels": 256, "learning_rate": 0.01, "weight_decay": 5e-4, "power": 0.9}
    assert vars(training.FULL) == paper | open_there


def test_scores_are_of_whole_frames_at_any_size(study):
    """360 rows are no multiple of 32: what pads them for the network must not count."""
    network = training.Training(arms.ARMS["baseline"], 0, study).network.eval()
    images, labels = (whole[:2, ..., :50, :70] for whole in study.data.validation)
    data = SimpleNamespace(classes=study.data.classes, validation=(images, labels))
    scores = training.evaluate(network, data, (1.0,))
    with torch.no_grad():
        logits = network(training.padded(images, 0.0))[..., :50, :70]
    expected = ck.metrics.ConfusionMatrix(11)
    expected.update(logits, labels)
    assert scores["miou"] == expected.compute()["miou"].item()
    assert expected.counts.sum() == (labels < 11).sum()


class Lopsided(Segmenter):
    """One convolution, whose mirror image is another."""

    layers = ()

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Conv2d(3, 11, 3, padding=1)
        torch.nn.init.normal_(self.last.weight, generator=torch.Generator().manual_seed(0))

    @property
    def classify(self):
        return self.last

    def logits(self, images):
        return self.last(images)


@pytest.fixture
def padded_frames(study):
    """Two frames of 50 x 70 px, which the network sees as 64 x 96, with their labels."""
    images, labels = (whole[:2, ..., :50, :70] for whole in study.data.validation)
    return SimpleNamespace(classes=study.data.classes, validation=(images, labels))


def test_the_multi_scale_score_is_of_the_mean_over_scales_and_mirror_images(padded_frames):
    network, expected = Lopsided().eval(), ck.metrics.ConfusionMatrix(11)
    parts = {}
    with torch.no_grad():
        for image, label in zip(*padded_frames.validation):
            for scale, (h, w) in ((0.75, (38, 52)), (1.5, (75, 105))):
                scaled = F.interpolate(image[None], (h, w), mode="bilinear", antialias=scale < 1)
                for mirrored in (False, True):
                    frame = torch.zeros(1, 3, -(-h // 32) * 32, -(-w // 32) * 32)
                    frame[..., :h, :w] = scaled.flip(3) if mirrored else scaled
                    logits = network(frame)[..., :h, :w]
                    logits = F.interpolate(logits.flip(3) if mirrored else logits, (50, 70), mode="bilinear")
                    parts[scale, mirrored] = logits.softmax(1)
            expected.update(sum(parts.values()) / 4, label[None])
    scores = training.evaluate(network, padded_frames, (0.75, 1.5))
    assert scores["miou_multi_scale"] == pytest.approx(expected.compute()["miou"].item(), rel=1e-5)
    assert scores["miou"] != pytest.approx(scores["miou_multi_scale"], rel=1e-2)


def test_boundary_scores_are_the_metrics_of_one_forward(padded_frames):
    network, (images, labels) = Lopsided().eval(), padded_frames.validation
    scores = training.evaluate(network, padded_frames, (1.0,))
    metrics = {
        "trimap_miou_{}px": ck.metrics.TrimapIoU(11, (5, 7, 10)),
        "boundary_miou_{}px": ck.metrics.BoundaryIoU(11, (5, 7, 10)),
    }
    with torch.no_grad():
        logits = network(training.padded(images, 0.0))[..., :50, :70]
    for key, metric in metrics.items():
        metric.update(logits, labels)
        for r in (5, 7, 10):
            name = f"{key.partition('_')[0]}_{r}"
            assert scores[name] == metric.compute()[key.format(r)].item(), name
    assert len({scores[f"{kind}_{r}"] for kind in ("trimap", "boundary") for r in (5, 7, 10)}) == 6


def test_a_and_u_are_of_the_frame_without_its_padding(padded_frames):
    """U alone: A draws its pixels by their place in the frame, which the padding changes."""
    network, (images, labels) = Lopsided().eval(), padded_frames.validation
    expected = ck.metrics.AlignmentUniformity(11, (3, 5))
    expected.update((images - 0.45) / 0.25, labels)  # what goes into the last convolution
    scores = training.evaluate(network, padded_frames, (1.0,))
    for name in ("uniformity", "uniformity_3", "uniformity_5"):
        assert scores[name] == pytest.approx(expected.compute()[name].item(), rel=1e-4), name


def test_half_precision_is_that_of_the_network_and_not_of_its_enlarged_logits(study, monkeypatch):
    """Rounded to half precision, logits tie, and their largest is the first."""
    monkeypatch.setattr(training, "mixed_precision", lambda device: torch.autocast(device.type, torch.bfloat16))
    run, seen = training.Training(arms.ARMS["bane"], 0, study), []
    run.network.classify.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    run.network.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    run.step()
    assert seen == [torch.bfloat16, torch.float32] and run.losses[0].all()
    seen.clear()
    training.evaluate(run.network, study.data, (1.0,))
    assert set(seen[::2]) == {torch.bfloat16} and set(seen[1::2]) == {torch.float32}


def made_up(arm, seed, miou, **changes):
    scores = dict.fromkeys(rows.SCORES, miou) | {"miou": miou}
    row = Result(
        **{"arm": arm, "seed": seed, "protocol": "full", "network": "hrnet_w18", "augmentation": "plain"},
        **{"iterations": 6000, "batch": 16, "height": 360, "width": 480, "channels": 256, "learning_rate": 0.01},
        **{"precision": "bfloat16 autocast", "status": "ok", "median_step_ms": 80.0},
        **{"device": "A GPU", "driver": "580.1", "torch": "2.11.0", "commit": "0123456"},
        **scores,
    )
    return replace(row, **changes)


def test_every_committed_training_follows_the_schema():
    committed = results.read(results.FOLDER / rows.FILE, Result)
    assert len({row.measured for row in committed}) == len(committed) > 0
    assert all(row.commit and not row.commit.endswith("+") for row in committed)


def test_a_full_training_is_one_of_the_papers_sizes():
    assert made_up("bane", 0, 0.5).flaw() is None
    for change in (
        {"iterations": 5999},
        {"height": 96},
        {"network": "small"},
        {"median_step_ms": None},
        {"learning_rate": None},
    ):
        assert made_up("bane", 0, 0.5, **change).flaw()
    full = replace(training.FULL, network="hrnet_w48")
    data = SimpleNamespace(size=(360, 480), images=torch.empty(0))
    for setting, protocol in ((full, "full"), (replace(full, batch=8), "shortened"), (training.SHORTENED, "shortened")):
        blank = training.Study(setting, data, "plain", scenes.plain, {}).blank(arms.ARMS["bane"], 0)
        assert (blank.protocol, blank.height, blank.width) == (protocol, 360, 480)


def test_a_training_is_known_by_arm_seed_and_setting():
    row = made_up("bane", 0, 0.5)
    others = {
        "arm": "ccl",
        "seed": 1,
        "network": "hrnet_w48",
        "augmentation": "kornia",
        "width": 479,
        "precision": "float32",
    }
    for name, other in others.items():
        assert replace(row, **{name: other}).measured != row.measured, name
    assert replace(row, device="B GPU", commit="fedcba9", torch="2.12.0", miou=0.6).measured == row.measured


def test_differences_are_taken_seed_by_seed():
    of_baseline, of_bane = (0.50, 0.60, 0.55), (0.52, 0.61, 0.58)
    trainings = [made_up("baseline", seed, miou) for seed, miou in enumerate(of_baseline)]
    trainings += [made_up("bane", seed, miou) for seed, miou in reversed(list(enumerate(of_bane)))]
    trainings += [made_up("bane", 7, 0.9), made_up("ccl", 0, 0.4), made_up("bane", 0, 0.1, network="hrnet_w48")]
    trainings += [made_up("semi-hard", seed, 0.6, height=90, protocol="shortened") for seed in range(20)]
    trainings += [made_up("semi-hard", seed, 0.6, height=180, protocol="shortened") for seed in range(20)]
    [first, _, third, fourth] = page.groups(trainings)  # the full protocol comes first, the shorter trainings last
    assert first[0].protocol == "full" and len(first) == 8 and (third[0].height, fourth[0].height) == (180, 90)
    assert page.differences(first, "bane", "baseline", "miou") == pytest.approx([2.0, 1.0, 3.0])
    # t of 2 degrees of freedom at 97.5 % is 4.3027
    assert page.half_width([2.0, 1.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert page.signed([2.0, 1.0, 3.0]) == "+2.00 [-0.48, +4.48]"
    assert page.signed([2.0]) == "+2.00, one seed" and page.signed([]) == "–"
    assert page.spread([2.0, 1.0, 3.0], ".1f") == "2.0 ± 1.0"
    # Of four seeds of BANE the baseline has three.
    assert "| 4 | 65.25 ± 16.92 | +2.00 [-0.48, +4.48], 3 seeds |" in page.compared(first, "components")


def test_a_shortened_training_is_never_evidence_of_the_full_protocol():
    """Not where there are more of them, nor where there is no other."""

    def lines():
        table = [line.split("|") for line in page.evidence(trainings).splitlines() if line.startswith("|")]
        return {cells[2].strip(): cells[4:6] for cells in table}

    setting = {"network": "small", "protocol": "shortened", "iterations": 150}
    trainings = [made_up(arm, seed, 0.1 * seed, **setting) for arm in ("bane", "detach-anchors") for seed in range(5)]
    arm = f"`detach-anchors`: {arms.ARMS['detach-anchors'].text}"
    assert lines()[arm] == [" not measured yet ", " +0.00 [+0.00, +0.00], n = 5 "]
    text = page.page(trainings, [])
    assert text.index("## Full protocol\n\nNot measured yet.\n\n## Shortened") < text.index("`detach-anchors`")
    trainings += [made_up("bane", 0, 0.5), made_up("detach-anchors", 0, 0.6)]
    assert lines()[arm] == [" +10.00, one seed, n = 1 ", " +0.00 [+0.00, +0.00], n = 5 "]


def test_the_page_says_what_was_trained_elsewhere_and_what_was_not_learnt():
    trainings = [made_up("baseline", seed, 0.5, iou_per_class="0.9000 0.0000 0.0099 nan") for seed in range(2)]
    trainings += [made_up("bane", 0, 0.5, commit="fedcba9", iou_per_class="0.9000 0.5000 0.5000 0.0100")]
    places = "driver 580.1, torch 2.11.0, commit {}"
    assert page.sources(trainings) == (
        f"Trained on A GPU, {places.format('0123456')} (2 trainings); "
        f"A GPU, {places.format('fedcba9')} (1 trainings, of `bane`)."
    )
    assert page.hardly_found(trainings) == " Of 4 classes 1.3, on average, have an IoU below 1 % at the end."
    assert page.hardly_found(trainings[2:]) == page.hardly_found([made_up("bane", 0, 0.5)]) == ""


def test_step_times_are_those_of_one_device():
    trainings = [made_up("baseline", seed, 0.5, median_step_ms=80.0 + seed) for seed in range(2)]
    trainings += [made_up("bane", 0, 0.5), made_up("bane", 1, 0.5, device="B GPU", median_step_ms=40.0)]
    assert len(page.groups(trainings)) == 1, "scores are compared all the same"
    text = page.all_scores(trainings)
    [baseline] = [line for line in text.splitlines() if line.startswith("| `baseline`")]
    [bane] = [line for line in text.splitlines() if line.startswith("| `bane`")]
    assert baseline.endswith("| A GPU: 80.5 ± 0.7 |") and bane.endswith("| A GPU: 80.0, B GPU: 40.0 |")
    assert page.ON_TIMES in text
    assert "| 80.0 |" in page.all_scores(trainings[:3])
    without = page.all_scores([made_up("bane", 0, 0.5, median_step_ms=None)])
    assert without.endswith("| – |") and page.ON_TIMES not in without


def test_the_page_names_where_a_relative_is_not_as_it_was_published():
    for name, value in arms.ARMS["pixel-contrast-bank"].on_cpu.items():
        assert f"{name} {value}" in page.INTRODUCTION
    for words in ("weight 0.1, τ = 0.07", "a bank of 5000", "warm-up is left out", "367 training images", "OHEM"):
        assert words in page.INTRODUCTION


def test_what_no_arm_can_answer_is_named():
    named = {int(number) for number in re.findall(r"\((\d+)\)", page.UNANSWERED)}
    assert named == {3, 6, 11, 12} and not named & {arm.question for arm in page.other_readings()}
    assert page.evidence([]).endswith(page.UNANSWERED)
    asked = re.findall(
        r"^\| (\d+) \| [^|]* \| [^|]* \| [^|]* \| (.*)\|$", (report.ROOT / "docs/method.md").read_text(), re.M
    )
    assert {int(number) for number, otherwise in asked if not otherwise} >= named


def test_the_page_says_what_the_rows_say(tmp_path):
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/method.md"):
        (tmp_path / name).write_text((report.ROOT / name).read_text())
    path = tmp_path / "results" / rows.FILE
    where = ["--root", str(tmp_path), "--results", str(tmp_path / "results")]
    texts = [tmp_path / "docs" / name for name in ("camvid.md", "method.md")]

    results.write(path, [], Result)
    assert report.main(where) == 0 and report.main([*where, "--check"]) == 0
    empty, evidence = (text.read_text() for text in texts)
    assert "## Full protocol\n\nNot measured yet." in empty and "| `" not in empty
    assert evidence.count("| not measured yet | not measured yet |") == sum(
        1 for arm in arms.ARMS.values() if arm.question
    )

    gains = [(arm, seed, place * (0.01 + 0.001 * seed)) for place, arm in enumerate(arms.ARMS) for seed in range(3)]
    results.write(path, [made_up(arm, seed, 0.5 + gain) for arm, seed, gain in gains], Result)
    assert report.main([*where, "--check"]) == 1
    assert report.main(where) == 0 and report.main([*where, "--check"]) == 0
    full, evidence = (text.read_text() for text in texts)
    assert "not measured yet" not in full.lower() and "## Shortened" not in full
    for name in ("arms", "choices", "sweeps"):
        assert f"camvid/{name}.png" in full and report.drawn_from(tmp_path / "docs" / "camvid" / f"{name}.png")
    number = list(arms.ARMS).index("ccl")
    assert f"| `ccl` | {arms.ARMS['ccl'].text} | 3 | {50 + 1.1 * number:.2f} ± {0.1 * number:.2f} |" in full
    gain = [number * (1 + 0.1 * seed) for seed in range(3)]
    assert f"| {page.signed(gain)} |" in full and f"{statistics.fmean(gain):+.2f} [" in full
    assert "83.14" in full and "80.0 ± 0.0" in full
    assert evidence.count("n = 3 | not measured yet |") == sum(1 for arm in arms.ARMS.values() if arm.question)

    results.record(path, made_up("bane", 0, 0.9))
    assert report.main([*where, "--check"]) == 1
