"""The study's networks, from random weights: each gives logits at the images' size."""

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import Absent
from contextrast_kernels.demo.training import Network


class Segmenter(nn.Module, ABC):
    """Images (B,3,H,W) in 0..1, H and W multiples of 32 → logits (B,N,H,W)."""

    layers: tuple[str, ...]
    """What ``ck.attach`` is to tap."""

    @property
    @abstractmethod
    def classify(self) -> nn.Module:
        """The last convolution. What goes into it is what A and U are measured on."""

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """At any size, for images of about zero mean and unit variance."""

    def forward(self, images: Tensor) -> Tensor:
        logits = self.logits((images - 0.45) / 0.25)
        # In float32: half precision rounds neighbouring classes' logits to ties.
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear")


@contextlib.contextmanager
def needed(library: str, network: str) -> Iterator[None]:
    """Around a library's import: what it raises where it is missing, or built for another torch, is a sentence."""
    try:
        yield
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise Absent(
            f"{network} needs {library} ({reason}): install the one that fits torch {torch.__version__}."
        ) from error


class Small(Segmenter):
    """The demo's encoder and decoder, slimmer."""

    layers = tuple(f"network.stages.{i}" for i in range(4))

    def __init__(self, num_classes: int):
        super().__init__()
        self.network = Network(num_classes, (16, 32, 48, 64), decoder=32)

    @property
    def classify(self) -> nn.Module:
        return self.network.classify

    def logits(self, images: Tensor) -> Tensor:
        return self.network(images)[0]


class HRNet(Segmenter):
    """HRNetV2: the four branches brought to the finest, mixed and classified."""

    layers = ("backbone",)

    def __init__(self, num_classes: int, name: str):
        super().__init__()
        with needed("timm", name):
            import timm
        options = {"features_only": True, "feature_location": "", "out_indices": (1, 2, 3, 4)}  # "": the branches
        self.backbone = timm.create_model(name, pretrained=False, **options)
        width = sum(self.backbone.feature_info.channels())
        self.mix = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.last = nn.Conv2d(width, num_classes, 1)

    @property
    def classify(self) -> nn.Module:
        return self.last

    def logits(self, images: Tensor) -> Tensor:
        branches = self.backbone(images)
        size = branches[0].shape[-2:]
        return self.last(self.mix(torch.cat([F.interpolate(x, size=size, mode="bilinear") for x in branches], 1)))


class DeepLabV3(Segmenter):
    """torchvision's, with a dilated ResNet: strides 4, 8, 8, 8."""

    layers = tuple(f"network.backbone.layer{i}" for i in range(1, 5))

    def __init__(self, num_classes: int, name: str):
        super().__init__()
        with needed("torchvision", name):
            from torchvision.models import segmentation
        self.network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=num_classes)

    @property
    def classify(self) -> nn.Module:
        return self.network.classifier[-1]

    def logits(self, images: Tensor) -> Tensor:
        features = self.network.backbone(images)["out"]
        return self.network.classifier(features)


NETWORKS: dict[str, Callable[[int], Segmenter]] = {
    "small": Small,
    "hrnet_w18": functools.partial(HRNet, name="hrnet_w18"),
    "hrnet_w48": functools.partial(HRNet, name="hrnet_w48"),
    "deeplabv3_resnet50": functools.partial(DeepLabV3, name="deeplabv3_resnet50"),
    "deeplabv3_resnet101": functools.partial(DeepLabV3, name="deeplabv3_resnet101"),
}
