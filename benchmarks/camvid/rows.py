"""The schema of ``results/camvid.csv``: a row is one finished training."""

import math
from dataclasses import dataclass

from benchmarks.camvid.arms import ARMS

FILE = "camvid.csv"
RADII = (5, 7, 10)
NEAREST = (3, 5)
PAPER = {"height": 360, "batch": 16, "iterations": 6000}
SETTING = (
    *("protocol", "network", "augmentation", "iterations", "batch", "height", "width", "channels", "learning_rate"),
    "precision",
)
"""What rows that are compared with each other have in common. Not the device: a study can go on on another of its kind,
which the precision names."""
SCORES = (
    *("miou", "miou_multi_scale", *(f"trimap_{r}" for r in RADII), *(f"boundary_{r}" for r in RADII)),
    *("alignment", "uniformity", *(f"uniformity_{k}" for k in NEAREST)),
)


@dataclass(frozen=True)
class Result:
    """One training. IoUs are fractions; boundaries in pixels of the labels as trained."""

    arm: str
    seed: int
    protocol: str
    """"full": the paper's sizes, batch and iterations, with a network of its kind. "shortened": anything less, a test
    of the program."""
    network: str
    augmentation: str
    """Whose colour jitter, flip and scale: "kornia" or "plain"."""
    iterations: int
    batch: int
    height: int
    width: int
    """Of a frame. Training crops its sides to multiples of 32."""
    channels: int
    """D, of the embeddings."""
    learning_rate: float
    precision: str

    status: str
    """"ok", or "diverged: " and where."""
    miou: float | None = None
    """Of one forward of each validation frame, as all that follows but the next."""
    miou_multi_scale: float | None = None
    """Of mean probabilities over the protocol's scales, each with its mirror image."""
    trimap_5: float | None = None
    """Mean IoU within 5 px of a boundary of the labels."""
    trimap_7: float | None = None
    trimap_10: float | None = None
    boundary_5: float | None = None
    """Boundary IoU (Cheng et al.), bands of 5 px."""
    boundary_7: float | None = None
    boundary_10: float | None = None
    alignment: float | None = None
    """A, and then U, U_3, U_5, of what goes into the last convolution."""
    uniformity: float | None = None
    uniformity_3: float | None = None
    uniformity_5: float | None = None
    iou_per_class: str = ""
    cross_entropy: float | None = None
    """Mean of the last tenth of the iterations, as is the next."""
    contrast: float | None = None
    """Before its weight. Empty without a contrastive loss."""
    median_step_ms: float | None = None
    """With data and augmentation. Empty without a GPU, where it would tell nothing."""

    device: str = ""
    driver: str = ""
    torch: str = ""
    triton: str = ""
    libraries: str = ""
    """Those that network and augmentation come from."""
    commit: str = ""

    @property
    def measured(self) -> tuple:
        """What tells rows apart: a training is not repeated because a commit came in between."""
        return self.arm, self.seed, *self.setting

    @property
    def setting(self) -> tuple:
        return tuple(getattr(self, name) for name in SETTING)

    def flaw(self) -> str | None:
        """What it lacks, as a sentence."""
        if self.arm not in ARMS:
            return f"arm: expected one of {', '.join(ARMS)}, got {self.arm!r}."
        for name in ("network", "augmentation", "precision", "device", "torch"):
            if not getattr(self, name):
                return f"expected {name} to be filled."
        for name in ("seed", "iterations", "batch", "height", "width", "channels", "learning_rate"):
            if getattr(self, name) is None:
                return f"expected {name} to be filled."
        if self.protocol != protocol(self.network, self.height, self.batch, self.iterations):
            return f"protocol: expected full (which takes {PAPER} and not the small network) or shortened, rightly."
        if self.status != "ok" and not self.status.startswith("diverged: "):
            return f"status: expected ok or 'diverged: where', got {self.status!r}."
        scores = {name: getattr(self, name) for name in (*SCORES, *(["median_step_ms"] if self.driver else []))}
        if self.status == "ok":
            lacking = [name for name, score in scores.items() if score is None or not math.isfinite(score)]
            if lacking:
                return (
                    f"expected a finite {', '.join(lacking)} of a finished training: take the row out to run it again."
                )
        elif any(score is not None for score in scores.values()):
            return "expected no scores of a training that diverged."
        return None


def protocol(network: str, height: int, batch: int, iterations: int) -> str:
    full = network != "small" and {"height": height, "batch": batch, "iterations": iterations} == PAPER
    return "full" if full else "shortened"
