"""The hash that breaks ties and draws base pixels, in unsigned 32-bit arithmetic, is the same everywhere."""

import literal
import numpy as np
import pytest
import torch
from scipy import stats

from contextrast_kernels.hashing import pixel_hash

CHECK_VALUES = [
    (0, 0, 0, 0x4CB04C27),
    (0, 0, 1, 0x671ABCBB),
    (0, 0, 2, 0x6B7D565F),
    (0, 0, 65535, 0xE21576E6),
    (-1, 0, 0, 0x0BB48B84),
    (2**40 + 5, 0, 0, 0x86D95E7D),
    (0, 1, 0, 0x8432B77C),
]


def unsigned(values):
    return [int(value) % 2**32 for value in values.flatten().tolist()]


@pytest.mark.parametrize(("seed", "stream", "pixel", "expected"), CHECK_VALUES)
def test_the_published_check_values(seed, stream, pixel, expected):
    assert literal.hash32(seed, stream, pixel) == expected
    assert unsigned(pixel_hash(seed, stream, torch.tensor([pixel]))) == [expected]
    assert unsigned(pixel_hash(torch.tensor(seed), stream, torch.tensor([pixel]))) == [expected]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("stream", [0, 1, 4, 1000, 2**20])
def test_every_seed_and_stream_hashes_as_python_integers_do(seed, stream):
    pixels = [0, 1, 2, 1000, 2**16, 2**28 - 1]
    expected = [literal.hash32(seed, stream, p) for p in pixels]
    assert unsigned(pixel_hash(torch.tensor([seed]), stream, torch.tensor(pixels))) == expected
    assert unsigned(pixel_hash(seed, stream, torch.tensor(pixels))) == expected


def test_order_is_unsigned():
    """Hash values above 2**31 must come after those below, whatever integer type holds them."""
    values = pixel_hash(0, 0, torch.arange(1000))
    expected = [literal.hash32(0, 0, p) for p in range(1000)]
    assert values.argsort().tolist() == sorted(range(1000), key=expected.__getitem__)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_values_are_uniform_and_streams_independent(seed):
    """χ² over 64 bins of 65 536 pixels, and over the 8 x 8 joint bins of two streams and of two neighbouring seeds.

    For fixed inputs the outcome never changes. One false alarm in 10^6 is allowed a priori for each of the nine
    statistics.
    """
    pixels = torch.arange(65536)
    first = np.array(unsigned(pixel_hash(seed, 0, pixels)), dtype=np.uint64)
    second = np.array(unsigned(pixel_hash(seed, 1, pixels)), dtype=np.uint64)
    third = np.array(unsigned(pixel_hash(seed + 1, 0, pixels)), dtype=np.uint64)
    bins = [first >> 26, (first >> 29) * 8 + (second >> 29), (first >> 29) * 8 + (third >> 29)]
    for index in bins:
        counts = np.bincount(index.astype(int), minlength=64)
        assert ((counts - 1024) ** 2 / 1024).sum() < stats.chi2.isf(1e-6, 63)
