"""Volumes against literal loops over three axes, against the map of the same pixels, and on every backend."""

import functools

import literal
import numpy as np
import pytest
import torch
from inputs import leaves, logits_of, pyramid, scene, volume_scene
from kernel_checks import DEVICE, NEEDS_TRITON, assert_like_the_reference
from torch.autograd import gradcheck

import contextrast_kernels as ck
from contextrast_kernels import maps, native

N, D = 4, 5
SIZES = ((4, 5, 6), (2, 3, 4), (2, 2, 2), (1, 1, 2))  # none divides the labels' (5, 9, 11)
NATIVE = pytest.mark.skipif(native.status("cpu") != "ok", reason=f"native: {native.status('cpu')}")
MARKS = {"reference": [], "native": [NATIVE], "triton": [NEEDS_TRITON]}
BACKENDS = [pytest.param(backend, marks=marks) for backend, marks in MARKS.items()]


def crossed(names, quick=()):
    """Pairs of every name and every backend. On Triton's, whose interpreter is slow, all but ``quick`` are slow
    tests."""
    return [
        pytest.param(name, backend, marks=[*marks, *[pytest.mark.slow] * (backend == "triton" and name not in quick)])
        for name in names
        for backend, marks in MARKS.items()
    ]


# float64: means of softplus terms of size <= 2/tau over a few hundred voxels; the kernels' sums have a fixed point.
TIGHT = {"rel": 1e-12, "abs": 1e-13}
FIXED = {"rel": 1e-10, "abs": 1e-11}


def case(rng, sizes=SIZES, dtype=torch.float64, **options):
    labels, predictions = volume_scene(rng, **{"N": N, **options})
    return pyramid(rng, B=len(labels), D=D, sizes=sizes, dtype=dtype), labels, predictions


def literal_loss(features, labels, predictions, **options):
    arrays = [x.detach().double().numpy() for x in features]
    return literal.contextrast_loss(arrays, labels.numpy(), predictions.numpy(), num_classes=N, **options)


def value_and_gradients(function, features):
    features = leaves(features)
    loss = function(features)
    return loss.detach(), torch.autograd.grad(loss, features, materialize_grads=True)


# ------------------------------------------------------------------------------------------------- against the loops


@pytest.mark.parametrize("size", [(5, 9, 11), (2, 4, 6), (7, 9, 3), (1, 1, 1), (10, 20, 30)])
def test_sampling_takes_the_same_source_along_each_axis(rng, size):
    values = torch.from_numpy(rng.integers(0, 99, (2, 3, 5, 9, 11)))
    assert (maps.to_size(values, *size).numpy() == literal.resize(values.numpy(), size)).all()


def test_anchors_equal_the_loops(rng):
    (x, *_), labels, _ = case(rng)
    anchors, counts = literal.class_anchors(x.numpy(), labels.numpy(), N)
    for given in (labels, labels[:, None], labels.to(torch.uint8)):
        with ck.backend("reference"):
            a, n = ck.class_anchors(x, given, N)
        assert n.tolist() == counts.tolist()
        assert np.abs(a.numpy() - anchors).max() < 1e-13


@NEEDS_TRITON
def test_anchors_of_the_kernel_equal_the_loops(rng):
    """Labels of an odd size, sampled in the kernel, in planes, rows and columns."""
    (x,), labels, _ = case(rng, sizes=((3, 4, 5),))
    anchors, counts = literal.class_anchors(x.numpy(), labels.numpy(), N)
    labels = torch.stack([labels, labels + 7], -1)[..., 0]
    with ck.backend("triton"):
        a, n = ck.class_anchors(x.to(DEVICE), labels.to(DEVICE), N)
    assert n.tolist() == counts.tolist()
    assert np.abs(a.cpu().numpy() - anchors).max() < 1e-13


@pytest.mark.parametrize(("given", "backend"), crossed(("neither", "negatives", "base", "both"), quick=("both",)))
def test_pixel_anchor_loss_equals_the_loops(rng, given, backend):
    size = (3, 4, 5)
    (x,), labels, _ = case(rng, sizes=(size,))
    anchors = torch.from_numpy(rng.standard_normal((N, D)))
    negatives = torch.from_numpy(rng.integers(-1, N, (2, *size))) if given in ("negatives", "both") else None
    base = torch.from_numpy(rng.random((2, *size)) < 0.3) if given in ("base", "both") else None
    with ck.backend(backend):
        loss = ck.pixel_anchor_loss(x, labels, anchors, negatives=negatives, base=base)
    arrays = [None if m is None else m.numpy() for m in (negatives, base)]
    expected = literal.pixel_anchor_loss(x.numpy(), labels.numpy(), anchors.numpy(), *arrays)
    assert loss.item() == pytest.approx(expected, **(FIXED if backend == "triton" else TIGHT))


def test_error_map_equals_the_loops(rng, map_backend):
    labels, predictions = volume_scene(rng)
    for other in (predictions, predictions[:, ::2, :5, 1:7], predictions[:, :1]):
        expected = literal.error_map(other.numpy(), labels.numpy(), N)
        logits = logits_of(other, N, rng)
        for given in (logits, logits.to(memory_format=torch.channels_last_3d)):
            assert (ck.error_map(given, labels).numpy() == expected).all()
        for given, at in ((other, labels), (other.to(torch.int16), labels.to(torch.uint8)), (other[:, None], labels)):
            assert (ck.error_map(given, at, num_classes=N).numpy() == expected).all()


BANE = {
    "the labels' size": {},
    "a layer": {"size": (3, 5, 4)},
    "a layer of depth one": {"size": (1, 5, 4)},
    "measured at full size": {"size": (3, 5, 4), "distance_at": "full"},
    "semi-hard": {"size": (3, 5, 4), "negatives": "semi-hard", "seed": 5},
    "flat voxels": {"size": (3, 5, 4), "sampling": (2.5, 1.0, 1.0)},
    "flat voxels, at full size": {"size": (3, 5, 4), "sampling": (2.5, 1.0, 0.3), "distance_at": "full"},
    "flat voxels, depth one": {"size": (1, 5, 4), "sampling": (3.1, 0.7, 1.3), "ratio": 0.3},
}


@pytest.mark.parametrize("options", BANE.values(), ids=BANE.keys())
def test_bane_negatives_equal_the_loops(rng, map_backend, options):
    labels, predictions = volume_scene(rng)
    expected = literal.bane_negatives(predictions.numpy(), labels.numpy(), N, **options)
    assert (expected >= 0).any()
    chosen = ck.bane_negatives(logits_of(predictions, N, rng), labels, **options)
    assert chosen.dtype == torch.int32
    assert (chosen.numpy() == expected).all()
    assert (ck.bane_negatives(predictions, labels, num_classes=N, **options).numpy() == expected).all()


@pytest.mark.parametrize("sampling", [2.0, (0.5, 3.0)])
@pytest.mark.parametrize("distance_at", ["layer", "full"])
def test_bane_of_maps_uses_the_sampling(rng, map_backend, sampling, distance_at):
    labels, predictions = scene(rng)
    options = {"size": (8, 9), "distance_at": distance_at}
    chosen = ck.bane_negatives(predictions, labels, num_classes=N, sampling=sampling, **options)
    sides = sampling if isinstance(sampling, tuple) else (sampling,) * 2
    expected = literal.bane_negatives(predictions.numpy(), labels.numpy(), N, sampling=sides, **options)
    assert (chosen.numpy() == expected).all()


OPTIONS = {
    "defaults": {},
    "base 0.3 beside BANE": {"base_rate": 0.3, "seed": -(2**40) - 7},
    "CCL, all voxels": {"negatives": "none", "base_rate": 1.0},
    "semi-hard, at full size": {"negatives": "semi-hard", "distance_at": "full", "normalize_anchors": True},
    "not normalised": {"normalize": False, "temperature": 0.7},
    "flat voxels": {"sampling": (2.5, 1.0, 1.0), "ratio": 0.3},
}


@pytest.mark.parametrize(("name", "backend"), crossed(OPTIONS, quick=("base 0.3 beside BANE",)))
def test_total_loss_equals_the_loops(rng, name, backend):
    options = OPTIONS[name]
    features, labels, predictions = case(rng)
    if backend == "triton":
        features, options = features[1:3], {**options, "layer_weights": (1, 0.5)}
    expected = literal_loss(features, labels, predictions, **options)
    assert expected > 0.01
    with ck.backend(backend):
        loss = ck.contextrast_loss(features, labels, predictions, num_classes=N, **options)
    assert loss.item() == pytest.approx(expected, **(FIXED if backend == "triton" else TIGHT))


# ---------------------------------------------------------------------------------------- depth one, and rows of planes


def one_plane(x):
    """A map's tensor as that of a volume of depth one."""
    return x.unsqueeze(-3)


def relatives():
    bank = ck.MemoryBank(N, D, pixels=20, regions=20)
    return {
        "pixel contrast": ck.PixelContrastLoss(N, max_samples=40, max_views=3, min_pixels=1),
        "pixel contrast, a bank": ck.PixelContrastLoss(N, max_samples=40, max_views=3, min_pixels=1, bank=bank),
        "pixel contrast, BANE": ck.PixelContrastLoss(N, sampler="bane", max_samples=40, max_views=3, min_pixels=1),
        "region contrast": ck.RegionContrastLoss(N, ck.MemoryBank(N, D, pixels=0, regions=20)),
        "multi-scale": ck.MultiScaleContrastLoss(N, max_samples=40, layer_weights=(1, 0.5), min_pixels=1),
        "PNE": ck.PNELoss(N, set_size=5),
        "contextrast": ck.ContextrastLoss(N, layer_weights=(1.0, 0.5), base_rate=0.2),
        "contextrast, full": ck.ContextrastLoss(N, layer_weights=(1.0, 0.5), distance_at="full"),
        "contextrast, a sampler": ck.ContextrastLoss(
            N, layer_weights=(1.0, 0.5), base_sampler=ck.Sampler("common-count", 20, 5)
        ),
        "contextrast, a BANE sampler": ck.ContextrastLoss(
            N, layer_weights=(1.0, 0.5), base_sampler=ck.Sampler("bane", 20, 5, 1)
        ),
    }


def two_steps(criterion, features, labels, logits):
    """Losses and gradients of two training steps: the second sees what the first one left."""
    seen = []
    for _ in range(2):
        loss, gradients = value_and_gradients(lambda xs: criterion(xs, labels, logits), features)
        seen += [loss, *gradients, *criterion.last.values()]
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("name", "backend"), crossed(relatives(), quick=("contextrast",)))
def test_depth_one_gives_the_bits_of_the_map(rng, name, backend, layout):
    labels, predictions = scene(rng, B=1, H=12, W=16)
    logits = logits_of(predictions, N, rng)
    features = pyramid(rng, B=1, D=D, sizes=((5, 6), (3, 2)), dtype=torch.float32)
    features = [x.to(memory_format=layout) for x in features]
    with ck.backend(backend):
        flat = two_steps(relatives()[name], features, labels, logits)
        volumes = [one_plane(x) for x in features], one_plane(labels), one_plane(logits)
        deep = two_steps(relatives()[name], *volumes)
    assert flat[0] > 0 or "bank" in name or "region" in name
    for one, other in zip(flat, deep, strict=True):
        assert torch.equal(one, other.squeeze(2) if other.ndim == 5 else other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_depth_one_gives_the_bits_of_the_map_in_every_function(rng, backend):
    labels, predictions = scene(rng)
    logits = logits_of(predictions, N, rng)
    (x,) = pyramid(rng, D=D, sizes=((4, 5),), dtype=torch.float32)
    anchors = torch.from_numpy(rng.standard_normal((N, D))).float()
    negatives, base = torch.from_numpy(rng.integers(-1, N, (2, 4, 5))), torch.from_numpy(rng.random((2, 4, 5)) < 0.3)
    criterion = ck.ContextrastCriterion(N, layer_weights=(1.0,)).eval()
    head, deep_head = ck.ProjectionHead(D, 3).double(), ck.ProjectionHead(D, 3, spatial_dims=3).double()
    deep_head.load_state_dict({name: v.unsqueeze(-1) if v.ndim == 4 else v for name, v in head.state_dict().items()})
    v, y, e, z = map(one_plane, (x, labels, predictions, logits))
    with ck.backend(backend):
        for flat, deep in (
            (ck.class_anchors(x, labels, N), ck.class_anchors(v, y, N)),
            (
                [ck.pixel_anchor_loss(x, labels, anchors, negatives=negatives, base=base)],
                [ck.pixel_anchor_loss(v, y, anchors, negatives=one_plane(negatives), base=one_plane(base))],
            ),
            ([one_plane(ck.error_map(logits, labels))], [ck.error_map(z, y)]),
            (
                [one_plane(ck.bane_negatives(logits, labels, size=(5, 6), seed=3, sampling=(1.0, 0.7)))],
                [ck.bane_negatives(z, y, size=(1, 5, 6), seed=3, sampling=(9.0, 1.0, 0.7))],
            ),
            (
                [one_plane(ck.bane_negatives(predictions, labels, num_classes=N, size=(5, 6)))],
                [ck.bane_negatives(e, y, num_classes=N, size=(1, 5, 6))],
            ),
        ):
            for one, other in zip(flat, deep, strict=True):
                assert torch.equal(one, other)
        assert torch.equal(criterion([x], labels, logits), criterion([v], y, z))
        assert torch.equal(criterion([x], labels, logits[..., :9, :7]), criterion([v], y, z[..., :9, :7]))
    torch.testing.assert_close(head(x.double()), deep_head(v.double()).squeeze(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "backend"), crossed([name for name in relatives() if "BANE" not in name and "contextrast" not in name])
)
def test_a_relative_draws_from_the_rows_of_all_planes(rng, name, backend):
    """A pixel's number in memory order is the same in the volume and in the map of its planes' rows, so at the layers'
    own size both draw the same pixels. There is one layer, since another would sample the labels again."""
    (x,), labels, predictions = case(rng, sizes=((5, 9, 11),), dtype=torch.float32)
    logits = logits_of(predictions, N, rng)
    with ck.backend(backend):
        deep, flat = (relatives()[name] for _ in range(2))
        for criterion in (deep, flat):
            if name == "multi-scale":
                criterion.layer_weights = (1.0,)
        one = two_steps(deep, [x], labels, logits)
        other = two_steps(flat, [x.flatten(2, 3)], labels.flatten(1, 2), logits.flatten(2, 3))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.flatten(), b.flatten())


# -------------------------------------------------------------------------------------------------------- fused kernels


def layouts(x):
    """A volume's features in the memory layouts that the kernels can read."""
    B, C, z, h, w = x.shape
    big = x.new_full((B, C + 1, z + 2, 2 * h, 3 * w), torch.nan)
    for name, view in (
        ("contiguous", x.contiguous()),
        ("channels_last_3d", x.contiguous(memory_format=torch.channels_last_3d)),
        ("some planes", big[:, 1:, 1:-1, :h, ::3][:, :, :, :, :w]),
        ("some columns of whole planes", x.new_full((B, C, z, h, 2 * w), torch.nan)[..., ::2]),
        ("some rows", x.new_full((B, C, z, 2 * h, w), torch.nan)[:, :, :, 1 : h + 1]),
    ):
        if view is not x:
            view.copy_(x)
        yield name, view


@NEEDS_TRITON
@pytest.mark.parametrize("options", [{}, {"base_rate": 0.4}, {"sampling": (3, 1, 1)}], ids=["hard", "dense", "flat"])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float64, marks=pytest.mark.slow), torch.float32, torch.float16])
def test_fused_loss_agrees_with_the_reference(rng, dtype, options):
    features, labels, predictions = case(rng, B=1, sizes=SIZES[1:3], dtype=dtype)
    options = {"layer_weights": (1, 0.5), **options}
    features, labels, predictions = [x.to(DEVICE) for x in features], labels.to(DEVICE), predictions.to(DEVICE)
    assert_like_the_reference(
        lambda *xs: ck.contextrast_loss(list(xs), labels, predictions, num_classes=N, **options), features
    )


@NEEDS_TRITON
@pytest.mark.parametrize("which", range(5))
def test_every_readable_layout_gives_the_same(rng, which):
    features, labels, predictions = case(rng, sizes=((2, 3, 5), (2, 2, 2)), B=1, dtype=torch.float32)
    loss = functools.partial(
        ck.contextrast_loss, labels=labels, predictions=predictions, num_classes=N, layer_weights=(1, 0.5)
    )
    with ck.backend("reference"):
        expected, gradients = value_and_gradients(loss, features)
    views = [list(layouts(x))[which][1] for x in features]
    pointers = {x.data_ptr() for x in views}
    assert {maps.plane_stack(x).data_ptr() for x in views} == pointers, "a copy"
    with ck.backend("triton"):
        views = [x.detach().requires_grad_() for x in views]
        value = loss(views)
        found = torch.autograd.grad(value, views)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for one, other in zip(found, gradients):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@NEEDS_TRITON
def test_a_block_cut_out_of_a_volume_uses_the_reference(rng, monkeypatch):
    """Cut in rows and in columns, a volume has no axis whose rows lie at one distance."""
    features, labels, predictions = case(rng, sizes=((3, 4, 5),), dtype=torch.float32)
    block = features[0].new_zeros(2, D, 3, 6, 8)[..., 1:5, 2:7].copy_(features[0])
    assert maps.plane_stack(block) is None
    losses = {
        "contextrast_loss": lambda x: ck.contextrast_loss([x], labels, predictions, num_classes=N, layer_weights=(1,)),
        "class_anchors": lambda x: ck.class_anchors(x, labels, N)[0],
        "pixel_anchor_loss": lambda x: ck.pixel_anchor_loss(x, labels, torch.ones(N, D)),
    }
    for loss in losses.values():
        with ck.backend("triton"), pytest.raises(RuntimeError, match=r"strides \(.*Call \.contiguous\(\)"):
            loss(block)
        with ck.backend("reference"):
            expected = loss(features[0])
        assert torch.equal(loss(block), expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=[NEEDS_TRITON, pytest.mark.slow])])
@pytest.mark.parametrize("options", [{}, {"base_rate": 0.4, "normalize_anchors": True}], ids=["hard", "dense"])
def test_gradient_equals_finite_differences(rng, backend, options):
    features, labels, predictions = case(rng, sizes=((2, 3, 3), (2, 2, 1)), B=1, Z=3, H=6, W=5)
    features = leaves([x.contiguous(memory_format=torch.channels_last_3d) for x in features])
    options |= {"num_classes": N, "layer_weights": (1.0, 0.5), "temperature": 0.5}
    with ck.backend(backend):
        assert gradcheck(lambda *xs: ck.contextrast_loss(xs, labels, predictions, **options), features)


# ----------------------------------------------------------------------------------------------------------- selection


DISTANCES = {
    torch.uint8: [0, 3, 3, 255],
    torch.int8: [-128, -1, 0, 127],
    torch.int16: [-300, 2, 2, 30000],
    torch.int32: [-(2**31), 0, 7, 2**31 - 1],
    torch.int64: [-(2**62), 2**40, 2**40 + 1, 2**62],
    torch.float16: [-2.0, -0.0, 0.0, 0.25, float("inf"), float("nan")],
    torch.bfloat16: [-3.0, -2.5, 1.0, float("inf")],
    torch.float32: [-1e-45, -0.0, 0.0, 1e-45, 1.0, 1.0000001, float("inf"), float("nan")],
    torch.float64: [-1.0, 1.0, 1.0 + 2**-52, 2.0, 1e300, float("inf"), float("nan")],
}


@pytest.mark.parametrize("dtype", DISTANCES, ids=str)
@pytest.mark.parametrize("shape", [(2, 6, 7), (2, 3, 4, 5), (0, 3, 4, 5), (2, 2, 0, 3)], ids=str)
def test_selection_orders_distances_of_every_dtype(rng, map_backend, dtype, shape):
    classes = torch.from_numpy(rng.integers(-1, 3, shape))
    values = torch.tensor(DISTANCES[dtype], dtype=dtype)
    distances = values[torch.from_numpy(rng.integers(0, len(values), shape))]
    known = distances.double() if distances.is_floating_point() else distances.long()
    known = known.nan_to_num(float("inf"), float("inf"), -float("inf")) if known.is_floating_point() else known
    chosen = ck.select_nearest(classes, distances, 0.4, num_classes=3, seed=9)
    assert chosen.shape == classes.shape
    assert (chosen.numpy() == literal.select_nearest(classes.numpy(), known.numpy(), 0.4, 3, 9)).all()
    strided = torch.stack([distances, distances], -1)[..., 1]
    assert torch.equal(ck.select_nearest(classes, strided, 0.4, num_classes=3, seed=9), chosen)


def test_a_volume_may_have_more_rows_than_a_map_has(map_backend):
    """200 planes of 100 rows: the number of a pixel is what counts, not the length of a side."""
    classes = torch.zeros(1, 200, 100, 1, dtype=torch.int64)
    distances = torch.arange(20000).remainder(7).reshape(classes.shape)
    chosen = ck.select_nearest(classes, distances, 0.1, num_classes=1)
    order = sorted(range(20000), key=lambda p: (p % 7, literal.hash32(0, 0, p)))
    assert chosen.flatten().nonzero().flatten().tolist() == sorted(order[:2000])


# ----------------------------------------------------------------------------------------------------------- degenerate


NOTHING = ("no image", "nothing valid", "no error", "no plane", "a broken ignored voxel")


@pytest.mark.parametrize(
    ("what", "backend"), crossed(NOTHING, quick=("no image", "no plane", "a broken ignored voxel"))
)
def test_nothing_to_contrast_is_zero_with_a_live_graph(rng, what, backend):
    features, labels, predictions = case(rng, sizes=((3, 4, 5), (2, 3, 2)), B=1, dtype=torch.float32)
    options = {"num_classes": N, "layer_weights": (1, 0.5)}
    if what == "no image":
        features, labels, predictions = [x[:0] for x in features], labels[:0], predictions[:0]
    if what == "nothing valid":
        labels = torch.full_like(labels, 255)
    if what == "no error":
        predictions = labels.clone()
    if what == "no plane":
        features = [x[:, :, :0] for x in features]
    if what == "a broken ignored voxel":
        labels = torch.full_like(labels, 255)
        features[0][:, :, 1, 2] = torch.nan
    with ck.backend(backend):
        loss, gradients = value_and_gradients(
            lambda xs: ck.contextrast_loss(xs, labels, predictions, **options), features
        )
    assert loss == 0
    assert all(x.shape == g.shape and not g.any() for x, g in zip(features, gradients))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nonfinite_valid_voxel_gives_nan(rng, backend):
    (x,), labels, predictions = case(rng, sizes=((2, 3, 4),), dtype=torch.float32, ignored=0)
    x[0, 2, 1, 1, 3] = torch.inf
    with ck.backend(backend):
        assert ck.contextrast_loss([x], labels, predictions, num_classes=N, layer_weights=(1,)).isnan()


# ------------------------------------------------------------------------------------------ compiled, ranks, scores


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param("native", {"sampling": (2.0, 1.0, 1.0), "base_rate": 0.3}, marks=NATIVE),
        pytest.param("native", {}, marks=[NATIVE, pytest.mark.slow]),
        pytest.param("reference", {}, marks=pytest.mark.slow),
    ],
)
def test_one_compiled_graph_equals_eager(rng, backend, options):
    features, labels, predictions = case(rng, sizes=((2, 3, 4), (2, 2, 2)), dtype=torch.float32)
    logits = logits_of(predictions, N, rng)

    def loss(features, labels, logits):
        return ck.contextrast_loss(features, labels, logits, num_classes=N, layer_weights=(1, 0.5), **options)

    torch.compiler.reset()
    with ck.backend(backend):
        expected, gradients = value_and_gradients(lambda xs: loss(xs, labels, logits), features)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        value, found = value_and_gradients(lambda xs: compiled(xs, labels, logits), features)
    torch.testing.assert_close([value, *found], [expected, *gradients])


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=[NEEDS_TRITON, pytest.mark.slow])])
def test_one_rank_of_a_group_has_the_loss_of_one_process(rng, one_rank, backend):
    features, labels, predictions = case(rng, B=1, sizes=((2, 3, 4), (2, 2, 2)))
    options = {"num_classes": N, "layer_weights": (1, 0.5), "base_rate": 0.3, "sampling": (3, 1, 1)}
    with ck.backend(backend):
        (alone, gradients), (shared, found) = (
            value_and_gradients(
                lambda xs, group=group: ck.contextrast_loss(xs, labels, predictions, group=group, **options), features
            )
            for group in (None, torch.distributed.group.WORLD)
        )
    torch.testing.assert_close([shared, *found], [alone, *gradients])


def test_confusion_counts_voxels(rng):
    labels, predictions = volume_scene(rng)
    deep, flat = (ck.metrics.ConfusionMatrix(N) for _ in range(2))
    deep.update(logits_of(predictions, N, rng), labels[:, None], mask=labels != 2)
    flat.update(predictions.flatten(0, 1), labels.flatten(0, 1), mask=(labels != 2).flatten(0, 1))
    assert torch.equal(deep.counts, flat.counts)


def test_the_criterion_is_cross_entropy_and_contrast_of_volumes(rng):
    features, labels, predictions = case(rng)
    small = logits_of(predictions, N, rng)[:, :, :3, :5, :6].double()
    criterion = ck.ContextrastCriterion(N, weight=0.3).double()
    large = torch.nn.functional.interpolate(small, labels.shape[1:], mode="trilinear")
    expected = torch.nn.functional.cross_entropy(large, labels, ignore_index=255)
    expected = expected + 0.3 * literal_loss(features, labels, large)
    torch.testing.assert_close(criterion(features, labels, small), expected, rtol=1e-12, atol=1e-12)
