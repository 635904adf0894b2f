"""The fused kernels as PyTorch ops: torch.compile, autocast, schemas, second derivatives, and sizes they refuse."""

import pytest
import torch
from kernel_checks import (
    DEVICE,
    NEEDS_TRITON,
    ON_COMPILED_CODE,
    assert_like_the_reference,
    feature_map,
    labels_and_predictions,
    negative_maps,
    poisoned_memory,  # noqa: F401 - a fixture for all tests here
    pyramid,
    total,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch._library.custom_ops import OPDEFS
from torch.library import opcheck

import contextrast_kernels as ck
from contextrast_kernels import anchors, contextrast, pixel_anchor

pytestmark = NEEDS_TRITON


def test_an_op_with_a_gradient_has_no_default_argument():
    """In PyTorch 2.11 the backward pass of such an op fails where the argument is left out."""
    ops = [op for name, op in OPDEFS.items() if name.startswith("contextrast::") and op._backward_fn is not None]
    assert len(ops) >= 8
    for op in ops:
        assert not [a.name for a in op._opoverload._schema.arguments if a.has_default_value()], op


@ON_COMPILED_CODE
def test_ops_pass_opcheck(rng):
    """Schema, fake tensors, autograd registration and AOT dispatch of every op, backward ops with what forward
    saved."""
    labels, _ = labels_and_predictions(rng, 1, 3, 6, 7)
    x, top = (x.requires_grad_() for x in pyramid(rng, 1, 8, [(3, 4), (2, 2)]))
    a, counts, codes = anchors._class_anchors(x, labels, 3, 255, True, None)
    opcheck(anchors._class_anchors, (x, labels, 3, 255, True, None))
    detached = x.detach()
    opcheck(anchors._class_anchors_backward, (torch.ones_like(a), detached, counts, codes, True))

    negatives, base = negative_maps(rng, "both", 1, 3, (3, 4)).values()
    rows = a.detach().requires_grad_()
    for maps in ((negatives, None), (negatives, base)):
        arguments = (x, labels, rows, *maps, 0.1, 255, True, None)
        opcheck(pixel_anchor._pixel_anchor_loss, arguments)
        loss, _, *saved = pixel_anchor._pixel_anchor_loss(*arguments)
        opcheck(
            pixel_anchor._pixel_anchor_loss_backward,
            (torch.ones_like(loss).detach(), detached, *saved, 0.1, True),
        )

    chosen = [torch.where((negatives >= 0) & (negatives < 3), negatives, 255), torch.zeros(1, 2, 2, device=DEVICE)]
    e = torch.cat([x.flatten().to(torch.uint8) for x in chosen])
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    sampled = [base, torch.ones(1, 2, 2, dtype=torch.bool, device=DEVICE)]
    for base_rate, base_maps in ((0.0, []), (0.5, []), (0.0, sampled)):
        options = (3, 255, [1.0, 0.5], 0.1, 0.7, base_rate, True, False, False, None, None, None)
        arguments = ([x, top], labels, e, base_maps, seed, *options)
        opcheck(contextrast._contextrast_loss, arguments)
        loss, _, _, *saved = contextrast._contextrast_loss(*arguments)
        backward = (torch.ones_like(loss).detach(), [detached, top.detach()], e, *saved, 0.1, True, False)
        opcheck(contextrast._contextrast_loss_backward, backward)


@pytest.mark.parametrize("options", [{}, {"base_rate": 0.5}], ids=["hard", "dense"])
@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels keep the products that they were compiled with")
def test_float64_without_products_of_its_own(rng, monkeypatch, options):
    """As Triton before 3.9 has it: ``_tiles.FLOAT64_DOT``."""
    from triton import language as tl

    from contextrast_kernels.kernels import _tiles

    monkeypatch.setattr(_tiles, "FLOAT64_DOT", tl.constexpr(False))
    monkeypatch.setattr(tl, "dot", None)
    labels, predictions = labels_and_predictions(rng, 1, 3, 6, 7)
    xs = pyramid(rng, 1, 20, [(3, 5), (2, 2)], torch.float64)
    assert_like_the_reference(total(labels, predictions, 3, 2, **options), xs)
    y = torch.arange(6, device=DEVICE) % 2
    assert_like_the_reference(lambda rows: ck.info_nce(rows, y), [xs[0][0].flatten(1).T[:6]])


def every_op(rng):
    """Each op as a function of two feature maps, with no arithmetic after it: a compiler's sums are its own."""
    labels, predictions = labels_and_predictions(rng, 1, 3, 6, 7)
    rows = torch.from_numpy(rng.standard_normal((3, 8))).float().to(DEVICE)
    return {
        "class_anchors": lambda x, _: ck.class_anchors(x, labels, 3)[0],
        "pixel_anchor_loss": lambda x, _: ck.pixel_anchor_loss(x, labels, rows),
        "contextrast_loss": total(labels, predictions, 3, 2),
        "contextrast_loss, dense": total(labels, predictions, 3, 2, base_rate=0.5),
    }


OPS = ["class_anchors", "pixel_anchor_loss", "contextrast_loss", "contextrast_loss, dense"]


@ON_COMPILED_CODE
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_ops_equal_eager(rng, op, compiler, dynamic):
    """One graph, the bits of eager mode, and no compilation on the second call."""
    eager = every_op(rng)[op]
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(compiler)
    compiled = torch.compile(eager, backend=graphs, fullgraph=True, dynamic=dynamic)
    frames = []
    with ck.backend("triton"):
        for _ in range(2):
            xs = [x.requires_grad_() for x in pyramid(rng, 1, 8, [(2, 4), (2, 2)], torch.float32)]
            used = xs[: 2 if "contextrast" in op else 1]
            results = []
            for function in (compiled, eager):
                value = function(*xs)
                results.append((value, *torch.autograd.grad(value, used, value.detach())))
            for ours, theirs in zip(*results):
                assert torch.equal(ours, theirs)
            frames.append(graphs.frame_count)
    assert frames[0] == frames[1]


@pytest.mark.slow
def test_batches_of_other_sizes_are_compiled_once(rng):
    """With dynamic shapes the third batch and size finds the graph of the second."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def loss(x, top, labels, predictions):
        return total(labels, predictions, 3, 2)(x, top)

    compiled = torch.compile(loss, backend=graphs, fullgraph=True, dynamic=True)
    frames = []
    with ck.backend("triton"):
        for B, h, w in ((2, 4, 6), (3, 5, 8), (4, 6, 7)):
            xs = [x.requires_grad_() for x in pyramid(rng, B, 8, [(h, w), (h // 2, w // 2)], torch.float32)]
            maps = labels_and_predictions(rng, B, 3, 2 * h, 2 * w)
            for ours, theirs in zip(
                *((x, *torch.autograd.grad(x, xs)) for x in (f(*xs, *maps) for f in (compiled, loss)))
            ):
                assert torch.equal(ours, theirs)
            frames.append(graphs.frame_count)
    assert frames[1] == frames[2]


@ON_COMPILED_CODE
@pytest.mark.parametrize("op", OPS)
def test_autocast_changes_nothing(rng, op):
    function = every_op(rng)[op]
    xs = [x.requires_grad_() for x in pyramid(rng, 1, 8, [(2, 4), (2, 2)], torch.float32)]
    used = xs[: 2 if "contextrast" in op else 1]
    with ck.backend("triton"):
        plain = function(*xs)
        with torch.autocast(DEVICE, torch.bfloat16):
            cast = function(*xs)
        assert torch.equal(plain, cast)
        gradients = (torch.autograd.grad(value, used, plain.detach()) for value in (cast, plain))
        for ours, theirs in zip(*gradients):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("op", OPS)
def test_double_backward_raises_a_clear_error(rng, op):
    xs = [x.requires_grad_() for x in pyramid(rng, 1, 8, [(2, 4), (2, 2)])]
    function = every_op(rng)[op]
    with ck.backend("triton"):
        (gradient,) = torch.autograd.grad(function(*xs).sum(), xs[:1], create_graph=True)
    name = op.removesuffix(", dense")
    with pytest.raises(
        RuntimeError, match=rf"^{name}: the fused kernels do not support double backward.*backend\('reference'\)"
    ):
        gradient.sum().backward()


class Undefined(torch.autograd.Function):
    """The identity, with a backward pass that returns no gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@pytest.mark.parametrize("op", OPS)
def test_an_undefined_gradient_gives_no_gradient(rng, op):
    xs = [x.requires_grad_() for x in pyramid(rng, 1, 8, [(2, 4), (2, 2)])]
    with ck.backend("triton"):
        Undefined.apply(every_op(rng)[op](*xs)).sum().backward()
    assert all(x.grad is None for x in xs)


def test_backward_runs_what_forward_ran(rng):
    x = feature_map(rng, 1, 8, 3, 4).requires_grad_()
    labels, _ = labels_and_predictions(rng, 1, 3, 6, 7)
    with ck.backend("triton"):
        loss = ck.class_anchors(x, labels, 3)[0].sum()
    with ck.backend("reference"):
        (gradient,) = torch.autograd.grad(loss, x)
    assert loss.grad_fn is not None
    assert gradient.isfinite().all()


@pytest.mark.parametrize(("N", "D"), [(257, 8), (3, 1025)])
def test_unsupported_sizes_use_the_reference(rng, N, D):
    x = feature_map(rng, 1, D, 2, 2)
    labels = torch.zeros(1, 2, 2, dtype=torch.int64, device=DEVICE)
    with (
        ck.backend("triton"),
        pytest.raises(RuntimeError, match=rf"at most 256 classes and 1024 channels, got {N} and {D}"),
    ):
        ck.class_anchors(x, labels, N)
    with ck.backend("auto"):
        _, counts = ck.class_anchors(x, labels, N)
    assert counts[0] == 4
