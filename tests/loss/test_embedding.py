"""The reference's pixel embeddings are the same whether or not values may be read."""

import pytest
import torch

import contextrast_kernels as ck
from contextrast_kernels import embedding


def inputs():
    generator = torch.Generator().manual_seed(3)
    features = [torch.randn(2, 40, n, n + 1, generator=generator, dtype=torch.float64) for n in (8, 4)]
    labels = torch.randint(0, 5, (2, 8, 9), generator=generator)
    labels[labels == 4] = 255
    predictions = torch.randint(0, 4, (2, 8, 9), generator=generator)
    return [x.requires_grad_() for x in features], labels, predictions


def loss_and_gradients(features, labels, predictions, **options):
    options = {"num_classes": 4, "layer_weights": (1.0, 0.5), **options}
    with ck.backend("reference"):
        loss = ck.contextrast_loss(features, labels, predictions, **options)
    return loss.detach(), torch.autograd.grad(loss, features)


@pytest.mark.parametrize(
    "options", [{}, {"base_rate": 1.0, "negatives": "none"}, {"base_rate": 0.3, "normalize": False, "temperature": 5.0}]
)
def test_reading_values_changes_no_result(monkeypatch, options):
    features, labels, predictions = inputs()
    read = loss_and_gradients(features, labels, predictions, **options)
    monkeypatch.setattr(embedding, "may_read_values", lambda x: False)
    unread = loss_and_gradients(features, labels, predictions, **options)
    torch.testing.assert_close(read, unread, rtol=1e-11, atol=1e-13)
    assert read[0] > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e200])
def test_ignored_pixels_of_any_value_change_no_bit(value):
    features, labels, predictions = inputs()
    expected = loss_and_gradients(features, labels, predictions)
    for x in features:
        rows, columns = (torch.arange(m) * n // m for m, n in zip(x.shape[2:], labels.shape[1:]))
        ignored = labels[:, rows[:, None], columns] == 255
        assert ignored.any()
        x.data[ignored.unsqueeze(1).expand_as(x)] = value
    loss, gradients = loss_and_gradients(features, labels, predictions)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected[1], strict=True))


def test_the_squared_norm_has_derivatives_of_both_modes_and_orders():
    x = torch.randn(2, 35, 3, dtype=torch.float64, requires_grad=True)
    norm = embedding._SquaredNorm.apply
    torch.testing.assert_close(norm(x), (x * x).sum(1, keepdim=True))
    assert torch.autograd.gradcheck(norm, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, x)
