"""The demo's pictures: the course of the runs, and the negatives and embeddings of the contrastive run.

They need matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from contextrast_kernels import viz
from contextrast_kernels.demo import scenes
from contextrast_kernels.metrics import AnchorSimilarity

if TYPE_CHECKING:
    from contextrast_kernels.demo.training import Network, Run


NAMES = ("curves.png", "negatives.png", "embeddings.png", "anchors.png", "similarity.png")
TOGETHER = 8
"""The most validation images in one batch; anchors.png shows the anchors of the first batch."""
MEASURED = 32
"""The most validation images that similarity.png uses."""


def draw(folder: Path, runs: list[Run], network: Network, heads: nn.ModuleList, data: scenes.Data) -> None:
    """Write all pictures into a folder; network and heads are those of a run with a contrastive loss."""
    nn.ModuleList((network, heads)).eval()
    image, label = _richest(data)
    with torch.no_grad():
        logits, features = network(image[None])
    sizes = [tuple(feature.shape[-2:]) for feature in features]
    embeddings = _project(heads, features)
    several, labels, _ = next(_embedded(network, heads, data))
    named: dict[str, Any] = {"num_classes": len(data.classes), "ignore_index": scenes.VOID, "class_names": data.classes}
    figures = (
        _curves(runs),
        viz.negatives(image, label, logits[0], sizes=sizes, **named),
        viz.embeddings(image, [x[0] for x in embeddings]),
        viz.anchor_similarity(several, labels, **named),
        viz.similarity_curve(_similarity(network, heads, data)),
    )
    for name, figure in zip(NAMES, figures):
        figure.savefig(folder / name, dpi=110)


def _curves(runs: list[Run]):
    """Losses and validation mIoU over the steps; a line for each seed, a colour for each kind of run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    cross_entropy, contrast, miou = figure.subplots(1, 3)
    colours = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(run.name for run in runs))}
    labelled, several = set(), len(colours) > 2
    for run in runs:
        style = {"color": colours[run.name], "linewidth": 1.2, "alpha": 0.9}
        if run.name not in labelled:
            style["label"] = run.name
            labelled.add(run.name)
        window = max(1, len(run.cross_entropy) // 40)
        for axis, values in ((cross_entropy, run.cross_entropy), (contrast, run.contrast)):
            if values:
                means = torch.tensor(values).unfold(0, window, 1).mean(1)
                if axis is contrast and several:
                    # Their sizes have nothing in common. A bank's loss begins at 0.
                    means = means / means.max()
                axis.plot(range(window, len(values) + 1), means.tolist(), **style)
        miou.plot([s.step for s in run.scores], [s.miou for s in run.scores], marker="o", markersize=3, **style)
        boundary = {**style, "label": None, "linestyle": ":", "marker": "o", "markersize": 2}
        miou.plot([s.step for s in run.scores], [s.boundary_miou for s in run.scores], **boundary)
    cross_entropy.set_title("cross-entropy, training")
    contrast.set_title("contrastive losses, share of their maximum" if several else "contrastive loss, training")
    miou.set_title("validation mIoU, dotted: at boundaries")
    cross_entropy.legend(frameon=False, fontsize=9)
    for axis in (cross_entropy, contrast, miou):
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _richest(data: scenes.Data) -> scenes.Batch:
    """The image with the most classes among those to be shown, and its labels."""
    images, labels = data.shown
    classes = torch.stack([(labels == n).flatten(1).any(1) for n in range(len(data.classes))]).sum(0)
    chosen = classes.argmax()
    return images[chosen], labels[chosen]


@torch.no_grad()
def _project(heads: nn.ModuleList, features: list[Tensor]) -> list[Tensor]:
    return [head(feature) for head, feature in zip(heads, features)]


@torch.no_grad()
def _embedded(
    network: Network, heads: nn.ModuleList, data: scenes.Data
) -> Iterator[tuple[list[Tensor], Tensor, Tensor]]:
    """Embeddings, labels and logits of validation images, a batch at a time."""
    for images, labels in zip(*(tensor[:MEASURED].split(TOGETHER) for tensor in data.validation)):
        logits, features = network(images)
        yield _project(heads, features), labels, logits


def _similarity(network: Network, heads: nn.ModuleList, data: scenes.Data) -> dict[str, Tensor]:
    """Similarity of errors to anchors by distance, over some validation images."""
    similarity = AnchorSimilarity(len(data.classes), ignore_index=scenes.VOID)
    for embeddings, labels, logits in _embedded(network, heads, data):
        similarity.update(embeddings, labels, logits)
    return similarity.compute()
