"""The schema of ``results/camvid.csv``: a row is one finished training. ``benchmarks.results`` reads and writes it."""

import math
from dataclasses import dataclass

from benchmarks.camvid.arms import ARMS, PROTOCOLS

FILE = "camvid.csv"
SCORES = ("miou", "rare", "boundary_3", "boundary_5", "alignment", "uniformity")


@dataclass(frozen=True)
class Result:
    """One training. IoUs are fractions; boundaries are in pixels of the frames as trained."""

    protocol: str
    arm: str
    seed: int
    weight: float
    """The weight of the loss beside the cross-entropy."""
    status: str
    """"ok", or "diverged: " and where."""
    miou: float | None = None
    rare: float | None = None
    """Mean IoU of the rare classes."""
    boundary_3: float | None = None
    """Boundary IoU (Cheng et al.) with bands of 3 px."""
    boundary_5: float | None = None
    alignment: float | None = None
    """Alignment and uniformity of what goes into the last convolution."""
    uniformity: float | None = None
    iou_per_class: str = ""
    step_ms: float | None = None
    """The median time of a step with data and augmentation. Only rows of the protocol ``timing`` have it."""
    cpu_seconds: float | None = None
    """CPU time of the whole training with its evaluation, over all calls. Load of other processes increases it."""
    log: str = ""
    """JSON, means over each fifth of the iterations: see ``training.Log``."""
    device: str = ""
    torch: str = ""
    libraries: str = ""
    commit: str = ""
    """The commit of the checkout that trained, and so of the loss."""

    @property
    def measured(self) -> tuple:
        """The columns that identify a training."""
        return self.protocol, self.arm, self.seed

    def flaw(self) -> str | None:
        """What is wrong with the row, as a sentence; None if nothing is."""
        if self.protocol not in PROTOCOLS:
            return f"protocol: expected one of {', '.join(PROTOCOLS)}, got {self.protocol!r}."
        if self.arm not in ARMS:
            return f"arm: expected one of {', '.join(ARMS)}, got {self.arm!r}."
        if self.seed is None or self.weight is None or not self.device or not self.torch:
            return "expected seed, weight, device and torch to be filled."
        if self.status != "ok" and not self.status.startswith("diverged: "):
            return f"status: expected ok or 'diverged: where', got {self.status!r}."
        expected = () if self.status != "ok" else ("step_ms",) if self.protocol == "timing" else SCORES
        for name in (*SCORES, "step_ms"):
            value = getattr(self, name)
            if (value is None) == (name in expected) or (value is not None and not math.isfinite(value)):
                return f"{name}: expected {'a finite number' if name in expected else 'no number'}, got {value}."
        return None
