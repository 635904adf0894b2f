"""Named inputs for tests, benchmarks and ``bench``, so that the timed inputs are also tested.

A case has the sizes of one of the paper's training settings. ``dataclasses.replace`` makes variants of it, and ``tiny``
a small one that runs quickly on a CPU. Inputs depend only on the case and the seed: they are drawn on the CPU and then
moved. Label maps come from CamVid's frames if their folder is given; otherwise they are scenes like the demo's.
"""

import functools
import math
import pathlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from contextrast_kernels import maps
from contextrast_kernels.demo import scenes

HRNET = (4, 8, 16, 32)
DEEPLAB = (4, 8, 8, 8)  # ResNet's stages, the last two dilated; 4, 8, 16, 16 at output stride 16
LAYER_SETS = {"hrnet": HRNET, "deeplab": DEEPLAB, "deeplab16": (4, 8, 16, 16)}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
LAYER_WEIGHTS = (1.0, 0.7, 0.4, 0.1)

ERROR_SHARES = {"trained": 0.10, "mid": 0.34}
"""The share of wrong pixels among the valid ones, at the labels' size, by regime. "30 % errors" is a regime too."""
REGIMES = (*ERROR_SHARES, "collapsed", "noise", "whole-image")


def error_share(regime: str) -> float | None:
    """The share of wrong pixels in a regime; None if it follows from the labels."""
    if regime in ERROR_SHARES:
        return ERROR_SHARES[regime]
    if regime.endswith(" % errors"):
        try:
            share = float(regime.removesuffix(" % errors")) / 100
        except ValueError:
            share = math.nan
        if 0 < share <= 0.6:
            return share
    elif regime in REGIMES:
        return None
    raise ValueError(
        f"regime: expected one of {', '.join(REGIMES)}, or '30 % errors' with up to 60, got {regime!r}. "
        "Choose one of these."
    )


class Inputs(NamedTuple):
    features: list[Tensor]
    """(B, D, h_i, w_i) of every layer: each pixel is its class's centre plus noise of the same size."""
    labels: Tensor
    """int64 (B, H, W), 255 = ignored."""
    predictions: Tensor
    """int64 (B, H, W), the class map at the labels' size."""
    logits: Tensor
    """(B, N, h_0, w_0) of the features' dtype, whose arg-max is that map at the first layer's size."""


@dataclass(frozen=True)
class Case:
    """Sizes, dtype and regime of one input."""

    name: str
    batch: int
    height: int
    width: int
    num_classes: int
    channels: int = 256
    strides: tuple[int, ...] = HRNET
    dtype: torch.dtype = torch.bfloat16
    layout: str = "nchw"
    regime: str = "trained"

    def __post_init__(self):
        if self.num_classes < 2:
            raise ValueError(
                f"num_classes: expected at least 2, so that a prediction can be wrong, got {self.num_classes}. "
                "Pass a larger one."
            )
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {self.layout!r}. Choose one of these.")
        error_share(self.regime)

    def __str__(self):
        strides = "-".join(map(str, self.strides))
        return (
            f"{self.name}: B {self.batch}, {self.height} x {self.width}, N {self.num_classes}, D {self.channels}, "
            f"strides {strides}, {str(self.dtype).removeprefix('torch.')}, {self.layout}, {self.regime}"
        )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(h, w) of every layer."""
        return [(-(-self.height // stride), -(-self.width // stride)) for stride in self.strides]

    @property
    def feature_bytes(self) -> int:
        return self.batch * self.channels * sum(h * w for h, w in self.sizes) * self.dtype.itemsize

    @property
    def loss_options(self) -> dict:
        """The keywords of ``contextrast_loss`` for this case."""
        weights = (LAYER_WEIGHTS + LAYER_WEIGHTS[-1:] * len(self.strides))[: len(self.strides)]
        return {"num_classes": self.num_classes, "layer_weights": weights}

    def tiny(self) -> "Case":
        """The same case for a CPU: sides a sixteenth, 2 images, 16 channels; float32 for bfloat16, which Triton's
        interpreter gets wrong."""
        dtype = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        height, width = max(self.height // 16, 1), max(self.width // 16, 1)
        name, batch = f"{self.name} tiny", min(self.batch, 2)
        return replace(self, name=name, batch=batch, height=height, width=width, channels=16, dtype=dtype)

    def label_maps(self, seed: int = 0, frames: pathlib.Path | None = None) -> tuple[Tensor, Tensor]:
        """Labels and predicted classes, int64 (B, H, W), on the CPU.

        frames: CamVid's folder in SegNet's layout; DataError says what is wrong with it.
        """
        maps_alone = replace(self, name="", channels=1, strides=(1,), dtype=torch.float32, layout="nchw")
        labels, predictions = _label_maps(maps_alone, seed, frames)
        return labels.clone(), predictions.clone()

    def inputs(self, device: torch.device | str = "cpu", seed: int = 0, frames: pathlib.Path | None = None) -> Inputs:
        labels, predictions = self.label_maps(seed, frames)
        generator = torch.Generator().manual_seed(seed + 1)
        B, N, D = self.batch, self.num_classes, self.channels

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def finished(x: Tensor) -> Tensor:
            return x.to(device, self.dtype, memory_format=LAYOUTS[self.layout])

        centres = torch.cat((noise(N, D), torch.zeros(1, D)))  # the last row for ignored pixels, -1
        features = []
        for h, w in self.sizes:
            centre = centres[maps.targets(labels, (h, w), N, scenes.VOID)].permute(0, 3, 1, 2)
            features.append(finished(noise(B, D, h, w).add_(centre)))
        logits = noise(B, N, *self.sizes[0]).clamp_(-3, 3)
        sampled = maps.to_size(predictions, *self.sizes[0])[:, None]
        logits.scatter_(1, sampled, 8.0)
        return Inputs(features, labels.to(device), predictions.to(device), finished(logits))


CASES = {
    case.name: case
    for case in (
        # The paper's training settings: batch, crop, classes.
        Case("cityscapes", 8, 512, 1024, 19),
        Case("camvid", 16, 360, 480, 11),
        Case("ade20k", 12, 512, 512, 150),
        Case("coco-stuff", 16, 512, 512, 171),
        Case("pascal-context", 16, 512, 512, 59),
    )
}


# ------------------------------------------------------------------------------------------------------------- labels


@functools.lru_cache(maxsize=4)
def _label_maps(case: Case, seed: int, frames: pathlib.Path | None) -> tuple[Tensor, Tensor]:
    """Cached for the variants of a case, because full-size maps take seconds."""
    generator = torch.Generator().manual_seed(seed)
    classes, void = _scenes(case, generator) if frames is None else _frames(case, frames, generator)
    return _predicted(case, classes, void, generator)


def _scenes(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Class maps, and their void pixels: a thin bar, and the lowest twelfth, like the bonnet of a car.

    An image has up to a dozen classes, drawn with decreasing frequency from all N. The number of regions is chosen so
    that a block of 8 x 64 pixels at stride 4 has about as many classes as on CamVid's frames, 2.6 to 4.4.
    """
    H, W, N = case.height, case.width, case.num_classes
    sites = max(4, 14 * W // H)
    frequency = 1.0 / torch.arange(1, N + 1)
    classes, void = [], []
    for _ in range(case.batch):
        palette = torch.multinomial(frequency, min(N, 12), generator=generator)
        shapes = scenes.Shapes(1, H, W, 3 * sites + 100, generator, "cpu")
        classes.append(palette[shapes.regions(len(palette), sites=sites, discs=3, bars=3)])
        void.append(shapes.bar(1.0) | (torch.arange(H)[:, None] >= H - H // 12))
    return torch.cat(classes), torch.cat(void)


def _frames(case: Case, folder: pathlib.Path, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """CamVid's label maps at the case's size, by nearest sampling; each image's classes are spread over all N."""
    frames = scenes.CamVid(pathlib.Path(folder), 360, limit=case.batch).labels.long()
    N = case.num_classes
    labels = maps.to_size(frames[torch.arange(case.batch) % len(frames)], case.height, case.width)
    void = labels == scenes.VOID
    if len(scenes.CamVid.classes) < N:
        dealt = torch.stack([torch.randperm(N, generator=generator) for _ in labels])
        classes = torch.stack([palette[image] for palette, image in zip(dealt, labels.where(~void, 0))])
    else:
        classes = labels.where(~void, 0) % N
    return classes, void


# -------------------------------------------------------------------------------------------------------- predictions


def _predicted(case: Case, classes: Tensor, void: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    share, N = error_share(case.regime), case.num_classes
    if case.regime == "whole-image":  # one wrong class without an edge
        return classes.clamp(max=N - 2), torch.full_like(classes, N - 1)
    labels = classes.masked_fill(void, scenes.VOID)
    if case.regime == "collapsed":
        return labels, torch.full_like(classes, int(classes[~void].mode().values))
    if case.regime == "noise":
        return labels, torch.randint(N, classes.shape, generator=generator)
    assert share is not None  # the regimes without a share are above
    return labels, _wrong(classes, ~void, share, generator)


def _wrong(classes: Tensor, valid: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Predictions of which ``share`` is wrong.

    Most errors are regions with the class of a different place. The rest are along borders, which a smooth field shifts
    until the share is reached.
    """
    B, H, W = classes.shape
    rows, columns = torch.arange(H)[:, None], torch.arange(W)
    images = torch.arange(B)[:, None, None]

    def moved(field: Tensor, far: float) -> Tensor:
        shift = (far * field).round().long()
        return classes[images, (rows + shift[:, 0]).clamp(0, H - 1), (columns + shift[:, 1]).clamp(0, W - 1)]

    elsewhere = classes.roll((H // 3, W // 3), (1, 2))
    wavy = _smooth((B, 1, H, W), max(2, min(H, W) // 6), generator)[:, 0]
    border = _smooth((B, 2, H, W), max(2, min(H, W) // 16), generator)

    wrong_there = wavy.where(valid & (elsewhere != classes), -math.inf).flatten()
    in_regions = max(1, round(0.7 * share * int(valid.sum())))
    threshold = wrong_there.kthvalue(max(1, wrong_there.numel() - in_regions)).values
    regions = wavy > threshold

    low, high = 0.0, float(max(H, W))
    for _ in range(16):
        far = (low + high) / 2
        predictions = torch.where(regions, elsewhere, moved(border, far))
        if float(((predictions != classes) & valid).sum() / valid.sum()) < share:
            low = far
        else:
            high = far
    return predictions


def _smooth(shape: tuple[int, int, int, int], cell: int, generator: torch.Generator) -> Tensor:
    """A random field of standard deviation about 1 that changes over ``cell`` pixels."""
    B, C, H, W = shape
    coarse = torch.randn(B, C, H // cell + 4, W // cell + 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, scale_factor=cell, mode="bicubic")
    return fine[:, :, cell : cell + H, cell : cell + W]
