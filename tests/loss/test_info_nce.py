"""The rows-against-columns contrast of info_nce against loops, hand-worked numbers and central differences."""

import math

import literal
import numpy as np
import pytest
import torch
from info_nce_cases import SETS, chosen
from inputs import leaves
from torch.autograd import gradcheck, gradgradcheck

import contextrast_kernels as ck
from contextrast_kernels.info_nce import POSITIVES

pytestmark = pytest.mark.usefixtures("reference")

TIGHT = {"rel": 1e-12, "abs": 1e-13}


def case(rng, R=9, C=14, D=4, N=3, ignored=0.2, dtype=torch.float64):
    def labels(n):
        return torch.from_numpy(np.where(rng.random(n) < ignored, -1, rng.integers(0, N, n)))

    rows, columns = (torch.from_numpy(rng.standard_normal((n, D)) * 0.4).to(dtype) for n in (R, C))
    return rows, labels(R), columns, labels(C)


def literal_loss(rows, row_labels, columns=None, column_labels=None, **options):
    def plain(x):
        return x.detach().numpy() if isinstance(x, torch.Tensor) else x

    tensors = (rows, row_labels, columns, column_labels)
    return literal.info_nce(*map(plain, tensors), **{key: plain(value) for key, value in options.items()})


def test_hand_worked_loss():
    """tau = 1, D = 1. Row 2 (label 0) against columns 1, 3 (label 0) and -1, 0.5 (label 1), and 9 (ignored).

    s = 2, 6 | -2, 1; Z = log(e^-2 + e); its mean is (softplus(Z - 2) + softplus(Z - 6)) / 2. Row 1 (label 7) has no
    positive and adds 0. The ignored row does not count: the loss is the first row's mean over two rows.
    """
    rows = torch.tensor([[2.0], [1.0], [5.0]], dtype=torch.float64)
    columns = torch.tensor([[1.0], [3.0], [-1.0], [0.5], [9.0]], dtype=torch.float64)
    loss = ck.info_nce(rows, torch.tensor([0, 7, -1]), columns, torch.tensor([0, 0, 1, 1, -1]), temperature=1.0)
    z = math.log(math.exp(-2) + math.exp(1))
    expected = (math.log1p(math.exp(z - 2)) + math.log1p(math.exp(z - 6))) / 2 / 2
    assert loss.item() == pytest.approx(expected)


def test_hand_worked_loss_of_rows_against_themselves():
    """Rows 1, 1, -1, labels 0, 0, 1, tau = 0.5: rows 0 and 1 have s = 2, Z = -2; row 2 has no positive."""
    rows = torch.tensor([[1.0], [1.0], [-1.0]], dtype=torch.float64)
    loss = ck.info_nce(rows, torch.tensor([0, 0, 1]), temperature=0.5)
    assert loss.item() == pytest.approx(2 / 3 * math.log1p(math.exp(-4)))


def test_hand_worked_loss_of_the_other_forms():
    """The first row above. With "supcon" both positives are in the denominator; with "pooled" their sum is on top.
    The third column counts thrice, the second half."""
    rows = torch.tensor([[2.0]], dtype=torch.float64)
    columns = torch.tensor([[1.0], [3.0], [-1.0], [0.5]], dtype=torch.float64)
    weights = torch.tensor([1.0, 0.5, 3.0, 1.0])
    labels = (torch.tensor([0]), columns, torch.tensor([0, 0, 1, 1]))
    a, b, c, d = (math.exp(s) for s in (2, 6, -2, 1))

    def loss(**options):
        return ck.info_nce(rows, *labels, temperature=1.0, **options).item()

    assert loss(positives="supcon") == pytest.approx(
        -(math.log(a / (a + b + c + d)) + math.log(b / (a + b + c + d))) / 2
    )
    assert loss(positives="pooled") == pytest.approx(-math.log((a + b) / (a + b + c + d)))
    everything = a + 0.5 * b + 3 * c + d
    assert loss(positives="supcon", column_weights=weights) == pytest.approx(
        -(math.log(a / everything) + 0.5 * math.log(b / everything)) / 1.5
    )
    assert loss(positives="pooled", column_weights=weights) == pytest.approx(-math.log((a + 0.5 * b) / everything))
    assert loss(positives="each", column_weights=weights) == pytest.approx(
        -(math.log(a / (a + 3 * c + d)) + 0.5 * math.log(b / (b + 3 * c + d))) / 1.5
    )


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("own", [False, True])
def test_every_form_equals_the_loops(rng, kind, positives, own):
    for R, C in ((9, 14), (1, 5), (5, 1), (20, 3)):
        rows, row_labels, columns, column_labels = case(rng, R=R, C=C)
        options = chosen(rng, kind, R, R if own else C) | {"temperature": 0.2, "positives": positives}
        arguments = (rows, row_labels) if own else (rows, row_labels, columns, column_labels)
        terms = ck.info_nce(*arguments, **options, reduction="none")
        assert (terms.shape, terms.dtype) == ((R,), torch.float64)
        assert terms.tolist() == pytest.approx(literal_loss(*arguments, **options, reduction="none"), **TIGHT)
        assert ck.info_nce(*arguments, **options).item() == pytest.approx(literal_loss(*arguments, **options), **TIGHT)


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("positives", POSITIVES)
def test_every_form_is_twice_differentiable(rng, kind, positives):
    rows, row_labels, columns, column_labels = case(rng, R=5, C=6, D=2)
    options = chosen(rng, kind, 5, 6) | {"temperature": 0.5, "positives": positives, "reduction": "none"}
    inputs = leaves([rows, columns])

    def loss(x, c):
        return ck.info_nce(x, row_labels, c, column_labels, **options)

    assert gradcheck(loss, inputs)
    assert gradgradcheck(loss, inputs, fast_mode=True)


@pytest.mark.parametrize("positives", POSITIVES)
def test_a_weight_is_a_number_of_copies(rng, positives):
    rows, row_labels, columns, column_labels = case(rng)
    copies = torch.from_numpy(rng.integers(0, 4, 14))
    weighted = ck.info_nce(
        rows, row_labels, columns, column_labels, column_weights=copies.double(), positives=positives
    )
    copied = columns.repeat_interleave(copies, 0), column_labels.repeat_interleave(copies)
    assert weighted.item() == pytest.approx(ck.info_nce(rows, row_labels, *copied, positives=positives).item(), **TIGHT)


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_invalid_weight_gives_nan_unless_ignored(rng, positives, weight):
    rows, row_labels, columns, column_labels = case(rng)
    weights = torch.ones(14)
    clean = ck.info_nce(rows, row_labels, columns, column_labels, column_weights=weights, positives=positives)
    valid = column_labels != -1
    ignored = ck.info_nce(
        rows, row_labels, columns, column_labels, column_weights=weights.where(valid, weight), positives=positives
    )
    assert torch.equal(ignored, clean)
    weights[valid.nonzero()[0]] = weight
    arguments = (rows, row_labels, columns, column_labels)
    assert ck.info_nce(*arguments, column_weights=weights, positives=positives).isnan()
    of_rows = ck.info_nce(*arguments, column_weights=weights, positives=positives, reduction="none")
    assert torch.equal(of_rows.isnan(), row_labels != -1)  # every valid row, whether or not the column is in a term


def test_supcon_of_rows_without_a_negative_contrasts_their_positives(rng):
    """As published, the loss is the log of the sum over the positives divided by each of them. The two other forms are
    0 here."""
    rows, _, columns, _ = case(rng)
    labels = (torch.zeros(9).long(), columns, torch.zeros(14).long())
    s = rows @ columns.T / 0.1
    expected = (s.logsumexp(1) - s.mean(1)).mean()
    assert ck.info_nce(rows, *labels, positives="supcon").item() == pytest.approx(expected.item(), **TIGHT)
    for positives in ("each", "pooled"):
        assert ck.info_nce(rows, *labels, positives=positives) == 0


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("ignore_index", [-1, 2, 255])
def test_loss_equals_the_loops(rng, own, ignore_index):
    for R, C in ((9, 14), (1, 5), (5, 1), (20, 3)):
        rows, row_labels, columns, column_labels = case(rng, R=R, C=C)
        columns, column_labels = (None, None) if own else (columns, column_labels)
        loss = ck.info_nce(rows, row_labels, columns, column_labels, temperature=0.2, ignore_index=ignore_index)
        assert (loss.shape, loss.dtype) == ((), torch.float64)
        expected = literal_loss(rows, row_labels, columns, column_labels, temperature=0.2, ignore_index=ignore_index)
        assert loss.item() == pytest.approx(expected, **TIGHT)


def test_gradient_equals_central_differences_of_the_loops(rng):
    rows, row_labels, columns, column_labels = case(rng, R=4, C=6, D=2, ignored=0.1)
    for own in (False, True):
        x, c = leaves([rows, columns])
        others = (None, None) if own else (c, column_labels)
        ck.info_nce(x, row_labels, *others, temperature=0.5).backward()
        for leaf in (x,) if own else (x, c):
            values = leaf.detach()
            for at in np.ndindex(*values.shape):
                kept, sides = values[at].item(), []
                for step in (1e-5, -1e-5):
                    values[at] = kept + step
                    sides.append(literal_loss(x, row_labels, *others, temperature=0.5))
                values[at] = kept
                assert leaf.grad[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6, abs=1e-8)


def test_loss_is_twice_differentiable(rng):
    rows, row_labels, columns, column_labels = case(rng, R=5, C=6, D=2)
    x, c = leaves([rows, columns])

    def both(a, b):
        return ck.info_nce(a, row_labels, b, column_labels, temperature=0.5)

    def own(a):
        return ck.info_nce(a, row_labels, temperature=0.5)

    for function, inputs in ((both, (x, c)), (own, (x,))):
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_label_dtype(rng, dtype):
    rows, row_labels, columns, column_labels = case(rng)
    expected = ck.info_nce(rows, row_labels, columns, column_labels)
    ignore_index = 255 if dtype == torch.uint8 else -1  # -1 becomes 255 in uint8
    loss = ck.info_nce(rows, row_labels.to(dtype), columns, column_labels.to(dtype), ignore_index=ignore_index)
    assert torch.equal(loss, expected)
    mixed = ck.info_nce(rows, row_labels.to(torch.int32), columns, column_labels)
    assert torch.equal(mixed, expected)


def test_labels_are_names_not_indices(rng):
    """Any integers, compared in 64 bits: labels that agree in their low 8, 16 or 32 bits are different."""
    rows, row_labels, columns, column_labels = case(rng)
    expected = ck.info_nce(rows, row_labels, columns, column_labels)
    for names in ([1, 1 + 2**8, 1 + 2**16], [0, 2**32, 2**33], [-(2**63), 2**63 - 1, -2]):
        table = torch.tensor([*names, -1])
        assert ck.info_nce(rows, table[row_labels], columns, table[column_labels]).item() == pytest.approx(
            expected.item(), **TIGHT
        )


def test_uint8_156_is_not_taken_for_ignore_index_minus_100(rng):
    rows = torch.eye(3, dtype=torch.float64)
    labels = torch.tensor([156, 156, 3], dtype=torch.uint8)
    assert torch.equal(
        ck.info_nce(rows, labels, ignore_index=-100), ck.info_nce(rows, labels.long(), ignore_index=-100)
    )
    assert ck.info_nce(rows, labels, ignore_index=-100) > 0


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("own", [False, True])
def test_nothing_to_contrast_gives_zero_and_a_live_graph(rng, own, positives):
    rows, row_labels, columns, column_labels = case(rng)
    cases = [
        (rows, torch.full_like(row_labels, -1), columns, column_labels),
        (rows[:0], row_labels[:0], columns, column_labels),
        (rows, row_labels, columns[:0], column_labels[:0]),
        (rows, row_labels, columns, torch.full_like(column_labels, -1)),
        (rows, torch.zeros_like(row_labels), columns, torch.ones_like(column_labels)),  # no positive
        (rows[:1], row_labels[:1], columns[:0], column_labels[:0]),
    ]
    no_negative = (rows, torch.zeros_like(row_labels), columns, torch.zeros_like(column_labels))
    if own:
        everyone = torch.arange(9)
        cases = [
            (r, y, None, None)
            for r, y in (
                (rows, everyone),
                (rows[:1], everyone[:1]),
                (rows[:0], everyone[:0]),
                (rows, torch.full_like(row_labels, -1)),
            )
        ]
        no_negative = (rows, torch.zeros_like(row_labels), None, None)
    if positives != "supcon":
        cases.append(no_negative)
    for r, y, c, z in cases:
        inputs = leaves([r] if c is None else [r, c])
        loss = ck.info_nce(inputs[0], y, *((None, None) if c is None else (inputs[1], z)), positives=positives)
        assert loss.item() == 0
        gradients = torch.autograd.grad(loss, inputs)
        assert [g.shape for g in gradients] == [x.shape for x in inputs]
        assert not any(g.any() for g in gradients)


def test_ignored_rows_and_columns_change_nothing(rng):
    rows, row_labels, columns, column_labels = case(rng, ignored=0.4)
    results = []
    for value in (0.0, 3.0, float("nan"), float("inf")):
        x = torch.where(row_labels[:, None] == -1, value, rows)
        c = torch.where(column_labels[:, None] == -1, value, columns)
        for own in (False, True):
            a, b = leaves([x, c])
            loss = ck.info_nce(a, row_labels) if own else ck.info_nce(a, row_labels, b, column_labels)
            loss.backward()
            assert not a.grad[row_labels == -1].any()
            results.append((loss.detach(), a.grad, torch.zeros(()) if own else b.grad))
    for i, result in enumerate(results[2:]):
        assert all(torch.equal(x, y) for x, y in zip(result, results[i % 2], strict=True))


@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "where", ["row", "positive column", "negative column", "row without a positive", "row without a negative"]
)
def test_nan_or_inf_in_a_valid_place_is_never_hidden(bad, where, positives):
    rows, row_labels = torch.full((2, 3), 0.5, dtype=torch.float64), torch.tensor([0, 1])
    columns, column_labels = torch.full((4, 3), 0.3, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    if where == "row":
        rows[1, 0] = bad
    elif where == "positive column":
        row_labels, columns[0, 1] = torch.tensor([0, 0]), bad
    elif where == "negative column":
        row_labels, columns[1, 1] = torch.tensor([0, 0]), bad
    elif where == "row without a positive":
        row_labels, rows[1, 2] = torch.tensor([0, 5]), bad
    else:
        column_labels, row_labels, rows[1, 2] = torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0]), bad
    assert ck.info_nce(rows, row_labels, columns, column_labels, positives=positives).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precision_of_float32_and_half(rng, dtype):
    """Against float64 on the same inputs; bounds as for the pixel-anchor loss (test_pixel_anchor.py)."""
    rows, row_labels, columns, column_labels = case(rng, R=40, C=60, D=32, dtype=dtype)
    x, c = leaves([rows, columns])
    loss = ck.info_nce(x, row_labels, c, column_labels, temperature=0.2)
    loss.backward()
    X, C = leaves([rows.double(), columns.double()])
    exact = ck.info_nce(X, row_labels, C, column_labels, temperature=0.2)
    exact.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - exact.item()) <= 5e-6 * exact.item()
    info = torch.finfo(dtype)
    for got, want in ((x.grad, X.grad), (c.grad, C.grad)):
        assert got.dtype == dtype
        bound = info.eps / 2 * want.abs() + info.smallest_normal * info.eps + 2e-5 * want.abs().max()
        assert ((got.double() - want).abs() <= bound).all()


def test_large_similarities_neither_overflow_nor_vanish(rng):
    rows, row_labels, columns, column_labels = case(rng, dtype=torch.float32)
    x, c = leaves([rows * 1e3, columns * 1e3])
    loss = ck.info_nce(x, row_labels, c, column_labels, temperature=0.01)
    assert loss.item() == pytest.approx(
        literal_loss(x.double(), row_labels, c.double(), column_labels, temperature=0.01), rel=1e-5
    )
    loss.backward()
    assert x.grad.isfinite().all()
    assert c.grad.isfinite().all()


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_layout_change_nothing(rng, autocast_dtype):
    rows, row_labels, columns, column_labels = case(rng, D=16, dtype=torch.float32)
    results = []
    for enabled in (False, True):
        x, c = leaves([rows, columns])
        with torch.autocast("cpu", autocast_dtype, enabled=enabled):
            loss = ck.info_nce(x, row_labels, c, column_labels)
        loss.backward()
        results.append((loss.detach(), x.grad, c.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    strided = ck.info_nce(
        rows.repeat_interleave(2, 1)[:, ::2],
        row_labels,
        columns.T.contiguous().T,
        column_labels.repeat_interleave(2)[::2],
    )
    torch.testing.assert_close(strided, results[0][0], rtol=1e-6, atol=0)


def test_self_pairs_are_excluded_and_nothing_else(rng):
    """Given the same rows as columns, the pair (i, i) is a positive like any other; without columns it is not."""
    rows, row_labels, _, _ = case(rng)
    own = ck.info_nce(rows, row_labels)
    with_pairs = ck.info_nce(rows, row_labels, rows, row_labels)
    assert own.item() == pytest.approx(literal_loss(rows, row_labels), **TIGHT)
    assert with_pairs.item() == pytest.approx(literal_loss(rows, row_labels, rows, row_labels), **TIGHT)
    assert own != with_pairs
