"""A small network and endless coloured scenes, so that the examples run anywhere. Replace both with your own."""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

NUM_CLASSES = 5


class Network(nn.Module):
    """Four encoder stages of stride 4 to 32, and a classifier on all of them: images → logits at a quarter size."""

    def __init__(self, width: int = 16):
        super().__init__()
        channels = [width, 2 * width, 3 * width, 4 * width]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.BatchNorm2d(o), nn.ReLU())
            for i, o in zip([width, *channels], channels)
        )
        self.classifier = nn.Conv2d(sum(channels), NUM_CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        maps = [x := stage(x) for stage in self.stages]
        size = maps[0].shape[-2:]
        return self.classifier(torch.cat([interpolate(m, size, mode="bilinear") for m in maps], 1))


class Scenes(Dataset):
    """Images (3, size, size), labels (size, size): a patchwork of classes, each a colour, with noise and a void."""

    def __init__(self, length: int = 64, size: int = 64):
        self.length, self.size = length, size
        self.colours = torch.rand(NUM_CLASSES, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        labels = torch.randint(NUM_CLASSES, (self.size // 8, self.size // 8), generator=random)
        labels = labels.repeat_interleave(8, 0).repeat_interleave(8, 1)
        image = self.colours[labels].movedim(2, 0) + 0.3 * torch.randn(3, self.size, self.size, generator=random)
        labels[:2] = 255
        return image, labels
