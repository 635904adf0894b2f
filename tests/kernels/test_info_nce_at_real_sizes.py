"""The Triton kernels of rows against columns at real sizes: some in the interpreter as slow tests, most on a GPU."""

import pytest
import torch
from inputs import leaves
from kernel_checks import (
    DEVICE,
    DTYPES,
    NEEDS_TRITON,
    assert_like_the_reference,
    poisoned_memory,  # noqa: F401 - a fixture for all tests here
    run,
)
from test_info_nce_kernel import labels, loss_of, vectors

import contextrast_kernels as ck
from contextrast_kernels.info_nce import POSITIVES

pytestmark = NEEDS_TRITON


@pytest.mark.slow
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("D", [256, 720, 1024])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_many_channels(rng, dtype, D, positives):
    """The vectors are kept in registers, or read a few channels at a time by several programs."""
    x, z, y, c = vectors(rng, 3, D, dtype, 2.0), vectors(rng, 40, D, dtype, 2.0), labels(rng, 3), labels(rng, 40)
    assert_like_the_reference(loss_of(y, c, positives=positives), [x, z])
    assert_like_the_reference(loss_of(y, positives=positives), [x])


@pytest.mark.slow
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_columns_of_several_blocks(rng, dtype, positives):
    x, z, y, c = (
        vectors(rng, 150, 16, dtype, 2.0),
        vectors(rng, 333, 16, dtype, 2.0),
        labels(rng, 150),
        labels(rng, 333),
    )
    assert_like_the_reference(loss_of(y, c, positives=positives), [x, z])
    assert_like_the_reference(loss_of(y, positives=positives), [x])


# ------------------------------------------------------------------------------------------------------ on a GPU alone


def sampled(rng, R=1000, C=20_000, D=256, dtype=torch.bfloat16):
    return vectors(rng, R, D, dtype, 2.0), vectors(rng, C, D, dtype, 2.0), labels(rng, R, 19), labels(rng, C, 19)


@pytest.mark.gpu
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_precision_at_full_size(rng, dtype, tf32, positives):
    """bfloat16 and TF32 as the device computes them; torch's own switch for TF32 changes nothing in the kernels."""
    x, z, y, c = sampled(rng, dtype=dtype)
    assert_like_the_reference(loss_of(y, c, positives=positives), [x, z])
    assert_like_the_reference(loss_of(y, positives=positives), [x])
    with ck.backend("triton"):
        plain = run(loss_of(y, c, positives=positives), [x, z])
        allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, tf32
        try:
            switched = run(loss_of(y, c, positives=positives), [x, z])
        finally:
            torch.backends.cuda.matmul.allow_tf32 = allowed
    assert torch.equal(plain[0], switched[0])
    assert torch.equal(plain[1], switched[1])


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(24, 190_000), (1000, None)])
def test_fifty_runs_agree_bit_by_bit(rng, shape):
    x, z, y, c = sampled(rng, shape[0], shape[1] or 1)
    loss, inputs = (loss_of(y), [x]) if shape[1] is None else (loss_of(y, c), [x, z])
    first = run(loss, inputs)
    for _ in range(50):
        again = run(loss, inputs)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.gpu
def test_forward_and_backward_never_synchronise(rng):
    x, z, y, c = sampled(rng)
    inputs = leaves([x, z])
    loss_of(y, c)(*inputs).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for positives in POSITIVES:
            loss_of(y, c, positives=positives)(*inputs).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_in_a_cuda_graph(rng):
    """Captured once, replayed with other vectors and labels: what eager gives."""
    x, z, y, c = sampled(rng, 200, 3000)
    inputs = leaves([x, z])
    loss = loss_of(y, c)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            torch.autograd.grad(loss(*inputs), inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = loss(*inputs)
        gradients = torch.autograd.grad(value, inputs)
    for _ in range(3):
        with torch.no_grad():
            inputs[0].copy_(inputs[0].roll(1, 0))
            y.copy_(y.roll(3))
            c.copy_(c.roll(5))
        graph.replay()
        expected = loss(*inputs)
        assert torch.equal(value, expected)
        assert all(torch.equal(a, b) for a, b in zip(gradients, torch.autograd.grad(expected, inputs)))


@pytest.mark.gpu
@pytest.mark.parametrize("positives", POSITIVES)
def test_a_million_columns(rng, positives):
    """Values and gradients, and a scratch memory that does not know the number of columns."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(32, 64, generator=generator, device=DEVICE, dtype=torch.bfloat16) / 4
    z = torch.randn(1_000_000, 64, generator=generator, device=DEVICE, dtype=torch.bfloat16) / 4
    y, c = labels(rng, 32, 19), labels(rng, 1_000_000, 19)
    loss = loss_of(y, c, positives=positives)
    assert_like_the_reference(loss, [x, z])
    inputs = leaves([x, z])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    torch.cuda.synchronize()
    given = sum(g.numel() * g.element_size() for g in gradients)
    assert torch.cuda.max_memory_allocated() - before - given <= 16 * 2**20


@pytest.mark.gpu
def test_columns_beyond_two_billion_elements(rng):
    columns, D = 2_200_000, 1024
    z = torch.zeros(columns, D, dtype=torch.float16, device=DEVICE)
    c = torch.full((columns,), -1, device=DEVICE)
    c[-40:] = labels(rng, 40)
    z[-40:] = vectors(rng, 40, D, torch.float16, 2.0)
    x, y = vectors(rng, 8, D, torch.float16, 2.0), labels(rng, 8)
    far, near = leaves([x, z]), leaves([x, z[-40:]])
    losses = loss_of(y, c)(*far), loss_of(y, c[-40:])(*near)
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    gradients = torch.autograd.grad(losses[0], far), torch.autograd.grad(losses[1], near)
    torch.testing.assert_close(gradients[0][0], gradients[1][0], rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(gradients[0][1][-40:], gradients[1][1], rtol=2e-3, atol=1e-6)
    assert not gradients[0][1][:-40].any()
