"""Frames in SegNet's layout, and a protocol that trains on them in a second."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.camvid import arms

TINY = replace(
    arms.PRETRAINED, name="tiny", size=(64, 96), batch=2, iterations=4, learning_rate=0.01, pretrained=False, probes=2
)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder of coloured rectangles, whose colour is their class."""
    root = tmp_path_factory.mktemp("camvid")
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (12, 3))
    for split, count in (("train", 5), ("val", 3)):
        for folder in (split, f"{split}annot"):
            (root / folder).mkdir()
        for n in range(count):
            labels = np.full((64, 96), rng.integers(11), np.uint8)
            for _ in range(12):
                y, x = rng.integers(0, 64), rng.integers(0, 96)
                labels[y : y + 24, x : x + 32] = rng.integers(12)
            Image.fromarray(labels).save(root / f"{split}annot" / f"{n}.png")
            image = colours[labels] + rng.integers(-20, 20, (64, 96, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / split / f"{n}.png")
    return root


@pytest.fixture
def frames(root):
    from benchmarks.camvid import data, training

    where = {"device": "a CPU", "torch": torch.__version__, "libraries": "", "commit": "0123456"}
    return training.Frames(
        data.frames(root, "train", TINY.size), data.frames(root, "val", TINY.size), where, torch.device("cpu")
    )


@pytest.fixture
def tiny():
    return TINY


@pytest.fixture
def tiny_protocols(monkeypatch):
    """The study's protocols, each as small as TINY."""
    for name, protocol in arms.PROTOCOLS.items():
        monkeypatch.setitem(arms.PROTOCOLS, name, replace(TINY, name=name, every=protocol.every))
