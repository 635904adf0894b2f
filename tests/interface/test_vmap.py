"""torch.func.vmap over the ops gives what one call for each sample gives."""

import pytest
import torch

import contextrast_kernels as ck

SAMPLES, B, N = 3, 2, 3
RANDOM = torch.Generator().manual_seed(0)
FINE, COARSE = (torch.randn(SAMPLES, B, 5, s, s, generator=RANDOM) for s in (4, 2))
LABELS = torch.randint(0, N, (SAMPLES, B, 8, 8), generator=RANDOM)
LOGITS = torch.randn(SAMPLES, B, N, 8, 8, generator=RANDOM)
ANCHORS = torch.randn(SAMPLES, N, 5, generator=RANDOM)
ROWS, ROW_LABELS = torch.randn(SAMPLES, 7, 5, generator=RANDOM), torch.randint(0, N, (SAMPLES, 7), generator=RANDOM)

MAPS = {
    "error_map": (ck.error_map, LOGITS, LABELS),
    "edge_distance": (ck.edge_distance, LABELS),
    "distance_transform": (ck.distance_transform, LABELS),
    "select_nearest": (lambda e, d: ck.select_nearest(e, d, 0.5, num_classes=4), LABELS, LOGITS[:, :, 0].double()),
    "bane_negatives": (lambda p, y: ck.bane_negatives(p, y, size=(4, 4)), LOGITS, LABELS),
}
LOSSES = {
    "class_anchors": (lambda x, y: ck.class_anchors(x, y, N)[0], FINE, LABELS),
    "pixel_anchor_loss": (ck.pixel_anchor_loss, FINE, LABELS, ANCHORS),
    "contextrast_loss": (
        lambda x, z, y, p: ck.contextrast_loss([x, z], y, p, num_classes=N, layer_weights=(1.0, 0.5)),
        *(FINE, COARSE, LABELS, LOGITS),
    ),
    "info_nce": (ck.info_nce, ROWS, ROW_LABELS),
}


def one_by_one(function, arguments):
    return torch.stack([function(*(value[i] for value in arguments)) for i in range(SAMPLES)])


@pytest.mark.parametrize("name", MAPS)
def test_vmapped_map_ops_equal_one_call_per_sample(map_backend, name):
    function, *arguments = MAPS[name]
    assert torch.equal(torch.func.vmap(function)(*arguments), one_by_one(function, arguments))
    # Here all arguments but the first are shared by all samples, which are along axis 2.
    moved = arguments[0].movedim(0, 2)
    in_dims = (2, *(None for _ in arguments[1:]))
    got = torch.func.vmap(function, in_dims)(moved, *(value[0] for value in arguments[1:]))
    shared = [arguments[0], *(value[:1].expand_as(value) for value in arguments[1:])]
    assert torch.equal(got, one_by_one(function, shared))


TYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


@pytest.mark.parametrize("dtype", TYPES)
def test_maps_of_every_type_over_samples(map_backend, dtype):
    numbers = torch.randint(0, 5, LABELS.shape, generator=RANDOM).to(dtype)
    for function, *arguments in (
        (lambda e, d: ck.select_nearest(e, d, 0.5, num_classes=N), LABELS, numbers),
        (ck.distance_transform, numbers),
    ):
        assert torch.equal(torch.func.vmap(function)(*arguments), one_by_one(function, arguments))


# tests/compiled/test_ops.py maps the compiled kernels over samples in every run.
@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", LOSSES)
def test_vmapped_losses_equal_one_call_per_sample(name, backend):
    if ck.available()[backend] != "ok":
        pytest.skip(f"backend {backend}: {ck.available()[backend]}")
    function, *arguments = LOSSES[name]
    with ck.backend(backend):
        got = torch.func.vmap(function)(*arguments)
    with ck.backend("reference"):
        torch.testing.assert_close(got, one_by_one(function, arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_vmapped_gradients_equal_those_of_each_sample(name, reference):
    function, first, *others = LOSSES[name]
    gradient = torch.func.grad(lambda x, *rest: function(x, *rest).sum())
    leaf = first.clone().requires_grad_()
    one_by_one(function, [leaf, *others]).sum().backward()
    torch.testing.assert_close(torch.func.vmap(gradient)(first, *others), leaf.grad)


@pytest.mark.parametrize("name", LOSSES)
def test_torch_func_gradients_of_kernels_raise(name):
    if ck.available()["triton"] != "ok":
        pytest.skip(f"backend triton: {ck.available()['triton']}")
    function, *arguments = LOSSES[name]
    gradient = torch.func.grad(lambda x, *rest: function(x, *rest).sum())
    with ck.backend("triton"), pytest.raises(RuntimeError, match=r"torch\.func.*backend\('reference'\)"):
        gradient(*(value[0] for value in arguments))
