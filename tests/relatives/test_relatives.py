"""The published relatives against literal loops; the batches on which the official code crashes; half precision;
synchronisation; torch.compile; the kernels."""

import literal
import literal_relatives
import numpy as np
import pytest
import torch
from inputs import crossed, leaves, logits_of, pyramid, scene
from observers import Compilations, Crossings, Dispatched
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

import contextrast_kernels as ck
from contextrast_kernels.relatives.pixel_contrast import semi_hard_nce

pytestmark = pytest.mark.usefixtures("reference", "one_thread")

N, D = 4, 5
CLOSE = {"rel": 1e-11, "abs": 1e-13}
SIZES = ((9, 12), (5, 6), (3, 4), (2, 3))


def batch(seed=0, B=2, dtype=torch.float64, sizes=SIZES, **options):
    rng = np.random.default_rng(seed)
    labels, predictions = scene(rng, B=B, N=N, H=18, W=24, **options)
    return pyramid(rng, B=B, D=D, sizes=sizes, dtype=dtype), labels, logits_of(predictions, N, rng)


def bank(**options):
    return ck.MemoryBank(N, D, **{"pixels": 60, "regions": 20, **options})


def filled_bank(seed=9, **options):
    made, rng = bank(**options), np.random.default_rng(seed)
    for queue in ("pixels", "regions"):
        rows = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((40, D))), dim=1)
        made.push(queue, rows, torch.from_numpy(rng.integers(0, N, 40)))
    return made


def memory_of(options):
    """The bank among the options, or a filled one."""
    return options.pop("bank", None) or filled_bank()


# Every loss, with caps that suit maps of 9 x 12 pixels.
LOSSES = {
    "pixel": lambda **o: ck.PixelContrastLoss(N, **{"max_views": 6, "max_samples": 60, **o}),
    "pixel, bane": lambda **o: ck.PixelContrastLoss(N, max_views=6, sampler="bane", **o),
    "pixel, uniform": lambda **o: ck.PixelContrastLoss(N, max_samples=50, sampler="uniform", **o),
    "pixel, mining": lambda **o: ck.PixelContrastLoss(
        N, max_views=6, mining="semi-hard", hardest=0.5, mined_positives=2, mined_negatives=6, **o
    ),
    "pixel, bank": lambda **o: ck.PixelContrastLoss(N, max_views=6, bank=memory_of(o), **o),
    "pixel, bank, mining": lambda **o: ck.PixelContrastLoss(
        N, max_views=6, bank=memory_of(o), mining="semi-hard", mined_negatives=3, **o
    ),
    "multi-scale": lambda **o: ck.MultiScaleContrastLoss(
        N, **{"max_samples": 80, "max_views": 9, "min_pixels": 2, **o}
    ),
    "region": lambda **o: ck.RegionContrastLoss(N, memory_of(o), **o),
    "region, predictions": lambda **o: ck.RegionContrastLoss(N, memory_of(o), regions="predictions", **o),
    "pne": lambda **o: ck.PNELoss(N, **{"set_size": 7, **o}),
    "pne, parity": lambda **o: ck.PNELoss(N, **{"set_size": 7, "parity": True, **o}),
}
SAMPLED = [name for name in LOSSES if "region" not in name and "parity" not in name]


def at_layer(labels, logits, size):
    """Targets and predicted classes of a layer as NumPy arrays for the loops."""
    y = literal.resize(labels.numpy(), size)
    p = literal.predicted_classes(literal.resize(logits.numpy(), size))
    return np.where(y == 255, -1, y), p


# ------------------------------------------------------------------------------------------------- against the loops


@pytest.mark.parametrize("kind", ["hard-easy", "bane", "common-count", "uniform"])
@pytest.mark.parametrize("parity", [False, True])
def test_pixel_contrast_equals_the_loops(kind, parity):
    (x, *_), labels, logits = batch()
    loss = ck.PixelContrastLoss(N, sampler=kind, max_samples=40, max_views=5, temperature=0.2, parity=parity, seed=3)
    y, p = at_layer(labels, logits, SIZES[0])
    least = 5 if kind == "common-count" else 6
    chosen = literal_relatives.sample(kind, y, p, N, 3, 1000, 40, 5, least)
    expected = literal.info_nce(*literal_relatives.rows_of(x.numpy(), y, chosen), temperature=0.2)
    factor = 0.2 / 0.07 if parity else 1.0
    assert loss(x, labels, logits).item() == pytest.approx(factor * expected, **CLOSE)
    assert loss.last["samples"] == len(chosen)
    assert loss.last["loss"].item() == pytest.approx(factor * expected, **CLOSE)


def test_pixel_contrast_with_a_bank_contrasts_with_the_bank_alone_and_then_writes():
    """Region centres of every image and class, and 3 pixels of each by hash of stream 2000."""
    (x, *_), labels, logits = batch()
    memory = bank()
    loss = ck.PixelContrastLoss(N, max_views=5, max_samples=40, bank=memory, bank_pixels=3)
    y, p = at_layer(labels, logits, SIZES[0])
    expected_bank = bank(pixels=60, regions=20)
    for step in range(3):
        entries, classes = expected_bank.columns()
        chosen = literal_relatives.sample("hard-easy", y, p, N, step, 1000, 40, 5, 6)
        rows, row_labels = literal_relatives.rows_of(x.numpy(), y, chosen)
        expected = literal.info_nce(rows, row_labels, entries.tolist(), classes.tolist())
        assert loss(x, labels, logits).item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
        assert (expected > 0) == (step > 0)
        centres, classes = literal_relatives.region_centres(x.numpy(), y, N, True)
        expected_bank.push("regions", torch.tensor(centres), torch.tensor(classes))
        for pixels in literal_relatives.pairs_of(y, N).values():
            some = literal_relatives.by_hash(pixels, y.shape[2], step, 2000)[:3]
            rows, row_labels = literal_relatives.rows_of(x.numpy(), y, some)
            expected_bank.push("pixels", torch.tensor(rows), torch.tensor(row_labels))
        assert torch.equal(memory.counts, expected_bank.counts)
        for n in range(N):
            got, want = (
                sorted(map(tuple, columns[labels == n].tolist()))
                for columns, labels in (memory.columns(), expected_bank.columns())
            )
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    ("hardest", "positives", "negatives"), [(0.3, 2, 3), (0.1, 1, 1), (1.0, 4, 5), (0.5, 100, 100)]
)
def test_semi_hard_mining_equals_the_loops(rng, own, hardest, positives, negatives):
    rows, columns = (torch.from_numpy(rng.standard_normal((n, D))) for n in (12, 30))
    row_labels, column_labels = (torch.from_numpy(rng.integers(-1, 3, n)) for n in (12, 30))
    rows = torch.where(row_labels[:, None] < 0, 0.0, rows)
    given = (None, None) if own else (columns, column_labels)
    options = (0.5, hardest, positives, negatives)
    for seed in (0, 77):
        loss = semi_hard_nce(rows, row_labels, *given, *options, torch.tensor(seed))
        expected = literal_relatives.semi_hard_nce(
            rows.numpy(),
            row_labels.tolist(),
            *((None, None) if own else (columns.numpy(), column_labels.tolist())),
            *options,
            seed,
        )
        assert loss.item() == pytest.approx(expected, **CLOSE)


def test_mining_propagates_a_nonfinite_row_that_is_in_no_term(rng):
    """A row without a positive adds 0, but not where it is NaN; what is ignored comes as zeros."""
    rows, columns = torch.from_numpy(rng.standard_normal((3, D))), torch.from_numpy(rng.standard_normal((8, D)))
    arguments = (torch.tensor([0, 5, -1]), columns, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), 0.5, 0.5, 2, 2, 0)
    rows[2] = 0
    assert semi_hard_nce(rows, *arguments) > 0
    rows[1, 0] = torch.nan
    assert semi_hard_nce(rows, *arguments).isnan()


def test_mining_holds_three_matrices_at_once(rng):
    plan = pytest.importorskip("contextrast_kernels.plan", reason="triton is not installed")
    R, C = 8, 20_000
    rows, columns = (torch.from_numpy(rng.standard_normal((n, D))).float() for n in (R, C))
    row_labels, column_labels = (torch.from_numpy(rng.integers(0, N, n)) for n in (R, C))
    with plan.Watch() as watch:
        semi_hard_nce(rows.requires_grad_(), row_labels, columns, column_labels, 0.1, 0.1, 10, 10, 0).backward()
    assert 3 <= watch.peak / (4 * R * C) < 3.2


def test_mining_all_columns_equals_no_mining(rng):
    rows, labels = torch.from_numpy(rng.standard_normal((15, D))), torch.from_numpy(rng.integers(0, 3, 15))
    mined = semi_hard_nce(rows, labels, None, None, 0.5, 1.0, 15, 15, 0)
    assert mined.item() == pytest.approx(ck.info_nce(rows, labels, temperature=0.5).item(), **CLOSE)


@pytest.mark.parametrize(("max_samples", "max_views", "min_pixels"), [(80, 9, 2), (1000, 1000, 3)])
def test_multi_scale_equals_the_loops(max_samples, max_views, min_pixels):
    layers, labels, logits = batch()
    caps = {"max_samples": max_samples, "max_views": max_views, "min_pixels": min_pixels}
    loss = ck.MultiScaleContrastLoss(N, temperature=0.3, cross_weights=(0.9, 0.6), seed=4, **caps)
    targets = [at_layer(labels, logits, size)[0] for size in SIZES]
    expected = literal_relatives.multi_scale(
        [x.numpy() for x in layers], targets, (1.0, 0.7, 0.4, 0.1), (0.9, 0.6), 0.3, 4, num_classes=N, **caps
    )
    assert loss(layers, labels, logits).item() == pytest.approx(expected, **CLOSE)
    assert loss.last["loss"].shape == (6,)


@pytest.mark.parametrize(("count", "terms"), [(1, 1), (2, 3), (3, 5), (4, 6)])
def test_multi_scale_with_fewer_layers_has_fewer_terms(count, terms):
    layers, labels, logits = batch()
    weights = (1.0, 0.7, 0.4, 0.1)[:count]
    loss = ck.MultiScaleContrastLoss(N, layer_weights=weights, max_samples=80, min_pixels=2)
    total = loss(layers[:count], labels, logits)
    parts = loss.last["loss"]
    assert parts.shape == (terms,)
    assert total.item() == pytest.approx(sum(w * p for w, p in zip((*weights, 1, 1), parts.tolist())), **CLOSE)


def test_detach_deepest_stops_the_gradient_of_the_columns_alone():
    layers, labels, logits = batch()
    gradients = []
    for options in ({"detach_deepest": True}, {"detach_deepest": True, "cross_weights": (0, 0)}, {}):
        tracked = leaves(layers)
        LOSSES["multi-scale"](**options)(tracked, labels, logits).backward()
        gradients.append([x.grad for x in tracked])
    detached, without, full = gradients
    assert not torch.equal(detached[0], without[0])  # rows
    torch.testing.assert_close(detached[3], without[3], rtol=1e-12, atol=1e-15)
    assert not torch.allclose(full[3], without[3])


@pytest.mark.parametrize("regions", ["labels", "predictions"])
@pytest.mark.parametrize("normalize", [False, True])
def test_region_contrast_equals_the_loops(regions, normalize):
    (x, *_), labels, logits = batch()
    memory = filled_bank(pixels=0)
    before = memory.counts.sum()
    entries, classes = (t.clone() for t in memory.columns())
    loss = ck.RegionContrastLoss(N, memory, regions=regions, normalize=normalize)
    y, p = at_layer(labels, logits, SIZES[0])
    region = y if regions == "labels" else np.where(y >= 0, p, -1)
    centres, centre_classes = literal_relatives.region_centres(x.numpy(), region, N, normalize)
    expected = literal.info_nce(centres, centre_classes, entries.tolist(), classes.tolist(), temperature=0.2)
    assert loss(x, labels, logits).item() == pytest.approx(expected, **CLOSE)
    assert loss.last["samples"] == len(centres)
    assert memory.counts.sum() >= before
    assert loss(x, labels, logits).item() != pytest.approx(expected, rel=1e-4)  # the bank has moved on


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize(("set_size", "max_hard"), [(7, 199), (40, 199), (3, 6)])
def test_pne_equals_the_loops(parity, set_size, max_hard):
    """Sets smaller and larger than S, pairs that the gate leaves out, a class without right pixels, and one that is
    predicted in an image without it."""
    (x, *_), labels, logits = batch(seed=2, wrong=0.4)
    labels[1, labels[1] == 3] = 0
    labels[0, logits[0].argmax(0) == 2] = 1
    loss = ck.PNELoss(N, set_size=set_size, max_hard=max_hard, temperature=0.8, parity=parity, seed=6)
    y, _ = at_layer(labels, logits, SIZES[0])
    small = literal.resize(logits.numpy(), SIZES[0]).astype(np.float64)
    expected = literal_relatives.pne(x.numpy(), y, small, 0.8, set_size, max_hard, None if parity else 6)
    # The confidences are a softmax in the logits' float32.
    assert loss(x, labels, logits).item() == pytest.approx(expected, rel=1e-6)
    assert loss.last["pairs"] > 0


def test_pne_draws_among_too_many_rows():
    """Beyond max_samples the loss is the mean over the drawn rows; if all fit, it is the mean over all."""
    (x, *_), labels, logits = batch(wrong=0.4)
    full = ck.PNELoss(N, set_size=7)
    expected = full(x, labels, logits).item()
    rows = int(full.last["samples"])
    assert ck.PNELoss(N, set_size=7, max_samples=rows)(x, labels, logits).item() == pytest.approx(expected, **CLOSE)
    fewer = [ck.PNELoss(N, set_size=7, max_samples=rows // 2, seed=s) for s in range(20)]
    values = [loss(x, labels, logits).item() for loss in fewer]
    assert all(loss.last["samples"] == rows // 2 for loss in fewer)
    assert np.mean(values) == pytest.approx(expected, rel=0.02)


def test_pne_draws_from_all_images_alike():
    """Not the first rows in raster order: in 20 draws of half of the hard pixels each is drawn at some time."""
    (x, *_), labels, logits = batch(wrong=0.4)

    def hard(**options):
        """Pixels that get a gradient."""
        [tracked] = leaves([x])
        ck.PNELoss(N, set_size=40, **options)(tracked, labels, logits).backward()
        return tracked.grad.any(1)

    every = hard()
    drawn = [hard(max_samples=int(every.sum()) // 2, seed=seed) for seed in range(20)]
    assert {int(pixels.sum()) for pixels in drawn} == {int(every.sum()) // 2}
    assert torch.equal(torch.stack(drawn).any(0), every)


# ------------------------------------------------------------------------------------------------------------ gradient


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "pne, parity"])
def test_gradient_equals_finite_differences(name):
    """PNE's parity mode is left out, because its official gradient is not that of its value. PNE passes no gradient to
    right pixels, so only the wrong ones move."""
    layers, labels, logits = batch(wrong=0.1)
    moves = 1.0
    if name == "pne":
        y, p = at_layer(labels, logits, SIZES[0])
        assert all((y[b] == p[b])[y[b] == n].any() for b in range(2) for n in np.unique(y[b][y[b] >= 0]))
        moves = torch.from_numpy(y != p)[:, None].double()
    shift = torch.randn(D, 1, 1, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name]().eval()

    def function(by):
        moved = [layers[0] + moves * by * layers[0].flip(1), *(x + by * x.flip(1) for x in layers[1:])]
        return loss(moved, labels, logits)

    assert function(shift) > 0
    assert gradcheck(function, (0.1 * shift,))


def test_parity_holds_the_norms_of_hard_pixels_constant():
    """Without parity PNE's gradient is orthogonal to the features, as a cosine's is; with it, it is not. Right pixels
    get none in either case."""
    (x, *_), labels, logits = batch(wrong=0.4)
    y, p = (torch.from_numpy(a) for a in at_layer(labels, logits, SIZES[0]))
    radial = []
    for parity in (False, True):
        [tracked] = leaves([x])
        ck.PNELoss(N, set_size=7, parity=parity)(tracked, labels, logits).backward()
        assert not tracked.grad.movedim(1, -1)[y == p].any()
        radial.append(((tracked.grad * x).sum(1).abs().max() / tracked.grad.norm()).item())
    assert radial[0] < 1e-12
    assert radial[1] > 1e-3


# ------------------------------------------------------------------------------------- what the official code fails on


def one_class(labels):
    return torch.zeros_like(labels)


CRASHES = {
    "no valid class": lambda f, y, z: (f, torch.full_like(y, 255), z),
    "labels beyond the classes": lambda f, y, z: (f, y + 50, z),
    "one class": lambda f, y, z: (f, one_class(y), z),
    "one class, all right": lambda f, y, z: (f, one_class(y), one_class(y)),
    "one class, all wrong": lambda f, y, z: (f, one_class(y), one_class(y) + 1),
    "all right": lambda f, y, z: (f, y, y),
    "all wrong": lambda f, y, z: (f, y, (y + 1) % N),
    "a class in one image alone": lambda f, y, z: (f, torch.arange(2)[:, None, None].expand_as(y).contiguous(), z),
    "an ignored image": lambda f, y, z: (f, torch.cat([y[:1], torch.full_like(y[1:], 255)]), z),
    "zero features": lambda f, y, z: ([0 * x for x in f], y, z),
    "features x 10, not normalised": lambda f, y, z: ([10 * x for x in f], y, z),
    "predictions that are no class": lambda f, y, z: (f, y, torch.full_like(y, 99)),
    "an empty batch": lambda f, y, z: ([x[:0] for x in f], y[:0], z[:0]),
    "one pixel": lambda f, y, z: ([x[..., :1, :1] for x in f], y, z),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("case", "dtype"), crossed(CRASHES, [torch.float32, torch.float16]))
def test_nothing_to_contrast_gives_a_finite_loss_with_a_live_graph(name, case, dtype):
    layers, labels, logits = batch(dtype=dtype)
    layers, labels, predictions = CRASHES[case](layers, labels, logits)
    options = {"normalize": False} if "not normalised" in case and "pne" not in name else {}
    tracked = leaves(layers)
    loss = LOSSES[name](**options)
    for _ in range(2):  # the second time with what the first has written into the bank
        value = loss(tracked, labels, predictions)
        assert value.dtype == torch.float32
        assert value.isfinite()
        gradients = torch.autograd.grad(value, tracked, allow_unused=True)
        assert gradients[0] is not None
        assert all(g.isfinite().all() for g in gradients if g is not None)
    nothing = ("no valid class", "labels beyond the classes", "an empty batch")
    if case in nothing:
        assert value == 0
        assert not any(g.any() for g in gradients if g is not None)


@pytest.mark.parametrize("name", ["pixel", "multi-scale"])
@pytest.mark.parametrize(("max_samples", "max_views"), [(1, 1), (3, 6), (10**6, 1), (10**6, 10**6)])
def test_more_pairs_than_samples_and_more_samples_than_pixels(name, max_samples, max_views):
    """ContrastiveSeg: an empty tensor and NaN. Here every pair keeps a pixel."""
    layers, labels, logits = batch()
    loss = LOSSES[name](max_samples=max_samples, max_views=max_views)
    assert loss(layers, labels, logits).isfinite()
    if max_views < 10**6:
        assert (loss.last["samples"] > 0).all()


def test_one_class_in_all_gives_zero():
    """One class of two: nothing to push away from, so the loss is 0."""
    layers, labels, _ = batch()
    labels = torch.where(labels == 255, 255, 0)
    memory = ck.MemoryBank(2, D, pixels=9, regions=9)
    for loss in (
        ck.PixelContrastLoss(2, max_views=4),
        ck.PixelContrastLoss(2, max_views=4, bank=memory),
        ck.MultiScaleContrastLoss(2, max_samples=50),
        ck.RegionContrastLoss(2, memory),
        ck.PNELoss(2),
    ):
        for _ in range(2):
            tracked = leaves(layers)
            value = loss(tracked, labels, torch.zeros_like(labels))
            assert value == 0
            assert not torch.autograd.grad(value, tracked[0])[0].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_at_ignored_pixels_has_no_effect(name):
    layers, labels, logits = batch(dtype=torch.float32)
    poisoned = []
    for x in layers:
        y, _ = at_layer(labels, logits, tuple(x.shape[2:]))
        poisoned.append(torch.where(torch.from_numpy(y)[:, None] < 0, float("nan"), x))
    assert any(x.isnan().any() for x in poisoned)
    results = []
    for features in (layers, poisoned):
        tracked, loss = leaves(features), LOSSES[name]()
        for _ in range(2):
            value = loss(tracked, labels, logits)
        value.backward()
        results.append((value, tracked[0].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_nan_in_a_sampled_pixel_is_never_hidden(name):
    layers, labels, logits = batch()
    assert LOSSES[name]()([torch.full_like(x, float("nan")) for x in layers], labels, logits).isnan()


# ----------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("region")])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_scaled_features_give_the_same_loss(name, scale):
    layers, labels, logits = batch(dtype=torch.float32)
    values = [LOSSES[name]()([s * x for x in layers], labels, logits).item() for s in (1.0, scale)]
    assert values[1] == pytest.approx(values[0], rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    """Computed in float32: against float64 on the same inputs. Gradients come back in the input's dtype."""
    layers, labels, logits = batch(dtype=dtype)
    tracked, exact = leaves(layers), leaves([x.double() for x in layers])
    value, expected = (LOSSES[name]()(x, labels, logits) for x in (tracked, exact))
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    got, want = (torch.autograd.grad(v, x, allow_unused=True)[0] for v, x in ((value, tracked), (expected, exact)))
    assert got.dtype == dtype
    assert (got.double() - want).norm() <= torch.finfo(dtype).eps * want.norm() + 1e-4 * want.abs().max()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_and_layout_change_nothing(name):
    layers, labels, logits = batch(dtype=torch.float32)
    results = []
    for enabled, memory_format in ((False, torch.contiguous_format), (True, torch.channels_last)):
        tracked = [x.to(memory_format=memory_format) for x in leaves(layers)]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = LOSSES[name]()(tracked, labels, logits)
        results.append((value, torch.autograd.grad(value, tracked[0])[0]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["pixel", "multi-scale", "region", "pne"])
def test_labels_of_every_dtype_and_rank(name, dtype):
    layers, labels, logits = batch()
    expected = LOSSES[name]()(layers, labels, logits)
    assert torch.equal(LOSSES[name]()(layers, labels.to(dtype)[:, None], logits), expected)


# ------------------------------------------------------------------------------------------------------------ modules


@pytest.mark.parametrize("name", SAMPLED)
def test_seed_advances_in_training_and_never_in_evaluation(name):
    layers, labels, logits = batch(wrong=0.4)
    loss = LOSSES[name](seed=7)
    assert "seed" in loss.state_dict()
    values = [loss(layers, labels, logits).item() for _ in range(3)]
    assert loss.seed.item() == 10
    if "bank" not in name:
        assert values == [LOSSES[name](seed=7 + i)(layers, labels, logits).item() for i in range(3)]
        assert len(set(values)) == 3
    loss.eval()
    assert loss(layers, labels, logits) == loss(layers, labels, logits)
    assert loss.seed.item() == 10


def test_a_list_and_its_layer_are_the_same():
    layers, labels, logits = batch()
    for name in ("pixel", "region", "pne"):
        for layer in (0, 1, -3):
            expected = LOSSES[name]()(layers[layer], labels, logits)
            assert torch.equal(LOSSES[name](layer=layer)(layers, labels, logits), expected)


def test_one_loop_over_all_of_them():
    """Every loss takes the same three inputs, so a comparison is one loop."""
    layers, labels, logits = batch()
    criteria = [ck.ContextrastLoss(N), *(make() for make in LOSSES.values())]
    values = [criterion(layers, labels, logits) for criterion in criteria]
    assert all(value.ndim == 0 and value > 0 for value in values)
    assert all(set(criterion.last) >= {"loss"} for criterion in criteria)
    assert all("num_classes=4" in repr(criterion) for criterion in criteria)
    assert "rows=Sampler(kind='hard-easy', max_samples=60, max_views=6" in repr(criteria[1])


@pytest.mark.parametrize("name", LOSSES)
def test_no_synchronisation_and_a_constant_number_of_ops(name):
    """Forward and backward, with the writing of the bank."""

    def ops(**options):
        layers, labels, logits = batch(dtype=torch.float32, **options)
        features, loss = leaves(layers), LOSSES[name]()
        with Dispatched() as mode:
            loss(features, labels, logits).backward()
        return mode.count

    assert ops() == ops(B=7) > 0
    larger = ops(sizes=((72, 96), (36, 48), (18, 24), (9, 12)))
    assert larger <= ops() or (name == "pixel, bane" and larger < 2 * ops())  # the reference's distance transform


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA, not even for fake tensors")
@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_crosses_from_host_to_device(name):
    """On fake CUDA tensors: seed and bank follow the first batch, and from then on nothing is copied."""
    with FakeTensorMode():
        loss = LOSSES[name](**({"bank": bank()} if "bank" in name or "region" in name else {}))
        features = [torch.empty(2, D, *size, device="cuda", requires_grad=True) for size in SIZES]
        labels = torch.zeros(2, 18, 24, dtype=torch.int64, device="cuda")
        logits = torch.empty(2, N, 18, 24, device="cuda")
        for step in range(3):
            with Crossings() as crossings:
                loss(features, labels, logits)
            assert set(crossings.seen) <= {"aten._to_copy.default"} if step == 0 else not crossings.seen


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("pixel, bank", "pne") else pytest.mark.slow) for name in LOSSES]
)
def test_one_graph_equal_to_eager_and_no_second_compilation(name):
    torch.compiler.reset()
    backend = Compilations()
    eager, loss = LOSSES[name](), LOSSES[name]()
    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=False)
    for seed in range(3):
        layers, labels, logits = batch(seed, dtype=torch.float32)
        tracked, other = leaves(layers), leaves(layers)
        value, expected = compiled(tracked, labels, logits), eager(other, labels, logits)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        got, want = (torch.autograd.grad(v, x[0])[0] for v, x in ((value, tracked), (expected, other)))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert backend.count == 1
    torch.compiler.reset()


# --------------------------------------------------------------------------------------------------------- the kernels


def assert_kernels_agree(name, device="cpu", dtype=torch.float32, **options):
    """Two steps on Triton's kernels and on the reference: value and gradient."""
    layers, labels, logits = batch(dtype=dtype, **options)
    results = []
    for backend in ("reference", "triton"):
        tracked, loss = leaves([x.to(device) for x in layers]), LOSSES[name]()
        with ck.backend(backend):
            for _ in range(2):
                value = loss(tracked, labels.to(device), logits.to(device))
            results.append((value.detach(), torch.autograd.grad(value, tracked[0])[0].double()))
    (expected, want), (value, got) = results
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    # Gradients of half precision are rounded once in both, but not always to the same side.
    assert (got - want).norm() <= max(1e-5, 2 * torch.finfo(dtype).eps * (dtype != torch.float32)) * want.norm()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("pixel, bank", "pne") else pytest.mark.slow) for name in LOSSES]
)
def test_the_kernels_give_the_reference(name):
    pytest.importorskip("triton")
    assert_kernels_agree(name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_the_kernels_give_the_reference_on_a_gpu(name, dtype):
    assert_kernels_agree(name, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_on_a_gpu_does_not_synchronise(name):
    """Forward, backward and the writing of the bank, on the fused kernels, from the second step on."""
    layers, labels, logits = batch(dtype=torch.float32)
    tracked, loss = leaves([x.cuda() for x in layers]), LOSSES[name]()
    labels, logits = labels.cuda(), logits.cuda()
    with ck.backend("auto"):
        loss(tracked, labels, logits).backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss(tracked, labels, logits).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert tracked[0].grad.isfinite().all()
