"""The relatives' samplers against literal loops, pixel by pixel; their distribution; their shapes."""

import literal_relatives as literal
import numpy as np
import pytest
import torch
from inputs import scene
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import contextrast_kernels as ck
from contextrast_kernels.relatives.samplers import SAMPLERS, indices_of, rank_in_segment, take_rows, thinned

pytestmark = pytest.mark.usefixtures("reference", "one_thread")

N = 4


def maps(rng, B=3, H=11, W=13, **options):
    labels, predictions = scene(rng, B=B, N=N, H=H, W=W, **options)
    return torch.where(labels == 255, -1, labels), predictions


def pixels(chosen):
    return {tuple(p) for p in chosen.nonzero().tolist()}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize(
    ("max_samples", "max_views", "min_pixels"),
    [(1000, 9, 10), (1000, 10, 3), (30, 100, 1), (61, 7, 8), (5, 3, 1), (1000, 1000, 1), (1000, 1, 2), (40, 100, 200)],
)
def test_the_chosen_pixels_are_those_of_the_loops(rng, kind, max_samples, max_views, min_pixels):
    """Plenty, odd and even V, a cap that binds, more pairs than samples, more views than pixels, no pair at all."""
    sampler = ck.Sampler(kind, max_samples, max_views, min_pixels)
    for seed in (0, -3, 2**40 + 7):
        labels, predictions = maps(rng)
        predictions[0, 0, :5] = torch.tensor([N, 77, -1, -9, N])  # predictions that are no class are wrong, too
        chosen = sampler(labels, predictions, N, seed, 1003)
        expected = literal.sample(
            kind, labels.numpy(), predictions.numpy(), N, seed, 1003, max_samples, max_views, min_pixels
        )
        assert chosen.dtype == torch.bool
        assert pixels(chosen) == expected
        assert torch.equal(chosen, sampler(labels, predictions, N, torch.tensor(seed), 1003))


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_label_outside_the_classes_is_ignored(rng, kind):
    """Whatever its number: 255 is neither a pixel of another image's class nor out of bounds."""
    labels, predictions = maps(rng)
    expected = ck.Sampler(kind, 60, 7, 1)(labels, predictions, N, 5)
    for nobody in (N, 255):
        raw = torch.where(labels < 0, nobody, labels).to(torch.uint8)
        assert torch.equal(ck.Sampler(kind, 60, 7, 1)(raw, predictions, N, 5), expected)
    assert not expected[labels < 0].any()


@pytest.mark.parametrize("right", range(8))
@pytest.mark.parametrize("wrong", range(8))
def test_every_case_of_the_quota(right, wrong):
    """One class of `right` + `wrong` pixels, V from 1 to 9: the official four cases, and too few pixels."""
    labels = torch.where(torch.arange(20) < right + wrong, 0, -1).reshape(1, 4, 5)
    predictions = torch.where(torch.arange(20) < right, 0, 1).reshape(1, 4, 5)
    for views in range(1, 10):
        chosen = ck.Sampler("hard-easy", 100, views, 1)(labels, predictions, 2, 5)
        hard, easy = (chosen & (predictions == 1)).sum(), (chosen & (predictions == 0)).sum()
        assert hard + easy == min(views, right + wrong)
        if wrong >= views / 2 and right >= views / 2:
            assert hard == views // 2
        elif right + wrong >= views:
            assert hard == wrong if wrong < views / 2 else easy == right


@pytest.mark.parametrize(("kind", "least"), [("hard-easy", 8), ("bane", 8), ("common-count", 5)])
def test_the_published_least_count_is_the_default(kind, least):
    """ContrastiveSeg keeps pairs of more than max_views pixels, MS/CS of at least 5."""
    for count in range(3, 10):
        labels = torch.where(torch.arange(20) < count, 0, -1).reshape(1, 4, 5)
        assert ck.Sampler(kind, 100, 7)(labels, labels, 2, 0).any() == (count >= least)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_never_more_than_the_static_cap(rng, kind):
    for _ in range(40):
        B = int(rng.integers(0, 6))
        labels, predictions = maps(rng, B=B, H=int(rng.integers(1, 9)), W=int(rng.integers(1, 9)))
        sampler = ck.Sampler(kind, *(int(n) for n in rng.integers(1, 30, 3)))
        most = sampler.most(B, N, labels[0].numel() if B else 64)
        assert sampler(labels, predictions, N, 1).sum() <= most <= labels.numel()


@pytest.mark.parametrize("kind", ["hard-easy", "common-count", "uniform"])
def test_every_pixel_is_drawn_equally_often(kind):
    """χ² over 48 pixels of one class and kind, of which 12 are drawn for each of 3000 seeds, and over the pairs of
    pixels that are drawn together. Draws without replacement: the statistic is scaled by the variance of one count.

    For fixed seeds the outcome never changes; one false alarm in 10^6 was allowed a priori.
    """
    labels = torch.zeros(1, 6, 8, dtype=torch.int64)
    sampler, draws = ck.Sampler(kind, 12, 12, 1), 3000
    chosen = torch.stack([sampler(labels, labels, 2, seed).flatten() for seed in range(draws)]).double()
    assert (chosen.sum(1) == 12).all()
    n, p = 48, 12 / 48
    counts = chosen.sum(0)
    statistic = ((counts - draws * p) ** 2).sum() / (draws * p * (1 - p)) * (n - 1) / n
    assert statistic < stats.chi2.isf(1e-6, n - 1)
    assert statistic > stats.chi2.ppf(1e-6, n - 1)
    together = (chosen.T @ chosen)[torch.triu_indices(n, n, 1).unbind()]
    q = 12 * 11 / (48 * 47)
    assert abs(together.mean() / draws - q) < 1e-12
    assert ((together - draws * q) ** 2).mean() / (draws * q * (1 - q)) < 1.25


def test_hard_and_easy_pixels_are_drawn_equally_often():
    """As above, with 16 wrong pixels, of which 6 are drawn, and 32 right ones, of which 6 are drawn."""
    labels = torch.zeros(1, 6, 8, dtype=torch.int64)
    predictions = (torch.arange(48) % 3 == 0).long().reshape(1, 6, 8)
    sampler = ck.Sampler("hard-easy", 12, 12, 1)
    chosen = torch.stack([sampler(labels, predictions, 2, seed).flatten() for seed in range(3000)]).double()
    for kind in (0, 1):
        counts = chosen[:, predictions.flatten() == kind].sum(0)
        n, p = len(counts), 6 / len(counts)
        statistic = ((counts - 3000 * p) ** 2).sum() / (3000 * p * (1 - p)) * (n - 1) / n
        assert stats.chi2.ppf(1e-6, n - 1) < statistic < stats.chi2.isf(1e-6, n - 1)


def test_a_draw_depends_on_neither_batch_nor_rank_and_changes_with_seed_and_stream(rng):
    labels, predictions = maps(rng, B=2)
    sampler = ck.Sampler("hard-easy", 1000, 6)
    both = sampler(labels, predictions, N, 3)
    alone = torch.cat([sampler(labels[b : b + 1], predictions[b : b + 1], N, 3) for b in range(2)])
    assert torch.equal(both, alone)
    assert not torch.equal(both, sampler(labels, predictions, N, 4))
    assert not torch.equal(both, sampler(labels, predictions, N, 3, 1001))


def test_bane_takes_hard_pixels_at_the_edge_of_their_error_region():
    """A disc of class 0 predicted as class 1: its rim has D = 0 and goes first, whatever the seed."""
    r, c = torch.meshgrid(torch.arange(21), torch.arange(21), indexing="ij")
    disc = (r - 10) ** 2 + (c - 10) ** 2 <= 64
    predictions = disc.long()[None]
    labels = torch.zeros_like(predictions)
    distance = ck.edge_distance(torch.where(disc, 1, -1)[None], squared=True)
    rim = distance == 0
    for seed in range(5):
        hard = ck.Sampler("bane", 40, 40)(labels, predictions, 2, seed) & disc
        assert hard.sum() == 20
        assert (hard & rim).sum() == 20
        spread = ck.Sampler("hard-easy", 40, 40)(labels, predictions, 2, seed) & disc
        assert (spread & ~rim).any()


def test_rank_in_segment_counts_the_elements_before(rng):
    segment = torch.from_numpy(rng.integers(0, 6, (4, 17)))
    # With equal ones: two images give the pixels of one place the same hash.
    order = torch.from_numpy(rng.integers(0, 30, (4, 17)))
    rank, place = rank_in_segment(segment, 5, order), torch.arange(68).reshape(4, 17)
    for at in np.ndindex(4, 17):
        if segment[at] < 5:
            before = (order < order[at]) | ((order == order[at]) & (place < place[at]))
            assert rank[at] == ((segment == segment[at]) & before).sum()
    assert rank_in_segment(segment[:0], 5, order[:0]).shape == (0, 17)


def test_thinned_keeps_the_first_chosen_pixels_or_all_if_they_are_few(rng):
    chosen, order = torch.from_numpy(rng.random((3, 9)) < 0.4), torch.from_numpy(rng.permutation(27).reshape(3, 9))
    total = int(chosen.sum())
    for most in (0, 1, total - 1, total, 27):
        kept = thinned(chosen, most, order)
        assert kept.sum() == min(most, total)
        assert not (kept & ~chosen).any()
        if 0 < most < total:
            assert order[kept].max() < order[chosen & ~kept].min()


class Traced(TorchDispatchMode):
    """A dispatch mode that changes nothing: with one, no value may decide a shape."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


def test_indices_have_no_padding_where_values_may_be_read(rng):
    chosen = torch.from_numpy(rng.random((3, 9)) < 0.4)
    found = chosen.flatten().nonzero().squeeze(1)
    for most in (0, 1, len(found) - 1, len(found), len(found) + 1, 27):
        index, filled = indices_of(chosen, most)
        n = min(most, len(found))
        assert index.tolist() == found[:n].tolist() and filled.tolist() == [True] * n
        with Traced():
            index, filled = indices_of(chosen, most)
        assert index.tolist() == found[:n].tolist() + list(range(n, most))
        assert filled.tolist() == [True] * n + [False] * (most - n)


def test_rows_are_read_from_any_strides_and_only_where_filled(rng):
    x = torch.from_numpy(rng.standard_normal((2, 3, 4, 5))).requires_grad_()
    index, filled = torch.tensor([21, 3, 0]), torch.tensor([True, True, False])
    for y in (x, x.to(memory_format=torch.channels_last), x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)):
        rows = take_rows(y, index, filled, normalize=False)
        assert torch.equal(rows, torch.stack([x[1, :, 0, 1], x[0, :, 0, 3], torch.zeros(3)]))
    with torch.no_grad():
        x[0, :, 0, 0] = float("nan")  # pixel 0 stands in for what is not filled
    rows = take_rows(x, index, filled, normalize=True)
    rows.sum().backward()
    assert rows.isfinite().all()
    assert x.grad.isfinite().all()
    assert x.grad.any(1).sum() == 2
