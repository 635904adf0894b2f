"""Rows against columns: the per-positive-denominator InfoNCE that ContrastiveSeg, MS/CS and Contextrast share.

    s_ij = x_i · z_j / τ,   P_i = {j : same label},   N_i = {j : other label}
    Z_i  = log Σ_{j∈N_i} exp(s_ij)
    L    = mean over rows with a valid label of 1/|P_i| Σ_{j∈P_i} softplus(Z_i - s_ij)

The denominator of a positive holds that positive and all negatives, not the other positives.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from contextrast_kernels import checks
from contextrast_kernels.backend import unchanged_by_autocast
from contextrast_kernels.embedding import compute_dtype


def info_nce(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor | None = None,
    column_labels: Tensor | None = None,
    *,
    temperature: float = 0.1,
    ignore_index: int = -1,
) -> Tensor:
    """Supervised InfoNCE of rows against columns, as in Eq. 2; differentiable in both.

    Args:
        rows: (R, D) floating point, used as they are: normalise them before if cosines are meant.
        row_labels: (R,) integers.
        columns, column_labels: (C, D) and (C,), of the rows' dtype. None: the rows against themselves, without the
            pairs (i, i).
        temperature: τ.
        ignore_index: rows with this label are left out; such columns are neither positive nor negative.

    Returns:
        A scalar, float32, or float64 for float64 rows. A row without a positive or without a negative adds 0 and
        stays in the mean; without a valid row the loss is 0, with a live graph. NaN or inf in a valid row or column
        gives NaN.

    Raises:
        TypeError, ValueError: an argument of the wrong type, rank, size, range or device; the sentence names it.
    """
    _check_rows("rows", rows, "row_labels", row_labels)
    itself = columns is None
    if itself and column_labels is not None:
        raise ValueError("column_labels: expected None without columns; give both or neither")
    if not itself:
        if column_labels is None:
            raise ValueError("column_labels: expected labels (C,) of the columns, got None; give both or neither")
        _check_rows("columns", columns, "column_labels", column_labels)
        checks.together("rows", rows, "columns", columns, batch=False)
        if columns.shape[1] != rows.shape[1] or columns.dtype != rows.dtype:
            raise ValueError(
                f"columns: expected (C, {rows.shape[1]}) of {checks.name_of(rows.dtype)}, as the rows are, "
                f"got {checks.describe(columns)}"
            )
    checks.real("temperature", temperature, low=0.0, open_low=True)
    checks.ignore_index(ignore_index)
    if itself:
        columns, column_labels = rows, row_labels
    return _info_nce(rows, row_labels.long(), columns, column_labels.long(), itself, temperature, ignore_index)


@unchanged_by_autocast
def _info_nce(
    rows: Tensor,
    row_labels: Tensor,
    columns: Tensor,
    column_labels: Tensor,
    itself: bool,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    dtype = compute_dtype(rows.dtype)
    valid_row, valid_column = row_labels != ignore_index, column_labels != ignore_index
    # Ignored rows and columns become zero before anything is computed, so that a NaN there has no effect.
    x = torch.where(valid_row.unsqueeze(1), rows.to(dtype), 0.0)
    z = torch.where(valid_column.unsqueeze(1), columns.to(dtype), 0.0)
    similarity = x @ z.T / temperature
    same = row_labels.unsqueeze(1) == column_labels
    counts = valid_row.unsqueeze(1) & valid_column
    is_positive, is_negative = same & counts, ~same & counts
    if itself:
        is_positive = is_positive & ~torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    has_negative = is_negative.any(1, keepdim=True)
    # A row of nothing but -inf has no derivative: rows without negatives are set aside before and after the sum.
    lse = torch.where(is_negative, similarity, -torch.inf)
    lse = torch.where(has_negative, lse, 0.0).logsumexp(1, keepdim=True)
    term = torch.where(is_positive & has_negative, -F.logsigmoid(similarity - lse), 0.0)
    of_row = term.sum(1) / is_positive.sum(1).clamp(min=1)
    # 0 · x and 0 · z carry a NaN or inf of a row or column that is in no term.
    return of_row.sum() / valid_row.sum().clamp(min=1) + (0.0 * x).sum() + (0.0 * z).sum()


def _check_rows(name: str, rows: Tensor, labels_name: str, labels: Tensor) -> None:
    checks.tensor(name, rows, "a floating-point matrix (R, D)")
    if not rows.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point matrix, got {checks.describe(rows)}")
    if rows.ndim != 2:
        raise ValueError(f"{name}: expected a matrix (R, D), got {checks.describe(rows)}")
    checks.tensor(labels_name, labels, f"integer labels, one for each of {name}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{labels_name}: expected integer labels, got {checks.describe(labels)}; call .long()")
    if labels.ndim != 1 or labels.shape[0] != rows.shape[0]:
        raise ValueError(
            f"{labels_name}: expected shape ({rows.shape[0]},), one for each of {name}, got {checks.describe(labels)}"
        )
    checks.together(name, rows, labels_name, labels, batch=False)
