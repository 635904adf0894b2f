"""``attach`` on small models: the layers it finds, the maps it records, and its errors."""

import copy
from functools import partial
from itertools import pairwise

import pytest
import torch
from nets import IMAGES, WIDTHS, N, Net, Wrapped, attached, found, stage
from torch import nn

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference")


# ----------------------------------------------------------------------------------------------------------- discovery


def test_stages_are_found_and_the_table_is_printed(capsys):
    tap = ck.attach(Net(), dim=8)
    assert [layer.name for layer in tap.layers] == [f"stages.{i}" for i in range(4)]
    lines = capsys.readouterr().out.splitlines()
    assert lines == tap.table().splitlines()
    assert lines[0].split() == ["layer", "stride", "channels", "size", "layout"]
    assert lines[1].split() == ["stages.0", "4", "8", "64", "x", "80", "NCHW"]
    assert lines[4].split() == ["stages.3", "32", "20", "8", "x", "10", "NCHW"]


def test_features_are_the_projected_maps_of_the_stages():
    """The features equal the model's own maps after the heads."""
    model, tap = attached()
    model(IMAGES)
    features = tap.features()
    again = copy.deepcopy(model).train()
    expected = [head(x) for head, x in zip(again.contextrast_heads.heads, again.maps(IMAGES))]
    for x, y in zip(features, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert [tuple(x.shape) for x in features] == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]


def test_images_of_a_different_size_than_the_example_train():
    model, tap = attached()
    model(torch.randn(3, 3, 96, 160))
    assert [tuple(x.shape[2:]) for x in tap.features()] == [(24, 40), (12, 20), (6, 10), (3, 5)]


def test_gradients_reach_every_stage_and_head():
    model, tap = attached()
    model(IMAGES)
    sum(x.square().sum() for x in tap.features()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.stages.parameters())
    assert all(layer[0].weight.grad.any() for layer in model.stages)
    assert all(p.grad is not None for p in tap.parameters())


def test_image_and_empty_maps_in_a_list_of_stages_are_left_out():
    """Encoders of segmentation_models_pytorch list the image first and a placeholder without channels second."""

    def listing(x, maps):
        return [x, x.new_empty(len(x), 0, 32, 32), *maps]

    stages = {f"encoder[0][{i}]": (WIDTHS[i - 2], 2**i) for i in range(2, 6)}
    assert found(Wrapped(listing)) == stages
    assert found(Wrapped(listing), layers=["encoder"]) == stages
    assert list(found(Wrapped(listing), layers=["encoder[0][4]", "encoder[1]"])) == ["encoder[1]", "encoder[0][4]"]


def test_a_mapping_of_named_outputs_is_read_by_its_keys():
    model = Wrapped(lambda x, maps: {"feature_maps": tuple(maps), "pooled": maps[-1].mean((2, 3))})
    assert found(model) == {f"encoder[0][feature_maps][{i}]": (WIDTHS[i], 4 << i) for i in range(4)}


class Queries(nn.Module):
    """A model whose output has fields that are not stages, as in Mask2Former: masks, queries and two maps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.queries = nn.Parameter(torch.randn(100, WIDTHS[0]))

    def forward(self, x):
        maps = self.inner(x)
        queries = self.queries.expand(len(x), -1, -1)
        masks = torch.einsum("bqc,bchw->bqhw", queries, maps[0])
        return {"masks": masks, "queries": queries, "last_hidden_state": maps[-1], "pixels": maps[0]}


class Listing(Net):
    def forward(self, x):
        return self.maps(x)


def test_a_dict_that_holds_other_things_than_stages_is_not_a_list_of_stages():
    assert found(Queries(Listing())) == {f"inner[{i}]": (c, 4 << i) for i, c in enumerate(WIDTHS)}
    plain = nn.Sequential(nn.Conv2d(3, WIDTHS[0], 8, 8), nn.Conv2d(WIDTHS[0], WIDTHS[0], 1))
    with pytest.raises(ValueError, match=r'"auto" found no encoder: .*\. Candidates: .*inner.0.0'):
        found(Queries(nn.Sequential(plain, Shaped(lambda x: [x, x]))))
    with pytest.raises(ValueError, match=r'"auto" found no encoder: .*\. Candidates: .0'):
        found(nn.Sequential(plain, Shaped(lambda x: {"out": x, "aux": x[:, :, ::2, ::2]})))


class Shaped(nn.Module):
    """A module that returns ``shape(input)``."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return self.shape(x)


def test_a_mapping_of_maps_of_different_strides_is_a_list():
    """The backbones of detectron2 return such a mapping."""
    stages = {f"[res{i + 2}]": (c, 4 << i) for i, c in enumerate(WIDTHS)}
    assert found(Named()) == stages
    for layers in ("auto", ["backbone"]):
        model = nn.Sequential()
        model.backbone = Named()
        model.head = Shaped(lambda maps: maps["res5"])
        assert found(model, layers=layers) == {f"backbone{name}": layer for name, layer in stages.items()}


class Named(Net):
    def forward(self, x):
        return {f"res{i + 2}": m for i, m in enumerate(self.maps(x))}


def tokens(x, prefix):
    """The pixels as a sequence, after ``prefix`` tokens for the class, distillation or registers."""
    return torch.cat((x.new_zeros(len(x), prefix, x.shape[1]), x.flatten(2).transpose(1, 2)), 1)


def test_channels_last_maps_and_tokens_become_feature_maps():
    for to_output, layout in (
        (lambda m: m.permute(0, 2, 3, 1), "NHWC"),
        *((partial(tokens, prefix=prefix), "tokens") for prefix in (0, 1, 2, 5)),
    ):
        # float64, because a convolution sums in a different order in a different layout
        model, tap = attached(Wrapped(lambda x, maps, f=to_output: [f(m) for m in maps]).double(), example_input=None)
        assert [(layer.channels, layer.stride, layer.layout) for layer in tap.layers] == [
            (c, 4 << i, layout) for i, c in enumerate(WIDTHS)
        ]
        for size in ((64, 96), (70, 100)):  # the second is rounded up at every stage
            images = torch.randn(2, 3, *size, dtype=torch.float64)
            model(images)
            features = tap.features()
            maps = copy.deepcopy(model).encoder.net.maps(images)
            for head, x, m in zip(copy.deepcopy(tap.heads), features, maps, strict=True):
                torch.testing.assert_close(x, head(m))


class ToLast(nn.Module):
    def forward(self, x):
        return x.movedim(1, 3)


class ChannelsLast(nn.Module):
    """A stage that takes and returns (B, h, w, C), as those of Swin do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.movedim(3, 1)).movedim(1, 3)


def test_maps_with_as_many_channels_as_rows_get_the_layout_of_their_neighbours():
    """On images of 32 × 32 the first stage gives (B, 8, 8, 8), which is a map in both layouts."""
    images = IMAGES[:1, :, :32, :32]

    def layouts(model, **options):
        _, tap = attached(model, example_input=images, **options)
        tap.detach()
        return [layer.layout for layer in tap.layers]

    first, last = ["NCHW"] * 3, ["NHWC"] * 3
    maps = layouts(
        Wrapped(lambda x, maps: [m.movedim(1, 3) for m in maps]), layers=[f"encoder[0][{i}]" for i in range(3)]
    )
    assert maps == last
    net = Net()
    in_turn = nn.Sequential(net.stem, ToLast(), *map(ChannelsLast, net.stages))
    assert layouts(in_turn, layers=["2", "3", "4"]) == last
    nested = nn.Sequential(net.stem, ToLast(), nn.Sequential(in_turn[2]), *in_turn[3:])
    assert layouts(nested, layers=["2.0", "3", "4"]) == last
    assert layouts(Net(), layers=["stages.0", "stages.1", "stages.2"]) == first
    # A block may have its channels last inside, as ConvNeXt's have.
    mixed = nn.Sequential(
        net.stem, nn.Sequential(net.stages[0], ChannelsFirst(nn.Linear(8, 30), nn.Linear(30, 8))), *net.stages[1:]
    )
    assert layouts(mixed, layers=["1", "2", "3"]) == first
    model, tap = attached(in_turn[:4], layers=["2", "3"], example_input=images)
    model.eval()
    tap.train()
    model(images)
    for head, x, i in zip(copy.deepcopy(tap.heads), tap.features(), (3, 4)):
        torch.testing.assert_close(x, head(model[:i](images).movedim(3, 1)))


class ChannelsFirst(nn.Sequential):
    """Layers for (B, h, w, C) between layers for (B, C, h, w)."""

    def forward(self, x):
        return super().forward(x.movedim(1, 3)).movedim(3, 1)


def test_tensors_without_the_batch_axis_are_not_maps():
    """An attention, for example, puts all windows of all images on the first axis."""

    def windows(x, maps):
        return [*maps, maps[0].unflatten(2, (4, 4)).unflatten(4, (4, 4)).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)]

    stages = {f"encoder[0][{i}]": (width, 4 << i) for i, width in enumerate(WIDTHS)}
    assert found(Wrapped(windows)) == stages


def test_tokens_of_a_different_grid_raise_a_clear_error():
    model, tap = attached(Wrapped(lambda x, maps: [m.flatten(2).transpose(1, 2) for m in maps]))
    model(torch.randn(2, 3, 64, 64))
    tap.features()
    model.encoder.shape = lambda x, maps: [m.flatten(2).transpose(1, 2)[:, :-1] for m in maps]
    model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected a token for each 4 x 4 pixels, got .*\(2, 255, 8\)"):
        tap.features()


class Block(nn.Module):
    """A bottleneck with three widths and two resolutions inside one stage."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, 2 * outputs, 1), nn.BatchNorm2d(2 * outputs)
        self.conv2, self.bn2 = nn.Conv2d(2 * outputs, 3 * outputs, 3, stride, 1), nn.BatchNorm2d(3 * outputs)
        self.conv3, self.bn3 = nn.Conv2d(3 * outputs, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def test_dilated_stages_of_one_stride_are_stages():
    """torchvision's DeepLab has a pool of stride 4 before its stages, which have the strides 4, 8, 8, 8."""
    model = nn.Sequential()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    for i, (c, s) in enumerate(((8, 1), (12, 2), (16, 1), (20, 1))):
        model.backbone.add_module(f"layer{i + 1}", nn.Sequential(Block((4, 8, 12, 16)[i], c, s)))
    model.classifier = nn.Conv2d(20, N, 1)
    strides = (4, 8, 8, 8)
    assert found(model) == {f"backbone.layer{i + 1}": (WIDTHS[i], strides[i]) for i in range(4)}


def test_the_last_block_of_each_stride_is_taken_if_there_are_more_than_four():
    """MobileNet is such a flat list of blocks."""
    plan = [(3, 6, 2), (6, 8, 2), (8, 8, 1), (8, 10, 2), (10, 12, 1), (12, 14, 2), (14, 16, 1), (16, 18, 2)]
    model = nn.Sequential(nn.Sequential(*(Block(*p) for p in plan)), nn.Conv2d(18, N, 1))
    assert found(model) == {"0.2": (8, 4), "0.4": (12, 8), "0.6": (16, 16), "0.7": (18, 32)}


class Blocks(nn.Module):
    """Returns the maps of all blocks, as MobileNet in transformers does."""

    def __init__(self, *plan):
        super().__init__()
        self.blocks = nn.ModuleList(Block(*p) for p in plan)

    def forward(self, x):
        return tuple(x := block(x) for block in self.blocks)


def test_the_last_map_of_each_stride_is_taken_from_a_list_of_more_than_four():
    plan = [(3, 6, 2), (6, 8, 2), (8, 8, 1), (8, 10, 2), (10, 12, 1), (12, 14, 2), (14, 16, 1), (16, 18, 2)]
    assert found(Blocks(*plan)) == {"[2]": (8, 4), "[4]": (12, 8), "[6]": (16, 16), "[7]": (18, 32)}
    # With fewer strides than a block has layers, the block's layers are still not stages.
    dilated = [(3, 6, 4), (6, 8, 2), (8, 8, 1), (8, 10, 1), (10, 12, 1)]
    assert found(Blocks(*dilated)) == {"[0]": (6, 4), "[4]": (12, 8)}


def test_the_last_four_depths_of_a_plain_transformer_are_taken():
    depths = nn.Sequential(nn.Conv2d(3, 8, 16, 16), Blocks(*[(8, 8, 1)] * 6))
    assert list(found(depths)) == [f"[{i}]" for i in (2, 3, 4, 5)]


def test_the_coarsest_four_of_more_strides_are_taken():
    images = torch.zeros(1, 3, 128, 128)
    widths = (3, 6, 8, 10, 12, 14, 16)
    flat = nn.Sequential(*(stage(a, b) for a, b in pairwise(widths)))
    strides = {2: (10, 8), 3: (12, 16), 4: (14, 32), 5: (16, 64)}
    assert found(flat, example_input=images) == {str(i): layer for i, layer in strides.items()}
    listing = Blocks(*((a, b, 2) for a, b in pairwise(widths)))
    assert found(listing, example_input=images) == {f"[{i}]": layer for i, layer in strides.items()}


def test_a_stem_is_not_an_encoder():
    """The convolutions of the stem lead into a plain transformer."""
    stem = nn.Sequential(*(stage(a, b) for a, b in ((3, 4), (4, 6), (6, 8), (8, 8))))
    blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)) for _ in range(40)))
    with pytest.raises(ValueError, match=r"nine tenths of the layers work at stride 16.*layers=\['1\.8', '1\.18', "):
        found(nn.Sequential(stem, blocks))


def test_siblings_with_large_stride_jumps_are_not_stages():
    """The siblings are the embeddings at the model's start and the normalisation at its end."""
    first, logits = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(12, N, 1)
    assert found(nn.Sequential(first, nn.Conv2d(8, 12, 4, 4), logits)) == {"0": (8, 4), "1": (12, 16)}
    with pytest.raises(ValueError, match=r'"auto" found no encoder'):
        found(nn.Sequential(first, nn.Conv2d(8, 12, 8, 8), logits))


def test_stages_that_give_their_map_in_two_layouts_are_stages():
    """Swin's stages in transformers return tokens for the next stage, and a map."""

    class Both(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            x = self.inner(x[1] if isinstance(x, tuple) else x)
            return x.flatten(2).transpose(1, 2), x

    net = Net()
    model = nn.Sequential(net.stem, *map(Both, net.stages))
    assert found(model) == {f"{i + 1}[0]": (c, 4 << i) for i, c in enumerate(WIDTHS)}


def test_inner_stages_are_preferred_to_siblings_of_fewer_strides():
    halves = [[(3, 4), (4, 6), (6, 8)], [(10, 12), (12, 14)]]
    first, last = (nn.Sequential(*(stage(a, b) for a, b in half)) for half in halves)
    last = nn.Sequential(nn.Conv2d(8, 10, 1), *last)
    assert found(nn.Sequential(first, last)) == {
        "0.1": (6, 4),
        "1.0": (10, 8),
        "1.1": (12, 16),
        "1.2": (14, 32),
    }


def test_an_activation_belongs_to_its_stage_and_a_shared_one_to_none():
    layers = [m for s in Net(inplace=True).stages for m in s]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*layers), nn.Conv2d(20, N, 1))
    assert list(found(model)) == ["1.2", "1.5", "1.8", "1.11"]
    relu = nn.ReLU()
    shared = [relu if isinstance(m, nn.ReLU) else m for m in layers]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*shared), nn.Conv2d(20, N, 1))
    assert list(found(model)) == ["1.1", "1.4", "1.7", "1.10"]


class UNet(nn.Module):
    """A U-Net with a list of downsampling layers and a list of upsampling layers."""

    def __init__(self, listing=False):
        super().__init__()
        self.down = nn.ModuleList(stage(a, b) for a, b in ((3, 6), (6, 8), (8, 10), (10, 12)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in ((12, 10), (10, 8), (8, 6), (6, N)))
        self.listing = listing

    def forward(self, x):
        down = [x := layer(x) for layer in self.down]
        up = []
        for i, layer in enumerate(self.up):
            x = layer(x)
            x = x + down[2 - i] if i < 3 else x
            up.append(x)
        return up[::-1] if self.listing else x


def test_the_decoder_is_left_out():
    assert found(UNet()) == {"down.1": (8, 4), "down.2": (10, 8), "down.3": (12, 16)}


def test_inner_stages_are_preferred_to_a_shorter_output_list():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()

        def forward(self, x):
            return self.body.maps(x)[::3]

    assert found(nn.Sequential(Two())) == {f"0.body.stages.{i}": (c, 4 << i) for i, c in enumerate(WIDTHS)}


def test_globally_pooled_maps_are_not_stages():
    def listing(x, maps):
        return [*maps, maps[-1].mean((2, 3), keepdim=True)]

    assert found(Wrapped(listing)) == {f"encoder[0][{i}]": (c, 4 << i) for i, c in enumerate(WIDTHS)}
    net = Net()
    classifier = nn.Sequential(net.stem, *net.stages[:3], nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, N, 1), nn.Flatten())
    assert found(classifier) == {f"{i + 1}": (c, 4 << i) for i, c in enumerate(WIDTHS[:3])}


def test_stages_are_preferred_to_a_pyramid_of_equal_width_around_them():
    """A neck, or deep supervision, lists four maps made of the stages."""

    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()
            self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in WIDTHS)

        def forward(self, x):
            return [layer(m) for layer, m in zip(self.lateral, self.body.maps(x))]

    assert found(nn.Sequential(Neck())) == {f"0.body.stages.{i}": (c, 4 << i) for i, c in enumerate(WIDTHS)}


def test_layers_inside_a_block_are_not_stages():
    """There are two stages. The layers of the second have more sizes than there are stages, as in a shallow PSPNet."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()),
        nn.Sequential(Block(8, 12, 2), Block(12, 12, 1)),
        nn.ConvTranspose2d(12, N, 8, 8),
    )
    assert found(model) == {"1": (8, 4), "2": (12, 8)}
