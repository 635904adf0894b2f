"""The MMSegmentation adapter on a stub of mmseg's decode heads, because mmseg itself needs a compiled mmcv."""

import importlib
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

import contextrast_kernels as ck

N = 3


class Registry:
    def __init__(self):
        self.modules = {}

    def register_module(self):
        return lambda thing: self.modules.setdefault(thing.__name__, thing)

    def get(self, name):
        return self.modules.get(name)

    def build(self, config):
        return self.modules[config["type"]](**{k: v for k, v in config.items() if k != "type"})


class BaseDecodeHead(nn.Module):
    """A stub of mmseg 1.x's class of this name, with the parts that our subclass uses."""

    def __init__(self, in_channels, channels, *, num_classes, in_index=-1, ignore_index=255):
        super().__init__()
        self.num_classes, self.in_index, self.ignore_index = num_classes, in_index, ignore_index
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def loss(self, inputs, batch_data_samples, train_cfg):
        return self.loss_by_feat(self.forward(inputs), batch_data_samples)

    def predict(self, inputs, batch_img_metas, test_cfg):
        return self.forward(inputs)

    def loss_by_feat(self, seg_logits, batch_data_samples):
        labels = torch.stack([sample.gt_sem_seg.data for sample in batch_data_samples])
        logits = nn.functional.interpolate(seg_logits, labels.shape[2:], mode="bilinear")
        return {"loss_ce": nn.functional.cross_entropy(logits, labels[:, 0], ignore_index=self.ignore_index)}


class FCNHead(BaseDecodeHead):
    def __init__(self, **options):
        super().__init__(**options)
        self.conv = nn.Conv2d(options["in_channels"], options["channels"], 3, padding=1)

    def forward(self, inputs):
        return self.conv_seg(self.conv(inputs[self.in_index]).relu())


class MaskFormerHead(BaseDecodeHead):
    def loss(self, x, batch_data_samples, train_cfg):
        return {}


@pytest.fixture
def registry(monkeypatch):
    torch.manual_seed(0)  # the weights of the heads and the labels
    modules = {name: types.ModuleType(name) for name in ("mmseg", "mmseg.registry", "mmseg.models")}
    modules["mmseg.models.decode_heads"] = types.ModuleType("mmseg.models.decode_heads")
    head = modules["mmseg.models.decode_heads.decode_head"] = types.ModuleType("decode_head")
    head.BaseDecodeHead = BaseDecodeHead
    models = modules["mmseg.registry"].MODELS = Registry()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    models.register_module()(FCNHead)
    models.register_module()(MaskFormerHead)
    monkeypatch.delitem(sys.modules, "contextrast_kernels.mmseg", raising=False)
    importlib.import_module("contextrast_kernels.mmseg")
    yield models
    sys.modules.pop("contextrast_kernels.mmseg", None)


PLAIN = {"type": "FCNHead", "in_channels": 12, "in_index": 2, "channels": 6, "num_classes": N}
RANDOM = torch.Generator().manual_seed(0)
STAGES = [torch.randn(2, c, 32 // s, 32 // s, generator=RANDOM) for c, s in ((4, 2), (8, 4), (12, 8), (16, 16))]


def samples():
    labels = torch.randint(0, N, (2, 1, 64, 64))
    labels[:, :, :4] = 255
    return [types.SimpleNamespace(gt_sem_seg=types.SimpleNamespace(data=data)) for data in labels]


def test_the_head_adds_the_contrast_of_the_stages(registry):
    head = registry.build(
        {
            "type": "ContextrastHead",
            "head": PLAIN,
            "in_channels": [4, 8, 12, 16],
            "weight": 0.2,
            "dim": 8,
            "base_rate": 0.1,
        }
    )
    assert isinstance(head, FCNHead) and type(head).__name__ == "ContextrastFCNHead"
    data = samples()
    losses = head.loss(STAGES, data, None)
    labels = torch.stack([sample.gt_sem_seg.data for sample in data])
    embeddings = [project(x) for project, x in zip(head.contrast_heads, STAGES)]
    expected = ck.contextrast_loss(embeddings, labels, head.forward(STAGES), num_classes=N, base_rate=0.1, seed=0)
    torch.testing.assert_close(losses["loss_contrast"], 0.2 * expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["loss_ce"], FCNHead.loss(head.eval(), STAGES, data, None)["loss_ce"])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in head.parameters())


def test_the_contrast_ignores_what_the_head_ignores(registry):
    options = {"in_channels": [4, 8], "dim": 8, "layer_weights": (1.0, 0.5)}
    head = registry.build({"type": "ContextrastHead", "head": PLAIN | {"ignore_index": 1}, **options})
    data = samples()
    for sample in data:
        sample.gt_sem_seg.data[sample.gt_sem_seg.data == 255] = 1
    labels = torch.stack([sample.gt_sem_seg.data for sample in data])
    loss = head.loss(STAGES, data, None)["loss_contrast"]
    embeddings = [project(x) for project, x in zip(head.contrast_heads, STAGES)]
    more = {"num_classes": N, "layer_weights": (1.0, 0.5), "seed": 0}
    expected = ck.contextrast_loss(embeddings, labels, head.forward(STAGES), ignore_index=1, **more)
    assert expected > 0 and expected != ck.contextrast_loss(embeddings, labels, head.forward(STAGES), **more)
    torch.testing.assert_close(loss, 0.1 * expected, rtol=1e-4, atol=0)


def test_checkpoints_and_predictions_are_those_of_the_plain_head(registry):
    plain = registry.build(PLAIN)
    head = registry.build(
        {"type": "ContextrastHead", "head": PLAIN, "in_channels": [8, 16], "in_index": [1, 3], "layer_weights": (1, 1)}
    )
    assert not head.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert not plain.load_state_dict(head.state_dict(), strict=False).missing_keys
    assert torch.equal(head.predict(STAGES, None, None), plain.predict(STAGES, None, None))
    assert head.loss(STAGES, samples(), None)["loss_contrast"] > 0


@pytest.mark.parametrize(
    ("options", "exception", "sentence"),
    [
        ({"head": "FCNHead"}, TypeError, r"^head: expected the config of a decode head"),
        ({"head": {**PLAIN, "type": "MaskFormerHead"}}, TypeError, r"^head: .*got 'MaskFormerHead'"),
        ({"head": {**PLAIN, "type": "NoHead"}}, TypeError, r"^head: .*got 'NoHead'"),
        ({"in_index": [0, 1]}, ValueError, r"^in_index: expected 4 indices"),
        ({"weight": -1}, ValueError, r"^weight: "),
        ({"dim": 0}, ValueError, r"^dim: "),
        ({"ratio": 2}, ValueError, r"^ratio: "),
    ],
)
def test_invalid_arguments_raise_clear_errors(registry, options, exception, sentence):
    with pytest.raises(exception, match=sentence) as caught:
        registry.build({"type": "ContextrastHead", "head": PLAIN, "in_channels": [4, 8, 12, 16], **options})
    assert "\n" not in str(caught.value)


def test_importing_the_package_does_not_import_mmseg():
    program = "import sys, contextrast_kernels; print([name for name in sys.modules if name.startswith('mmseg')])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
