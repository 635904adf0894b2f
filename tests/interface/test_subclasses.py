"""Every public function takes tensor subclasses, such as MONAI's MetaTensor, as the tensors they hold."""

import inspect

import pytest
import torch

import contextrast_kernels as ck


class Tagged(torch.Tensor):
    """A subclass as data libraries have it: its results are subclasses too, and keep its attributes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("new_empty", "new_zeros", "new_full"):
            raise TypeError(f"{function.__name__} is another function here, as in MetaTensor")
        return super().__torch_function__(function, types, args, kwargs)


def generator():
    return torch.Generator().manual_seed(0)


SIZES = ((8, 10), (4, 5), (2, 3), (1, 2))
FEATURES = [torch.randn(2, 5, *size, generator=generator()) for size in SIZES]
LABELS = torch.randint(0, 4, (2, 16, 20), generator=generator())
PREDICTED = torch.randint(0, 4, (2, 16, 20), generator=generator()).roll(3, 2)
LOGITS = torch.randn(2, 4, 16, 20, generator=generator())
ROWS, ROW_LABELS = torch.randn(30, 5, generator=generator()), torch.randint(0, 4, (30,), generator=generator())
COUNTS, SEED, IMAGE = torch.tensor([1, 0, 3, 2]), torch.tensor(7), torch.rand(3, 16, 20, generator=generator())


def metric(name, *options, **keywords):
    def use(*batch):
        scores = getattr(ck.metrics, name)(*options, **keywords)
        scores.update(*batch)
        return scores.compute()

    return use


def bank_counts(embeddings, labels):
    bank = ck.MemoryBank(4, 5)
    bank.push("pixels", embeddings, labels)
    return [bank.counts, bank.storage]


def pictures(function, **options):
    def draw(*tensors):
        figure = getattr(ck.viz, function)(*tensors, **options)
        return [torch.as_tensor(image.get_array().data) for axis in figure.axes for image in axis.get_images()]

    return draw


# Each public function, and tensors to call it with.
CALLS = {
    "class_anchors": (lambda x, y: ck.class_anchors(x, y, 4), FEATURES[0], LABELS),
    "fuse_anchors": (lambda a, n: ck.fuse_anchors(a, n, a.flip(0), n), ROWS[:4], COUNTS),
    "pixel_anchor_loss": (
        lambda x, y, a, e, base: ck.pixel_anchor_loss(x, y, a, negatives=e, base=base),
        *(FEATURES[0], LABELS, ROWS[:4], PREDICTED[:, :8, :10], PREDICTED[:, :8, :10] > 1),
    ),
    "error_map": (ck.error_map, LOGITS, LABELS),
    "edge_distance": (ck.edge_distance, PREDICTED),
    "distance_transform": (ck.distance_transform, PREDICTED),
    "select_nearest": (
        lambda e, d, seed: ck.select_nearest(e, d, 0.5, num_classes=4, seed=seed),
        PREDICTED,
        LABELS.double(),
        SEED,
    ),
    "bane_negatives": (lambda p, y, seed: ck.bane_negatives(p, y, size=(8, 10), seed=seed), LOGITS, LABELS, SEED),
    "contextrast_loss": (
        lambda x, y, p, seed: ck.contextrast_loss(x, y, p, num_classes=4, seed=seed),
        *(FEATURES, LABELS, LOGITS, SEED),
    ),
    "info_nce": (
        lambda x, y, w: ck.info_nce(x, y, x.flip(0), y.flip(0), column_weights=w),
        *(ROWS, ROW_LABELS, ROWS[:, 0].abs()),
    ),
    "ContextrastLoss": (lambda *batch: ck.ContextrastLoss(4, debug=True)(*batch), FEATURES, LABELS, LOGITS),
    "ContextrastCriterion": (
        lambda x, y, z, w: ck.ContextrastCriterion(4, class_weights=w)(x, y, z),
        *(FEATURES, LABELS, LOGITS, ROWS[0, :4].abs()),
    ),
    "PixelContrastLoss": (
        lambda *batch: ck.PixelContrastLoss(4, max_samples=60, max_views=9, min_pixels=1)(*batch),
        *(FEATURES, LABELS, LOGITS),
    ),
    "MultiScaleContrastLoss": (
        lambda *batch: ck.MultiScaleContrastLoss(4, max_samples=60)(*batch),
        *(FEATURES, LABELS, LOGITS),
    ),
    "RegionContrastLoss": (
        lambda *batch: [(loss := ck.RegionContrastLoss(4, ck.MemoryBank(4, 5)))(*batch), loss(*batch)],
        *(FEATURES, LABELS, LOGITS),
    ),
    "PNELoss": (lambda *batch: ck.PNELoss(4, set_size=8)(*batch), FEATURES, LABELS, LOGITS),
    "MemoryBank": (bank_counts, ROWS, ROW_LABELS),
    "Sampler": (lambda y, p, seed: ck.Sampler("bane", 40, 10, 1)(y, p, 4, seed), LABELS, PREDICTED, SEED),
    "metrics.ConfusionMatrix": (
        lambda p, y, mask: (
            (scores := ck.metrics.ConfusionMatrix(4)).update(p, y, mask=mask),
            *scores.compute().values(),
        )[1:],
        *(LOGITS, LABELS, PREDICTED > 0),
    ),
    "metrics.TrimapIoU": (metric("TrimapIoU", 4, (1, 2)), PREDICTED, LABELS),
    "metrics.BoundaryIoU": (metric("BoundaryIoU", 4, (1, 2)), PREDICTED, LABELS),
    "metrics.BoundaryF1": (metric("BoundaryF1", 4, 1), PREDICTED, LABELS),
    "metrics.InstanceIoU": (metric("InstanceIoU", 4, [9.0] * 4), PREDICTED, LABELS, PREDICTED),
    "metrics.AlignmentUniformity": (metric("AlignmentUniformity", 4, samples=8), FEATURES[0], LABELS),
    "metrics.AnchorSimilarity": (metric("AnchorSimilarity", 4, 3), FEATURES, LABELS, LOGITS),
    "metrics.boundary_mask": (lambda y: ck.metrics.boundary_mask(y, 1), LABELS),
    "viz.negatives": (pictures("negatives", num_classes=4, sizes=[(8, 10)]), IMAGE, LABELS[0], LOGITS[0]),
    "viz.embedding_colours": (ck.viz.embedding_colours, FEATURES[0]),
    "viz.embeddings": (pictures("embeddings"), IMAGE, [x[0] for x in FEATURES]),
    "viz.anchor_similarity": (pictures("anchor_similarity", num_classes=4), FEATURES, LABELS),
}
WITHOUT_TENSORS = {
    *("attach", "available", "backend", "split_heads"),
    "ProjectionHead",  # an nn.Sequential
    *("metrics.CITYSCAPES_CATEGORIES", "metrics.CITYSCAPES_INSTANCE_SIZES"),
    *("viz.class_colours", "viz.similarity_curve"),
}


def test_every_public_name_is_tried():
    names = [name for name in ck.__all__ if name not in ("metrics", "viz")]
    names += [f"metrics.{name}" for name in ck.metrics.__all__]
    for name, function in vars(ck.viz).items():
        if inspect.isfunction(function) and function.__module__ == ck.viz.__name__ and name[0] != "_":
            names.append(f"viz.{name}")
    assert sorted({*CALLS, *WITHOUT_TENSORS}) == sorted(names)


def changed(value, change):
    return [changed(x, change) for x in value] if isinstance(value, list) else change(value)


def tensors_of(result):
    if isinstance(result, dict):
        result = list(result.values())
    return [t for x in result for t in tensors_of(x)] if isinstance(result, list | tuple) else [result]


@pytest.mark.parametrize("name", CALLS)
def test_a_subclass_is_taken_as_the_tensor_it_holds(name):
    if name.startswith("viz.") and name != "viz.embedding_colours":
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    function, *arguments = CALLS[name]
    expected = tensors_of(function(*arguments))
    got = tensors_of(function(*(changed(x, lambda t: t.as_subclass(Tagged)) for x in arguments)))
    assert expected
    for a, b in zip(got, expected, strict=True):
        assert type(a) is torch.Tensor
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["contextrast_loss", "ContextrastCriterion", "error_map"])
def test_monai_and_torchvision_tensors_are_taken_as_plain_ones(name):
    monai = pytest.importorskip("monai.data", reason="monai is not installed")
    tv_tensors = pytest.importorskip("torchvision.tv_tensors", reason="torchvision is not installed")
    function, *arguments = CALLS[name]
    expected = function(*arguments)
    for subclass in (monai.MetaTensor, tv_tensors.Mask):
        assert torch.equal(function(*(changed(x, subclass) for x in arguments)), expected)


def test_the_gradient_reaches_a_subclass():
    x = torch.randn(2, 5, 8, 10, generator=generator()).as_subclass(Tagged).requires_grad_()
    ck.contextrast_loss([x], LABELS, LOGITS, num_classes=4, layer_weights=(1.0,)).backward()
    plain = x.detach().as_subclass(torch.Tensor).requires_grad_()
    ck.contextrast_loss([plain], LABELS, LOGITS, num_classes=4, layer_weights=(1.0,)).backward()
    assert torch.equal(x.grad.as_subclass(torch.Tensor), plain.grad)


def test_subclasses_with_their_own_dispatch_are_not_unwrapped():
    """A FakeTensor must not be unwrapped: it holds nothing."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        labels, logits = mode.from_tensor(LABELS), mode.from_tensor(LOGITS)
        assert ck.bane_negatives(logits, labels, size=(8, 10)).shape == (2, 8, 10)
