"""Every case of option_cases.py on the code that Triton compiles, with the limits of docs/numerics.md.

Values and gradients are compared with the reference in float64, no access may be a fault, and every order of blocks and
warps must give the same bits.
"""

import random
from unittest import mock

import pytest
import torch
from kernel_checks import relative, run, size_of_zero
from option_cases import QUICK, Case, build, quick_and_sweep

import contextrast_kernels as ck

from .driver import emulated
from .engine import Schedule

ORDERS = Schedule(seed=1), Schedule(seed=2, quantum=60)
"""Blocks and warps in one order; and in another, with warps preempted after 60 instructions at most."""


ON_AMPERE = {("class_anchors", "bfloat16"), ("pixel_anchor_loss", "float16"), ("info_nce", "float16")}


def architecture(case: Case) -> int:
    """The architecture that a quick case is compiled for: sm_90 for most, sm_80 for the others."""
    return 80 if (case.op, case.dtype) in ON_AMPERE else 90


def architectures() -> list:
    """The sweep takes turns."""
    chosen = []
    for k, (case, slow) in enumerate(quick_and_sweep()):
        arch = (80, 90, 100)[k % 3] if slow else architecture(case)
        marks = [pytest.mark.slow] if slow else []
        chosen.append(pytest.param(case, arch, id=f"{case} sm_{arch}", marks=marks))
    return chosen


def hold(case: Case, arch: int, record_property, orders=ORDERS, machine_code: bool = False) -> None:
    """Run a case once in each order and assert the contract of docs/numerics.md."""
    built = build(case)
    before = [x.clone() for x in built.leaves]
    with ck.backend("reference"):
        value, gradient = run(built.reference, built.leaves, torch.float64)
        own_value, own_gradient = run(built.reference, built.leaves)
    results, faults = [], []
    for order in orders:
        with emulated(arch, order, machine_code=machine_code) as gpu:
            results.append(run(built.loss, built.leaves))
        record_property("compiled", (gpu.compiled_kernels, gpu.compile_seconds))
        assert gpu.launches
        faults += gpu.faults()
    shares = [0.0]
    if case.values in ("NaN", "inf"):
        broken = [x.isnan() for x in (results[0][0], own_value)]
        if case.op == "class_anchors":  # one broken channel may break its whole row
            broken = [~x.isfinite().all(1) for x in (results[0][0], own_value)]
        assert torch.equal(*broken)
    else:
        shares = [
            relative(ours, true) / (2 * relative(own, true) + case.rounding)
            for ours, true, own in zip(results[0], (value, gradient), (own_value, own_gradient))
        ]
        if case.gradient_is_zero:
            shares[1] = size_of_zero(results[0][1], built.leaves) / case.rounding
        record_property("errors", ((case.op, case.dtype, arch), *shares))
    assert not faults, f"{len(faults)} findings, such as\n" + "\n".join(map(str, faults[:6]))
    assert max(shares) <= 1, f"value and gradient are off by {shares} of what is allowed"
    for result in results[1:]:
        for first, second in zip(results[0], result):
            assert torch.equal(first.nan_to_num(7), second.nan_to_num(7)), "another order gives other bits"
    assert all(torch.equal(x.nan_to_num(7), copy.nan_to_num(7)) for x, copy in zip(built.leaves, before))
    assert all(torch.equal(counts, built.exact[0]) for counts in built.exact)


@pytest.mark.parametrize(("case", "arch"), architectures())
def test_compiled_case_meets_the_contract(case, arch, one_rank, record_property):
    hold(case, arch, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_contract_holds_where_ptx_leaves_rounding_open(case, one_rank, record_property):
    """Approximate instructions as far off as PTX allows, and tensor cores that round their sums once. ptxas, too,
    compiles every case."""
    orders = (Schedule(seed=3, noise=True, exact_sums=True),)
    hold(case, 90, record_property, orders, machine_code=True)


def far_apart(x, axis, folder):
    """The same features, with images, channels or rows so far from each other that an offset in elements passes 2³¹."""
    _, D, h, w = x.shape
    far = {"images": 2**31, "channels": 2**31 // D * 2, "rows": 2**29}[axis] + 64
    strides = {"images": (far, h * w, w, 1), "channels": (D * far, far, w, 1), "rows": (h * far, w, far, 1)}[axis]
    size = 1 + sum((n - 1) * step for n, step in zip(x.shape, strides))
    sparse = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=x.dtype)
    return sparse.as_strided(x.shape, strides).copy_(x)


LARGE = next(case for case in QUICK if (case.op, case.dtype, case.D) == ("contextrast_loss", "bfloat16", 64))


@pytest.mark.parametrize("axis", ["images", *(pytest.param(a, marks=pytest.mark.slow) for a in ("channels", "rows"))])
def test_offsets_past_two_billion_give_the_same_bits(axis, tmp_path):
    built = build(LARGE)
    x, *others = built.leaves
    expected = []
    for y in (x, far_apart(x, axis, tmp_path)):
        with emulated(90, ORDERS[0]) as gpu:
            expected.append(run(built.loss, [y, *others]))
        assert not gpu.faults(), "\n".join(map(str, gpu.faults()))
    (loss, gradient), (far_loss, far_gradient) = expected
    torch.testing.assert_close(far_loss, loss, rtol=1e-6, atol=0)
    assert relative(far_gradient, gradient) < 2**-9


@pytest.mark.slow
def test_offsets_cut_to_32_bits_are_seen(tmp_path):
    """A planted fault: kernels for images of any extent compute offsets inside an image in 32 bits."""
    from contextrast_kernels.kernels import _launch

    built, layout = build(LARGE), _launch.layout
    leaves = [far_apart(built.leaves[0], "channels", tmp_path), *built.leaves[1:]]
    _launch.launches_of.cache_clear()  # it remembers layouts
    with emulated(90, ORDERS[0]) as gpu, mock.patch.object(_launch, "layout", lambda x: layout(x)._replace(wide=False)):
        run(built.loss, leaves)
    _launch.launches_of.cache_clear()
    found = {fault.kernel for fault in gpu.faults() if fault.kind.startswith("outside of every tensor")}
    assert found >= {"_class_anchors_fwd", "_hard_similarities", "_pixel_anchor_fwd", "_features_bwd"}


@pytest.mark.slow
def test_a_training_with_changing_batches(one_rank, record_property):
    """Cases of all ops in a random order, twice, in one kernel cache: what was compiled for one serves or leaves alone
    the next."""
    cases = [case for case in QUICK for _ in range(2)]
    random.Random(0).shuffle(cases)
    for case in cases:
        hold(case, 90, record_property, ORDERS[:1])
