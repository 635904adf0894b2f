"""Pictures of what the loss looks at. They need matplotlib, which is imported when a picture is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contextrast_kernels import checks
from contextrast_kernels.bane import bane_negatives, edge_distance, error_map
from contextrast_kernels.maps import predicted_classes, targets

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOID_COLOUR = (0.55, 0.55, 0.55)  # ignored pixels
CORRECT_COLOUR = (1.0, 1.0, 1.0)  # pixels outside of every error region


def class_colours(num_classes: int) -> Tensor:
    """The colour of each class in every picture: float32 (N, 3) in 0..1. None is near void's grey or white."""
    from matplotlib import colormaps

    checks.num_classes(num_classes)
    colours = [colour for n, colour in enumerate(colormaps["tab10"].colors) if n != 7]  # 7 is a grey
    colours += colormaps["Set2"].colors[:7]
    if num_classes > len(colours):
        colours = [colormaps["hsv"](n / num_classes)[:3] for n in range(num_classes)]
    return torch.tensor(colours[:num_classes])


def negatives(
    image: Tensor,
    labels: Tensor,
    predictions: Tensor,
    *,
    num_classes: int,
    sizes: Sequence[tuple[int, int]],
    ratio: float = 0.5,
    ignore_index: int = 255,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """How one image's hard negatives come about, a row for each layer: labels, prediction, errors, distance, choice.

    Labels and prediction are shown as the layer sees them, sampled to its size. Errors and negatives have the
    colour of the *predicted* class (Eq. 6), whose anchor the pixel is pushed away from; errors that were not chosen
    are paler. Distances are in pixels of the layer, white outside of errors and black where a class fills the whole
    image.

    Args:
        image: (3, H, W), float in 0..1 or uint8; shown as it is in every row.
        labels: (H, W) integers.
        predictions: class map (H', W') of integers or logits (N, H', W') of floats.
        num_classes: N.
        sizes: (h, w) of each layer, from high to low resolution.
        ratio, ignore_index, seed: as in ``bane_negatives``.
        class_names: N names for the legend; None numbers the classes.

    Returns:
        A matplotlib figure (``.savefig(path)``), made without pyplot, so that nothing pops up or has to be closed.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: an argument of the wrong shape, type or range; the sentence names it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    image, labels, predictions = (t.detach().cpu() for t in (image, labels, predictions))
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"image: expected (3, H, W), got {checks.describe(image)}")
    if labels.ndim != 2:
        raise ValueError(f"labels: expected the map (H, W) of one image, got {checks.describe(labels)}")
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f"sizes: expected the (h, w) of at least one layer, got {sizes!r}")
    checks.num_classes(num_classes)
    names = [str(n) for n in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise ValueError(f"class_names: expected {num_classes} names (num_classes), got {len(names)}")

    H, W = labels.shape
    image = (image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)).permute(1, 2, 0)
    labels, predictions = labels[None], predictions[None]
    colours = class_colours(num_classes)
    of_class = torch.cat((colours, torch.tensor([VOID_COLOUR, CORRECT_COLOUR])))
    void, correct = num_classes, num_classes + 1

    def painted(classes: Tensor, elsewhere: Tensor | int) -> Tensor:
        """(1, h, w) classes → (h, w, 3) colours."""
        known = (classes >= 0) & (classes < num_classes)
        return of_class[torch.where(known, classes.long(), elsewhere)][0]

    place = {"extent": (0, W, H, 0), "interpolation": "nearest"}  # every layer is drawn as large as the image
    columns = ("image", "labels", "prediction", "error map", "edge distance", "chosen negatives")
    figure = Figure(figsize=(12.5, 0.7 + 2.0 * len(sizes) * H / W), layout="constrained")
    axes = figure.subplots(len(sizes), len(columns), squeeze=False)
    distance_map = colormaps["viridis"].with_extremes(bad=CORRECT_COLOUR, over="black")
    for axis, title in zip(axes[0], columns):
        axis.set_title(title, fontsize=11)
    for row, (h, w) in zip(axes, sizes):
        chosen = bane_negatives(
            predictions, labels, num_classes=num_classes, size=(h, w), ratio=ratio, ignore_index=ignore_index, seed=seed
        )
        at_layer = targets(labels, h, w, num_classes, ignore_index)
        predicted = predicted_classes(predictions, h, w)
        errors = error_map(predicted, at_layer, num_classes=num_classes, ignore_index=-1)
        distance = edge_distance(errors)[0]
        around = torch.where(at_layer < 0, void, correct)
        error_colours = painted(errors, around)
        pale = torch.where(errors[0, ..., None] >= 0, 0.25 * error_colours + 0.75, error_colours)
        pictures = (
            image,
            painted(at_layer, void),
            painted(predicted, void),
            error_colours,
            None,
            torch.where(chosen[0, ..., None] >= 0, error_colours, pale),
        )
        for axis, picture in zip(row, pictures):
            axis.set(xticks=[], yticks=[])
            if picture is not None:
                axis.imshow(picture.numpy(), **place)
        stride = f"stride {H // h}\n" if H % h == 0 and W % w == 0 and H // h == W // w else ""
        row[0].set_ylabel(f"{stride}{h} × {w}", fontsize=11)

        reached = distance[(distance >= 0) & distance.isfinite()]
        highest = max(reached.max().item(), 1.0) if len(reached) else 1.0
        shown = torch.where(distance >= 0, distance.clamp(max=highest + 1), torch.nan).numpy()
        drawn = row[4].imshow(shown, cmap=distance_map, vmin=0, vmax=highest, **place)
        bar = figure.colorbar(drawn, ax=row[4], fraction=0.05, pad=0.02, ticks=[0, int(highest)])
        bar.ax.tick_params(labelsize=8, length=2)

    present = targets(labels, *labels.shape[-2:], num_classes, ignore_index).unique().tolist()
    present = sorted({*present, *predicted_classes(predictions, *predictions.shape[-2:]).unique().tolist()})
    patches = [Patch(facecolor=colours[n].tolist(), label=names[n]) for n in present if 0 <= n < num_classes]
    patches += [
        Patch(facecolor=VOID_COLOUR, label="void"),
        Patch(facecolor=CORRECT_COLOUR, edgecolor="0.7", label="correct"),
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(patches), 10),
        frameon=False,
        fontsize=9,
        title="errors and negatives in the predicted class's colour, pale where not chosen; distance in the layer's px",
        title_fontsize=9,
    )
    return figure
