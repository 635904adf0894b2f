"""In eager mode ``contextrast_loss`` runs the function of its op directly; what traces or watches ops gets the op."""

import pytest
import torch
from kernel_checks import DEVICE, labels_and_predictions, pyramid
from torch.utils._python_dispatch import TorchDispatchMode

import contextrast_kernels as ck
from contextrast_kernels import contextrast

pytestmark = pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")


@pytest.fixture
def ops(monkeypatch):
    """The ops of the loss that are called, by name."""
    called = []
    for name in ("_contextrast_loss", "_contextrast_loss_backward"):
        op = getattr(contextrast, name)
        monkeypatch.setattr(contextrast, name, lambda *a, op=op, name=name: called.append(name) or op(*a))
    return called


def batch(rng):
    labels, predictions = labels_and_predictions(rng, 1, 3, 6, 8)
    x, frozen, top = (x.requires_grad_() for x in pyramid(rng, 1, 8, [(3, 4), (3, 4), (2, 2)]))
    return [x, frozen.requires_grad_(False), top], labels, predictions


@pytest.mark.parametrize("base", [{}, {"base_rate": 0.5}, {"base_sampler": ck.Sampler("uniform", 20, 5)}])
def test_the_direct_call_has_the_bits_of_the_op(rng, base, ops, monkeypatch):
    features, labels, predictions = batch(rng)
    criterion = ck.ContextrastLoss(3, layer_weights=(1.0, 0.7, 0.5), **base).to(DEVICE)
    outcomes = []
    for direct in (True, False):
        if not direct:
            monkeypatch.setattr(contextrast, "is_eager", lambda _: False)
        criterion.seed.zero_()
        with ck.backend("triton"):
            loss = criterion(features, labels, predictions)
            gradients = torch.autograd.grad(2 * loss, (features[0], features[2]))
        outcomes.append((loss, *criterion.last.values(), *gradients))
        assert ops == ([] if direct else ["_contextrast_loss", "_contextrast_loss_backward"])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert all(gradient.any() for gradient in gradients)


def test_a_mode_that_watches_ops_sees_the_op(rng):
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    features, labels, predictions = batch(rng)
    names = []
    with ck.backend("triton"), Watch():
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=3, layer_weights=(1.0, 0.7, 0.5))
        torch.autograd.grad(loss, features[0])
    assert {"contextrast::contextrast_loss", "contextrast::contextrast_loss_backward"} <= set(names)


def test_a_second_derivative_is_refused_by_the_op(rng, ops):
    features, labels, predictions = batch(rng)
    with ck.backend("triton"):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=3, layer_weights=(1.0, 0.7, 0.5))
        (gradient,) = torch.autograd.grad(loss, features[0], create_graph=True)
    assert ops == ["_contextrast_loss_backward"]
    with pytest.raises(RuntimeError, match=r"contextrast_loss: .* double backward"):
        gradient.sum().backward()
