"""One training of the study, which can be left at any iteration and taken up again: on a CPU to the same bits, on a GPU
as far as its backward passes repeat themselves.

Frames, augmentation and first weights are functions of seed and iteration alone, so that all arms see the same; what
the past leaves (weights, momentum, the loss's own state, the random numbers of dropout) is in the checkpoint.
"""

import contextlib
import io
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import contextrast_kernels as ck
from benchmarks.camvid import rows
from benchmarks.camvid.arms import Arm
from benchmarks.camvid.networks import NETWORKS, Segmenter
from benchmarks.camvid.rows import Result
from contextrast_kernels.demo.scenes import VOID, Batch, CamVid
from contextrast_kernels.demo.training import mixed_precision, wait

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MULTIPLE = 32
"""HRNet's branches fit together in images of such sides."""
TENTHS = 10
WEIGHTS, ORDER, CHANGE, DROPOUT = range(4)
"""What is drawn: first weights; the frames' order; their augmentation; what layers draw for themselves."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share."""

    network: str
    height: int
    """Of a frame, to which it is resized."""
    iterations: int
    batch: int
    channels: int
    learning_rate: float
    scales: tuple[float, ...]
    """Of the multi-scale evaluation."""
    weight_decay: float = 5e-4
    momentum: float = 0.9
    power: float = 0.9
    """Of the polynomial decay of the learning rate."""


FULL = Setting("hrnet_w18", **rows.PAPER, channels=256, learning_rate=0.01, scales=(0.75, 1.0, 1.25, 1.5, 1.75, 2.0))
SHORTENED = Setting(
    "small", height=96, iterations=150, batch=8, channels=64, learning_rate=0.05, scales=(0.75, 1.0, 1.25)
)


class Diverged(Exception):
    """A loss, or a score, is not finite."""


class OutOfTime(Exception):
    """The evaluation was broken off."""


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message is one sentence that names the file."""


def drawn(seed: int, *what: int) -> int:
    """A seed of 32 bits for one draw."""
    return int(np.random.SeedSequence((seed, *what)).generate_state(1)[0])


def frames(count: int, batch: int, seed: int, iteration: int) -> Tensor:
    """Which of ``count`` frames an iteration takes: each once before any comes again."""
    places = range(iteration * batch, (iteration + 1) * batch)
    orders = {
        epoch: torch.randperm(count, generator=torch.Generator().manual_seed(drawn(seed, ORDER, epoch)))
        for epoch in {place // count for place in places}
    }
    return torch.stack([orders[place // count][place % count] for place in places])


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


@contextlib.contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """The host's global generator starts from this seed, and goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def fixed_shapes() -> Iterator[None]:
    """cuDNN tries its algorithms at the first batch, since all that follow have its shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cropped(images: Tensor, labels: Tensor) -> Batch:
    """The middle, with sides that are multiples of 32."""
    for axis in (-2, -1):
        length = images.shape[axis] // MULTIPLE * MULTIPLE
        first = (images.shape[axis] - length) // 2
        images, labels = images.narrow(axis, first, length), labels.narrow(axis, first, length)
    return images, labels


def padded(values: Tensor, fill: float) -> Tensor:
    """Filled at the right and below, to sides that are multiples of 32."""
    H, W = values.shape[-2:]
    return F.pad(values, (0, -W % MULTIPLE, 0, -H % MULTIPLE), value=fill)


class Clock:
    """Milliseconds from tick to tick, without waiting for the device before they are read."""

    def __init__(self, device: torch.device):
        self.device, self.ticks = device, []

    def tick(self) -> None:
        if self.device.type == "cuda":
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Since the last reading, after which the next interval begins with the next tick."""
        wait(self.device)
        pairs, self.ticks = list(zip(self.ticks, self.ticks[1:])), []
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1000 * (end - begin) for begin, end in pairs]


@dataclass(frozen=True)
class Study:
    """What all trainings of one call share."""

    setting: Setting
    data: CamVid
    augmentation: str
    augment: Callable[[Tensor, Tensor], Batch]
    environment: dict

    @property
    def device(self) -> torch.device:
        return self.data.images.device

    def blank(self, arm: Arm, seed: int) -> Result:
        """The row of a training that has not begun."""
        setting, (height, width) = self.setting, self.data.size
        shared = ("network", "iterations", "batch", "channels", "learning_rate")
        return Result(
            arm=arm.name,
            seed=seed,
            protocol=rows.protocol(setting.network, setting.height, setting.batch, setting.iterations),
            augmentation=self.augmentation,
            **{name: getattr(setting, name) for name in shared},
            height=height,
            width=width,
            precision="bfloat16 autocast" if self.device.type == "cuda" else "float32",
            status="ok",
            **self.environment,
        )


class Training:
    """An arm with a seed, at some iteration."""

    def __init__(self, arm: Arm, seed: int, study: Study):
        self.arm, self.seed, self.study = arm, seed, study
        self.setting = setting = study.setting
        self.data, self.device, N = study.data, study.device, len(study.data.classes)
        with random_numbers(drawn(seed, WEIGHTS)):
            self.network: Segmenter = NETWORKS[setting.network](N)
            self.network.to(self.device, memory_format=torch.channels_last)
            self.contrast, self.tap = arm.build(N, setting.channels, seed, self.device.type), None
            if self.contrast is not None:
                with contextlib.redirect_stdout(io.StringIO()):
                    self.tap = ck.attach(self.network, self.network.layers, dim=setting.channels)
                self.contrast.to(self.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(),
            lr=setting.learning_rate,
            momentum=setting.momentum,
            weight_decay=setting.weight_decay,
        )
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, setting.iterations, setting.power)
        self.iteration = 0
        self.losses = torch.zeros(setting.iterations, 2, device=self.device)  # cross-entropy, contrast
        self.milliseconds: list[float] = []
        torch.manual_seed(drawn(seed, DROPOUT))  # of host and device

    # ------------------------------------------------------------------------------------------------------- training

    def step(self) -> None:
        """One iteration. Nothing waits for the device."""
        chosen = to_device(frames(len(self.data.images), self.setting.batch, self.seed, self.iteration), self.device)
        images, labels = self.data.images[chosen].float() / 255, self.data.labels[chosen].long()
        with random_numbers(drawn(self.seed, CHANGE, self.iteration)):
            images, labels = cropped(*self.study.augment(images, labels))
        with mixed_precision(self.device):
            logits = self.network(images.contiguous(memory_format=torch.channels_last))
            loss = cross_entropy = F.cross_entropy(logits, labels, ignore_index=VOID)
            if self.tap is not None:
                contrast = self.contrast(self.tap.features(), labels, logits)
                loss = cross_entropy + self.arm.weight * contrast
                self.losses[self.iteration, 1] = contrast.detach()
        self.losses[self.iteration, 0] = cross_entropy.detach()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.iteration += 1

    def advance(self, ends: float, checkpoint: pathlib.Path, told: Callable[[int], object]) -> Result | None:
        """Trains to the end and returns the row, or until ``ends`` (of time.monotonic) and returns None. Leaves a
        checkpoint at every tenth and when it stops. ``told``: called with the iterations done since. The evaluation too
        is broken off, to be begun anew by the next call; where it is all that is left, it takes the time it needs."""
        total, clock, before = self.setting.iterations, Clock(self.device), self.iteration
        evaluation_ends = ends if before < total else math.inf
        try:
            with fixed_shapes():
                while self.iteration < total and time.monotonic() < ends:
                    clock.tick()
                    self.step()
                    if self.iteration * TENTHS // total > before * TENTHS // total:
                        self.read(clock)
                        self.save(checkpoint)
                        told(self.iteration - before)
                        before = self.iteration
            self.read(clock)
            if time.monotonic() < ends:
                return self.row(evaluation_ends)
        except OutOfTime:
            return None
        except Diverged as error:
            return replace(self.study.blank(self.arm, self.seed), status=f"diverged: {error}")
        self.save(checkpoint)
        told(self.iteration - before)
        return None

    def read(self, clock: Clock) -> None:
        clock.tick()
        self.milliseconds += clock.read()
        broken = (~self.losses[: self.iteration].isfinite().all(1)).nonzero()
        if len(broken):
            raise Diverged(f"the loss is not finite from iteration {int(broken[0]) + 1} on")

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def save(self, path: pathlib.Path) -> None:
        """Replaces the checkpoint as a whole, so that one is always there. OSError: it cannot be written."""
        on_gpu = self.device.type == "cuda"
        state = {
            "iteration": self.iteration,
            "network": self.network.state_dict(),
            "contrast": self.contrast.state_dict() if self.contrast is not None else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "losses": self.losses,
            "milliseconds": self.milliseconds,
            "random": [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device)] if on_gpu else [])],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".new")
        try:
            torch.save(state, half)
        except RuntimeError as error:  # torch's writer calls a full disk an unexpected position
            raise OSError(f"torch could not write {half}, as where the disk is full") from error
        half.replace(path)

    def resume(self, path: pathlib.Path) -> None:
        """Goes on from a checkpoint. CheckpointError: it is damaged, or of other code."""
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            self.iteration, self.milliseconds = saved["iteration"], saved["milliseconds"]
            self.network.load_state_dict(saved["network"])
            if self.contrast is not None:
                self.contrast.load_state_dict(saved["contrast"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.losses.copy_(saved["losses"])
            host, *device = (state.cpu() for state in saved["random"])
        except Exception as error:  # whatever a damaged file makes of torch.load
            raise CheckpointError(
                f"cannot go on from {path} ({type(error).__name__}): delete it to begin anew."
            ) from error
        torch.set_rng_state(host)
        for state in device:
            torch.cuda.set_rng_state(state, self.device)

    # ------------------------------------------------------------------------------------------------------ evaluation

    def row(self, ends: float = math.inf) -> Result:
        """The finished training's. Raises OutOfTime at ``ends``, and Diverged where a score is not finite."""
        scores = evaluate(self.network, self.data, self.setting.scales, ends)
        broken = [name for name in rows.SCORES if not math.isfinite(scores[name])]
        if broken:
            raise Diverged(f"no finite {', '.join(broken)} after the last iteration")
        entropy, contrast = self.losses[-max(1, self.setting.iterations // TENTHS) :].double().mean(0).tolist()
        return replace(
            self.study.blank(self.arm, self.seed),
            **scores,
            cross_entropy=entropy,
            contrast=contrast if self.contrast is not None else None,
            median_step_ms=statistics.median(self.milliseconds) if self.device.type == "cuda" else None,
        )

    def pictures(self) -> dict[str, "Figure"]:
        """The paper's figure 5 over the validation frames, and the negatives of the one with most classes."""
        images, labels = self.data.validation
        N, classes = len(self.data.classes), self.data.classes
        similarity = ck.metrics.AnchorSimilarity(N, group=None)
        self.network.eval()
        self.tap.train()  # else it records nothing
        self.tap.heads.eval()
        for some, of_some in zip(images.split(8), labels.split(8)):
            some, of_some = padded(some, 0.0), padded(of_some, VOID)
            with mixed_precision(self.device):
                logits = self.network(some.contiguous(memory_format=torch.channels_last))
                similarity.update([x.detach() for x in self.tap.features()], of_some, logits.detach())
        chosen = torch.stack([(labels == n).flatten(1).any(1) for n in range(N)]).sum(0).argmax()
        with torch.no_grad():
            logits = forward(self.network, images[chosen : chosen + 1])[0]
        self.network.train()
        sizes = [tuple(side // layer.stride for side in labels.shape[-2:]) for layer in self.tap.layers]
        found = {"num_classes": N, "sizes": sizes, "class_names": classes}
        return {
            "figure-5": ck.viz.similarity_curve(similarity.compute()),
            "negatives": ck.viz.negatives(images[chosen], labels[chosen], logits, **found),
        }


@contextlib.contextmanager
def input_of(module: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into a module, the latest alone."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.__setitem__(slice(None), inputs))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def evaluate(network: Segmenter, data: CamVid, scales: tuple[float, ...], ends: float = math.inf) -> dict:
    """The scores of ``rows.Result`` on the validation frames, whole and at the size that was read. Raises OutOfTime at
    ``ends`` (of time.monotonic)."""
    N, options = len(data.classes), {"group": None}
    regions, at_scales = (ck.metrics.ConfusionMatrix(N, **options) for _ in range(2))
    trimap = ck.metrics.TrimapIoU(N, rows.RADII, **options)
    boundary = ck.metrics.BoundaryIoU(N, rows.RADII, **options)
    embeddings = ck.metrics.AlignmentUniformity(N, rows.NEAREST, **options)
    was_training = network.training
    network.eval()
    with input_of(network.classify) as seen:
        for images, labels in zip(*(whole.split(8) for whole in data.validation)):
            wait(images.device)
            if time.monotonic() >= ends:
                network.train(was_training)
                raise OutOfTime
            logits = forward(network, images)
            embeddings.update(seen[0], padded(labels, VOID))
            for metric in (regions, trimap, boundary):
                metric.update(logits, labels)
            probabilities = torch.zeros_like(logits)
            for scale in scales:
                sides = [max(MULTIPLE, round(scale * side)) for side in images.shape[-2:]]
                scaled = F.interpolate(images, sides, mode="bilinear", antialias=scale < 1)
                for mirrored in (False, True):
                    some = forward(network, scaled.flip(-1) if mirrored else scaled)
                    some = F.interpolate(some.flip(-1) if mirrored else some, images.shape[-2:], mode="bilinear")
                    probabilities += some.softmax(1)
            at_scales.update(probabilities, labels)
    network.train(was_training)
    region, near, bands, how = (metric.compute() for metric in (regions, trimap, boundary, embeddings))
    scores = {"miou": region["miou"], "miou_multi_scale": at_scales.compute()["miou"]}
    scores |= {f"trimap_{r}": near[f"trimap_miou_{r}px"] for r in rows.RADII}
    scores |= {f"boundary_{r}": bands[f"boundary_miou_{r}px"] for r in rows.RADII}
    scores |= {name: how[name] for name in rows.SCORES if name in how}
    per_class = " ".join(f"{value:.4f}" for value in region["iou_per_class"].tolist())
    return {name: score.item() for name, score in scores.items()} | {"iou_per_class": per_class}


def forward(network: Segmenter, images: Tensor) -> Tensor:
    """Float32 logits of images of any size."""
    H, W = images.shape[-2:]
    with mixed_precision(images.device):
        logits = network(padded(images, 0.0).contiguous(memory_format=torch.channels_last))
    return logits[..., :H, :W].float()
