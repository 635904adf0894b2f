"""Small networks for the tests of ``attach``, and one step of training with them."""

import contextlib
import io

import torch
from torch import nn
from torch.nn import functional as F

import contextrast_kernels as ck

N = 4
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, N, (2, 64, 64), generator=torch.Generator().manual_seed(0))
WIDTHS = (8, 12, 16, 20)


def stage(inputs, outputs, inplace=False):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=inplace)
    )


def call(module, x):
    return module(x)


class Net(nn.Module):
    """A stem of stride 2, four stages, and a classifier on the first. ``run(stage, x)`` calls a stage."""

    def __init__(self, inplace=False, run=call):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        widths = (8, *WIDTHS)
        self.stages = nn.ModuleList(stage(widths[i], widths[i + 1], inplace) for i in range(4))
        self.classifier = nn.Conv2d(WIDTHS[0], N, 1)
        self.run = run

    def maps(self, x):
        x = self.stem(x)
        return [x := self.run(stage, x) for stage in self.stages]

    def forward(self, x):
        return F.interpolate(self.classifier(self.maps(x)[0]), x.shape[-2:])


def attached(model=None, **options):
    model = Net() if model is None else model
    with contextlib.redirect_stdout(io.StringIO()):
        return model, ck.attach(model, **{"dim": 8, "example_input": IMAGES[:1], **options})


def step(model, tap, images=IMAGES, labels=LABELS):
    logits = model(images)
    loss = ck.ContextrastCriterion(N, layer_weights=(1.0,) * len(tap.layers))(tap.features(), labels, logits)
    loss.backward()
    return loss.item()


def found(model, **options):
    """The chosen layers: name → (channels, stride)."""
    _, tap = attached(model, **options)
    return {layer.name: (layer.channels, layer.stride) for layer in tap.layers}


class Wrapped(nn.Module):
    """A network whose encoder returns ``shape(image, maps)``. The logits come from the first map."""

    def __init__(self, shape, net=None):
        super().__init__()
        self.encoder = Encoder(shape, net or Net())
        self.classifier = nn.Conv2d(WIDTHS[0], N, 1)

    def forward(self, x):
        return F.interpolate(self.classifier(self.encoder(x)[1]), x.shape[-2:])


class Encoder(nn.Module):
    def __init__(self, shape, net):
        super().__init__()
        self.net = net
        self.shape = shape

    def forward(self, x):
        maps = self.net.maps(x)
        return self.shape(x, maps), maps[0]
