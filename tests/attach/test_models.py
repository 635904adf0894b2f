"""Popular models: the layers that ``attach`` finds, and that docs/attach.md lists them."""

import pathlib

import pytest
import torch
from nets import IMAGES, N, attached

pytestmark = pytest.mark.usefixtures("reference")


def torchvision(name):
    segmentation = pytest.importorskip("torchvision.models.segmentation", reason="torchvision is not installed")
    return getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=N)


def smp(architecture, encoder="resnet50", **options):
    package = pytest.importorskip("segmentation_models_pytorch", reason="segmentation_models_pytorch is not installed")
    return getattr(package, architecture)(encoder, encoder_weights=None, classes=N, **options)


def timm(name, **options):
    package = pytest.importorskip("timm", reason="timm is not installed")
    return package.create_model(name, **options)


def segformer():
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    config = package.SegformerConfig(
        num_labels=N,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 64, 128],
        decoder_hidden_size=32,
        num_attention_heads=[1, 2, 4, 8],
    )
    return package.SegformerForSemanticSegmentation(config)


def upernet():
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = package.ConvNextConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 64, 128], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = package.UperNetConfig(
        backbone_config=backbone,
        num_labels=N,
        hidden_size=32,
        auxiliary_in_channels=64,
        auxiliary_channels=32,
    )
    return package.UperNetForSemanticSegmentation(config)


def mask2former():
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    backbone = package.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = package.Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=N,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        dim_feedforward=32,
        num_attention_heads=2,
    )
    return package.Mask2FormerForUniversalSegmentation(config)


def monai(name, **options):
    package = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    return getattr(package, name)(spatial_dims=2, in_channels=3, out_channels=N, **options)


def basic_unet():
    return monai("BasicUNet", features=(16, 16, 32, 64, 128, 16))


def dynunet():
    return monai("DynUNet", kernel_size=[3] * 4, strides=[1, 2, 2, 2], upsample_kernel_size=[2] * 3)


def items(name, *keys):
    return tuple(f"{name}[{key}]" for key in keys)


RESNET = (256, 512, 1024, 2048)
PYRAMID = (4, 8, 16, 32)
BRANCHES = (18, 36, 72, 144)
TORCHVISION_RESNET = (tuple(f"backbone.layer{i}" for i in (1, 2, 3, 4)), RESNET, (4, 8, 8, 8))
MOBILENET = (("backbone.3", "backbone.6", "backbone.16"), (24, 40, 960), (4, 8, 16))
HIDDEN = (16, 32, 64, 128)
LAST_FOUR = items("encoder", 2, 3, 4, 5)

# The model's name in docs/attach.md, how it is built, and the names, channels and strides that "auto" chooses.
MODELS = [
    ("torchvision deeplabv3_resnet50", lambda: torchvision("deeplabv3_resnet50"), *TORCHVISION_RESNET),
    ("torchvision fcn_resnet50", lambda: torchvision("fcn_resnet50"), *TORCHVISION_RESNET),
    ("torchvision deeplabv3_mobilenet_v3_large", lambda: torchvision("deeplabv3_mobilenet_v3_large"), *MOBILENET),
    ("torchvision lraspp_mobilenet_v3_large", lambda: torchvision("lraspp_mobilenet_v3_large"), *MOBILENET),
    ("smp Unet, resnet50", lambda: smp("Unet"), LAST_FOUR, RESNET, PYRAMID),
    ("smp FPN, resnet50", lambda: smp("FPN"), LAST_FOUR, RESNET, PYRAMID),
    ("smp UPerNet, resnet50", lambda: smp("UPerNet"), LAST_FOUR, RESNET, PYRAMID),
    ("smp DeepLabV3Plus, resnet50", lambda: smp("DeepLabV3Plus"), LAST_FOUR, RESNET, (4, 8, 16, 16)),
    ("smp DeepLabV3, resnet50", lambda: smp("DeepLabV3"), LAST_FOUR, RESNET, (4, 8, 8, 8)),
    ("smp PSPNet, resnet50", lambda: smp("PSPNet"), items("encoder", 2, 3), (256, 512), (4, 8)),
    ("smp Segformer, mit_b0", lambda: smp("Segformer", "mit_b0"), LAST_FOUR, (32, 64, 160, 256), PYRAMID),
    ("smp FPN, tu-convnext_tiny", lambda: smp("FPN", "tu-convnext_tiny"), LAST_FOUR, (96, 192, 384, 768), PYRAMID),
    ("smp Unet, efficientnet-b0", lambda: smp("Unet", "efficientnet-b0"), LAST_FOUR, (24, 40, 112, 320), PYRAMID),
    (
        "smp DPT, tu-vit_tiny_patch16_224",
        lambda: smp("DPT", "tu-vit_tiny_patch16_224", dynamic_img_size=True),
        items("encoder[0]", 0, 1, 2, 3),
        (192,) * 4,
        (16,) * 4,
    ),
    (
        "timm resnet50, features_only",
        lambda: timm("resnet50", features_only=True),
        items("", 1, 2, 3, 4),
        RESNET,
        PYRAMID,
    ),
    ("timm resnet50", lambda: timm("resnet50"), ("layer1", "layer2", "layer3", "layer4"), RESNET, PYRAMID),
    (
        "timm hrnet_w18, features_only",
        lambda: timm("hrnet_w18", features_only=True),
        items("", 1, 2, 3, 4),
        (128, 256, 512, 1024),
        PYRAMID,
    ),
    (
        'timm hrnet_w18, features_only, feature_location=""',
        lambda: timm("hrnet_w18", features_only=True, feature_location=""),
        items("", 1, 2, 3, 4),
        BRANCHES,
        PYRAMID,
    ),
    ("timm hrnet_w18", lambda: timm("hrnet_w18"), items("stage4", 0, 1, 2, 3), BRANCHES, PYRAMID),
    (
        "timm convnext_tiny, features_only",
        lambda: timm("convnext_tiny", features_only=True),
        items("", 0, 1, 2, 3),
        (96, 192, 384, 768),
        PYRAMID,
    ),
    (
        "timm swin_tiny, features_only",
        lambda: timm("swin_tiny_patch4_window7_224", features_only=True, img_size=64),
        items("", 0, 1, 2, 3),
        (96, 192, 384, 768),
        PYRAMID,
    ),
    (
        "timm vit_tiny, features_only",
        lambda: timm("vit_tiny_patch16_224", features_only=True, img_size=64),
        items("", 0, 1, 2),
        (192,) * 3,
        (16,) * 3,
    ),
    (
        "transformers SegformerForSemanticSegmentation",
        segformer,
        items("segformer[hidden_states]", 0, 1, 2, 3),
        HIDDEN,
        PYRAMID,
    ),
    (
        "transformers UperNetForSemanticSegmentation, ConvNeXt",
        upernet,
        items("backbone[feature_maps]", 0, 1, 2, 3),
        HIDDEN,
        PYRAMID,
    ),
    (
        "transformers Mask2FormerForUniversalSegmentation, Swin",
        mask2former,
        items("model[encoder_hidden_states]", 0, 1, 2, 3),
        HIDDEN,
        PYRAMID,
    ),
    ("monai BasicUNet", basic_unet, ("down_2", "down_3", "down_4"), (32, 64, 128), (4, 8, 16)),
    (
        "monai SegResNet",
        lambda: monai("SegResNet", init_filters=8),
        ("down_layers.2", "down_layers.3"),
        (32, 64),
        (4, 8),
    ),
    ("monai DynUNet", dynunet, ("downsamples.1", "bottleneck"), (128, 256), (4, 8)),
]


# One model of each kind is tried in every run, the others only in the slow tests.
DAILY = (
    "torchvision lraspp_mobilenet_v3_large",
    "smp PSPNet, resnet50",
    "smp Segformer, mit_b0",
    "timm convnext_tiny, features_only",
    "transformers Mask2FormerForUniversalSegmentation, Swin",
    "monai BasicUNet",
)


def sampled(models):
    return [pytest.param(*m[1:], id=m[0], marks=() if m[0] in DAILY else pytest.mark.slow) for m in models]


@pytest.mark.parametrize(("build", "names", "channels", "strides"), sampled(MODELS))
def test_the_layers_of_popular_models_are_found(build, names, channels, strides):
    """The features have the sizes of these layers, and the first parameter gets a gradient."""
    model, tap = attached(build(), example_input=torch.zeros(2, 3, 64, 64))
    assert [layer.name for layer in tap.layers] == list(names)
    assert [layer.channels for layer in tap.layers] == list(channels)
    assert [layer.stride for layer in tap.layers] == list(strides)
    model.train()
    model(IMAGES)
    features = tap.features()
    assert [tuple(x.shape) for x in features] == [(2, 8, 64 // s, 64 // s) for s in strides]
    sum(x.square().sum() for x in features).backward()
    assert next(model.parameters()).grad.any()
    tap.detach()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "names", "maps"),
    [
        (
            basic_unet,
            ["conv_0", "down_1", "down_2", "down_3", "down_4"],
            [(16, 1), (16, 2), (32, 4), (64, 8), (128, 16)],
        ),
        (
            lambda: monai("SegResNet", init_filters=8),
            [f"down_layers.{i}" for i in range(4)],
            [(8, 1), (16, 2), (32, 4), (64, 8)],
        ),
        (
            dynunet,
            ["input_block", "downsamples.0", "downsamples.1", "bottleneck"],
            [(32, 1), (64, 2), (128, 4), (256, 8)],
        ),
        (
            lambda: timm("vit_tiny_patch16_224", img_size=64),
            ["blocks.2", "blocks.5", "blocks.8", "blocks.11"],
            [(192, 16)] * 4,
        ),
        (
            segformer,
            [f"segformer.stages.{i}.layer_norm" for i in range(4)],
            [(c, s) for c, s in zip(HIDDEN, PYRAMID)],
        ),
        (
            lambda: torchvision("deeplabv3_mobilenet_v3_large"),
            ["backbone.1", "backbone.3", "backbone.6", "backbone.12", "backbone.16"],
            [(16, 2), (24, 4), (40, 8), (112, 16), (960, 16)],
        ),
    ],
    ids=["BasicUNet", "SegResNet", "DynUNet", "vit", "segformer", "mobilenet"],
)
def test_layers_of_popular_models_can_be_given_by_name(build, names, maps):
    """The names select more scales than auto takes, or layers that auto does not take, such as those of a ViT."""
    model, tap = attached(build(), layers=names, example_input=torch.zeros(2, 3, 64, 64))
    assert [(layer.channels, layer.stride) for layer in tap.layers] == maps
    model.train()
    model(IMAGES)
    assert [tuple(x.shape[2:]) for x in tap.features()] == [(64 // s, 64 // s) for _, s in maps]


def test_the_page_lists_what_auto_chooses():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "attach.md").read_text()
    for name, _, names, channels, strides in MODELS:
        row = f"| {name} | `{names[0]}` … `{names[-1]}` | {', '.join(f'{c}@{s}' for c, s in zip(channels, strides))} |"
        assert row in page, row
