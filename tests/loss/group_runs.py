"""What each process of a group computes for test_group.py: the cases, a few training steps, errors and counts."""

import copy
import datetime
import itertools
import os
import pickle
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from inputs import leaves, pyramid, scene, volume_scene
from interpreter import set_up
from processes import run_ranks
from torch import distributed as dist

import contextrast_kernels as ck

N, D, LAYERS = 4, 5, 2
SIZES = ((6, 9), (3, 4))
WEIGHTS = (1.0, 0.6)
BACKENDS = ("reference", "triton")


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
    """True if the last rank has a NaN, at a pixel of class 3."""
    quiet: bool = False
    """True if no pixel is predicted as class 3, which then has no negative."""
    volumes: bool = False
    scale: float = 1.0
    """The factor by which the features are multiplied."""
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
    "volumes": Case(images=(1, 1), volumes=True, options={"sampling": (2.5, 1.0, 1.0), "base_rate": 0.3}),
    "a NaN on one rank": Case(images=(1, 1), broken=True),
    "a NaN on one rank, in a class that has no negative": Case(broken=True, quiet=True, options={"temperature": 0.5}),
}
QUICK = ("four uneven ranks, one with an empty batch", "some base pixels, features as they are", "float16")
"""The cases that every run tests on the fused kernels. The others are slow tests, because the interpreter is slow."""
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
    if case.volumes:
        labels, predictions = volume_scene(rng, B=images, N=N, Z=4, H=12, W=18)
    else:
        labels, predictions = scene(rng, B=images, N=N, H=12, W=18)
    sizes = [(2, *size) for size in SIZES] if case.volumes else SIZES
    features = [(case.scale * x).to(case.dtype) for x in pyramid(rng, B=images, D=D, sizes=sizes)]
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
    """A rank's part of the batch of two ranks."""
    mine = slice(0, 2) if rank == 0 else slice(2, 3)
    features, labels, predictions = batch("two ranks")
    return [x[mine] for x in features], labels[mine], predictions[mine]


def loss_of(name, **more):
    options = {"layer_weights": WEIGHTS, "temperature": 0.2, "seed": 5}
    return ck.ContextrastLoss(N, **options | CASES[name].options | more)


def one_step(criterion, features, labels, predictions, reduced=None):
    """The loss, its gradients, and what the criterion says of it. ``reduced`` receives the shapes of the tensors that
    the collectives of the forward and of the backward pass reduce."""
    features = leaves(features)
    if reduced is None:
        loss = criterion(features, labels, predictions)
        loss.backward()
    else:
        loss = counted(lambda: criterion(features, labels, predictions), reduced)
        counted(loss.backward, reduced)
    return loss.detach(), [x.grad for x in features], criterion.last


def counted(step, reduced):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        result = step()
    reduced.append([e.input_shapes[0] for e in profile.events() if e.name == "_c10d_functional::all_reduce"])
    names = {e.name for e in profile.events() if "c10d" in e.name}
    assert not [name for name in names if any(other in name for other in OTHERS)], names
    return result


# -------------------------------------------------------------------------------------------------- what a rank does


def ranks_of(rank):
    """Groups of one, two and four ranks that this rank is in."""
    groups = {}
    for members in ((0,), (0, 1), (0, 1, 2, 3)):
        group = dist.new_group(list(members))  # every rank must call this
        if rank in members:
            groups[len(members)] = group
    return groups


COUNTED = {
    "float64": {},
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "features as they are": {"normalize": False},
    "a cold temperature": {"temperature": 0.001},
}
"""Kinds of losses whose reductions are counted."""
QUICKLY_COUNTED = {"float16": "float16", "features as they are": "some base pixels, features as they are"}
"""The kinds that are counted on the fused kernels too, in every run, and the case in which each is counted. One reduces
fewer numbers than the others, and one takes more reductions."""


def cases_of(rank, groups, runs):
    results, reductions = {}, {}
    for name, backend in runs:
        case = CASES[name]
        group = groups.get(len(case.images))
        if group is None:
            continue
        start = sum(case.images[:rank])
        mine = slice(start, start + case.images[rank])
        features, labels, predictions = batch(name)
        reduced = [] if backend == "triton" and name in QUICKLY_COUNTED.values() else None
        with ck.backend(backend):
            results[name, backend] = one_step(
                loss_of(name, group=group), [x[mine] for x in features], labels[mine], predictions[mine], reduced
            )
        reductions[name] = reduced
    return results, reductions


def reductions_of(rank, group, dtype=torch.float64, **options):
    features, labels, predictions = share_of(rank)
    reduced = []
    one_step(
        loss_of("two ranks", group=group, **options), [x.to(dtype) for x in features], labels, predictions, reduced
    )
    return reduced


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
        # DDP copies rank 0's seed to all ranks.
        return training(
            lambda net: torch.nn.parallel.DistributedDataParallel(net, process_group=group),
            images[mine],
            labels[mine],
            group,
            seed=3 if rank == 0 else 99,
        )


COMPILED = "random negatives at full size"
"""The options do not need distances, which take long to trace and do not depend on the group."""


def compiled(rank, group, backend):
    from torch._dynamo.testing import CompileCounterWithBackend  # its import takes as long as torch's

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
    """The errors when the two ranks differ, each in a group that is used for the first time."""
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
        # A small temperature takes one reduction more.
        "temperature": sentence(lambda: loss(temperature=(0.1, 0.001)[rank])),
        "weights": sentence(lambda: loss(layer_weights=(1.0, 0.6 + rank), base_rate=0.1 * rank)),
        "after all": sentence(loss),
    }


def alone(rank, group):
    """The errors of rank 1 when it alone calls a different loss in a group in use, and of both ranks afterwards."""
    criterion, inputs = ck.ContextrastLoss(N + 1, layer_weights=WEIGHTS, group=group), share_of(rank)
    dist.barrier(group)
    store = group.get_group_store()
    usual = store.timeout
    store.set_timeout(datetime.timedelta(seconds=1))
    alone_error = sentence(lambda: criterion(*inputs)) if rank == 1 else None
    for late in (1, 0):
        dist.barrier(group)
        if rank == late:
            one_by_one = sentence(lambda: ck.ranks.agree(group.group_name, "a kind of loss"))
    dist.barrier(group)
    store.set_timeout(usual)
    return alone_error, one_by_one, sentence(lambda: criterion(*inputs))


def second_derivative(rank, group):
    features, *maps = share_of(rank)
    features = leaves(features)
    with ck.backend("reference"):
        loss = loss_of("two ranks", group=group, detach_anchors=True)(features, *maps)
    (slope,) = torch.autograd.grad(loss, features[:1], create_graph=True)
    return sentence(lambda: slope.sum().backward())


def left_in_store(group):
    """The number of new keys in the group's store: after a loss, and while its temperature follows a schedule."""
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
    """whole: run everything, not only the cases."""
    os.environ["TRITON_INTERPRET"] = "1"  # these ranks compute on the CPU, also where there is a GPU
    torch.set_num_threads(1)
    if any(backend == "triton" for _, backend in runs):
        set_up()
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
    groups = ranks_of(rank)
    new = [dist.new_group([0, 1]) for _ in range(8)]
    cases, reductions = cases_of(rank, groups, runs)
    results = {"cases": cases}
    if rank < 2:
        if whole:
            for name, case in QUICKLY_COUNTED.items():
                results["counted", "triton", name] = reductions[case]
        pair = groups[2]
        for backend in BACKENDS if whole else ("triton",):
            with ck.backend(backend):
                for name, options in COUNTED.items():
                    if backend == "reference" or not (whole or name in QUICKLY_COUNTED):
                        results["counted", backend, name] = reductions_of(rank, pair, **options)
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
    run_ranks(run_rank, str(folder), runs, whole, ranks=4)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(4)]


ON_GPUS = ("two ranks", "some base pixels, features as they are", "normalised anchors", "float32", "float16")


def run_on_device(rank, folder, world, device, through):
    """Run a share of every batch on the rank's own device: one step that may synchronise, then one that may not."""
    device = torch.device(device, rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(through, init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    results = {}
    for name in ON_GPUS:
        features, labels, predictions = batch(name)
        mine = np.array_split(np.arange(len(labels)), world)[rank]
        share = [x[mine].to(device) for x in features], labels[mine].to(device), predictions[mine].to(device)
        # In evaluation mode both steps make the same draws.
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
