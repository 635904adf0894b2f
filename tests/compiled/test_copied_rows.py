"""Kernels that copy rows to shared memory (bfloat16 on Hopper): what their fast branch takes, and what it must not.

A block with many classes, or with something that is not finite, goes through the general branch of the same kernel.
"""

import pytest
import torch
from kernel_checks import run
from option_cases import Case, build, laid_out

from .driver import emulated
from .test_contract import ORDERS, hold


def case(op, D, N=5, layout="nchw", values="plain", **options):
    return Case(op, options, "bfloat16", layout, D, N, "wide rows", values=values)


CASES = [
    case("contextrast_loss", 64, layout="channels_last", values="NaN at an ignored pixel"),
    case("pixel_anchor_loss", 64, negatives="given", values="NaN at an ignored pixel"),
    *(
        pytest.param(chosen, marks=pytest.mark.slow)
        for chosen in (
            case("contextrast_loss", 256),
            case("contextrast_loss", 128, values="NaN", detach_anchors=True),
            case("contextrast_loss", 128, layout="channels_last", normalize_anchors=True, group="one rank"),
            case("contextrast_loss", 256, N=19, layout="channels_last"),
            case("contextrast_loss", 64, N=150),
            case("pixel_anchor_loss", 256, negatives="given", layout="channels_last"),
            case("class_anchors", 64, values="inf"),
            case("class_anchors", 256, layout="channels_last"),
        )
    ),
]


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_contract_where_rows_are_copied(chosen, one_rank, record_property):
    hold(chosen, 90, record_property)


@pytest.mark.slow
def test_a_vector_that_is_not_finite_spoils_no_more_than_without_copies():
    """Its own gradient, and what its class's anchor reaches; the other classes of its block stay finite."""
    built = build(case("pixel_anchor_loss", 64, negatives="given", values="NaN"))
    x, anchors = built.leaves
    gradients = []
    for leaf in (x, laid_out(x, "unaligned")):
        with emulated(90, ORDERS[0]) as gpu:
            gradients.append(run(built.loss, [leaf, anchors])[1])
        assert not gpu.faults()
    copied, general = gradients
    assert torch.equal(copied.isnan(), general.isnan())
    assert 0 < copied.isnan().sum() < copied.numel()
    torch.testing.assert_close(copied, general, rtol=2**-7, atol=1e-6, equal_nan=True)
