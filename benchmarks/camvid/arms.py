"""What is trained: classes, protocols, arms and the order. All of it is data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

import contextrast_kernels as ck

CLASSES = (*("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"),)
RARE = ("pole", "sign", "fence", "pedestrian", "bicyclist")
"""The classes with less than 1.5 % of the training pixels each."""
VOID = 255


@dataclass(frozen=True)
class Protocol:
    """What all arms of a comparison share."""

    name: str
    network: str
    size: tuple[int, int]
    """Height and width of a frame in pixels, multiples of 32. Scores are counted at this size."""
    batch: int
    iterations: int
    learning_rate: float
    every: int = 1
    """Train on every ``every``-th frame, from a start that the seed chooses."""
    pretrained: bool = True
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9
    """The exponent of the polynomial decay of the learning rate."""
    probes: int = 15
    """The gradients are compared every ``probes``-th iteration."""


PRETRAINED = Protocol("pretrained", "efficientnet_lite0", (192, 256), 8, 360, 0.05)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        PRETRAINED,
        replace(PRETRAINED, name="few-labels", every=4),
        replace(PRETRAINED, name="alpha"),
        replace(PRETRAINED, name="timing", iterations=12, probes=100),
        replace(PRETRAINED, name="long", size=(352, 480), batch=16, iterations=1500),
        Protocol("full", "hrnet_w18", (352, 480), 16, 6000, 0.01),
    )
}
"""``pretrained`` and ``few-labels`` are the study. ``alpha`` chooses the loss's weight on seeds of its own. ``timing``
measures a step's time. ``long`` and ``full`` are for a GPU."""


@dataclass(frozen=True)
class Arm:
    """One loss beside the cross-entropy."""

    name: str
    text: str
    loss: str = "ContextrastLoss"
    """A class of ``contextrast_kernels``, or "" for none."""
    options: dict = field(default_factory=dict)
    weight: float | None = None
    """The published weight. None: the weight that the sweep chose."""

    def build(self, num_classes: int, dim: int, seed: int) -> nn.Module | None:
        if not self.loss:
            return None
        options = dict(self.options)
        if "regions" in options:  # RegionContrast keeps one region of each training image
            options["bank"] = ck.MemoryBank(num_classes, dim, pixels=0, regions=options.pop("regions"))
        else:
            options["seed"] = seed
        return getattr(ck, self.loss)(num_classes, **options)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("baseline", "cross-entropy alone", "", weight=0.0),
        Arm("bane", "the loss with its defaults: negatives are errors near their region's edge"),
        Arm("ccl", "every pixel of another class is a negative", options={"negatives": "none", "base_rate": 1.0}),
        Arm("semi-hard", "as many errors as BANE takes, at random", options={"negatives": "semi-hard"}),
        Arm("full-distance", "BANE with distances at the labels' size", options={"distance_at": "full"}),
        Arm("base-rate-0.1", "BANE and a tenth of all pixels", options={"base_rate": 0.1}),
        Arm("pixel-contrast", "ContrastiveSeg", "PixelContrastLoss", {"temperature": 0.07}, 0.1),
        Arm("multi-scale", "MS/CS", "MultiScaleContrastLoss", {"max_samples": 1024}, 0.1),
        Arm("region-contrast", "RegionContrast", "RegionContrastLoss", {"regions": 367}, 0.1),
        Arm("pne", "PNE", "PNELoss", {"set_size": 32, "max_samples": 512}, 1.3),
        Arm("alpha-0.03", "BANE with α = 0.03", weight=0.03),
        Arm("alpha-0.1", "BANE with α = 0.1", weight=0.1),
        Arm("alpha-0.3", "BANE with α = 0.3", weight=0.3),
    )
}
COMPONENTS = ("baseline", "bane", "ccl", "semi-hard")
FEW = ("baseline", "bane", "ccl")
REST = ("full-distance", "base-rate-0.1", "pixel-contrast", "multi-scale", "region-contrast", "pne")
SWEEP = ("alpha-0.1", "alpha-0.03", "alpha-0.3")
SEEDS, FEWER = tuple(range(8)), tuple(range(4))
"""The seeds of the components and the few-label arms, and the seeds of the rest."""
SWEEP_SEEDS = (1000, 1001)
"""The seeds that choose α. They are not used again."""
MARGIN = 0.01

Job = tuple[Protocol, Arm, int]


def plan() -> Iterator[Job]:
    """The study's trainings in the order in which they run: the sweep, then seed by seed, then the rest."""

    def jobs(protocol: str, names: Sequence[str], seed: int) -> Iterator[Job]:
        return ((PROTOCOLS[protocol], ARMS[name], seed) for name in names)

    for seed in SWEEP_SEEDS:
        yield from jobs("alpha", SWEEP, seed)
    for seed in SEEDS:
        yield from jobs("pretrained", COMPONENTS, seed)
        yield from jobs("few-labels", FEW, seed)
    for seed in FEWER:
        yield from jobs("pretrained", REST, seed)


def alpha(rows: Iterable) -> float:
    """The α that the sweep's rows choose.

    It is the paper's 0.1, unless the sweep is complete and the mean mIoU of another α is higher by more than a point
    (``MARGIN``).
    """
    scores = {name: [row.miou for row in rows if row.arm == name and row.miou is not None] for name in SWEEP}
    if any(len(of_arm) < len(SWEEP_SEEDS) for of_arm in scores.values()):
        return 0.1
    means = {name: sum(of_arm) / len(of_arm) for name, of_arm in scores.items()}
    best = max(means, key=means.get)
    return ARMS[best if means[best] > means["alpha-0.1"] + MARGIN else "alpha-0.1"].weight
