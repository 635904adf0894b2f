"""The arms of the study: what each adds to the cross-entropy, after the paper's tables and the open questions (◇) of
docs/method.md. An arm is data; what differs between two arms is what stands here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

import contextrast_kernels as ck


@dataclass(frozen=True)
class Arm:
    """One loss beside the cross-entropy."""

    name: str
    text: str
    options: dict = field(default_factory=dict)
    loss: str = "contextrast"
    """One of LOSSES; "" for none."""
    weight: float = 0.1
    """Of the loss, as published."""
    on_cpu: dict = field(default_factory=dict)
    """Options in place of those where the definitions run, which store rows × columns."""
    question: int | None = None
    """The ◇ of docs/method.md that it answers otherwise than the arm ``against``, which has our default."""
    against: str = "bane"

    def build(self, num_classes: int, dim: int, seed: int, device: str) -> nn.Module | None:
        if not self.loss:
            return None
        options = self.options | (self.on_cpu if device == "cpu" else {})
        return LOSSES[self.loss](num_classes, dim, seed, **options)


def contextrast(num_classes: int, dim: int, seed: int, **options) -> nn.Module:
    return ck.ContextrastLoss(num_classes, seed=seed, **options)


def pixel_contrast(num_classes: int, dim: int, seed: int, pixels: int = 0, regions: int = 0, **options) -> nn.Module:
    bank = ck.MemoryBank(num_classes, dim, pixels=pixels, regions=regions) if pixels or regions else None
    return ck.PixelContrastLoss(num_classes, bank=bank, seed=seed, **options)


def multi_scale(num_classes: int, dim: int, seed: int, **options) -> nn.Module:
    return ck.MultiScaleContrastLoss(num_classes, seed=seed, **options)


def region_contrast(num_classes: int, dim: int, seed: int, regions: int, **options) -> nn.Module:
    return ck.RegionContrastLoss(num_classes, ck.MemoryBank(num_classes, dim, pixels=0, regions=regions), **options)


def pne(num_classes: int, dim: int, seed: int, **options) -> nn.Module:
    return ck.PNELoss(num_classes, seed=seed, **options)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "contextrast": contextrast,
    "pixel-contrast": pixel_contrast,
    "multi-scale": multi_scale,
    "region-contrast": region_contrast,
    "pne": pne,
}
CCL = {"negatives": "none", "base_rate": 1.0}
SAMPLED = {"base_sampler": ck.Sampler("common-count", 10000, 2500)}

ARMS = {
    arm.name: arm
    for arm in (
        Arm("baseline", "cross-entropy alone", loss="", weight=0.0),
        # Table 6
        # With every pixel among the base negatives BANE adds none: CCL is the far end of the base rate, too.
        Arm("ccl", "contextual contrast alone: every pixel of another class is a negative", CCL, question=9),
        Arm("semi-hard", "random errors, as many as BANE takes", {"negatives": "semi-hard"}, question=17),
        Arm("bane", "errors nearest to their region's edge: our defaults"),
        # The same three where the base negatives are those of MS/CS's sampler
        Arm("sampled-ccl", "MS/CS's sample as negatives", SAMPLED | {"negatives": "none"}, question=9, against="ccl"),
        Arm(
            "sampled-semi-hard",
            "MS/CS's sample, and random errors",
            SAMPLED | {"negatives": "semi-hard"},
            question=9,
            against="semi-hard",
        ),
        Arm("sampled-bane", "MS/CS's sample, and BANE", SAMPLED, question=9),
        # The relatives, as their official code sets them, ContrastiveSeg's even for CamVid. RegionContrast keeps a
        # region of each training image.
        Arm(
            "pixel-contrast",
            "ContrastiveSeg",
            {"temperature": 0.07},
            "pixel-contrast",
            on_cpu={"max_samples": 512, "min_pixels": 8},
        ),
        Arm(
            "pixel-contrast-bank",
            "ContrastiveSeg with a memory bank",
            {"temperature": 0.07, "pixels": 5000, "regions": 5000},
            "pixel-contrast",
            on_cpu={"pixels": 200, "regions": 200, "max_samples": 256, "min_pixels": 8},
        ),
        Arm("multi-scale", "MS/CS", loss="multi-scale", on_cpu={"max_samples": 512}),
        Arm("region-contrast", "RegionContrast", {"regions": 367}, "region-contrast"),
        Arm("pne", "PNE", loss="pne", weight=1.3, on_cpu={"set_size": 32, "max_samples": 512}),
        # Table 7, on contextual contrast alone: its 0.7 is table 6's row without hard negatives
        Arm("fusion-0", "no fusion", CCL | {"fusion_weight": 0.0}),
        Arm("fusion-0.3", "w_h = 0.3", CCL | {"fusion_weight": 0.3}, question=2, against="ccl"),
        Arm("fusion-0.5", "w_h = 0.5", CCL | {"fusion_weight": 0.5}),
        Arm("fusion-1", "the last layer's anchors everywhere", CCL | {"fusion_weight": 1.0}),
        # Table 8
        *(Arm(f"ratio-{percent}", f"{percent} % of the errors", {"ratio": percent / 100}) for percent in (10, 30, 70)),
        Arm("ratio-100", "all errors", {"ratio": 1.0}),
        # Where the paper is silent
        Arm("normalize-anchors", "anchors of unit length", {"normalize_anchors": True}, question=1),
        Arm("base-rate-0.01", "BANE, and a hundredth of all pixels", {"base_rate": 0.01}, question=9),
        Arm("base-rate-0.1", "BANE, and a tenth of all pixels", {"base_rate": 0.1}, question=9),
        Arm("temperature-0.07", "τ = 0.07", {"temperature": 0.07}, question=10),
        Arm("weights-reversed", "λ = 0.1 … 1.0", {"layer_weights": (0.1, 0.4, 0.7, 1.0)}, question=13),
        Arm("detach-anchors", "no gradient through anchors", {"detach_anchors": True}, question=14),
        Arm("distance-at-full", "distances at the labels' size", {"distance_at": "full"}, question=15),
    )
}

TABLES: dict[str, Sequence[str]] = {
    "components": ("baseline", "ccl", "semi-hard", "bane"),
    "relatives": ("baseline", "pixel-contrast", "pixel-contrast-bank", "multi-scale", "region-contrast", "pne", "bane"),
    "fusion": ("fusion-0", "fusion-0.3", "fusion-0.5", "ccl", "fusion-1"),
    "ratio": ("ccl", "ratio-10", "ratio-30", "bane", "ratio-70", "ratio-100"),
    "choices": (
        *("bane", "normalize-anchors", "base-rate-0.01", "base-rate-0.1", "ccl", "sampled-ccl", "sampled-semi-hard"),
        *("sampled-bane", "temperature-0.07", "weights-reversed", "detach-anchors", "distance-at-full"),
    ),
}
"""Name → its arms; in the order in which they are trained where not all can be."""


def chosen(names: Sequence[str]) -> list[list[Arm]]:
    """The arms that these names of arms and tables stand for, each once, a list for each table. ValueError: an unknown
    name."""
    groups: list[list[Arm]] = []
    for name in names:
        if name not in ARMS and name not in TABLES:
            raise ValueError(f"expected one of the tables {', '.join(TABLES)} or arms {', '.join(ARMS)}, got {name!r}")
        groups.append(
            [ARMS[arm] for arm in TABLES.get(name, (name,)) if not any(ARMS[arm] in group for group in groups)]
        )
    return groups
