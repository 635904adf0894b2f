"""Small segmentation networks in the layouts of public code, most of them one class that holds encoder and head.

``ZOO`` has a function that builds each network and the stages that ``attach`` must find, as name → (channels, stride)
for an image of 64 × 64. If the stages cannot be told from other maps, it has None, and ``attach`` must raise an error.
"""

from torch import nn
from zoo_blocks import Basic, N, W
from zoo_branches import BiSeNet, BiSeNetV2, DDRNet, Detour, FullResolution, HRNet, PIDNet, Shallow, TwoStreams
from zoo_light import ENet, ESPNet, FastSCNN, FCN8s, LargeFOV, MobileNet, MobileNetV4, SegNet
from zoo_resnets import (
    FPN,
    DeepLabV3Plus,
    FlatHead,
    LinkNet,
    OCRNet,
    PSPNet,
    RefineNet,
    ResUNet,
    resnet_fcn_head,
    resnet_one_projection,
)
from zoo_transformers import DPT, ConvNeXt, EfficientFormer, EfficientViT, SegFormer, Swin, SwinUNet, ViT
from zoo_unets import (
    AttentionUNet,
    FlatUNet,
    Hourglasses,
    PairUNet,
    Tiramisu,
    UNet,
    UNet3Plus,
    UNetPlusPlus,
    WNet,
    nested_unet,
)


def named(names, channels, strides=(4, 8, 16, 32)):
    return dict(zip(names, zip(channels, strides), strict=True))


LAYERS = ("layer1", "layer2", "layer3", "layer4")
DOWNS = ("down2", "down3", "down4")
SPACED = ("blocks.1", "blocks.3", "blocks.5", "blocks.7")

ZOO = {
    "ResNet, one projection": (resnet_one_projection, named(LAYERS, W)),
    "ResNet, FCN head": (resnet_fcn_head, named(LAYERS, W)),
    "ResNet, head in attributes": (FlatHead, named(LAYERS, W)),
    "PSPNet, dilated": (PSPNet, named(LAYERS, (16, 32, 48, 64), (4, 8, 8, 8))),
    "PSPNet, not dilated": (lambda: PSPNet(False, Basic), named(LAYERS, (16, 32, 48, 64))),
    "OCRNet": (OCRNet, named(LAYERS, W, (4, 8, 8, 8))),
    "DeepLabV3+": (DeepLabV3Plus, named(LAYERS, W, (4, 8, 16, 16))),
    "FPN": (FPN, named(LAYERS, W)),
    "FPN, wider than the encoder": (lambda: FPN(48), named(LAYERS, W)),
    "FPN with a coarser level": (lambda: FPN(32, coarser=True), named(LAYERS, W)),
    "PANet": (lambda: FPN(bottom_up=True), named(LAYERS, W)),
    "RefineNet": (RefineNet, named(LAYERS, W)),
    "LinkNet": (LinkNet, named(LAYERS, W)),
    "U-Net on a ResNet": (ResUNet, named(("conv2", "conv3", "conv4", "center"), (8, 16, 24, 24))),
    "U-Net": (UNet, named(DOWNS, (16, 24, 24), (4, 8, 16))),
    "U-Net, every layer an attribute": (
        FlatUNet,
        named(("conv3_2", "conv4_2", "conv5_2"), (16, 24, 32), (4, 8, 16)),
    ),
    "U-Net, levels that give pairs": (
        PairUNet,
        named(("downs.2.block", "downs.3.block", "middle"), (16, 24, 32), (4, 8, 16)),
    ),
    "U-Net++": (UNetPlusPlus, named(("conv2_0", "conv3_0", "conv4_0"), (16, 24, 32), (4, 8, 16))),
    "U-Net 3+": (UNet3Plus, named(DOWNS, (16, 24, 24), (4, 8, 16))),
    "Attention U-Net": (AttentionUNet, named(DOWNS, (16, 24, 24), (4, 8, 16))),
    "U-Net, nested": (
        nested_unet,
        named([f"0{'.model.1' * i}.model.0" for i in (1, 2, 3)], (16, 24, 32), (4, 8, 16)),
    ),
    "W-Net": (WNet, named([f"first.{name}" for name in DOWNS], (16, 24, 24), (4, 8, 16))),
    "Hourglasses": (
        Hourglasses,
        named(("hg1.low1", "hg1.low2.low1", "hg1.low2.low2.low3"), (8, 8, 8), (4, 8, 16)),
    ),
    "Tiramisu": (Tiramisu, named(("dense3", "bottleneck"), (44, 56), (4, 8))),
    "SegNet": (SegNet, named(("bn32", "bn42", "bn52"), (16, 24, 24), (4, 8, 16))),
    "FCN-8s": (FCN8s, named(("features.13", "features.18", "features.23", "fc6"), (16, 24, 24, 40), (4, 8, 16, 32))),
    "DeepLab, LargeFOV": (LargeFOV, named(("net.13", "net.20"), (16, 32), (4, 8))),
    "ENet": (ENet, named(("regular1_2", "dilated3_1"), (16, 32), (4, 8))),
    "MobileNet, LR-ASPP": (
        MobileNet,
        named(("features.3", "features.5", "features.8", "features.10"), (8, 12, 24, 96)),
    ),
    "MobileNet V4": (MobileNetV4, named([f"blocks.{i}" for i in range(4)], W)),
    "Fast-SCNN": (FastSCNN, named(("dsconv1", "dsconv2", "bottleneck1", "bottleneck3"), (12, 16, 24, 40))),
    "ESPNet": (ESPNet, named(("b2", "b3"), (35, 64), (4, 8))),
    "BiSeNet": (BiSeNet, named(LAYERS, W)),
    "BiSeNet V2": (BiSeNetV2, named(("stem2", "s3", "s4", "s5_4"), (4, 8, 16, 32))),
    "DDRNet": (DDRNet, named(("layer2", "layer3", "layer4", "layer5"), (8, 16, 32, 48), (8, 16, 32, 64))),
    "PIDNet": (PIDNet, named(("layer2", "layer3", "layer4", "layer5"), (16, 24, 32, 48), (8, 16, 32, 64))),
    "HRNet": (HRNet, named([f"stage4[{i}]" for i in range(4)], (4, 8, 16, 32))),
    "HRNet, more exchanges": (lambda: HRNet(2), named([f"stage4[{i}]" for i in range(4)], (4, 8, 16, 32))),
    "SegFormer": (SegFormer, named([f"norm{i}" for i in (1, 2, 3, 4)], W)),
    "Swin": (Swin, named([*(f"layers.{i}.blocks.1" for i in range(3)), "norm"], W)),
    "Swin-Unet": (SwinUNet, named([*(f"layers.{i}.blocks.1" for i in range(3)), "norm"], (8, 16, 32, 64))),
    "ConvNeXt": (ConvNeXt, named([f"stages.{i}" for i in range(4)], W)),
    "EfficientFormer V2": (EfficientFormer, named([f"stages.{i}" for i in range(4)], W)),
    "EfficientViT": (
        EfficientViT,
        named((*(f"stages.{i}.downsample.res1" for i in (1, 2, 3)), "stages.3.blocks"), W),
    ),
    "two streams that meet at the end": (lambda: TwoStreams(early=False), named([f"second.{i}" for i in range(4)], W)),
    "DPT": (DPT, named(SPACED, (16,) * 4, (16,) * 4)),
    "ViT, SETR": (ViT, None),
    "no map smaller than the image": (FullResolution, None),
    "one coarse map": (Shallow, None),
    "two streams that meet at every stage": (lambda: TwoStreams(early=True), None),
    "operations outside PyTorch": (lambda: Detour(nn.Conv2d(W[-1], N, 1)), None),
}
"""Name → the function that builds the network, and its stages or None."""

EXCHANGE = "parallel branches that exchange their maps"
DOUBTS = {
    "DDRNet": "bypasses 'layer3', 'layer4'",
    "HRNet": EXCHANGE,
    "HRNet, more exchanges": EXCHANGE,
    "Tiramisu": "'bottleneck' follows 'trans3' at the same resolution, and may belong to the head",
    "EfficientViT": "'stages.3.blocks' follows 'stages.3.downsample.res2' at the same resolution",
    "two streams that meet at the end": "'stages.3' ends a second encoder",
}
"""Name → a part of the line under the table that says what is not certain. All other tables have no such line."""
