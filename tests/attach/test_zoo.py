"""The finder on the networks of ``zoo.py``: it finds the stages, and the encoder's first parameter gets a gradient, or
it raises an error."""

import pytest
import torch
from nets import attached
from zoo import ZOO

pytestmark = pytest.mark.usefixtures("reference", "one_thread")


@pytest.mark.parametrize("name", ZOO)
def test_encoder_stages_are_found_or_refused(name):
    build, expected = ZOO[name]
    torch.manual_seed(0)
    model = build()
    example = torch.zeros(1, 3, 128, 128)
    if expected is None:
        with pytest.raises(ValueError, match=r"as in ck\.attach\(model, layers=\[.*; candidates: '"):
            attached(model, example_input=example)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        return
    _, tap = attached(model, example_input=example)
    assert {layer.name: (layer.channels, layer.stride) for layer in tap.layers} == expected
    model(torch.randn(2, 3, 128, 128))
    sum(x.square().sum() for x in tap.features()).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "contextrast" not in n)
