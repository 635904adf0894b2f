"""Paired comparisons: the same seeds with and without a change."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

CONFIDENCE, POWER, RESAMPLES = 0.95, 0.8, 10_000


@dataclass(frozen=True)
class Comparison:
    """The differences of n seeds, their mean, and its uncertainty. Fields are NaN if n is too small."""

    differences: tuple[float, ...]
    mean: float
    student: tuple[float, float]
    """The 95 % interval of the mean by Student's t."""
    bootstrap: tuple[float, float]
    """The 95 % percentile interval of the mean over resampled seeds. With few seeds it is too narrow."""
    p: float
    """Two-sided p-value of Student's t test, one comparison alone."""
    detectable: float
    """The smallest true difference that a t test at 5 % with n seeds finds with 80 % power."""


def compare(differences: Sequence[float]) -> Comparison:
    """The comparison that follows from one difference for each seed."""
    values, nan = np.asarray(differences, float), float("nan")
    n = len(values)
    mean = float(values.mean()) if n else nan
    if n < 2 or np.ptp(values) == 0:
        return Comparison(tuple(differences), mean, (nan, nan), (nan, nan), nan, nan)
    test = stats.ttest_1samp(values, 0.0)
    student = test.confidence_interval(CONFIDENCE)
    drawn = np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    bootstrap = np.quantile(values[drawn].mean(1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    error = float(values.std(ddof=1)) / n**0.5
    return Comparison(
        tuple(differences),
        mean,
        (float(student.low), float(student.high)),
        (float(bootstrap[0]), float(bootstrap[1])),
        float(test.pvalue),
        error * noncentrality(n - 1),
    )


def noncentrality(freedom: int) -> float:
    """The true mean, in standard errors, that a two-sided t test at 5 % finds with 80 % power."""
    critical = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)

    def lacking(shift: float) -> float:  # the other tail has less than 1e-5 there
        return stats.nct.sf(critical, freedom, shift) - POWER

    return float(optimize.brentq(lacking, 0.0, 4 * critical))


def holm(p: Sequence[float]) -> list[float]:
    """The p-values of several comparisons, corrected by Holm's step-down method. A NaN is kept and not counted."""
    order = sorted((i for i, value in enumerate(p) if value == value), key=lambda i: p[i])
    corrected, least = list(p), 0.0
    for place, i in enumerate(order):
        least = corrected[i] = max(least, min(1.0, (len(order) - place) * p[i]))
    return corrected
