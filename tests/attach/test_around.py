"""``attach`` with unusable standard output, failures, scripting, checkpoints and volumes."""

import io
import sys

import pytest
import torch
from nets import IMAGES, N, Net, attached, step
from torch import nn

import contextrast_kernels as ck
from contextrast_kernels.attach.tap import FeatureTap

pytestmark = pytest.mark.usefixtures("reference", "one_thread")


class Closed(io.TextIOBase):
    def write(self, text):
        raise ValueError("I/O operation on closed file")


class Broken(io.TextIOBase):
    def write(self, text):
        raise BrokenPipeError


def encoded(encoding):
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding)


@pytest.mark.parametrize(
    "stdout",
    [lambda: encoded("ascii"), lambda: encoded("cp1251"), Closed, Broken, lambda: None],
    ids=["ascii", "cp1251", "closed", "broken pipe", "none"],
)
def test_an_unusable_standard_output_does_not_fail_attach(stdout, monkeypatch):
    """Names of modules may have characters that the output's encoding lacks."""
    model = nn.Sequential()
    model.add_module("stämme", Net())
    model.add_module("段階", nn.Identity())
    monkeypatch.setattr(sys, "stdout", stdout())
    tap = ck.attach(model, dim=8, example_input=IMAGES[:1])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        assert b"st\\xe4mme.stages.0  4" in sys.stdout.buffer.getvalue()
    assert len(tap.layers) == 4
    model(IMAGES)
    assert len(tap.features()) == 4


def untouched(model):
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called or m._forward_hooks_with_kwargs
        for m in model.modules()
    )


@pytest.mark.parametrize("place", ["heads", "hooks", "register", "forward", "finder"])
def test_a_failed_attach_leaves_nothing_behind(place, monkeypatch):
    model = Net()
    model.stages[1].eval()
    before, attributes = model.state_dict().keys(), set(vars(model))
    modes = [m.training for m in model.modules()]

    def fail(*args, **kwargs):
        raise MemoryError("no memory")

    options = {}
    if place == "heads":
        monkeypatch.setattr(sys.modules["contextrast_kernels.attach.tap"], "ProjectionHead", fail)
    elif place == "hooks":
        monkeypatch.setattr(model.stages[2], "register_forward_hook", fail)
        options["layers"] = ["stages.0", "stages.2"]
    elif place == "register":
        monkeypatch.setattr(FeatureTap, "train", fail)
    elif place == "forward":
        monkeypatch.setattr(model.stages[3], "forward", fail)
    else:
        monkeypatch.setattr(sys.modules["contextrast_kernels.attach"], "find_stages", fail)
    with pytest.raises((MemoryError, RuntimeError), match="no memory"):
        attached(model, **options)
    monkeypatch.undo()
    assert untouched(model) and model.state_dict().keys() == before and set(vars(model)) == attributes
    assert [m.training for m in model.modules()] == modes
    _, tap = attached(model)
    tap.detach()
    assert untouched(model)


def test_scripting_an_attached_model_raises_a_clear_error():
    model, tap = attached(nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, N, 1)))
    with pytest.raises(RuntimeError, match=r"^torch\.jit\.script: .* Call tap\.detach\(\) first"):
        torch.jit.script(model)
    model(IMAGES)
    assert len(tap.features()) == 2
    tap.detach()
    torch.testing.assert_close(torch.jit.script(model)(IMAGES), model(IMAGES))


class Holder(nn.Module):
    """A module with the model as an attribute, like a LightningModule."""

    def __init__(self, net):
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(()))


WRAPPERS = {
    "plain": lambda model: model,
    "DDP": nn.DataParallel,  # it names the parameters as DDP does, and needs no process group
    "compiled": torch.compile,
    "DDP, compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "compiled, DDP": lambda model: nn.DataParallel(torch.compile(model)),
    "Lightning": Holder,
    "Lightning, compiled": lambda model: Holder(torch.compile(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_training_checkpoint_loads_into_the_plain_model(name):
    model, tap = attached()
    step(model, tap)
    state, heads = ck.split_heads(WRAPPERS[name](model).state_dict())
    plain = Net()
    (Holder(plain) if "Lightning" in name else plain).load_state_dict(state)
    torch.testing.assert_close(plain.eval()(IMAGES), model.eval()(IMAGES))
    _, other = attached(plain)
    other.load_state_dict(heads)
    for name, value in tap.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_checkpoint_with_a_compiled_part_loads_into_the_plain_model():
    model, _ = attached()
    model.stages[1] = torch.compile(model.stages[1])
    Net().load_state_dict(ck.split_heads(model.state_dict())[0])


def test_a_state_without_heads_is_split_into_itself_and_nothing():
    state = Net().state_dict()
    assert ck.split_heads(state) == (dict(state), {})


def test_split_heads_refuses_what_is_not_a_state_dict():
    with pytest.raises(TypeError, match=r"^state_dict: expected a mapping of names to tensors, got Net"):
        ck.split_heads(Net())
    with pytest.raises(ValueError, match=r"got a checkpoint that holds one\. Pass checkpoint\['model'\]\."):
        ck.split_heads({"epoch": 3, "model": attached()[0].state_dict()})


class Volumes(nn.Module):
    """A U-Net for volumes. Its first convolution has stride 1 along the first axis, as in nnU-Net plans."""

    def __init__(self):
        super().__init__()
        plan = ((1, 4, (1, 2, 2)), (4, 8, (2, 2, 2)), (8, 12, (2, 2, 2)), (12, 16, (2, 2, 2)))
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv3d(a, b, 3, s, 1), nn.InstanceNorm3d(b), nn.LeakyReLU()) for a, b, s in plan
        )
        self.up = nn.ModuleList(nn.ConvTranspose3d(b, max(a, 4), s, s) for a, b, s in plan[::-1])
        self.out = nn.Conv3d(4, N, 1)

    def forward(self, x):
        maps = [x := layer(x) for layer in self.down]
        for i, layer in enumerate(self.up):
            x = layer(x) + maps[2 - i] if i < 3 else layer(x)
        return self.out(x)


def test_a_network_for_volumes_gets_heads_for_volumes():
    model, tap = attached(Volumes(), example_input=None)
    assert [(layer.name, layer.channels, layer.strides) for layer in tap.layers] == [
        ("down.1", 8, (2, 4, 4)),
        ("down.2", 12, (4, 8, 8)),
        ("down.3", 16, (8, 16, 16)),
    ]
    assert "down.1  2 x 4 x 4  " in tap.table() and "32 x 24 x 16  NCDHW" in tap.table()
    model(torch.randn(2, 1, 16, 32, 32))
    features = tap.features()
    assert [tuple(x.shape) for x in features] == [(2, 8, 8, 8, 8), (2, 8, 4, 4, 4), (2, 8, 2, 2, 2)]
    sum(x.square().sum() for x in features).backward()
    assert all(layer[0].weight.grad.any() for layer in model.down)


def test_a_model_whose_operations_cannot_be_recorded_is_refused(monkeypatch):
    """Some operations do not support torch's dispatch modes. Layers given by name still work."""
    from contextrast_kernels.attach import trace

    def refuse(*args):
        raise NotImplementedError("no rule registered")

    monkeypatch.setattr(trace._Recorder, "_add", refuse)
    model = Net()
    with pytest.raises(ValueError, match=r"cannot be recorded \(NotImplementedError: no rule.*layers=\['stages.0', "):
        attached(model)
    assert untouched(model)
    assert len(attached(model, layers=["stages.0", "stages.1"])[1].layers) == 2
