"""Faults that running the compiled kernels brought to light, each with the inputs that show it."""

import numpy as np
import pytest
import torch
from kernel_checks import relative, run
from option_cases import Case, build

import contextrast_kernels as ck

from .driver import emulated
from .engine import Schedule


def assert_contract(loss, leaves, arch):
    """Check the value and every gradient against the reference in float64, and that no access is a fault."""
    with ck.backend("reference"):
        value, gradient = run(loss, leaves, torch.float64)
        own_value, own_gradient = run(loss, leaves)
    with emulated(arch, Schedule(seed=1)) as gpu:
        kernel_value, kernel_gradient = run(loss, leaves)
    assert not gpu.faults(), "\n".join(map(str, gpu.faults()))
    assert relative(kernel_value, value) <= 2 * relative(own_value, value) + 1e-6
    sizes = [x.numel() for x in leaves]
    for ours, true, own in zip(*(x.split(sizes) for x in (kernel_gradient, gradient, own_gradient))):
        assert relative(ours, true) <= 2 * relative(own, true) + 1e-6


def clustered(dtype, D, noise, N=5, B=2, sizes=((8, 16), (4, 8))):
    """Features as a trained network has them: each pixel near its class's centre. All terms of ⟨x, â⟩ then have one
    sign, and s is large, so that what tensor cores cut from a sum shows in the loss."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, N, (B, *sizes[0])))
    predictions = torch.where(torch.from_numpy(rng.random((B, *sizes[0])) < 0.3), (labels + 1) % N, labels)
    centres = torch.from_numpy(rng.standard_normal((N, D)))
    features = []
    for h, w in sizes:
        rows, columns = torch.arange(h) * sizes[0][0] // h, torch.arange(w) * sizes[0][1] // w
        centre = centres[labels[:, rows][:, :, columns]].permute(0, 3, 1, 2)
        features.append((centre + noise * torch.from_numpy(rng.standard_normal(centre.shape))).to(dtype))

    def loss(*xs):
        return ck.contextrast_loss(list(xs), labels, predictions, num_classes=N, layer_weights=(1.0, 0.7))

    return loss, features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "D", "arch"),
    [
        ("bfloat16", 256, 80),
        ("float16", 256, 80),
        ("float32", 256, 80),
        ("bfloat16", 512, 80),
        ("bfloat16", 720, 80),
        ("bfloat16", 256, 90),
        ("float16", 256, 90),
    ],
)
def test_loss_of_clustered_features_is_not_shrunk_by_tensor_cores(dtype, D, arch):
    loss, features = clustered(getattr(torch, dtype), D, noise=1.0)
    assert_contract(loss, features, arch)


@pytest.mark.slow
@pytest.mark.parametrize(("D", "N"), [(256, 150), (512, 19)])
def test_bfloat16_anchors_of_few_pixels_are_precise(D, N):
    built = build(Case("class_anchors", {}, "bfloat16", D=D, N=N, sizes="wide rows"))
    assert_contract(built.loss, built.leaves, 80)


@pytest.mark.slow
def test_gradient_of_given_anchors_is_precise_in_bfloat16():
    built = build(Case("pixel_anchor_loss", {"negatives": "given"}, "bfloat16", D=64, N=150, sizes="wide rows"))
    assert_contract(built.loss, built.leaves, 80)


@pytest.mark.parametrize(
    ("op", "D", "options"),
    [
        ("contextrast_loss", 64, {"normalize_anchors": True, "layer_weights": (1.0,)}),
        pytest.param(
            "contextrast_loss", 96, {"normalize_anchors": True, "layer_weights": (1.0,)}, marks=pytest.mark.slow
        ),
        pytest.param("pixel_anchor_loss", 96, {"negatives": "given"}, marks=pytest.mark.slow),
    ],
)
def test_lanes_agree_on_what_they_store(op, D, options):
    """Also the only compile of the quick tests with anchors that are normalised in bfloat16."""
    built = build(Case(op, options, "bfloat16", D=D))
    assert_contract(built.loss, built.leaves, 80)


@pytest.mark.parametrize(
    ("op", "options", "scale"),
    [
        (
            "contextrast_loss",
            {"negatives": "none", "base_rate": 1.0, "normalize": False, "layer_weights": (1.0,)},
            2,
        ),
        pytest.param("info_nce", {"columns": None, "positives": "pooled"}, 20, marks=pytest.mark.slow),
    ],
)
def test_gradient_of_large_similarities_is_precise_in_float32(op, options, scale):
    """The rounding of a similarity grows with it. Where one outweighs the others, it cancels only if all kernels
    subtract the log-sum-exp from the rounded similarity."""
    built = build(Case(op, options, "float32", D=96))
    assert_contract(built.loss, [scale * x for x in built.leaves], 80)
