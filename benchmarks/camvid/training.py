"""One training of the study. It can be stopped after any iteration and resumed; on a CPU it then gives the same bits.

Frames, augmentation and first weights are functions of seed and iteration, so that all arms of a seed see the same. The
checkpoint holds the rest: weights, momentum, the loss's own state and the log.
"""

import contextlib
import io
import json
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import contextrast_kernels as ck
from benchmarks.camvid import arms, data
from benchmarks.camvid.arms import Arm, Protocol
from benchmarks.camvid.networks import NETWORKS, Segmenter
from benchmarks.camvid.rows import Result

DIM, FIFTHS, SAVED = 256, 5, 120.0
"""Channels of the embeddings; stages of the log; seconds between checkpoints."""


class CheckpointError(Exception):
    """A checkpoint cannot be used. The message is one sentence that names the file."""


class Diverged(Exception):
    """A loss or a score is not finite."""


@dataclass
class Log:
    """Numbers that describe the loss in training, for each layer from high to low resolution, summed over each fifth.

    Every probed iteration adds ``at_edge``, the share of error pixels at distance 0, and ``errors``, the share of valid
    pixels that are errors. With the Contextrast loss it also adds ``negatives``, ``classes`` and ``loss``.

    Two numbers compare the gradient of the weighted loss with that of the cross-entropy: ``ratio`` of their norms, and
    their ``cosine``. Both are taken at the output of each stage and, as the last number, over all parameters of the
    encoder.
    """

    sums: dict[str, list]
    counts: dict[str, list]

    def add(self, fifth: int, name: str, values: list[float]) -> None:
        sums = self.sums.setdefault(name, [[0.0] * len(values) for _ in range(FIFTHS)])
        counts = self.counts.setdefault(name, [[0] * len(values) for _ in range(FIFTHS)])
        for i, value in enumerate(values):
            if math.isfinite(value):  # a layer without errors has no share of them
                sums[fifth][i] += value
                counts[fifth][i] += 1

    def text(self) -> str:
        def mean(total: float, count: int) -> float | None:
            return float(f"{total / count:.4g}") if count else None

        means = {
            name: [[mean(*pair) for pair in zip(*lines)] for lines in zip(sums, self.counts[name])]
            for name, sums in self.sums.items()
        }
        return json.dumps(means, separators=(",", ":"))


@dataclass(frozen=True)
class Frames:
    """The frames of both splits on the device, and the columns that name the machine and the code."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    environment: dict
    device: torch.device


class Training:
    """An arm with a seed, at some iteration."""

    def __init__(self, protocol: Protocol, arm: Arm, seed: int, weight: float, frames: Frames):
        self.protocol, self.arm, self.seed, self.weight, self.frames = protocol, arm, seed, weight, frames
        self.images, self.labels = (part[seed % protocol.every :: protocol.every] for part in frames.train)
        self.augment = data.augmentation(protocol.size)
        self.class_weights = data.class_weights(self.labels)
        N = len(arms.CLASSES)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(data.draw(seed, 0))
            self.network: Segmenter = NETWORKS[protocol.network](N, protocol.pretrained)
            self.network.to(frames.device, memory_format=torch.channels_last)
            self.loss, self.tap = arm.build(N, DIM, seed), None
            if self.loss is not None:
                with contextlib.redirect_stdout(io.StringIO()):
                    self.tap = ck.attach(self.network, self.network.layers, dim=DIM)
                self.loss.to(frames.device)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), protocol.learning_rate, protocol.momentum, weight_decay=protocol.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.PolynomialLR(self.optimizer, protocol.iterations, protocol.power)
        self.iteration, self.cpu_seconds, self.log = 0, 0.0, Log({}, {})
        self.milliseconds: list[float] = []

    # ------------------------------------------------------------------------------------------------------- training

    def step(self) -> None:
        """Train for one iteration."""
        protocol, device = self.protocol, self.frames.device
        began = time.perf_counter()
        images, labels = data.batch(self.images, self.labels, self.augment, self.seed, self.iteration, protocol.batch)
        images = images.to(device, memory_format=torch.channels_last)
        labels = labels.to(device)
        with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
            logits = self.network(images)
            cross_entropy = F.cross_entropy(logits, labels, self.class_weights, ignore_index=arms.VOID)
            contrast = None
            if self.loss is not None:
                contrast = self.weight * self.loss(self.tap.features(), labels, logits)
        total = cross_entropy if contrast is None else cross_entropy + contrast
        if not math.isfinite(total.item()):
            raise Diverged(f"the loss is not finite at iteration {self.iteration + 1}")
        if self.iteration % protocol.probes == 0:
            self.probe(cross_entropy, contrast, logits.detach(), labels)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        self.schedule.step()
        self.iteration += 1
        self.milliseconds.append(1000 * (time.perf_counter() - began))

    def probe(self, cross_entropy: Tensor, contrast: Tensor | None, logits: Tensor, labels: Tensor) -> None:
        """Add this iteration to the log."""
        fifth = self.iteration * FIFTHS // self.protocol.iterations
        stages, N = self.network.stages, len(arms.CLASSES)
        at_edge, errors = [], []
        for stage in stages:
            predicted, true = (nearest(x, stage.shape[-2:]) for x in (logits.argmax(1), labels))
            wrong = ck.error_map(predicted, true, num_classes=N)
            distance = ck.edge_distance(wrong)
            at_edge.append(((distance == 0).sum() / (wrong >= 0).sum()).item())
            errors.append(((wrong >= 0).sum() / (true != arms.VOID).sum()).item())
        self.log.add(fifth, "at_edge", at_edge)
        self.log.add(fifth, "errors", errors)
        if contrast is None:
            return
        if isinstance(self.loss, ck.ContextrastLoss):
            for name in ("negatives", "classes", "loss"):
                self.log.add(fifth, name, self.loss.last[name].float().tolist())
        weights = list(self.network.backbone.parameters())
        wanted = [*stages, *weights]
        pairs = [
            [g if g is not None else torch.zeros_like(x) for g, x in zip(found, wanted)]
            for found in (
                torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)
                for loss in (cross_entropy, contrast)
            )
        ]
        groups = [[i] for i in range(len(stages))] + [range(len(stages), len(wanted))]
        ratios, cosines = [], []
        for group in groups:
            of_entropy, of_contrast = (torch.cat([part[i].double().flatten() for i in group]) for part in pairs)
            ratios.append((of_contrast.norm() / of_entropy.norm()).item())
            cosines.append(F.cosine_similarity(of_entropy, of_contrast, dim=0).item())
        self.log.add(fifth, "ratio", ratios)
        self.log.add(fifth, "cosine", cosines)

    def run(self, checkpoint: pathlib.Path, ends: float = math.inf, told: Callable = lambda: None) -> Result | None:
        """Train to the end and return the row; or leave a checkpoint at ``ends`` (of time.monotonic) and return None.

        A checkpoint is saved every two minutes. ``told`` is called after each iteration.
        """
        blank = Result(
            self.protocol.name, self.arm.name, self.seed, self.weight, status="ok", **self.frames.environment
        )
        mark, saved = time.process_time(), time.monotonic()
        try:
            while self.iteration < self.protocol.iterations:
                self.step()
                told()
                now = time.monotonic()
                over = now >= ends
                if over or now - saved > SAVED or self.iteration == self.protocol.iterations:
                    self.cpu_seconds += time.process_time() - mark
                    mark, saved = time.process_time(), now
                    self.save(checkpoint)
                if over:
                    return None
            if self.protocol.name == "timing":
                return replace(blank, step_ms=statistics.median(self.milliseconds[2:]))
            scores = evaluate(self.network, self.frames.validation, self.protocol.batch)
        except Diverged as error:
            return replace(blank, status=f"diverged: {error}", log=self.log.text())
        seconds = self.cpu_seconds + time.process_time() - mark
        return replace(blank, **scores, cpu_seconds=seconds, log=self.log.text())

    # ------------------------------------------------------------------------------------------------------ checkpoint

    def parts(self) -> dict:
        loss = {} if self.loss is None else {"loss": self.loss}
        return {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule, **loss}

    def save(self, path: pathlib.Path) -> None:
        """Replace the checkpoint by a rename, so that the file is always complete."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        what = repr((self.protocol, self.arm, self.weight))
        half = path.with_suffix(".new")
        rest = (what, self.iteration, self.cpu_seconds, self.log.sums, self.log.counts)
        torch.save(state | {"rest": rest}, half)
        half.replace(path)

    def resume(self, path: pathlib.Path) -> None:
        """Continue from a checkpoint."""
        try:
            state = torch.load(path, map_location=self.frames.device, weights_only=True)
            what, self.iteration, self.cpu_seconds, *log = state["rest"]
            if what != repr((self.protocol, self.arm, self.weight)):
                raise ValueError("it has other settings")
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
        except Exception as error:  # a damaged file can make torch.load raise any error
            reason = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{path}: cannot be resumed ({reason}). Delete it to restart this training."
            ) from error
        self.log = Log(*log)


def nearest(x: Tensor, size: torch.Size) -> Tensor:
    """Sample a map as the loss does: row r takes row (r * H) // h."""
    rows, columns = (torch.arange(n, device=x.device) * N // n for n, N in zip(size, x.shape[-2:]))
    return x[..., rows[:, None], columns]


@torch.no_grad()
def evaluate(network: nn.Module, validation: tuple[Tensor, Tensor], batch: int) -> dict:
    """Score a network on the validation frames: the columns of ``Result``."""
    N = len(arms.CLASSES)
    regions = ck.metrics.ConfusionMatrix(N)
    boundary = ck.metrics.BoundaryIoU(N, (3, 5))
    embeddings = ck.metrics.AlignmentUniformity(N)
    seen: list[Tensor] = []
    handle = network.classify.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.eval()
    try:
        for images, labels in zip(*(part.split(batch) for part in validation)):
            seen.clear()
            images = images.float() / 255
            labels = labels.long()
            with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
                logits = network(images.contiguous(memory_format=torch.channels_last))
            regions.update(logits, labels)
            boundary.update(logits, labels)
            embeddings.update(seen[0], labels)
    finally:
        handle.remove()
        network.train()
    found = regions.compute() | boundary.compute() | embeddings.compute()
    per_class = found["iou_per_class"]
    scores = {"miou": found["miou"], "rare": per_class[[arms.CLASSES.index(name) for name in arms.RARE]].nanmean()}
    scores |= {f"boundary_{r}": found[f"boundary_miou_{r}px"] for r in (3, 5)}
    scores |= {name: found[name] for name in ("alignment", "uniformity")}
    scores = {name: value.item() for name, value in scores.items()}
    broken = [name for name, value in scores.items() if not math.isfinite(value)]
    if broken:
        raise Diverged(f"no finite {', '.join(broken)} after the last iteration")
    return scores | {"iou_per_class": " ".join(f"{value:.4f}" for value in per_class.tolist())}
