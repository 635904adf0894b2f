"""Pictures of the negatives, the embeddings and the anchors, and of how hard the negatives are.

Each is a matplotlib figure made without pyplot, so no window opens and none has to be closed. Use
``figure.savefig(path)``, ``SummaryWriter.add_figure(tag, figure)``, or make it the last line of a notebook's cell.
matplotlib is imported when a figure is drawn; ``embedding_colours`` returns a tensor and does not need it.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from contextrast_kernels import checks
from contextrast_kernels.anchors import class_anchors, fuse_anchors
from contextrast_kernels.bane import bane_negatives, error_map
from contextrast_kernels.contextrast import check_layers
from contextrast_kernels.distance import edge_distance
from contextrast_kernels.embedding import unit
from contextrast_kernels.maps import predicted_classes, targets

__all__ = ["anchor_similarity", "class_colours", "embedding_colours", "embeddings", "negatives", "similarity_curve"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VOID_COLOUR = (0.55, 0.55, 0.55)  # ignored pixels
CORRECT_COLOUR = (1.0, 1.0, 1.0)  # pixels outside every error region
NO_EDGE_COLOUR = (0.0, 0.0, 0.0)  # errors of a class that fills the whole image
PALE = 0.75  # share of white in an error that was not chosen

# The colours of matplotlib's tab10 without its grey, then colours of moderate chroma. Each of these is the farthest
# (CIEDE2000) from the colours before it, from their pale versions, and from the colours above.
DISTINCT = (
    "1f77b4", "ff7f0e", "2ca02c", "d62728", "9467bd", "8c564b", "e377c2", "bcbd22", "17becf", "1e5a3c",
    "0f2d87", "00f0b4", "5a4b00", "a50069", "ff9696", "8796ff", "69001e", "ffc35a", "4b2d4b", "965a0f",
    "0fb4ff", "1e9678", "005a69", "a5e178",
)  # fmt: skip


def class_colours(num_classes: int) -> Tensor:
    """The colour of each class in every picture: float32 (N, 3) in 0..1.

    No colour is near the grey of ignored pixels, white or black. Up to 24 colours are easy to tell apart. More classes
    get evenly spaced hues that are in turn bright, soft, dark and muted.
    """
    checks.num_classes(num_classes)
    if num_classes <= len(DISTINCT):
        return torch.tensor([list(bytes.fromhex(colour)) for colour in DISTINCT[:num_classes]]) / 255
    shades = ((1.0, 1.0), (0.45, 1.0), (1.0, 0.55), (0.6, 0.75))  # saturation, value
    return torch.tensor([colorsys.hsv_to_rgb(n / num_classes, *shades[n % 4]) for n in range(num_classes)])


@checks.takes_subclasses
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
    """Draw how one image's hard negatives are chosen, a row per layer: labels, prediction, errors, distance, choice.

    Labels and prediction are shown sampled to the layer's size. Errors and negatives have the colour of the *predicted*
    class (Eq. 6), from whose anchor the pixel is pushed away; errors that were not chosen are paler. Distances are in
    pixels of the layer. They are black if a class fills the whole image, because its errors then have no edge.

    Args:
        image: (3, H, W), float in 0..1 or uint8; shown in every row.
        labels: (H, W) integers. For a volume pass one plane, such as ``labels[z]`` with ``logits[:, z]``: it is shown
            as a map, with the distances within the plane.
        predictions: class map (H', W') of integers or logits (N, H', W') of floats.
        num_classes: N.
        sizes: (h, w) of each layer, from high to low resolution.
        ratio, ignore_index, seed: as in ``bane_negatives``.
        class_names: N names for the legend; None numbers the classes.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: an argument has the wrong shape, type or range; the error names it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    image = _shown(image)
    checks.several_classes(num_classes)
    checks.tensor("labels", labels, "the map (H, W) of one image")
    checks.tensor("predictions", predictions, "the class map (H', W') or the logits (N, H', W') of one image")
    if labels.ndim != 2:
        raise ValueError(
            f"labels: expected the map (H, W) of one image, got {checks.describe(labels)}. "
            "Pass one image, labels[i], or one plane of a volume, labels[i, z]."
        )
    labels = checks.class_map("labels", labels.detach().cpu()[None])
    predictions = checks.predictions("predictions", predictions.detach().cpu()[None], num_classes)
    if not isinstance(sizes, Sequence) or len(sizes) == 0:
        raise TypeError(
            f"sizes: expected a list with the (h, w) of each layer, got {checks.describe(sizes)}. "
            "Pass [x.shape[2:] for x in features]."
        )
    for size in sizes:
        checks.size("sizes", size)
    names = _names(class_names, num_classes)

    H, W = labels.shape[-2:]
    colours = class_colours(num_classes)
    of_class = torch.cat((colours, torch.tensor([VOID_COLOUR, CORRECT_COLOUR])))
    void, correct = num_classes, num_classes + 1

    def painted(classes: Tensor, elsewhere: Tensor | int) -> Tensor:
        """(1, h, w) classes → (h, w, 3) colours."""
        known = (classes >= 0) & (classes < num_classes)
        return of_class[torch.where(known, classes.long(), elsewhere)][0]

    place = {"extent": (0, W, H, 0), "interpolation": "nearest"}  # every layer is drawn as large as the image
    columns = ("image", "labels", "prediction", "error map", "edge distance", "chosen negatives")
    figure = Figure(layout="compressed")
    axes = figure.subplots(len(sizes), len(columns), squeeze=False)
    distance_map = colormaps["viridis"].with_extremes(bad=CORRECT_COLOUR, under=VOID_COLOUR, over=NO_EDGE_COLOUR)
    without_edge = False
    for axis, title in zip(axes[0], columns):
        axis.set_title(title, fontsize=11)
    for row, (h, w) in zip(axes, sizes):
        chosen = bane_negatives(
            predictions, labels, num_classes=num_classes, size=(h, w), ratio=ratio, ignore_index=ignore_index, seed=seed
        )
        at_layer = targets(labels, (h, w), num_classes, ignore_index)
        predicted = predicted_classes(predictions, (h, w), ignore_index)
        errors = error_map(predicted, at_layer, num_classes=num_classes, ignore_index=-1)
        distance = edge_distance(errors)[0]
        around = torch.where(at_layer < 0, void, correct)
        error_colours = painted(errors, around)
        pale = torch.where(errors[0, ..., None] >= 0, (1 - PALE) * error_colours + PALE, error_colours)
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
        row[0].set_ylabel("\n".join(_size(h, w, H, W)), fontsize=10)

        reached = distance[(distance >= 0) & distance.isfinite()]
        highest = max(reached.max().item(), 1.0) if len(reached) else 1.0
        without_edge |= bool(distance.isinf().any())
        elsewhere = torch.where(at_layer[0] < 0, -1.0, torch.nan)
        shown = torch.where(distance >= 0, distance.clamp(max=highest + 1), elsewhere).numpy()
        drawn = row[4].imshow(shown, cmap=distance_map, vmin=0, vmax=highest, **place)
        bar = figure.colorbar(drawn, ax=row[4], fraction=0.05, pad=0.02, ticks=[0, int(highest)])
        bar.ax.tick_params(labelsize=8, length=2)

    present = targets(labels, labels.shape[1:], num_classes, ignore_index).unique().tolist()
    predicted = predicted_classes(predictions, predictions.shape[-2:], ignore_index)
    present = sorted({*present, *predicted.unique().tolist()})
    patches = [Patch(facecolor=tuple(colours[n].tolist()), label=names[n]) for n in present if 0 <= n < num_classes]
    patches += [
        Patch(facecolor=VOID_COLOUR, label="ignored"),
        Patch(facecolor=CORRECT_COLOUR, edgecolor="0.7", label="correct"),
    ]
    if without_edge:
        patches.append(Patch(facecolor=NO_EDGE_COLOUR, label="error without an edge"))
    width, em = 12.5, 9 / 72
    longest = max(len(str(patch.get_label())) for patch in patches)
    # In units of em an entry has 4.8 for the patch and the gaps, and at most 0.65 for each letter.
    fitting = max(1, int(width / em / (4.8 + 0.65 * longest)))
    lines = -(-len(patches) // fitting)
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=-(-len(patches) // lines),
        frameon=False,
        fontsize=9,
        title="errors and negatives in the predicted class's colour, pale where not chosen; distance in the layer's px",
        title_fontsize=9,
    )
    # A row is at least 0.9 inches high, so that its name fits.
    figure.set_size_inches(width, 0.75 + 0.2 * lines + len(sizes) * max(2.0 * H / W, 0.9))
    return figure


@checks.takes_subclasses
def embedding_colours(features: Tensor) -> Tensor:
    """Show embeddings as colours: the three principal components of v = x / ‖x‖₂ are red, green and blue.

    Pixels with similar colours have similar embeddings. Each component is scaled from its 1st to its 99th percentile.
    PCA does not determine the sign of a component; it is chosen so that the largest weight is positive, and the colours
    of a network do not flip from call to call.

    Args:
        features: (B, D, h, w) floats of one layer. The colours are comparable over the batch.

    Returns:
        uint8 (B, h, w, 3) on the CPU. Pixels that are not finite are mid-grey, and so is a component without variance.

    Raises:
        TypeError, ValueError: features have the wrong type or rank; the error says which.
    """
    checks.feature_map("features", features)
    B, D, height, width = features.shape
    v = unit(features.detach().cpu().movedim(1, -1).reshape(-1, D).double())
    finite = v.isfinite().all(1, keepdim=True)
    count = finite.sum().clamp(min=1)
    v = torch.where(finite, v, 0.0)
    v = torch.where(finite, v - v.sum(0) / count, 0.0)
    variances, directions = torch.linalg.eigh(v.T @ v / count)
    variances, directions = variances[-3:].flip(0), directions[:, -3:].flip(1)  # eigh is in ascending order
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    components = v @ (directions * largest.sign())

    colours = torch.full((len(v), 3), 0.5, dtype=torch.float64)
    if finite.any():
        ordered = components[finite.squeeze(1)].sort(0).values
        low, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.01, 0.99))
        # A component with a smaller variance is only the rounding error of equal vectors.
        varies = (variances > 1e-12) & (high > low)
        scaled = ((components - low) / torch.where(varies, high - low, 1.0)).clamp(0, 1)
        colours[:, : components.shape[1]] = torch.where(finite & varies, scaled, 0.5)
    return (colours * 255).round().to(torch.uint8).view(B, height, width, 3)


@checks.takes_subclasses
def embeddings(image: Tensor, features: Sequence[Tensor]) -> Figure:
    """Draw an image and the embeddings of each layer as colours (``embedding_colours``), at the image's size.

    Args:
        image: (3, H, W), float in 0..1 or uint8.
        features: maps (D, h, w) of the same image, one per layer.

    Returns:
        A matplotlib figure. The colours of each layer are independent of the other layers.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: an argument has the wrong shape or type; the error names it.
    """
    from matplotlib.figure import Figure

    image = _shown(image)
    if not isinstance(features, Sequence) or len(features) == 0:
        raise TypeError(
            f"features: expected a list of feature maps, one for each layer, got {checks.describe(features)}. "
            "Put a single map into a list."
        )
    for i, x in enumerate(features):
        checks.tensor(f"features[{i}]", x, "a feature map (D, h, w) of one image")
        if x.ndim != 3 or x.numel() == 0:
            raise ValueError(
                f"features[{i}]: expected the map (D, h, w) of one image, got {checks.describe(x)}. "
                "Pass one image of a batch, x[b]."
            )
    H, W = image.shape[:2]
    pictures = [("image", image)]
    for x in features:
        height, width = x.shape[-2:]
        title = ", ".join(_size(height, width, H, W))
        pictures.append((title, embedding_colours(x.unsqueeze(0))[0]))
    columns = min(len(pictures), 5)
    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.6 * columns, rows * (0.35 + 2.6 * H / W)), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (title, picture) in zip(axes, pictures):
        axis.imshow(picture.numpy(), extent=(0, W, H, 0), interpolation="nearest")
        axis.set_title(title, fontsize=10)
    return figure


@checks.takes_subclasses
def anchor_similarity(
    features: Sequence[Tensor],
    labels: Tensor,
    *,
    num_classes: int,
    fusion_weight: float = 0.7,
    ignore_index: int = 255,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draw the cosine similarity of all pairs of class anchors, a matrix per layer.

    Two classes with similar anchors are easily confused.

    Args:
        features, labels, num_classes, fusion_weight, ignore_index: as in ``contextrast_loss``. The anchors are fused as
            there.
        class_names: N names; None numbers the classes.

    Returns:
        A matplotlib figure. Classes without pixels are grey.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError, TypeError: an argument has the wrong shape, type or range; the error names it.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    check_layers(features)
    checks.several_classes(num_classes)
    names = _names(class_names, num_classes)
    of_layers = [class_anchors(x.detach(), labels, num_classes, ignore_index=ignore_index) for x in features]
    top, top_counts = of_layers[-1]
    fused = [(fuse_anchors(a, n, top, top_counts, fusion_weight), n) for a, n in of_layers[:-1]] + of_layers[-1:]

    side = max(1.8, 0.24 * num_classes)
    margin = 0.3 + 0.08 * max(map(len, names))  # inches that the names take, at 8 pt
    figure = Figure(figsize=(0.9 + margin + (0.2 + side) * len(fused), side + margin + 0.3), layout="compressed")
    axes = figure.subplots(1, len(fused), squeeze=False)[0]
    colours = colormaps["RdBu_r"].with_extremes(bad=VOID_COLOUR)
    for axis, (a, n), x in zip(axes, fused, features):
        direction = unit(a.double().cpu())
        present = (n > 0).cpu()
        cosines = torch.where(present.unsqueeze(0) & present.unsqueeze(1), direction @ direction.T, torch.nan)
        drawn = axis.imshow(cosines.numpy(), cmap=colours, vmin=-1, vmax=1)
        axis.set_title(" × ".join(map(str, x.shape[-2:])), fontsize=10)
        axis.set_xticks(range(num_classes), names, rotation=90, fontsize=8)
        axis.set_yticks(range(num_classes), names if axis is axes[0] else [], fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.05, pad=0.01)
    bar.set_label("cosine", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return figure


def similarity_curve(results: dict[str, Tensor]) -> Figure:
    """Draw the paper's figure 5: cosine of wrongly predicted pixels to their anchors, by distance to the error's edge.

    There is a panel for each layer. If the line of the true class rises, the pixels near the edge are harder, which is
    the reason why BANE chooses them. Bars show the number of pixels at each distance, on a logarithmic scale. The last
    distance of ``AnchorSimilarity`` includes all larger ones, and distances without pixels are cut off at the end.

    Args:
        results: the result of ``metrics.AnchorSimilarity.compute()``.

    Returns:
        A matplotlib figure.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: results are not those of AnchorSimilarity, or of no batch.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    expected = {"distance", "true_class", "predicted_class", "pixels"}
    if not isinstance(results, dict) or not expected <= results.keys():
        got = sorted(results) if isinstance(results, dict) else checks.describe(results)
        raise ValueError(
            f"results: expected the result of metrics.AnchorSimilarity.compute(), got {got}. "
            "Pass the dict that it returned."
        )
    layers = len(results["pixels"])
    if layers == 0:
        raise ValueError("results: expected results of at least one batch, got none. Call update() first.")
    occupied = results["pixels"].sum(0).nonzero().flatten().tolist()
    shown = slice(0, 1 + max(occupied, default=0))
    distance = results["distance"][shown].tolist()
    figure = Figure(figsize=(max(3.1 * layers, 4.7), 2.7), layout="constrained")  # 4.7: the legend's width
    axes = figure.subplots(1, layers, squeeze=False, sharey=True)[0]
    for i, axis in enumerate(axes):
        of_pixels = axis.twinx()
        of_pixels.bar(distance, results["pixels"][i, shown].tolist(), width=0.9, color="0.9")
        of_pixels.set_yscale("symlog", linthresh=1)
        of_pixels.set_ylim(bottom=0)
        of_pixels.tick_params(labelsize=8, colors="0.55", length=2)
        axis.set_zorder(of_pixels.get_zorder() + 1)  # lines above bars
        axis.patch.set_visible(False)
        for name, style, label in (
            ("true_class", {"color": "C0"}, "anchor of the true class"),
            ("predicted_class", {"color": "C3", "linestyle": "--"}, "anchor of the predicted class"),
        ):
            axis.plot(distance, results[name][i, shown].tolist(), marker="o", markersize=3, label=label, **style)
        axis.set_title(f"layer {i}", fontsize=10)
        axis.set_xlabel("distance to the edge in px", fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.tick_params(labelsize=8)
        for each in (axis, of_pixels):
            each.spines[["top"]].set_visible(False)
    axes[0].set_ylabel("mean cosine", fontsize=9)
    of_pixels.set_ylabel("pixels", fontsize=9, color="0.55")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _shown(image: Tensor) -> Tensor:
    """An image (3, H, W) as float (H, W, 3) in 0..1, on the CPU."""
    checks.tensor("image", image, "an image (3, H, W)")
    image = image.detach().cpu()
    if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
        raise ValueError(
            f"image: expected (3, H, W), got {checks.describe(image)}. "
            "Pass one image of a batch, and repeat a grey one with .expand(3, -1, -1)."
        )
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise TypeError(
            f"image: expected floats in 0..1 or uint8, got {checks.describe(image)}. Call .byte() on values in 0..255."
        )
    return (image.float() / 255 if image.dtype == torch.uint8 else image.float().clamp(0, 1)).permute(1, 2, 0)


def _names(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    names = [str(n) for n in range(num_classes)] if class_names is None else list(map(str, class_names))
    if len(names) != num_classes:
        raise ValueError(
            f"class_names: expected {num_classes} names (num_classes), got {len(names)}. Pass one name for each class."
        )
    return names


def _size(height: int, width: int, H: int, W: int) -> list[str]:
    """A layer's size in words, with its stride if it is the same along both axes."""
    words = [f"{height} × {width}"]
    if H % height == 0 and W % width == 0 and H // height == W // width:
        words.insert(0, f"stride {H // height}")
    return words
