"""Compare a Triton kernel with the reference: inputs on the device, values and gradients, and the allowed error.

A kernel's error is measured against the reference in float64 on the same inputs, and may be twice that of the
reference in the inputs' own dtype, plus 1e-6. bfloat16 is for a GPU: the interpreter gets it wrong.
"""

import pytest
import torch
from inputs import scene
from torch import Tensor

import contextrast_kernels as ck

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float64, torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)
ON_COMPILED_CODE = pytest.mark.slow if DEVICE == "cpu" else lambda test: test
"""Marks tests as slow on a CPU, because tests/compiled runs the same cases on the compiled kernels."""
NEEDS_TRITON = pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")


def feature_map(rng, B, D, h, w, dtype=torch.float64, layout="nchw", scale=1.0) -> Tensor:
    x = torch.from_numpy((rng.standard_normal((B, D, h, w)) + 0.3) * scale).to(dtype).to(DEVICE)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "slices":  # no axis of stride 1
        big = x.new_full((B, D + 1, 2 * h, 3 * w), torch.nan)
        view = big[:, 1:, ::2, 1::3]
        view.copy_(x)
        return view
    return x


def labels_and_predictions(rng, B, N, H, W, **options):
    """Blobs; with more classes than a block has slots, a different one at every pixel."""
    labels, predictions = scene(rng, B, N, H, W, **options)
    if N > 16:
        labels, predictions = (torch.from_numpy(rng.integers(0, N, (B, H, W))) for _ in range(2))
    return labels.to(DEVICE), predictions.to(DEVICE)


def run(loss, leaves, dtype=None):
    """Value and gradients of ``loss(*leaves)`` in a dtype, the gradients of all leaves in one float64 vector. The
    upstream gradient is 3."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    value = loss(*leaves)
    weight = torch.linspace(1, 3, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
    gradients = torch.autograd.grad((3 * weight * value).sum(), leaves)
    for x, gradient in zip(leaves, gradients):
        assert gradient.dtype == x.dtype
        assert gradient.shape == x.shape
    return value.detach().double(), torch.cat([g.double().flatten() for g in gradients])


def relative(a: Tensor, b: Tensor) -> float:
    difference, size = (a - b).norm().item(), b.norm().item()
    return difference / size if size > 0 else difference


def size_of_zero(gradient: Tensor, leaves: list[Tensor]) -> float:
    """The size of a gradient that is 0 in exact arithmetic, as far as it exceeds rounding: its largest entry with
    respect to the logarithm of a feature, in units of the largest upstream gradient of ``run``."""
    features = torch.cat([x.double().flatten() for x in leaves])
    return torch.where(gradient == 0, 0.0, gradient * features).abs().max().item() / 9


def assert_like_the_reference(loss, leaves, rounding=None, gradient_is_zero=False):
    """Assert that the error of ``loss`` on the Triton backend, against the reference in float64, is allowed. It may be
    twice that of the reference in the leaves' dtype, plus ``rounding``: 1e-12 in float64 and 1e-6 else."""
    before = [x.clone() for x in leaves]
    with ck.backend("reference"):
        value, gradient = run(loss, leaves, torch.float64)
        own_value, own_gradient = run(loss, leaves)
    with ck.backend("triton"):
        kernel_value, kernel_gradient = run(loss, leaves)
    for x, copy in zip(leaves, before):
        torch.testing.assert_close(x, copy, rtol=0, atol=0, equal_nan=True)
    rounding = rounding or (1e-12 if leaves[0].dtype == torch.float64 else 1e-6)
    assert relative(kernel_value, value) <= 2 * relative(own_value, value) + rounding
    if gradient_is_zero:
        assert size_of_zero(kernel_gradient, leaves) <= rounding
        return
    assert relative(kernel_gradient, gradient) <= 2 * relative(own_gradient, gradient) + rounding
    if gradient.norm() > 0 and leaves[0].dtype in (torch.float32, torch.float64):
        cosine = torch.dot(kernel_gradient / kernel_gradient.norm(), gradient / gradient.norm())
        assert cosine >= 1 - 1e-6


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` gives NaN and the largest integers: reading memory that was never written changes the result."""
    # Only warn: some ops of the reference have no deterministic version on a GPU and need none.
    torch.use_deterministic_algorithms(True, warn_only=True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def pyramid(rng, B, D, sizes, dtype=torch.float64, layout="nchw", scale=1.0):
    return [feature_map(rng, B, D, *size, dtype, layout, scale) for size in sizes]


def total(labels, predictions, N, layers, **options):
    weights = (1.0, 0.7, 0.4, 0.1)[:layers]
    return lambda *xs: ck.contextrast_loss(
        list(xs), labels, predictions, num_classes=N, layer_weights=weights, **options
    )


def negative_maps(rng, kind, B, N, size):
    """Hard negatives (some of them the pixel's own class, some at ignored pixels), base pixels, both, or neither."""
    negatives = torch.from_numpy(rng.integers(-N, N + 2, (B, *size))).to(DEVICE)
    base = torch.from_numpy(rng.random((B, *size)) < 0.4).to(DEVICE)
    return {
        "negatives": negatives if kind in ("hard", "both") else None,
        "base": base if kind in ("base", "both") else None,
    }
