"""The memory bank: a queue for every class, against Python's deque; checkpoints; two ranks under DDP."""

import copy
import pathlib
import pickle
from collections import deque

import numpy as np
import pytest
import torch
import torch.distributed as dist
from inputs import leaves, logits_of, pyramid, scene
from processes import run_ranks
from torch import nn

import contextrast_kernels as ck

pytestmark = pytest.mark.usefixtures("reference", "one_thread")

N, D = 3, 2


def contents(bank):
    """The entries of every class, queues together, in any order."""
    entries, classes = bank.columns()
    return [sorted(map(tuple, entries[classes == n].tolist())) for n in range(bank.num_classes)]


def numbered(first, count):
    """Rows whose values are the numbers of their writes."""
    return torch.arange(first, first + count).unsqueeze(1) * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize(("pixels", "regions"), [(5, 3), (1, 4), (7, 0), (0, 2)])
def test_every_queue_is_first_in_first_out(rng, pixels, regions):
    """Pushes of every size, longer than the queue too, of labels that are classes or not, against one deque a class."""
    bank = ck.MemoryBank(N, D, pixels=pixels, regions=regions)
    queues = {name: [deque(maxlen=n) for _ in range(N)] for name, n in (("pixels", pixels), ("regions", regions))}
    written = 1
    for step in range(60):
        name = ("pixels", "regions")[int(rng.integers(2))]
        count = int(rng.integers(0, 20)) if step % 3 else int(rng.integers(0, 3))
        entries, labels = numbered(written, count), rng.integers(-1, N + 1, count)
        bank.push(name, entries, torch.from_numpy(labels))
        for entry, label in zip(entries.tolist(), labels, strict=True):
            if 0 <= label < N:
                queues[name][label].append(tuple(entry))
        written += count
        assert contents(bank) == [sorted([*queues["pixels"][n], *queues["regions"][n]]) for n in range(N)]
        assert bank.counts.tolist() == [[len(q) for q in queues[name]] for name in ("pixels", "regions")]


def test_no_place_is_written_twice_by_one_push(monkeypatch):
    """On a GPU either of two writes could win. All entries that are not kept go to the last row of the storage, which
    is never read."""
    places, index_copy = [], torch.Tensor.index_copy_
    monkeypatch.setattr(
        torch.Tensor,
        "index_copy_",
        lambda x, axis, index, rows: places.append(index) or index_copy(x, axis, index, rows),
    )
    bank = ck.MemoryBank(N, D, pixels=4, regions=3)
    for queue in ("pixels", "regions"):
        bank.push(queue, numbered(0, 40), torch.arange(40) % (N + 1) - 1)
    for index, most in zip(places, (12, 9), strict=True):
        written = index[index < len(bank.storage) - 1].tolist()
        assert len(written) == len(set(written)) == most


def test_the_oldest_entry_is_overwritten_place_by_place():
    """An entry keeps its place until it is the oldest."""
    bank = ck.MemoryBank(1, D, pixels=4, regions=0)
    for n in range(11):
        bank.push("pixels", numbered(n, 1), torch.tensor([0]))
        assert bank.columns()[0][n % 4].tolist() == [n, -n]


def test_unwritten_places_are_not_columns():
    bank = ck.MemoryBank(N, D, pixels=3, regions=2)
    entries, classes = bank.columns()
    assert entries.shape == (15, D)
    assert entries.data_ptr() == bank.storage.data_ptr()  # not copied
    assert classes.tolist() == [-1] * 15
    bank.push("regions", numbered(1, 2), torch.tensor([2, 0]))
    assert bank.columns()[1].tolist() == [-1, -1, -1, 0, -1] + [-1] * 5 + [-1, -1, -1, 2, -1]


def test_only_written_places_are_copied_on_a_cpu():
    bank = ck.MemoryBank(N, D, pixels=3, regions=2)
    rows = torch.zeros(1, D, dtype=torch.float64)
    assert bank.copied_columns(rows)[0].shape == (0, D)
    bank.push("regions", numbered(1, 2), torch.tensor([2, 0]))
    entries, classes = bank.copied_columns(rows)
    assert classes.tolist() == [0, 2] and entries.dtype == torch.float64
    assert entries[1].tolist() == numbered(1, 2)[0].tolist()
    bank.storage.zero_()
    assert bool(entries.any())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entries_that_are_not_finite_are_left_out(bad):
    bank = ck.MemoryBank(N, D, pixels=3, regions=0)
    entries = numbered(1, 3)
    entries[1, 1] = bad
    bank.push("pixels", entries, torch.tensor([0, 0, 0]))
    assert contents(bank) == [[(1, -1), (3, -3)], [], []]


def batch(seed=0, B=2):
    rng = np.random.default_rng(seed)
    labels, predictions = scene(rng, B=B, N=N, H=16, W=24)
    [x] = pyramid(rng, B=B, D=D, sizes=((8, 12),), dtype=torch.float32)
    return x, labels, logits_of(predictions, N, rng)


def criterion(**options):
    bank = ck.MemoryBank(N, D, pixels=40, regions=7, **options)
    return ck.PixelContrastLoss(N, max_views=6, bank=bank, bank_pixels=3)


def test_state_dict_round_trip_continues_the_same_numbers(tmp_path):
    loss = criterion()
    for seed in range(3):
        loss(*batch(seed))
    torch.save(loss.state_dict(), tmp_path / "checkpoint.pt")
    expected = [loss(*batch(seed)).item() for seed in range(3, 9)]
    resumed = criterion()
    keys = resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert (keys.missing_keys, keys.unexpected_keys) == ([], [])
    assert [resumed(*batch(seed)).item() for seed in range(3, 9)] == expected
    assert set(loss.state_dict()) == {"seed", "bank.storage", "bank.written"}


def test_a_state_of_a_different_bank_raises_a_clear_error():
    state = criterion().state_dict()
    other = ck.PixelContrastLoss(N, bank=ck.MemoryBank(N, D, pixels=41, regions=7))
    with pytest.raises(RuntimeError, match=r"bank\.storage: expected shape \(145, 2\).*2 channels.*\(142, 2\)"):
        other.load_state_dict(state)
    del state["bank.written"]
    with pytest.raises(RuntimeError, match=r"Missing key.*bank\.written"):
        criterion().load_state_dict(state)
    assert criterion().load_state_dict(state, strict=False).missing_keys == ["bank.written"]


def test_saving_does_not_follow_later_writes_into_a_copy():
    loss = criterion()
    loss(*batch())
    twins = [copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))]
    expected = [loss(*batch(seed)).item() for seed in (1, 2)]
    for twin in twins:
        assert [twin(*batch(seed)).item() for seed in (1, 2)] == expected


def test_casting_the_module_does_not_change_the_bank():
    loss = criterion()
    loss(*batch())
    before = contents(loss.bank)
    loss.half().double().bfloat16().to("cpu")
    assert loss.bank.storage.dtype == torch.float32
    assert contents(loss.bank) == before
    assert loss(*batch()).isfinite()


def test_evaluation_reads_the_bank_and_writes_nothing():
    loss = criterion()
    loss(*batch(0))
    before = loss.bank.counts.tolist()
    loss.eval()
    assert loss(*batch(1)) == loss(*batch(1)) > 0
    assert loss.bank.counts.tolist() == before


@pytest.mark.parametrize(("backend", "mining"), [("reference", "none"), ("reference", "semi-hard"), ("triton", "none")])
def test_backward_after_the_bank_was_written_again(backend, mining):
    """Gradient accumulation: two forwards, then one backward, is the sum of both gradients."""
    if ck.available()[backend] != "ok":
        pytest.skip(f"backend {backend}: {ck.available()[backend]}")
    with ck.backend(backend):
        assert_accumulates(mining)


def assert_accumulates(mining):
    first, second = (leaves([batch(seed)[0]])[0] for seed in (1, 2))
    together, apart = criterion(), criterion()
    for loss in (together, apart):
        loss.mining = (0.5, 3, 3) if mining == "semi-hard" else None
    for loss in (together, apart):
        loss(*batch(0))
    (together(first, *batch(1)[1:]) + together(second, *batch(2)[1:])).backward()
    got = first.grad.clone(), second.grad.clone()
    first.grad = second.grad = None
    apart(first, *batch(1)[1:]).backward()
    apart(second, *batch(2)[1:]).backward()
    assert torch.equal(got[0], first.grad)
    assert torch.equal(got[1], second.grad)


# ------------------------------------------------------------------------------------------------------------ two ranks


class Model(nn.Module):
    """The loss is a part of the model, so that DistributedDataParallel sees its buffers."""

    def __init__(self, loss):
        super().__init__()
        self.head, self.loss = nn.Conv2d(D, D, 1), loss

    def forward(self, x, labels, logits):
        return self.loss(self.head(x), labels, logits)


def steps(rank, kind, folder):
    torch.manual_seed(0)
    group = dist.group.WORLD if kind == "shared" else None
    model = Model(criterion(group=group))
    replica = nn.parallel.DistributedDataParallel(model, broadcast_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pushed = []
    original = model.loss.bank.push

    def push(queue, embeddings, labels):
        pushed.append((queue, embeddings.clone(), labels.clone()))
        original(queue, embeddings, labels)

    model.loss.bank.push = push
    for step in range(4):
        x, labels, logits = batch(10 * step + rank)
        if step == 2 and rank == 1:
            labels = torch.full_like(labels, 255)  # one rank has nothing to give
        optimizer.zero_grad()
        replica(x, labels, logits).backward()
        optimizer.step()
    bank = model.loss.bank
    weights = [p.detach() for p in model.parameters()]
    torch.save((pushed, bank.storage[:-1], bank.columns()[1], weights), folder / f"{kind}-{rank}.pt")


def disagreement(rank):
    """The error if ranks write different numbers of rows, and whether a copy of the loss can then continue."""
    loss = criterion(group=dist.group.WORLD)
    said = []
    for x, labels, logits in (batch(B=1 + rank), batch(rank)):
        try:
            pickle.loads(pickle.dumps(copy.deepcopy(loss)))(x, labels, logits)
            said.append("no error")
        except ValueError as error:
            said.append(str(error))
    return said


def two_ranks(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        with ck.backend("reference"):
            torch.save(disagreement(rank), pathlib.Path(folder) / f"disagreement-{rank}.pt")
            for kind in ("own", "shared"):
                steps(rank, kind, pathlib.Path(folder))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(two_ranks, str(folder), ranks=2)
    return {
        (kind, rank): torch.load(folder / f"{kind}-{rank}.pt", weights_only=True)
        for kind in ("own", "shared", "disagreement")
        for rank in (0, 1)
    }


def replayed(*pushes):
    """A bank of one process that was given these pushes."""
    bank = ck.MemoryBank(N, D, pixels=40, regions=7)
    for queue, embeddings, labels in pushes:
        bank.push(queue, embeddings, labels)
    return bank.storage[:-1], bank.columns()[1]


def test_buffer_broadcast_leaves_every_rank_its_own_bank(ranks):
    for rank in (0, 1):
        pushed, *got, _ = ranks["own", rank]
        assert all(torch.equal(a, b) for a, b in zip(got, replayed(*pushed), strict=True))
    assert not torch.equal(ranks["own", 0][1], ranks["own", 1][1])


def test_with_a_group_all_ranks_hold_the_entries_of_all_ranks(ranks):
    (first, *bank, weights), (second, *other, other_weights) = (ranks["shared", rank] for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(bank, other, strict=True))
    in_rank_order = [
        (queue, torch.cat([x, y]), torch.cat([a, b])) for (queue, x, a), (_, y, b) in zip(first, second, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(bank, replayed(*in_rank_order), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))


def test_ranks_with_different_numbers_of_rows_raise(ranks):
    for rank in (0, 1):
        refused, accepted = ranks["disagreement", rank]
        assert refused.startswith("group: expected the same on all ranks, got 3 rows of 2 channels for the 7 regions")
        assert "on rank 0 and 6 rows" in refused
        assert accepted == "no error"
