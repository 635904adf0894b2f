"""The criterion's cross-entropy with soft labels, and with logits that are NaN where nothing is valid."""

import pytest
import torch
from torch.nn import functional as F

import contextrast_kernels as ck

N, SIZES = 4, ((8, 10), (4, 5), (2, 3), (1, 2))


def batch(classes=N):
    """Features, labels with void, logits and soft labels: a mixture of the labels and of others."""
    generator = torch.Generator().manual_seed(classes)
    features = [torch.randn(2, 5, *size, generator=generator) for size in SIZES]
    labels = torch.randint(0, classes, (2, 16, 20), generator=generator)
    one_hot = F.one_hot(labels, classes).movedim(-1, 1).float()
    soft = 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)
    labels[:, 3:6] = 255
    return features, labels, torch.randn(2, classes, 16, 20, generator=generator), soft


def literal_cross_entropy(logits, labels, soft, class_weights=None, smoothing=0.0):
    """Pixel by pixel: the mean of -sum_n w_n p_n log q_n over the pixels with a valid label."""
    total, count, classes = 0.0, 0, logits.shape[1]
    w = [1.0] * classes if class_weights is None else class_weights
    for b, row, column in (labels != 255).nonzero().tolist():
        log_q = logits[b, :, row, column].double().log_softmax(0)
        for n in range(classes):
            p = (1 - smoothing) * soft[b, n, row, column].item() + smoothing / classes
            total -= w[n] * p * log_q[n].item()
        count += 1
    return total / count


@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 0.0, 1.5]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_against_a_literal_loop(class_weights, smoothing):
    features, labels, logits, soft = batch()
    criterion = ck.ContextrastCriterion(N, class_weights=class_weights, label_smoothing=smoothing)
    loss = criterion(features, labels, logits, soft_labels=soft)
    expected = literal_cross_entropy(logits, labels, soft, class_weights, smoothing)
    assert criterion.last["cross_entropy"].item() == pytest.approx(expected, rel=1e-5)
    contrast = ck.contextrast_loss(features, labels, logits, num_classes=N)
    torch.testing.assert_close(loss, criterion.last["cross_entropy"] + 0.1 * contrast)


def test_soft_labels_without_void_equal_torch():
    features, labels, logits, soft = batch()
    labels[labels == 255] = 0
    for options in ({}, {"label_smoothing": 0.1}):
        criterion = ck.ContextrastCriterion(N, **options)
        criterion(features, labels, logits, soft_labels=soft)
        torch.testing.assert_close(criterion.last["cross_entropy"], F.cross_entropy(logits, soft, **options))
    one_hot = F.one_hot(labels, N).movedim(-1, 1).float()
    criterion.eval()  # one seed
    hard, as_soft = (criterion(features, labels, logits, soft_labels=s) for s in (None, one_hot))
    torch.testing.assert_close(hard, as_soft)


def test_soft_labels_of_a_binary_network():
    """The probability of class 1 alone will do: the loss is BCE with soft targets."""
    features, labels, logits, soft = batch(2)
    z = logits[:, 1:]
    criterion = ck.ContextrastCriterion(2).eval()
    loss = criterion(features, labels, z, soft_labels=soft[:, 1:])
    valid = labels != 255
    expected = F.binary_cross_entropy_with_logits(z[:, 0][valid], soft[:, 1][valid])
    torch.testing.assert_close(criterion.last["cross_entropy"], expected)
    torch.testing.assert_close(criterion(features, labels, z, soft_labels=soft), loss)


def test_nothing_valid_gives_zero_with_a_live_graph():
    features, labels, logits, soft = batch()
    logits.requires_grad_()
    loss = ck.ContextrastCriterion(N)(features, torch.full_like(labels, 255), logits, soft_labels=soft)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


@pytest.mark.parametrize("with_soft", [False, True])
@pytest.mark.parametrize("small", [False, True])
def test_nan_at_ignored_pixels_reaches_no_gradient(with_soft, small):
    """Neither NaN logits nor NaN soft labels, and the gradient elsewhere is that of finite ones."""
    features, labels, logits, soft = batch()
    if small:  # resized bilinearly: far enough inside the void that no valid pixel reads it
        labels[:, 2:10], logits = 255, logits[:, :, ::2, ::2].clone()
    void = (labels == 255)[:, None]
    if small:
        bad = torch.zeros(2, 1, 8, 10, dtype=torch.bool)
        bad[:, :, 2:4] = True
    else:
        bad = void
    results = []
    for value in (0.0, float("nan")):
        z = torch.where(bad, value, logits).requires_grad_()
        s = torch.where(void, value, soft)
        loss = ck.ContextrastCriterion(N)(features, labels, z, soft_labels=s if with_soft else None)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    assert results[1][1].isfinite().all() and results[1][1].any()
    for got, expected in zip(*results):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda s: s.long(), TypeError, "int64"),
        (lambda s: s.tolist(), TypeError, "list"),
        (lambda s: s[:, :3], ValueError, r"\(2, 3, 16, 20\)"),
        (lambda s: s[:, :, ::2], ValueError, r"\(2, 4, 8, 20\)"),
        (lambda s: s.to("meta"), ValueError, "meta"),
    ],
)
def test_unusable_soft_labels_raise_a_clear_error(change, error, words):
    features, labels, logits, soft = batch()
    with pytest.raises(error, match=rf"soft_labels: expected.*{words}"):
        ck.ContextrastCriterion(N)(features, labels, logits, soft_labels=change(soft))
