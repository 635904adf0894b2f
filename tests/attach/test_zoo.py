"""In each network of ``zoo.py`` the finder finds the stages or raises an error.

If it finds them, it says what is not certain, and the encoder gets a gradient. If it raises an error, the layers that
the error proposes can be tapped.
"""

import ast
import re

import pytest
import torch
from nets import attached
from zoo import DOUBTS, ZOO

pytestmark = pytest.mark.usefixtures("reference", "one_thread")


@pytest.mark.parametrize("name", ZOO)
def test_encoder_stages_are_found_or_refused(name):
    build, expected = ZOO[name]
    torch.manual_seed(0)
    model = build()
    example = torch.zeros(1, 3, 128, 128)
    if expected is None:
        with pytest.raises(ValueError, match=r"as in ck\.attach\(model, layers=\[.*\. Candidates: '") as error:
            attached(model, example_input=example)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        proposed = ast.literal_eval(re.search(r"layers=(\[.*?\])\)\.", str(error.value))[1])
        _, tap = attached(model, example_input=example, layers=proposed)
        assert [layer.name for layer in tap.layers] == proposed
        return
    _, tap = attached(model, example_input=example)
    assert {layer.name: (layer.channels, layer.stride) for layer in tap.layers} == expected
    if name in DOUBTS:
        assert re.search(
            rf"^These layers are probably .*{DOUBTS[name]}.*\. To choose others, call ck\.attach", tap.table(), re.M
        )
    else:
        assert tap.doubt == "" and "probably" not in tap.table()
    model(torch.randn(2, 3, 128, 128))
    sum(x.square().sum() for x in tap.features()).backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "contextrast" not in n)
