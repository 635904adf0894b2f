"""Invalid arguments of the relatives, their samplers and their memory bank raise clear errors."""

import re

import pytest
import torch
from test_relatives import D, N, bank, batch

import contextrast_kernels as ck

BASE = ck.Sampler("common-count", 40, 5, 2)
FEATURES, LABELS, LOGITS = batch(dtype=torch.float32)
PIXEL, SCALES, PNE = ck.PixelContrastLoss, ck.MultiScaleContrastLoss, ck.PNELoss


def called(loss, features=FEATURES, labels=LABELS, predictions=LOGITS):
    return loss(features, labels, predictions)


@pytest.mark.parametrize(
    ("call", "exception", "argument", "quoted"),
    [
        (lambda: PIXEL(0), ValueError, "num_classes", "0"),
        (lambda: PIXEL(N, temperature=0.0), ValueError, "temperature", "0.0"),
        (lambda: PIXEL(N, ignore_index=None), TypeError, "ignore_index", "None"),
        (lambda: PIXEL(N, max_samples=0), ValueError, "max_samples", "0"),
        (lambda: PIXEL(N, max_views=1.5), TypeError, "max_views", "1.5"),
        (lambda: PIXEL(N, sampler="random"), ValueError, "sampler", "random"),
        (lambda: PIXEL(N, bank=torch.zeros(3)), TypeError, "bank", "float32"),
        (lambda: PIXEL(N, bank=ck.MemoryBank(N + 1, D)), ValueError, "bank", "5"),
        (lambda: PIXEL(N, bank_pixels=-1), ValueError, "bank_pixels", "-1"),
        (lambda: PIXEL(N, mining="hard"), ValueError, "mining", "hard"),
        (lambda: PIXEL(N, hardest=0.0), ValueError, "hardest", "0.0"),
        (lambda: PIXEL(N, mined_positives=0), ValueError, "mined_positives", "0"),
        (lambda: PIXEL(N, mined_negatives=0), ValueError, "mined_negatives", "0"),
        (lambda: PIXEL(N, normalize=1), TypeError, "normalize", "1"),
        (lambda: PIXEL(N, parity="yes"), TypeError, "parity", "yes"),
        (lambda: PIXEL(N, seed=0.5), TypeError, "seed", "0.5"),
        (lambda: PIXEL(N, layer="last"), TypeError, "layer", "last"),
        (lambda: called(PIXEL(N, layer=4)), ValueError, "layer", "4"),
        (lambda: called(PIXEL(N), features=[]), ValueError, "layer", "0"),
        (lambda: called(PIXEL(N), features={"0": FEATURES[0]}), TypeError, "features", "dict"),
        (lambda: called(PIXEL(N), features=FEATURES[0][0]), ValueError, "features", r"\(5, 9, 12\)"),
        (lambda: called(PIXEL(N), labels=LABELS[:1]), ValueError, "labels", r"\(1, 18, 24\)"),
        (lambda: called(PIXEL(N), labels=LABELS.float()), TypeError, "labels", "float32"),
        (lambda: called(PIXEL(N), predictions=LOGITS[:, :3]), ValueError, "predictions", r"\(2, 3, 18, 24\)"),
        (lambda: called(PIXEL(N, bank=ck.MemoryBank(N, 7))), ValueError, "features", r"7 channels.*\(2, 5, 9, 12\)"),
        (lambda: called(PIXEL(N, sampler=lambda y, *_: y)), ValueError, "sampler", "int64"),
        (lambda: SCALES(N, layer_weights=[]), TypeError, "layer_weights", "list"),
        (lambda: SCALES(N, cross_weights=(1.0,)), ValueError, "cross_weights", "1"),
        (lambda: SCALES(N, cross_weights=(1.0, -1.0)), ValueError, "cross_weights", "-1.0"),
        (lambda: SCALES(N, min_pixels=0), ValueError, "min_pixels", "0"),
        (lambda: SCALES(N, detach_deepest=0), TypeError, "detach_deepest", "0"),
        (lambda: called(SCALES(N), features=FEATURES[:3]), ValueError, "layer_weights", "3"),
        (lambda: called(SCALES(N), features=FEATURES[::-1]), ValueError, r"features\[1\]", "high to low"),
        (lambda: called(SCALES(N), features=FEATURES[0]), TypeError, "features", "float32"),
        (lambda: ck.RegionContrastLoss(N, None), TypeError, "bank", "None"),
        (lambda: ck.RegionContrastLoss(N, bank(), regions="truth"), ValueError, "regions", "truth"),
        (lambda: ck.RegionContrastLoss(N, bank(regions=0)), ValueError, "bank", "regions=0"),
        (lambda: PNE(N, set_size=0), ValueError, "set_size", "0"),
        (lambda: PNE(N, max_hard=0), ValueError, "max_hard", "0"),
        (lambda: PNE(N, max_samples=0), ValueError, "max_samples", "0"),
        (lambda: ck.MemoryBank(N, 0), ValueError, "dim", "0"),
        (lambda: ck.MemoryBank(N, D, pixels=0, regions=0), ValueError, "pixels", "regions=0"),
        (lambda: ck.MemoryBank(N, D, group="all"), TypeError, "group", "all"),
        (lambda: bank().push("both", FEATURES[0][0, :, 0].T, LABELS[0, 0, :12]), ValueError, "queue", "both"),
        (lambda: bank().push("pixels", torch.zeros(3, 4), LABELS[0, 0, :3]), ValueError, "embeddings", r"\(3, 4\)"),
        (lambda: bank().push("pixels", torch.zeros(3, D), LABELS[0, 0, :2]), ValueError, "labels", r"\(2,\)"),
        (lambda: bank().push("pixels", FEATURES[0], LABELS[0, 0, :2]), ValueError, "embeddings", r"\(2, 5, 9, 12\)"),
        (lambda: bank().push("pixels", torch.zeros(3, D), torch.zeros(3)), TypeError, "labels", "float32"),
        (lambda: bank().push("pixels", torch.zeros(3, D), [0, 1, 2]), TypeError, "labels", "list"),
        (lambda: ck.Sampler("hard", 10, 10), ValueError, "sampler", "hard"),
        (lambda: BASE(LABELS, LOGITS, N, 0), TypeError, "predictions", "argmax"),
        (lambda: BASE(LABELS, LABELS[:, 1:], N, 0), ValueError, "predictions", r"\(2, 17, 24\)"),
        (lambda: called(ck.ContextrastLoss(N, base_sampler=lambda y, *_: y)), ValueError, "base_sampler", "int64"),
        (lambda: ck.ContextrastLoss(N, base_sampler=0.5), ValueError, "base_sampler", "0.5"),
        (lambda: ck.ContextrastLoss(N, base_sampler=BASE, base_rate=0.1), ValueError, "base_sampler", "0.1"),
    ],
)
def test_invalid_arguments_raise_clear_errors(call, exception, argument, quoted):
    with pytest.raises(exception, match=rf"(?s)^{argument}: .*{quoted}") as raised:
        call()
    assert "\n" not in str(raised.value)
    assert re.search(r"\. [A-Z]\w", str(raised.value))  # the fix follows the problem
