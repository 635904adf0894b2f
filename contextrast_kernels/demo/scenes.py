"""Data of the demo: texture mosaics with exact labels, or CamVid read from a folder; and the paper's augmentation.

A mosaic scene is made of warped Voronoi regions, small discs and thin bars, each filled with a piece of one
photograph, which is its class. A bar of void pixels (255) crosses every scene. The photographs ship inside the
scikit-image wheel, all of them CC0, and nothing is downloaded. Training scenes are cut from their left halves,
validation scenes from their right halves.

========= ========================================= ===========================================================
class     photograph                                credit and licence, as scikit-image states them
========= ========================================= ===========================================================
brick     brick wall                                cc0textures.com, Bricks25: CC0
grass     grass                                     deviantart.com, linolafett, Grass-01: CC0
gravel    gravel                                    cc0textures.com, Gravel04: CC0
cell      quantitative phase image of a cell        Müller, Schürmann, Girardo, Cojoc and Guck (2018): CC0
cat       the cat Chelsea                           Stefan van der Walt: CC0
coffee    a cup of coffee on a wooden table         Rachel Michetti, courtesy of Pikolo Espresso Bar: CC0
retina    fundus photograph of a normal left eye    Mikael Häggström (2014), Wikimedia Commons: CC0 1.0
========= ========================================= ===========================================================

Without scikit-image the textures are procedural, made with torch alone; the scenes are otherwise the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

VOID = 255

Batch = tuple[Tensor, Tensor]  # images (B,3,H,W) float32 in 0..1, labels (B,H,W) int64 with VOID


class DataError(Exception):
    """The data cannot be used; the message names the file."""


# ---------------------------------------------------------------------------------------------------------- textures


def photographs() -> dict[str, Tensor]:
    """The CC0 photographs by class, each (3,H,W) float32 in 0..1. Raises ImportError without scikit-image."""
    from skimage import data, transform

    # The retina has 1411 x 1411 pixels; at that size a region of a scene would show no vessel.
    images = {
        "brick": data.brick(),
        "grass": data.grass(),
        "gravel": data.gravel(),
        "cell": data.cell(),
        "cat": data.chelsea(),
        "coffee": data.coffee(),
        "retina": transform.downscale_local_mean(data.retina(), (3, 3, 1)),
    }
    tensors = {name: torch.as_tensor(image).float() / 255 for name, image in images.items()}
    return {name: t.permute(2, 0, 1) if t.ndim == 3 else t.expand(3, -1, -1) for name, t in tensors.items()}


def procedural() -> dict[str, Tensor]:
    """Seven synthetic textures of the same form as `photographs`, made with torch alone; always the same."""
    H, W = 256, 512
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(H).float(), torch.arange(W).float(), indexing="ij")

    def noise(cell: int) -> Tensor:
        coarse = torch.rand(1, 1, H // cell + 2, W // cell + 2, generator=generator)
        return F.interpolate(coarse, scale_factor=cell, mode="bicubic")[0, 0, :H, :W].clamp(0, 1)

    def tinted(gray: Tensor, red: float, green: float, blue: float) -> Tensor:
        gray = 0.75 * gray + 0.25 * noise(4)
        return torch.stack((gray * red, gray * green, gray * blue)).clamp(0, 1)

    wave = 2 * math.pi / 16
    return {
        "sand": tinted(noise(2), 0.9, 0.8, 0.7),
        "cloud": tinted(noise(16), 0.7, 0.8, 0.9),
        "waves": tinted(0.5 + 0.5 * torch.sin(wave * (y + 12 * noise(32))), 0.7, 0.8, 0.9),
        "stripes": tinted(((x + y) % 16 < 8).float(), 0.9, 0.8, 0.7),
        "checker": tinted(((x // 8 + y // 8) % 2), 0.8, 0.8, 0.8),
        "dots": tinted(((x % 12 - 6) ** 2 + (y % 12 - 6) ** 2 < 14).float(), 0.8, 0.9, 0.7),
        "rings": tinted(0.5 + 0.5 * torch.sin(wave * torch.hypot(x % 64 - 32, y % 64 - 32)), 0.8, 0.7, 0.9),
    }


class Textures:
    """One half of every image of a dict as `photographs()` returns it: "train" the left half, "val" the right one.

    A half smaller than a scene of size x size pixels is continued by its mirror image.
    """

    def __init__(self, images: dict[str, Tensor], split: str, size: int, device: torch.device | str = "cpu"):
        halves = []
        for image in images.values():
            middle = image.shape[-1] // 2
            half = image[..., :middle] if split == "train" else image[..., middle:]
            rows, columns = (_mirrored(max(length, size), length) for length in half.shape[-2:])
            halves.append(half[:, rows[:, None], columns])
        self.size = size
        self.room = torch.tensor([[side - size + 1 for side in half.shape[-2:]] for half in halves], device=device)
        H, W = (max(half.shape[axis] for half in halves) for axis in (-2, -1))
        self.pixels = torch.zeros(len(halves), H, W, 3, device=device)
        for n, half in enumerate(halves):
            self.pixels[n, : half.shape[-2], : half.shape[-1]] = half.permute(1, 2, 0)

    def __len__(self) -> int:
        return len(self.pixels)

    def paint(self, labels: Tensor, corners: Tensor, gain: Tensor, shade: Tensor) -> Tensor:
        """Fill every pixel from the texture of its class: labels (B,S,S) → images (B,3,S,S), not clamped.

        corners (B,N,2): the position of the scene's upper left pixel in each texture, from 0 to below `room` (N,2).
        gain (B,N,1), shade (B,N,3): a colour c becomes c * gain + shade.
        """
        N, H, W, _ = self.pixels.shape
        y, x = (torch.arange(self.size, device=labels.device) for _ in range(2))
        start = (torch.arange(N, device=labels.device) * H + corners[..., 0]) * W + corners[..., 1]  # (B,N)
        flat = labels.flatten(1)
        source = start.gather(1, flat).view_as(labels) + y[:, None] * W + x
        colours = self.pixels.view(-1, 3)[source]  # (B,S,S,3)
        of_class = (flat + N * torch.arange(len(flat), device=labels.device)[:, None]).view_as(labels)
        return (colours * gain.reshape(-1, 1)[of_class] + shade.reshape(-1, 3)[of_class]).permute(0, 3, 1, 2)


def _mirrored(count: int, length: int) -> Tensor:
    """Positions 0, 1, ... length-1, length-1, ... 1, 0, 0, 1, ...: `count` of them."""
    position = torch.arange(count) % (2 * length)
    return torch.minimum(position, 2 * length - 1 - position)


# ------------------------------------------------------------------------------------------------------------ scenes


class Shapes:
    """Random shapes for `count` scenes of height x width pixels. Their sizes are given for scenes 128 pixels high.

    `numbers` random numbers per scene are drawn at once by a generator on the CPU, so that every device gets the same
    scenes, and are moved to the device in one transfer.
    """

    def __init__(
        self, count: int, height: int, width: int, numbers: int, generator: torch.Generator, device: torch.device | str
    ):
        self.numbers, self.drawn = torch.rand(count, numbers, generator=generator).to(device), 0
        self.y = torch.arange(height, device=device)[:, None] * (128 / height)
        self.x = torch.arange(width, device=device) * (128 / height)
        self.width = 128 * width / height

    def draw(self, *shape: int) -> Tensor:
        """Uniform numbers below 1, (count, *shape)."""
        first, self.drawn = self.drawn, self.drawn + math.prod(shape)
        return self.numbers[:, first : self.drawn].view(-1, *shape)

    def place(self, *shape: int) -> tuple[Tensor, Tensor]:
        return 128 * self.draw(*shape), self.width * self.draw(*shape)

    def disc(self) -> Tensor:
        (row, column), radius = self.place(1, 1), 3 + 6 * self.draw(1, 1)
        return (self.y - row) ** 2 + (self.x - column) ** 2 < radius**2

    def bar(self, half_width: float) -> Tensor:
        angle, (row, column) = math.pi * self.draw(1, 1), self.place(1, 1)
        return ((self.y - row) * angle.cos() - (self.x - column) * angle.sin()).abs() < half_width

    def regions(self, N: int, *, sites: int = 9, discs: int = 2, bars: int = 2) -> Tensor:
        """Labels (count, height, width) below N: warped Voronoi regions, small discs and thin bars."""
        warp = 6 * torch.sin(self.y / 9 + 6 * self.draw(1, 1)) + 6 * torch.cos(self.x / 11 + 6 * self.draw(1, 1))
        rows, columns = self.place(sites, 1, 1)
        nearest = (((self.y + warp)[:, None] - rows) ** 2 + ((self.x + warp)[:, None] - columns) ** 2).argmin(1)
        labels = (N * self.draw(sites)).long().gather(1, nearest.flatten(1)).view_as(nearest)
        for shape in [self.disc() for _ in range(discs)] + [self.bar(1.5) for _ in range(bars)]:
            labels = torch.where(shape, (N * self.draw(1, 1)).long(), labels)
        return labels


def mosaic(textures: Textures, count: int, generator: torch.Generator) -> Batch:
    """Draw `count` scenes of the textures' size. The generator is on the CPU, so that every device gets the same."""
    N, S = len(textures), textures.size
    shapes = Shapes(count, S, S, 48 + 6 * N, generator, textures.pixels.device)
    labels = shapes.regions(N)
    corners = (shapes.draw(N, 2) * textures.room).long()
    gain, shade = 0.7 + 0.6 * shapes.draw(N, 1), 0.1 * (shapes.draw(N, 3) - 0.5)
    images = textures.paint(labels, corners, gain, shade)
    return images.clamp(0, 1), labels.masked_fill(shapes.bar(2.0), VOID)


class Mosaic:
    """Texture-mosaic scenes: an endless stream for training, and a fixed set for validation.

    `note` says which textures are used and, if photographs are missing, which package has them. `shown` holds a few
    validation scenes for pictures, large enough to show a stage of stride 32.
    """

    def __init__(self, size: int, *, validation: int, device: torch.device | str = "cpu"):
        try:
            images = photographs()
            self.note = "texture mosaics from scikit-image's CC0 photographs"
        except ImportError as error:
            images = procedural()
            self.note = f"procedural texture mosaics, because the photographs need scikit-image ({error})"
        self.classes = tuple(images)
        self.size = (size, size)
        self.textures = Textures(images, "train", size, device)
        generator = torch.Generator().manual_seed(2**32)
        self.validation = mosaic(Textures(images, "val", size, device), validation, generator)
        self.shown = mosaic(Textures(images, "val", max(size, 256), device), 8, generator)

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end; the same seed gives the same ones."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield mosaic(self.textures, batch, generator)


# ------------------------------------------------------------------------------------------------------------ CamVid


class CamVid:
    """CamVid's frames in SegNet's layout, brought to one size and kept in memory.

    root: a folder with train, trainannot, val and valannot. An image and its label map share their file stem; a label
        map is a PNG of one channel with 0..10 for the classes below and 11 for void.
    size: height in pixels; the width keeps the frames' proportions.
    limit: the most frames to read of each split.

    Every file is read and checked here, so that nothing fails later: DataError names the first bad one.
    """

    classes = (
        "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
    )  # fmt: skip
    note = "CamVid"

    def __init__(self, root: Path, size: int, *, limit: int | None = None, device: torch.device | str = "cpu"):
        if not root.is_dir():
            raise DataError(f"no folder {root}. Give CamVid's, which holds train, trainannot, val and valannot.")
        self.images, self.labels = (t.to(device) for t in _read_split(root, "train", size, limit, len(self.classes)))
        images, labels = (t.to(device) for t in _read_split(root, "val", size, limit, len(self.classes)))
        self.size = tuple(labels.shape[-2:])
        if self.size != tuple(self.labels.shape[-2:]):
            raise DataError(
                f"the frames of {root / 'train'} and {root / 'val'} have different proportions, "
                f"which would give {tuple(self.labels.shape[-2:])} and {self.size} pixels. Both must be the same."
            )
        self.validation = self.shown = images.float() / 255, labels.long()

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        """Training batches without end, each frame once before any comes again; the same seed gives the same ones."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < batch:
                order = torch.cat((order, torch.randperm(len(self.images), generator=generator)))
            chosen, order = order[:batch].to(self.images.device), order[batch:]
            yield self.images[chosen].float() / 255, self.labels[chosen].long()


Data = Mosaic | CamVid


def _read_split(root: Path, split: str, height: int, limit: int | None, num_classes: int) -> tuple[Tensor, Tensor]:
    """All frames of a split: images (n,3,h,w) and labels (n,h,w), both uint8."""
    import numpy as np

    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"reading CamVid needs Pillow ({error}). Install it: pip install pillow.") from error

    def read(path: Path) -> Image.Image:
        try:
            with Image.open(path) as image:
                image.load()
                return image
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read {path} ({error}). Copy the file again.") from error

    images_folder, labels_folder = root / split, root / f"{split}annot"
    for folder in (images_folder, labels_folder):
        if not folder.is_dir():
            raise DataError(f"no folder {folder}. SegNet's layout has train, trainannot, val and valannot.")
    paths = sorted(path for path in images_folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))[:limit]
    if not paths:
        raise DataError(f"no .png or .jpg image in {images_folder}. Give CamVid's folder in SegNet's layout.")

    images, labels, first = [], [], None
    for path in paths:
        label_path = labels_folder / f"{path.stem}.png"
        if not label_path.is_file():
            raise DataError(f"no label map {label_path} for the image {path}. Add the map, or remove the image.")
        image, label = read(path).convert("RGB"), read(label_path)
        if label.size != image.size:
            raise DataError(
                f"the label map {label_path} has {_pixels(label)}, its image has {_pixels(image)}. "
                "Both must have the same size."
            )
        if label.mode not in ("L", "P"):
            raise DataError(f"the label map {label_path} has mode {label.mode}. Save it as L or P.")
        values = np.array(label)
        if values.max() > num_classes:
            raise DataError(
                f"the label map {label_path} holds the value {values.max()}. "
                f"Expected 0..{num_classes - 1} for the classes and {num_classes} for void, as in SegNet's CamVid."
            )
        if first is None:
            first_path, first = path, image
        elif image.size != first.size:
            raise DataError(
                f"the image {path} has {_pixels(image)}, {first_path} has {_pixels(first)}. "
                "All images must have the same size."
            )
        W, H = image.size
        width = max(1, round(height * W / H))
        images.append(np.array(image.resize((width, height), Image.Resampling.BILINEAR)))
        values[values == num_classes] = VOID
        labels.append(values[np.arange(height)[:, None] * H // height, np.arange(width) * W // width])
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.stack(labels))


def _pixels(image: Image.Image) -> str:
    return f"{image.width} x {image.height} pixels"


# ------------------------------------------------------------------------------------------------------ augmentation


JITTER, HUE, ZOOM, SHIFT, OFTEN = 0.3, 0.05, (0.75, 1.5), 0.1, 0.8
"""JITTER: the largest change of brightness, contrast and saturation. HUE: that of the hue, in turns. ZOOM: the range of
the scale. SHIFT: the largest shift, as a share of the sides. OFTEN: the probability that the colours change, and that
scale and shift change."""


def augmentation() -> tuple[Callable[[Tensor, Tensor], Batch], str]:
    """The paper's augmentation (colour jitter, flip, random scale) on the batch's device, and a note that names it.

    kornia does it if it is installed, else ``plain`` with the same ranges. Every image of a batch draws its own
    parameters from torch's global generator.
    """
    try:
        import kornia.augmentation as K
    except ImportError as error:
        return (
            plain,
            f"colour jitter, flips and random scale in plain torch, because the library's need kornia ({error})",
        )

    joint = K.AugmentationSequential(
        K.ColorJitter(JITTER, JITTER, JITTER, HUE, p=OFTEN),
        K.RandomHorizontalFlip(p=0.5),
        K.RandomAffine(degrees=0.0, translate=(SHIFT, SHIFT), scale=ZOOM, p=OFTEN),
        data_keys=["input", "mask"],
    )

    def augment(images: Tensor, labels: Tensor) -> Batch:
        images, shifted = joint(images, _void_is_zero(labels))
        return images, _zero_is_void(shifted)

    return augment, "colour jitter, flips and random scale by kornia"


def plain(images: Tensor, labels: Tensor) -> Batch:
    """``augmentation`` without kornia, and without waiting for the device. A change of hue is a rotation about the axis
    of the greys."""
    B, device = len(images), images.device
    drawn = torch.rand(B, 10, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    coloured, mirrored, moved = drawn[:, :3].unbind(1)
    between = 2 * drawn[:, 3:] - 1  # -1..1

    change = torch.where(coloured < OFTEN, between[:, :4].T, 0.0)[..., None, None, None]  # (4,B,1,1,1)
    brightness, contrast, saturation = 1 + JITTER * change[:3]
    images = brightness * images
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey.mean((2, 3), keepdim=True), images, contrast)
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    angle = (2 * math.pi * HUE * change[3]).flatten(1)[..., None]  # (B,1,1)
    eye, third = torch.eye(3, device=device), 1 / 3
    turn = torch.linalg.cross(eye, torch.full_like(eye, third**0.5))
    rotation = angle.cos() * eye + (1 - angle.cos()) * third + angle.sin() * turn
    images = torch.einsum("bij,bjhw->bihw", rotation, images).clamp(0, 1)

    scale = torch.where(moved < OFTEN, ZOOM[0] + (ZOOM[1] - ZOOM[0]) * (between[:, 4] + 1) / 2, 1.0)
    shift = torch.where(moved < OFTEN, 2 * SHIFT * between[:, 5:].T, 0.0) / scale  # (2,B), in halves of the sides
    side, zero = torch.where(mirrored < 0.5, -1 / scale, 1 / scale), torch.zeros_like(scale)
    rows = torch.stack((side, zero, -shift[0]), 1), torch.stack((zero, 1 / scale, -shift[1]), 1)
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    return images, _zero_is_void(F.grid_sample(_void_is_zero(labels), grid, mode="nearest", align_corners=False))


def _void_is_zero(labels: Tensor) -> Tensor:
    """Shift labels so that 0 means void: a warp fills pixels from outside the image with 0, otherwise a class."""
    return torch.where(labels == VOID, 0, labels + 1)[:, None].float()


def _zero_is_void(shifted: Tensor) -> Tensor:
    labels = shifted[:, 0].long() - 1
    return torch.where(labels < 0, VOID, labels)
