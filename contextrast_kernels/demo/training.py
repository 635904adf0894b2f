"""`python -m contextrast_kernels demo`: train a small network with cross-entropy alone, and with Contextrast or other
contrastive losses (--loss) added.

All runs start from the same weights and use the same batches and augmentations. The output is a table, metrics.json
and, if matplotlib is installed, pictures.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contextrast_kernels as ck
from contextrast_kernels.demo import pictures, scenes

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

NAME = 26  # width of the run's name in a line of progress, in characters
EMBEDDING = 64  # channels of the projected features
RADIUS = 3  # radius of the trimap for the boundary mIoU, in pixels
AVERAGED = 3  # number of evaluations at the end whose mean is reported


@dataclass(frozen=True)
class Objective:
    """The objective of a run: the cross-entropy plus ``alpha`` times a contrastive loss."""

    label: str
    alpha: float = 0.0
    build: Callable[..., nn.Module] | None = None  # makes the loss from num_classes, seed= and ignore_index=

    @property
    def name(self) -> str:
        return f"+ {self.alpha:g} {self.label}" if self.build else self.label


def with_bank(num_classes: int, seed: int, ignore_index: int) -> nn.Module:
    bank = ck.MemoryBank(num_classes, EMBEDDING, pixels=500, regions=500)
    return ck.PixelContrastLoss(
        num_classes, bank=bank, max_samples=256, max_views=100, seed=seed, ignore_index=ignore_index
    )


def region_contrast(num_classes: int, seed: int, ignore_index: int) -> nn.Module:
    bank = ck.MemoryBank(num_classes, EMBEDDING, pixels=0, regions=2975)
    return ck.RegionContrastLoss(num_classes, bank, ignore_index=ignore_index)


ALONE = Objective("cross-entropy")
# The weights are the papers'. Some limits are smaller, because a CPU stores rows x columns numbers.
LOSSES = {
    "contextrast": Objective("Contextrast", 0.1, ck.ContextrastLoss),
    "pixel-contrast": Objective("pixel contrast", 0.1, ck.PixelContrastLoss),
    "pixel-contrast-bank": Objective("pixel contrast, bank", 1.0, with_bank),
    "multi-scale": Objective("multi-scale", 0.1, functools.partial(ck.MultiScaleContrastLoss, max_samples=1024)),
    "region-contrast": Objective("region contrast", 0.1, region_contrast),
    "pne": Objective("PNE", 1.3, functools.partial(ck.PNELoss, set_size=32, max_samples=1024)),
}


# ----------------------------------------------------------------------------------------------------------- network


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class Network(nn.Module):
    """Four encoder stages at strides 4, 8, 16 and 32, and a decoder that adds them up from coarse to fine.

    forward: images (B,3,H,W) → logits (B,N,H,W) and the stages' features, from high to low resolution.
    """

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (32, 64, 96, 128), decoder: int = 48):
        super().__init__()
        self.widths = widths
        self.stem = block(3, widths[0], stride=2)
        self.stages = nn.ModuleList(
            nn.Sequential(block(before, width, stride=2), block(width, width))
            for before, width in zip((widths[0], *widths), widths)
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, decoder, 1) for width in widths)
        self.smooth = block(decoder, decoder)
        self.classify = nn.Conv2d(decoder, num_classes, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(images)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        x = self.lateral[-1](features[-1])
        for lateral, feature in zip(reversed(self.lateral[:-1]), reversed(features[:-1])):
            x = F.interpolate(x, size=feature.shape[-2:], mode="bilinear") + lateral(feature)
        logits = self.classify(self.smooth(x))
        return F.interpolate(logits, size=images.shape[-2:], mode="bilinear"), features


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


# -------------------------------------------------------------------------------------------------------- evaluation


@dataclass
class Score:
    """One evaluation on the validation images, as fractions."""

    step: int
    miou: float
    boundary_miou: float
    iou: list[float]  # one per class; NaN for a class in neither labels nor predictions


@torch.no_grad()
def evaluate(network: Network, data: scenes.Data, step: int) -> Score:
    images, labels = data.validation
    N = len(data.classes)
    everywhere, near_boundary = ck.metrics.ConfusionMatrix(N), ck.metrics.TrimapIoU(N, (RADIUS,))
    network.eval()
    for some_images, some_labels in zip(images.split(16), labels.split(16)):
        with mixed_precision(images.device):
            logits, _ = network(some_images.contiguous(memory_format=torch.channels_last))
        everywhere.update(logits, some_labels)
        near_boundary.update(logits, some_labels)
    network.train()
    scores = everywhere.compute()
    boundary_miou = near_boundary.compute()[f"trimap_miou_{RADIUS}px"]
    return Score(step, scores["miou"].item(), boundary_miou.item(), scores["iou_per_class"].tolist())


# ---------------------------------------------------------------------------------------------------------- training


@dataclass
class Run:
    """One training run: its settings, its course and its results."""

    name: str
    alpha: float
    seed: int
    cross_entropy: list[float] = field(default_factory=list)  # one per step
    contrast: list[float] = field(default_factory=list)  # one per step; empty if alpha is 0
    scores: list[Score] = field(default_factory=list)  # before the first step, then ten times
    seconds_per_step: float = math.nan
    loss_seconds: float = 0.0  # the part of a step that the contrastive loss takes

    @property
    def before(self) -> float:
        return self.scores[0].miou

    @property
    def miou(self) -> float:
        return statistics.fmean(score.miou for score in self.scores[1:][-AVERAGED:])

    @property
    def boundary_miou(self) -> float:
        return statistics.fmean(score.boundary_miou for score in self.scores[1:][-AVERAGED:])

    @property
    def rose(self) -> bool:
        return self.miou > self.before


def train(
    objective: Objective,
    data: scenes.Data,
    augment: Callable[[Tensor, Tensor], scenes.Batch],
    *,
    seed: int,
    steps: int,
    batch: int,
) -> tuple[Run, Network, nn.ModuleList]:
    """Train on the data's device; return the run, its network and its projection heads, which only a contrastive loss
    uses."""
    N, device = len(data.classes), data.validation[0].device
    run = Run(objective.name, objective.alpha, seed)
    torch.manual_seed(seed)
    network = Network(N).to(device).to(memory_format=torch.channels_last)
    heads = nn.ModuleList(ck.ProjectionHead(width, EMBEDDING) for width in network.widths).to(device)
    contrast = objective.build(N, ignore_index=scenes.VOID, seed=seed).to(device) if objective.build else None
    optimizer = torch.optim.AdamW([*network.parameters(), *heads.parameters()], lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=steps, power=0.9)

    def step(images: Tensor, labels: Tensor) -> list[Tensor]:
        with mixed_precision(device):
            logits, features = network(images.contiguous(memory_format=torch.channels_last))
            losses = [F.cross_entropy(logits, labels, ignore_index=scenes.VOID)]
            loss = losses[0]
            if contrast is not None:
                embeddings = [head(feature) for head, feature in zip(heads, features)]
                losses.append(contrast(embeddings, labels, logits))
                loss = loss + objective.alpha * losses[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        return [value.detach() for value in losses]

    batches = data.batches(batch, seed)
    evaluations = {math.ceil(steps * tenth / 10) for tenth in range(1, 11)}
    run.scores.append(evaluate(network, data, 0))
    seconds, loss_seconds, warm_up, waiting = 0.0, [], min(5, steps // 2), []
    with Progress(run, objective.label, steps, batch) as progress:
        for number in range(1, steps + 1):
            began = time.perf_counter()
            waiting.append(step(*augment(*next(batches))))
            if number == warm_up or number % 10 == 0 or number in evaluations:
                # Fetched together, because every fetch waits for the device.
                for values, history in zip(zip(*waiting), (run.cross_entropy, run.contrast)):
                    history += torch.stack(values).tolist()
                waiting.clear()
            seconds = 0.0 if number == warm_up else seconds + time.perf_counter() - began
            if number in evaluations:
                run.scores.append(evaluate(network, data, number))
                if contrast is not None:
                    loss_seconds.append(time_loss(contrast, network, heads, data, batch))
            progress.update(evaluated=number in evaluations)
    run.seconds_per_step = seconds / (steps - warm_up)
    run.loss_seconds = statistics.fmean(loss_seconds or [0.0])
    return run, network, heads


def time_loss(contrast: nn.Module, network: Network, heads: nn.ModuleList, data: scenes.Data, batch: int) -> float:
    """Seconds of the loss's forward and backward, without the projection heads. The training state is unchanged."""
    images, labels = (tensor[:batch] for tensor in data.validation)
    modules = nn.ModuleList((network, heads, contrast)).eval()
    with torch.no_grad(), mixed_precision(images.device):
        logits, features = network(images)
        embeddings = [head(feature) for head, feature in zip(heads, features)]
    for _ in range(2):  # the first time warms up
        leaves = [embedding.detach().requires_grad_() for embedding in embeddings]
        wait(images.device)
        began = time.perf_counter()
        contrast(leaves, labels, logits).backward()
        wait(images.device)
        seconds = time.perf_counter() - began
    modules.train()
    return seconds


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Progress:
    """A tqdm bar in a terminal; a line for each evaluation where there is no terminal or no tqdm."""

    def __init__(self, run: Run, label: str, steps: int, batch: int):
        self.run, self.label, self.steps, self.batch = run, label, steps, batch

    def __enter__(self) -> Progress:
        self.began = time.perf_counter()
        self.bar = None
        if tqdm is not None and sys.stderr.isatty():
            self.bar = tqdm(
                total=self.steps * self.batch, unit="img", desc=f"{self.run.name:<{NAME}}", dynamic_ncols=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, *, evaluated: bool) -> None:
        """Called after each step."""
        run, score = self.run, self.run.scores[-1]
        figures = {"mIoU": f"{score.miou:.3f}"}
        if run.cross_entropy:
            figures["cross-entropy"] = f"{run.cross_entropy[-1]:.2f}"
        if run.contrast:
            figures[self.label] = f"{run.contrast[-1]:.2f}"
        if self.bar is not None:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(self.batch)
        elif evaluated:
            rate = score.step * self.batch / (time.perf_counter() - self.began)
            text = "  ".join(f"{name} {value}" for name, value in figures.items())
            print(f"{run.name:<{NAME}}  step {score.step:>4} of {self.steps}  {rate:.0f} img/s  {text}", flush=True)


# ----------------------------------------------------------------------------------------------------------- outcome


def table(runs: list[Run]) -> str:
    """A table of all runs, and a note on which differences are noise."""
    groups = [[run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)]
    seeds = len(groups[0])

    def mean(values: list[float], form: str = ".3f") -> str:
        spread = f" ± {statistics.stdev(values):.3f}" if seeds > 1 else ""
        return f"{statistics.fmean(values):{form}}{spread}"

    rows = [("", "mIoU before", "mIoU", f"boundary mIoU (r = {RADIUS} px)", "s/step", "share of loss")]
    for group in groups:
        step, loss = (statistics.fmean(t) for t in zip(*((run.seconds_per_step, run.loss_seconds) for run in group)))
        rows.append(
            (
                group[0].name,
                mean([run.before for run in group]),
                mean([run.miou for run in group]),
                mean([run.boundary_miou for run in group]),
                f"{step:.3f}",
                f"{loss / step:.0%}" if loss else "",
            )
        )
    for group in groups[1:]:
        pairs = list(zip(groups[0], group))
        gain = mean([late.miou - early.miou for early, late in pairs], "+.3f")
        boundary_gain = mean([late.boundary_miou - early.boundary_miou for early, late in pairs], "+.3f")
        rows.append(("difference" + f", {group[0].name}" * (len(groups) > 2), "", gain, boundary_gain, "", ""))

    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for name, *cells in rows:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells, widths[1:]))
        lines.append("  ".join((f"{name:<{widths[0]}}", *aligned)).rstrip())
    lines += [
        "",
        f"mIoU: mean of the last {len(runs[0].scores[1:][-AVERAGED:])} evaluations. "
        f"Boundary mIoU: the same within {RADIUS} px of a class boundary.",
        "s/step: includes data and augmentation. Share of loss: the contrastive loss's part of a step, without the "
        "projection heads.",
    ]
    if seeds == 1:
        lines.append("The differences are noise until several seeds agree on them (--seed 0 1 2).")
    else:
        lines.append(
            f"±: standard deviation over {seeds} seeds; differences are taken seed by seed. "
            "A difference that is not well above its ± is noise."
        )
    return "\n".join(lines)


def write(
    folder: Path, runs: list[Run], network: Network, heads: nn.ModuleList, data: scenes.Data, settings: dict
) -> str:
    """Replace `folder` by one with metrics.json and the pictures, all or nothing; return a line about its content."""
    facts = {
        "settings": settings,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "package": ck.__version__},
        "classes": data.classes,
        "runs": [
            {"miou_before": run.before, "miou": run.miou, "boundary_miou": run.boundary_miou, **asdict(run)}
            for run in runs
        ],
    }
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fresh = scratch / "new"
        fresh.mkdir()
        (fresh / "metrics.json").write_text(json.dumps(without_nan(facts), indent=1, allow_nan=False) + "\n")
        try:
            pictures.draw(fresh, runs, network, heads, data)
            outcome = f"Wrote {', '.join(sorted(path.name for path in fresh.iterdir()))} to {folder}."
        except ImportError as error:
            outcome = f"Wrote metrics.json to {folder}. Drew nothing, because the pictures need matplotlib ({error})."
        if folder.exists():
            folder.rename(scratch / "old")
        fresh.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return outcome


def without_nan(value: object) -> object:
    """Replace NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------------ command line

DEFAULTS = {
    # (data, quick): steps, batch, size, validation images (None: all)
    ("mosaic", False): (600, 8, 160, 96),
    ("camvid", False): (400, 8, 192, None),
    ("mosaic", True): (40, 8, 64, 16),
    ("camvid", True): (40, 8, 64, 16),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m contextrast_kernels demo",
        usage="%(prog)s [--data mosaic | --data camvid --root FOLDER] [--out FOLDER] [more: --help]",
        description="Train a small segmentation network with and without contrastive losses, and compare them.",
    )
    parser.add_argument(
        "--loss",
        nargs="+",
        choices=LOSSES,
        default=["contextrast"],
        metavar="LOSS",
        help=f"one or more of {', '.join(LOSSES)}; each is trained in a run of its own (default: contextrast)",
    )
    parser.add_argument(
        "--data", choices=("mosaic", "camvid"), default="mosaic", help="training data (default: mosaic)"
    )
    parser.add_argument("--root", type=Path, help="CamVid's folder, with train, trainannot, val and valannot")
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder of the results (default: demo_out)")
    parser.add_argument("--steps", type=int, help="training steps of each run (default: mosaic 600, camvid 400)")
    parser.add_argument("--batch", type=int, help="images in a batch (default: 8)")
    parser.add_argument("--size", type=int, help="height of the images in pixels (default: mosaic 160, camvid 192)")
    parser.add_argument(
        "--seed",
        type=int,
        nargs="+",
        default=[0],
        help="one or more seeds; every run is repeated with each (default: 0)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that shows that everything works")
    options = parser.parse_args(argv)

    if (options.root is not None) != (options.data == "camvid"):
        parser.error("--root: expected together with --data camvid, and only then. Give both or neither.")
    steps, batch, size, options.validation = DEFAULTS[options.data, options.quick]
    for name, default, low, high in (("steps", steps, 1, 10**6), ("batch", batch, 1, 1024), ("size", size, 64, 1024)):
        value = getattr(options, name)
        if value is None:
            setattr(options, name, default)
        elif not low <= value <= high:
            parser.error(f"--{name}: expected {low} to {high}, got {value}.")
    if len(set(options.loss)) < len(options.loss):
        parser.error(f"--loss: expected different losses, got {' '.join(options.loss)}.")
    if len(set(options.seed)) < len(options.seed) or not all(0 <= seed < 2**31 for seed in options.seed):
        parser.error(f"--seed: expected different numbers from 0 to {2**31 - 1}, got {options.seed}.")

    name = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        options.device = torch.device(name)
        if options.device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"the demo does not run on {options.device.type}")
        torch.empty(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        problem = str(error).splitlines()[0]
        parser.error(f"--device: {name} cannot be used ({problem}). Choose auto, cpu, cuda or cuda:N.")

    options.out = options.out.resolve()
    if options.out.exists():
        if not options.out.is_dir():
            parser.error(f"--out: {options.out} is a file. Give a folder.")
        others = {path.name for path in options.out.iterdir()} - {"metrics.json", *pictures.NAMES}
        if others:
            parser.error(f"--out: {options.out} would be replaced, but holds {min(others)}. Give another folder.")
    try:
        tempfile.TemporaryDirectory(prefix=f".{options.out.name}-", dir=options.out.parent).cleanup()
    except OSError as error:
        reason = error.strerror or error
        parser.error(f"--out: the folder {options.out.parent} cannot be written to ({reason}). Give another folder.")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the demo. Exit status: 0; 1 if the validation mIoU of a run did not rise; 2 for unusable flags or data."""
    options = parse(argv)
    began = time.perf_counter()
    data: scenes.Data
    try:
        if options.data == "mosaic":
            data = scenes.Mosaic(options.size, validation=options.validation, device=options.device)
        else:
            data = scenes.CamVid(options.root, options.size, limit=options.validation, device=options.device)
    except scenes.DataError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    augment, augmentation = scenes.augmentation()
    H, W = data.size
    print(f"Data: {data.note}; {len(data.classes)} classes, {H} x {W} px, {len(data.validation[0])} validation images.")
    print(f"Augmentation: {augmentation}.")
    if tqdm is None:
        print("Progress: a line for each evaluation, as a bar needs tqdm.")
    print(f"Training: {options.steps} steps with {options.batch} images each, on {options.device}.", flush=True)

    runs: list[Run] = []
    trained: dict[Objective, tuple[Network, nn.ModuleList]] = {}
    for seed in options.seed:
        for objective in (ALONE, *(LOSSES[name] for name in options.loss)):
            run, network, heads = train(objective, data, augment, seed=seed, steps=options.steps, batch=options.batch)
            runs.append(run)
            trained[objective] = network, heads

    print("\n" + table(runs))
    settings = {
        "data": data.note,
        "validation_images": len(data.validation[0]),
        "size": data.size,
        "augmentation": augmentation,
        "steps": options.steps,
        "batch": options.batch,
        "losses": options.loss,
        "seeds": options.seed,
        "device": str(options.device),
        "boundary_radius": RADIUS,
        "averaged_evaluations": AVERAGED,
    }
    try:
        print(write(options.out, runs, *trained[LOSSES[options.loss[0]]], data, settings))
    except OSError as error:
        print(f"demo: {options.out} could not be written ({error.strerror or error}).", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - began:.0f} s in all.")
    failed = [run for run in runs if not run.rose]
    for run in failed:
        print(
            f"demo: the validation mIoU did not rise: {run.name}, seed {run.seed}, "
            f"{run.before:.3f} before and {run.miou:.3f} after.",
            file=sys.stderr,
        )
    return 1 if failed else 0
