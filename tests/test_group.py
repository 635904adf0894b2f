"""The loss of the pixels of many ranks against the loss of the same pixels in one process.

Four gloo processes run all cases once; pairs of them and single ones are groups of their own. What every rank saw is
handed back and compared here.
"""

import copy
import datetime
import gc
import itertools
import pickle
import re
import weakref
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from inputs import leaves, pyramid, scene
from torch import distributed as dist
from torch._dynamo.testing import CompileCounterWithBackend

import contextrast_kernels as ck
from contextrast_kernels import contextrast, ranks

N, D, LAYERS = 4, 5, 2
SIZES = ((6, 9), (3, 4))
WEIGHTS = (1.0, 0.6)
BACKENDS = ("reference", "triton")

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo to run ranks on"
)


def every_third(labels, predictions, num_classes, seed, stream):
    """A base sampler that chooses each pixel by its place in the image, so that ranks and one process agree."""
    _, h, w = labels.shape
    return ((torch.arange(h).unsqueeze(1) + torch.arange(w) + stream) % 3 == 0).expand(labels.shape)


@dataclass(frozen=True)
class Case:
    images: tuple[int, ...] = (2, 1)
    """The number of images of each rank."""
    dtype: torch.dtype = torch.float64
    ignored_ranks: tuple[int, ...] = ()
    broken: bool = False
    """The last rank has a NaN, at a pixel of class 3."""
    quiet: bool = False
    """No pixel is taken for class 3, which has no negative then."""
    scale: float = 1.0
    """The factor that the features are multiplied with."""
    options: dict = field(default_factory=dict)


CASES = {
    "one rank": Case(images=(3,)),
    "two ranks": Case(),
    "four uneven ranks, one with an empty batch": Case(images=(2, 1, 0, 1)),
    "a rank with nothing but ignored pixels": Case(ignored_ranks=(1,)),
    "nothing valid anywhere": Case(ignored_ranks=(0, 1)),
    "no image anywhere": Case(images=(0, 0)),
    "some base pixels": Case(options={"base_rate": 0.3}),
    "some base pixels, features as they are": Case(
        images=(1, 1), scale=30.0, options={"base_rate": 0.3, "normalize": False}
    ),
    "features as they are, a class that has no negative": Case(quiet=True, options={"normalize": False}),
    "a sampler's base pixels": Case(options={"base_sampler": every_third, "negatives": "semi-hard"}),
    "all negatives": Case(images=(1, 1, 1, 1), options={"negatives": "none", "base_rate": 1.0}),
    "features as they are": Case(options={"normalize": False}),
    "dense, features as they are": Case(images=(1, 1, 1, 1), options={"normalize": False, "base_rate": 0.5}),
    "normalised anchors": Case(options={"normalize_anchors": True}),
    "detached anchors": Case(options={"detach_anchors": True}),
    "random negatives at full size": Case(options={"negatives": "semi-hard", "distance_at": "full", "ratio": 0.3}),
    "a temperature whose exponentials float64 cannot hold": Case(options={"temperature": 0.0003}),
    "float32": Case(images=(1, 1, 1, 1), dtype=torch.float32),
    "float16": Case(images=(1, 1), dtype=torch.float16),
    "a NaN on one rank": Case(images=(1, 1), broken=True),
    "a NaN on one rank, in a class that has no negative": Case(broken=True, quiet=True, options={"temperature": 0.5}),
}
QUICK = (
    "four uneven ranks, one with an empty batch",
    "some base pixels, features as they are",
    "float16",
    "a NaN on one rank",
)
"""Cases of the fused kernels for every day: their interpreter is slow."""
RUNS = [
    pytest.param(name, backend, marks=[pytest.mark.slow] * (backend == "triton" and name not in QUICK))
    for backend in BACKENDS
    for name in CASES
]
OTHERS = ("gather", "scatter", "broadcast", "all_to_all", "alltoall", "send", "recv")
"""Collectives that the loss does not call."""
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3}


def batch(name):
    """Features, labels and predictions of all ranks. Class 3 is on the last rank alone, class 0 not on it."""
    case = CASES[name]
    rng = np.random.default_rng(7)
    images = sum(case.images)
    labels, predictions = scene(rng, B=images, N=N, H=12, W=18)
    features = [(case.scale * x).to(case.dtype) for x in pyramid(rng, B=images, D=D, sizes=SIZES)]
    starts = np.cumsum((0, *case.images))
    for rank, (start, stop) in enumerate(itertools.pairwise(starts)):
        mine = labels[start:stop]
        if len(case.images) > 1:
            last = rank == len(case.images) - 1
            mine[(mine == 0) if last else (mine == 3)] = 1
        if rank in case.ignored_ranks:
            mine[:] = 255
    if case.broken:
        labels[-1, 0, 0] = 3
        features[0][-1, 2, 0, 0] = torch.nan
    if case.quiet:
        predictions[predictions == 3] = 2
    return features, labels, predictions


def share_of(rank):
    """What each of two ranks has of their batch."""
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    features, labels, predictions = batch("two ranks")
    return [x[mine] for x in features], labels[mine], predictions[mine]


def loss_of(name, **more):
    options = {"layer_weights": WEIGHTS, "temperature": 0.2, "seed": 5}
    return ck.ContextrastLoss(N, **options | CASES[name].options | more)


def one_step(criterion, features, labels, predictions):
    """The loss, its gradients, and what the criterion says of it."""
    features = leaves(features)
    loss = criterion(features, labels, predictions)
    loss.backward()
    return loss.detach(), [x.grad for x in features], criterion.last


# -------------------------------------------------------------------------------------------------- what a rank does


def ranks_of(rank):
    """Groups of one, two and four ranks that this rank is in."""
    groups = {}
    for members in ((0,), (0, 1), (0, 1, 2, 3)):
        group = dist.new_group(list(members))  # every rank takes part in making it
        if rank in members:
            groups[len(members)] = group
    return groups


def cases_of(rank, groups, runs):
    results = {}
    for name, backend in runs:
        case = CASES[name]
        group = groups.get(len(case.images))
        if group is None:
            continue
        start = sum(case.images[:rank])
        mine = slice(start, start + case.images[rank])
        features, labels, predictions = batch(name)
        with ck.backend(backend):
            results[name, backend] = one_step(
                loss_of(name, group=group), [x[mine] for x in features], labels[mine], predictions[mine]
            )
    return results


COUNTED = {
    "float64": {},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "features as they are": {"normalize": False},
    "a cold temperature": {"temperature": 0.001},
}
"""Kinds of losses whose reductions are counted."""
QUICKLY_COUNTED = ("float16", "features as they are")
"""With fused kernels every day: those with fewer numbers, and those with more reductions, than the others."""


def counted(rank, group, dtype=torch.float64, **options):
    """Element numbers of the collectives forward, and backward."""
    features, labels, predictions = share_of(rank)
    features = leaves([x.to(dtype) for x in features])
    counts, losses = [], []
    criterion = loss_of("two ranks", group=group, **options)
    for step in (lambda: losses.append(criterion(features, labels, predictions)), lambda: losses[0].backward()):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
            step()
        counts.append([e.input_shapes[0] for e in profile.events() if e.name == "_c10d_functional::all_reduce"])
        names = {e.name for e in profile.events() if "c10d" in e.name}
        assert not [name for name in names if any(other in name for other in OTHERS)], names
    return counts


class Net(torch.nn.Module):
    def __init__(self, group, seed):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, D, 3, padding=1)
        self.deep = torch.nn.Conv2d(D, D, 3, stride=2, padding=1)
        self.classify = torch.nn.Conv2d(D, N, 1)
        self.loss = ck.ContextrastLoss(
            N, layer_weights=(1.0, 0.5), negatives="semi-hard", base_rate=0.1, seed=seed, group=group
        )

    def forward(self, images, labels):
        first = self.stem(images)
        second = self.deep(first.relu())
        logits = self.classify(first)
        return self.loss([first, second], labels, logits) + 0.0 * logits.sum()


def training(wrap, images, labels, group=None, seed=3):
    """Losses and parameters after three steps, and the seed."""
    torch.manual_seed(0)
    net = Net(group, seed).double()
    model = wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(images, labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, [p.detach() for p in net.parameters()], net.loss.seed.clone()


def images_and_labels():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 12, 10, generator=generator, dtype=torch.float64)
    labels, _ = scene(np.random.default_rng(2), B=4, N=N, H=12, W=10)
    return images, labels


def trained(rank, group, backend):
    images, labels = images_and_labels()
    mine = slice(0, 3) if rank == 0 else slice(3, 4)
    with ck.backend(backend):
        # DDP hands rank 0's seed to all ranks.
        return training(
            lambda net: torch.nn.parallel.DistributedDataParallel(net, process_group=group),
            images[mine],
            labels[mine],
            group,
            seed=3 if rank == 0 else 99,
        )


COMPILED = "random negatives at full size"
"""Without distances, which have no part in a group and take long to trace."""


def compiled(rank, group, backend):
    features, *maps = share_of(rank)
    criterion = loss_of(COMPILED, group=group)

    def function(features, labels, predictions):
        return ck.contextrast_loss(
            features,
            labels,
            predictions,
            num_classes=N,
            layer_weights=WEIGHTS,
            temperature=0.2,
            seed=5,
            group=group,
            **CASES[COMPILED].options,
        )

    graphs = CompileCounterWithBackend("aot_eager")
    frames = []
    with ck.backend(backend):
        step = torch.compile(function if backend == "reference" else criterion.eval(), fullgraph=True, backend=graphs)
        for _ in range(2):
            features = leaves(features)
            loss = step(features, *maps)
            loss.backward()
            frames.append(graphs.frame_count)
    return loss.detach(), [x.grad for x in features], frames


def sentence(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def disagreements(rank, groups):
    """Each in a group that is used for the first time."""
    groups = iter(groups)
    inputs = share_of(rank)
    wider = [torch.cat([x, x], 1) for x in inputs[0]]
    half = [x.half() for x in inputs[0]]

    def loss(features=inputs[0], num_classes=N, **options):
        options = {"layer_weights": WEIGHTS, "group": next(groups)} | options
        return ck.contextrast_loss(features, *inputs[1:], num_classes=num_classes, **options)

    return {
        "num_classes": sentence(lambda: loss(num_classes=N + rank)),
        "channels": sentence(lambda: loss(wider if rank else inputs[0], normalize_anchors=True)),
        "dtype": sentence(lambda: loss(half if rank else inputs[0])),
        "layers": sentence(
            lambda: loss(inputs[0][: 2 - rank], layer_weights=WEIGHTS[: 2 - rank], normalize_anchors=True)
        ),
        "backend": sentence(ck.backend(BACKENDS[rank])(lambda: loss())),
        # Past this limit there is one reduction more.
        "temperature": sentence(lambda: loss(temperature=(0.1, 0.001)[rank])),
        "weights": sentence(lambda: loss(layer_weights=(1.0, 0.6 + rank), base_rate=0.1 * rank)),
        "after all": sentence(loss),
    }


def alone(rank, group):
    """The errors of rank 1 when it alone calls a different loss in a group in use, and then together with rank 0."""
    criterion, inputs = ck.ContextrastLoss(N + 1, layer_weights=WEIGHTS, group=group), share_of(rank)
    dist.barrier(group)
    store = group.get_group_store()
    usual = store.timeout
    store.set_timeout(datetime.timedelta(seconds=1))
    said = sentence(lambda: criterion(*inputs)) if rank == 1 else None
    for late in (1, 0):
        dist.barrier(group)
        if rank == late:
            one_by_one = sentence(lambda: ck.ranks.agree(group.group_name, "a kind of loss"))
    dist.barrier(group)
    store.set_timeout(usual)
    return said, one_by_one, sentence(lambda: criterion(*inputs))


def second_derivative(rank, group):
    features, *maps = share_of(rank)
    features = leaves(features)
    with ck.backend("reference"):
        loss = loss_of("two ranks", group=group, detach_anchors=True)(features, *maps)
    (slope,) = torch.autograd.grad(loss, features[:1], create_graph=True)
    return sentence(lambda: slope.sum().backward())


def left_in_store(group):
    """Keys that are new in the group's store: after a loss, and while its numbers follow a schedule."""
    store, inputs = group.get_group_store(), batch("two ranks")
    store.set("own", "")
    counts = []
    for temperatures in ((0.1,), (0.2, 0.3), (0.001,)):  # the last takes one reduction more
        dist.barrier(group)
        before = store.num_keys()
        dist.barrier(group)
        for temperature in temperatures:
            loss_of("two ranks", group=group, temperature=temperature)(*inputs)
            exchanges = ck.ranks._agreed[group].exchanges
        dist.barrier(group)
        counts.append((store.num_keys() - before, exchanges))
    return counts


def copies(group):
    criterion = loss_of("two ranks", group=group)
    for made in (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))):
        assert made.options == criterion.options
    return repr(criterion)


def run_rank(rank, folder, runs, whole):
    """whole: also what is no case."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    groups = ranks_of(rank)
    new = [dist.new_group([0, 1]) for _ in range(8)]
    results = {"cases": cases_of(rank, groups, runs)}
    if rank < 2:
        pair = groups[2]
        for backend in BACKENDS if whole else ("triton",):
            with ck.backend(backend):
                for name, options in COUNTED.items():
                    if backend == "reference" or (name in QUICKLY_COUNTED) == whole:
                        results["counted", backend, name] = counted(rank, pair, **options)
        for backend in BACKENDS if whole else ():
            results["compiled", backend] = compiled(rank, pair, backend)
        results["trained"] = trained(rank, pair, "reference" if whole else "triton")
        if whole:
            results["disagreements"] = disagreements(rank, new)
            results["alone"] = alone(rank, pair)
            results["second derivative"] = second_derivative(rank, pair)
            results["copies"] = copies(pair)
    dist.barrier()
    if whole:
        results["left in store"] = left_in_store(dist.group.WORLD)
        criterion = loss_of("two ranks", group=groups[4])
    dist.destroy_process_group()
    if whole:
        results["destroyed"] = sentence(lambda: criterion(*batch("two ranks")))
        results["destroyed, at construction"] = sentence(lambda: loss_of("two ranks", group=groups[4]))
    torch.save(results, f"{folder}/{rank}.pt")


def spawned(folder, runs, whole):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # these ranks compute on the CPU, also where there is a GPU
        torch.multiprocessing.spawn(run_rank, args=(str(folder), runs, whole), nprocs=4)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each rank saw."""
    runs = [(name, "reference") for name in CASES] + [(name, "triton") for name in QUICK]
    return spawned(tmp_path_factory.mktemp("ranks"), runs, True)


@pytest.fixture(scope="module")
def seen_slowly(tmp_path_factory):
    return spawned(
        tmp_path_factory.mktemp("slow_ranks"), [(name, "triton") for name in CASES if name not in QUICK], False
    )


# ------------------------------------------------------------------------------------------------------------ tests


def single(name):
    with ck.backend("reference"):
        return one_step(loss_of(name), *batch(name))


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * 1e-2, equal_nan=True)


@pytest.mark.parametrize(("name", "backend"), RUNS)
def test_ranks_get_the_loss_and_gradient_of_one_process(request, name, backend):
    case = CASES[name]
    seen = request.getfixturevalue("seen_slowly" if backend == "triton" and name not in QUICK else "seen")
    loss, gradients, report = single(name)
    if case.broken:
        assert loss.isnan()
    elif "anywhere" not in name:
        assert loss > 0.1
    members = [seen[rank]["cases"][name, backend] for rank in range(len(case.images))]
    for mine, _, my_report in members:
        close(mine, loss, TOLERANCE[case.dtype])
        assert torch.equal(mine, members[0][0]) or case.broken
        for key, value in report.items():
            if value.is_floating_point():
                close(my_report[key], value, TOLERANCE[case.dtype])
            else:
                assert torch.equal(my_report[key], value), key
    for i, gradient in enumerate(gradients):
        # DDP would divide by the number of ranks.
        averaged = torch.cat([mine[i] for _, mine, _ in members]) / len(members)
        if not case.broken:
            scale = gradient.abs().max() if gradient.numel() else 0
            assert ((averaged - gradient).abs() <= TOLERANCE[case.dtype] * scale).all()


@pytest.mark.parametrize(
    ("backend", "name", "ranks"),
    [
        *(("reference", name, "seen") for name in COUNTED),
        *(("triton", name, "seen") for name in QUICKLY_COUNTED),
        *(
            pytest.param("triton", name, "seen_slowly", marks=pytest.mark.slow)
            for name in COUNTED
            if name not in QUICKLY_COUNTED
        ),
    ],
)
def test_a_step_reduces_three_times_forward_and_at_most_once_backward(request, backend, name, ranks):
    """As many numbers a layer as docs/distributed.md says; one maximum more where exponents have no small bound, and in
    the fused loss one where features have none."""
    if backend == "reference":
        first, third, backward = N * (D + 1) + 2, N + 1, [N * (D + 1) + 2]
    else:
        first, third, backward = N * (D + 2) + 2, N * (2 * D + 3), []
    forward = [first, N, third]
    if name in ("features as they are", "a cold temperature"):
        forward.insert(1, N)
    if name == "features as they are" and backend == "triton":
        forward.insert(0, 1)
    for rank in range(2):
        shapes = request.getfixturevalue(ranks)[rank]["counted", backend, name]
        counts = [[np.prod(shape) / LAYERS for shape in pass_] for pass_ in shapes]
        assert counts == [forward, backward]


@pytest.mark.parametrize("ranks", ["seen", pytest.param("seen_slowly", marks=pytest.mark.slow)])
def test_ddp_steps_are_the_steps_of_one_process(request, ranks):
    images, labels = images_and_labels()
    with ck.backend("reference"):
        losses, parameters, seed = training(lambda net: net, images, labels)
    assert losses[0] != losses[-1]
    for rank in range(2):
        my_losses, my_parameters, my_seed = request.getfixturevalue(ranks)[rank]["trained"]
        close(torch.stack(my_losses), torch.stack(losses), 1e-8)
        for mine, parameter in zip(my_parameters, parameters, strict=True):
            close(mine, parameter, 1e-8)
        assert torch.equal(my_seed, seed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_in_one_graph_it_is_the_same(seen, backend):
    for rank in range(2):
        loss, gradients, _ = seen[rank]["cases"][COMPILED, "reference"]
        compiled_loss, compiled_gradients, frames = seen[rank]["compiled", backend]
        assert frames == [1, 1]
        close(compiled_loss, loss, 1e-9)
        for compiled_gradient, gradient in zip(compiled_gradients, gradients, strict=True):
            close(compiled_gradient, gradient, 1e-9)


def test_every_rank_raises_if_options_differ(seen):
    first, second = (seen[rank]["disagreements"] for rank in range(2))
    assert first == second
    of_layers = "{} channels in {} layers of {}".format
    assert {
        what: re.search("got (.*) on rank 0 and (.*) on rank 1; use", said).groups()
        for what, said in first.items()
        if what != "after all"
    } == {
        "num_classes": ("num_classes=4", "num_classes=5"),
        "channels": (of_layers(5, 2, "float64"), of_layers(10, 2, "float64")),
        "dtype": (of_layers(5, 2, "float64"), of_layers(5, 2, "float16")),
        "layers": (
            of_layers(5, 2, "float64") + ", layer_weights=(1.0, 0.6)",
            of_layers(5, 1, "float64") + ", layer_weights=(1.0,)",
        ),
        "backend": ("backend 'reference'", "backend 'triton'"),
        "temperature": ("temperature=0.1", "temperature=0.001"),
        "weights": ("layer_weights=(1.0, 0.6), base_rate=0.0", "layer_weights=(1.0, 1.6), base_rate=0.1"),
    }
    assert all(
        said.startswith("ValueError: group: expected the same on all ranks") for said in list(first.values())[:-1]
    )
    assert first["after all"] == "no error"


def test_a_rank_that_calls_alone_raises_after_the_timeout(seen):
    said, one_by_one, together = zip(seen[0]["alone"], seen[1]["alone"])
    assert all("expected all 2 ranks to call the loss with a kind of loss, as rank" in each for each in one_by_one)
    assert said[1].startswith("RuntimeError: group: expected all 2 ranks to call the loss with num_classes=5; ")
    assert together == ("no error", "no error")


def test_ranks_compare_once_per_kind_and_clean_the_store(seen):
    assert [seen[rank]["left in store"] for rank in range(4)] == [[(0, 1), (0, 1), (0, 2)]] * 4


def test_a_second_derivative_is_refused(seen):
    assert all("once_differentiable" in seen[rank]["second derivative"] for rank in range(2))


def test_a_loss_with_a_group_is_copied_and_pickled(seen):
    assert "group=" in seen[0]["copies"]


def test_a_destroyed_group_raises_a_clear_error(seen):
    for rank in range(4):
        for sentence in (seen[rank]["destroyed"], seen[rank]["destroyed, at construction"]):
            assert sentence.startswith("RuntimeError: group: expected an existing process group"), sentence


@pytest.mark.parametrize("bound", [None, 1.0, 300.0, 301.0, 745.0, 5000.0])
def test_log_sums_keep_their_range(one_rank, bound):
    """Whether they are shifted by a bound, or by the largest where float64 cannot hold the exponentials."""
    size = 5000.0 if bound is None else bound
    log_sums = torch.tensor([-size, -0.5 * size, 0.0, size, -torch.inf], dtype=torch.float64)
    found = ranks.log_sum_exp(log_sums, ranks.name_of(dist.group.WORLD), bound)
    torch.testing.assert_close(found, log_sums, rtol=1e-12, atol=1e-12)
    assert ranks.log_sum_exp(torch.tensor([torch.nan]), ranks.name_of(dist.group.WORLD), bound).isnan()


@pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")
def test_more_pixels_than_the_fixed_point_has_room_for_are_refused(one_rank, monkeypatch):
    inputs = batch("two ranks")
    with ck.backend("triton"):
        loss_of("two ranks", group=dist.group.WORLD)(*inputs)
        monkeypatch.setattr(ranks, "MOST_PIXELS", 3 * SIZES[0][0] * SIZES[0][1] - 1)
        with pytest.raises(ValueError, match=r"^features\[0\]: expected at most 161 pixels on each rank"):
            loss_of("two ranks", group=dist.group.WORLD)(*inputs)


@pytest.mark.skipif(ck.available()["triton"] != "ok", reason=f"triton: {ck.available()['triton']}")
def test_sums_over_ranks_do_not_modify_their_inputs(one_rank, monkeypatch):
    monkeypatch.setattr(ranks, "reduced", lambda x, *_: 2 * x.detach())
    features, labels, _ = batch("two ranks")
    errors = torch.tensor([7, 3])
    e = torch.full((3 * sum(h * w for h, w in SIZES),), 255, dtype=torch.uint8)
    options = (N, 255, list(WEIGHTS), 0.2, 0.7, 0.0, True, False, False, errors)
    seed, name = torch.zeros((), dtype=torch.int64), ranks.name_of(dist.group.WORLD)
    _, _, report, *_ = contextrast._contextrast_loss(features, labels, e, [], seed, *options, name)
    assert report[3].tolist() == [14, 6]
    assert errors.tolist() == [7, 3]


def test_the_criterion_passes_its_group_to_the_loss(one_rank):
    features, labels, predictions = batch("two ranks")
    logits = torch.nn.functional.one_hot(predictions, N).movedim(-1, 1).double()
    losses = []
    for group in (None, dist.group.WORLD):
        criterion = ck.ContextrastCriterion(N, layer_weights=WEIGHTS, group=group)
        assert criterion.contrast.options.group == ranks.name_of(group)
        losses.append(criterion(features, labels, logits))
    close(losses[1], losses[0], 1e-9)


def test_comparisons_are_forgotten_with_their_group(one_rank):
    ck.ranks.agree(ck.ranks.name_of(dist.group.WORLD), "a kind of loss")
    group = weakref.ref(dist.group.WORLD)
    dist.destroy_process_group()
    gc.collect()
    assert group() is None


# -------------------------------------------------------------------------------------------------------------- GPUs

ON_GPUS = ("two ranks", "some base pixels, features as they are", "normalised anchors", "float32", "float16")


def run_on_device(rank, folder, world, device, through):
    """A share of every batch on a device of one's own: a step that may wait for the device, then one that may not."""
    device = torch.device(device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(through, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name in ON_GPUS:
        features, labels, predictions = batch(name)
        mine = np.array_split(np.arange(len(labels)), world)[rank]
        share = [x[mine].to(device) for x in features], labels[mine].to(device), predictions[mine].to(device)
        # The same draws in both steps.
        criterion = loss_of(name, group=dist.group.WORLD).to(device).eval()
        first = one_step(criterion, *share)  # compiles kernels; ranks agree
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            again = one_step(criterion, *share)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        scores = ck.metrics.ConfusionMatrix(N)
        scores.update(share[2], share[1])
        assert torch.equal(first[0], again[0]) and all(map(torch.equal, first[1], again[1]))
        assert all(value.device.type == device.type for value in [again[0], *again[1], *again[2].values()])
        results[name] = torch.utils._pytree.tree_map(lambda x: x.cpu(), (*again, scores.compute()))
    dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.gpu
@pytest.mark.parametrize("world", [1, 2])
def test_gpus_get_the_loss_of_one_process_without_synchronisation(tmp_path, world):
    if not dist.is_nccl_available():
        pytest.skip("this torch has no NCCL")
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} CUDA devices; there is {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(run_on_device, args=(str(tmp_path), world, "cuda", "nccl"), nprocs=world)
    check_devices([torch.load(tmp_path / f"{rank}.pt") for rank in range(world)])


def check_devices(seen):
    for name in ON_GPUS:
        loss, gradients, report = single(name)
        tolerance = TOLERANCE[CASES[name].dtype]
        matrix = ck.metrics.ConfusionMatrix(N)
        matrix.update(*batch(name)[:0:-1])
        for my_loss, _, my_report, scores in (results[name] for results in seen):
            close(my_loss, loss, tolerance)
            for key in ("classes", "positives", "negatives", "errors"):
                assert torch.equal(my_report[key], report[key]), key
            torch.testing.assert_close(scores, matrix.compute(), rtol=0, atol=0, equal_nan=True)
        for i, gradient in enumerate(gradients):
            averaged = torch.cat([results[name][1][i] for results in seen]) / len(seen)
            assert ((averaged - gradient).abs() <= tolerance * gradient.abs().max()).all()
