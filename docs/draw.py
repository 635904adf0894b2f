"""Draws the three pictures that explain the method: python docs/draw.py writes docs/method/*.png.

Every number in them is computed by the package from a small invented scene.
"""

import pathlib

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import contextrast_kernels as ck

FOLDER = pathlib.Path(__file__).parent / "method"
COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c"]
NAMES = ["road", "car", "tree"]
TEXT = {"fontsize": 10, "color": "#222222"}


def scene(size: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels of a road, a car and a tree (1, size, size), and a prediction that gets their borders wrong."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(size, size, dtype=torch.long)
    labels[(y - 14) ** 2 + (x - 34) ** 2 < 100] = 2
    labels[(y > 24) & (y < 40) & (x > 7) & (x < 26)] = 1
    predictions = labels.clone()
    predictions[(y > 20) & (y < 44) & (x > 18) & (x < 41)] = 1  # the car spills onto the road
    predictions[(y - 14) ** 2 + (x - 34) ** 2 < 49] = 2
    return labels[None], predictions[None]


def embeddings_of(labels: torch.Tensor, spread: float, turn: float = 0.0) -> torch.Tensor:
    """Two-dimensional unit vectors (1, 2, h, w), scattered around one direction for each class."""
    generator = torch.Generator().manual_seed(1)
    angle = torch.tensor([0.35, 1.75, 3.0])[labels] + turn + spread * torch.randn(labels.shape, generator=generator)
    return torch.stack([angle.cos(), angle.sin()], 1)


def arrow(axes, start, end, colour: str, width: float = 2.5, style: str = "-|>", **options) -> None:
    shape = {"arrowstyle": style, "mutation_scale": 14, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(tuple(start), tuple(end), color=colour, linewidth=width, **shape, **options))


def circle(axes, title: str) -> None:
    around = np.linspace(0, 2 * np.pi, 200)
    axes.plot(np.cos(around), np.sin(around), color="#bbbbbb", linewidth=1)
    axes.set(xlim=(-1.5, 1.5), ylim=(-0.5, 1.4), aspect="equal")
    axes.axis("off")
    axes.set_title(title, **TEXT)


def show(axes, classes: torch.Tensor, title: str) -> None:
    """A class map; negative numbers are white."""
    palette = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS] + [[1.0, 1.0, 1.0]])
    axes.imshow(palette[classes], interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, **TEXT)


def draw_anchor() -> Figure:
    """A class's anchor is the mean of the embeddings of its pixels; a pixel is pulled to it and pushed from others."""
    labels, _ = scene()
    vectors = embeddings_of(labels, 0.33)
    anchors, _ = ck.class_anchors(vectors, labels, 3)
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.6, 1.6))
    show(left, labels[0], "labels")
    for n, (name, colour) in enumerate(zip(NAMES, COLOURS)):
        left.plot([], [], "s", color=colour, label=name)
        of_class = vectors[0][:, labels[0] == n][:, ::9]
        for axes, alpha in ((middle, 0.5), (right, 0.12)):
            axes.plot(*of_class, "o", color=colour, markersize=3, alpha=alpha)
            arrow(axes, (0, 0), anchors[n].tolist(), colour)
        x, y = (1.08 * anchors[n] / anchors[n].norm()).tolist()
        side = "right" if x < -0.5 else "left" if x > 0.5 else "center"
        middle.text(x, y, f"anchor of\n{name}", fontsize=9, ha=side, va="bottom" if side == "center" else "center")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, -0.22), ncol=3, frameon=False, fontsize=9)
    circle(middle, "a pixel is a point on the circle;\nan anchor is the mean of its class")
    circle(right, "the loss moves a pixel of the car to its anchor,\naway from those it is confused with")
    pixel = np.array([np.cos(1.05), np.sin(1.05)])
    right.plot(*pixel, "o", color=COLOURS[1], markersize=9, markeredgecolor="black")
    arrow(right, pixel, pixel + 0.42 * np.array([-np.sin(1.05), np.cos(1.05)]), "black", 2)
    return figure


def draw_bane() -> Figure:
    """Pixels that are wrongly predicted as a class; those nearest to the edge of their region are the negatives."""
    labels, predictions = scene()
    errors = ck.error_map(predictions, labels, num_classes=3)
    distance = ck.edge_distance(errors)
    chosen = ck.bane_negatives(predictions, labels, num_classes=3, ratio=0.5)
    figure = Figure(figsize=(12.5, 3.2), layout="constrained")
    axes = figure.subplots(1, 5)
    show(axes[0], labels[0], "labels")
    show(axes[1], predictions[0], "prediction")
    show(axes[2], errors[0].long(), "errors, by the predicted class")
    inside = torch.where(errors[0] >= 0, distance[0], torch.nan)
    image = axes[3].imshow(inside, cmap="viridis", interpolation="nearest")
    axes[3].set(xticks=[], yticks=[])
    axes[3].set_title("distance to the region's edge", **TEXT)
    figure.colorbar(image, ax=axes[3], shrink=0.75, label="pixels")
    show(axes[4], chosen[0].long(), "negatives: the nearest half")
    for name, colour in zip(NAMES, COLOURS):
        axes[0].plot([], [], "s", color=colour, label=name)
    axes[0].legend(loc="lower center", bbox_to_anchor=(0.5, -0.25), ncol=3, frameon=False, fontsize=9)
    return figure


def draw_fusion() -> Figure:
    """The anchors of a lower layer are mixed with those of the last layer."""
    labels, _ = scene()
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    for i, stride in enumerate((4, 8, 16, 32)):
        height = 1.9 / 2**i**0.8 + 0.25
        left.add_patch(Rectangle((1.9 * i, 1.6 - height / 2), 0.85, height, facecolor="#dfe7f5", edgecolor="#44546a"))
        left.text(1.9 * i + 0.42, 1.6, f"layer {i + 1}\nstride {stride}", ha="center", va="center", fontsize=8)
        left.text(1.9 * i + 0.42, -0.12, ["$a_1$", "$a_2$", "$a_3$", "$a_4$"][i], ha="center", fontsize=13)
        arrow(left, (1.9 * i + 0.42, 1.6 - height / 2 - 0.05), (1.9 * i + 0.42, 0.2), "#44546a", 1.2)
        if i < 3:
            arrow(left, (1.9 * i + 0.9, 1.6), (1.9 * i + 1.85, 1.6), "#44546a", 1.2)
            bend = {"connectionstyle": f"arc3,rad={-0.16 - 0.03 * (2 - i)}"}
            arrow(left, (6.05, -0.22), (1.9 * i + 0.5, -0.28), "#c00000", 1.4, **bend)
            left.text(1.9 * i + 0.2, -1.3, f"$0.3\\,a_{i + 1}+0.7\\,a_4$", fontsize=9, ha="center")
    left.text(6.12, -1.3, "$a_4$", fontsize=9, ha="center")
    left.set(xlim=(-0.7, 6.9), ylim=(-1.6, 2.9))
    left.axis("off")
    left.set_title("each layer has anchors; the last layer's are mixed into the others'", **TEXT)

    own, counts = ck.class_anchors(embeddings_of(labels, 0.45, 0.28), labels, 3)
    top, top_counts = ck.class_anchors(embeddings_of(labels, 0.1, -0.28), labels, 3)
    fused = ck.fuse_anchors(own, counts, top, top_counts)
    circle(right, "layer 1: own anchor (pale), last layer's (thin), fused (bold)")
    for n, colour in enumerate(COLOURS):
        arrow(right, (0, 0), own[n].tolist(), colour, 2.5, alpha=0.3)
        arrow(right, (0, 0), top[n].tolist(), colour, 1.0)
        right.plot(*zip(own[n].tolist(), top[n].tolist()), ":", color=colour)
        arrow(right, (0, 0), fused[n].tolist(), colour, 3.0)
    return figure


DRAWINGS = {"anchor": draw_anchor, "bane": draw_bane, "fusion": draw_fusion}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().savefig(FOLDER / f"{name}.png", dpi=130, bbox_inches="tight", metadata={"Software": None})
