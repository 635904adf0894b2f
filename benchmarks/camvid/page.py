"""docs/camvid.md, its pictures, and the study's block of docs/method.md, from ``results/camvid.csv`` alone."""

import functools
import json
import math
import pathlib
import re
import statistics
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from benchmarks.camvid.arms import (
    ARMS,
    COMPONENTS,
    FEW,
    MARGIN,
    PRETRAINED,
    PROTOCOLS,
    RARE,
    REST,
    SEEDS,
    SWEEP,
    SWEEP_SEEDS,
    alpha,
    plan,
)
from benchmarks.camvid.paired import Comparison, compare, holm
from benchmarks.camvid.rows import Result
from benchmarks.results import table

PERCENT = {"miou": "mIoU", "rare": "rare classes", "boundary_3": "boundary, 3 px", "boundary_5": "boundary, 5 px"}
OTHERS = {"alignment": "alignment", "uniformity": "uniformity"}
STUDIES = {"pretrained": (*COMPONENTS, *REST), "few-labels": FEW}
LABELS = {"pretrained": "With all labels", "few-labels": "With a quarter of the labels"}
"""What a protocol of ``STUDIES`` trains on."""
CHOICES = {"ccl": 10, "base-rate-0.1": 10, "full-distance": 16, "semi-hard": 18}
"""Arms that answer an open question (◇) of docs/method.md differently, and its number."""
LEAST = 3
"""The fewest seeds from which a conclusion is drawn."""
NO_EFFECT = "no effect was seen"
STRIDES = ("stride 4", "stride 8", "stride 16", "stride 32")
LAYERS = {
    "errors": ("errors, %", 100, ".1f"),
    "at_edge": ("of them at distance 0, %", 100, ".0f"),
    "negatives": ("negatives", 1, ".0f"),
    "classes": ("classes", 1, ".1f"),
    "loss": ("loss", 1, ".2f"),
    "ratio": ("gradient / cross-entropy's", 1, ".3f"),
    "cosine": ("their cosine", 1, "+.3f"),
}
"""The columns of the table of layers: name in the log → heading, unit, format."""
TEMPLATE = pathlib.Path(__file__).with_suffix(".md")


# -------------------------------------------------------------------------------------------------------------- numbers


def scored(rows: Iterable[Result], protocol: str, arm: str) -> dict[int, Result]:
    """The finished trainings of an arm, by seed."""
    return {row.seed: row for row in rows if (row.protocol, row.arm, row.status) == (protocol, arm, "ok")}


def difference(rows: Sequence[Result], protocol: str, arm: str, score: str, against: str = "baseline") -> Comparison:
    """The comparison of two arms seed by seed; IoUs are in percentage points."""
    one, other = scored(rows, protocol, arm), scored(rows, protocol, against)
    unit = 100 if score in PERCENT else 1
    return compare([unit * (getattr(one[s], score) - getattr(other[s], score)) for s in sorted(one.keys() & other)])


def corrected(rows: Sequence[Result], protocol: str) -> dict[str, float]:
    """The p-value of each arm's mIoU against the baseline, corrected by Holm over the protocol's arms."""
    names = [arm for arm in STUDIES[protocol] if arm != "baseline"]
    return dict(zip(names, holm([difference(rows, protocol, arm, "miou").p for arm in names])))


def headline(rows: Sequence[Result]) -> str:
    """What the data show about the loss with its defaults, compared with the cross-entropy alone."""
    full, few = (len(difference(rows, protocol, "bane", "miou").differences) for protocol in STUDIES)
    if max(full, few) < LEAST:
        return f"Not known yet: {full} of {len(SEEDS)} planned seeds are trained, {few} with a quarter of the labels"
    return ". ".join(f"{labels}: {verdict(rows, protocol)}" for protocol, labels in LABELS.items())


def verdict(rows: Sequence[Result], protocol: str) -> str:
    found = difference(rows, protocol, "bane", "miou")
    if len(found.differences) < LEAST:
        return "not known yet"
    if not corrected(rows, protocol)["bane"] < 0.05:
        return NO_EFFECT
    return "yes" if found.mean > 0 else "it does harm"


def findings(rows: Sequence[Result]) -> str:
    """The numbers behind the verdicts, a sentence for each protocol. Without any verdict the headline has them."""
    if headline(rows).startswith("Not known"):
        return ""
    sentences = []
    for protocol, labels in LABELS.items():
        found = difference(rows, protocol, "bane", "miou")
        seeds = f"{len(found.differences)} of {len(SEEDS)} planned seeds"
        if len(found.differences) < LEAST:
            sentences.append(f"{labels} {seeds} are trained.")
            continue
        size = f"{number(found.mean, '+.2f')} points of mIoU (95 % interval {interval(found.student)})"
        power = f"; an uncorrected test detects a true difference of {found.detectable:.1f} points with 80 % power"
        power = power if verdict(rows, protocol) == NO_EFFECT else ""
        sentences.append(f"{labels} the mean difference from cross-entropy alone is {size} over {seeds}{power}.")
    return " ".join(sentences)


def interval(pair: tuple[float, float], form: str = "+.2f") -> str:
    return "–" if math.isnan(pair[0]) else f"[{number(pair[0], form)}, {number(pair[1], form)}]"


def number(value: float, form: str) -> str:
    """A number that is rounded to 0 has no sign."""
    if math.isnan(value):
        return "–"
    text = f"{value:{form}}"
    return text if text.strip("+-0.") else text.lstrip("+-")


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The mean ± the standard deviation."""
    if not values:
        return "–"
    return f"{statistics.fmean(values):{form}}" + (f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else "")


def logged(rows: Iterable[Result]) -> dict[str, list[list[float]]]:
    """The mean of the logs of several trainings: name → for each fifth of the training the layers' values, or NaN."""
    found = [json.loads(row.log) for row in rows if row.log]
    means = {}
    for name in dict.fromkeys(name for log in found for name in log):
        values = torch.stack([torch.tensor(np.array(log[name], float)) for log in found if name in log])
        means[name] = values.nanmean(0).tolist()
    return means


def watched(rows: Sequence[Result]) -> list[Result]:
    """The trainings with the loss's defaults. As long as there are none, those of the sweep with α = 0.1."""
    return list((scored(rows, "pretrained", "bane") or scored(rows, "alpha", "alpha-0.1")).values())


def timed(rows: Iterable[Result]) -> list[Result]:
    """The times of a step, in the order of the arms."""
    return sorted((row for row in rows if row.protocol == "timing"), key=lambda row: list(ARMS).index(row.arm))


# --------------------------------------------------------------------------------------------------------------- tables


def compared(rows: Sequence[Result], protocol: str) -> str:
    """One line for each trained arm: mIoU, and how far the difference from the baseline can be trusted."""
    p, lines = corrected(rows, protocol), []
    for arm in STUDIES[protocol]:
        of_arm = scored(rows, protocol, arm)
        diverged = sum((row.protocol, row.arm) == (protocol, arm) and row.status != "ok" for row in rows)
        if not of_arm and not diverged:
            continue
        found = difference(rows, protocol, arm, "miou")
        cells = ["", "", "", "", ""]
        if arm != "baseline":
            cells = [number(found.mean, "+.2f"), interval(found.student), interval(found.bootstrap)]
            cells += [number(p[arm], ".2g"), number(found.detectable, ".1f")]
        seeds = f"{len(of_arm)}" + (f", {diverged} diverged" if diverged else "")
        miou = spread([100 * row.miou for row in of_arm.values()])
        lines.append([f"`{arm}`", ARMS[arm].text, seeds, miou, *cells])
    head = ["arm", "", "seeds", "mIoU, %", "− baseline", "95 %, Student", "95 %, bootstrap", "p, Holm", "detectable"]
    return table(head, lines)


def everything(rows: Sequence[Result]) -> str:
    """The other measures: the mean, and its difference from the baseline."""
    lines = []
    for protocol, names in STUDIES.items():
        for arm in names:
            of_arm = scored(rows, protocol, arm).values()
            if not of_arm:
                continue
            cells = [protocol, f"`{arm}`"]
            for score in (*list(PERCENT)[1:], *OTHERS):
                unit, form = (100, ".2f") if score in PERCENT else (1, ".3f")
                found = difference(rows, protocol, arm, score)
                mean = f"{unit * statistics.fmean(getattr(row, score) for row in of_arm):{form}}"
                beside = "" if math.isnan(found.p) else f" {interval(found.student, '+' + form)}"
                change = (
                    "" if arm == "baseline" or not found.differences else f" ({number(found.mean, '+' + form)}{beside})"
                )
                cells.append(mean + change)
            lines.append(cells)
    return table(["protocol", "arm", *list(PERCENT.values())[1:], *OTHERS.values()], lines)


def layers(rows: Sequence[Result]) -> str:
    """What the loss found in the last fifth of the training, layer by layer."""
    means, lines = logged(watched(rows)), []
    for i, stride in enumerate(STRIDES if means else ()):
        of_layer = {name: values[-1][i] for name, values in means.items()}
        lines.append([stride, *(number(of_layer[name] * unit, form) for name, (_, unit, form) in LAYERS.items())])
    arm = watched(rows)[0].arm if means else ""
    told = (
        f"\n\nThe table is for `{arm}` and holds means over the last fifth of the iterations. The picture shows each "
        "fifth. The gradients are taken on the same batch, at the output of each encoder stage. The gradient of the "
        "loss includes its weight α."
    )
    return table(["layer", *(title for title, *_ in LAYERS.values())], lines) + (told if means else "")


def seen(rows: Sequence[Result]) -> str:
    """What the table of layers shows, in words."""
    means = logged(watched(rows))
    if not means:
        return ""
    edge = [[f"{100 * fifth[i]:.0f} %" for i in (0, -1)] for fifth in (means["at_edge"][0], means["at_edge"][-1])]
    ratio, cosine = means["ratio"][-1][-1], means["cosine"][-1][-1]
    return (
        f"In the last fifth of the training {edge[1][0]} of the error pixels at stride 4 and {edge[1][1]} at stride 32 "
        f"are at distance 0 ({edge[0][0]} and {edge[0][1]} in the first fifth). BANE breaks ties by a hash, so where "
        f"nearly all are at distance 0, its choice is almost the same as the semi-hard one. Over all "
        f"parameters of the encoder the gradient of the weighted loss has {100 * ratio:.1f} % of the norm of the "
        f"cross-entropy's gradient, and the cosine of the two is {number(cosine, '+.3f')}."
    )


def sweep(rows: Sequence[Result]) -> str:
    lines = [
        [f"{ARMS[arm].weight:g}", str(len(of_arm)), spread([100 * row.miou for row in of_arm.values()])]
        for arm in sorted(SWEEP, key=lambda arm: ARMS[arm].weight)
        if (of_arm := scored(rows, "alpha", arm))
    ]
    return table(["α", "seeds", "mIoU, %"], lines)


def times(rows: Sequence[Result]) -> str:
    base = next((row.step_ms for row in timed(rows) if row.arm == "baseline"), math.nan)
    lines = [
        [f"`{row.arm}`", f"{row.step_ms:.0f}", number(row.step_ms / base, ".2f"), row.device] for row in timed(rows)
    ]
    return table(["arm", "ms per step", "× baseline", "device"], lines)


def evidence(rows: Sequence[Result]) -> str:
    """The block of docs/method.md: how the results of other readings differ from ours."""
    lines = []
    for arm, choice in sorted(CHOICES.items(), key=lambda pair: pair[1]):
        cells = []
        for protocol, names in STUDIES.items():
            found = difference(rows, protocol, arm, "miou", against="bane")
            n = len(found.differences)
            bounds = f" {interval(found.student)}" if n > 1 else ""
            told = f"{number(found.mean, '+.2f')}{bounds}, n = {n}" if n else "not measured yet"
            cells.append(told if arm in names else "not planned")
        lines.append([str(choice), f"`{arm}`: {ARMS[arm].text}", *cells])
    return table(["◇", "other reading (ours: `bane`)", "all labels", "a quarter of the labels"], lines)


# ---------------------------------------------------------------------------------------------------------------- plots


def plot_differences(axes_of, rows: Sequence[Result], protocols: Sequence[str], scores: Sequence[str]):
    """A panel for each score: a dot for each seed, the mean with its 95 % interval by Student's t."""
    pairs = [(p, arm) for p in protocols for arm in STUDIES[p][1:] if difference(rows, p, arm, "miou").differences]
    panels = axes_of(len(scores), (4 + 3 * len(scores), 1.2 + 0.3 * len(pairs)))
    for axes, score in zip(panels, scores):
        for place, pair in enumerate(pairs):
            found = difference(rows, *pair, score)
            axes.plot(found.differences, [place] * len(found.differences), "o", color="C0", markersize=3, alpha=0.6)
            axes.plot(found.mean, place, "D", color="C3", markersize=5)
            if found.student[0] == found.student[0]:
                axes.plot(found.student, [place] * 2, color="C3", linewidth=1)
        axes.axvline(0, color="black", linewidth=0.8)
        names = [arm if len(protocols) == 1 else f"{arm}, {p}" for p, arm in pairs]
        axes.set_yticks(range(len(pairs)), names if axes is panels[0] else [])
        axes.set_ylim(len(pairs) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"{PERCENT[score]}, points − baseline" if score in PERCENT else f"{score} − baseline")
        axes.grid(axis="x", alpha=0.3)


def plot_layers(axes_of, rows: Sequence[Result]):
    """The log over the training, a line for each layer."""
    means = logged(watched(rows))
    panels = axes_of(4, (15, 3.4))
    titles = {
        "at_edge": "share of errors at distance 0",
        "negatives": "negatives",
        "ratio": "gradient norm over the cross-entropy's",
        "cosine": "cosine of the two gradients",
    }
    for axes, (name, title) in zip(panels, titles.items()):
        fifths = means[name]
        x = [(2 * i + 1) * 50 / len(fifths) for i in range(len(fifths))]
        for i, values in enumerate(zip(*fifths)):
            label = STRIDES[i] if i < len(STRIDES) else "all parameters of the encoder"
            axes.plot(x, values, "o-" if i < len(STRIDES) else "k--", markersize=3, label=label)
        axes.set_xlabel("% of the iterations")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    labels = panels[2].get_legend_handles_labels()
    panels[2].figure.legend(*labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=5, frameon=False, fontsize=8)
    panels[2].set_ylim(bottom=0)
    panels[0].figure.tight_layout()


def plot_sweep(axes_of, rows: Sequence[Result]):
    """A dot for each seed and α, and their mean."""
    [axes] = axes_of(1, (5, 2.6))
    weights, scores = [row.weight for row in rows], [100 * row.miou for row in rows]
    axes.plot(weights, scores, "o", markersize=4, alpha=0.6)
    means = {w: statistics.fmean(s for weight, s in zip(weights, scores) if weight == w) for w in sorted(set(weights))}
    axes.plot(means.keys(), means.values(), "D-", color="C3", markersize=5, linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(list(means), [f"{weight:g}" for weight in means])
    axes.minorticks_off()
    axes.set_xlabel("α")
    axes.set_ylabel("mIoU, %")
    axes.grid(alpha=0.3)


def plot_times(axes_of, rows: Sequence[Result]):
    [axes] = axes_of(1, (7, 1 + 0.3 * len(rows)))
    axes.barh([row.arm for row in rows], [row.step_ms for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    axes.grid(axis="x", alpha=0.3)


def plots(rows: Sequence[Result]) -> dict[str, tuple[functools.partial, list[Result]]]:
    """For each picture the function that draws it, and its rows. A picture without rows is left out."""
    found = {}
    measures = ("boundary_3", "rare", *OTHERS)
    for name, protocols, scores in (
        ("all-labels", ("pretrained",), ("miou",)),
        ("few-labels", ("few-labels",), ("miou",)),
        ("measures", tuple(STUDIES), measures),
    ):
        if any(difference(rows, p, arm, "miou").differences for p in protocols for arm in STUDIES[p][1:]):
            draw = functools.partial(plot_differences, protocols=protocols, scores=scores)
            found[name] = (draw, [row for row in rows if row.protocol in protocols])
    for name, draw, drawn in (
        ("layers", plot_layers, watched(rows)),
        ("sweep", plot_sweep, [row for arm in SWEEP for row in scored(rows, "alpha", arm).values()]),
        ("times", plot_times, timed(rows)),
    ):
        if drawn:
            found[name] = (functools.partial(draw), drawn)
    return found


# ----------------------------------------------------------------------------------------------------------------- page


def where(rows: Sequence[Result]) -> str:
    """The machine and the code that trained the rows."""
    trained = [row for row in rows if row.protocol != "timing"]
    places: dict[tuple, int] = {}
    for row in trained:
        place = (row.device, f"torch {row.torch}", row.libraries, f"commit {row.commit}")
        places[place] = places.get(place, 0) + 1
    told = "; ".join(f"{', '.join(filter(None, place))} ({n} trainings)" for place, n in places.items())
    seconds = [row.cpu_seconds for row in trained if row.cpu_seconds]
    cost = f" A training took {statistics.median(seconds):.0f} CPU seconds (median)." if seconds else ""
    return f"Trained on: {told or 'nothing yet'}.{cost}"


def finished(rows: Sequence[Result]) -> int:
    """The number of planned trainings that are finished."""
    return len({row.measured for row in rows} & {(p.name, arm.name, seed) for p, arm, seed in plan()})


def page(rows: Sequence[Result], drawn: Iterable[str]) -> str:
    """docs/camvid.md: ``page.md`` with its fields filled."""
    small, long, full = PRETRAINED, PROTOCOLS["long"], PROTOCOLS["full"]
    commits = [row.commit for row in sorted(rows, key=lambda row: row.protocol == "timing")]
    complete = all(len(scored(rows, "alpha", arm)) == len(SWEEP_SEEDS) for arm in SWEEP)
    pictures = {
        "all-labels": "mIoU of each arm minus the baseline's, seed by seed, with all labels",
        "few-labels": "mIoU of each arm minus the baseline's, seed by seed, with a quarter of the labels",
        "measures": "The other measures of each arm minus the baseline's, seed by seed",
        "layers": "Errors at distance 0, negatives, and the two gradients over the training, by layer",
        "sweep": "mIoU of two seeds for each α",
        "times": "Time of a step of each arm",
    }
    fields = {
        f"picture_{name.replace('-', '_')}": f"![{text}](camvid/{name}.png)" if name in drawn else ""
        for name, text in pictures.items()
    }
    text = TEMPLATE.read_text().format(
        headline=headline(rows),
        findings=findings(rows),
        where=where(rows),
        compared_pretrained=compared(rows, "pretrained"),
        compared_few=compared(rows, "few-labels"),
        everything=everything(rows),
        seen=seen(rows),
        layers=layers(rows),
        sweep_seeds=" and ".join(map(str, SWEEP_SEEDS)),
        margin=f"{100 * MARGIN:g}",
        choice=f"The sweep is complete: α = {alpha(rows):g}." if complete else "The sweep is not complete yet.",
        sweep=sweep(rows),
        times=times(rows),
        rare=", ".join(RARE),
        height=small.size[0],
        width=small.size[1],
        batch=small.batch,
        iterations=small.iterations,
        rate=f"{small.learning_rate:g}",
        decay=f"{small.weight_decay:g}",
        full_size=f"{full.size[0]} × {full.size[1]}",
        full_batch=full.batch,
        full_iterations=full.iterations,
        full_rate=f"{full.learning_rate:g}",
        long_size=f"{long.size[0]} × {long.size[1]}",
        long_batch=long.batch,
        long_iterations=long.iterations,
        done=finished(rows),
        planned=len(list(plan())),
        commit=commits[0] if commits else "COMMIT",
        **fields,
    )
    return re.sub(r"\n{3,}", "\n\n", text)
