"""Generate the tables of README.md and docs/ and the plots of docs/camvid.md from results/*.csv.

    python -m benchmarks.report            writes them
    python -m benchmarks.report --check    exits with 1 if a page or plot does not match the results

In README.md, docs/method.md and docs/distance.md the text between ``<!-- measured: NAME -->`` and ``<!-- end -->`` is
generated. performance.md and camvid.md are generated as a whole. The metadata of a plot hold a digest of the rows that
it was drawn from, so it can be checked without drawing it again.
"""

import argparse
import functools
import hashlib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple

import torch

from benchmarks import distances, host, results
from benchmarks.camvid import page as camvid
from benchmarks.camvid.rows import FILE, Result
from benchmarks.results import IDENTITY, NOT_YET, Row, table
from contextrast_kernels.cases import CASES, LAYER_SETS, REGIMES, Case

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- measured: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
BOTH = "contextrast_loss forward+backward"
OURS = (distances.OURS, "contextrast", "triton")
RELATED = "relative's loss"
"""What the rows call a related loss."""
METHODS = {"MS_CS_ContrSeg": "MS/CS", "PNE_Loss": "PNE"}
"""The related losses whose repository has another name."""
LOSSES = ("contextrast_loss", RELATED, "loss of a volume")
COUNTED, TRIED = "counted.md", "tried.md"
"""``python -m tests.compiled.counts --write`` writes the first one. The second one lists what was tried for the kernels
and is written by hand."""
STRIDES = {"-".join(map(str, strides)) for strides in LAYER_SETS.values()}
PAPER = {(case.batch, case.height, case.width, case.num_classes, case.channels) for case in CASES.values()}


# ------------------------------------------------------------------------------------------------------------- the rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each measurement, whatever its commit or versions. Untimed rows are not measurements."""
    found: dict[tuple, Row] = {}
    for row in rows:
        if row.status != "untimed":
            found[tuple(getattr(row, name) for name in IDENTITY if name not in ("commit", "torch"))] = row
    return list(found.values())


def pick(rows: Iterable[Row], **equal) -> list[Row]:
    """Timed rows that have these values."""
    return [
        row for row in rows if row.status == "ok" and all(getattr(row, name) == value for name, value in equal.items())
    ]


def grouped(rows: Iterable[Row], key: Callable[[Row], object]) -> dict:
    groups: dict = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def of_the_paper(row: Row) -> bool:
    """Whether the row has the sizes of one of the paper's settings."""
    return (row.batch, row.height, row.width, row.classes, row.channels) in PAPER


def on_a_curve(row: Row) -> bool:
    """Whether the row was measured to show how the cost grows."""
    return not of_the_paper(row) or row.regime not in REGIMES or row.strides not in STRIDES


def place(row: Row) -> tuple:
    """The device, version and commit of a row. Ratios are formed only of times from the same place."""
    return row.device, row.torch, row.commit


def sizes(row: Row) -> tuple:
    return row.case, row.regime, row.batch, row.height, row.width, row.classes, row.channels, row.strides


def setting(row: Row) -> tuple:
    """Rows of one setting are compared with each other."""
    return *sizes(row), row.dtype, row.layout, row.threads, *place(row)


def of_one_device(rows: Sequence[Row]) -> list[Row]:
    """The rows of the device that has most of them."""
    return max(grouped(rows, lambda row: row.device).values(), key=len, default=[])


# --------------------------------------------------------------------------------------------------------------- tables


def ms(row: Row | None, spread: bool = True) -> str:
    if row is None:
        return "–"
    if row.median_ms is None:
        return row.status
    median = f"{row.median_ms:.3g}" if row.median_ms < 999.5 else f"{row.median_ms:.0f}"
    return median + (f" ± {row.iqr_ms:.2g}" if spread and row.iqr_ms else "") + " ms"


def ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None or slow.median_ms is None or fast.median_ms is None:
        return "–"
    return f"{slow.median_ms / fast.median_ms:.3g}"


def first(rows: Iterable[Row]) -> Row | None:
    return next(iter(rows), None)


def number(value: float | None, unit: str = "") -> str:
    return "–" if value is None else f"{value:.3g}{unit}"


def sources(rows: Sequence[Row]) -> str:
    """A sentence with the devices, versions and commits of a table's rows."""
    lines = []
    for row in map(first, grouped(rows, lambda row: (*place(row), row.driver, row.triton)).values()):
        versions = (("driver", row.driver), ("torch", row.torch), ("Triton", row.triton))
        named = ", ".join(f"{name} {version}" for name, version in versions if version)
        lines.append(f"{row.device}, {named}, commit {row.commit}")
    return "Measured on " + "; ".join(lines) + "." if lines else ""


def with_sources(text: str, rows: Sequence[Row]) -> str:
    return "\n\n".join(filter(None, (text, sources(rows))))


def distances_in_short(rows: Sequence[Row]) -> str:
    """Maps and binary volumes on one thread: ours, and the fastest of the others."""
    rows = [row for row in pick(rows, mode="isotropic", threads=1) if not row.driver]
    rows = of_one_device([row for row in rows if (row.case == "cityscapes") == (row.what == "edge_distance")])
    lines = []
    for of_input in grouped(rows, lambda row: (row.case, row.regime, *place(row))).values():
        ours = first(row for row in of_input if row.by in OURS)
        fastest = first(sorted((row for row in of_input if row.by not in OURS), key=lambda row: row.median_ms))
        if ours and fastest:
            theirs = f"{ms(fastest, False)} ({fastest.by})"
            lines.append((distances.spoken(ours), ms(ours, False), theirs, ratio(fastest, ours)))
    head = ("input", "this library", "fastest peer", "times faster")
    return with_sources(table(head, sorted(lines, reverse=True)), rows)


def distances_on_cpu(rows: Sequence[Row]) -> str:
    rows = [row for row in pick(rows) if row.mode.startswith(("isotropic", "2.5")) and not row.driver]
    return distances.table(of_one_device(rows)) if rows else NOT_YET


def described(row: Row) -> str:
    """Case and regime, with the sizes where they are not the case's own."""
    sizes = "" if of_the_paper(row) else f", {row.batch}×{row.height}×{row.width}, N {row.classes}, D {row.channels}"
    return f"{row.case}{sizes}, {row.regime}"


def times_floor(row: Row) -> float | None:
    """The time divided by that of a copy of four times the features' bytes.

    Forward and backward together need at least three reads and a write of the features.
    """
    if row.median_ms is None or row.copy_gb_s is None:
        return None
    strides, dtype = map(int, row.strides.split("-")), getattr(torch, row.dtype)
    case = Case("", row.batch, row.height, row.width, row.classes, row.channels, tuple(strides), dtype)
    return row.median_ms * row.copy_gb_s / (4 * case.feature_bytes / 1e6)


def loss_on_gpu(rows: Sequence[Row]) -> str:
    """The fused loss beside the reference, plain and compiled: a line for each setting."""
    rows = [row for row in rows if row.what == BOTH and row.driver]
    lines = []
    for of_setting in grouped(rows, setting).values():
        fused = first(pick(of_setting, by="triton", mode="graph")) or first(pick(of_setting, by="triton", mode="eager"))
        eager = first(pick(of_setting, by="triton", mode="eager"))
        reference = first(pick(of_setting, by="reference", mode="eager"))
        compiled = sorted(
            (row for row in pick(of_setting) if row.by.startswith("torch.compile")), key=lambda row: row.median_ms
        )
        failed = first(row for row in of_setting if row.by == "triton" and row.status.startswith("failed"))
        if not fused and not failed:
            continue
        row = fused or failed
        percent = row.percent_of_copy
        lines.append(
            (
                described(row),
                f"{row.dtype}, {row.layout}, {row.strides}",
                ms(row),
                ms(eager, False),
                ratio(reference, fused),
                ratio(first(compiled), fused),
                f"{number(eager and eager.peak_mib)} / {number(reference and reference.peak_mib)}",
                number(eager and eager.launches),
                number(eager and eager.syncs),
                number(percent, " %"),
                number(times_floor(row)),
            )
        )
    head = (
        *("case", "features", "CUDA graph", "eager", "× reference", "× torch.compile", "MiB: fused / reference"),
        *("launches", "syncs", "of copy bandwidth", "× floor"),
    )
    return with_sources(table(head, lines), [row for row in rows if row.status == "ok"])


def by(row: Row) -> str:
    """Whose or which implementation a row times, and its mode. A compiled call has no mode "eager"."""
    name, of_this_package, _ = row.by.partition(", this package")
    if of_this_package or row.what.startswith(RELATED):
        name = f"{METHODS.get(name, name)} ({'this package' if of_this_package else 'official code'})"
    return name if (name.startswith("torch.compile") and row.mode == "eager") else f"{name}, {row.mode}"


def everything(rows: Sequence[Row], chosen: Callable[[Row], bool]) -> str:
    """A line for each row, within each setting the fastest first; failures and absences stay.

    A related loss is compared with ours, which on a CPU is the reference; a training step with that of cross-entropy
    alone; and the host's time with that of a plain op.
    """
    rows = [row for row in rows if chosen(row)]
    lines = []

    def compared(row: Row) -> tuple:
        network = row.by if row.what == "training step" else ""
        return row.what.replace(RELATED, "contextrast_loss"), network, *sizes(row), *place(row)

    for of_setting in grouped(rows, compared).values():
        timed = sorted(pick(of_setting), key=lambda row: row.median_ms)
        ours = first(row for row in timed if row.by in (*OURS, host.PLAIN) or row.mode == "cross-entropy")
        ours = ours or first(row for row in timed if row.by == "reference" and not row.driver)
        for row in sorted(of_setting, key=lambda row: (row.median_ms is None, row.median_ms or 0.0)):
            name = f"{row.case} {row.regime}".strip()
            threads = f", {row.threads} threads" if row.threads else ""
            size = f"{row.batch}×{row.height}×{row.width}, N {row.classes}" if row.batch else ""
            on = " ".join(filter(None, (name, size, row.dtype, row.layout)))
            counts = f"{number(row.launches)} / {number(row.syncs)}"
            what = row.what.replace(RELATED, "related loss")
            cells = (what, f"{by(row)}{threads}", on, ms(row), ratio(row, ours), counts)
            lines.append((*cells, number(row.peak_mib), row.exact))
    head = ("what", "by", "on", "time", "× ours", "launches / syncs", "MiB", "exact")
    return with_sources(table(head, lines), [row for row in rows if row.status == "ok"])


# ---------------------------------------------------------------------------------------------------------------- plots


def digest(draw: functools.partial, rows: Sequence[Row]) -> str:
    """A hash of all that a picture depends on: the rows, the code that draws them and its options."""
    text = f"{inspect.getsource(draw.func)}{draw.keywords}\n" + "\n".join(map(str, map(astuple, rows)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(path: pathlib.Path, draw: functools.partial, rows: Sequence[Row]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figures = []

    def axes_of(count: int, size: tuple[float, float]):
        figure, axes = pyplot.subplots(1, count, figsize=size, squeeze=False)
        figures.append(figure)
        return list(axes[0])

    draw(axes_of, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    [figure] = figures
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Description": digest(draw, rows)})
    pyplot.close(figure)


def drawn_from(path: pathlib.Path) -> str:
    """The digest in a picture's metadata; "" where there is no picture."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.info.get("Description", "")
    except OSError:
        return ""


# ---------------------------------------------------------------------------------------------------------------- pages

HOW_MEASURED = """\
This page is generated by `python -m benchmarks.report` from `benchmarks/results/`; CI fails if they differ. Times and \
memory come from the csv files there, and counts from `counted.md`, which `python -m tests.compiled.counts --write` \
writes. `tried.md`, the list of variants that were tried, is written by hand.

- Every result is checked before it is timed: losses and gradients against the reference in float64, integers with \
==.
- Times are medians ± interquartile ranges. On a GPU they are measured with CUDA events. Our calls cycle through \
copies of their inputs that together exceed the L2 cache. The peers' code uses one copy.
- Memory is the peak that torch allocates during the call, beyond inputs and results.
- Rows in which this library is slower are kept."""
LOSS_ON_GPU = """\
The times cover forward and backward of all layers and the choice of negatives. × is the other implementation's time \
divided by that of the fused loss, as a CUDA graph if one was measured. The floor is the time of a copy of four times \
the features' bytes (three reads and one write) at the bandwidth measured in the same run. The share of the copy \
bandwidth is based on the planned bytes. They are an upper bound: the plan reads all features once more for the \
similarities of negatives, and the kernels read only the rows that have negatives."""
COLUMNS = """\
"× ours" is the time divided by that of the fastest row {ours} of the same sizes. A related loss is compared with the \
Contextrast loss. "Launches / syncs" counts kernels, fills and copies on the device, and the times that the host waits \
for it (on a CPU the operations that would wait). "MiB" is the peak memory. "Exact" says of a peer whether its result \
equals the reference's, or that it is another loss. A dash means not measured."""
NOTHING_ON_GPU = """\
Not measured yet. Nothing has run on a GPU so far. The fused Triton kernels of the loss and the CUDA kernels of \
`csrc/` are executed from their PTX on a CPU and compared with the reference there (`tests/compiled`), and they are \
compiled ahead of time for sm_80, 90 and 100. `python -m contextrast_kernels bench --plan` lists the launches and the \
bytes of the fused loss."""


def performance(rows: Sequence[Row], counted: str = "") -> str:
    """docs/performance.md. counted: what ``python -m tests.compiled.counts --write`` wrote."""

    def gpu(*names: str) -> Callable[[Row], bool]:
        return lambda row: bool(row.driver) and row.what.startswith(names)

    def beside_relatives(row: Row) -> bool:
        form = (row.dtype, row.layout, row.mode, row.by)
        return row.what == BOTH and of_the_paper(row) and form == ("float32", "nchw", "eager", "triton")

    alone = ("contextrast_loss forward", "contextrast_loss backward")
    relatives = [row for row in rows if gpu(RELATED)(row) or (gpu(BOTH)(row) and beside_relatives(row))]
    on_gpu = [
        loss_on_gpu([row for row in rows if not on_a_curve(row)]),
        "### Cost at other sizes",
        loss_on_gpu([row for row in rows if on_a_curve(row)]),
        "### Forward and backward alone",
        COLUMNS.format(ours="`triton`, `contextrast` or `contextrast native`"),
        everything(rows, lambda row: gpu(*alone)(row) and row.what in alone),
        "### Parts of the loss",
        everything(rows, gpu("class_anchors", "pixel_anchor", "bane_negatives")),
        "### Published code of related losses",
        "The table compares the cost of a step with other losses on the same maps, not which loss is better.",
        everything(relatives, bool),
        "### Losses of a volume",
        everything(rows, gpu("loss of a volume")),
        "### In a training step",
        "A step includes the loss and its projection heads. × is the time divided by that of cross-entropy alone.",
        everything(rows, gpu("training step")),
        "### On the host",
        "The table has the time until a call returns, on inputs so small that kernels take none. × is the time divided "
        "by that of a plain custom op.",
        everything(rows, gpu("host time")),
        "### Distance transforms",
        everything(rows, gpu("edge_distance", "distance_transform")),
    ]
    sections = [
        "# Performance",
        HOW_MEASURED,
        "## The loss on a GPU",
        *([LOSS_ON_GPU, *on_gpu] if any(row.driver for row in rows) else [NOTHING_ON_GPU]),
        "## Counted, not timed" if counted else "",
        counted.strip(),
        "## On a CPU",
        "[Distance transforms](distance.md#speed) have a page of their own.",
        "### The loss",
        COLUMNS.format(ours="`reference` (`contextrast` for a volume)"),
        everything(rows, lambda row: not row.driver and row.what.startswith(LOSSES)),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def blocks(rows: Sequence[Row]) -> dict[str, str]:
    """The generated parts of README.md and docs/distance.md."""
    paper = [
        row
        for row in rows
        if of_the_paper(row) and row.regime == "trained" and row.strides == "4-8-16-32" and row.dtype == "bfloat16"
    ]
    on_gpu = any(row.driver for row in rows)
    return {
        "distances-in-short": distances_in_short(rows),
        "distances": distances_on_cpu(rows),
        "loss-gpu": loss_on_gpu(paper) if on_gpu else NOTHING_ON_GPU,
    }


def filled(text: str, parts: dict[str, str]) -> str:
    """A page with its blocks replaced. A block that is not generated is a KeyError."""
    return BLOCK.sub(lambda match: f"{match[1]}{parts[match[2]]}\n{match[3]}", text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something is stale")
    parser.add_argument("--results", type=pathlib.Path, default=results.FOLDER, metavar="FOLDER", help="the CSV files")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT, metavar="FOLDER", help="holds README.md and docs/")
    options = parser.parse_args(arguments)
    rows, trainings = latest(results.read_all(options.results)), results.read(options.results / FILE, Result)
    written = [options.results / name for name in (COUNTED, TRIED)]
    counted = "\n".join(path.read_text() for path in written if path.exists())
    docs = options.root / "docs"
    drawings = camvid.plots(trainings)
    pages = (options.root / "README.md", docs / "method.md", docs / "distance.md")
    parts = blocks(rows) | {"camvid-evidence": camvid.evidence(trainings)}
    parts["camvid-in-short"] = f"Does it help? {camvid.headline(trainings)}."
    texts = {path: filled(path.read_text(), parts) for path in pages}
    texts |= {
        docs / "performance.md": performance(rows, counted),
        docs / "camvid.md": camvid.page(trainings, drawings),
    }
    pictures = {docs / "camvid" / f"{name}.png": drawing for name, drawing in drawings.items()}
    left_over = set((docs / "camvid").glob("*.png")) - set(pictures)
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    stale += [path for path, drawing in pictures.items() if drawn_from(path) != digest(*drawing)]
    stale += sorted(left_over)
    if options.check:
        for path in stale:
            print(f"{path.relative_to(options.root)} does not match the results: run python -m benchmarks.report")
        return 1 if stale else 0
    for path in stale:
        if path in texts:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(texts[path])
        elif path in pictures:
            render(path, *pictures[path])
        else:
            path.unlink()
        print(path.relative_to(options.root))
    return 0


if __name__ == "__main__":
    sys.exit(main())
