"""Features out of any model: what is found, what is recorded, the traps, and the models that people use."""

import contextlib
import copy
import io
import pathlib
import socket

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import contextrast_kernels as ck
from contextrast_kernels.attach import FeatureTap

pytestmark = pytest.mark.usefixtures("reference")

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
    """A stem of stride 2, four stages, a classifier on the first. ``run`` is how a stage is called."""

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
    """Name to (channels, stride) of what is chosen."""
    _, tap = attached(model, **options)
    return {layer.name: (layer.channels, layer.stride) for layer in tap.layers}


# ----------------------------------------------------------------------------------------------------------- discovery


def test_stages_are_found_and_the_table_is_printed(capsys):
    tap = ck.attach(Net(), dim=8)
    assert [layer.name for layer in tap.layers] == [f"stages.{i}" for i in range(4)]
    lines = capsys.readouterr().out.splitlines()
    assert lines == tap.table().splitlines()
    assert lines[0].split() == ["layer", "stride", "channels", "size", "layout"]
    assert lines[1].split() == ["stages.0", "4", "8", "64", "×", "80", "NCHW"]
    assert lines[4].split() == ["stages.3", "32", "20", "8", "×", "10", "NCHW"]


def test_features_are_the_heads_of_the_stages():
    """Against the model's own maps, projected by hand."""
    model, tap = attached()
    model(IMAGES)
    features = tap.features()
    again = copy.deepcopy(model).train()
    expected = [head(x) for head, x in zip(again.contextrast_heads.heads, again.maps(IMAGES))]
    for x, y in zip(features, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert [tuple(x.shape) for x in features] == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 8, 4, 4), (2, 8, 2, 2)]


def test_images_of_another_size_than_the_example_train():
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


class Wrapped(nn.Module):
    """``encoder`` with what ``shape`` makes of its maps; the logits come from the first usable one."""

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


def test_an_output_that_lists_the_stages_is_taken_without_image_and_empty_maps():
    """As encoders of segmentation_models_pytorch: the image first, a placeholder without channels second."""

    def listing(x, maps):
        return [x, x.new_empty(len(x), 0, 32, 32), *maps]

    stages = {f"encoder[0][{i}]": (WIDTHS[i - 2], 2**i) for i in range(2, 6)}
    assert found(Wrapped(listing)) == stages
    assert found(Wrapped(listing), layers=["encoder"]) == stages
    assert list(found(Wrapped(listing), layers=["encoder[0][4]", "encoder[1]"])) == ["encoder[1]", "encoder[0][4]"]


def test_a_mapping_of_named_outputs_is_read_by_its_keys():
    model = Wrapped(lambda x, maps: {"feature_maps": tuple(maps), "pooled": maps[-1].mean((2, 3))})
    assert found(model) == {f"encoder[0][feature_maps][{i}]": (WIDTHS[i], 4 << i) for i in range(4)}


def test_channels_last_maps_and_tokens_become_feature_maps():
    for to_output, layout in (
        (lambda m: m.permute(0, 2, 3, 1), "NHWC"),
        (lambda m: m.flatten(2).transpose(1, 2), "tokens"),
        (lambda m: torch.cat((m.new_zeros(len(m), 1, m.shape[1]), m.flatten(2).transpose(1, 2)), 1), "tokens"),
    ):
        model, tap = attached(Wrapped(lambda x, maps, f=to_output: [f(m) for m in maps]), example_input=None)
        assert [(layer.channels, layer.stride, layer.layout) for layer in tap.layers] == [
            (c, 4 << i, layout) for i, c in enumerate(WIDTHS)
        ]
        images = torch.randn(2, 3, 64, 96)
        model(images)
        features = tap.features()
        for head, x, m in zip(copy.deepcopy(tap.heads), features, copy.deepcopy(model).encoder.net.maps(images)):
            torch.testing.assert_close(x, head(m))


def test_a_sequence_of_another_grid_is_one_sentence():
    model, tap = attached(Wrapped(lambda x, maps: [m.flatten(2).transpose(1, 2) for m in maps]))
    model(torch.randn(2, 3, 64, 64))
    tap.features()
    model.encoder.shape = lambda x, maps: [m.flatten(2).transpose(1, 2)[:, :-1] for m in maps]
    model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"expected a token for each 4 × 4 pixels, got .*\(2, 255, 8\)"):
        tap.features()


class Block(nn.Module):
    """A bottleneck: three widths and two resolutions inside of one stage."""

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
    """As torchvision's DeepLab: a pool of stride 4 before the stages, strides 4, 8, 8, 8."""
    model = nn.Sequential()
    model.backbone = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    for i, (c, s) in enumerate(((8, 1), (12, 2), (16, 1), (20, 1))):
        model.backbone.add_module(f"layer{i + 1}", nn.Sequential(Block((4, 8, 12, 16)[i], c, s)))
    model.classifier = nn.Conv2d(20, N, 1)
    strides = (4, 8, 8, 8)
    assert found(model) == {f"backbone.layer{i + 1}": (WIDTHS[i], strides[i]) for i in range(4)}


def test_of_more_than_four_blocks_the_last_of_each_stride_is_taken():
    """As MobileNet: a flat list of blocks."""
    plan = [(3, 6, 2), (6, 8, 2), (8, 8, 1), (8, 10, 2), (10, 12, 1), (12, 14, 2), (14, 16, 1), (16, 18, 2)]
    model = nn.Sequential(nn.Sequential(*(Block(*p) for p in plan)), nn.Conv2d(18, N, 1))
    assert found(model) == {"0.2": (8, 4), "0.4": (12, 8), "0.6": (16, 16), "0.7": (18, 32)}


def test_an_activation_belongs_to_its_stage_and_a_shared_one_to_none():
    layers = [m for s in Net(inplace=True).stages for m in s]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*layers), nn.Conv2d(20, N, 1))
    assert list(found(model)) == ["1.2", "1.5", "1.8", "1.11"]
    relu = nn.ReLU()
    shared = [relu if isinstance(m, nn.ReLU) else m for m in layers]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Sequential(*shared), nn.Conv2d(20, N, 1))
    assert list(found(model)) == ["1.1", "1.4", "1.7", "1.10"]


class UNet(nn.Module):
    """Siblings go down, then up."""

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


def test_stages_win_over_a_pyramid_of_equal_width_around_them():
    """A neck, or deep supervision, lists four maps made of the stages."""

    class Neck(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Net()
            self.lateral = nn.ModuleList(nn.Conv2d(c, 8, 1) for c in WIDTHS)

        def forward(self, x):
            return [layer(m) for layer, m in zip(self.lateral, self.body.maps(x))]

    assert found(nn.Sequential(Neck())) == {f"0.body.stages.{i}": (c, 4 << i) for i, c in enumerate(WIDTHS)}


def test_layers_inside_of_a_block_are_no_stages():
    """Two stages, whose second block holds more sizes than there are stages: as a shallow encoder of PSPNet."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU()),
        nn.Sequential(Block(8, 12, 2), Block(12, 12, 1)),
        nn.ConvTranspose2d(12, N, 8, 8),
    )
    assert found(model) == {"1": (8, 4), "2": (12, 8)}


def test_explicit_layers_of_any_stride_are_taken_and_sorted():
    assert found(Net(), layers=["stages.1", "stem", "stages.3"]) == {
        "stem": (8, 2),
        "stages.1": (12, 8),
        "stages.3": (20, 32),
    }
    assert found(Net(), layers=("stages.2",)) == {"stages.2": (16, 16)}


def test_the_example_is_a_tensor_a_tuple_or_keywords():
    class Keywords(Net):
        def forward(self, pixel_values, flag, *, scale):
            return super().forward(pixel_values * scale)

    bytes_ = IMAGES.mul(255).to(torch.uint8)
    for example in ((IMAGES, True), [IMAGES, True], {"pixel_values": bytes_, "flag": True}):
        model = Keywords()
        original = model.forward
        model.forward = lambda *a, f=original, **k: f(*a, scale=1.0, **k)
        assert len(found(model, example_input=example)) == 4


def test_looking_leaves_the_model_as_it_was():
    model = Net()
    model.stages[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    _, tap = attached(model, layers=["stages.0", "stages.1"])
    tap.detach()
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not torch.equal(torch.get_rng_state(), random)  # the heads were drawn, nothing else


def test_a_container_that_runs_its_children_runs_as_before():
    model = nn.Sequential(*Net().stages[:0], nn.Conv2d(3, 8, 3, 2, 1), *Net().stages)
    expected = copy.deepcopy(model)(IMAGES)
    _, tap = attached(model)
    torch.testing.assert_close(model(IMAGES), expected)
    assert len(tap.features()) == 4


# ----------------------------------------------------------------------------------------------------------- the traps


def test_a_deep_copy_has_a_tap_of_its_own():
    """Exponential moving averages copy the model, hooks included."""
    model, tap = attached()
    model(IMAGES)  # recorded and not taken: a copy must not trip over it
    ema = torch.optim.swa_utils.AveragedModel(model)
    other = ema.module.contextrast_heads
    assert isinstance(other, FeatureTap) and other is not tap
    expected = tap.features()
    ema.train()
    ema(IMAGES)
    with pytest.raises(RuntimeError, match="taken already"):
        tap.features()
    for x, y in zip(other.features(), expected, strict=True):
        torch.testing.assert_close(x, y)
    ema.update_parameters(model)
    other.detach()
    assert not hasattr(ema.module, "contextrast_heads")
    assert step(model, tap) > 0


def test_a_copy_of_a_part_is_only_that_part():
    """A teacher's encoder: it drags neither the model nor the tap along, and records nothing."""
    model, tap = attached(Wrapped(lambda x, maps: maps))
    part = copy.deepcopy(model.encoder)
    model(IMAGES)
    part(torch.zeros_like(IMAGES))
    expected = model.encoder.net.maps(IMAGES)[1]
    torch.testing.assert_close(tap.features()[1], copy.deepcopy(tap.heads[1])(expected))
    assert len(part._forward_hooks) == 4 and all(hook.tap is None for hook in part._forward_hooks.values())


def test_an_attached_model_can_be_saved_whole():
    model, tap = attached()
    model(IMAGES)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    with pytest.raises(RuntimeError, match="copy of the model has not run"):
        loaded.contextrast_heads.features()
    loaded(IMAGES)
    for x, y in zip(loaded.contextrast_heads.features(), tap.features(), strict=True):
        torch.testing.assert_close(x, y)


def test_attach_then_compile():
    """The model alone, evaluated before it trains; then model, heads and loss as one graph."""
    model, tap = attached(Net(inplace=True))
    twin = copy.deepcopy(model)
    expected = step(twin, twin.contextrast_heads)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model.eval()
    with torch.no_grad():
        compiled(IMAGES)
    model.train()
    assert step(compiled, tap) == pytest.approx(expected, rel=1e-4)

    def whole(images, labels):
        logits = model(images)
        return ck.contextrast_loss(tap.features(), labels, logits, num_classes=N)

    twin = copy.deepcopy(model)
    loss = torch.compile(whole, backend="eager", fullgraph=True)(IMAGES, LABELS)
    logits = twin(IMAGES)
    expected = ck.contextrast_loss(twin.contextrast_heads.features(), LABELS, logits, num_classes=N)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


def test_attaching_after_compile_is_noticed():
    model = Net()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(IMAGES)
    with pytest.raises(RuntimeError, match=r"before torch\.compile"):
        attached(compiled)
    _, tap = attached(model)
    logits = compiled(IMAGES)
    assert logits.requires_grad
    with pytest.raises(RuntimeError, match=r"'stages.0' gave no feature map .* attach first"):
        tap.features()
    in_place = Net()
    in_place.compile(backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"before torch\.compile"):
        attached(in_place)


def test_a_layer_that_is_overwritten_is_copied():
    """BatchNorm before ReLU(inplace=True): the tap sees what the layer gave, not what became of it."""
    model, tap = attached(Net(inplace=True), layers=["stages.0.1", "stages.1.2"])
    assert [layer.overwritten for layer in tap.layers] == [True, False]
    assert "copied" in tap.table().splitlines()[1] and "copied" not in tap.table().splitlines()[2]
    seen = []
    tap.heads[0].register_forward_pre_hook(lambda head, args: seen.append(args[0].detach().clone()))
    model(IMAGES)
    sum(x.sum() for x in tap.features()).backward()
    twin = copy.deepcopy(model)
    twin.train()
    expected = twin.stages[0][1](twin.stages[0][0](twin.stem(IMAGES)))
    assert expected.min() < -1
    torch.testing.assert_close(seen[0], expected.detach())


def test_a_layer_that_is_overwritten_in_training_only_is_refused():
    class Rude(Net):
        def forward(self, x):
            maps = self.maps(x)
            if self.training:
                maps[2].mul_(0.5)
            return self.classifier(maps[0])

    model, tap = attached(Rude())
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.2' was overwritten in place"):
        tap.features()


def test_checkpointing():
    """Non-reentrant: the same numbers, and the second run leaves nothing behind. Reentrant: no gradient, said so."""
    values = []
    for run in (call, lambda s, x: checkpoint(s, x, use_reentrant=False)):
        torch.manual_seed(0)
        model, tap = attached(Net(run=run), layers=["stages.0.1", "stages.1", "stages.2"])
        values.append((step(model, tap), [p.grad for p in model.stages[:3].parameters()]))
        with pytest.raises(RuntimeError, match="taken already"):
            tap.features()
    assert values[0][0] == values[1][0]
    for x, y in zip(values[0][1], values[1][1], strict=True):
        torch.testing.assert_close(x, y)
    model, tap = attached(Net(run=lambda s, x: checkpoint(s, x, use_reentrant=True)), layers=["stages.1.0", "stages.2"])
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.1.0' carries no gradient.*use_reentrant=False"):
        tap.features()


def test_evaluation_records_nothing():
    model, tap = attached()
    with pytest.raises(RuntimeError, match="not run since attach"):
        tap.features()
    model.eval()
    model(IMAGES)
    assert tap._maps is None
    with pytest.raises(RuntimeError, match="evaluation mode"):
        tap.features()
    model.train()
    with torch.no_grad():
        model(IMAGES)
    assert tap._maps is None
    with pytest.raises(RuntimeError, match=r"torch\.no_grad"):
        tap.features()
    model(IMAGES)
    tap.features()
    assert tap._maps is None
    model.stages.eval()  # frozen normalisation, while the model trains
    model(IMAGES)
    assert len(tap.features()) == 4


@pytest.fixture
def one_rank():
    distributed = pytest.importorskip("torch.distributed")
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_ddp_trains_when_a_batch_has_nothing_to_contrast(one_rank):
    """An all-ignored batch still links every head to the loss; a loss without the heads is what DDP cannot bear."""
    model, tap = attached()
    ddp = nn.parallel.DistributedDataParallel(model)
    for labels in (LABELS, torch.full_like(LABELS, 255), LABELS):
        model.zero_grad()
        step(ddp, tap, labels=labels)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match="plain model, got DistributedDataParallel"):
        attached(ddp)
    F.cross_entropy(ddp(IMAGES), LABELS).backward()
    with pytest.raises(RuntimeError, match="finished reduction"):
        ddp(IMAGES)


def _train_on_a_rank(rank, port, outcome):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, tap = attached()
    ddp = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        optimizer.zero_grad()
        step(ddp, tap, images=images, labels=torch.full_like(LABELS, 255) if rank == 0 else LABELS)
        optimizer.step()
    outcome[rank] = [p.detach() for p in model.parameters()]
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_stay_equal_when_one_has_nothing_to_contrast():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        outcome = manager.dict()
        torch.multiprocessing.spawn(_train_on_a_rank, (port, outcome), nprocs=2)
        first, second = outcome[0], outcome[1]
    torch.manual_seed(0)
    before = list(attached()[0].parameters())
    for x, y, z in zip(first, second, before, strict=True):
        assert torch.equal(x, y) and x.isfinite().all()
        assert x.ndim == 1 or not torch.equal(x, z)


def test_the_heads_belong_to_the_model():
    model, tap = attached()
    names = dict(model.named_parameters())
    assert "contextrast_heads.heads.0.0.weight" in names and "contextrast_heads.heads.3.3.bias" in names
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {k: v.detach().clone() for k, v in tap.named_parameters()}
    step(model, tap)
    optimizer.step()
    assert all(not torch.equal(before[k], v) for k, v in tap.named_parameters() if k.endswith("weight"))
    model.double()
    assert all(p.dtype == torch.float64 for p in tap.parameters())
    model(IMAGES.double())
    assert all(x.dtype == torch.float64 for x in tap.features())
    clone, _ = attached()
    clone.load_state_dict(model.state_dict())
    tap.detach()
    tap.detach()
    assert model.state_dict().keys() == Net().state_dict().keys()
    with pytest.raises(RuntimeError, match="detached"):
        tap.features()
    torch.export.export(model.eval(), (IMAGES.double(),))
    assert len(found(model, example_input=IMAGES.double())) == 4  # and may be attached again


# ------------------------------------------------------------------------------------------------- precision, bad input


def test_heads_run_in_the_precision_of_the_layers():
    """Also where features() stands outside of the autocast region, as it does with accelerate."""
    model, tap = attached()
    with torch.autocast("cpu", torch.bfloat16):
        model(IMAGES)
    assert {x.dtype for x in tap.features()} == {torch.bfloat16}
    model(IMAGES)
    with torch.autocast("cpu", torch.bfloat16):
        assert {x.dtype for x in tap.features()} == {torch.float32}
    model.bfloat16()
    model(IMAGES.bfloat16())
    assert {x.dtype for x in tap.features()} == {torch.bfloat16}
    _, tap = attached(Net().bfloat16(), example_input=None)
    assert {p.dtype for p in tap.parameters()} == {torch.bfloat16}


def test_unknown_layers_list_the_known_ones_closest_first():
    with pytest.raises(ValueError, match=r"^layers: .* got 'stages.7'; known, closest first: 'stages.\d'"):
        attached(layers=["stages.0", "stages.7"])
    with pytest.raises(ValueError, match=r"got 'stages'; known, closest first"):
        attached(layers=["stages"])  # a ModuleList is never called
    with pytest.raises(ValueError, match=r"'stem'"):
        attached(layers=["STEM"])


def test_fewer_than_two_stages_are_an_error():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, N, 1))
    with pytest.raises(ValueError, match=r'"auto" found fewer; name .* none of that stride'):
        attached(plain)
    depths = nn.Sequential(nn.Conv2d(3, 8, 16, 16), *(nn.Conv2d(8, 8, 1) for _ in range(6)))
    with pytest.raises(ValueError, match=r"'0', '1', '2'"):
        attached(depths)
    assert list(found(depths, layers=["2", "4"])) == ["2", "4"]


@pytest.mark.parametrize(
    ("call", "exception", "sentence"),
    [
        (lambda: ck.attach(lambda x: x), TypeError, r"^model: expected a torch.nn.Module, got function"),
        (lambda: ck.attach(Net(), layers="stages.0"), TypeError, r'^layers: expected "auto" or a list of module names'),
        (lambda: ck.attach(Net(), layers=[]), TypeError, r"^layers: .* got list \[\]"),
        (lambda: ck.attach(Net(), layers=[0, 1]), TypeError, r"^layers: "),
        (lambda: ck.attach(Net(), dim=0), ValueError, r"^dim: expected an integer at least 1, got 0"),
        (lambda: ck.attach(Net(), example_input="x.png"), ValueError, r"^example_input: .*got str 'x.png'"),
        (lambda: ck.attach(Net(), example_input=LABELS), ValueError, r"^example_input: expected an image .*int64"),
        (
            lambda: ck.attach(Net(), example_input=torch.zeros(1, 3, 8, 8, 8)),
            ValueError,
            r"^example_input: .*volume; only 2-D",
        ),
        (lambda: ck.attach(nn.Conv3d(1, 2, 3)), ValueError, r"^model: .*Conv3d; only 2-D"),
        (
            lambda: ck.attach(Net(), example_input=torch.zeros(1, 5, 64, 64)),
            RuntimeError,
            r"^example_input: the model cannot run on float32 of shape \(1, 5, 64, 64\).*RuntimeError.*; pass an",
        ),
        (
            lambda: ck.attach(nn.Sequential(nn.Flatten(), nn.Linear(7, 2))),
            RuntimeError,
            r"^example_input: the model cannot run on one black image \(1, 3, 256, 320\)",
        ),
        (lambda: ck.attach(attached()[0]), RuntimeError, r"^model: attached already, at 'contextrast_heads'"),
        (lambda: ck.attach(nn.Sequential(attached()[0])), RuntimeError, r"attached already, at '0.contextrast_heads'"),
        (
            lambda: ck.attach(nn.DataParallel(Net())),
            RuntimeError,
            r"^model: expected the plain model, got DataParallel",
        ),
    ],
)
def test_one_sentence(call, exception, sentence):
    with pytest.raises(exception, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_run_is_left_as_it_was():
    model = Net()
    with pytest.raises(RuntimeError):
        attached(model, example_input=torch.zeros(1, 5, 64, 64))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    model.contextrast_heads = None
    with pytest.raises(RuntimeError, match="rename it"):
        attached(model)


def test_frozen_layers_and_layers_that_are_not_called():
    model, tap = attached()
    model.stem.requires_grad_(False)
    model.stages[0].requires_grad_(False)
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.0' carries no gradient.*unfreeze"):
        tap.features()
    model, tap = attached()
    model.stages[3] = nn.Identity()
    model(IMAGES)
    with pytest.raises(RuntimeError, match=r"'stages.3' gave no feature map"):
        tap.features()
    model, tap = attached()
    model.stages[1][0] = nn.Conv2d(8, 9, 3, 2, 1)
    model.stages[1][1] = nn.BatchNorm2d(9)
    model.stages[2][0] = nn.Conv2d(9, 16, 3, 2, 1)
    model(IMAGES)
    with pytest.raises(ValueError, match=r"'stages.1': expected 12 channels .*\(2, 9, 8, 8\)"):
        tap.features()


def test_replicas_of_data_parallel_are_refused():
    model, _ = attached()
    with pytest.raises(RuntimeError, match=r"nn.DataParallel.*DistributedDataParallel"):
        model._replicate_for_data_parallel()(IMAGES)


def test_other_ranks_print_nothing(one_rank, capsys, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    ck.attach(Net(), dim=8)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------- the models people use


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

# The model, as docs/attach.md calls it; how it is built; names, channels and strides that "auto" chooses.
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


@pytest.mark.parametrize(("build", "names", "channels", "strides"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_models_that_people_use(build, names, channels, strides):
    """What auto chooses, the sizes of the features, and a gradient to the first parameter."""
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
def test_layers_by_name_in_models_that_people_use(build, names, maps):
    """More scales than auto takes, or layers where auto takes none: plain transformers, sequences of tokens."""
    model, tap = attached(build(), layers=names, example_input=torch.zeros(2, 3, 64, 64))
    assert [(layer.channels, layer.stride) for layer in tap.layers] == maps
    model.train()
    model(IMAGES)
    assert [tuple(x.shape[2:]) for x in tap.features()] == [(64 // s, 64 // s) for _, s in maps]


def test_the_page_tells_what_auto_chooses():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "attach.md").read_text()
    for name, _, names, channels, strides in MODELS:
        row = f"| {name} | {names[0]} … {names[-1]} | {', '.join(f'{c}@{s}' for c, s in zip(channels, strides))} |"
        assert row in page, row
