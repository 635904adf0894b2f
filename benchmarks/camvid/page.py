"""docs/camvid.md, its plots, and the evidence in docs/method.md, from ``results/camvid.csv`` alone."""

import statistics
from collections.abc import Callable, Iterable, Sequence

from benchmarks.camvid import rows as schema
from benchmarks.camvid.arms import ARMS, TABLES, Arm
from benchmarks.camvid.networks import NETWORKS
from benchmarks.camvid.rows import Result
from benchmarks.camvid.training import FULL, SHORTENED
from contextrast_kernels.demo.scenes import ZOOM

PAPER = {
    "components": ("HRNet-W48, CamVid", {"baseline": 82.17, "ccl": 83.14, "semi-hard": 83.38, "bane": 84.33}),
    "relatives": ("HRNet-W48, CamVid", {"baseline": 82.17, "multi-scale": 83.14, "bane": 84.33}),
    "fusion": (
        "HRNet-W48, Cityscapes",
        {"fusion-0": 81.15, "fusion-0.3": 81.27, "fusion-0.5": 81.80, "ccl": 81.88, "fusion-1": 81.31},
    ),
    "ratio": (
        "HRNet-W48, Cityscapes",
        {"ccl": 81.88, "ratio-10": 81.89, "ratio-30": 81.58, "bane": 82.20, "ratio-70": 81.58, "ratio-100": 81.10},
    ),
}
"""Of the paper's tables 2, 6, 7 and 8: mIoU in percent."""
TITLES = {
    "components": "The components (table 6)",
    "relatives": "Beside the published relatives",
    "fusion": "The weight of the last layer's anchors (table 7; `ccl` is its 0.7)",
    "ratio": "The share of errors that BANE takes (table 8; `ccl` is its 0, `bane` its 50)",
    "choices": "Where the paper is silent",
}
SWEEPS = {
    "fusion": ("w_h, of contextual contrast alone", (0.0, 0.3, 0.5, 0.7, 1.0)),
    "ratio": ("% of the errors, 0: contextual contrast alone", (0, 10, 30, 50, 70, 100)),
}
OTHERS = ", ".join(name for name in NETWORKS if name not in ("small", FULL.network))
COMPARED = {"miou": "mIoU", "trimap_5": "mIoU within 5 px of a boundary"}
NOTHING = "not measured yet"
UNANSWERED = """\
The study says nothing about a ◇ without a row. Of some the package has no other reading, so that no arm could answer
them: a class that the last layer lacks (3), a selection in each image (6), the mean over the present classes (11), a
class without a negative (12)."""
ON_TIMES = """\
The time is the median of a training's steps, with data, augmentation, network and optimizer. A step of a network of
many small layers, such as HRNet, takes as long as the host needs to launch them, and says little about the loss, whose
[own times](performance.md) are elsewhere. Times are compared on one device alone."""
NO_EVIDENCE = "shortened protocol, no evidence for the full one"


# -------------------------------------------------------------------------------------------------------------- numbers


def groups(rows: Iterable[Result]) -> list[list[Result]]:
    """Rows of one setting together; the full protocol first, then those with most rows, then the longest trainings."""
    found: dict[tuple, list[Result]] = {}
    for row in rows:
        found.setdefault(row.setting, []).append(row)

    def place(group: list[Result]) -> tuple:
        row = group[0]
        return row.protocol != "full", -len(group), -row.iterations * row.batch * row.height * row.width

    return sorted(found.values(), key=place)


def by_seed(rows: Iterable[Result], arm: str) -> dict[int, Result]:
    return {row.seed: row for row in rows if row.arm == arm and row.status == "ok"}


def differences(rows: Sequence[Result], arm: str, against: str, score: str) -> list[float]:
    """Of one score, seed by seed, in percentage points."""
    one, other = by_seed(rows, arm), by_seed(rows, against)
    return [100 * (getattr(one[seed], score) - getattr(other[seed], score)) for seed in sorted(one.keys() & other)]


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of their mean, by Student's t."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5


def spread(values: Sequence[float], form: str) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def signed(values: Sequence[float]) -> str:
    """Mean and 95 % interval."""
    if not values:
        return "–"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.2f}, one seed"
    half = half_width(values)
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


# --------------------------------------------------------------------------------------------------------------- tables


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *lines))


def compared(rows: Sequence[Result], name: str) -> str:
    """One table of arms; "" where it would say no more than that of the components."""
    trained = [arm for arm in TABLES[name] if any(row.arm == arm for row in rows)]
    if name != "components" and not set(trained) - set(TABLES["components"]):
        return ""
    where, paper = PAPER.get(name, ("", {}))
    lines = []
    for arm in trained:
        of_arm = by_seed(rows, arm).values()
        base = ARMS[arm].against if name == "choices" else "baseline"
        text = ARMS[arm].text + (f" (ours: `{base}`)" if name == "choices" and arm != base else "")
        diverged = sum(row.arm == arm and row.status != "ok" for row in rows)
        cells = [f"`{arm}`", text, str(len(of_arm)) + (f", {diverged} diverged" if diverged else "")]
        for score in ("miou", "miou_multi_scale", "trimap_5"):
            cells.append(spread([100 * getattr(row, score) for row in of_arm], ".2f"))
            found = differences(rows, arm, base, score)
            of_fewer = f", {len(found)} seeds" if 1 < len(found) < len(of_arm) else ""
            cells.append("" if arm == base else signed(found) + of_fewer)
        lines.append(cells + ([f"{paper[arm]:.2f}" if arm in paper else ""] if paper else []))
    less = "− ours" if name == "choices" else "− baseline"
    head = ["arm", "", "seeds", "mIoU", less, "multi-scale mIoU", less, "mIoU within 5 px", less]
    return f"### {TITLES[name]}\n\n" + table(head + ([f"paper: {where}"] if paper else []), lines)


def all_scores(rows: Sequence[Result]) -> str:
    devices = {row.device for row in rows}
    percent = {"miou", "miou_multi_scale", *(f"{kind}_{r}" for kind in ("trimap", "boundary") for r in schema.RADII)}
    lines = []
    for arm in ARMS:
        of_arm = list(by_seed(rows, arm).values())
        if of_arm:
            cells = [
                spread([(100 if score in percent else 1) * getattr(row, score) for row in of_arm], form)
                for score, form in [(name, ".2f" if name in percent else ".3f") for name in schema.SCORES[2:]]
            ]
            timed = [row for row in of_arm if row.median_step_ms]
            times = {
                device: spread([row.median_step_ms for row in timed if row.device == device], ".1f")
                for device in dict.fromkeys(row.device for row in timed)
            }
            on_each = [time if len(devices) == 1 else f"{device}: {time}" for device, time in times.items()]
            lines.append([f"`{arm}`", *cells, ", ".join(on_each) or "–"])
    head = [
        "arm",
        *(f"within {r} px" for r in schema.RADII),
        *(f"Boundary IoU {r} px" for r in schema.RADII),
        *("A", "U", *(f"U_{k}" for k in schema.NEAREST)),
        "ms a step",
    ]
    said = f"\n\n{ON_TIMES}" if any(row.median_step_ms for row in rows) else ""
    return "### Boundaries, embeddings, time\n\n" + table(head, lines) + said


def sources(rows: Sequence[Result]) -> str:
    """Where and with what, and which arms elsewhere than most."""
    places: dict[tuple, list[Result]] = {}
    for row in rows:
        place = (row.device, row.driver, row.torch, row.triton, row.libraries, row.commit)
        places.setdefault(place, []).append(row)
    lines, most = [], max(map(len, places.values()))
    for (device, driver, torch, triton, libraries, commit), there in places.items():
        versions = (("driver", driver), ("torch", torch), ("Triton", triton), ("", libraries), ("commit", commit))
        named = ", ".join(f"{name} {version}".strip() for name, version in versions if version)
        which = f", of {', '.join(f'`{arm}`' for arm in dict.fromkeys(row.arm for row in there))}"
        lines.append(f"{device}, {named} ({len(there)} trainings{which if len(there) < most else ''})")
    return "Trained on " + "; ".join(lines) + "."


def hardly_found(rows: Sequence[Result]) -> str:
    """How many classes the trainings do not learn; "" where they learn all."""
    ious = [[float(iou) for iou in row.iou_per_class.split()] for row in rows if row.iou_per_class]
    low = [sum(iou < 0.01 for iou in of_row) for of_row in ious]
    if not any(low):
        return ""
    return f" Of {len(ious[0])} classes {statistics.fmean(low):.1f}, on average, have an IoU below 1 % at the end."


def described(row: Result) -> str:
    augmentation = "kornia" if row.augmentation == "kornia" else "plain torch"
    return (
        f"{row.network}, {row.height} × {row.width} px, batch {row.batch}, {row.iterations} iterations, learning rate "
        f"{row.learning_rate:g}, embeddings of {row.channels} channels, {row.precision}, augmentation by {augmentation}"
    )


def other_readings() -> list[Arm]:
    """The arms that answer a ◇ otherwise than we do, in the order of docs/method.md."""
    return sorted((arm for arm in ARMS.values() if arm.question), key=lambda arm: arm.question)


def evidence(rows: Sequence[Result]) -> str:
    """For docs/method.md: what other readings change, of each protocol's first setting."""
    full, shortened = (
        next((group for group in groups(rows) if group[0].protocol == protocol), [])
        for protocol in ("full", "shortened")
    )
    lines = []
    for arm in other_readings():
        cells = []
        for group in (full, shortened):
            found = differences(group, arm.name, arm.against, "miou")
            cells.append(f"{signed(found)}, n = {len(found)}" if found else NOTHING)
        lines.append([str(arm.question), f"`{arm.name}`: {arm.text}", f"`{arm.against}`", *cells])
    return table(["◇", "other reading", "ours", "full protocol", NO_EVIDENCE], lines) + "\n\n" + UNANSWERED


# ---------------------------------------------------------------------------------------------------------------- plots


def plot_arms(axes_of, rows: Sequence[Result]):
    """What each arm changes against the baseline."""
    pairs = {arm: (arm, "baseline") for arm in ARMS if arm != "baseline"}
    plot_differences(axes_of, rows, pairs, "points above the baseline")


def plot_choices(axes_of, rows: Sequence[Result]):
    """What each other reading of an open question changes against ours."""
    pairs = {f"◇ {arm.question}: {arm.name} − {arm.against}": (arm.name, arm.against) for arm in other_readings()}
    plot_differences(axes_of, rows, pairs, "points above ours")


def plot_differences(axes_of, rows: Sequence[Result], pairs: dict[str, tuple[str, str]], label: str):
    """Of an arm from another: a dot for each seed, the mean with its interval."""
    pairs = {name: pair for name, pair in pairs.items() if differences(rows, *pair, "miou")}
    panels = axes_of(2, (11, 1.2 + 0.24 * len(pairs)))
    for axes, (score, title) in zip(panels, COMPARED.items()):
        for place, pair in enumerate(pairs.values()):
            values = differences(rows, *pair, score)
            mean = statistics.fmean(values)
            if len(values) > 2:  # of two, the interval would be all that is seen
                axes.errorbar(mean, place, xerr=half_width(values), color="0.6", capsize=3, linewidth=1, zorder=1)
            axes.plot(values, [place] * len(values), "o", color="C0", markersize=3, alpha=0.7)
            axes.plot(mean, place, "D", color="C3", markersize=4)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(pairs)), pairs if axes is panels[0] else [], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(f"{title}: {label}")
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    explained(panels, rows)


def plot_sweeps(axes_of, rows: Sequence[Result]):
    """Tables 7 and 8, each arm against the baseline: a dot for each seed, a line through the means."""
    panels = axes_of(len(SWEEPS), (11, 4))
    for axes, (name, (label, values)) in zip(panels, SWEEPS.items()):
        for place, (score, text) in enumerate(COMPARED.items()):
            colour, shift = f"C{place}", (place - 0.5) * 0.02 * (max(values) - min(values))
            points = [(x + shift, differences(rows, arm, "baseline", score)) for x, arm in zip(values, TABLES[name])]
            means = [statistics.fmean(y) for _, y in points]
            axes.plot([x for x, _ in points], means, "-D", color=colour, label=text, markersize=5, linewidth=1)
            for (x, y), mean in zip(points, means):
                axes.plot([x] * len(y), y, "o", color=colour, markersize=3, alpha=0.5)
                if len(y) > 2:
                    axes.errorbar(x, mean, yerr=half_width(y), color=colour, alpha=0.5, capsize=3, linewidth=1)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(values)
        axes.set_xlabel(label)
        axes.sharey(panels[0])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("points above the baseline")
    panels[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    explained(panels, rows)


def explained(panels, rows: Sequence[Result]) -> None:
    seeds = len({row.seed for row in rows})
    panels[0].set_title(
        f"{rows[0].protocol} protocol: {rows[0].network}, {rows[0].iterations} iterations", loc="left", size=10
    )
    panels[-1].set_title(f"dots: {seeds} seeds; diamond: mean, 95 % interval", fontsize=9, loc="right")


def plots(rows: Sequence[Result]) -> dict[str, tuple[Callable, list[Result]]]:
    """Name → how it is drawn and from which rows, those of the first setting; without rows it is left out."""
    first = next(iter(groups(rows)), [])

    def compared_with(other: str) -> set[str]:
        return {arm for arm in ARMS if differences(first, arm, other, "miou")} - {other}

    with_baseline, found = compared_with("baseline"), {}
    if with_baseline:
        found["arms"] = plot_arms
    if any(arm.name in compared_with(arm.against) for arm in other_readings()):
        found["choices"] = plot_choices
    if all(with_baseline >= set(TABLES[name]) for name in SWEEPS):
        found["sweeps"] = plot_sweeps
    return {name: (draw, first) for name, draw in found.items()}


# ----------------------------------------------------------------------------------------------------------------- page

FEWER = "; ".join(
    f"`{arm.name}` with {', '.join(f'{name} {value}' for name, value in arm.on_cpu.items())}"
    for arm in ARMS.values()
    if arm.on_cpu
)
INTRODUCTION = f"""\
# The CamVid study

Does the loss help, and which of the readings that the paper leaves open trains best? Each arm is trained with several
seeds by `python -m benchmarks.train_camvid`; this page is generated from its rows, `benchmarks/results/camvid.csv`, by
`python -m benchmarks.report`, and CI fails where it says something else than they do.

Arms with the same seed start from the same weights and see the same images, so differences are taken seed by seed. ±
is the standard deviation over seeds; in brackets stands the 95 % interval of the mean difference by Student's t. An
interval that holds 0 leaves open which is better, and with three seeds it is wide. There are {len(ARMS) - 1} arms
beside the baseline: some intervals miss 0 by chance alone. On another device, or with other versions, the rounding is
another, too, which alone moves where a short training ends. Scores are of the last iteration, on the validation frames,
in percent.

| | the paper | full protocol here |
| --- | --- | --- |
| first weights | ImageNet | random: none are downloaded |
| frames | not said | SegNet's: 367 for training, 101 for validation, no test frames, 360 × 480 px |
| crop | not said | 352 × 480: HRNet's branches need multiples of 32 |
| network | HRNet-W48, DeepLabV3 with ResNet-101, OCRNet | {FULL.network}; by `--network` {OTHERS} |
| batch, iterations | 16, 6000 | {FULL.batch}, {FULL.iterations} |
| optimizer | SGD, momentum 0.9, polynomial decay | the same; rate {FULL.learning_rate:g}, power {FULL.power:g}, \
weight decay {FULL.weight_decay:g}, as MS/CS |
| augmentation | colour jitter, flip, scale | the same: scale {ZOOM[0]:g} to {ZOOM[1]:g}, with shifts; by kornia or \
in plain torch |
| scores | mean over scales 0.75 to 2 and flips | that (multi-scale mIoU), and one forward (all others) |
| boundary mIoU | not defined | within r px of a label boundary, and Boundary IoU with bands of r px |
| A, U, U_k | of the last layer before the segmentation head | of what goes into the last convolution; A: lower is \
better, U: higher |
| relatives | not said | their official code's settings, but for what follows |

The relatives share network, optimizer and batches with all arms, and so are not quite as they were published:

- All take the projections of the network's layers, by the head of MS/CS; ContrastiveSeg, RegionContrast and PNE, which
  take one layer, the first. On their own they take HRNet's branches side by side (ContrastiveSeg) or the decoder's
  features, RegionContrast's without a projection.
- The cross-entropy is plain. RegionContrast's own mines hard pixels (OHEM) and has an auxiliary head of weight 0.4.
- ContrastiveSeg is as its official CamVid configuration has it: weight 0.1, τ = 0.07, 1024 pixels, 100 of a class and
  image, a bank of 5000 pixels and 5000 regions a class. But its warm-up is left out, in which the contrast does not
  count: 5000 iterations there, 3000 with the bank.
- RegionContrast's bank has a place for each of CamVid's 367 training images, as the published 2975 are those of
  Cityscapes. For it and PNE no configuration of CamVid is published; weight, τ and sizes are those of Cityscapes.
- Where official code and paper differ, the docstring of each loss says what it computes.
- On a CPU, which stores rows × columns, they take less: {FEWER}."""
ON_SHORTENED = f"""\
Anything less than the paper's sizes, batch and iterations, or the small network. Without a GPU that is the default: the
small network, frames of {SHORTENED.height} rows, batch {SHORTENED.batch}, {SHORTENED.iterations} iterations, scales \
up to {SHORTENED.scales[-1]:g}. For a quarter of an hour of a GPU, `python -m benchmarks.train_camvid --help` has a
protocol: `--arms components --network small --iterations 1500`, 12 trainings, if an iteration takes 40 ms or less.
It shows that the study runs from end to end, goes on where it stopped and is counted, and nothing about how the losses
compare where training is as long as the paper's: {NO_EVIDENCE}."""


def page(rows: Sequence[Result], drawn: Iterable[str]) -> str:
    """docs/camvid.md."""
    drawn, found = set(drawn), groups(rows)
    pictures = {
        "arms": "Difference of each arm from the baseline, seed by seed",
        "choices": "Difference of each other reading from ours, seed by seed",
        "sweeps": "Difference from the baseline over the fusion weight and the ratio",
    }
    images = [f"![{text}](camvid/{name}.png)" for name, text in pictures.items() if name in drawn]
    sections = [INTRODUCTION, "## Full protocol"]
    if not any(group[0].protocol == "full" for group in found):
        sections.append(NOTHING.capitalize() + ".")
    for n, group in enumerate(found):
        if group[0].protocol == "shortened" and (n == 0 or found[n - 1][0].protocol == "full"):
            sections += ["## Shortened protocol: a test of the program", ON_SHORTENED]
        sections.append(f"**{described(group[0])}.** {sources(group)}{hardly_found(group)}")
        sections += images if n == 0 else []
        sections += [compared(group, name) for name in TABLES]
        sections.append(all_scores(group))
    return "\n\n".join(filter(None, sections)) + "\n"
