"""The statistics of the study against examples worked by hand."""

import math

import pytest

from benchmarks.camvid import paired


def test_comparison_matches_an_example_worked_by_hand():
    """Differences 1, 2, 3, 6: mean 3; squared deviations 4 + 1 + 0 + 9 = 14, so s² = 14/3 and the standard error is
    √(14/12) = 1.0801. t(0.975; 3) = 3.18245, so the interval is 3 ± 3.4374, and t = 2.7775 has p = 0.0691."""
    found = paired.compare([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3
    assert found.student == pytest.approx((-0.4374, 6.4374), abs=2e-4)
    assert found.p == pytest.approx(0.0691, abs=2e-4)


def test_bootstrap_of_two_seeds_is_the_range_of_their_means():
    """Resampled means of (0, 1) are 0, ½ and 1 with probability ¼, ½ and ¼."""
    assert paired.compare([0.0, 1.0]).bootstrap == (0.0, 1.0)
    narrow = paired.compare([float(i % 2) for i in range(100)]).bootstrap
    assert narrow == pytest.approx(
        (0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.011
    )  # the means are multiples of 1/100


def test_detectable_difference_is_that_of_published_power_tables():
    """Cohen's tables: a paired t test at 5 % with 80 % power needs n = 8 for d = 1.16, and n = 34 for d = 0.5."""
    assert paired.noncentrality(7) / math.sqrt(8) == pytest.approx(1.16, abs=0.01)
    assert paired.noncentrality(33) / math.sqrt(34) == pytest.approx(0.495, abs=0.006)
    two = paired.compare([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert two.detectable == pytest.approx(paired.noncentrality(7) * math.sqrt(8 / 7) / math.sqrt(8))


def test_holm_matches_an_example_worked_by_hand():
    """Sorted: 0.01 · 4 = 0.04; 0.02 · 3 = 0.06; 0.03 · 2 = 0.06; 0.04 · 1 = 0.04, raised to 0.06."""
    assert paired.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert paired.holm([0.6, 0.9]) == [1.0, 1.0]
    some = paired.holm([0.04, float("nan"), 0.01])
    assert some[0] == pytest.approx(0.04) and math.isnan(some[1]) and some[2] == pytest.approx(0.02)


@pytest.mark.parametrize("differences", [[], [1.0], [2.0, 2.0]])
def test_too_few_seeds_have_no_interval(differences):
    found = paired.compare(differences)
    assert all(map(math.isnan, (*found.student, *found.bootstrap, found.p, found.detectable)))
    assert math.isnan(found.mean) == (not differences)
