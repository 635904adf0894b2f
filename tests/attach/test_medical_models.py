"""``attach`` finds these layers in networks of MONAI and nnU-Net, for maps and for volumes."""

import pathlib

import pytest
import torch
from nets import attached
from torch import nn

pytestmark = pytest.mark.usefixtures("reference", "one_thread")


def monai(name, **options):
    pytest.importorskip("einops", reason="einops is not installed")
    package = pytest.importorskip("monai.networks.nets", reason="monai is not installed")
    return lambda dims: getattr(package, name)(spatial_dims=dims, in_channels=1, out_channels=3, **options)


def nnunet(name, **options):
    package = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet", reason="dynamic-network-architectures is not installed"
    )

    def build(dims):
        return getattr(package, name)(
            input_channels=1,
            n_stages=5,
            features_per_stage=(4, 8, 16, 24, 32),
            conv_op=nn.Conv2d if dims == 2 else nn.Conv3d,
            kernel_sizes=3,
            strides=(1, 2, 2, 2, 2),
            num_classes=3,
            conv_bias=True,
            norm_op=nn.InstanceNorm2d if dims == 2 else nn.InstanceNorm3d,
            norm_op_kwargs={"affine": True},
            nonlin=nn.LeakyReLU,
            **options,
        )

    return build


def unet(levels):
    widths = (4, 8, 16, 24, 32)[: levels + 1]
    return lambda: monai("UNet", channels=widths, strides=(2,) * levels, num_res_units=2)


INSIDE = "model.1" + ".submodule.1" * 2
MODELS = [
    (
        "monai UNet",
        unet(4),
        (
            "model.1.submodule.0",
            "model.1.submodule.1.submodule.0",
            f"{INSIDE}.submodule.0",
            f"{INSIDE}.submodule.1.submodule",
        ),
        ((8, 4), (16, 8), (24, 16), (32, 16)),
    ),
    (
        "monai AttentionUnet",
        lambda: monai("AttentionUnet", channels=(4, 8, 16, 24), strides=(2, 2, 2)),
        ("model.1.submodule.1.submodule.0", f"{INSIDE}.submodule"),
        ((16, 4), (24, 8)),
    ),
    (
        "monai BasicUNetPlusPlus",
        lambda: monai("BasicUNetPlusPlus", features=(4, 4, 8, 16, 32, 4)),
        ("conv_2_0", "conv_3_0", "conv_4_0"),
        ((8, 4), (16, 8), (32, 16)),
    ),
    (
        "monai SegResNet",
        lambda: monai("SegResNet", init_filters=8),
        ("down_layers.2", "down_layers.3"),
        ((32, 4), (64, 8)),
    ),
    (
        "monai SwinUNETR",
        lambda: monai("SwinUNETR", feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)),
        tuple(f"swinViT[{i}]" for i in (1, 2, 3, 4)),
        ((24, 4), (48, 8), (96, 16), (192, 32)),
    ),
    (
        "monai UNETR",
        lambda: monai("UNETR", img_size=64, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=2),
        tuple(f"vit[1][{i}]" for i in (8, 9, 10, 11)),
        ((24, 16),) * 4,
    ),
    (
        "monai FlexibleUNet, efficientnet-b0",
        lambda: monai("FlexibleUNet", backbone="efficientnet-b0", decoder_channels=(16, 8, 8, 4, 4)),
        tuple(f"encoder[{i}]" for i in (1, 2, 3, 4)),
        ((24, 4), (40, 8), (112, 16), (320, 32)),
    ),
    (
        "nnU-Net PlainConvUNet",
        lambda: nnunet("PlainConvUNet", n_conv_per_stage=2, n_conv_per_stage_decoder=2),
        tuple(f"encoder[{i}]" for i in (2, 3, 4)),
        ((16, 4), (24, 8), (32, 16)),
    ),
    (
        "nnU-Net ResidualEncoderUNet",
        lambda: nnunet("ResidualEncoderUNet", n_blocks_per_stage=(1, 2, 2, 2, 2), n_conv_per_stage_decoder=1),
        tuple(f"encoder[{i}]" for i in (2, 3, 4)),
        ((16, 4), (24, 8), (32, 16)),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("dims", [2, 3], ids=["maps", "volumes"])
@pytest.mark.parametrize(("build", "names", "maps"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_the_layers_of_medical_models_are_found(build, names, maps, dims):
    model, tap = attached(build()(dims), example_input=torch.zeros(1, 1, *[64] * dims))
    assert [(layer.name, layer.channels, layer.stride) for layer in tap.layers] == [
        (name, *size) for name, size in zip(names, maps)
    ]
    model(torch.randn(2, 1, *[64] * dims))
    features = tap.features()
    assert [tuple(x.shape) for x in features] == [(2, 8, *[64 // s] * dims) for _, s in maps]
    sum(x.square().sum() for x in features).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "contextrast" not in n)


def test_the_page_lists_the_medical_models():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "attach.md").read_text()
    for name, _, names, maps in MODELS:
        row = f"| {name} | `{names[0]}` … `{names[-1]}` | {', '.join(f'{c}@{s}' for c, s in maps)} |"
        assert row in page, row
