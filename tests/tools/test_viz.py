"""Pictures: the colours of embeddings as numbers, and the contents of the figures. Their look was checked by eye."""

import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from inputs import pyramid, scene

import contextrast_kernels as ck
from contextrast_kernels import viz
from contextrast_kernels.demo.scenes import CamVid

N = 4
SIZES = ((8, 12), (4, 6), (2, 3), (1, 2))
LONG = ("traffic light", "traffic sign", "vegetation", "motorcycle")
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip


def batch(B=2, N=N, sizes=SIZES, H=32, W=48):
    rng = np.random.default_rng(5)
    labels, predictions = scene(rng, B=B, N=N, H=H, W=W)
    return pyramid(rng, B=B, D=6, sizes=sizes, dtype=torch.float32), labels, predictions


def drawn(figure):
    """Draw a figure as for a file, with every warning an error. Return the canvas with its pixels."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    return canvas


def shown(axis):
    """The picture in an axis."""
    [picture] = axis.get_images()
    return np.ma.getdata(picture.get_array())


def words(texts):
    return [text.get_text() for text in texts]


def legend(figure):
    """The entries of a figure's legend: (name, colour)."""
    [entries] = figure.legends
    colours = [patch.get_facecolor()[:3] for patch in entries.get_patches()]
    return list(zip(words(entries.get_texts()), colours, strict=True))


# ------------------------------------------------------------------------------------------------ embedding_colours


def test_colours_are_the_principal_components():
    """Against a singular value decomposition of the same vectors, one image after the other."""
    [x] = pyramid(np.random.default_rng(0), B=2, D=5, sizes=((6, 7),))
    colours = viz.embedding_colours(x)
    assert colours.shape == (2, 6, 7, 3) and colours.dtype == torch.uint8
    rows = np.concatenate([image.reshape(5, -1).T for image in x.numpy()])
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(rows)
    for k in range(3):
        direction = directions[k] * np.sign(directions[k][np.abs(directions[k]).argmax()])
        projected = rows @ direction
        low, high = (np.sort(projected)[round(share * 83)] for share in (0.01, 0.99))
        expected = np.clip((projected - low) / (high - low), 0, 1) * 255
        assert np.abs(expected.reshape(2, 6, 7) - colours[..., k].numpy()).max() <= 0.5 + 1e-6


def test_colours_do_not_depend_on_scale_dtype_or_layout():
    [x] = pyramid(np.random.default_rng(1), B=2, D=16, sizes=((6, 7),), dtype=torch.float32)
    colours = viz.embedding_colours(x).int()
    assert torch.equal(viz.embedding_colours(x * 1e4).int(), colours)
    assert torch.equal(viz.embedding_colours(x.to(memory_format=torch.channels_last).requires_grad_()).int(), colours)
    half = viz.embedding_colours(x.half()).int()
    assert (half - colours).abs().max() <= 2
    swapped = viz.embedding_colours(x.flip(0)).int()
    assert (swapped.flip(0) - colours).abs().max() <= 1


def test_a_small_change_of_the_network_flips_no_colour():
    generator = torch.Generator().manual_seed(2)
    spread = torch.tensor([4.0, 3, 2, 1, 0.5]).view(1, 5, 1, 1)  # distinct variances: the components are well defined
    x = torch.randn(2, 5, 12, 12, generator=generator) * spread + 0.3
    before = viz.embedding_colours(x).int()
    for _ in range(5):
        x = x + 0.01 * torch.randn(x.shape, generator=generator)
        assert (viz.embedding_colours(x).int() - before).abs().double().mean() < 8


def test_the_sign_of_a_component_is_deterministic(monkeypatch):
    [x] = pyramid(np.random.default_rng(3), B=1, D=5, sizes=((6, 7),))
    colours, eigh = viz.embedding_colours(x), torch.linalg.eigh
    for sign in (1, -1):
        monkeypatch.setattr(torch.linalg, "eigh", lambda m, s=sign: (eigh(m).eigenvalues, s * eigh(m).eigenvectors))
        assert torch.equal(viz.embedding_colours(x), colours)


def test_two_kinds_of_pixels_have_two_colours():
    x = torch.zeros(1, 4, 2, 4)
    x[:, 0, :, :2], x[:, 1, :, 2:] = 1, 1
    colours = viz.embedding_colours(x)[0]
    assert colours[:, :2].unique(dim=0).shape[0] == colours[:, 2:].unique(dim=0).shape[0] == 1
    assert sorted(colours[0, :, 0].unique().tolist()) == [0, 255]  # one component tells them apart
    assert (colours[..., 1:] == 128).all()  # and there is no other


@pytest.mark.parametrize("D", [1, 2])
def test_fewer_than_three_channels_leave_colours_out(D):
    colours = viz.embedding_colours(torch.randn(1, D, 5, 5))
    assert colours.shape == (1, 5, 5, 3) and (colours[..., D:] == 128).all()


def test_nonfinite_pixels_and_constant_components_are_grey():
    assert (viz.embedding_colours(torch.ones(1, 64, 5, 5) * 0.3) == 128).all()
    assert (viz.embedding_colours(torch.zeros(1, 3, 2, 2)) == 128).all()
    assert (viz.embedding_colours(torch.full((1, 3, 2, 2), torch.nan)) == 128).all()
    assert viz.embedding_colours(torch.zeros(0, 3, 2, 2)).shape == (0, 2, 2, 3)
    x = torch.randn(1, 4, 6, 6)
    expected = viz.embedding_colours(x)
    x = torch.cat((x, x[:, :, :1]), 2)
    x[0, 1, 6] = torch.inf
    assert torch.equal(viz.embedding_colours(x)[:, :6], expected) and (viz.embedding_colours(x)[:, 6] == 128).all()


# ------------------------------------------------------------------------------------------------------------ figures


def figures(names="abcd", sizes=SIZES, H=32, W=48):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    N, image = len(names), torch.rand(3, H, W)
    features, labels, predictions = batch(N=N, sizes=sizes, H=H, W=W)
    similarity = ck.metrics.AnchorSimilarity(N, 6)
    similarity.update(features, labels, predictions)
    named = {"num_classes": N, "class_names": names}
    return {
        "negatives": viz.negatives(image, labels[0], predictions[0], sizes=sizes, **named),
        "embeddings": viz.embeddings(image, [x[0] for x in features]),
        "anchor_similarity": viz.anchor_similarity(features, labels, **named),
        "similarity_curve": viz.similarity_curve(similarity.compute()),
    }


def test_figures_are_drawn_without_a_warning():
    for figure in figures().values():
        assert np.asarray(drawn(figure).buffer_rgba()).std() > 5
        figure.savefig(io.BytesIO(), format="png")


@pytest.mark.parametrize("layers", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 4])
@pytest.mark.parametrize(
    ("names", "H", "W"), [(LONG, 36, 48), (CamVid.classes, 36, 48), (CITYSCAPES, 32, 64)], ids=["4", "11", "19"]
)
def test_all_text_is_inside_the_canvas(names, H, W, layers):
    sizes = [(max(H >> i, 1), max(W >> i, 1)) for i in range(1, 1 + layers)]
    for name, figure in figures(names, sizes, H, W).items():
        extent = figure.get_tightbbox(drawn(figure).get_renderer())  # of all that is visible, in inches
        width, height = figure.get_size_inches()
        assert min(extent.x0, extent.y0) >= 0 and extent.x1 <= width and extent.y1 <= height, name


@pytest.mark.parametrize("N", [11, 21, 24])
def test_up_to_24_class_colours_are_distinguishable(N):
    """In CIEDE2000: two colours side by side are seen to differ from about 2.3, and are not mistaken from about 10."""
    color = pytest.importorskip("skimage.color", reason="scikit-image is not installed")

    def distances(a, b):
        a, b = (color.rgb2lab(np.asarray(colours)) for colours in (a, b))
        return color.deltaE_ciede2000(a[:, None], b[None])

    colours, backgrounds = viz.class_colours(N), [viz.VOID_COLOUR, viz.CORRECT_COLOUR, viz.NO_EDGE_COLOUR]
    pale = torch.lerp(colours, torch.ones(3), viz.PALE)
    others = ~np.eye(N, dtype=bool)
    assert distances(colours, colours)[others].min() > 10
    assert distances(pale, colours).min() > 10
    assert distances(torch.cat((colours, pale)), backgrounds).min() > 10
    assert distances(pale, pale)[others].min() > 2 * 2.3


@pytest.mark.parametrize("N", [1, 24, 25, 150])
def test_the_colours_of_any_number_of_classes_differ(N):
    colours = viz.class_colours(N)
    assert colours.shape == (N, 3) and len(colours.unique(dim=0)) == N
    assert colours.min() >= 0 and colours.max() <= 1


def test_each_column_of_the_negatives_matches_its_title():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    generator = torch.Generator().manual_seed(1)
    H, W, sizes = 24, 36, [(12, 18), (9, 14)]
    image = torch.rand(3, H, W, generator=generator)
    labels = torch.randint(N, (H // 6, W // 6), generator=generator).repeat_interleave(6, 0).repeat_interleave(6, 1)
    labels[:5, :5] = 255
    logits = torch.randn(N, H // 4, W // 4, generator=generator)
    figure = viz.negatives(image, labels, logits, num_classes=N, sizes=sizes)
    axes = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert [axes[0].get_ylabel(), axes[6].get_ylabel()] == ["stride 2\n12 × 18", "9 × 14"]
    colours = torch.cat((viz.class_colours(N), torch.tensor([viz.VOID_COLOUR, viz.CORRECT_COLOUR])))
    pale = torch.lerp(colours, torch.ones(3), viz.PALE)

    def sampled(of_pixels, h, w):
        rows, columns = ((torch.arange(n) * total // n) for n, total in zip((h, w), of_pixels.shape))
        return of_pixels[rows[:, None], columns]

    for i, (h, w) in enumerate(sizes):
        target, predicted = sampled(labels, h, w), sampled(logits.argmax(0), h, w)
        void = target == 255
        wrong = ~void & (predicted != target)
        distance = ck.edge_distance(torch.where(wrong, predicted, -1)[None])[0]
        chosen = ck.bane_negatives(logits[None], labels[None], num_classes=N, size=(h, w))[0] >= 0
        assert void.any() and chosen.any() and (wrong & ~chosen).any() and (distance > 0).any()
        error_colours = colours[torch.where(wrong, predicted, torch.where(void, N, N + 1))]
        expected = {
            "image": image.permute(1, 2, 0),
            "labels": colours[torch.where(void, N, target)],
            "prediction": colours[predicted],
            "error map": error_colours,
            "edge distance": torch.where(wrong, distance, torch.where(void, -1.0, torch.nan)),
            "chosen negatives": torch.where((wrong & ~chosen)[..., None], pale[predicted], error_colours),
        }
        row = axes[6 * i :][:6]
        assert [axis.get_title() for axis in axes[:6]] == list(expected)
        for axis, (title, picture) in zip(row, expected.items()):
            np.testing.assert_allclose(shown(axis), picture, rtol=0, atol=1e-6, err_msg=title)
        [distances] = row[4].get_images()
        painted = distances.to_rgba(distances.get_array())[..., :3]
        assert (painted[void] == viz.VOID_COLOUR).all() and (painted[~void & ~wrong] == viz.CORRECT_COLOUR).all()


def test_a_plane_of_a_volume_is_drawn_as_a_map():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    generator = torch.Generator().manual_seed(2)
    scans = torch.rand(3, 5, 24, 36, generator=generator)
    labels = torch.randint(N, (5, 24, 36), generator=generator)
    logits = torch.randn(N, 5, 24, 36, generator=generator)
    plane = scans[:, 2], labels[2], logits[:, 2]
    options = {"num_classes": N, "sizes": [(12, 18)]}
    of_plane, of_map = (
        [shown(axis) for axis in viz.negatives(*given, **options).axes if axis.get_label() != "<colorbar>"]
        for given in (plane, [x.clone(memory_format=torch.contiguous_format) for x in plane])
    )
    for one, other in zip(of_plane, of_map, strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(ValueError, match=r"^labels: expected the map \(H, W\).*one plane of a volume, labels\[i, z\]"):
        viz.negatives(scans[:, 2], labels, logits[:, 2], **options)


def test_the_legend_of_the_negatives_names_the_classes_that_are_shown():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    labels = torch.tensor([0, 2]).repeat(8, 4)
    predictions = torch.where(torch.arange(8)[:, None] < 2, 3, labels)
    image, names = torch.rand(3, 8, 8), ("sky", "road", "tree", "car")
    colours = viz.class_colours(N).tolist()
    entries = legend(viz.negatives(image, labels, predictions, num_classes=N, sizes=[(8, 8)], class_names=names))
    assert entries == [
        ("sky", pytest.approx(colours[0])),
        ("tree", pytest.approx(colours[2])),
        ("car", pytest.approx(colours[3])),
        ("ignored", viz.VOID_COLOUR),
        ("correct", viz.CORRECT_COLOUR),
    ]


def test_an_error_without_an_edge_is_black_and_in_the_legend():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    labels = torch.zeros(8, 8, dtype=torch.uint8)
    figure = viz.negatives(torch.zeros(3, 8, 8, dtype=torch.uint8), labels, labels + 1, num_classes=2, sizes=[(8, 8)])
    [picture] = next(axis for axis in figure.axes if axis.get_title() == "edge distance").get_images()
    assert (picture.to_rgba(picture.get_array())[..., :3] == viz.NO_EDGE_COLOUR).all()
    assert legend(figure)[-1] == ("error without an edge", viz.NO_EDGE_COLOUR)


def test_colours_need_no_matplotlib_and_figures_no_pyplot():
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    program = (
        "import sys; sys.path[:0] = ['tests', 'tests/tools']; import test_viz; features, _, _ = test_viz.batch(); "
        "sys.modules['matplotlib'] = None; test_viz.viz.embedding_colours(features[0]); del sys.modules['matplotlib']; "
        "test_viz.figures(); assert 'matplotlib.pyplot' not in sys.modules and 'matplotlib.figure' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("layers", [1, 2, 4, 7])
def test_any_number_of_layers(layers):
    features, labels, predictions = batch()
    features = [features[min(i, 3)] for i in range(layers)]
    image = (torch.rand(3, 32, 48) * 255).to(torch.uint8)
    figure = viz.embeddings(image, [x[0] for x in features])
    assert sum(bool(axis.get_images()) for axis in figure.axes) == 1 + layers
    for axis, x in zip(figure.axes[1:], features):
        expected = viz.embedding_colours(x[:1])[0].numpy()
        assert np.array_equal(axis.get_images()[0].get_array(), expected)
    drawn(figure)
    drawn(viz.anchor_similarity(features, labels, num_classes=N, class_names="abcd"))
    similarity = ck.metrics.AnchorSimilarity(N, 3)
    similarity.update(features, labels, predictions)
    assert len(viz.similarity_curve(similarity.compute()).axes) == 2 * layers


def test_the_matrix_is_that_of_the_fused_anchors_with_absent_classes_blank():
    features, labels, _ = batch()
    labels[labels == 1] = 255
    figure = viz.anchor_similarity(features, labels, num_classes=N, fusion_weight=0.4, class_names="abcd")
    anchors = [ck.class_anchors(x, labels, N) for x in features]
    a = ck.fuse_anchors(*anchors[1], *anchors[-1], 0.4).double()
    a = a / a.norm(dim=1, keepdim=True)
    cosines = figure.axes[1].get_images()[0].get_array()
    present = [0, 2, 3]
    np.testing.assert_allclose(cosines[np.ix_(present, present)], (a @ a.T)[present][:, present], atol=1e-6)
    mask = np.ma.getmaskarray(np.ma.masked_invalid(cosines))
    assert mask[1].all() and mask[:, 1].all() and not mask[np.ix_(present, present)].any()
    for axis, (h, w) in zip(figure.axes, SIZES):
        assert axis.get_title() == f"{h} × {w}"
        assert words(axis.get_xticklabels()) == list("abcd") and axis.get_xticks().tolist() == [0, 1, 2, 3]
    assert words(figure.axes[0].get_yticklabels()) == list("abcd") and figure.axes[0].get_yticks().tolist() == [
        0,
        1,
        2,
        3,
    ]


def test_the_curve_shows_the_numbers():
    features, labels, predictions = batch()
    similarity = ck.metrics.AnchorSimilarity(N, 4)
    similarity.update(features, labels, predictions)
    results = similarity.compute()
    figure = viz.similarity_curve(results)
    known = max(results["pixels"].sum(0).nonzero()) + 1
    assert known < 4
    lines = {"anchor of the true class": "true_class", "anchor of the predicted class": "predicted_class"}
    assert words(figure.legends[0].get_texts()) == list(lines)
    layers = len(SIZES)
    for i, (axis, of_pixels) in enumerate(zip(figure.axes[:layers], figure.axes[layers:], strict=True)):
        assert axis.get_title() == f"layer {i}"
        assert [line.get_label() for line in axis.get_lines()] == list(lines)
        for line in axis.get_lines():
            np.testing.assert_array_equal(line.get_xdata(), results["distance"][:known])
            np.testing.assert_array_equal(line.get_ydata(), results[lines[line.get_label()]][i, :known])
        assert [bar.get_height() for bar in of_pixels.patches] == results["pixels"][i, :known].tolist()


def test_a_summary_writer_takes_the_figures(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="tensorboard is not installed")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        for name, figure in figures().items():
            writer.add_figure(name, figure)
        writer.add_images("colours", viz.embedding_colours(batch()[0][0]), dataformats="NHWC")


IMAGE, LABELS = torch.rand(3, 32, 48), torch.zeros(1, 32, 48, dtype=torch.long)
LAYER = torch.randn(1, 4, 8, 12)


def picture(**change):
    good = {"image": IMAGE, "labels": LABELS[0], "predictions": LAYER[0], "num_classes": 4, "sizes": [(8, 12)]}
    return viz.negatives(**good | change)


@pytest.mark.parametrize(
    ("call", "exception", "sentence"),
    [
        (lambda: viz.embedding_colours(LAYER[0]), ValueError, r"^features: expected .* \(4, 8, 12\)"),
        (lambda: viz.embedding_colours(LAYER.long()), TypeError, r"^features: expected .* int64"),
        (lambda: picture(image=IMAGE.numpy()), TypeError, "^image: expected an image .* got ndarray"),
        (
            lambda: picture(image=(255 * IMAGE).long()),
            TypeError,
            r"^image: expected floats in 0..1 or uint8, got int64",
        ),
        (lambda: picture(labels=LABELS[0].numpy()), TypeError, "^labels: expected .* got ndarray"),
        (lambda: picture(labels=LABELS), ValueError, r"^labels: expected the map \(H, W\) .* \(1, 32, 48\)"),
        (lambda: picture(labels=LABELS[0].float()), TypeError, "^labels: expected .* float32"),
        (lambda: picture(predictions=None), TypeError, "^predictions: expected .* got NoneType"),
        (lambda: picture(predictions=LAYER[0, :3]), ValueError, r"^predictions: expected logits with 4 channels"),
        (lambda: picture(predictions=LABELS[0].float()), ValueError, r"^predictions: expected .*float32"),
        (lambda: picture(sizes=8), TypeError, "^sizes: expected a list .* got int 8"),
        (lambda: picture(sizes=(8, 12)), TypeError, "^sizes: expected a pair .* got int 8"),
        (lambda: picture(sizes=[(8, 0)]), ValueError, "^sizes: expected an integer between 1 .* got 0"),
        (lambda: picture(sizes=[]), TypeError, "^sizes: expected a list"),
        (lambda: picture(image=IMAGE[0]), ValueError, r"^image: expected \(3, H, W\)"),
        (lambda: picture(class_names=["one"]), ValueError, "^class_names: expected 4 names"),
        (lambda: picture(ratio=2), ValueError, "^ratio: expected"),
        (lambda: viz.embeddings(IMAGE, [LAYER[0, :, :0]]), ValueError, r"^features\[0\]: expected .* \(4, 0, 12\)"),
        (lambda: viz.embeddings(IMAGE[:1], [LAYER[0]]), ValueError, r"^image: expected \(3, H, W\)"),
        (lambda: viz.embeddings([0], [LAYER[0]]), TypeError, "^image: expected an image .* got list"),
        (lambda: viz.embeddings(IMAGE, LAYER), TypeError, "^features: expected a list of feature maps"),
        (lambda: viz.embeddings(IMAGE, []), TypeError, "^features: expected a list of feature maps"),
        (lambda: viz.embeddings(IMAGE, [LAYER]), ValueError, r"^features\[0\]: expected the map \(D, h, w\)"),
        (lambda: viz.embeddings(IMAGE, [None]), TypeError, r"^features\[0\]: expected a feature map"),
        (lambda: viz.anchor_similarity(LAYER, LABELS, num_classes=4), TypeError, "^features: expected a list"),
        (
            lambda: viz.anchor_similarity([LAYER, LAYER[:, :3]], LABELS, num_classes=4),
            ValueError,
            r"^features\[1\]: expected 4 channels",
        ),
        (lambda: viz.anchor_similarity([LAYER], LABELS, num_classes=0), ValueError, "^num_classes: expected"),
        (
            lambda: viz.anchor_similarity([LAYER], LABELS, num_classes=4, class_names="abc"),
            ValueError,
            "^class_names: expected 4 names",
        ),
        (lambda: viz.similarity_curve({"miou": 1}), ValueError, r"^results: expected .* got \['miou'\]"),
        (lambda: viz.similarity_curve(LAYER), ValueError, "^results: expected .* got float32"),
        (lambda: viz.similarity_curve(ck.metrics.AnchorSimilarity(4).compute()), ValueError, "at least one batch"),
    ],
)
def test_errors_name_the_wrong_argument(call, exception, sentence):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with pytest.raises(exception, match=sentence):
        call()
