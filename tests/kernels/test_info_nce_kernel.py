"""The Triton kernels of ``info_nce`` against the reference, with the allowed errors of kernel_checks.py."""

import itertools

import numpy as np
import pytest
import torch
from info_nce_cases import SETS, chosen
from inputs import crossed, leaves
from kernel_checks import (
    DEVICE,
    DTYPES,
    NEEDS_TRITON,
    ON_COMPILED_CODE,
    assert_like_the_reference,
    poisoned_memory,  # noqa: F401 - a fixture for all tests here
    relative,
    run,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.library import opcheck

import contextrast_kernels as ck
from contextrast_kernels.info_nce import POSITIVES, _info_nce, _info_nce_backward

pytestmark = NEEDS_TRITON


def vectors(rng, n, D, dtype=torch.float64, scale=1.0):
    return torch.from_numpy(rng.standard_normal((n, D)) * (scale / D**0.5)).to(dtype).to(DEVICE)


def labels(rng, n, N=3, ignored=0.2):
    return torch.from_numpy(np.where(rng.random(n) < ignored, -1, rng.integers(0, N, n))).to(DEVICE)


def on_device(options):
    return {key: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for key, x in options.items()}


def loss_of(row_labels, column_labels=None, **options):
    """The loss as a function of the rows, or of rows and columns."""

    def loss(x, z=None):
        return ck.info_nce(x, row_labels, z, None if z is None else column_labels, **{"temperature": 0.2, **options})

    return loss


# R, C (None: the rows themselves), D: one row, one column, tails on every axis, more rows than a block, more columns
# than a program streams before others help it, channels below, between and above the chunks.
SHAPES = [
    (1, 9, 8),
    (9, 1, 8),
    (1, 1, 1),
    (70, 37, 20),
    (37, None, 20),
    (5, 300, 16),
    (4, 6, 100),
    (2, 3, 256),
    (2, None, 200),
]


@ON_COMPILED_CODE
@pytest.mark.parametrize(("shape", "form"), crossed(SHAPES, [*itertools.product(POSITIVES, DTYPES)]))
def test_every_shape_meets_the_contract(rng, shape, form):
    """In every run each shape is tested in one form and dtype, which differ from shape to shape."""
    (R, C, D), (positives, dtype) = shape, form
    x = [vectors(rng, n, D, dtype, 2.0) for n in (R, C) if n is not None]
    row_labels, column_labels = (None if n is None else labels(rng, n) for n in (R, C))
    assert_like_the_reference(loss_of(row_labels, column_labels, positives=positives), x)


@ON_COMPILED_CODE
@pytest.mark.parametrize(("case", "own"), crossed(list(itertools.product(SETS, POSITIVES)), [False, True]))
def test_every_set_of_negatives_and_weights(rng, case, own):
    kind, positives = case
    R, C = 9, 9 if own else 14
    x = [vectors(rng, n, 8) for n in ((R,) if own else (R, C))]
    options = on_device(chosen(rng, kind, R, C)) | {"positives": positives, "reduction": "none"}
    assert_like_the_reference(loss_of(labels(rng, R), labels(rng, C), **options), x)


@pytest.mark.slow  # in float64 gradients are the reference's, which are checked every day
@pytest.mark.parametrize(("positives", "own"), crossed(POSITIVES, [False, True]))
def test_gradient_equals_finite_differences(rng, own, positives):
    R, C = 5, 5 if own else 6
    x = [vectors(rng, n, 4).requires_grad_() for n in ((R,) if own else (R, C))]
    options = {} if own else {**on_device(chosen(rng, "names and weights", R, C)), "reduction": "none"}
    loss = loss_of(labels(rng, R, 2), labels(rng, C, 2), positives=positives, **options)
    with ck.backend("triton"):
        assert gradcheck(loss, x, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", SETS)
def test_every_element_of_the_gradient_equals_finite_differences(rng, kind, own, positives):
    R, C = 4, 4 if own else 5
    x = [vectors(rng, n, 3).requires_grad_() for n in ((R,) if own else (R, C))]
    options = on_device(chosen(rng, kind, R, C)) | {"positives": positives, "reduction": "none"}
    with ck.backend("triton"):
        assert gradcheck(loss_of(labels(rng, R, 2), labels(rng, C, 2), **options), x)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize(
    ("row_labels", "column_labels"),
    [
        ([-1, -1, -1], [0, 1, 1, 0]),
        ([0, 1, 0], [-1, -1, -1, -1]),
        ([0, 1, 0], [2, 3, 4, 5]),
        ([0, 0, 0], [0, 0, 0, 0]),
        ([0, 1, 2], [0, 0, 0, -1]),
        ([0, -1, 1], None),
        ([0, 0, 0], None),
        ([-1, -1, -1], None),
    ],
    ids=[
        "no valid row",
        "no valid column",
        "no positive",
        "no negative",
        "one class",
        "alone",
        "one own class",
        "none",
    ],
)
def test_nothing_to_contrast_gives_the_reference(rng, row_labels, column_labels, positives):
    x = [vectors(rng, n, 8) for n in ((3,) if column_labels is None else (3, 4))]
    tensors = [None if y is None else torch.tensor(y, device=DEVICE) for y in (row_labels, column_labels)]
    assert_like_the_reference(loss_of(*tensors, positives=positives), x)


@pytest.mark.parametrize(("R", "C", "D"), [(0, 4, 8), (3, 0, 8), (0, 0, 8), (0, None, 8), (3, 4, 0)])
def test_empty_matrices_give_zero(R, C, D):
    x = [torch.zeros(n, D, device=DEVICE, requires_grad=True) for n in (R, C) if n is not None]
    y = [None if n is None else torch.zeros(n, dtype=torch.int64, device=DEVICE) for n in (R, C)]
    with ck.backend("triton"):
        loss = loss_of(*y)(*x)
        gradients = torch.autograd.grad(loss, x)
    assert loss == 0
    assert [g.shape for g in gradients] == [leaf.shape for leaf in x]


def stepped(x):
    """The same values in a matrix without an axis of stride 1."""
    big = x.new_full((2 * x.shape[0], 3 * x.shape[1]), torch.nan)
    big[::2, 1::3] = x
    return big[::2, 1::3]


@pytest.mark.parametrize(
    "form",
    [lambda x: x.T.contiguous().T, stepped, lambda x: x[:1].expand(x.shape)],
    ids=["columns first", "neither axis of stride 1", "one row"],
)
@pytest.mark.parametrize("D", [8, pytest.param(130, marks=pytest.mark.slow)])
def test_layouts_of_matrices_and_labels_do_not_matter(rng, form, D):
    """Matrices stored column by column, slices, and expanded rows, each with label vectors of the same kind."""
    x, z = form(vectors(rng, 5, D, torch.float32)), form(vectors(rng, 7, D, torch.float32))
    y, c = (labels(rng, 2 * n)[::2] for n in (5, 7))
    weights = torch.rand(14, device=DEVICE)[::2]
    plain = loss_of(y.contiguous(), c.contiguous(), column_weights=weights.contiguous(), reduction="none")
    given = loss_of(y, c, column_weights=weights, reduction="none")
    with ck.backend("triton"):
        value, gradient = run(given, [x, z])
        expected, expected_gradient = run(plain, [x.contiguous(), z.contiguous()])
        own, own_gradient = run(loss_of(y), [x])
        expected_own, expected_own_gradient = run(loss_of(y), [x.contiguous()])
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(own, expected_own)
    assert torch.equal(own_gradient, expected_own_gradient)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes_do_not_matter(rng, dtype):
    x, z = vectors(rng, 6, 8), vectors(rng, 7, 8)
    y, c = labels(rng, 6), labels(rng, 7)
    ignore_index = 255 if dtype == torch.uint8 else -1
    with ck.backend("triton"):
        expected = loss_of(y, c)(x, z)
        assert torch.equal(loss_of(y.to(dtype), c.to(dtype), ignore_index=ignore_index)(x, z), expected)
        assert torch.equal(
            loss_of(y, torch.where(c < 0, ignore_index, c).to(dtype), ignore_index=-1)(x, z), expected
        ) or (dtype == torch.uint8)


@pytest.mark.parametrize("names", [[1, 1 + 2**8, 1 + 2**16], [0, 2**32, 2**33], [-(2**63), 2**63 - 1, -2]], ids=str)
@pytest.mark.parametrize("ignore_index", [-1, 2**40, -(2**63) + 1])
def test_labels_are_compared_in_64_bits(rng, names, ignore_index):
    x, z = vectors(rng, 6, 8), vectors(rng, 7, 8)
    y, c = labels(rng, 6), labels(rng, 7)
    table = torch.tensor([*names, ignore_index], device=DEVICE)
    with ck.backend("triton"):
        loss = loss_of(table[y], table[c], ignore_index=ignore_index)(x, z)
        assert torch.equal(loss, loss_of(y, c)(x, z))


def test_ignore_indices_that_no_label_can_have(rng):
    """-100 is not equal to a uint8 156, and 2⁴⁰ is not an int32. Padding after the last row and column still does not
    count."""
    x = vectors(rng, 5, 8)
    y = torch.tensor([156, 156, 3, 0, 0], device=DEVICE)
    for dtype, ignore_index in ((torch.uint8, -100), (torch.int32, 2**40), (torch.uint8, 2**32), (torch.int16, -1)):
        assert_like_the_reference(loss_of(y.to(dtype), ignore_index=ignore_index), [x])


@pytest.mark.parametrize(
    ("bad", "positives"), [(float("nan"), "supcon"), (float("inf"), "pooled"), (-float("inf"), "each")]
)
@pytest.mark.parametrize(
    "where", ["row", "positive column", "negative column", "row without a positive", "row without a negative", "alone"]
)
def test_a_nonfinite_vector_is_never_hidden(bad, where, positives):
    x, y = torch.full((3, 3), 0.5, device=DEVICE), torch.tensor([0, 1, -1], device=DEVICE)
    z, c = torch.full((4, 3), 0.3, device=DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)
    if where == "row":
        x[1, 0] = bad
    elif where.endswith("column"):
        y[1] = 0
        z[0 if where == "positive column" else 1, 1] = bad
    else:
        x[1, 2] = bad
        y[1] = 5 if where == "row without a positive" else 0
        c[:] = {"row without a positive": c, "row without a negative": 0, "alone": -1}[where]
    for reduction in ("mean", "none"):
        with ck.backend("triton"):
            loss = loss_of(y, c, positives=positives, reduction=reduction)(x, z)
        with ck.backend("reference"):
            expected = loss_of(y, c, positives=positives, reduction=reduction)(x, z)
        assert loss.isnan().tolist() == expected.isnan().tolist()
        assert loss.isnan().any()
    assert loss[2] == 0  # an ignored row


@pytest.mark.parametrize("positives", POSITIVES)
def test_ignored_nonfinite_vectors_change_nothing(rng, positives):
    y, c = labels(rng, 9, ignored=0.4), labels(rng, 70, ignored=0.4)
    c[:64] = -1  # a tile of nothing but ignored columns
    weights = torch.rand(70, device=DEVICE)
    rows, columns = vectors(rng, 9, 8), vectors(rng, 70, 8)
    results = []
    for value in (0.0, float("nan"), float("inf")):
        x = torch.where(y[:, None] == -1, value, rows)
        z = torch.where(c[:, None] == -1, value, columns)
        w = torch.where(c == -1, value - 1, weights)
        with ck.backend("triton"):
            cross = run(loss_of(y, c, positives=positives, column_weights=w), [x, z])
            results.append((*cross, *run(loss_of(y, positives=positives), [x])))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))
    assert results[0][1].isfinite().all()


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_invalid_weight_gives_nan(rng, positives, weight):
    x, z, y, c = vectors(rng, 4, 8), vectors(rng, 5, 8), labels(rng, 4, ignored=0), labels(rng, 5, ignored=0)
    weights = torch.ones(5, device=DEVICE)
    weights[3] = weight
    with ck.backend("triton"):
        assert loss_of(y, c, positives=positives, column_weights=weights, reduction="none")(x, z).isnan().all()


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_similarities_neither_overflow_nor_vanish(rng, positives, dtype):
    """With |x| of 10⁴ and τ = 0.01, s is ± 10¹⁰ and more, and its last bit is far above 1. The weights of a row must
    still have the right sum."""
    x, z = (vectors(rng, n, 16, dtype, 4e4) for n in (6, 40))
    y, c = labels(rng, 6, ignored=0), labels(rng, 40, ignored=0)
    loss = loss_of(y, c, positives=positives, temperature=0.01)
    assert_like_the_reference(lambda x, z: loss(x, z) / 2**60, [x, z])


@pytest.mark.parametrize("positives", POSITIVES)
def test_a_share_is_at_most_one_however_s_is_rounded(positives):
    """The backward pass recomputes s. With huge similarities a different order of summation may put s above Z, and the
    share exp(s - Z) must then still be at most 1. The test makes Z and Y smaller by 3."""
    x, z = torch.tensor([[1.0]], device=DEVICE), torch.tensor([[0.0], [1.0]], device=DEVICE)
    tensors = (x, torch.tensor([0], device=DEVICE), z, torch.tensor([0, 1], device=DEVICE), None, None, None)
    loss, count, kept = _info_nce(*tensors, 0.01, -1, positives, "mean")
    lower = kept.clone()
    lower[:2] -= 3
    for toward in ("rows", "columns"):
        options = (0.01, -1, positives, toward)
        expected, gradient = (_info_nce_backward(loss, *tensors, count, of_row, *options) for of_row in (kept, lower))
        assert expected.any()
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_well_separated_classes_keep_their_small_losses(dtype):
    y = torch.tensor([0, 1] * 4, device=DEVICE)
    x = torch.zeros(8, 8, device=DEVICE, dtype=dtype)
    x[:, 0] = (1 - 2 * y).to(dtype)
    for positives in ("each", "pooled"):
        assert_like_the_reference(loss_of(y, positives=positives, temperature=0.1), [x])


@ON_COMPILED_CODE
def test_two_runs_agree_bit_by_bit(rng):
    x, z, y, c = vectors(rng, 5, 16), vectors(rng, 300, 16), labels(rng, 5), labels(rng, 300)
    with ck.backend("triton"):
        first, second = (run(loss_of(y, c), [x, z]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_splitting_the_columns_changes_rounding_alone(rng, monkeypatch):
    from contextrast_kernels.kernels import info_nce as kernels

    x, z, y, c = vectors(rng, 3, 8), vectors(rng, 300, 8), labels(rng, 3), labels(rng, 300)
    with ck.backend("triton"):
        split = run(loss_of(y, c, positives="pooled"), [x, z])
        monkeypatch.setattr(kernels, "PROGRAMS", 1)
        whole = run(loss_of(y, c, positives="pooled"), [x, z])
    assert relative(split[0], whole[0]) < 1e-14
    assert relative(split[1], whole[1]) < 1e-13
    assert not torch.equal(split[1], whole[1])


def test_blocks_of_ignored_rows_meet_the_contract(rng):
    """Blocks of ignored rows and of ignored columns, before, between and after valid ones."""
    x, y = vectors(rng, 100, 8), labels(rng, 100)
    y[:33], y[40:] = -1, -1
    assert_like_the_reference(loss_of(y, positives="pooled", reduction="none"), [x])
    z, c = vectors(rng, 40, 8), labels(rng, 40)
    assert_like_the_reference(loss_of(y, c), [x, z])
    assert_like_the_reference(loss_of(c, y), [z, x])


@pytest.mark.parametrize("positives", ["supcon", "pooled"])
def test_sums_of_many_splits_are_added(rng, positives):
    """There are more splits than are added at a time, and some are empty. Their maxima and the sums relative to these
    give the sum of all."""
    from triton import language as tl

    from contextrast_kernels.kernels import _launch
    from contextrast_kernels.kernels import info_nce as kernels

    splits, R = 40, 5
    sums = torch.from_numpy(rng.uniform(1, 9, (splits, 4, R)) * [[[5], [1], [5], [1]]]).to(DEVICE)
    sums[:17:4, 0], sums[:17:4, 1] = -torch.inf, 0
    losses, kept = sums.new_empty(R), sums.new_empty(4, R)
    rows = kernels.Rows(torch.zeros(R, dtype=torch.int64, device=DEVICE), None, *_launch.encode_ints([1, 0]))
    given = {"log_sums": sums, "terms": None, "rows": rows, "losses": losses, "kept": kept}
    form = {"HELD": 16, "FORM": kernels.Form(False, positives, tl.int64), "NUMBERS": 4}
    _launch.launch(kernels._info_nce_rows, (1,), {**given, "ignore_index": -1, "R": R, "splits": splits}, form)
    log_sum, other = ((sums[:, i] + sums[:, i + 1].log()).logsumexp(0) for i in (0, 2))
    if positives == "supcon":
        expected = log_sum - sums[:, 3].sum(0) / sums[:, 2].sum(0)
    else:
        expected = torch.nn.functional.softplus(log_sum - other)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(kept[0], log_sum, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_many_splits_of_the_columns(rng):
    """There are more splits than are added at a time."""
    x, z, y, c = vectors(rng, 2, 4), vectors(rng, 2300, 4), labels(rng, 2, ignored=0), labels(rng, 2300)
    assert_like_the_reference(loss_of(y, c), [x, z])


def test_columns_in_the_order_of_their_classes(rng):
    """Most tiles then have no positive and are skipped."""
    x, z, y = vectors(rng, 4, 8), vectors(rng, 260, 8), torch.tensor([2, 2, 2, -1], device=DEVICE)
    c = torch.arange(260, device=DEVICE) // 65
    assert_like_the_reference(loss_of(y, c), [x, z])


# ------------------------------------------------------------------------------------------------------ as an op


@ON_COMPILED_CODE
@pytest.mark.parametrize(("reduction", "own"), [("mean", False), ("none", True)])
def test_ops_pass_opcheck(rng, own, reduction):
    x, z, y, c = vectors(rng, 4, 8), vectors(rng, 5, 8), labels(rng, 4, ignored=0), labels(rng, 5, ignored=0)
    tensors = (x, y, None, None) if own else (x, y, z, c)
    sets = on_device(chosen(rng, "names and weights", 4, 4 if own else 5))
    sets = (y, sets["column_negatives"], sets["column_weights"])
    with_graph = tuple(t.clone().requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors)
    opcheck(_info_nce, (*with_graph, *sets, 0.2, -1, "each", reduction))
    loss, count, kept = _info_nce(*tensors, *sets, 0.2, -1, "each", reduction)
    for toward in ("both",) if own else ("rows", "columns"):
        arguments = (*tensors, *sets, count, kept, 0.2, -1, "each", toward)
        opcheck(_info_nce_backward, (torch.ones_like(loss), *arguments))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile_serves_every_number_of_rows_and_columns(rng, own, compiler):
    """Dynamic R and C, one graph; values and gradients bit for bit as without."""

    def loss(x, y, z, c):
        return ck.info_nce(x, y, *(() if own else (z, c)), positives="pooled")

    torch._dynamo.reset()
    graphs = CompileCounterWithBackend(compiler)
    compiled = torch.compile(loss, backend=graphs, fullgraph=True, dynamic=True)
    frames = []
    with ck.backend("triton"):
        for R, C in ((5, 9), (6, 7), (12, 3)):
            inputs = leaves([vectors(rng, R, 8), vectors(rng, C, 8)])
            y, c = labels(rng, R), labels(rng, C)
            values = [f(inputs[0], y, inputs[1], c) for f in (compiled, loss)]
            gradients = [torch.autograd.grad(v, inputs[: 1 if own else 2]) for v in values]
            assert torch.equal(*values)
            assert all(torch.equal(a, b) for a, b in zip(*gradients))
            frames.append(graphs.frame_count)
    assert frames == [frames[0]] * 3


@ON_COMPILED_CODE
def test_autocast_changes_nothing(rng):
    inputs, y, c = (
        leaves([vectors(rng, 4, 8, torch.float32), vectors(rng, 5, 8, torch.float32)]),
        labels(rng, 4),
        labels(rng, 5),
    )
    results = []
    with ck.backend("triton"):
        for enabled in (False, True):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
                loss = loss_of(y, c)(*inputs)
            results.append((loss, *torch.autograd.grad(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_unrequested_gradients_are_not_computed(rng, wanted, monkeypatch):
    from contextrast_kernels.kernels import _launch

    x, z = (v.requires_grad_(w) for v, w in zip((vectors(rng, 3, 8), vectors(rng, 4, 8)), wanted))
    launched = []
    launch = _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda *a, **k: launched.append(a[0].fn.__name__) or launch(*a, **k))
    with ck.backend("triton"):
        loss_of(labels(rng, 3), labels(rng, 4))(x, z).backward()
    assert launched.count("_info_nce_bwd") == 1
    assert (x.grad is not None, z.grad is not None) == wanted


def test_double_backward_raises_a_clear_error(rng):
    x, y = vectors(rng, 3, 8).requires_grad_(), labels(rng, 3, ignored=0)
    with ck.backend("triton"):
        (gradient,) = torch.autograd.grad(loss_of(y)(x), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^info_nce: the fused kernels do not support double backward.*backend\('reference'\)"
    ):
        gradient.sum().backward()


def test_more_channels_than_the_kernels_take(rng):
    x, y = vectors(rng, 3, 1025), labels(rng, 3)
    with ck.backend("triton"), pytest.raises(RuntimeError, match="at most 1024 channels, got 1025"):
        loss_of(y)(x)
    with ck.backend("auto"):
        assert loss_of(y)(x).isfinite()


def test_the_plan_counts_launches_and_bytes():
    """24 rows against a bank of 190000: two sweeps of the bank forward, one for each gradient."""
    from contextrast_kernels.kernels._tile_table import PROGRAMS
    from contextrast_kernels.plan import info_nce_launches, moved

    launches = info_nce_launches(24, 190_000, 256)
    names = [launch.kernel.fn.__name__ for launch in launches]
    assert names == [
        *("_info_nce_log_sums", "_info_nce_terms", "_info_nce_rows", "_info_nce_mean"),
        *("_info_nce_bwd", "_add_splits", "_info_nce_bwd"),
    ]
    bank = 190_000 * 256 * 2
    sweeps = [launch for launch in launches if moved(launch)[0] >= bank]
    assert len(sweeps) == 4
    assert sum(moved(launch)[1] for launch in sweeps) < 1.1 * bank
    assert all(np.prod(launch.grid) >= PROGRAMS // 2 for launch in sweeps)
    assert len(info_nce_launches(1024, None, 256, positives="pooled")) <= 5


# ------------------------------------------------------------------------------------------------------ larger
