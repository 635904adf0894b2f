"""CamVid's frames in SegNet's layout, and the batches that a seed draws from them."""

import pathlib

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import InterpolationMode, resize

from benchmarks.camvid.arms import CLASSES, VOID


class DataError(Exception):
    """The folder is not CamVid's. The message is one sentence that names the file."""


def frames(root: pathlib.Path, split: str, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Read all frames of a split: images (n, 3, *size) and label maps (n, *size), both uint8; void becomes 255.

    Every file is checked here, so that no training fails for one later. Labels are sampled at (row * H) // height.
    """
    for folder in (root / split, root / f"{split}annot"):
        if not folder.is_dir():
            raise DataError(f"--root: no folder {folder}. Give CamVid's with train, trainannot, val and valannot.")
    paths = sorted(path for path in (root / split).iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not paths:
        raise DataError(f"--root: no .png or .jpg image in {root / split}. Give CamVid's folder in SegNet's layout.")
    images, labels = [], []
    for path in paths:
        image = torch.from_numpy(_read(path, "RGB")).permute(2, 0, 1)
        label_path = root / f"{split}annot" / f"{path.stem}.png"
        label = torch.from_numpy(_read(label_path))
        H, W = label.shape[:2]
        if label.ndim != 2 or image.shape[1:] != label.shape or label.max() > len(CLASSES):
            raise DataError(
                f"{label_path}: expected one byte a pixel, 0..{len(CLASSES)}, and {tuple(image.shape[1:])} pixels as "
                f"in {path.name}, got {tuple(label.shape)} and values up to {int(label.max())}. Is it SegNet's CamVid?"
            )
        label = label[torch.arange(size[0])[:, None] * H // size[0], torch.arange(size[1]) * W // size[1]]
        labels.append(torch.where(label == len(CLASSES), VOID, label).to(torch.uint8))
        images.append(resize(image, list(size), InterpolationMode.BILINEAR, antialias=True))
    return torch.stack(images), torch.stack(labels)


def class_weights(labels: Tensor) -> Tensor:
    """The weights of the classes in the cross-entropy: √(median frequency / own frequency).

    SegNet's protocol has no root. With it a short training learns the rare classes too.
    """
    counts = torch.bincount(labels.flatten().long(), minlength=VOID + 1)[: len(CLASSES)].clamp(min=1).float()
    return (counts.median() / counts).sqrt()


def _read(path: pathlib.Path, mode: str | None = None) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Copy the file again.") from error


def draw(seed: int, *what: int) -> int:
    """A 32-bit seed for each purpose of a seed."""
    return int(np.random.SeedSequence((seed, *what)).generate_state(1)[0])


def order(count: int, batch: int, seed: int, iteration: int) -> Tensor:
    """The indices of an iteration's frames. Each of ``count`` frames is used once before any is used again."""
    places = range(iteration * batch, (iteration + 1) * batch)
    epochs = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(draw(seed, 1, epoch)))
        for epoch in {place // count for place in places}
    }
    return torch.stack([epochs[place // count][place % count] for place in places])


def augmentation(size: tuple[int, int]) -> v2.Transform:
    """The paper's augmentation: random scale, flip and colour jitter. It draws from torch's generator."""
    fill = {tv_tensors.Image: 127, tv_tensors.Mask: VOID}
    return v2.Compose(
        [
            v2.ScaleJitter(size, scale_range=(0.5, 2.0)),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(0.3, 0.3, 0.3),
        ]
    )


def batch(images: Tensor, labels: Tensor, augment: v2.Transform, seed: int, iteration: int, count: int):
    """An iteration's batch: float images in 0..1 and int64 labels. It depends only on seed and iteration."""
    chosen = order(len(images), count, seed, iteration)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(draw(seed, 2, iteration))
        pairs = [augment(tv_tensors.Image(images[i]), tv_tensors.Mask(labels[i])) for i in chosen]
    return (
        torch.stack([image.as_subclass(Tensor) for image, _ in pairs]).float() / 255,
        torch.stack([label.as_subclass(Tensor) for _, label in pairs]).long(),
    )
