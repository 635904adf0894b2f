"""Questions about the kernels that only a GPU answers, each with what was predicted beside what was measured.

    python -m benchmarks.probes --out FOLDER [--only WORDS] [--tiny]

Each probe runs the loss's own kernels, recorded from a real step, in small variations: other tiles, one of their
helpers replaced, other arguments. The variations are made here; the product has no switch for them, and what a
variation computes may be nonsense. Kernels are timed in a CUDA graph that repeats them, so that the host has no share;
the features are many times the L2 cache. Predictions are for an H200 and the case cityscapes, from shapes, the machine
code and assumed rates: calculated before anything had run on a device.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

import triton
from triton import language as tl

import contextrast_kernels as ck
from benchmarks import results
from benchmarks.results import Absent
from contextrast_kernels import cases, measure, native
from contextrast_kernels.cases import Case
from contextrast_kernels.kernels import _launch
from contextrast_kernels.kernels._tiles import block_of, layer_of

# --------------------------------------------------------------------------------------------------- helpers, replaced


@triton.jit
def stores_instead_of_atomics(pointer, tile, scale, mask, SHIFT: tl.constexpr = 0):
    tl.store(pointer, (tile * scale).to(tl.int64) << SHIFT, mask=mask)


@triton.jit
def weights_without_features(a, x, acc):
    """In place of a product with a tile of features, which is then not read."""
    return acc + tl.sum(a, 1)[:, None]


@triton.jit
def channels_evicted_first(row, pixel, live, d0, sD, D: tl.constexpr, CHUNK: tl.constexpr):
    d = d0 + tl.arange(0, CHUNK)
    mask = live[None, :] & (d < D)[:, None] if D % CHUNK else live[None, :]
    return tl.load(row + (d[:, None] * sD + pixel[None, :]), mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def layer_from_the_end(program, starts):
    return layer_of(tl.num_programs(0) - 1 - program, starts)


@triton.jit
def block_from_the_end(
    program, geometry, layer, ROWS: tl.constexpr, P: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr
):
    return block_of(tl.num_programs(0) - 1 - program, geometry, layer, ROWS, P, UNIT, ALIGN)


BACKWARDS = {"layer_of": layer_from_the_end, "block_of": block_from_the_end}


def variant(kernel, helpers: dict):
    """The kernel with some of its module's functions replaced."""
    source = kernel.fn
    renamed = types.FunctionType(source.__code__, source.__globals__ | helpers, source.__name__, source.__defaults__)
    renamed.__qualname__, renamed.__annotations__ = source.__qualname__, source.__annotations__
    renamed.__module__ = source.__module__
    return triton.jit(do_not_specialize=getattr(kernel, "do_not_specialize", None))(renamed)


# ------------------------------------------------------------------------------------------------ the loss's kernels


@dataclass(frozen=True)
class Probe:
    """One variation of one kernel."""

    question: str
    variation: str
    kernels: tuple[str, ...]
    """Those that are varied."""
    expected: tuple[str, str] = ("", "")
    """In NCHW and in channels_last."""
    helpers: dict | None = None
    tiles: dict | None = None
    no_negatives: bool = False
    whole_step: bool = False
    """Time the step, negatives and fills included, not the varied kernels alone."""


SUMS, SIMILARITIES, MOMENTS, GRADIENT = "_class_anchors_fwd", "_hard_similarities", "_pixel_anchor_fwd", "_features_bwd"
AS_IT_IS = "as it is"

PROBES = (
    # Does the second read of a row of features hit L1?
    Probe("second read, anchors", AS_IT_IS, (SUMS,), ("43 us", "43 us")),
    Probe(
        "second read, anchors",
        "without the second read and its product",
        (SUMS,),
        ("as it is, if the second read hits L1; else 0.6 of it",) * 2,
        {"dot_features": weights_without_features},
    ),
    Probe("second read, anchors", "P 32", (SUMS,), ("slower, unless L1 is missed",) * 2, tiles={"P": 32}),
    Probe("second read, anchors", "8 warps", (SUMS,), ("slower, unless L1 is missed",) * 2, tiles={"num_warps": 8}),
    # What share of the issue slots is used?
    Probe("issue rate, moments", AS_IT_IS, (MOMENTS,), ("69 us", "63 us")),
    Probe(
        "issue rate, moments",
        "without the second read and its products",
        (MOMENTS,),
        ("about half: instructions set the time",) * 2,
        {"dot_features": weights_without_features},
    ),
    Probe("issue rate, moments", "no negatives", (MOMENTS,), ("less by its products",) * 2, no_negatives=True),
    Probe("issue rate, moments", "P 64", (MOMENTS,), ("spills: slower",) * 2, tiles={"P": 64}),
    Probe("issue rate, moments", "8 warps", (MOMENTS,), tiles={"num_warps": 8}),
    Probe("gradient", AS_IT_IS, (GRADIENT,), ("135 us", "88 us")),
    Probe("gradient", "no negatives", (GRADIENT,), ("less by a gather",) * 2, no_negatives=True),
    Probe("gradient", "P 32", (GRADIENT,), tiles={"P": 32}),
    Probe("gradient", "8 warps", (GRADIENT,), tiles={"num_warps": 8}),
    Probe("gradient", "32 channels at a time", (GRADIENT,), tiles={"CHUNK": 32}),
    # What do integer atomics cost?
    Probe(
        "atomics, anchors",
        "plain stores",
        (SUMS,),
        ("at most 3 us less than as it is",) * 2,
        {"add_fixed": stores_instead_of_atomics},
    ),
    Probe(
        "atomics, moments",
        "plain stores",
        (MOMENTS,),
        ("at most 6 us less than as it is",) * 2,
        {"add_fixed": stores_instead_of_atomics},
    ),
    # Rows of how many pixels are skipped where they hold no negative?
    Probe("similarities", AS_IT_IS, (SIMILARITIES,), ("38 us", "4 us")),
    Probe("similarities", "P 32", (SIMILARITIES,), tiles={"P": 32}),
    Probe("similarities", "P 16", (SIMILARITIES,), ("29 us, if loads stay wide", ""), tiles={"P": 16}),
    # Is what the sweep before has read last still in L2?
    Probe("sweep order", AS_IT_IS, (), ("283 us and the negatives", "205 us and the negatives"), whole_step=True),
    Probe("sweep order", "moments from the end", (MOMENTS,), ("5-15 % less",) * 2, helpers=BACKWARDS, whole_step=True),
    Probe(
        "sweep order",
        "moments from the end, gradient reads evicted first",
        (MOMENTS, GRADIENT),
        ("5-15 % less",) * 2,
        helpers={**BACKWARDS, "channels": channels_evicted_first},
        whole_step=True,
    ),
)


def recorded(step: Callable[[], Any], tiles: dict[str, dict] | None = None) -> list[_launch.Launch]:
    """The launches of a step that really runs; kernels named in ``tiles`` get those."""
    launches: list[_launch.Launch] = []
    run, sweep = _launch.launch, _launch.sweep

    def note_and_run(kernel, grid, arguments, constants, reads=0, writes=0):
        launches.append(_launch.Launch(kernel, grid, arguments, constants, reads, writes))
        run(*launches[-1])

    def sweep_with_tiles(kernel, features, arguments, own, **rest):
        sweep(kernel, features, arguments, {**own, **(tiles or {}).get(kernel.__name__, {})}, **rest)

    with mock.patch.object(_launch, "launch", note_and_run), mock.patch.object(_launch, "sweep", sweep_with_tiles):
        step()
    return [launch for launch in launches if 0 not in launch.grid]


@contextlib.contextmanager
def substituted(probe: Probe) -> Iterator[None]:
    """What is launched inside the block is launched as the probe varies it."""
    run, made = _launch.launch, {}

    def run_varied(kernel, grid, arguments, constants, reads=0, writes=0):
        run(*varied(probe, _launch.Launch(kernel, grid, arguments, constants, reads, writes), made))

    with mock.patch.object(_launch, "launch", run_varied):
        yield


def varied(probe: Probe, launch: _launch.Launch, made: dict) -> _launch.Launch:
    """``made`` keeps the kernels, so that one is compiled once."""
    name = launch.kernel.__name__
    if name in probe.kernels and probe.helpers:
        if name not in made:
            known = {key: helper for key, helper in probe.helpers.items() if key in launch.kernel.fn.__globals__}
            made[name] = variant(launch.kernel, known)
        launch = launch._replace(kernel=made[name])
    if name in probe.kernels and probe.no_negatives:
        none = torch.full_like(launch.arguments["e"], torch.iinfo(launch.arguments["e"].dtype).max)
        launch = launch._replace(arguments={**launch.arguments, "e": none})
    return launch


def play(launches: Sequence[_launch.Launch]) -> None:
    for launch in launches:
        _launch.launch(*launch)


def timed(call: Callable[[], Any], device: torch.device, repeats: int) -> dict:
    """Of one call among ``repeats`` in a CUDA graph."""
    replay = measure.graphed(lambda: lambda: [call() for _ in range(repeats)])
    timing = measure.time_calls([replay], device, 0.3)
    return {"median_ms": timing.median_ms / repeats, "iqr_ms": timing.iqr_ms / repeats}


MAPS = ("edge distance", "selection", "window or bisection")
"""Questions without features."""
FATAL = "failed: took the device down:"


class Bench:
    """Where rows go, and which are there already."""

    def __init__(self, out: pathlib.Path | None, device: torch.device, tiny: bool, words: str):
        self.out, self.device, self.tiny, self.words = out, device, tiny, words.lower()
        self.environment = results.environment(device)
        path = results.path_of(self.environment["device"], out) if out else None
        self.path = path
        rows = results.read(path) if path else []
        again = [row for row in rows if row.status.startswith("failed") and not row.status.startswith(FATAL)]
        self.known = {row.measured for row in rows} - {row.measured for row in again}
        self.failed = False

    def probe(self, question: str, variation: str, case: Case, expected: str, run: Callable[[], dict]):
        """Measures one row, unless it was; a failure is a row too. One that takes the device down ends the program and
        is not tried again at this commit."""
        row = results.Row(
            what=f"probe: {question}",
            by=variation,
            mode="graph",
            expected=expected,
            **results.of_case(case),
            **self.environment,
        )
        if question in MAPS:
            row = replace(row, channels=None, strides="", dtype="", layout="")
        if self.words not in f"{question} {variation}".lower() or row.measured in self.known:
            return
        try:
            outcome = run()
        except Absent as reason:
            outcome = {"status": f"absent: {reason}"}
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            fatal = not measure.answers(self.device)
            outcome = {"status": f"{FATAL if fatal else 'failed:'} {type(error).__name__}: {lines[0]}"}
            self.failed = True
        row = replace(row, **outcome)
        value = f"{row.value:.4g} {row.unit}" if row.value is not None else row.status
        found = f"{1e3 * row.median_ms:.1f} us" if row.median_ms is not None else value
        layout = f"{row.layout:14}" if row.layout else " " * 14
        print(f"{question:24}{variation:52}{layout}{found:>14}   expected: {expected or '-'}", flush=True)
        if self.path:
            results.record(self.path, row)
        if row.status.startswith(FATAL):
            sys.exit("probes.py: the device answers nothing any more; run again for the other probes")

    def time(self, call: Callable[[], Any], repeats: int = 10) -> dict:
        if self.device.type == "cuda" and not self.tiny:
            return timed(call, self.device, repeats)
        call()
        return {"status": "untimed"}


def loss_step(case: Case, device: torch.device) -> Callable[[], list[Tensor]]:
    """A step of the fused loss on a case: its gradients."""
    inputs = case.inputs(device)
    features = [x.requires_grad_() for x in inputs.features]

    def step():
        with ck.backend("triton"):
            loss = ck.contextrast_loss(features, inputs.labels, inputs.logits, **case.loss_options)
            return list(torch.autograd.grad(loss, features))

    return step


def kernel_probes(bench: Bench, base: Case) -> None:
    for position, layout in enumerate(("nchw", "channels_last")):
        case = replace(base, layout=layout)
        step = loss_step(case, bench.device)
        plain: list[_launch.Launch] = []
        for probe in PROBES:

            def run(probe=probe, step=step, plain=plain):
                if probe.whole_step:
                    with substituted(probe):
                        return bench.time(step, repeats=3)
                if not plain or probe.tiles:
                    launches = recorded(step, dict.fromkeys(probe.kernels, probe.tiles or {}))
                    plain[:] = plain if probe.tiles else launches
                else:
                    launches = plain
                made = {}
                chosen = [varied(probe, launch, made) for launch in launches if launch.kernel.__name__ in probe.kernels]
                if not chosen:
                    raise Absent(f"the step launches no {' or '.join(probe.kernels)}")
                megabytes = sum(launch.reads + launch.writes for launch in chosen) / 1e6
                return {"plan_mb": megabytes, "launches": len(chosen), **bench.time(lambda: play(chosen))}

            bench.probe(probe.question, probe.variation, case, probe.expected[position], run)
        gaps(bench, case, step)
        del step
        plain.clear()


def gaps(bench: Bench, case: Case, step: Callable[[], Any]) -> None:
    """What is between launches: all of them in one graph, against each alone."""

    def run():
        launches = recorded(step)
        together = bench.time(lambda: play(launches))
        alone = [bench.time(lambda launch=launch: play([launch])) for launch in launches]
        if "median_ms" not in together:
            return together
        gap = (together["median_ms"] - sum(time["median_ms"] for time in alone)) / len(launches)
        return {"value": 1e3 * gap, "unit": "us a launch", "launches": len(launches)}

    bench.probe("gaps between launches", "in a graph", case, "below 2 us a launch", run)


# ------------------------------------------------------------------------------------------------------------ precision


def precision_probes(bench: Bench, base: Case) -> None:
    """Errors against the definition in float64, in multiples of those of the definition in the inputs' own dtype."""
    expected = {torch.float32: "gradient 1e-6 relative", torch.bfloat16: "loss 1e-8, gradient 1.7e-3 relative"}
    if bench.tiny:
        expected.pop(torch.bfloat16)  # the interpreter gets it wrong
    for dtype, prediction in expected.items():
        case = replace(base, dtype=dtype, batch=min(base.batch, 2))

        def run(case=case):
            inputs = case.inputs(bench.device)

            def loss(features):
                return ck.contextrast_loss(features, inputs.labels, inputs.logits, **case.loss_options)

            with ck.backend("reference"):
                exact = measure.truth(loss, inputs.features)
            with ck.backend("triton"):
                found = measure.agreement(*measure.evaluate(loss, inputs.features), exact)
            own = f"the definition in this dtype: loss {exact.own_value:.1e}, gradient {exact.own_gradient:.1e}"
            note = f"loss {found.value:.1e}; {own}"
            return {"value": found.gradient, "unit": "relative error of the gradient", "note": note}

        bench.probe("precision", str(dtype).removeprefix("torch."), case, prediction, run)


def size_probes(bench: Bench, base: Case) -> None:
    """Rows that no power of two divides cannot be read 16 bytes at a time."""
    sizes = {"even": (base.height, base.width), "odd": (base.height + 4, base.width + 4)}
    for layout, (name, (height, width)) in itertools.product(("nchw", "channels_last"), sizes.items()):
        case = replace(base, height=height, width=width, layout=layout)

        def run(case=case):
            launches = recorded(loss_step(case, bench.device))
            return bench.time(lambda: play(launches)) | {"launches": len(launches)}

        bench.probe("odd sizes", name, case, "" if name == "even" or layout == "nchw" else "as even", run)


# ----------------------------------------------------------------------------------------------------- integer maps


def map_probes(bench: Bench, base: Case) -> None:
    """Edge distances and selections: predictions for 8 maps of 512 x 1024."""
    slow = "52-89 us: bounded, whatever the data"
    times = {
        ("trained", torch.int64): "26-32 us",
        ("trained", torch.int32): "18-24 us",
        ("mid", torch.int64): "26-32 us",
        ("collapsed", torch.int64): slow,
        ("whole-image", torch.int64): slow,
        ("noise", torch.int64): "26-32 us",
    }
    for (regime, dtype), expected in times.items():
        case = replace(base, regime=regime)

        def run(case=case, dtype=dtype):
            classes = error_map(case, bench.device).to(dtype)
            return bench.time(lambda: native.edge_distance(classes, True))

        bench.probe("edge distance", f"{regime}, {str(dtype).removeprefix('torch.')}", case, expected, run)

    def selection():
        classes = error_map(base, bench.device)
        distance_sq, seed = native.edge_distance(classes, True), torch.zeros(1, dtype=torch.int64, device=bench.device)
        return bench.time(lambda: native.select_nearest(classes, distance_sq, 0.5, base.num_classes, seed))

    bench.probe("selection", "half of each class", base, "15-25 us", selection)
    window_probes(bench, base)


def error_map(case: Case, device: torch.device) -> Tensor:
    labels, predictions = case.label_maps()
    return ck.error_map(predictions.to(device), labels.to(device), num_classes=case.num_classes).long()


WINDOWS = (0, 2, 8, 32)


def window_probes(bench: Bench, base: Case) -> None:
    """How far a pixel is searched before its row is left to the bisection: libraries with another constant."""
    with tempfile.TemporaryDirectory() as folder:
        libraries = Windows(pathlib.Path(folder), bench)
        for window, regime in itertools.product(WINDOWS, ("trained", "mid", "collapsed")):
            case = replace(base, regime=regime)

            def run(window=window, case=case):
                classes = error_map(case, bench.device)
                expected = native.edge_distance(classes, True)
                with another_library(libraries.built()[window]):
                    if not torch.equal(native.edge_distance(classes, True), expected):
                        raise ValueError("the distances differ")
                    return bench.time(lambda: native.edge_distance(classes, True))

            expected = "8 is near the best everywhere" if window == 8 else ""
            bench.probe("window or bisection", f"window {window}, {regime}", case, expected, run)


class Windows:
    """Libraries built from csrc with other windows, at once and when first asked for."""

    def __init__(self, folder: pathlib.Path, bench: Bench):
        self.folder, self.bench, self.libraries = folder, bench, {}

    def built(self) -> dict[int, pathlib.Path]:
        if self.libraries:
            return self.libraries
        if self.bench.device.type != "cuda":
            raise Absent("needs a GPU")
        major, minor = torch.cuda.get_device_capability(self.bench.device)
        self.libraries = build_windows(self.folder, f"sm_{major}{minor}")
        return self.libraries


def build_windows(folder: pathlib.Path, architecture: str, windows: Sequence[int] = WINDOWS) -> dict[int, pathlib.Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise Absent("nvcc was not found")
    sources, running = pathlib.Path(__file__).parents[1] / "csrc", {}
    for window in windows:
        copy = folder / str(window)
        shutil.copytree(sources, copy)
        edt = copy / "edt.cu"
        text, found = re.subn(r"(constexpr int WINDOW = )\d+", rf"\g<1>{window}", edt.read_text())
        if found != 1:
            raise Absent("csrc/edt.cu has no constant WINDOW")
        edt.write_text(text)
        flags = ["-shared", "-O3", "-std=c++17", f"-arch={architecture}", "-Xcompiler", "-fPIC,-fno-math-errno"]
        files = sorted(str(file) for file in (*copy.glob("*.cpp"), *copy.glob("*.cu")))
        command = [nvcc, *flags, *files, "-o", str(copy / "library.so")]
        running[window] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for window, process in running.items():
        _, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"nvcc, window {window}: {errors.strip().splitlines()[0]}")
    return {window: folder / str(window) / "library.so" for window in windows}


@contextlib.contextmanager
def another_library(path: pathlib.Path) -> Iterator[None]:
    """native.py takes its functions from another file inside the block."""

    def forget():
        native._library.cache_clear()
        native.status.cache_clear()

    with mock.patch.object(native, "_PATH", path):
        forget()
        try:
            yield
        finally:
            forget()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probes", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, metavar="FOLDER", help="add rows to FOLDER/<device>.csv")
    parser.add_argument("--only", default="", metavar="WORDS", help="questions and variations that contain this")
    parser.add_argument("--tiny", action="store_true", help="small, untimed: without a GPU the default")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tiny = options.tiny or device.type == "cpu"
    base = cases.CASES["cityscapes"]
    base = replace(base.tiny(), batch=1) if tiny else base
    bench = Bench(options.out, device, tiny, options.only)
    kernel_probes(bench, base)
    size_probes(bench, base)
    precision_probes(bench, base)
    map_probes(bench, base)
    return int(bench.failed)


if __name__ == "__main__":
    sys.exit(main())
