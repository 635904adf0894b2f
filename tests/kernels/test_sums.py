"""Sums in fixed point: rounding, and maxima that begin at zero."""

import numpy as np
import pytest
import torch

import contextrast_kernels as ck

pytestmark = pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")

if ck.available()["triton"] == "ok":
    import triton
    from triton import language as tl

    from contextrast_kernels.kernels import _tiles

    @triton.jit
    def _add(values, sums, scale, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        _tiles.add_fixed(sums + i, tl.load(values + i), scale, i < SIZE)

    @triton.jit
    def _product(a, b, out, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        at = i[:, None] * SIZE + i[None, :]
        tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision="ieee"))

    @triton.jit
    def _order(values, keys, back, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        x = tl.load(values + i)
        tl.store(keys + i, _tiles.in_order(x))
        tl.store(back + i, _tiles.from_order(_tiles.in_order(x), x.dtype))


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sums_in_fixed_point_are_rounded_to_nearest_and_not_toward_zero(dtype):
    """Toward zero every program's share would lose half a unit, always in the same direction."""
    values = torch.tensor([0.24, 0.26, -0.24, -0.26, 0.75, -0.75, 0.0, 1e6 + 0.25], dtype=dtype, device=DEVICE)
    sums = torch.full((8,), 100, dtype=torch.int64, device=DEVICE)
    _add[(1,)](values, sums, 2.0, SIZE=8)
    assert sums.tolist() == [100, 101, 100, 99, 102, 98, 100, 2_000_101]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_maximum_of_floats_as_integers_begins_at_zero(rng, dtype):
    info = np.finfo(np.float32 if dtype == torch.float32 else np.float64)
    some = [-np.inf, info.min, -1e30, -1.5, -info.tiny, -info.smallest_subnormal, 0.0, info.tiny, 1e-30, 1.0, info.max]
    values = torch.tensor([*some, np.inf, np.nan, *np.sort(rng.standard_normal(3))], dtype=dtype, device=DEVICE)
    keys = torch.empty(16, dtype=torch.int64, device=DEVICE)
    back = torch.empty(16, dtype=dtype, device=DEVICE)
    _order[(1,)](values, keys, back, SIZE=16)
    assert (keys > 0).all()
    assert (keys[:13].diff() >= 0).all()
    assert (keys[13:].diff() > 0).all()
    assert keys[12] > keys[11] > keys[10]
    if dtype == torch.float32:
        assert torch.equal(back[1:12], values[1:12])
    finite = values[values.isfinite()]
    # float64 gives its last bit away: what a sum is taken relative to need not be its largest term exactly.
    assert ((back[values.isfinite()] - finite).abs() <= info.eps * finite.abs() + info.smallest_subnormal).all()
    assert back[[0, 12]].isnan().all()
    of_infinity = keys[11].item()
    bits = torch.full((16,), -1, dtype=torch.int32 if dtype == torch.float32 else torch.int64, device=DEVICE)
    _order[(1,)](bits.view(dtype), keys, back, SIZE=16)  # NaN with a sign
    assert (keys > of_infinity).all()
    assert back.isnan().all()


def test_an_element_of_a_product_does_not_depend_on_its_place():
    """Equal columns give equal columns, and the transposed product gives the same elements."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(64, 64, generator=generator)
    b = torch.randn(64, 1, generator=generator).expand(64, 64).contiguous()
    of_columns, of_rows = torch.empty(64, 64, device=DEVICE), torch.empty(64, 64, device=DEVICE)
    _product[(1,)](a.to(DEVICE), b.to(DEVICE), of_columns, 64)
    _product[(1,)](b.T.contiguous().to(DEVICE), a.T.contiguous().to(DEVICE), of_rows, 64)
    assert torch.equal(of_columns, of_columns[:, :1].expand(64, 64))
    assert torch.equal(of_rows.T, of_columns)
