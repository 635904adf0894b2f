"""The named inputs have the properties of their names and are deterministic."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import contextrast_kernels as ck
from contextrast_kernels import cases, maps
from contextrast_kernels.demo import scenes

CAMVID = cases.CASES["camvid"]
SMALL = replace(CAMVID, batch=2)


def share_of_errors(labels, predictions):
    valid = labels != scenes.VOID
    return float(((predictions != labels) & valid).sum() / valid.sum())


def test_cases_have_the_sizes_of_the_paper():
    settings = {name: (c.batch, c.height, c.width, c.num_classes) for name, c in cases.CASES.items()}
    assert settings == {
        "cityscapes": (8, 512, 1024, 19),
        "camvid": (16, 360, 480, 11),
        "ade20k": (12, 512, 512, 150),
        "coco-stuff": (16, 512, 512, 171),
        "pascal-context": (16, 512, 512, 59),
    }
    assert CAMVID.sizes == [(90, 120), (45, 60), (23, 30), (12, 15)]
    assert cases.CASES["cityscapes"].feature_bytes == 348160 * 256 * 2


@pytest.mark.parametrize("regime", [*cases.REGIMES, "5 % errors", "60 % errors"])
def test_the_error_share_of_a_regime_is_reached(regime):
    case = replace(SMALL, regime=regime)
    labels, predictions = case.label_maps(seed=3)
    N, wrong = case.num_classes, share_of_errors(labels, predictions)
    assert labels.shape == predictions.shape == (2, 360, 480)
    assert predictions.min() >= 0 and predictions.max() < N
    assert ((labels < N) | (labels == scenes.VOID)).all()
    share = cases.error_share(regime)
    if share is not None:
        assert abs(wrong - share) < 0.01
    elif regime == "noise":
        assert abs(wrong - (1 - 1 / N)) < 0.01
    elif regime == "collapsed":
        assert len(predictions.unique()) == 1 and 0 < wrong < 1
    else:
        assert wrong == 1 and len(predictions.unique()) == 1 and (labels < N).all()
        errors = ck.error_map(predictions, labels, num_classes=N)
        assert ck.edge_distance(errors).isinf().all()


@pytest.mark.parametrize("name", cases.CASES)
def test_the_tiny_case_is_small(name):
    case = cases.CASES[name].tiny()
    inputs = case.inputs(seed=1)
    assert 0.08 <= share_of_errors(inputs.labels, inputs.predictions) <= 0.13
    assert [tuple(x.shape) for x in inputs.features] == [(2, 16, *size) for size in case.sizes]
    assert sum(x.numel() for x in inputs.features) < 20_000
    assert inputs.logits.shape == (2, case.num_classes, *case.sizes[0])


def test_errors_are_distributed_as_those_of_a_trained_network():
    """With trained networks 9-19 % of the error pixels are at distance 0 at the labels' size, 25-50 % at stride 4 and
    79-98 % at stride 32. The generated errors are finer, so the bounds are up to 16 points wider."""
    labels, predictions = replace(SMALL, regime="mid").label_maps()
    for stride, low, high in ((1, 0.09, 0.35), (4, 0.25, 0.65), (32, 0.79, 1.0)):
        h, w = -(-360 // stride), -(-480 // stride)
        errors = ck.error_map(maps.to_size(predictions, h, w), maps.to_size(labels, h, w), num_classes=11)
        distance = ck.edge_distance(errors, squared=True)
        assert low <= float((distance == 0).sum() / (errors >= 0).sum()) <= high


def test_changing_returned_maps_does_not_change_the_cache():
    """Maps are kept for the variants of a case."""
    case = cases.CASES["camvid"].tiny()
    labels, predictions = case.label_maps()
    before = labels.clone(), predictions.clone()
    labels.zero_(), predictions.zero_()
    assert all(torch.equal(a, b) for a, b in zip(case.label_maps(), before, strict=True))


def test_inputs_follow_from_case_and_seed_alone():
    case = cases.CASES["pascal-context"].tiny()
    first, again, other = (case.inputs(seed=seed) for seed in (4, 4, 5))
    torch.manual_seed(0)
    for a, b, c in zip((*first.features, *first[1:]), (*again.features, *again[1:]), (*other.features, *other[1:])):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_inputs_have_the_dtype_layout_and_layers_of_the_case(dtype, layout):
    case = replace(cases.CASES["ade20k"].tiny(), dtype=dtype, layout=layout, strides=cases.DEEPLAB)
    inputs = case.inputs()
    assert [tuple(x.shape[2:]) for x in inputs.features] == [(8, 8), (4, 4), (4, 4), (4, 4)]
    for x in (*inputs.features, inputs.logits):
        assert x.dtype == dtype
        assert x.is_contiguous(memory_format=cases.LAYOUTS[layout])
    assert torch.equal(inputs.logits.argmax(1), maps.to_size(inputs.predictions, 8, 8))


def test_features_are_near_their_class():
    """The loss falls below that of features without classes."""
    case = cases.CASES["camvid"].tiny()
    inputs, options = case.inputs(), case.loss_options
    loss = ck.contextrast_loss(inputs.features, inputs.labels, inputs.logits, **options)
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(x.shape, generator=generator) for x in inputs.features]
    assert 0 < loss < 0.7 * ck.contextrast_loss(noise, inputs.labels, inputs.logits, **options)


@pytest.mark.parametrize("name", ["camvid", "ade20k"])
def test_classes_of_real_frames_are_mapped_one_to_one(tmp_path, name):
    """Each class of the files becomes one class of the case; void stays void."""
    stripes = torch.arange(12, dtype=torch.uint8).repeat_interleave(40).expand(360, 480)
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        (tmp_path / f"{split}annot").mkdir()
        Image.new("RGB", (480, 360)).save(tmp_path / split / "a.png")
        Image.fromarray(stripes.numpy()).save(tmp_path / f"{split}annot" / "a.png")
    case = replace(cases.CASES[name], batch=2)
    labels, predictions = case.label_maps(frames=tmp_path)
    expected = maps.to_size(stripes, case.height, case.width)
    assert torch.equal(labels == scenes.VOID, (expected == 11).expand_as(labels))
    for image in labels:
        assert len({(int(a), int(b)) for a, b in zip(expected[0], image[0])}) == 12
    assert abs(share_of_errors(labels, predictions) - 0.10) < 0.01


@pytest.mark.parametrize(
    "change", [{"num_classes": 1}, {"layout": "nhwc"}, {"regime": "tired"}, {"regime": "x % errors"}]
)
def test_an_invalid_case_is_refused(change):
    with pytest.raises(ValueError, match="expected"):
        replace(CAMVID, **change)
