"""Measure everything: the fused loss, its parts, the reference, compilers, other people's code, a training step.

    python -m benchmarks.run --out FOLDER                      the rows that FOLDER/<device>.csv lacks at this commit
    python -m benchmarks.run --out FOLDER --parts loss edt     some parts
    python -m benchmarks.run --out FOLDER --tiny               every path, on small inputs and untimed

Without a GPU it times only what is used on a CPU: the loss in plain PyTorch and compiled, the relatives, distance
transforms.

Every row is compared with the reference in float64 (integers with ==) before it is timed. A row that differs is
recorded as failed. Rows are written one by one. --minutes ends a run early. The next run continues there, tries absent
rows again, and tries failed rows again last. The exit status is 1 if a row failed.
"""

import argparse
import contextlib
import functools
import gc
import io
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
from benchmarks import peers, results
from benchmarks.camvid.networks import NETWORKS
from benchmarks.results import Absent, Row
from contextrast_kernels import bane, cases, measure
from contextrast_kernels.cases import CASES, Case, Inputs
from contextrast_kernels.demo.scenes import VOID, CamVid, DataError
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

    def __init__(self, device: str, *, tiny: bool, seconds: float, frames: pathlib.Path | None):
        self.device, self.tiny, self.seconds, self.frames = torch.device(device), tiny, seconds, frames
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

    def maps_of(self, name: str) -> Case:
        """The case for rows that need only class maps. On a CPU it has one image, but of full size."""
        return self.sized(name) if self.tiny or self.on_gpu else replace(CASES[name], batch=1)

    def keep(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        """Keep the latest value of each name for the rows that follow. A new key frees the old value first."""
        if name not in self.kept or self.kept[name][0] != key:
            self.kept.pop(name, None)
            gc.collect()
            self.kept[name] = (key, make())
        return self.kept[name][1]

    def inputs(self, case: Case) -> Inputs:
        return self.keep("inputs", case, lambda: case.inputs(self.device, SEED, self.frames))

    def truth(self, case: Case) -> measure.Truth:
        def make():
            inputs = self.inputs(case)
            with ck.backend("reference"):
                return measure.truth(lambda x: loss(case, inputs._replace(features=x)), inputs.features)

        return self.keep("truth", case, make)

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
        of_case = results.of_case(case)
        labels = {"case": f"{case.name} on CamVid"} if self.frames else {}
        return Row(**{**of_case, **labels, **threads, **columns}, **self.environment)


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    return measure.graphed(lambda: call)


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
    pass_: str,
    mode: str,
    function: Callable[[Inputs], Tensor],
    count: bool = True,
) -> dict:
    exact = machine.truth(case)
    with ck.backend("triton" if by == "triton" else "reference"):
        makers = [functools.partial(prepared, pass_, function, copy) for copy in machine.copies(machine.inputs(case))]
        calls = [measure.graphed(make) if mode == "graph" else make() for make in makers]
        result = calls[0]()
        value, gradients = {FORWARD: (result, None), BACKWARD: (None, result)}.get(pass_, result)
        found = measure.check(value, gradients, exact)
        outcome = machine.outcome(calls, count=count and mode == "eager")
    if pass_ == BOTH:
        outcome["note"] = f"relative error of loss {found.value:.0e}, gradient {found.gradient:.0e}"
    if pass_ == BOTH and by == "triton":
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
            function = functools.partial(loss, case)
            yield Job(row, functools.partial(run_loss, machine, case, name, pass_, mode, function))


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
            options = settings[by]

            def run(case=case, by=by, options=options):
                torch.compiler.reset()
                options = {"backend": "eager"} if machine.tiny else options
                function = torch.compile(functools.partial(loss, case), fullgraph=True, **options)
                # On a CPU nothing is counted, because the dispatch mode that counts would disable the compiler.
                return run_loss(machine, case, by, BOTH, "eager", function, count=machine.on_gpu)

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


def equal(found: Any, expected: Any) -> None:
    """Integers, with ==."""
    for a, b in zip(found, expected, strict=True):
        if not torch.equal(a.cpu().long(), b.cpu().long()):
            raise measure.Differs(f"{int((a.cpu() != b.cpu()).sum())} of {b.numel()} pixels differ")


def negatives_of(case: Case, inputs: Inputs, distance_at: str = "layer") -> list[Tensor]:
    options = (case.num_classes, 0.5, "bane", distance_at, VOID, SEED)
    chosen, _ = bane.layer_negatives(inputs.logits, inputs.labels, case.sizes, *options)
    return list(chosen)


def parts_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """Anchors, negatives and the pixel-anchor loss, each over all layers as the public functions do them."""
    for name in names:
        case = machine.sized(name)
        for by in ("triton", "reference"):
            for part, function in (("class_anchors", anchors_of), ("pixel_anchor_loss", pixel_anchor_of)):
                row = machine.row(case, what=f"{part} of all layers {BOTH}", by=by)
                yield Job(row, functools.partial(run_part, machine, case, by, function))
        for distance_at in ("layer", "full"):
            for mode in machine.modes:
                what = f"bane_negatives of all layers, distance at {distance_at}"
                row = machine.row(case, what=what, by="contextrast", mode=mode)
                yield Job(row, functools.partial(run_negatives, machine, case, distance_at, mode))


def anchors_of(case: Case, inputs: Inputs, given: list) -> Tensor:
    anchors = [ck.class_anchors(x, inputs.labels, case.num_classes)[0] for x in inputs.features]
    return torch.stack([(a * direction).sum() for a, (direction, _, _) in zip(anchors, given)]).sum()


def pixel_anchor_of(case: Case, inputs: Inputs, given: list) -> Tensor:
    losses = [
        ck.pixel_anchor_loss(x, inputs.labels, anchors, negatives=negatives)
        for x, (_, anchors, negatives) in zip(inputs.features, given)
    ]
    return torch.stack(losses).sum()


def run_part(machine: Machine, case: Case, by: str, part: Callable[[Case, Inputs, list], Tensor]) -> dict:
    inputs = machine.inputs(case)
    generator = torch.Generator().manual_seed(SEED)
    with ck.backend("reference"):
        negatives = negatives_of(case, inputs)
        given = [
            (
                torch.randn(case.num_classes, case.channels, generator=generator).to(machine.device),
                ck.class_anchors(x, inputs.labels, case.num_classes)[0],
                chosen,
            )
            for x, chosen in zip(inputs.features, negatives)
        ]

        def of(features: list[Tensor]) -> Tensor:
            dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
            typed = [(direction.to(dtype), anchors.to(dtype), chosen) for direction, anchors, chosen in given]
            return part(case, inputs._replace(features=features), typed)

        exact = measure.truth(of, inputs.features)
    with ck.backend(by):
        found = measure.check(*measure.evaluate(of, inputs.features), exact)
        calls = [
            functools.partial(lambda copy: torch.autograd.grad(part(case, copy, given), copy.features), copy)
            for copy in machine.copies(inputs)
        ]
        outcome = machine.outcome(calls)
    return outcome | {"note": f"relative error of value {found.value:.0e}, gradient {found.gradient:.0e}"}


def run_negatives(machine: Machine, case: Case, distance_at: str, mode: str) -> dict:
    inputs = machine.inputs(case)
    with ck.backend("reference"):
        expected = negatives_of(case, inputs, distance_at)
    equal(negatives_of(case, inputs, distance_at), expected)
    copies = [inputs] if machine.tiny else [inputs._replace(labels=inputs.labels.clone()) for _ in range(4)]
    calls = [functools.partial(negatives_of, case, copy, distance_at) for copy in copies]
    if mode == "graph":
        calls = [captured(call) for call in calls]
        equal(calls[0](), expected)
    return machine.outcome(calls, count=mode == "eager")


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
    found = peers.ours(name, *batch) if ours else peers.official(name, folder, *batch)
    if found.call is None:
        raise Absent(found.note)

    def both():
        return torch.autograd.grad(found.call(), features, allow_unused=True)

    with peers.quiet():
        value = found.call()
        if not bool(value.isfinite()):
            raise measure.Differs(f"its loss is {value.item()}")
        outcome = machine.outcome([both])
    return outcome | {"exact": "another loss", "note": found.note}


def edt_part(machine: Machine, names: Sequence[str]) -> Iterator[Job]:
    """Edge distances and selections of label maps of full size, in every regime; benchmarks.distances has volumes."""
    for name in names[:1]:
        for regime in machine.some(cases.REGIMES):
            case = replace(machine.maps_of(name), regime=regime)
            for threads in (None,) if machine.on_gpu or machine.tiny else (1, 2):
                for job in (*edge_distance_jobs(machine, case), *selection_jobs(machine, case)):
                    if threads is None:
                        yield job
                    elif threads == 1 or not job.row.by.startswith(ONE_THREAD):
                        yield replace(job, row=replace(job.row, threads=threads))


ONE_THREAD = ("SciPy", "MONAI", "kornia")
"""Peers that are not faster with more threads."""


def errors_of(machine: Machine, case: Case) -> Tensor:
    """Error maps of the labels' size, int64 (B, H, W)."""

    def make():
        labels, predictions = case.label_maps(SEED, machine.frames)
        return ck.error_map(predictions, labels, num_classes=case.num_classes).long().to(machine.device)

    return machine.keep("errors", case, make)


def distances_of(machine: Machine, case: Case) -> Tensor:
    """Squared distances by the reference, on the CPU."""

    def make():
        with ck.backend("reference"):
            return ck.edge_distance(errors_of(machine, case).cpu(), squared=True)

    return machine.keep("distances", case, make)


def map_row(machine: Machine, case: Case, dtype: torch.dtype = torch.int64, **columns) -> Row:
    maps_alone = {"channels": None, "strides": "", "layout": "", "dtype": str(dtype).removeprefix("torch.")}
    return replace(machine.row(case, **columns), **maps_alone)


def edge_distance_jobs(machine: Machine, case: Case) -> Iterator[Job]:
    what = "edge_distance"
    for dtype in (torch.int64, torch.int32, torch.int8):
        for mode in machine.modes:

            def run(dtype=dtype, mode=mode):
                classes = errors_of(machine, case).to(dtype)
                count = 1 if machine.tiny else measure.copies(measure.nbytes(classes), machine.device)
                maps = [classes.clone() for _ in range(count)]
                calls = [functools.partial(ck.edge_distance, x, squared=True) for x in maps]
                if mode == "graph":
                    calls = [captured(call) for call in calls]
                equal([calls[0]()], [distances_of(machine, case)])
                return machine.outcome(calls, count=mode == "eager") | {"exact": "yes"}

            yield Job(map_row(machine, case, dtype, what=what, by="contextrast", mode=mode), run)
    for peer in peers.edge_distances(torch.zeros(1, 4, 4, dtype=torch.int64, device=machine.device)):

        def run_peer(name=peer.name):
            classes = errors_of(machine, case)
            [found] = [row for row in peers.edge_distances(classes) if row.name == name]
            if found.call is None:
                raise Absent(found.note)
            if found.exact:
                equal([peers.squared(found.call(), classes)], [distances_of(machine, case)])
            return machine.outcome([found.call]) | {"exact": "yes" if found.exact else "no", "note": found.note}

        yield Job(map_row(machine, case, what=what, by=peer.name), run_peer, ours=False)


def selection_jobs(machine: Machine, case: Case) -> Iterator[Job]:
    def given() -> tuple[Tensor, Tensor, Tensor]:
        classes = errors_of(machine, case)
        distance_sq = distances_of(machine, case)
        with ck.backend("reference"):
            expected = ck.select_nearest(classes.cpu(), distance_sq, 0.5, num_classes=case.num_classes, seed=SEED)
        return classes, distance_sq.to(machine.device), expected

    def run(mode):
        classes, distance_sq, expected = given()
        options = {"num_classes": case.num_classes, "seed": torch.tensor([SEED], device=machine.device)}
        count = 1 if machine.tiny else measure.copies(measure.nbytes([classes, distance_sq]), machine.device)
        copies = [(classes.clone(), distance_sq.clone(), 0.5) for _ in range(count)]
        calls = [functools.partial(ck.select_nearest, *copy, **options) for copy in copies]
        if mode == "graph":
            calls = [captured(call) for call in calls]
        equal([calls[0]()], [expected])
        return machine.outcome(calls, count=mode == "eager") | {"exact": "yes"}

    what = "select_nearest"
    for mode in machine.modes:
        yield Job(map_row(machine, case, what=what, by="contextrast", mode=mode), functools.partial(run, mode))
    zeros = torch.zeros(1, 4, 4, dtype=torch.int64, device=machine.device)
    for peer in peers.selections(zeros, zeros.int(), 0.5, case.num_classes, SEED):

        def run_peer(name=peer.name):
            classes, distance_sq, expected = given()
            found = [
                row for row in peers.selections(classes, distance_sq, 0.5, case.num_classes, SEED) if row.name == name
            ]
            if not found:
                raise Absent("its keys do not hold these distances")
            if found[0].exact:
                equal([found[0].call()], [expected])
            return machine.outcome([found[0].call]) | {
                "exact": "yes" if found[0].exact else "no",
                "note": found[0].note,
            }

        yield Job(map_row(machine, case, what=what, by=peer.name), run_peer, ours=False)


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
    labels, _ = (x.to(machine.device) for x in case.label_maps(SEED, machine.frames))
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


# ----------------------------------------------------------------------------------------------------------------- main

PARTS = {
    "loss": loss_part,
    "parts": parts_part,
    "edt": edt_part,
    "compiled": compiled_part,
    "peers": peers_part,
    "step": step_part,
    "scaling": scaling_part,
}
ON_CPU = ("loss", "compiled", "peers", "edt")
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


def check(options: argparse.Namespace) -> None:
    """Refuse options with which every row would fail."""
    for name in ("minutes", "row_seconds", "seconds"):
        if not 0 <= getattr(options, name) <= 86400:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: expected 0 to 86400, got {getattr(options, name)}")
    if options.peers is not None and not options.peers.is_dir():
        raise ValueError(f"--peers: expected a folder that holds checkouts, got {options.peers}")
    if options.frames is not None:
        CamVid(options.frames, 360, limit=1)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, metavar="FOLDER", help="where <device>.csv is kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help=f"default: all; on a CPU {', '.join(ON_CPU)}")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all; on a CPU cityscapes")
    parser.add_argument("--peers", type=pathlib.Path, metavar="DIR", help="checkouts of the relatives: see peers.py")
    parser.add_argument("--frames", type=pathlib.Path, metavar="DIR", help="CamVid in SegNet's layout, for the labels")
    parser.add_argument("--tiny", action="store_true", help="tiny twins of the cases, untimed, on any device")
    parser.add_argument("--again", action="store_true", help="measure also the rows that the file has")
    parser.add_argument("--minutes", type=float, default=9.0, help="start no row later than this (default: 9)")
    parser.add_argument("--row-seconds", type=float, default=180.0, help="give a row up after this (default: 180)")
    parser.add_argument("--seconds", type=float, default=0.5, help="duration of a row's measurement (default: 0.5)")
    options = parser.parse_args(arguments)
    try:
        check(options)
    except (ValueError, DataError) as error:
        parser.error(str(error))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = Machine(device, tiny=options.tiny, seconds=options.seconds, frames=options.frames)
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
