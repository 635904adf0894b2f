"""Supervised InfoNCE of rows against columns. The losses of ContrastiveSeg, MS/CS, RegionContrast, PNE and Contextrast
are special cases of it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks
from contextrast_kernels.backend import MOST_CHANNELS, choose, differentiable_once, on_device, unchanged_by_autocast
from contextrast_kernels.embedding import compute_dtype
from contextrast_kernels.loops import one_call_per_sample

POSITIVES = ("each", "supcon", "pooled")
REDUCTIONS = ("mean", "none")


@checks.takes_subclasses
def info_nce(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None = None,
    column_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    ignore_index: int = -1,
    positives: str = "each",
    row_negatives: Tensor | None = None,
    column_negatives: Tensor | None = None,
    column_weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Supervised InfoNCE of rows against columns, with several positives per row, differentiable in rows and columns.

        s_ij = x_i · z_j / τ,   P_i and N_i: the positives and negatives of row i,   w_j: the weight of column j
        Z_i  = log Σ_{j∈N_i} w_j exp(s_ij)                          -inf if row i has no negative

        each     l_i = 1/w(P_i) Σ_{j∈P_i} w_j softplus(Z_i - s_ij)
        supcon   l_i = 1/w(P_i) Σ_{j∈P_i} w_j (A_i - s_ij)           A_i = log Σ_{j∈P_i∪N_i} w_j exp(s_ij)
        pooled   l_i = softplus(Z_i - Y_i)                           Y_i = log Σ_{j∈P_i} w_j exp(s_ij)

        L = mean of l_i over the rows with a valid label; l_i = 0 for a row without a positive

    w(P_i) is the sum of the positives' weights, and softplus(Z - s) = -log e^s / (e^s + Σ_neg e^{s'}). "each" is the
    form of ContrastiveSeg (Wang et al., ICCV 2021) and of Contextrast (Sung et al., CVPR 2024): the denominator of a
    positive holds that positive and all negatives. With "supcon" (Khosla et al., NeurIPS 2020) it holds the other
    positives too. "pooled", of PNE (Wang et al., Neurocomputing 2023), divides the sum over all positives by the sum
    over all positives and negatives.

    A column is a positive of the rows with its label. By default it is a negative of the rows with a different label.
    If ``row_negatives`` or ``column_negatives`` is given, column j is a negative of row i only if
    ``column_negatives[j] == row_negatives[i]``. If only one of the two is given, the labels replace the other one.

    Args:
        rows: (R, D) floating point. They are not normalised here: for cosine similarities pass unit vectors.
        row_labels: (R,) integers.
        columns, column_labels: (C, D) of the rows' dtype, and (C,) integers. None: the rows against themselves,
            without the pairs (i, i).
        temperature: τ.
        ignore_index: rows with this label are left out; columns with it are neither positive nor negative. In
            ``row_negatives`` and ``column_negatives`` it matches nothing.
        positives: the form of the loss, not a set of positives: "each", "supcon" or "pooled", as above.
        row_negatives, column_negatives: (R,) and (C,) integers. In Contextrast the rows are anchors, the columns are
            pixels, and ``column_negatives`` is the class that each pixel is a hard negative of.
        column_weights: (C,) floating point of at least 0, the number of times that column j counts. They get no
            gradient. None: 1 for all.
        reduction: "mean", or "none" for the vector of l_i.

    Returns:
        A scalar, or (R,) without reduction, with 0 for ignored rows; float32, or float64 for float64 rows. A row
        without a positive adds 0 and stays in the mean. So does a row without a negative, except with "supcon".
        Without a valid row the loss is 0, still attached to the autograd graph. NaN or inf in a valid row makes l_i of
        this row NaN. NaN or inf in a valid column, or a weight of one that is negative, infinite or NaN, makes all
        valid rows NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, rank, size, range or device; the error names it.
        RuntimeError: the requested backend cannot run.
    """
    row_labels = check_rows("rows", rows, "row_labels", row_labels)
    itself = columns is None
    if columns is None:
        if column_labels is not None:
            raise ValueError("column_labels: expected None without columns, got labels. Pass both or neither.")
    else:
        if column_labels is None:
            raise ValueError("column_labels: expected labels (C,) of the columns, got None. Pass both or neither.")
        column_labels = check_rows("columns", columns, "column_labels", column_labels)
        checks.together("rows", rows, "columns", columns, batch=False)
        if columns.shape[1] != rows.shape[1] or columns.dtype != rows.dtype:
            raise ValueError(
                f"columns: expected (C, {rows.shape[1]}) of {checks.name_of(rows.dtype)}, as the rows are, "
                f"got {checks.describe(columns)}. Use one embedding size and dtype for both."
            )
    checks.real("temperature", temperature, low=0.0, open_low=True)
    checks.ignore_index(ignore_index)
    checks.choice("positives", positives, POSITIVES)
    checks.choice("reduction", reduction, REDUCTIONS)
    against = ("rows", rows) if columns is None else ("columns", columns)
    if row_negatives is not None:
        row_negatives = _check_integers("row_negatives", row_negatives, "rows", rows)
    if column_negatives is not None:
        column_negatives = _check_integers("column_negatives", column_negatives, *against)
    if column_weights is not None:
        kind = "floating-point weights"
        _check_vector("column_weights", column_weights, kind, checks.is_floating, *against, "Call .float().")
        column_weights = column_weights.detach()
    if row_negatives is not None or column_negatives is not None:
        row_negatives = row_labels if row_negatives is None else row_negatives
        if column_negatives is None:
            column_negatives = row_labels if itself else column_labels
    sets = (row_negatives, column_negatives, column_weights)
    tau = float(temperature)
    unfit = ""
    if rows.shape[1] > MOST_CHANNELS:
        unfit = f"its kernels take at most {MOST_CHANNELS} channels, got {rows.shape[1]}"
    backend = choose(rows, ("triton",), unfit)
    # Without a pair there is nothing to launch.
    if backend == "triton" and rows.numel() > 0 and against[1].numel() > 0:
        return _info_nce(rows, row_labels, columns, column_labels, *sets, tau, ignore_index, positives, reduction)[0]
    if columns is None or column_labels is None:
        columns, column_labels = rows, row_labels
    return _reference(rows, row_labels, columns, column_labels, *sets, itself, tau, ignore_index, positives, reduction)


@unchanged_by_autocast
def _reference(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor,
    column_labels: Tensor,
    row_negatives: Tensor | None,
    column_negatives: Tensor | None,
    column_weights: Tensor | None,
    itself: bool,
    temperature: float,
    ignore_index: int,
    positives: str,
    reduction: str,
) -> Tensor:
    dtype = compute_dtype(rows.dtype)
    row_labels, column_labels = row_labels.long(), column_labels.long()
    valid_row, valid_column = row_labels != ignore_index, column_labels != ignore_index
    # Ignored rows and columns become zero before anything is computed, so that a NaN there has no effect.
    x = torch.where(valid_row.unsqueeze(1), rows.to(dtype), 0.0)
    z = torch.where(valid_column.unsqueeze(1), columns.to(dtype), 0.0)
    w = None
    if column_weights is not None:
        w = column_weights.detach().to(dtype)
        w = torch.where(valid_column, torch.where((w >= 0) & w.isfinite(), w, torch.nan), 0.0)
    similarity = (x / temperature) @ z.T

    same = row_labels.unsqueeze(1) == column_labels
    pair = valid_row.unsqueeze(1) & (valid_column if w is None else valid_column & (w != 0))
    if itself:
        pair = pair & ~torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    against = ~same
    if row_negatives is not None and column_negatives is not None:
        code, named = row_negatives.long().unsqueeze(1), column_negatives.long()
        against = (code == named) & (named != ignore_index)
    is_positive, is_negative = pair & same, pair & against
    has_positive, has_negative = is_positive.any(1), is_negative.any(1)

    def log_sum(chosen: Tensor, has_chosen: Tensor) -> Tensor:
        # logsumexp has no derivative where all terms are -inf: a row without a chosen column gets zeros.
        fill = torch.where(has_chosen, -torch.inf, 0.0).to(dtype).unsqueeze(1)
        terms = similarity if w is None else similarity + w.log()
        return torch.where(chosen, terms, fill).logsumexp(1, keepdim=True)

    def weighted(terms: Tensor) -> Tensor:
        return terms if w is None else w * terms

    if positives == "pooled":
        log_ratio = log_sum(is_positive, has_positive) - log_sum(is_negative, has_negative)
        of_row = torch.where(has_positive & has_negative, -F.logsigmoid(log_ratio).squeeze(1), 0.0)
    else:
        if positives == "each":
            term = -F.logsigmoid(similarity - log_sum(is_negative, has_negative))
            term = torch.where(is_positive & has_negative.unsqueeze(1), weighted(term), 0.0)
        else:
            term = log_sum(is_positive | is_negative, has_positive | has_negative) - similarity
            term = torch.where(is_positive, weighted(term), 0.0)
        total = weighted(is_positive).sum(1).to(dtype)
        of_row = term.sum(1) / torch.where(has_positive, total, 1.0)
    # 0 · x and 0 · z propagate a NaN or inf of a row or column that is in no term.
    of_row = of_row + (0.0 * x).sum(1) + (0.0 * z).sum() + (0.0 if w is None else (0.0 * w).sum())
    of_row = torch.where(valid_row, of_row, 0.0)
    return of_row if reduction == "none" else of_row.sum() / valid_row.sum().clamp(min=1)


def check_rows(name: str, rows: Tensor, labels_name: str, labels: Tensor) -> Tensor:
    """Check a matrix (R, D) and an integer label for each of its rows; return the labels in a signed type."""
    checks.tensor(name, rows, "a floating-point matrix (R, D)")
    if not checks.is_floating(rows.dtype):
        raise TypeError(f"{name}: expected a floating-point matrix, got {checks.describe(rows)}. Call .float().")
    if rows.ndim != 2:
        raise ValueError(
            f"{name}: expected a matrix (R, D), got {checks.describe(rows)}. Reshape it to one embedding per row."
        )
    return _check_integers(labels_name, labels, name, rows)


def _check_integers(name: str, value: Tensor, rows_name: str, rows: Tensor) -> Tensor:
    _check_vector(name, value, "integer labels", checks.is_integer, rows_name, rows, "Call .long().")
    return checks.signed(value)


def _check_vector(name: str, value: Tensor, kind: str, fits, rows_name: str, rows: Tensor, remedy: str) -> None:
    """Check a vector with one number for each row of a matrix."""
    checks.tensor(name, value, f"{kind}, one for each of {rows_name}")
    if not fits(value.dtype):
        raise TypeError(f"{name}: expected {kind}, got {checks.describe(value)}. {remedy}")
    if value.ndim != 1 or value.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{name}: expected shape ({rows.shape[0]},), one for each of {rows_name}, got {checks.describe(value)}. "
            "Pass a vector of this length."
        )
    checks.together(rows_name, rows, name, value, batch=False)


@torch.library.custom_op("contextrast::info_nce", mutates_args=())
def _info_nce(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    row_negatives: Tensor | None,
    column_negatives: Tensor | None,
    column_weights: Tensor | None,
    temperature: float,
    ignore_index: int,
    positives: str,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the number of valid rows (empty without a mean) and (4, R) numbers for the backward pass."""
    from contextrast_kernels.kernels import info_nce

    sets = (row_labels, column_labels, row_negatives, column_negatives, column_weights)
    pairs = info_nce.pairs_of(*sets, temperature, ignore_index, positives)
    with on_device(rows):
        return info_nce.forward(rows, rows if columns is None else columns, pairs, reduction == "mean")


@_info_nce.register_fake
def _(rows, row_labels, columns, *others):
    *_, reduction = others
    R, dtype = rows.shape[0], compute_dtype(rows.dtype)
    loss, count = ((), ()) if reduction == "mean" else ((R,), (0,))
    return tuple(rows.new_empty(shape, dtype=dtype) for shape in (loss, count, (4, R)))


@torch.library.custom_op("contextrast::info_nce_backward", mutates_args=())
def _info_nce_backward(
    gradient: Tensor,
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None,
    column_labels: Tensor | None,
    row_negatives: Tensor | None,
    column_negatives: Tensor | None,
    column_weights: Tensor | None,
    count: Tensor,
    kept: Tensor,
    temperature: float,
    ignore_index: int,
    positives: str,
    toward: str,
) -> Tensor:
    """The gradient of the rows or columns: ``toward`` is "rows", "columns", or "both" if the rows are the columns."""
    from contextrast_kernels.kernels import info_nce

    sets = (row_labels, column_labels, row_negatives, column_negatives, column_weights)
    pairs = info_nce.pairs_of(*sets, temperature, ignore_index, positives)
    with on_device(rows):
        return info_nce.backward(gradient, rows, rows if columns is None else columns, pairs, count, kept, toward)


@_info_nce_backward.register_fake
def _(gradient, rows, row_labels, columns, *others):
    *_, toward = others
    return torch.empty_like(columns if toward == "columns" else rows)


differentiable_once("info_nce", _info_nce_backward)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.temperature, ctx.ignore_index, ctx.positives, _reduction = inputs
    _loss, count, kept = output
    ctx.save_for_backward(*tensors, count, kept)
    ctx.mark_non_differentiable(count, kept)


def _backward(ctx, gradient, *_):
    rows, row_labels, columns, *others = ctx.saved_tensors
    options = (ctx.temperature, ctx.ignore_index, ctx.positives)

    def toward(target: str) -> Tensor:
        return _info_nce_backward(gradient, rows, row_labels, columns, *others, *options, target)

    drows = dcolumns = None
    of_rows, _, of_columns, *rest = ctx.needs_input_grad
    if of_rows:
        drows = toward("both" if columns is None else "rows")
    if of_columns:
        dcolumns = toward("columns")
    return drows, None, dcolumns, *(None for _ in rest)


_info_nce.register_autograd(_backward, setup_context=_save_for_backward)
one_call_per_sample(_info_nce)
one_call_per_sample(_info_nce_backward)
