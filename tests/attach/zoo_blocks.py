"""Convolutions and residual blocks that the zoo's networks share."""

from torch import nn
from torch.nn import functional as F

N = 5
W = (8, 16, 24, 32)


def conv(inputs, outputs, kernel=3, stride=1, dilation=1, groups=1):
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def double(inputs, outputs):
    return nn.Sequential(conv(inputs, outputs), conv(outputs, outputs))


def up(x, like):
    return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)


class Bottleneck(nn.Module):
    """The bottleneck block of torchvision, which is narrow inside and has a wide output."""

    def __init__(self, inputs, outputs, stride=1, dilation=1):
        super().__init__()
        inner = outputs // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Basic(nn.Module):
    """A residual block of two convolutions. Its last activation is a function and not a module."""

    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride != 1 or inputs != outputs else nn.Identity()

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


def layer(inputs, outputs, stride=1, block=Basic, blocks=2, **options):
    rest = (block(outputs, outputs, **options) for _ in range(blocks - 1))
    return nn.Sequential(block(inputs, outputs, stride, **options), *rest)
