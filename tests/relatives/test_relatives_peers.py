"""Our losses against the official code on the same pixels: values and gradients, in float64.

CONTEXTRAST_PEERS names a folder of checkouts (benchmarks/peers.py lists them); nothing of theirs is in this tree. Their
files run as they are; what they write as `torch.float` means float64 here, so that agreement can be told from rounding.
"""

import importlib
import os
import pathlib
import types
from unittest import mock

import numpy as np
import pytest
import torch
from inputs import leaves, logits_of, pyramid, scene
from torch.nn import functional as F

import contextrast_kernels as ck
from benchmarks import peers

CPU, N = torch.device("cpu"), 5
TIGHT = {"rtol": 1e-11, "atol": 1e-14}


def checkout(name):
    folder = os.environ.get("CONTEXTRAST_PEERS")
    if not folder or not (pathlib.Path(folder) / name).is_dir():
        pytest.skip(f"needs CONTEXTRAST_PEERS, a folder with a checkout {name}")
    return (pathlib.Path(folder) / name).resolve()


def batch(seed=0, sizes=((16, 24), (8, 12), (5, 7), (4, 6)), D=7):
    """The labels' sizes are the first layer's multiples: their resizing and ours agree there."""
    rng = np.random.default_rng(seed)
    labels, predictions = scene(rng, B=2, N=N, H=16, W=24, wrong=0.3)
    return pyramid(rng, D=D, sizes=sizes), labels, logits_of(predictions, N, rng).double()


def theirs(call, seed=0):
    """Run their code in float64, on the CPU, with its draws fixed."""
    torch.manual_seed(seed)
    with peers.cuda_means(CPU), mock.patch.object(torch, "float", torch.float64):
        return call()


def given(*index_maps):
    """A sampler that chooses the pixels with these flat indices, layer after layer."""
    remaining = list(index_maps)

    def sampler(labels, predictions, num_classes, seed, stream):
        chosen = torch.zeros(labels.numel(), dtype=torch.bool)
        chosen[remaining.pop(0)] = True
        return chosen.reshape(labels.shape)

    return sampler


def assert_same(ours, ours_of, official, official_of):
    """Values, and gradients as vectors."""
    assert official.item() > 0
    torch.testing.assert_close(ours, official, **TIGHT)
    got, want = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, tracked)])
        for loss, tracked in ((ours, ours_of), (official, official_of))
    )
    assert want.any()
    assert (got - want).norm() <= 1e-11 * want.norm()


def pixel_index(x):
    """A map whose value at each pixel is its flat index, (B, 1, h, w)."""
    return torch.arange(x[:, 0].numel(), dtype=torch.float64).reshape(x.shape[0], 1, *x.shape[2:])


@pytest.mark.parametrize(("max_samples", "max_views"), [(1024, 12), (45, 20), (1024, 5)])
def test_pixel_contrast_equals_contrastive_seg(max_samples, max_views):
    root = checkout("ContrastiveSeg")
    with peers.imports_from(root):
        file = importlib.import_module("lib.loss.loss_contrast")
    (x, *_), labels, logits = batch()
    settings = {
        ("contrast", "temperature"): 0.1,
        ("contrast", "base_temperature"): 0.07,
        ("contrast", "max_samples"): max_samples,
        ("contrast", "max_views"): max_views,
        ("loss", "params"): {"ce_ignore_index": 255},
    }
    official = file.PixelContrastLoss(
        types.SimpleNamespace(get=lambda *k: settings[k], exists=lambda *k: k in settings)
    )
    predict = logits.argmax(1)
    flat = [m.flatten(1) for m in (labels, predict)]
    index, _ = theirs(lambda: official._hard_anchor_sampling(pixel_index(x).flatten(2).mT, *flat))
    index = index.flatten().long()
    mine, other = leaves([x, x])
    loss = theirs(lambda: official(F.normalize(other, dim=1), labels, predict))
    ours = ck.PixelContrastLoss(N, sampler=given(index), max_samples=len(index), max_views=len(index), parity=True)
    assert_same(ours(mine, labels, logits), mine, loss, other)
    assert ours.last["samples"] == len(index)

    # Our own draw obeys the same quota: as many pixels of every image, class and kind.
    own = ck.Sampler("hard-easy", max_samples, max_views)(torch.where(labels == 255, -1, labels), predict, N, 0)
    kind = (torch.arange(2)[:, None, None] * N + labels) * 2 + (predict != labels)
    assert torch.equal(kind[own].sort().values, kind.flatten()[index].sort().values)


def test_multi_scale_equals_ms_cs():
    root = checkout("MS_CS_ContrSeg")
    classes = {n: str(n) for n in range(N)} | {255: "ignored"}
    info = types.SimpleNamespace(CLASS_INFO={1: [None, classes]})
    utils = peers.StandIn(
        "utils", DATASETS_INFO={"": info}, Logger=peers.StandIn("Logger"), is_distributed=lambda: False
    )
    with peers.imports_from(root, utils, peers.StandIn("losses", root / "losses")):
        file = importlib.import_module("losses.DenseContrastiveLossV2_ms")
    layers, labels, logits = batch(sizes=((16, 24), (8, 12), (4, 6)))
    config = {"experiment": 1, "dataset": "", "temperature": 0.1, "scales": 3, "weights": [1.0, 0.7, 0.4]}
    official = file.DenseContrastiveLossV2_ms({**config, "cross_scale_contrast": True})
    remapped = torch.where(labels == 255, N, labels)
    theirs_of, ours_of = leaves(layers), leaves(layers)
    loss = theirs(lambda: official(remapped, theirs_of))
    drawn = []

    def draw():
        for i, x in enumerate(layers):
            scale = getattr(official, f"DCV2_scale{i}")
            small = F.interpolate(remapped[:, None].double(), x.shape[2:]).long()
            drawn.append(scale.sample_anchors_fast(small, pixel_index(x))[0].flatten().long())

    theirs(draw)
    ours = ck.MultiScaleContrastLoss(N, layer_weights=(1.0, 0.7, 0.4), sampler=given(*drawn))
    assert_same(ours(ours_of, labels, logits), ours_of, loss, theirs_of)
    assert ours.last["samples"].tolist() == [len(index) for index in drawn]
    for i, x in enumerate(layers):
        step = 16 // x.shape[2]
        small = torch.where(labels == 255, -1, labels)[:, ::step, ::step]
        assert ck.Sampler("common-count", 10000, 2500)(small, small, N, 0).sum() == len(drawn[i])


# 20: some sets are larger and some smaller. The gate of 60 leaves some pairs out.
@pytest.mark.parametrize(("set_size", "gate"), [(100, 199), (20, 60), (7, 25)])
@pytest.mark.parametrize("wrong", [0.3, 0.9])
def test_pne_equals_the_official_code(wrong, set_size, gate):
    root = checkout("PNE_Loss")
    folder, register = root / "mmseg" / "models", types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    stand_ins = [peers.StandIn(name) for name in ("mmcv", "mmcv.utils", "torchvision", "ipdb", "mmseg.utils")]
    stand_ins += [peers.StandIn("mmseg", root / "mmseg"), peers.StandIn("mmseg.models", folder)]
    stand_ins += [peers.StandIn("mmseg.models.losses", folder / "losses"), peers.StandIn("mmseg.models.losses.utils")]
    with peers.imports_from(root, *stand_ins, peers.StandIn("mmseg.models.builder", LOSSES=register)):
        file = importlib.import_module("mmseg.models.losses.reverse_contrastive_loss")
    rng = np.random.default_rng(1)
    labels, predictions = scene(rng, B=2, N=N, H=24, W=32, wrong=wrong)
    predictions[0][labels[0] == 2] = 3  # no pixel of class 2 is right: its P and N are empty
    [x], logits = pyramid(rng, sizes=((24, 32),)), logits_of(predictions, N, rng).double()
    official = file.ReverseContrastiveLoss(
        patch_size=set_size, temp=1, loss_weight=1.3, cal_function="EQUAL", cal_gate=[0, gate]
    )
    mine, other = leaves([x, x])
    loss = theirs(lambda: official(logits, labels[:, None], con_seg_logit=other))
    ours = ck.PNELoss(N, set_size=set_size, max_hard=gate, parity=True)
    assert_same(1.3 * ours(mine, labels, logits), mine, loss, other)
