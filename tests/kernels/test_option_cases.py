"""The list of cases has every option of the public functions, and its cases pass in the interpreter and on a GPU.
tests/compiled runs the same cases from their PTX."""

import inspect
import itertools

import pytest
import torch
from kernel_checks import (
    DEVICE,
    NEEDS_TRITON,
    assert_like_the_reference,
    poisoned_memory,  # noqa: F401 - a fixture for all tests here
    run,
)
from option_cases import DTYPES, OPTIONS, OTHER_ARGUMENTS, QUICK, Case, axes, build, quick_and_sweep, smaller, sweep

import contextrast_kernels as ck
from contextrast_kernels import bane

CHOICES = {
    ("contextrast_loss", "negatives"): bane.NEGATIVES,
    ("contextrast_loss", "distance_at"): bane.DISTANCE_AT,
    ("info_nce", "positives"): ("each", "supcon", "pooled"),
    ("info_nce", "reduction"): ("mean", "none"),
}


@pytest.mark.parametrize("op", OPTIONS)
def test_no_option_of_the_public_functions_is_left_out(op):
    parameters = inspect.signature(getattr(ck, op)).parameters
    assert {*OPTIONS[op], *OTHER_ARGUMENTS[op]} == set(parameters)
    for name, values in OPTIONS[op].items():
        parameter = parameters[name]
        assert len(set(map(str, values))) > 1, f"{name} has only one value"
        if isinstance(parameter.default, bool):
            assert set(values) == {True, False}
        if (op, name) in CHOICES:
            assert set(values) == set(CHOICES[op, name])
        elif isinstance(parameter.default, str):
            raise AssertionError(f"{name}: add its choices to CHOICES")


def test_the_quick_cases_have_every_value_of_every_option():
    assert all(case.possible for case in QUICK)
    for op, options in OPTIONS.items():
        cases = [case for case in QUICK if case.op == op]
        for name, values in options.items():
            assert {case.option(name) for case in cases} == set(values), (op, name)
        assert {case.dtype for case in cases} >= {"float32", "bfloat16"}
    assert {case.dtype for case in QUICK} == set(DTYPES)


def excludes(one, other) -> bool:
    """Whether a function refuses two values together."""
    names = {one[0]: one[1], other[0]: other[1]}
    if names.get("base_sampler"):
        return names.get("base_rate", 0.0) > 0
    return names == {"labels": "uint8", "N": 256}


@pytest.mark.parametrize("op", OPTIONS)
def test_the_sweep_has_every_pair_of_values(op):
    table = axes(op)
    found = set()
    for case in sweep(op):
        values = {**vars(case), **case.all_options}
        found |= set(itertools.combinations(((name, values[name]) for name in table), 2))
    for a, b in itertools.combinations(table, 2):
        for pair in itertools.product(((a, x) for x in table[a]), ((b, y) for y in table[b])):
            assert pair in found or excludes(*pair), pair


def on_this_device(case: Case) -> bool:
    return DEVICE == "cuda" or case.dtype != "bfloat16"  # which the interpreter gets wrong


@NEEDS_TRITON
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case if DEVICE == "cuda" else smaller(case),
            id=str(case),
            # Without a GPU tests/compiled runs them on the compiled code.
            marks=[pytest.mark.slow] if slow or DEVICE == "cpu" else [],
        )
        for case, slow in quick_and_sweep()
        if on_this_device(case)
    ],
)
def test_interpreted_case_meets_the_contract(case, one_rank):
    built = build(case, DEVICE)
    if case.values in ("plain", "NaN at an ignored pixel"):
        assert_like_the_reference(built.loss, built.leaves, case.rounding, case.gradient_is_zero)
    else:
        with ck.backend("reference"):
            expected, _ = run(built.reference, built.leaves)
        with ck.backend("triton"):
            value, _ = run(built.loss, built.leaves)
        if case.op == "class_anchors":  # one broken channel may break its row
            value, expected = value.isfinite().all(1), expected.isfinite().all(1)
        assert torch.equal(value.isnan() if value.is_floating_point() else value,
                           expected.isnan() if expected.is_floating_point() else expected)  # fmt: skip
    for counts in built.exact:
        assert torch.equal(counts, built.exact[0])


@NEEDS_TRITON
def test_a_group_keeps_the_digits_of_a_loss_without_normalisation(one_rank):
    options = {"negatives": "none", "base_rate": 1.0, "normalize": False, "normalize_anchors": True, "temperature": 0.5}
    options |= {"group": "one rank", "layer_weights": (1.0,)}
    built = build(Case("contextrast_loss", options, "float64", D=128), DEVICE)
    with ck.backend("reference"):
        expected = built.reference(*built.leaves)
    with ck.backend("triton"):
        value = built.loss(*built.leaves)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
