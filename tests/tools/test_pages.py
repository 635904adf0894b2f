"""The code blocks of README.md and docs/ run."""

import pathlib
import re

import pytest
import torch
from torch import nn

import contextrast_kernels as ck

ROOT = pathlib.Path(__file__).parents[2]
N, D = 19, 32

pytestmark = pytest.mark.usefixtures("one_thread")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


class Network(nn.Module):
    """Four stages, of stride 4 to 32: what a reader has."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Conv2d(i, o, s, s) for i, o, s in ((3, 8, 4), (8, 12, 2), (12, 16, 2), (16, 20, 2))
        )
        self.classify = nn.Conv2d(8, N, 1)

    def forward(self, x):
        maps = [x := stage(x).relu() for stage in self.stages]
        return self.classify(maps[0])


def given() -> dict:
    """The names that a reader is expected to have."""
    torch.manual_seed(0)
    labels = torch.randint(0, N, (2, 64, 96))
    return {
        "torch": torch,
        "ck": ck,
        "model": Network(),
        "loader": [(torch.rand(2, 3, 64, 96), labels)] * 2,
        "features": [torch.randn(2, D, 64 // s, 96 // s, requires_grad=True) for s in (4, 8, 16, 32)],
        "labels": labels,
        "logits": torch.randn(2, N, 16, 24),
    }


def test_the_loss_alone_in_the_readme_needs_no_other_code(capsys):
    exec(blocks("README.md")[1], names := {})
    assert names["loss"] > 0
    assert all(x.grad.any() for x in names["features"])
    assert "errors" in capsys.readouterr().out


@pytest.mark.parametrize(("page", "number"), [("README.md", 0), ("docs/attach.md", 0)])
def test_the_training_loop_runs(page, number, capsys):
    names = given()
    del names["torch"], names["ck"]  # the code imports them
    before = [p.detach().clone() for p in names["model"].parameters()]
    exec(blocks(page)[number], names)
    assert names["loss"].isfinite()
    assert all(not torch.equal(p, old) for p, old in zip(names["model"].parameters(), before, strict=True))
    assert not hasattr(names["model"], "contextrast_heads")
    assert "stride" in capsys.readouterr().out


def test_the_distances_in_the_readme():
    exec(blocks("README.md")[2], names := given())
    assert names["distance"].shape == names["mask"].shape and names["to_edge"].shape == names["labels"].shape


def test_the_code_about_a_flat_loss(capsys):
    exec(blocks("docs/troubleshooting.md")[0], given())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        *("loss", "classes", "positives", "negatives", "errors")
    ]


def test_the_loop_over_the_relatives():
    """On maps so small that the page's banks, of full size, cost a CPU little."""
    table, ablation = blocks("docs/relatives.md")
    code, call = table.rsplit("\n", 2)[:2]
    names = given() | {"labels": torch.randint(0, N, (1, 32, 32)), "logits": torch.randn(1, N, 8, 8)}
    names["features"] = [torch.randn(1, 256, 32 // s, 32 // s, requires_grad=True) for s in (4, 8, 16, 32)]
    exec(code, names)
    assert len(names["criteria"]) == 6
    for name in names["criteria"]:
        exec(call, names | {"name": name})
    exec(ablation, names)


def test_the_code_about_distances_runs():
    """One block after the other, as a reader would run them."""
    torch.manual_seed(0)
    names = {}
    for block in blocks("docs/distance.md"):
        exec(block, names)
    assert names["nearest"].shape == (3, *names["distance"].shape) and names["to_edge"].shape == names["labels"].shape
    assert names["weights"].isfinite().all() and names["weights"][1].abs().sum() > 0
    assert names["prediction"].grad.isfinite().all() and names["hausdorff_loss"] > 0
    assert 0 < names["hausdorff_95"] <= names["hausdorff"]


def test_the_hausdorff_distance_of_the_page_is_that_of_the_surfaces():
    """A spike of five pixels on a straight side: its tip is 5 px from the other mask's surface."""
    block = next(block for block in blocks("docs/distance.md") if "hausdorff_95" in block)
    mask = torch.zeros(2, 2, 40, 30, dtype=torch.bool)
    mask[1, :, :, :10] = True
    mask[1, 1, 20, 10:15] = True
    exec(block, names := {"ck": ck, "torch": torch, "mask": mask})
    assert names["hausdorff"] == 5 and names["hausdorff_95"] < 5
    surfaces = names["surface_a"].nonzero().double(), names["surface_b"].nonzero().double()
    apart = torch.cdist(*surfaces)
    assert names["hausdorff"] == torch.maximum(apart.amin(0).max(), apart.amin(1).max())


RECIPES = blocks("docs/recipes.md")


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_the_recipes_run(number):
    exec(RECIPES[number], names := given())
    if "loss" in names:
        assert names["loss"].isfinite() and names["loss"] > 0
        if names["features"][0].grad is None:
            names["loss"].backward()
        assert names["features"][0].grad.any()
    if "plain" in names:
        assert names["plain"].keys() == names["model"].state_dict().keys() < names["checkpoint"].keys()
    scores = names.get("scores", [])
    for metric in scores if isinstance(scores, list) else [scores]:
        assert isinstance(metric, ck.metrics.ConfusionMatrix)
