"""Scores with an ignored class, and scores of logits whose size differs from that of the labels."""

import literal
import numpy as np
import pytest
import torch
from inputs import scene
from torch.nn.functional import interpolate
from torch.utils._python_dispatch import TorchDispatchMode

import contextrast_kernels as ck
from contextrast_kernels.maps import resized_classes

N = 4
ON_MAPS = {
    "ConfusionMatrix": lambda **o: ck.metrics.ConfusionMatrix(N, **o),
    "TrimapIoU": lambda **o: ck.metrics.TrimapIoU(N, (0, 2), **o),
    "BoundaryIoU": lambda **o: ck.metrics.BoundaryIoU(N, (1, 3), **o),
    "BoundaryF1": lambda **o: ck.metrics.BoundaryF1(N, 1.5, **o),
    "InstanceIoU": lambda **o: ck.metrics.InstanceIoU(N, [9.0, 20.0, 5.0, 7.0], categories=[0, 1, 1, 2], **o),
}


@pytest.fixture
def classification():
    return pytest.importorskip("torchmetrics.classification", reason="torchmetrics is not installed")


def scores(name, predictions, labels, **options):
    metric = ON_MAPS[name](**options)
    instances = [torch.ones_like(labels)] if name == "InstanceIoU" else []
    metric.update(predictions, labels, *instances)
    return metric.compute()


def maps(seed=0):
    return scene(np.random.default_rng(seed), B=2, N=N, H=15, W=18, ignored=0)


# ------------------------------------------------------------------------------- ignore_index is one of the classes


@pytest.mark.parametrize("ignored", range(N))
def test_miou_without_a_class_equals_torchmetrics(classification, ignored):
    labels, predictions = maps()
    assert (predictions[labels != ignored] == ignored).any()
    results = scores("ConfusionMatrix", predictions, labels, ignore_index=ignored)
    for average, name in (("macro", "miou"), ("none", "iou_per_class")):
        peer = classification.MulticlassJaccardIndex(N, ignore_index=ignored, average=average)(predictions, labels)
        torch.testing.assert_close(results[name].nan_to_num(0.0).float(), peer)
    peer = classification.MulticlassAccuracy(N, ignore_index=ignored, average="micro")(predictions, labels)
    torch.testing.assert_close(results["pixel_accuracy"].float(), peer)
    recalls = classification.MulticlassRecall(N, ignore_index=ignored, average="none")(predictions, labels)
    others = [recalls[n] for n in range(N) if n != ignored]
    torch.testing.assert_close(results["mean_accuracy"].float(), torch.stack(others).mean())


@pytest.mark.parametrize("ignored", [0, 2])
@pytest.mark.parametrize("name", ON_MAPS)
def test_an_ignored_class_has_no_score(name, ignored):
    """Its score is NaN. The others are as if it were renamed to 255 in the labels and to N in the predictions."""
    labels, predictions = maps(1)
    results = scores(name, predictions, labels, ignore_index=ignored)
    renamed = labels.where(labels != ignored, 255), predictions.where(predictions != ignored, N)
    expected = scores(name, renamed[1], renamed[0])
    assert results.keys() == expected.keys()
    for key, value in results.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True)
        if key.endswith("_per_class"):
            assert value[ignored].isnan() and value.isnan().sum() == 1
            torch.testing.assert_close(
                results[key.removesuffix("_per_class").replace("_iou_", "_miou_")]
                if key != "iou_per_class"
                else results["miou"],
                value.nanmean(),
            )


@pytest.mark.parametrize("ignored", [0, 3])
def test_predicting_an_ignored_class_is_not_an_error(map_backend, ignored):
    labels, predictions = maps(2)
    errors = ck.error_map(predictions, labels, num_classes=N, ignore_index=ignored)
    assert errors.tolist() == literal.error_map(predictions.numpy(), labels.numpy(), N, ignored).tolist()
    assert (errors != ignored).all()
    for at in ("layer", "full"):
        options = {"size": (7, 9), "distance_at": at, "ignore_index": ignored}
        chosen = ck.bane_negatives(predictions, labels, num_classes=N, **options)
        expected = literal.bane_negatives(predictions.numpy(), labels.numpy(), N, **options)
        assert chosen.tolist() == expected.tolist()
        logits = torch.nn.functional.one_hot(predictions, N).movedim(-1, 1).float()
        assert torch.equal(ck.bane_negatives(logits, labels, **options), chosen)


def test_the_loss_counts_no_error_of_an_ignored_class():
    labels, predictions = maps(3)
    features = [torch.randn(2, 5, h, w, generator=torch.Generator().manual_seed(0)) for h, w in ((8, 9), (4, 5))]
    module = ck.ContextrastLoss(N, ignore_index=1, layer_weights=(1.0, 0.5))
    module(features, labels, predictions)
    for i, x in enumerate(features):
        p, y = (literal.resize(t.numpy(), x.shape[-2:]) for t in (predictions, labels))
        assert module.last["errors"][i] == (literal.error_map(p, y, N, 1) >= 0).sum()
        assert module.last["errors"][i] < (literal.error_map(p, y, N, 255) >= 0).sum()


# -------------------------------------------------------------------------------------- logits smaller than the labels


@pytest.mark.parametrize("channels", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("size", [(13, 17), (3, 4), (6, 40)])
def test_logits_are_resized_bilinearly(channels, size):
    """They equal literal loops for every number of classes, if the size grows and if it shrinks."""
    logits = np.random.default_rng(channels).standard_normal((2, channels, 6, 9))
    expected = literal.predicted_classes(literal.resize_bilinear(logits, size))
    for dtype in (torch.float64, torch.float32):
        got = resized_classes(torch.from_numpy(logits).to(dtype), tuple(size), 255)
        assert got.tolist() == expected.tolist()


def test_resized_ties_go_to_the_lowest_class_and_nan_is_the_largest():
    logits = torch.zeros(1, 9, 2, 2)
    assert (resized_classes(logits, (5, 5), 255) == 0).all()
    logits[:, 6] = float("nan")
    logits[:, 8] = float("nan")
    logits[:, 7] = 1
    assert (resized_classes(logits, (5, 5), 255) == 6).all()


def test_miou_of_small_logits_is_that_of_logits_resized_first(classification):
    """With a disc and stripes at a quarter of the size, nearest sampling loses 9 points of mIoU."""
    y, x = np.mgrid[:256, :256]
    labels = ((y - 128) ** 2 + (x - 128) ** 2 < 90**2).astype(int) + ((y + 2 * x) % 97 < 30)
    labels = torch.from_numpy(labels)[None]
    one_hot = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    small = torch.nn.functional.avg_pool2d(one_hot, 4)
    resized = interpolate(small, (256, 256), mode="bilinear", align_corners=False)
    peer = classification.MulticlassJaccardIndex(3)(resized.argmax(1), labels)
    metric = ck.metrics.ConfusionMatrix(3)
    metric.update(small, labels)
    torch.testing.assert_close(metric.compute()["miou"].float(), peer)
    nearest = classification.MulticlassJaccardIndex(3)(
        torch.from_numpy(literal.resize(small.argmax(1).numpy(), (256, 256))), labels
    )
    assert metric.compute()["miou"] > nearest + 0.05


class Largest(TorchDispatchMode):
    """The largest number of elements that an op returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_of_all_classes_are_never_stored_at_the_size_of_the_labels():
    labels = torch.zeros(2, 64, 96, dtype=torch.int64)
    metric = ck.metrics.ConfusionMatrix(50)
    with Largest() as largest:
        metric.update(torch.randn(2, 50, 16, 24), labels)
    assert largest.elements <= 4 * labels.numel()


# ------------------------------------------------------------------------------------- bands that follow the diagonal


@pytest.mark.parametrize(("share", "size", "pixels"), [(0.02, (30, 40), 1), (0.05, (30, 40), 2), (0.002, (30, 40), 1)])
def test_widths_of_boundary_iou_can_be_shares_of_the_diagonal(share, size, pixels):
    """The width is round(share * diagonal), at least 1, as in the authors' code. The diagonal is 50 px here."""
    labels, predictions = scene(np.random.default_rng(4), B=2, N=N, H=size[0], W=size[1])
    relative, fixed = ck.metrics.BoundaryIoU(N, (share, 3)), ck.metrics.BoundaryIoU(N, (pixels, 3))
    for metric in (relative, fixed):
        metric.update(predictions, labels)
    got, expected = relative.compute(), fixed.compute()
    torch.testing.assert_close(got[f"boundary_miou_{share}diagonal"], expected[f"boundary_miou_{pixels}px"])
    torch.testing.assert_close(
        got[f"boundary_iou_{share}diagonal_per_class"], expected[f"boundary_iou_{pixels}px_per_class"], equal_nan=True
    )
    assert got["boundary_miou_3px"] == expected["boundary_miou_3px"]


@pytest.mark.parametrize("width", [0.0, -0.02, 1.5, float("nan"), "2%", True])
def test_a_width_that_is_neither_pixels_nor_a_share_is_refused(width):
    with pytest.raises((TypeError, ValueError), match="widths: expected"):
        ck.metrics.BoundaryIoU(N, (width,))
