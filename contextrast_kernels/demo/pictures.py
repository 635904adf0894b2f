"""The demo's pictures: curves.png and negatives.png. ImportError without matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from contextrast_kernels import viz
from contextrast_kernels.demo import scenes

if TYPE_CHECKING:
    from contextrast_kernels.demo.training import Network, Run


def draw(folder: Path, runs: list[Run], network: Network, data: scenes.Data) -> None:
    """Write both pictures into a folder; `network` is one that was trained with a contrastive loss."""
    _curves(runs).savefig(folder / "curves.png", dpi=110)
    _negatives(network, data).savefig(folder / "negatives.png", dpi=110)


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


def _negatives(network: Network, data: scenes.Data):
    """The hard negatives of the image with the most classes among those to be shown."""
    images, labels = data.shown
    N = len(data.classes)
    classes = torch.stack([(labels == n).flatten(1).any(1) for n in range(N)]).sum(0)
    chosen = classes.argmax()
    image, label = images[chosen], labels[chosen]
    network.eval()
    with torch.no_grad():
        logits, features = network(image[None])
    sizes = [tuple(feature.shape[-2:]) for feature in features]
    return viz.negatives(image, label, logits[0], num_classes=N, sizes=sizes, class_names=data.classes)
