"""``attach`` takes layers by name and any example input, does not change the model, and raises clear errors."""

import copy

import pytest
import torch
from nets import IMAGES, LABELS, N, Net, Wrapped, attached, found
from test_finder import Listing
from torch import nn

import contextrast_kernels as ck


def test_explicit_layers_of_any_stride_are_taken_and_sorted():
    assert found(Net(), layers=["stages.1", "stem", "stages.3"]) == {
        "stem": (8, 2),
        "stages.1": (12, 8),
        "stages.3": (20, 32),
    }
    assert len(attached(layers=["stages.1", "stages.1"])[1].layers) == 1
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


def test_the_example_forward_does_not_change_the_model():
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


def test_the_example_forward_keeps_no_graph():
    """A graph would take the memory of a training step."""
    grad = []
    net = Net()
    net.classifier.register_forward_hook(lambda module, args, output: grad.append(output.requires_grad))
    attached(net)
    assert grad == [False]


def test_attach_in_inference_mode_gives_a_model_that_trains():
    """This also holds if the example was made in inference mode and a module returns it unchanged."""
    for model, example in ((Net(), None), (nn.Sequential(nn.Identity(), Listing()), IMAGES[:1])):
        with torch.inference_mode():
            _, tap = attached(model, example_input=None if example is None else example.clone())
        model(IMAGES)
        sum(x.square().sum() for x in tap.features()).backward()
        assert len(tap.layers) == 4 and all(p.grad is not None for p in tap.parameters())


def test_a_layer_called_twice_is_noted_in_the_table():
    """A siamese network calls its encoder twice; the last call is recorded."""

    class Siamese(Wrapped):
        def forward(self, x):
            return super().forward(x.flip(0)) + super().forward(x)

    model, tap = attached(Siamese(lambda x, maps: maps))
    assert [layer.calls for layer in tap.layers] == [2] * 4
    assert all(line.endswith("NCHW, called 2 times: the last call is used") for line in tap.table().splitlines()[1:])
    model(IMAGES)
    expected = copy.deepcopy(model).encoder.net.maps(IMAGES)
    for head, x, y in zip(copy.deepcopy(tap.heads), tap.features(), expected):
        torch.testing.assert_close(x, head(y))
    assert "called" not in attached()[1].table()


def test_attach_does_not_change_the_output_of_a_sequential():
    model = nn.Sequential(*Net().stages[:0], nn.Conv2d(3, 8, 3, 2, 1), *Net().stages)
    expected = copy.deepcopy(model)(IMAGES)
    _, tap = attached(model)
    torch.testing.assert_close(model(IMAGES), expected)
    assert len(tap.features()) == 4


# ------------------------------------------------------------------------------------------------- precision, bad input


def test_heads_run_in_the_precision_of_the_layers():
    """This also holds if features() is called outside the autocast region, as with accelerate."""
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
    tap.heads.float()  # heads in float32 with a model in half precision, without autocast
    model(IMAGES.bfloat16())
    assert {x.dtype for x in tap.features()} == {torch.float32}
    _, tap = attached(Net().bfloat16(), example_input=None)
    assert {p.dtype for p in tap.parameters()} == {torch.bfloat16}


def test_unknown_layers_list_the_known_ones_closest_first():
    with pytest.raises(ValueError, match=r"^layers: .* got 'stages.7'\. Choose from these, closest first: 'stages.\d'"):
        attached(layers=["stages.0", "stages.7"])
    with pytest.raises(ValueError, match=r"got 'stages'\. Choose from these, closest first"):
        attached(layers=["stages"])  # a ModuleList is never called
    with pytest.raises(ValueError, match=r"'stem'"):
        attached(layers=["STEM"])


def test_fewer_than_two_stages_are_an_error():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, N, 1))
    with pytest.raises(ValueError, match=r'"auto" found no encoder: expected at least two stages of stride 4'):
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
            RuntimeError,
            r"^example_input: the model cannot run on float32 of shape \(1, 3, 8, 8, 8\)",
        ),
        (lambda: ck.attach(nn.Identity()), ValueError, r"No module gives a feature map of the image\. Attach to"),
        (
            lambda: ck.attach(Net(), example_input=torch.zeros(1, 5, 64, 64)),
            RuntimeError,
            r"^example_input: the model cannot run on float32 of shape \(1, 5, 64, 64\).*RuntimeError.*\. Pass an",
        ),
        (
            lambda: ck.attach(nn.Sequential(nn.Flatten(), nn.Linear(7, 2))),
            RuntimeError,
            r"^example_input: the model cannot run on one black image \(1, 3, 256, 320\)",
        ),
        (
            lambda: ck.attach(attached()[0]),
            RuntimeError,
            r"^model: expected a model without a tap, got one attached at 'contextrast_heads'",
        ),
        (lambda: ck.attach(nn.Sequential(attached()[0])), RuntimeError, r"got one attached at '0.contextrast_heads'"),
        (
            lambda: ck.attach(nn.DataParallel(Net())),
            RuntimeError,
            r"^model: expected the plain model, got DataParallel",
        ),
    ],
)
def test_invalid_arguments_raise_clear_errors(call, exception, sentence):
    with pytest.raises(exception, match=sentence) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_model_that_cannot_run_is_not_changed():
    model = Net()
    with pytest.raises(RuntimeError):
        attached(model, example_input=torch.zeros(1, 5, 64, 64))
    assert model.training and not any(m._forward_hooks for m in model.modules())
    model.contextrast_heads = None
    with pytest.raises(RuntimeError, match=r"Rename it\."):
        attached(model)


def test_frozen_layers_and_layers_that_are_not_called_raise():
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
