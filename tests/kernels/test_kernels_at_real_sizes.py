"""The fused loss on the cases of the paper: at full size on a GPU, on a CPU the same lines with tiny twins, as slow
tests. Precision of bfloat16 and TF32, CUDA graphs, synchronisation, memory, more than 2³¹ elements."""

from dataclasses import replace

import pytest
import torch
from kernel_checks import (
    DEVICE,
    NEEDS_TRITON,
    assert_like_the_reference,
    poisoned_memory,  # noqa: F401 - a fixture for all tests here
    relative,
    run,
)

import contextrast_kernels as ck
from contextrast_kernels import cases
from contextrast_kernels.maps import targets, to_size

pytestmark = NEEDS_TRITON


def at_real_size(name: str, dtype=torch.bfloat16, **changes):
    """The named case's inputs on a GPU, those of its tiny twin on a CPU; and the loss of its features alone."""
    case = replace(cases.CASES[name], dtype=dtype, **changes)
    if DEVICE == "cpu":
        case = case.tiny()
    inputs = case.inputs(DEVICE)
    xs = [x.requires_grad_() for x in inputs.features]

    def loss(*xs, **options):
        return ck.contextrast_loss(
            list(xs), inputs.labels, inputs.predictions, **{**case.loss_options, "seed": 5, **options}
        )

    return xs, inputs, loss, case


AT_REAL_SIZE = pytest.mark.gpu if DEVICE == "cuda" else pytest.mark.slow
"""On a GPU at full size; on a CPU, among the slow tests, the same lines with tiny twins."""


@AT_REAL_SIZE
@pytest.mark.parametrize("regime", cases.REGIMES)
def test_every_regime_meets_the_contract(regime):
    """bfloat16 on the device, from trained errors to one wrong class without an edge."""
    xs, _, loss, _ = at_real_size("cityscapes", batch=2, regime=regime)
    assert_like_the_reference(loss, xs)


@AT_REAL_SIZE
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_every_dtype_meets_the_contract(dtype):
    """TF32 as the device computes it stays within the contract of float32."""
    xs, _, loss, _ = at_real_size("cityscapes", dtype, batch=1)
    assert_like_the_reference(loss, xs)


@AT_REAL_SIZE
@pytest.mark.parametrize("name", ["ade20k", "camvid"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_precision_of_other_cases_and_layouts(name, layout):
    """150 classes; and rows of 30 and 15 pixels, which no 16-byte load fits."""
    xs, _, loss, _ = at_real_size(name, batch=2, layout=layout)
    assert_like_the_reference(loss, xs)


@AT_REAL_SIZE
@pytest.mark.parametrize(("name", "rate"), [("cityscapes", 0.01), ("cityscapes", 1.0), ("ade20k", 1.0)])
def test_dense_negatives_meet_the_contract(name, rate):
    xs, _, loss, _ = at_real_size(name, batch=1)
    assert_like_the_reference(lambda *xs: loss(*xs, base_rate=rate), xs)


@AT_REAL_SIZE
@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scaled_features_keep_the_precision(scale, dtype):
    if dtype == torch.float16 and scale > 1:
        scale = 1e3  # 1e4 leaves float16's range
    xs, _, loss, _ = at_real_size("cityscapes", dtype, batch=1)
    assert_like_the_reference(loss, [(x.detach() * scale).requires_grad_() for x in xs])


@AT_REAL_SIZE
@pytest.mark.parametrize("size", [(92, 120), (388, 388)], ids=["23x30", "97x97"])
def test_odd_sizes_meet_the_contract(size):
    height, width = size
    xs, _, loss, case = at_real_size("camvid", batch=2, height=height, width=width)
    if DEVICE == "cuda":
        assert case.sizes[0] == {92: (23, 30), 388: (97, 97)}[height]
    assert_like_the_reference(loss, xs)


@AT_REAL_SIZE
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_pixels_of_a_real_batch(bad, layout):
    """At ignored pixels of every layer: the same bits. At one valid pixel: NaN."""
    xs, inputs, loss, case = at_real_size("cityscapes", batch=2, layout=layout)
    inputs.labels[0, 0, 0] = 255  # what the first pixel of every layer is given
    with ck.backend("triton"):
        clean = run(loss, xs)
        for x in xs:
            ignored = targets(inputs.labels, x.shape[2:], case.num_classes, 255) < 0
            x.data[:, 3].masked_fill_(ignored, bad)
            assert ignored[0, 0, 0]
        dirty = run(loss, xs)
        assert torch.equal(clean[0], dirty[0])
        assert torch.equal(clean[1], dirty[1])
        last = targets(inputs.labels, xs[-1].shape[2:], case.num_classes, 255)
        b, r, c = (last >= 0).nonzero()[-1].tolist()
        xs[-1].data[b, -1, r, c] = bad
        assert loss(*xs).isnan()


@AT_REAL_SIZE
@pytest.mark.parametrize("feature_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing_at_real_size(feature_dtype, autocast_dtype):
    xs, _, loss, _ = at_real_size("cityscapes", feature_dtype, batch=1)
    with ck.backend("triton"):
        plain = run(loss, xs)
        with torch.autocast(DEVICE, autocast_dtype):
            cast = run(loss, xs)
    assert torch.equal(plain[0], cast[0])
    assert torch.equal(plain[1], cast[1])


@AT_REAL_SIZE
@pytest.mark.parametrize("options", [{}, {"base_rate": 0.01}], ids=["hard", "dense"])
def test_fifty_runs_agree_bit_by_bit(options):
    xs, _, loss, _ = at_real_size("cityscapes", batch=2)
    with ck.backend("triton"):
        first = run(lambda *xs: loss(*xs, **options), xs)
        for _ in range(50 if DEVICE == "cuda" else 2):
            again = run(lambda *xs: loss(*xs, **options), xs)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])


@AT_REAL_SIZE
def test_flags_for_tf32_move_no_bit():
    """The kernels' precision is their own."""
    xs, _, loss, _ = at_real_size("cityscapes", torch.float32, batch=1)
    before = torch.get_float32_matmul_precision()
    results = []
    try:
        for precision in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with ck.backend("triton"):
                results.append(run(loss, xs))
    finally:
        torch.set_float32_matmul_precision(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


def training_step(name: str, layout: str = "nchw", base_rate: float = 0.0, **changes):
    """A step whose parameters are the features and logits themselves: cross-entropy + 0.1 of the loss, backward, SGD.
    Predictions follow from the logits, so they change with every step. Returns step() and what it reads and writes."""
    xs, inputs, _, case = at_real_size(name, layout=layout, **changes)
    logits = inputs.logits.detach().float().requires_grad_()
    criterion = ck.ContextrastLoss(**case.loss_options, base_rate=base_rate).to(DEVICE)
    labels = inputs.labels
    h, w = logits.shape[2:]
    # The loss is a mean over pixels, so each gets a small gradient. Without the number of pixels in the learning rate
    # a step would be lost in bfloat16's rounding.
    optimizer = torch.optim.SGD([*xs, logits], lr=0.3 * labels.shape[0] * h * w, momentum=0.9)

    def step():
        optimizer.zero_grad(set_to_none=False)
        flat = logits.movedim(1, -1).flatten(0, -2)  # whose cross-entropy is deterministic on a GPU
        classes = to_size(labels, h, w).flatten()
        loss = torch.nn.functional.cross_entropy(flat, classes, ignore_index=255)
        loss = loss + 0.1 * criterion(xs, labels, logits)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, labels, criterion, [*xs, logits]


BASE_RATES = pytest.mark.parametrize("base_rate", [0.0, 0.01], ids=["hard", "dense"])


@AT_REAL_SIZE
@BASE_RATES
def test_a_step_learns(base_rate):
    """What the captured step does, in eager mode: features and logits move, the loss falls by more than other seeds
    move it, and the seed advances."""
    step, _, criterion, parameters = training_step("cityscapes", base_rate=base_rate, batch=1)
    before = [x.detach().clone() for x in parameters]
    with ck.backend("triton"):
        losses = [step().item() for _ in range(6)]
    assert losses[-1] < 0.7 * losses[0]
    assert criterion.seed.item() == 6
    for i in (0, -1):  # the last layers of a tiny twin have no errors
        assert not torch.equal(parameters[i], before[i])


@pytest.mark.gpu
@BASE_RATES
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_training_step_in_a_cuda_graph(layout, base_rate):
    """Captured once and replayed 25 times with other labels, other predictions and an advancing seed: after each
    replay loss and parameters are, bit by bit, what the same steps give in eager mode."""
    step, labels, criterion, parameters = training_step("cityscapes", layout, base_rate, batch=2)
    eager_step, eager_labels, eager_criterion, eager_parameters = training_step(
        "cityscapes", layout, base_rate, batch=2
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(3):
        eager_step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    for replay in range(25):
        for tensor in (labels, eager_labels):
            tensor.copy_(tensor.roll(7 + replay, 2))
        graph.replay()
        expected = eager_step()
        assert torch.equal(loss, expected)
        assert criterion.seed.item() == eager_criterion.seed.item() == 4 + replay
        for ours, theirs in zip(parameters, eager_parameters):
            assert torch.equal(ours, theirs)


@pytest.mark.gpu
@BASE_RATES
@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "camvid"])
def test_a_step_never_synchronises(name, base_rate):
    step, *_ = training_step(name, base_rate=base_rate, batch=2)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("name", ["cityscapes", "ade20k", "camvid"])
def test_memory_beside_features_and_gradients(name, layout):
    """At most 3 % of the features' bytes, negatives included."""
    xs, _, loss, case = at_real_size(name, layout=layout)
    torch.autograd.grad(loss(*xs), xs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = torch.autograd.grad(loss(*xs), xs)
    torch.cuda.synchronize()
    assert len(gradients) == len(xs)
    assert torch.cuda.max_memory_allocated() - before - case.feature_bytes <= 0.03 * case.feature_bytes


@pytest.mark.gpu
def test_kernels_run_on_the_current_stream():
    """The features come late on that stream: a kernel on any other would read what was there before."""
    xs, _, loss, _ = at_real_size("cityscapes", batch=2)
    expected = run(loss, xs)
    late = [torch.zeros_like(x).requires_grad_() for x in xs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # clock cycles: about a tenth of a second
        for x, given in zip(late, xs):
            x.data.copy_(given)
        ours = run(loss, late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def a_corner_of(shape, crop=(6, 9), N=3):
    """Features (B, D, h, w) in float16 whose labels are ignored but in the last corner of the last image, where half
    of the predictions are wrong; and that corner alone, which gives the same loss: with ratio 1 no hash takes part."""
    B, _, h, w = shape
    generator = torch.Generator(DEVICE).manual_seed(3)
    x = torch.randn(shape, dtype=torch.float16, device=DEVICE, generator=generator)
    rows, columns = crop
    corner = torch.randint(N, (1, *crop), generator=torch.Generator().manual_seed(4)).to(DEVICE)
    labels = torch.full((B, h, w), 255, dtype=torch.uint8, device=DEVICE)
    labels[-1, -rows:, -columns:] = corner[0].byte()
    predictions = labels.clone()
    predictions[:, :, ::2] = (predictions[:, :, ::2] + 1) % N
    crops = [tensor[-1:, ..., -rows:, -columns:].clone() for tensor in (x, labels, predictions)]
    return (x, labels, predictions), crops


def assert_the_corner_is_all(shape, options):
    (x, labels, predictions), crops = a_corner_of(shape)

    def loss(x, labels, predictions):
        return ck.contextrast_loss([x], labels, predictions, num_classes=3, layer_weights=(1.0,), ratio=1.0, **options)

    x.requires_grad_()
    with ck.backend("triton"):
        value = loss(x, labels, predictions)
        (gradient,) = torch.autograd.grad(value, x)
    own = crops[0].double().requires_grad_()
    with ck.backend("reference"):
        expected = loss(own, *crops[1:])
        (expected_gradient,) = torch.autograd.grad(expected, own)
    assert relative(value.double(), expected) <= 1e-5
    rows, columns = own.shape[2:]
    corner = gradient[-1:, :, -rows:, -columns:]
    # Half an ulp of float16, and room for its smallest numbers.
    torch.testing.assert_close(corner.double(), expected_gradient, rtol=2**-10, atol=2**-24)
    corner.zero_()
    assert not gradient.any()


@pytest.mark.parametrize("options", [{}, {"base_rate": 1.0}], ids=["hard", "dense"])
@pytest.mark.parametrize(
    "shape", [pytest.param((2, 8, 12, 20), id="small", marks=AT_REAL_SIZE),
              # Offsets past 2³¹ across images; and inside one.
              pytest.param((9, 256, 1024, 1024), id="many images", marks=pytest.mark.gpu),
              pytest.param((1, 256, 4096, 2304), id="one image", marks=pytest.mark.gpu)],
)  # fmt: skip
def test_more_than_two_billion_elements(shape, options):
    """Forward and backward, exact in the only corner that counts and zero everywhere else."""
    assert_the_corner_is_all(shape, options)
