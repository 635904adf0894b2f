"""The demo: its scenes, its errors, its runs, and the files that it writes."""

import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import contextrast_kernels as ck
from contextrast_kernels import viz
from contextrast_kernels.demo import scenes, training

pytestmark = pytest.mark.usefixtures("one_thread")
VOID = scenes.VOID


@pytest.fixture(scope="module")
def mosaic():
    return scenes.Mosaic(64, validation=16)


# ------------------------------------------------------------------------------------------------------------ scenes


def coded_photographs():
    """Photographs whose pixels say where they come from: red the class, green the row, blue the column."""
    photographs = {}
    for n, (H, W) in enumerate(((40, 70), (90, 33), (64, 128))):
        image = torch.empty(3, H, W)
        image[0], image[1], image[2] = n, torch.arange(H)[:, None], torch.arange(W)
        photographs[f"class {n}"] = image
    return photographs


@pytest.mark.parametrize("size", [16, 64])
def test_training_and_validation_share_no_pixel_of_a_photograph(size):
    for n, photograph in enumerate(coded_photographs().values()):
        middle = photograph.shape[-1] // 2
        halves = []
        for split in ("train", "val"):
            textures = scenes.Textures(coded_photographs(), split, size)
            room = textures.room[n] + size - 1  # all that a scene can reach
            halves.append(textures.pixels[n, : room[0], : room[1]])
        assert halves[0][..., 2].max() == middle - 1
        assert halves[1][..., 2].min() == middle
        for half in halves:
            assert (half[..., 0] == n).all()
            assert half[..., 1].unique().tolist() == list(range(photograph.shape[-2]))


def test_a_half_smaller_than_a_scene_is_mirrored():
    pixels = scenes.Textures({"class": coded_photographs()["class 1"][:, :4, :6]}, "val", 10).pixels[0]
    assert pixels[:, 0, 1].tolist() == [0, 1, 2, 3, 3, 2, 1, 0, 0, 1]
    assert pixels[0, :, 2].tolist() == [3, 4, 5, 5, 4, 3, 3, 4, 5, 5]


def test_every_pixel_is_painted_from_its_class():
    generator = torch.Generator().manual_seed(0)
    textures = scenes.Textures(coded_photographs(), "val", 24)
    labels = torch.randint(3, (2, 24, 24), generator=generator)
    corners = (torch.rand(2, 3, 2, generator=generator) * textures.room).long()
    gain, shade = torch.rand(2, 3, 1, generator=generator), torch.rand(2, 3, 3, generator=generator)
    images = textures.paint(labels, corners, gain, shade)
    for b in range(2):
        for y in range(24):
            for x in range(24):
                n = labels[b, y, x]
                row, column = corners[b, n] + torch.tensor([y, x])
                colour = textures.pixels[n, row, column] * gain[b, n] + shade[b, n]
                assert torch.equal(images[b, :, y, x], colour)


def test_a_scene_has_exact_labels():
    # Red is the class. Gain and shade change it equally for a whole class, so each class of a scene has one value.
    scale = torch.tensor([0.2, 0.002, 0.002])[:, None, None]
    textures = scenes.Textures({name: p * scale for name, p in coded_photographs().items()}, "train", 64)
    images, labels = scenes.mosaic(textures, 8, torch.Generator().manual_seed(5))
    assert images.shape == (8, 3, 64, 64) and images.dtype == torch.float32
    assert labels.shape == (8, 64, 64) and labels.dtype == torch.int64
    assert images.min() >= 0 and images.max() <= 1
    assert set(labels.unique().tolist()) == {0, 1, 2, VOID}
    for image, label in zip(images, labels):
        assert (label == VOID).any(), "a bar of void crosses every scene"
        for n in range(3):
            assert len(image[0, label == n].unique()) <= 1


def test_the_same_seed_gives_the_same_scenes(mosaic):
    (first, labels), (again, labels_again) = (next(mosaic.batches(2, seed=3)) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(labels, labels_again)
    assert not torch.equal(labels, next(mosaic.batches(2, seed=4))[1])
    batches = mosaic.batches(2, seed=3)
    next(batches)
    assert not torch.equal(labels, next(batches)[1])
    assert torch.equal(mosaic.validation[0], scenes.Mosaic(64, validation=16).validation[0])


def test_procedural_textures_are_fixed_and_differ():
    textures = scenes.procedural()
    assert len(textures) == 7
    for name, again in scenes.procedural().items():
        assert torch.equal(textures[name], again)
        assert again.shape == (3, 256, 512) and again.min() >= 0 and again.max() <= 1
        assert again[..., :256].std() > 0.05 and again[..., 256:].std() > 0.05


# ------------------------------------------------------------------------------------------------------------ CamVid


@pytest.fixture
def camvid(tmp_path):
    """A folder in SegNet's layout with frames of 40 x 30 pixels: 3 for training (one a JPEG), 2 for validation."""
    image_module = pytest.importorskip("PIL.Image", reason="CamVid is read with Pillow, which is not installed")
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for folder in (split, f"{split}annot"):
            (tmp_path / "data" / folder).mkdir(parents=True)
        for i in range(count):
            image = image_module.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            image.save(tmp_path / "data" / split / (f"{i}.jpg" if i == 2 else f"{i}.png"))
            label = image_module.fromarray(rng.integers(0, 12, (30, 40), dtype=np.uint8))
            label.save(tmp_path / "data" / f"{split}annot" / f"{i}.png")
    return tmp_path / "data"


def test_camvid_is_brought_to_the_size_by_exact_nearest_sampling(camvid):
    from PIL import Image

    data = scenes.CamVid(camvid, 24)
    assert data.size == (24, 32)
    assert data.images.shape == (3, 3, 24, 32) and data.labels.shape == (3, 24, 32)
    images, labels = data.validation
    assert images.shape == (2, 3, 24, 32) and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    for i in range(2):
        source = np.array(Image.open(camvid / "valannot" / f"{i}.png"))
        for r in range(24):
            for c in range(32):
                value = source[r * 30 // 24, c * 40 // 32]
                assert labels[i, r, c] == (VOID if value == 11 else value)


def test_camvid_uses_every_frame_once_per_epoch(camvid):
    data = scenes.CamVid(camvid, 24)
    for batch in (1, 2, 7):  # 7: more than there are frames
        batches = data.batches(batch, seed=1)
        seen = torch.cat([next(batches)[1] for _ in range(12)])[:12]
        frame = (seen[:, None] == data.labels).flatten(2).all(2).int().argmax(1)
        assert frame.view(4, 3).sort(1).values.tolist() == [[0, 1, 2]] * 4
    assert torch.equal(next(data.batches(2, seed=1))[0], next(data.batches(2, seed=1))[0])


def broken(camvid, what):
    """Break one thing; returns the path that the message must name and a few of its words."""
    from PIL import Image

    label = camvid / "valannot" / "1.png"
    if what == "no folder":
        for path in (camvid / "trainannot").iterdir():
            path.unlink()
        (camvid / "trainannot").rmdir()
        return camvid / "trainannot", "no folder"
    if what == "no images":
        for path in (camvid / "val").iterdir():
            path.unlink()
        return camvid / "val", "no .png or .jpg"
    if what == "no label":
        label.unlink()
        return label, "no label map"
    if what == "truncated label":
        label.write_bytes(label.read_bytes()[:-200])
        return label, "cannot read"
    if what == "truncated image":
        path = camvid / "train" / "2.jpg"
        path.write_bytes(path.read_bytes()[:300])
        return path, "cannot read"
    if what == "empty label":
        label.write_bytes(b"")
        return label, "cannot read"
    if what == "size":
        Image.fromarray(np.zeros((30, 41), dtype=np.uint8)).save(label)
        return label, "41 x 30 pixels, its image has 40 x 30 pixels"
    if what == "range":
        Image.fromarray(np.full((30, 40), 12, dtype=np.uint8)).save(label)
        return label, "holds the value 12"
    if what == "colour":
        Image.fromarray(np.zeros((30, 40, 3), dtype=np.uint8)).save(label)
        return label, "mode RGB"
    for folder, shape in (("val", (30, 60, 3)), ("valannot", (30, 60))):
        for path in (camvid / folder).iterdir():
            Image.fromarray(np.zeros(shape, dtype=np.uint8)).save(path)
    return camvid / "val", "different proportions"


@pytest.mark.parametrize(
    "what",
    [
        "no folder",
        "no images",
        "no label",
        "truncated label",
        "truncated image",
        "empty label",
        "size",
        "range",
        "colour",
        "proportions",
    ],
)
def test_unusable_data_raises_an_error_that_names_the_file(camvid, what, capsys):
    path, words = broken(camvid, what)
    out = camvid.parent / "out"
    assert training.main(["--data", "camvid", "--root", str(camvid), "--out", str(out), "--size", "64"]) == 2
    printed = capsys.readouterr()
    assert str(path) in printed.err and words in printed.err
    assert printed.err.count("\n") == 1 and printed.err.endswith(".\n")
    assert printed.out == "" and not out.exists()


def test_a_missing_root_is_a_clear_error(tmp_path, capsys):
    assert training.main(["--data", "camvid", "--root", str(tmp_path / "nowhere")]) == 2
    assert f"no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ augmentation


@pytest.mark.parametrize("by", ["kornia", "plain"])
def test_augmentation_moves_image_and_labels_together_and_pads_with_void(by):
    if by == "kornia":
        pytest.importorskip("kornia", reason="kornia is not installed")
    augment, note = scenes.augmentation() if by == "kornia" else (scenes.plain, "plain")
    assert by in note
    torch.manual_seed(0)
    # Labels of classes 0 and 5 with a void bar. The image is nowhere black and brighter in class 5, also after jitter.
    labels = torch.zeros(64, 48, 56, dtype=torch.long)
    labels[:, :, 30:] = 5
    labels[:, 20:24] = VOID
    images = torch.where(labels == 5, 0.8, 0.3)[:, None].expand(-1, 3, -1, -1).contiguous()
    moved_images, moved = augment(images, labels)
    assert moved.dtype == torch.int64 and moved.shape == labels.shape and moved_images.shape == images.shape
    assert set(moved.unique().tolist()) == {0, 5, VOID}
    assert moved_images.min() >= 0 and moved_images.max() <= 1

    padded = moved_images.sum(1) == 0
    assert padded.any() and (moved[padded] == VOID).all()
    void = (labels == VOID).float().mean()
    assert (moved == VOID).float().mean() > void  # the padding was not void before
    for image, label in zip(moved_images.mean(1), moved):
        dark, bright = image[label == 0], image[label == 5]
        if len(dark) and len(bright):
            # One jittered grey each, apart from the interpolated column between them.
            assert dark.median() < bright.median()
            assert (dark < bright.median()).float().mean() > 0.95 and (bright > dark.median()).float().mean() > 0.95


def test_the_plain_augmentation_draws_from_its_ranges(monkeypatch):
    """Without any change it is the identity or a mirror image. Each change alone has its own effect."""
    labels = torch.randint(0, 5, (32, 6, 8))
    images = 0.2 + 0.1 * torch.stack((labels, labels + 1, labels.flip(-1)), 1)
    for name in ("JITTER", "HUE", "SHIFT"):
        monkeypatch.setattr(scenes, name, 0.0)
    monkeypatch.setattr(scenes, "ZOOM", (1.0, 1.0))
    torch.manual_seed(0)
    moved_images, moved = scenes.plain(images, labels)
    flipped = [not torch.equal(a, b) for a, b in zip(moved, labels)]
    assert 0 < sum(flipped) < 32
    for image, label, moved_image, moved_label, f in zip(images, labels, moved_images, moved, flipped):
        assert torch.equal(moved_label, label.flip(-1) if f else label)
        torch.testing.assert_close(moved_image, image.flip(-1) if f else image, rtol=0, atol=1e-5)

    monkeypatch.setattr(scenes, "HUE", 0.05)
    turned = scenes.plain(images, labels)[0]
    assert not torch.allclose(turned, moved_images, atol=1e-3)
    torch.testing.assert_close(turned.mean((1, 2, 3)), images.mean((1, 2, 3)))
    colour, turned_colour = ((x - x.mean(1, keepdim=True)).norm(dim=1).mean((1, 2)) for x in (images, turned))
    torch.testing.assert_close(turned_colour, colour)
    monkeypatch.setattr(scenes, "HUE", 0.0)
    monkeypatch.setattr(scenes, "JITTER", 0.3)
    grey = torch.full((64, 3, 4, 4), 0.5)
    bright = scenes.plain(grey, labels.new_zeros(64, 4, 4))[0].mean((1, 2, 3)) / 0.5
    assert 0.7 <= bright.min() < 0.8 and 1.2 < bright.max() <= 1.3
    assert 0.05 < (bright == 1).float().mean() < 0.4  # a share of 0.2 is not changed


def test_the_plain_augmentation_reaches_its_scale_and_shift_limits(monkeypatch):
    for name, value in {"JITTER": 0.0, "HUE": 0.0, "SHIFT": 0.0, "ZOOM": (1.25, 1.25), "OFTEN": 1.0}.items():
        monkeypatch.setattr(scenes, name, value)
    H, W = 20, 40
    row, column = torch.meshgrid(torch.arange(H) / 50, torch.arange(W) / 50, indexing="ij")
    images = torch.stack((row, column, row))[None].repeat(64, 1, 1, 1)
    labels = torch.zeros(64, H, W, dtype=torch.long)
    torch.manual_seed(0)
    middle = torch.tensor([H - 1, W - 1]) / 100
    expected = [(ramp - m) / 1.25 + m for ramp, m in zip((row, column), middle)]
    for image in scenes.plain(images, labels)[0]:
        torch.testing.assert_close(image[0], expected[0], rtol=0, atol=1e-4)
        mirrored = image[1, 0, 0] > image[1, 0, -1]
        torch.testing.assert_close(image[1].flip(-1) if mirrored else image[1], expected[1], rtol=0, atol=1e-4)

    monkeypatch.setattr(scenes, "ZOOM", (1.0, 1.0))
    monkeypatch.setattr(scenes, "SHIFT", 0.1)
    rows = 50 * scenes.plain(images, labels)[0][:, 0, H // 2, W // 2] - H // 2
    assert -2.01 < rows.min() < -1 and 1 < rows.max() < 2.01  # a tenth of 20 rows


# ---------------------------------------------------------------------------------------------------------- training


def test_the_runs_differ_only_by_the_contrastive_term(mosaic):
    """With a vanishing weight, heads and Contextrast change nothing: same weights, same batches, same augmentation."""
    augment, _ = scenes.augmentation()
    alone, *_ = training.train(training.ALONE, mosaic, augment, seed=2, steps=3, batch=2)
    beside, *_ = training.train(
        replace(training.LOSSES["contextrast"], alpha=1e-38), mosaic, augment, seed=2, steps=3, batch=2
    )
    assert alone.cross_entropy == beside.cross_entropy
    assert alone.scores == beside.scores
    assert alone.contrast == [] and len(beside.contrast) == 3 and all(loss > 0 for loss in beside.contrast)


def test_contextrast_reaches_the_network(mosaic):
    augment, _ = scenes.augmentation()
    alone, *_ = training.train(training.ALONE, mosaic, augment, seed=2, steps=3, batch=2)
    added, *_ = training.train(training.LOSSES["contextrast"], mosaic, augment, seed=2, steps=3, batch=2)
    assert alone.cross_entropy[0] == added.cross_entropy[0]
    assert alone.cross_entropy[1:] != added.cross_entropy[1:]


def test_boundary_miou_counts_only_pixels_near_a_boundary():
    labels = torch.zeros(3, 20, 20, dtype=torch.long)
    labels[:, :, 10:] = 1
    predictions = labels.clone()
    predictions[:, :, :6] = 1  # boundary pixels are columns 9 and 10, so columns 6 to 13 are within 3 px
    data = SimpleNamespace(classes="ab", validation=(predictions[:, None].expand(-1, 3, -1, -1).float(), labels))

    class Given(torch.nn.Module):
        def forward(self, images):
            return torch.stack((1 - images[:, 0], images[:, 0]), 1), []

    score = training.evaluate(Given(), data, step=7)
    assert (score.step, score.boundary_miou) == (7, 1.0)
    assert score.miou == pytest.approx((4 / 10 + 10 / 16) / 2)
    predictions[:, :, 6] = 1
    data.validation = (predictions[:, None].expand(-1, 3, -1, -1).float(), labels)
    assert training.evaluate(Given(), data, step=7).boundary_miou == pytest.approx((3 / 4 + 4 / 5) / 2)


def small(tmp_path, *more):
    return ["--quick", "--steps", "2", "--batch", "2", "--device", "cpu", "--out", str(tmp_path / "out"), *more]


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(training.pictures, "draw", lambda *_: None)


def test_status_is_1_where_miou_cannot_rise(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.setattr(training, "evaluate", lambda network, data, step: training.Score(step, 0.25, 0.25, [0.25]))
    assert training.main(small(tmp_path)) == 1
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("demo: the validation mIoU did not rise") for line in errors] == [True, True]
    assert (tmp_path / "out" / "metrics.json").is_file()


def test_several_seeds_give_a_spread_and_replace_old_results(tmp_path, monkeypatch, capsys, no_pictures):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.json").write_text("old")
    scores = iter([0.1, 0.5, 0.5, 0.1, 0.6, 0.6, 0.1, 0.3, 0.3, 0.1, 0.6, 0.6])  # before and two more, of four runs
    monkeypatch.setattr(
        training, "evaluate", lambda network, data, step: training.Score(step, next(scores), 0.5, [0.5])
    )
    assert training.main(small(tmp_path, "--seed", "3", "5")) == 0
    text = capsys.readouterr().out
    assert "0.400 ± 0.141" in text and "0.600 ± 0.000" in text and "+0.200 ± 0.141" in text
    assert "over 2 seeds" in text and "several seeds agree" not in text
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert [(run["seed"], run["alpha"]) for run in runs] == [(3, 0.0), (3, 0.1), (5, 0.0), (5, 0.1)]


def test_every_loss_on_equal_terms(tmp_path, capsys, no_pictures):
    """The same weights and the same first batch for all: the first cross-entropy is the same number."""
    training.main(small(tmp_path, "--loss", *training.LOSSES))
    runs = json.loads((tmp_path / "out" / "metrics.json").read_text())["runs"]
    assert [run["name"] for run in runs] == ["cross-entropy", *(loss.name for loss in training.LOSSES.values())]
    assert len({run["cross_entropy"][0] for run in runs}) == 1
    assert len({json.dumps(run["scores"][0]) for run in runs}) == 1
    assert all(len(run["contrast"]) == 2 for run in runs[1:])
    text = capsys.readouterr().out
    for loss in training.LOSSES.values():
        assert f"difference, {loss.name}" in text


def test_a_failure_keeps_the_old_results(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("old")

    def fail(folder, *_):
        (folder / "curves.png").write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(training.pictures, "draw", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        training.main(small(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["metrics.json"]
    assert (out / "metrics.json").read_text() == "old"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "camvid"], "--root: expected together with --data camvid"),
        (["--root", "somewhere"], "--root: expected together with --data camvid"),
        (["--data", "cityscapes"], "invalid choice: 'cityscapes'"),
        (["--steps", "0"], "--steps: expected 1 to"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--batch", "-3"], "--batch: expected 1 to 1024, got -3"),
        (["--size", "32"], "--size: expected 64 to 1024, got 32"),
        (["--loss", "dice"], "invalid choice: 'dice'"),
        (["--loss", "pne", "pne"], "--loss: expected different losses"),
        (["--seed", "1", "1"], "--seed: expected different numbers"),
        (["--seed", "-1"], "--seed: expected different numbers"),
        (["--device", "cuda:99"], "--device: cuda:99 cannot be used"),
        (["--device", "toaster"], "--device: toaster cannot be used"),
        (["--device", "meta"], "--device: meta cannot be used (the demo does not run on meta). Choose auto, cpu, cuda"),
        (["--out", "/dev/null"], "is a file. Give a folder"),
        (["--out", "/no/such/place"], "cannot be written to"),
        (["--out", "/proc/place"], "cannot be written to"),
    ],
)
def test_a_bad_flag_is_a_clear_error(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        training.main(flags)
    assert stop.value.code == 2
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m contextrast_kernels demo") and words in sentence


def test_a_folder_with_other_files_is_not_replaced(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        training.main(["--out", str(tmp_path)])
    assert "holds thesis.tex" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


# -------------------------------------------------------------------------------------------------- the command line


def start(code_or_module: list[str], tmp_path: pathlib.Path) -> subprocess.CompletedProcess:
    # One thread: several demos at once on a small machine would otherwise wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(pathlib.Path(ck.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, *code_or_module], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.long
def test_a_quick_run_end_to_end(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    done = start(["-m", "contextrast_kernels", "demo", "--quick", "--device", "cpu"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["demo_out"]
    out = tmp_path / "demo_out"
    assert {path.name for path in out.iterdir()} == {"metrics.json", *training.pictures.NAMES}
    for name in training.pictures.NAMES:
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    facts = json.loads((out / "metrics.json").read_text())
    alone, added = facts["runs"]
    for run in (alone, added):
        assert len(run["scores"]) == 11 and len(run["cross_entropy"]) == facts["settings"]["steps"] == 40
        assert run["miou"] == pytest.approx(sum(score["miou"] for score in run["scores"][-3:]) / 3)
        assert run["miou"] > run["miou_before"] == run["scores"][0]["miou"]
        assert run["cross_entropy"][-1] < run["cross_entropy"][0]
        assert run["seconds_per_step"] > 0
    assert alone["scores"][0] == added["scores"][0] and alone["cross_entropy"][0] == added["cross_entropy"][0]
    assert alone["contrast"] == [] and len(added["contrast"]) == 40
    assert f"{added['miou']:.3f}" in done.stdout
    assert "differences are noise" in done.stdout


def test_the_demo_runs_on_torch_alone_and_lists_missing_packages(tmp_path):
    without = """
import sys
for name in ("kornia", "skimage", "matplotlib", "tqdm", "PIL", "scipy"):
    sys.modules[name] = None  # import raises ModuleNotFoundError
from contextrast_kernels.demo import training
training.evaluate = lambda network, data, step: training.Score(step, 0.1 + step, 0.5, [])
sys.exit(training.main(["--quick", "--steps", "2", "--device", "cpu"]))
"""
    done = start(["-c", without], tmp_path)
    assert done.returncode == 0, done.stderr
    for package in ("scikit-image", "kornia", "tqdm", "matplotlib"):
        assert f"need {package}" in done.stdout or f"needs {package}" in done.stdout
    assert [path.name for path in (tmp_path / "demo_out").iterdir()] == ["metrics.json"]


# ---------------------------------------------------------------------------------------------------------- pictures


def test_the_anchor_picture_uses_validation_images_and_fused_anchors(mosaic, tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    run, network, heads = training.train(
        training.LOSSES["contextrast"], mosaic, scenes.augmentation()[0], seed=0, steps=1, batch=2
    )
    figures = {}
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, path, **_: figures.update({path.name: self}))
    training.pictures.draw(tmp_path, [run], network, heads, mosaic)
    assert tuple(figures) == training.pictures.NAMES

    images, labels = (tensor[: training.pictures.TOGETHER] for tensor in mosaic.validation)
    with torch.no_grad():
        embeddings = [head(feature) for head, feature in zip(heads, network(images)[1])]
    N = len(mosaic.classes)
    expected = viz.anchor_similarity(embeddings, labels, num_classes=N, class_names=mosaic.classes)
    for axis, of_layer in zip(figures["anchors.png"].axes, expected.axes[: len(embeddings)]):
        assert [name.get_text() for name in axis.get_xticklabels()] == list(mosaic.classes)
        assert torch.equal(*(torch.tensor(each.get_images()[0].get_array()) for each in (axis, of_layer)))
