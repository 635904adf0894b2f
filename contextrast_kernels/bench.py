"""Compare the loss on your shapes with its reference in plain PyTorch.

Give --shape and --classes, or --case for one of the paper's settings. The loss runs on generated scenes and is compared
with the reference in float64. A Markdown table shows time, peak memory and errors; progress goes to stderr. With --plan
nothing is run: the launches of the fused loss and the bytes they move are calculated from the shapes alone.
"""

import argparse
import pathlib
import sys
import time
from dataclasses import replace

import torch

import contextrast_kernels as ck
from contextrast_kernels import measure
from contextrast_kernels.backend import MOST_CHANNELS, MOST_CLASSES
from contextrast_kernels.cases import CASES, LAYER_SETS, LAYOUTS, REGIMES, Case
from contextrast_kernels.demo.scenes import DataError

DTYPES = ("bfloat16", "float16", "float32", "float64")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m contextrast_kernels bench",
        usage="python -m contextrast_kernels bench (--shape B,H,W --classes N | --case NAME | --plan) [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python -m contextrast_kernels bench --shape 4,512,512 --classes 21 --channels 128",
    )
    what = parser.add_argument_group("what to run")
    shapes = what.add_mutually_exclusive_group()
    shapes.add_argument("--shape", metavar="B,H,W", help="number of images, height and width of the labels")
    shapes.add_argument("--case", choices=CASES, help="one of the paper's settings")
    what.add_argument("--classes", type=int, metavar="N", help="number of classes, with --shape")
    parser.add_argument(
        "--channels", type=int, default=256, metavar="D", help="channels of the embeddings (default: 256)"
    )
    parser.add_argument(
        "--layers",
        choices=LAYER_SETS,
        default="hrnet",
        help="strides of the layers: hrnet has 4 to 32 (default: hrnet)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the features (default: bfloat16, on a CPU float32)")
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="nchw", help="memory layout of the features (default: nchw)"
    )
    parser.add_argument(
        "--regime",
        default="trained",
        help=f"kind of predictions: {', '.join(REGIMES)} or '30 %% errors' (default: trained)",
    )
    parser.add_argument(
        "--frames", type=pathlib.Path, metavar="DIR", help="CamVid's folder; its labels replace the generated ones"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of each measurement (default: 1)")
    parser.add_argument("--plan", action="store_true", help="list launches and bytes; nothing is run")
    parser.add_argument(
        "--base-rate",
        type=float,
        default=0.0,
        metavar="RATE",
        help="share of all pixels that are negatives in addition to the hard ones (default: 0)",
    )
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(arguments)
    if not 0 <= options.base_rate <= 1:
        parser.error(f"--base-rate: expected 0 to 1, got {options.base_rate}. Give a share of the pixels.")
    if not 0 < options.seconds <= 600:
        parser.error(f"--seconds: expected above 0 and at most 600, got {options.seconds}. The default is 1.")
    case = _case(options, parser)
    if options.plan:
        if case.channels > MOST_CHANNELS:
            parser.error(
                f"--channels: expected 1 to {MOST_CHANNELS}, which the kernels take, got {case.channels}. Give fewer."
            )
        if case.num_classes > MOST_CLASSES:
            parser.error(
                f"--classes: expected 2 to {MOST_CLASSES}, which the kernels take, got {case.num_classes}. Give fewer."
            )
        try:
            from contextrast_kernels import plan
        except ImportError as error:
            parser.error(f"--plan: Triton cannot be imported ({error}). Install it: pip install triton.")
        print_plan(case, options.base_rate, plan.training_step)
        return 0
    try:
        return compare(case, options.base_rate, options.frames, options.seconds)
    except DataError as error:
        parser.error(f"--frames: {error}")
    except (RuntimeError, MemoryError) as error:  # torch's error for it depends on the device
        if "memory" not in str(error).lower():
            raise
        parser.error(f"{case} needs more memory than is available. Give fewer images, such as --shape 1,512,512.")


def _case(options: argparse.Namespace, parser: argparse.ArgumentParser) -> Case:
    """The case that the options describe; exits with an error if there is none."""
    if options.shape is None:
        if options.classes is not None:
            parser.error("--classes: expected --shape with it. A --case has its own number of classes.")
        case = CASES[options.case or "cityscapes"]
        if options.case is None and not options.plan:
            parser.error("expected --shape B,H,W with --classes N, or --case, got none of them. Give one of the two.")
    else:
        try:
            batch, height, width = (int(side) for side in options.shape.split(","))
        except ValueError:
            parser.error(f"--shape: expected B,H,W, got {options.shape!r}. Give three integers, such as 8,512,1024.")
        if options.classes is None:
            parser.error(
                "--classes: expected the number of classes with --shape, got none. Give it, such as --classes 19."
            )
        if not (batch >= 1 and 8 <= height <= 16384 and 8 <= width <= 16384):
            parser.error(
                f"--shape: expected at least one image, with sides of 8 to 16384 pixels, got {options.shape}. "
                "Give other sizes."
            )
        case = replace(CASES["cityscapes"], name="shape", batch=batch, height=height, width=width)
    dtype = options.dtype or ("bfloat16" if torch.cuda.is_available() or options.plan else "float32")
    if options.channels < 1:
        parser.error(f"--channels: expected at least 1, got {options.channels}. Give more.")
    try:
        return replace(
            case,
            num_classes=options.classes if options.classes is not None else case.num_classes,
            channels=options.channels,
            strides=LAYER_SETS[options.layers],
            dtype=getattr(torch, dtype),
            layout=options.layout,
            regime=options.regime,
        )
    except ValueError as error:
        parser.error(str(error).replace("num_classes", "--classes", 1).replace("regime:", "--regime:", 1))


# ------------------------------------------------------------------------------------------------------------ measured


def implementations(device: torch.device, case: Case) -> dict[str, str]:
    """The implementations to compare: the one that "auto" chooses on a device, and the reference; name → backend."""
    status = ck.available()
    fused = device.type == "cuda" and case.num_classes <= MOST_CLASSES and case.channels <= MOST_CHANNELS
    parts = [name for name in ("triton", "native") if status[name] == "ok" and (name == "native" or fused)]
    fast = parts if "triton" in parts else [*parts, "reference"]
    return {" + ".join(fast): "auto", "reference": "reference"}


def compare(case: Case, base_rate: float, frames: pathlib.Path | None, seconds: float) -> int:
    """Print the table; return 1 if a result differs from the reference."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _say(f"{case}: drawing the inputs")
    inputs = case.inputs(device, frames=frames)

    def loss(features):
        options = {**case.loss_options, "base_rate": base_rate}
        return ck.contextrast_loss(features, inputs.labels, inputs.logits, **options)

    def step():
        value = loss(leaves)
        return value.detach(), torch.autograd.grad(value, leaves)

    _say("the reference in float64, for comparison")
    with ck.backend("reference"):
        exact = measure.truth(loss, inputs.features)
    leaves = [x.requires_grad_() for x in inputs.features]
    rows, differs = {}, []
    for name, backend in implementations(device, case).items():
        _say(f"{name}: a step to check")
        with ck.backend(backend):
            began = time.perf_counter()
            value, gradients = step()
            _say(f"{name}: the first call took {time.perf_counter() - began:.2g} s; timing more")
            try:
                measure.check(value, gradients, exact)
            except measure.Differs as difference:
                differs.append(f"{name}: {difference}")
            found = measure.agreement(value, gradients, exact)
            del value, gradients
            times = [measure.time_calls([call], device, seconds) for call in (lambda: loss(leaves), step)]
            rows[name] = (*times, measure.peak_mib(step, device), found)
    print(_table(case, base_rate, device, rows))
    for sentence in differs:
        print(f"\nthe result differs from the reference: {sentence}. Please file an issue with this output.")
    return 1 if differs else 0


def _say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def _table(case: Case, base_rate: float, device: torch.device, rows: dict) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    base = f", base rate {base_rate:g}" if base_rate else ""
    slowest = rows["reference"][1].median_ms
    lines = [
        f"{case}{base}; on {where}, torch {torch.__version__}",
        "",
        "| | forward | forward + backward | times faster | memory | error of the loss | of the gradient |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (forward, both, peak, found) in rows.items():
        lines.append(
            f"| {name} | {_ms(forward)} | {_ms(both)} | {slowest / both.median_ms:.1f} | {peak:.1f} MiB "
            f"| {found.value:.1e} | {found.gradient:.1e} |"
        )
    lines += [
        "",
        "Times: median ± interquartile range. Memory: peak memory of a step, above inputs, loss and gradients"
        + ("." if device.type == "cuda" else ", without that of the native library.")
        + "\nErrors: relative to the reference in float64.",
    ]
    return "\n".join(lines)


def _ms(timing: measure.Timing) -> str:
    return f"{timing.median_ms:.3g} ± {timing.iqr_ms:.2g} ms"


# ---------------------------------------------------------------------------------------------------------- calculated


def print_plan(case: Case, base_rate: float, training_step) -> None:
    step = training_step(
        case.batch, case.sizes, case.channels, case.num_classes, case.dtype, layout=case.layout, base_rate=base_rate
    )
    features = case.feature_bytes
    print(
        f"{case}, base rate {base_rate:g}; features {features / 1e6:.1f} MB.\n"
        "All launches of a training step, and the bytes that each kernel of the loss reads and writes at least once,\n"
        "calculated from its grid and tiles. Those of _hard_similarities are at most these: it skips rows without a\n"
        "negative.\n"
        "Nothing was run.\n"
    )
    print(f"{'kernel':<28}{'programs':>10}{'reads MB':>11}{'writes MB':>11}{'x features':>12}")
    for row in step.rows:
        if row.programs is None:
            print(row.name)
        else:
            reads, writes, moved = row.reads / 1e6, row.writes / 1e6, (row.reads + row.writes) / features
            print(f"{row.name:<28}{row.programs:>10}{reads:>11.2f}{writes:>11.2f}{moved:>12.3f}")
    total = sum(row.reads + row.writes for row in step.rows)
    print(
        f"\n{len(step.rows)} launches, {total / 1e6:.1f} MB: {total / (4 * features):.2f} x the floor of 4 x features "
        "(three reads, one write)."
    )
    if step.peak is None:
        print("Peak memory: unknown, since the native library was built without CUDA.")
    else:
        print(
            f"Peak memory above inputs and gradients, calculated: {step.peak / 2**20:.2f} MiB, "
            f"{100 * step.peak / features:.2f} % of the features."
        )
