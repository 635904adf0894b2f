"""Contextrast on volumes: a small 3-D network, its own feature maps, and generated scans with flat voxels.

python examples/volumes.py
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

import contextrast_kernels as ck

NUM_CLASSES = 4
SAMPLING = (2.5, 1.0, 1.0)  # a voxel of the scan is 2.5 times as deep as it is wide


class Network(nn.Module):
    """Three encoder stages and a classifier over all of them: scans → logits at half size, and the stages' maps."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.channels = [width, 2 * width, 4 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv3d(i, o, 3, stride=2, padding=1), nn.BatchNorm3d(o), nn.ReLU())
            for i, o in zip([1, *self.channels], self.channels)
        )
        self.classifier = nn.Conv3d(sum(self.channels), NUM_CLASSES, 1)

    def forward(self, scans: Tensor) -> tuple[Tensor, list[Tensor]]:
        x, maps = scans, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        size = maps[0].shape[2:]
        return self.classifier(torch.cat([interpolate(m, size, mode="trilinear") for m in maps], 1)), maps


def scans(batch: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scans (B, 1, 12, 32, 32) and labels (B, 12, 32, 32): three balls of different brightness on a noisy ground."""
    place = torch.stack(torch.meshgrid(*(torch.arange(n) for n in (12, 32, 32)), indexing="ij"))
    place = place * torch.tensor(SAMPLING).view(3, 1, 1, 1)
    labels = torch.zeros(batch, 12, 32, 32, dtype=torch.int64)
    for n in range(1, NUM_CLASSES):
        centre = torch.rand(batch, 3, 1, 1, 1, generator=random) * 28
        labels[((place - centre) ** 2).sum(1) < 64] = n
    labels[:, 0] = 255  # not annotated
    brightness = torch.where(labels == 255, 0, labels).unsqueeze(1).float()
    return brightness + 0.7 * torch.randn(brightness.shape, generator=random), labels


def train(steps: int, batch: int = 2) -> list[float]:
    """The loss of every step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = Network().to(device)
    heads = nn.ModuleList(ck.ProjectionHead(channels, 32, spatial_dims=3) for channels in model.channels).to(device)
    criterion = ck.ContextrastCriterion(NUM_CLASSES, layer_weights=(1.0, 0.7, 0.4), sampling=SAMPLING)
    optimizer = torch.optim.AdamW([*model.parameters(), *heads.parameters()], lr=3e-3)
    random, losses = torch.Generator().manual_seed(0), []
    scores = ck.metrics.ConfusionMatrix(NUM_CLASSES)
    for step in range(steps):
        images, labels = (x.to(device) for x in scans(batch, random))
        logits, maps = model(images)
        loss = criterion([head(m) for head, m in zip(heads, maps)], labels, logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scores.update(logits.detach(), labels)
        losses.append(loss.item())
        if (step + 1) % 10 == 0:
            seen = criterion.last
            print(f"{step + 1:4d}  cross-entropy {seen['cross_entropy']:.3f}  contrast {seen['contrast']:.3f}", end="")
            print(f"  mIoU of the last steps {scores.compute()['miou']:.2f}")
            scores = ck.metrics.ConfusionMatrix(NUM_CLASSES)
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    train(parser.parse_args().steps)
