"""Measure the loss, its parts, the reference, compilers, other people's code, a training step and the host's time.

    python -m benchmarks.run --out FOLDER                      the rows that FOLDER/<device>.csv lacks at this commit
    python -m benchmarks.run --out FOLDER --parts loss step    some parts
    python -m benchmarks.run --out FOLDER --tiny               every path, on small inputs and untimed

Without a GPU it times only what is used on a CPU: the loss in plain PyTorch and compiled, the relatives, losses of a
volume, distance transforms.

Every row is compared with the reference in float64 (integers with ==) before it is timed. A row that differs is
recorded as failed. Rows are written one by one. --minutes ends a run early. The next run continues there, tries absent
rows again, and tries failed rows again last. The exit status is 1 if a row failed.
"""

import argparse
import contextlib
import functools
import gc
import io
import itertools
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import contextrast_kernels as ck
from benchmarks import distances, host, peers, results
from benchmarks.camvid.networks import NETWORKS
from benchmarks.results import Absent, Row
from contextrast_kernels import bane, cases, measure
from contextrast_kernels.cases import CASES, Case, Inputs
from contextrast_kernels.demo.scenes import VOID
from contextrast_kernels.demo.training import mixed_precision

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward+backward"
LOSS = "contextrast_loss"
SEED = 5


@dataclass(frozen=True)
class Job:
    """One row to come. ``run`` validates and measures; it returns the columns of the outcome."""

    row: Row
    run: Callable[[], dict]
    ours: bool = True
    """True if this package is at fault when the row fails."""


class Machine:
    """Where the rows are measured, how long each, and the inputs of the case at hand."""

    def __init__(self, device: str, *, tiny: bool, seconds: float, side: int = distances.SIDE):
        self.device, self.tiny, self.seconds = torch.device(device), tiny, seconds
        self.side = 16 if tiny else side
        self.on_gpu = self.device.type == "cuda"
        self.time = measure.time_calls
        self.environment = results.environment(self.device)
        self.kept: dict[str, tuple[Any, Any]] = {}

    @property
    def modes(self) -> tuple[str, ...]:
        return ("eager", "graph") if self.on_gpu else ("eager",)

    def some(self, rows: Sequence) -> Sequence:
        """The rows, or only the first one if nothing is timed."""
        return rows[:1] if self.tiny else rows

    def sized(self, name: str) -> Case:
        """The case itself on a GPU; a smaller one, in float32, on a CPU."""
        if self.tiny or self.on_gpu:
            return CASES[name].tiny() if self.tiny else CASES[name]
        return replace(CASES[name], batch=2, height=256, width=384, dtype=torch.float32)

    def keep(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Keep the latest value of each name for the rows that follow. A new key frees the old value first."""
        if name not in self.kept or self.kept[name][0] != key:
            self.kept.pop(name, None)
            gc.collect()
            self.kept[name] = (key, make())
        return self.kept[name][1]

    def inputs(self, case: Case) -> Inputs:
        return self.keep("inputs", case, lambda: case.inputs(self.device, SEED))

    def truth(self, case: Case, function: Callable[[Case, Inputs], Tensor]) -> measure.Truth:
        def make():
            inputs = self.inputs(case)
            with ck.backend("reference"):
                return measure.truth(lambda x: function(case, inputs._replace(features=x)), inputs.features)

        return self.keep("truth", (case, function), make)

    @functools.cached_property
    def bandwidth(self) -> float | None:
        return measure.copy_gb_s(self.device) if self.on_gpu and not self.tiny else None

    def copies(self, inputs: Inputs) -> list[Inputs]:
        """Copies of the inputs that together exceed the caches, each with its own leaves."""
        count = 1 if self.tiny else measure.copies(measure.nbytes(inputs.features), self.device)
        return [
            Inputs([x.detach().clone().requires_grad_() for x in inputs.features], *(t.clone() for t in inputs[1:]))
            for _ in range(count)
        ]

    def outcome(self, calls: Sequence[Callable[[], Any]], *, count: bool = True) -> dict:
        """The columns of a validated call; its copies do the same work on other memory. A replayed graph is not
        counted: it allocates nothing and asks for nothing."""
        if self.tiny and count:
            return {"status": "untimed", "syncs": measure.syncs(calls[0], self.device)}
        if self.tiny:
            calls[0]()
            return {"status": "untimed"}
        timing = self.time(calls, self.device, self.seconds)
        outcome = {"median_ms": timing.median_ms, "iqr_ms": timing.iqr_ms, "copy_gb_s": self.bandwidth}
        if count:
            outcome |= {
                "peak_mib": measure.peak_mib(calls[0], self.device),
                "launches": measure.launches(calls[0], self.device),
                "syncs": measure.syncs(calls[0], self.device),
            }
        return outcome

    def row(self, case: Case, **columns) -> Row:
        threads = {} if self.on_gpu else {"threads": torch.get_num_threads()}
        return Row(**{**results.of_case(case), **threads, **columns}, **self.environment)


# ------------------------------------------------------------------------------------------------------------ the loss


def loss(case: Case, inputs: Inputs) -> Tensor:
    return ck.contextrast_loss(inputs.features, inputs.labels, inputs.logits, seed=SEED, **case.loss_options)


def prepared(pass_: str, function: Callable[[Inputs], Tensor], inputs: Inputs) -> Callable[[], Any]:
    """The call that is timed. It returns the value, the gradients, or both."""
    if pass_ == FORWARD:
        return lambda: function(inputs)
    if pass_ == BACKWARD:
        value = function(inputs)
        return lambda: torch.autograd.grad(value, inputs.features, retain_graph=True)

    def both():
        value = function(inputs)
        return value.detach(), torch.autograd.grad(value, inputs.features)

    return both


def run_loss(
    machine: Machine,
    case: Case,
    by: str,
    pass_: str = BOTH,
    mode: str = "eager",
    function: Callable[[Case, Inputs], Tensor] = loss,
    compiler: dict | None = None,
) -> dict:
    """``compiler``: options for torch.compile, if the function is compiled."""
    exact = machine.truth(case, function)
    call = functools.partial(function, case)
    if compiler:
        torch.compiler.reset()
        call = torch.compile(call, fullgraph=True, **compiler)
    with ck.backend("triton" if by == "triton" else "reference"):
        makers = [functools.partial(prepared, pass_, call, copy) for copy in machine.copies(machine.inputs(case))]
        calls = [measure.graphed(make) if mode == "graph" else make() for make in makers]
        result = calls[0]()
        value, gradients = {FORWARD: (result, None), BACKWARD: (None, result)}.get(pass_, result)
        found = measure.check(value, gradients, exact)
        # On a CPU a dispatch mode counts, which would keep the compiler out.
        outcome = machine.outcome(calls, count=mode == "eager" and (machine.on_gpu or not compiler))
    if pass_ == BOTH:
        outcome["note"] = f"relative error of loss {found.value:.0e}, gradient {found.gradient:.0e}"
    if (pass_, by, function) == (BOTH, "triton", loss):
        outcome["plan_mb"] = planned_mb(case)
    return outcome


def planned_mb(case: Case) -> float:
    from contextrast_kernels.plan import moved, training_step

    step = training_step(case.batch, case.sizes, case.channels, case.num_classes, case.dtype, layout=case.layout)
    return sum(sum(moved(launch)) for launch in step.launches) / 1e6


def loss_jobs(machine: Machine, case: Case, passes: Sequence[str] = (BOTH,)) -> Iterator[Job]:
    """The reference is timed only forward and backward together. The kernels are timed only on a GPU, because a CPU
    interprets them."""
    fused = passes if machine.on_gpu or machine.tiny else ()
    for name, pass_ in [*(("triton", pass_) for pass_ in fused), ("reference", BOTH)]:
        for mode in machine.modes:
            row = machine.row(case, what=f"{LOSS} {pass_}", by=name, mode=mode)
            yield Job(row, functools.partial(run_loss, machine, case, name, pass_, mode))


def loss_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    for name in names:
        base = machine.sized(name)
        dtypes = dict.fromkeys((base.dtype, torch.float32))
        for form in machine.some([{"dtype": dtype, "layout": layout} for dtype in dtypes for layout in cases.LAYOUTS]):
            yield from loss_jobs(machine, replace(base, **form), machine.some((BOTH, FORWARD, BACKWARD)))
        if not machine.on_gpu and not machine.tiny:
            continue
        others = [{"regime": regime} for regime in cases.REGIMES if regime != base.regime]
        others += [{"strides": strides} for strides in cases.LAYER_SETS.values() if strides != base.strides]
        for other in machine.some(others if name == "cityscapes" else [{"regime": "collapsed"}]):
            yield from loss_jobs(machine, replace(base, **other))


def compiled_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """Time the reference under torch.compile."""
    settings = {"torch.compile": {"backend": "inductor"}, "torch.compile max-autotune": {"mode": "max-autotune"}}
    for name in names:
        case = machine.sized(name)
        for by in tuple(settings) if machine.on_gpu else ("torch.compile",):
            options = {"backend": "eager"} if machine.tiny else settings[by]
            run = functools.partial(run_loss, machine, case, by, compiler=options)
            yield Job(machine.row(case, what=f"{LOSS} {BOTH}", by=by), run)


def scaling_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """Curves through one case: pixels, classes, channels, layers, share of errors."""
    for name in names[:1]:
        base = machine.sized(name)
        curves = [{"height": base.height * h // 4, "width": base.width * w // 4} for h, w in SIDES]
        curves += [{"num_classes": N} for N in (2, 11, 59, 150, 256)]
        curves += [{"channels": base.channels * D // 256} for D in (64, 128, 512, 720)]
        curves += [{"strides": cases.HRNET[:layers]} for layers in (1, 2, 3)]
        curves += [{"regime": f"{share} % errors"} for share in (2, 5, 20, 40, 60)]
        for variant in machine.some(curves):
            yield from loss_jobs(machine, replace(base, **variant))


SIDES = ((2, 2), (2, 4), (4, 8), (8, 8))
"""Quarters of height and width: a quarter of the pixels, half of them, twice, four times as many."""


# ----------------------------------------------------------------------------------------------------------- its parts


def parts_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """Anchors, negatives and the pixel-anchor loss, each over all layers as the public functions do them."""
    for name in names:
        case = machine.sized(name)
        for function in (class_anchors, pixel_anchor_loss):
            for by in ("triton", "reference"):
                row = machine.row(case, what=f"{function.__name__} of all layers {BOTH}", by=by)
                yield Job(row, functools.partial(run_loss, machine, case, by, BOTH, "eager", function))
        for distance_at in ("layer", "full"):
            for mode in machine.modes:
                what = f"bane_negatives of all layers, distance at {distance_at}"
                row = machine.row(case, what=what, by="contextrast", mode=mode)
                yield Job(row, functools.partial(run_negatives, machine, case, distance_at, mode))


def class_anchors(case: Case, inputs: Inputs) -> Tensor:
    """The sum of the anchors' projections on one direction."""
    anchors = torch.stack([ck.class_anchors(x, inputs.labels, case.num_classes)[0] for x in inputs.features])
    return (anchors * torch.linspace(-1, 1, case.channels, dtype=anchors.dtype, device=anchors.device)).sum()


def pixel_anchor_loss(case: Case, inputs: Inputs) -> Tensor:
    """With given anchors, and every pixel of another class as a negative."""
    generator, dtype = torch.Generator().manual_seed(SEED), inputs.features[0].dtype
    anchors = F.normalize(torch.randn(case.num_classes, case.channels, generator=generator, dtype=torch.float64))
    anchors = anchors.to(inputs.labels.device, dtype if dtype == torch.float64 else torch.float32)
    return torch.stack([ck.pixel_anchor_loss(x, inputs.labels, anchors) for x in inputs.features]).sum()


def negatives_of(case: Case, inputs: Inputs, distance_at: str) -> list[Tensor]:
    options = (case.num_classes, 0.5, "bane", distance_at, VOID, SEED)
    return list(bane.layer_negatives(inputs.logits, inputs.labels, case.sizes, *options)[0])


def run_negatives(machine: Machine, case: Case, distance_at: str, mode: str) -> dict:
    inputs = machine.inputs(case)
    with ck.backend("reference"):
        expected = negatives_of(case, inputs, distance_at)
    copies = [inputs] if machine.tiny else [inputs._replace(labels=inputs.labels.clone()) for _ in range(4)]
    calls = [functools.partial(negatives_of, case, copy, distance_at) for copy in copies]
    if mode == "graph":
        calls = [measure.graphed(lambda call=call: call) for call in calls]
    for found, wanted in zip(calls[0](), expected, strict=True):
        if not torch.equal(found.long(), wanted.long()):
            raise measure.Differs(f"{int((found != wanted).sum())} of {wanted.numel()} pixels differ")
    return machine.outcome(calls, count=mode == "eager")


# ----------------------------------------------------------------------------------------------------------- distances


def distances_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """Distance transforms and edge distances of volumes, and edge distances of maps: they have cases of their own."""
    inputs = distances.cases(machine.side)
    if machine.tiny:
        inputs = list({(case.what, case.is_volume): case for case in reversed(inputs)}.values())
    threads = (None,) if machine.on_gpu else (1,) if machine.tiny else (1, 2)
    for slow, case, count in itertools.product((False, True), inputs, threads):  # what takes seconds comes last
        for name, is_slow in distances.names(case, machine.device):
            if is_slow == slow and not (slow and count == 2):
                row = Row(by=name, threads=count, **case.columns, **machine.environment)
                yield Job(row, functools.partial(run_distance, machine, case, name), name == distances.OURS)


def run_distance(machine: Machine, case: distances.DistanceCase, name: str) -> dict:
    image = machine.keep("image", case, lambda: distances.image_of(case).to(machine.device))

    def by_reference():
        """The expected distances. For volumes of full size the library's CPU code computes them, because the reference
        would take minutes."""
        with ck.backend("auto" if case.is_volume and not machine.tiny else "reference"):
            return distances.ours(case, image.cpu())

    expected = machine.keep("distances", case, by_reference)
    [found] = [row for row in distances.transforms(case, image) if row.name == name]
    library, why = peers.module(found.needs)
    if library is None:
        raise Absent(why)
    call = found.make(library)
    difference = distances.difference(call(), expected, image) if found.exact else 0.0
    if not difference <= (0.0 if name == distances.OURS else 1e-4):
        raise measure.Differs(f"a distance by {difference:g}")
    counted = machine.on_gpu or name == distances.OURS  # the memory of NumPy's peers is not torch's
    return machine.outcome([call], count=counted) | {"exact": "yes" if found.exact else "no", "note": found.note}


# ------------------------------------------------------------------------------------------------- other people's code


def peers_part(machine: Machine, names: Sequence[str], folder: pathlib.Path | None) -> Iterator[Job]:
    """The relatives, by their published code and by this package, on the same maps. Each is another loss: there is
    nothing to compare its value with."""
    for name in names:
        case = replace(machine.sized(name), dtype=torch.float32)
        if machine.tiny:
            case = replace(case, height=64, width=64)  # their samplers fail on less
        for peer in peers.RELATIVES:
            for ours in (False, True):
                row = machine.row(case, what=f"relative's loss {BOTH}", by=f"{peer}, this package" if ours else peer)
                yield Job(row, functools.partial(run_relative, machine, case, peer, folder, ours), ours)


def run_relative(machine: Machine, case: Case, name: str, folder: pathlib.Path | None, ours: bool) -> dict:
    inputs = machine.inputs(case)
    features = [x.detach().requires_grad_() for x in inputs.features]
    batch = (features, inputs.labels, inputs.logits)
    call, note = (peers.ours(name, *batch), "") if ours else peers.official(name, folder, *batch)
    with peers.quiet():
        outcome = gradients_timed(machine, call, features)
    return outcome | {"exact": "another loss", "note": note}


def gradients_timed(machine: Machine, call: Callable[[], Tensor], features: Sequence[Tensor]) -> dict:
    """The columns of a loss with its gradients."""
    value = call()
    if not bool(value.isfinite()):
        raise measure.Differs(f"its loss is {value.item()}")
    return machine.outcome([lambda: torch.autograd.grad(call(), features, allow_unused=True)])


# --------------------------------------------------------------------------------------------------- losses of a volume


def volumes_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """The loss and the relatives on one volume of 4 organs, by this package: the published code knows only maps.

    MS/CS is left out: its published settings draw 10,000 pixels of each layer, whose pairs take a CPU too long.
    """
    side = 16 if machine.tiny else 96
    for name in (LOSS, "ContrastiveSeg", "PNE_Loss", "RegionContrast"):
        by = "contextrast" if name == LOSS else f"{name}, this package"
        case = Case(f"{side}^3", 1, side, side, 4, channels=64, strides=(2, 4, 8, 16), dtype=torch.float32)
        row = replace(machine.row(case, what=f"loss of a volume {BOTH}", by=by), regime="organs", layout="contiguous")
        yield Job(row, functools.partial(run_volume, machine, case, name))


def run_volume(machine: Machine, case: Case, name: str) -> dict:
    def make():
        side, generator = case.height, torch.Generator().manual_seed(SEED)
        labels = distances.organs(side, case.num_classes)[None].long()
        wrong = labels.roll((1, 2, 1), (1, 2, 3))  # errors lie along the borders
        logits = 8 * F.one_hot(wrong, case.num_classes).movedim(-1, 1).float()
        shapes = [(1, case.channels, *(side // stride,) * 3) for stride in case.strides]
        features = [torch.randn(shape, generator=generator).to(machine.device).requires_grad_() for shape in shapes]
        return features, labels.to(machine.device), logits.to(machine.device)

    features, labels, logits = machine.keep("volume", case, make)
    if name != LOSS:
        return gradients_timed(machine, peers.ours(name, features, labels, logits), features)

    def contrast(x: Sequence[Tensor]) -> Tensor:
        return ck.contextrast_loss(x, labels, logits, seed=SEED, **case.loss_options)

    with ck.backend("reference"):
        exact = measure.truth(contrast, features)
    measure.check(*measure.evaluate(contrast, features), exact)
    return gradients_timed(machine, lambda: contrast(features), features)


# ------------------------------------------------------------------------------------------------------- training step

STEPS = {"cross-entropy": None, "with contextrast": "triton", "with the reference": "reference"}
NETWORKS_TIMED = ("efficientnet_lite0", "hrnet_w18")
"""The study's networks, from the small one to the large one."""


def step_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """A training step with cross-entropy alone, and with projection heads and the loss added: autocast, SGD,
    channels_last."""
    for name in names[:1]:
        base = machine.sized(name)
        # HRNet's branches fit together in images of such sides.
        sides = {side: max(32, getattr(base, side) // 32 * 32) for side in ("height", "width")}
        case = replace(base, layout="channels_last", strides=(), **sides)
        for network in NETWORKS_TIMED:
            for step in STEPS:
                row = replace(machine.row(case, what="training step", by=network, mode=step), channels=256)
                yield Job(row, functools.partial(run_step, machine, case, network, STEPS[step]))


def run_step(machine: Machine, case: Case, name: str, by: str | None) -> dict:
    torch.manual_seed(SEED)
    network = NETWORKS[name](case.num_classes).to(machine.device, memory_format=torch.channels_last)
    labels, _ = (x.to(machine.device) for x in case.label_maps(SEED))
    images = torch.rand(case.batch, 3, case.height, case.width).to(machine.device, memory_format=torch.channels_last)
    if by:
        with contextlib.redirect_stdout(io.StringIO()):  # the table of layers
            tap = ck.attach(network, network.layers, dim=case.channels)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    mixed = mixed_precision(machine.device)

    def contrast(features, predictions):
        options = {"num_classes": case.num_classes, "layer_weights": cases.LAYER_WEIGHTS, "seed": SEED}
        return ck.contextrast_loss(features, labels, predictions, **options)

    def step():
        with mixed:
            logits = network(images)
            total = F.cross_entropy(logits, labels, ignore_index=VOID)
            if by:
                total = total + 0.1 * contrast(tap.features(), logits)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    if by is None:
        return machine.outcome([step])
    with mixed:
        logits = network(images).detach()
        embeddings = [x.detach() for x in tap.features()]
    with ck.backend("reference"):
        exact = measure.truth(lambda x: contrast(x, logits), embeddings)
    with ck.backend(by):
        measure.check(*measure.evaluate(lambda x: contrast(x, logits), embeddings), exact)
        return machine.outcome([step])


# ------------------------------------------------------------------------------------------------------------- the host


def host_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """The time until a call on small inputs returns to the host, whatever the device does then."""
    for name in host.calls(machine.device):
        for pass_ in (FORWARD, BOTH):
            row = Row(f"host time, {pass_}", name, **machine.environment)
            yield Job(row, functools.partial(run_host, machine, name, pass_))


def run_host(machine: Machine, name: str, pass_: str) -> dict:
    call = host.calls(machine.device)[name]
    timed = call if pass_ == FORWARD else functools.partial(host.step, call)
    timed()
    if machine.tiny:
        return {"status": "untimed"}
    timing = measure.time_calls([timed], torch.device("cpu"), machine.seconds)
    return {"median_ms": timing.median_ms, "iqr_ms": timing.iqr_ms}


# ----------------------------------------------------------------------------------------------------------------- main

PARTS = {
    "loss": loss_part,
    "parts": parts_part,
    "distances": distances_part,
    "compiled": compiled_part,
    "peers": peers_part,
    "volumes": volumes_part,
    "step": step_part,
    "host": host_part,
    "scaling": scaling_part,
}
ON_CPU = ("loss", "compiled", "peers", "volumes", "distances")
"""Parts that are timed without a GPU."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """TimeoutError inside the block when the time is over."""

    def over(*_):
        raise TimeoutError(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    # Repeat the signal each second, because an exception inside a callback of the garbage collector is lost.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """Inside the block torch and OpenCV use this number of threads; None changes nothing."""
    before, (cv2, _) = torch.get_num_threads(), peers.module("cv2") if count else (None, "")
    if count:
        torch.set_num_threads(count)
    if cv2:
        cv2.setNumThreads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if cv2:
            cv2.setNumThreads(-1)


def jobs_of(machine: Machine, parts: Sequence[str], names: Sequence[str], folder: pathlib.Path | None) -> Iterator[Job]:
    """The rows of these parts and cases; ``folder`` has the checkouts of the relatives."""
    for part in parts:
        yield from PARTS[part](machine, names, **({"folder": folder} if part == "peers" else {}))


def measured(job: Job, machine: Machine, seconds: float) -> Row:
    try:
        with at_most(seconds), threads_of(job.row.threads):
            return replace(job.row, **job.run())
    except Absent as error:
        status = f"absent: {error}"
    except measure.Differs as error:
        status = f"failed: differs from the reference: {error}"
    except Exception as error:  # a row that crashes is a result too, and the next one is still wanted
        status = peers.failure(error)
        machine.kept.clear()
    return replace(job.row, status=status)


def to_do(jobs: Iterable[Job], known: dict[tuple, Row]) -> list[Job]:
    """The rows that the file lacks, then the failed ones, because a row that breaks the device stops all after it."""
    states = [(job, known[job.row.measured].status if job.row.measured in known else "absent") for job in jobs]
    return [
        *(job for job, status in states if status.startswith("absent")),
        *(job for job, status in states if status.startswith("failed")),
    ]


def duration(text: str) -> float:
    """An option's number of minutes or seconds."""
    if not 0 <= float(text) <= 86400:
        raise argparse.ArgumentTypeError(f"expected 0 to 86400, got {text}")
    return float(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="where <device>.csv is kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=f"default: all; on a CPU {', '.join(ON_CPU)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; on a CPU cityscapes")
    parser.add_argument("--peers", type=pathlib.Path, metavar="DIR", help="checkouts of the relatives: see peers.py")
    parser.add_argument("--tiny", action="store_true", help="tiny twins of the cases, untimed, on any device")
    parser.add_argument("--again", action="store_true", help="measure also the rows that the file has")
    parser.add_argument("--minutes", type=duration, default=9.0, help="start no row later than this (default: 9)")
    parser.add_argument("--row-seconds", type=duration, default=180.0, help="give a row up after this (default: 180)")
    parser.add_argument("--seconds", type=duration, default=0.5, help="duration of a row's measurement (default: 0.5)")
    options = parser.parse_args(arguments)
    if options.peers is not None and not options.peers.is_dir():
        parser.error(f"--peers: expected a folder that holds checkouts, got {options.peers}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: expected a folder, got the file {options.out}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = Machine(device, tiny=options.tiny, seconds=options.seconds)
    everywhere = machine.on_gpu or machine.tiny
    parts = options.parts or list(PARTS if everywhere else ON_CPU)
    if not everywhere and not set(parts) <= set(ON_CPU):
        parser.error(f"--parts: torch sees no GPU, and without one {', '.join(ON_CPU)} are timed. Add --tiny.")
    names = options.cases or (list(CASES) if everywhere else ["cityscapes"])
    path = results.path_of(machine.environment["device"], options.out)
    try:
        known = {} if options.again else {row.measured: row for row in results.read(path)}
    except (results.SchemaError, OSError) as error:
        parser.error(f"--out: {error}")

    ends = time.monotonic() + 60 * options.minutes
    jobs = to_do(jobs_of(machine, parts, names, options.peers), known)
    failures = 0
    while jobs and time.monotonic() <= ends:
        job = jobs.pop(0)
        row = measured(job, machine, options.row_seconds)
        failed = row.status.startswith("failed")
        if failed or row != known.get(row.measured):
            results.record(path, row)
            print(line(row), flush=True)
        failures += job.ours and failed
        if failed and not measure.answers(machine.device):
            print("the device no longer works in this process")
            break
    left = len(jobs)
    print(
        f"{failures} rows failed; {left} rows left, run again to measure them"
        if left
        else f"{failures} rows failed; complete"
    )
    return 1 if failures else 0


def line(row: Row) -> str:
    outcome = row.status if row.median_ms is None else f"{row.median_ms:.4f} ms ± {row.iqr_ms:.4f}"
    return f"{row.what:45s} {row.by:28s} {row.mode:8s} {row.case} {row.regime} {row.dtype} {row.layout}: {outcome}"


if __name__ == "__main__":
    sys.exit(main())
