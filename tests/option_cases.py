"""One list of inputs with options for the interpreter, the compiled code on a CPU, and a GPU.

OPTIONS has every keyword of every op with Triton kernels, and the values that it is tried with; test_option_cases.py
compares it with the public signatures. QUICK names a few cases by hand, in which each value of each option occurs;
``sweep()`` has all pairs of values of any two axes.
"""

import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from inputs import scene
from torch import Tensor

import contextrast_kernels as ck

DTYPES = ("float64", "float32", "float16", "bfloat16")
LAYOUTS = ("nchw", "channels_last", "slices", "unaligned")
"""unaligned: contiguous, from an address that is not a multiple of 16. For the matrices of info_nce the others mean row
by row, column by column, and no axis of stride 1."""
CHANNELS = (1, 8, 64, 96, 256, 512, 720, 1024)
CLASSES = (1, 5, 19, 150, 256)
SIZES = {
    "odd": (2, [(9, 13), (5, 7), (3, 4), (2, 2)]),
    "wide rows": (2, [(5, 64), (3, 32), (2, 16), (1, 8)]),
    "long row": (1, [(2, 70), (1, 35), (1, 18), (1, 9)]),
    "one pixel": (1, [(1, 1)] * 4),
}
"""B and (h, w) of four layers."""
LABELS = ("int64", "uint8", "int32", "int16")
VALUES = ("plain", "NaN at an ignored pixel", "NaN", "inf")

OPTIONS: dict[str, dict[str, tuple]] = {
    "class_anchors": {"ignore_index": (255, 0, -100), "normalize": (True, False)},
    "pixel_anchor_loss": {
        "negatives": (None, "given"),
        "base": (None, "given"),
        "temperature": (0.1, 0.5),
        "ignore_index": (255, 0, -100),
        "normalize": (True, False),
    },
    "contextrast_loss": {
        "ignore_index": (255, 0, -100),
        "layer_weights": ((1.0, 0.7, 0.4, 0.1), (1.0, 0.5), (1.0,)),
        "temperature": (0.1, 0.5),
        "fusion_weight": (0.7, 1.0),
        "negatives": ("bane", "semi-hard", "none"),
        "ratio": (0.5, 1.0),
        "base_rate": (0.0, 0.3, 1.0),
        "base_sampler": (None, "uniform"),
        "distance_at": ("layer", "full"),
        "normalize": (True, False),
        "normalize_anchors": (False, True),
        "detach_anchors": (False, True),
        "sampling": (None, (2.0, 1.0)),
        "seed": (0, 2**40 + 5),
        "group": (None, "one rank"),
    },
    "info_nce": {
        "columns": ("given", None),
        "temperature": (0.2, 0.5),
        "ignore_index": (-1, 2),
        "positives": ("each", "supcon", "pooled"),
        "row_negatives": (None, "given"),
        "column_negatives": (None, "given"),
        "column_weights": (None, "given"),
        "reduction": ("mean", "none"),
    },
}
"""The values of every option. A case that does not name an option has its first value."""

OTHER_ARGUMENTS = {
    "class_anchors": ("features", "labels", "num_classes"),
    "pixel_anchor_loss": ("features", "labels", "anchors"),
    "contextrast_loss": ("features", "labels", "predictions", "num_classes"),
    "info_nce": ("rows", "row_labels", "column_labels"),
}
"""The arguments that are not options. column_labels are given together with columns."""


@dataclass(frozen=True)
class Case:
    op: str
    options: dict = field(default_factory=dict)
    """The options whose value differs from the first one in OPTIONS."""
    dtype: str = "float32"
    layout: str = "nchw"
    D: int = 8
    N: int = 5
    sizes: str = "odd"
    labels: str = "int64"
    values: str = "plain"

    def __str__(self):
        options = [f"{name}={value}" for name, value in self.options.items()]
        shape = [self.dtype, self.layout, f"D{self.D}", f"N{self.N}", self.sizes, self.labels]
        return " ".join([self.op, *shape, *([] if self.values == "plain" else [self.values]), *options])

    def option(self, name: str):
        return self.options.get(name, OPTIONS[self.op][name][0])

    @property
    def all_options(self) -> dict:
        return {name: self.option(name) for name in OPTIONS[self.op]}

    @property
    def rounding(self) -> float:
        """The relative error that is allowed beyond twice that of the reference."""
        return 1e-12 if self.dtype == "float64" else 1e-6

    @property
    def gradient_is_zero(self) -> bool:
        """Whether features have one channel and are normalised: an embedding is 1 or -1 then, and the gradient is 0 in
        exact arithmetic. The reference, too, gives rounding errors in its place, so neither is a measure of the other.
        """
        return self.D == 1 and self.op in ("class_anchors", "contextrast_loss") and self.option("normalize")

    @property
    def possible(self) -> bool:
        """Whether the public function takes these options together."""
        if self.labels == "uint8" and self.N == 256:
            return False  # no label is left for ignored pixels
        if self.op != "contextrast_loss":
            return True
        sampled, rate = self.option("base_sampler") is not None, self.option("base_rate")
        if sampled and rate > 0:
            return False
        return self.option("negatives") != "none" or rate > 0 or sampled


def _case(op: str, dtype: str, **changes) -> Case:
    axes = {name: changes.pop(name) for name in ("layout", "D", "N", "sizes", "labels", "values") if name in changes}
    return Case(op, changes, dtype, **axes)


QUICK = [
    _case("class_anchors", "bfloat16", D=64, N=19),
    _case("class_anchors", "float64", normalize=False, layout="channels_last", ignore_index=0),
    _case("class_anchors", "float32", layout="unaligned", ignore_index=-100, labels="int16", values="NaN"),
    _case("pixel_anchor_loss", "float32", D=20, labels="uint8"),
    _case("pixel_anchor_loss", "bfloat16", negatives="given", layout="channels_last", N=19, D=64),
    _case("pixel_anchor_loss", "float16", negatives="given", base="given", normalize=False, temperature=0.5,
          ignore_index=0),
    _case("pixel_anchor_loss", "float32", base="given", layout="slices", ignore_index=-100, D=20),
    _case("contextrast_loss", "bfloat16", D=64, N=19, sizes="wide rows"),
    _case("contextrast_loss", "float32", normalize_anchors=True, fusion_weight=1.0, negatives="none", base_rate=1.0,
          ignore_index=0, layer_weights=(1.0, 0.5)),
    _case("contextrast_loss", "float16", detach_anchors=True, base_rate=0.3, seed=2**40 + 5, normalize=False,
          temperature=0.5, distance_at="full", sampling=(2.0, 1.0), layout="channels_last", labels="int32",
          values="NaN at an ignored pixel"),
    _case("contextrast_loss", "float64", negatives="semi-hard", ratio=1.0, group="one rank", layout="slices",
          layer_weights=(1.0, 0.5)),
    _case("contextrast_loss", "float32", base_sampler="uniform", negatives="none", ignore_index=-100, labels="int32",
          layer_weights=(1.0,)),
    _case("info_nce", "bfloat16", positives="each", D=64),
    _case("info_nce", "float32", columns=None, positives="pooled", column_weights="given", ignore_index=2),
    _case("info_nce", "float16", positives="supcon", row_negatives="given", reduction="none", layout="channels_last"),
    _case("info_nce", "float32", column_negatives="given", temperature=0.5, sizes="long row",
          layout="slices", values="inf"),
]  # fmt: skip
"""Cases in which each value of each option occurs."""


# --------------------------------------------------------------------------------------------------------------- sweep


def axes(op: str) -> dict[str, tuple]:
    """Everything that may vary in a case of an op, and its values."""
    sizes = {"dtype": DTYPES, "layout": LAYOUTS, "D": CHANNELS, "N": CLASSES, "sizes": tuple(SIZES)}
    return {**sizes, "labels": LABELS, "values": VALUES, **OPTIONS[op]}


def sweep(op: str) -> Iterator[Case]:
    """Cases that together hold every pair of values of different axes that an op accepts.

    Each case starts with a pair that is still missing. Its other values are those that add the most missing pairs.
    """
    table = axes(op)
    names = list(table)
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x in range(len(table[a]))
        for y in range(len(table[b]))
    }
    while missing:
        (a, x), (b, y) = min(missing)
        chosen = {a: x, b: y}

        for name in names:
            if name in chosen:
                continue
            # The value with the most new pairs is tried first. Among equals the values take turns.
            new = [sum(pair in missing for pair in _pairs(names, chosen, name, k)) for k in range(len(table[name]))]
            turn = [(k + len(missing)) % len(new) for k in range(len(new))]
            order = sorted(range(len(new)), key=list(zip((-n for n in new), turn)).__getitem__)
            fitting = [k for k in order if _possible_so_far(op, table, {**chosen, name: k})]
            chosen[name] = fitting[0] if fitting else order[0]
        made = _case(op, **{name: table[name][k] for name, k in chosen.items()})
        if made.possible:
            missing -= set(itertools.combinations(((name, chosen[name]) for name in names), 2))
            yield made
        missing.discard(((a, x), (b, y)))


def _pairs(names: list[str], chosen: dict[str, int], name: str, index: int) -> Iterator[tuple]:
    """The pairs that a further choice makes with the earlier ones."""
    for other, value in chosen.items():
        pair = ((name, index), (other, value))
        yield pair if names.index(name) < names.index(other) else pair[::-1]


def _possible_so_far(op: str, table: dict[str, tuple], chosen: dict[str, int]) -> bool:
    if op == "contextrast_loss" and "negatives" in chosen and not {"base_rate", "base_sampler"} <= set(chosen):
        chosen = {"base_rate": 1, **chosen}  # base_rate may still be chosen so that the case is possible
        if chosen.get("base_sampler"):
            chosen["base_rate"] = 0
    return _case(op, **({"dtype": "float32"} | {name: table[name][k] for name, k in chosen.items()})).possible


# -------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Built:
    loss: Callable[..., Tensor]
    """The loss as a function of the leaves."""
    reference: Callable[..., Tensor]
    """The loss to compare with: the same, without the option that does not change it, a group of one rank."""
    leaves: list[Tensor]
    exact: list[Tensor]
    """Integer results, which must be equal in every call."""


def build(case: Case, device: str = "cpu") -> Built:
    """The loss and the inputs of a case. The inputs depend only on the case."""
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    return {
        "class_anchors": _class_anchors,
        "pixel_anchor_loss": _pixel_anchor_loss,
        "contextrast_loss": _contextrast_loss,
        "info_nce": _info_nce,
    }[case.op](case, rng, device)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in a different layout; axis 1 of x holds the channels."""
    if layout == "channels_last":
        return x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 2 else x.contiguous(
            memory_format=torch.channels_last
        )  # fmt: skip
    if layout == "slices":
        big = x.new_full([2 * size + 1 for size in x.shape], torch.nan)
        view = big[tuple(slice(1, None, 2) for _ in x.shape)]
        return view.copy_(x)
    if layout == "unaligned":
        flat = torch.cat([x.new_full((1,), torch.nan), x.flatten()])[1:]
        return flat.view(x.shape)
    return x


def _features(case: Case, rng, device, sizes) -> list[Tensor]:
    B = SIZES[case.sizes][0]
    return [
        torch.from_numpy(rng.standard_normal((B, case.D, h, w)) + 0.3).to(getattr(torch, case.dtype)).to(device)
        for h, w in sizes
    ]


def _maps(case: Case, rng, device) -> tuple[Tensor, Tensor]:
    """Labels and predictions at twice the first layer's size. If N is large they are random, to hold all classes."""
    B, sizes = SIZES[case.sizes]
    H, W = (2 * n for n in sizes[0])
    ignore = case.option("ignore_index")
    labels, predictions = scene(rng, B, case.N, H, W, ignored=0)
    if case.N > 16:
        labels, predictions = (torch.from_numpy(rng.integers(0, case.N, (B, H, W))) for _ in range(2))
    dtype = getattr(torch, case.labels)
    info = torch.iinfo(dtype)
    void = ignore if info.min <= ignore <= info.max else info.max
    labels[torch.from_numpy(rng.random((B, H, W)) < 0.1)] = void
    if case.sizes != "one pixel":
        labels[:, 0, 0] = void  # the first pixel of every layer takes its label from here
    return labels.to(dtype).to(device), predictions.to(device)


def _break(case: Case, x: Tensor, labels: Tensor) -> None:
    """Put a NaN or inf at the first pixel, and make its label ignored or valid."""
    if case.values == "plain":
        return
    valid = case.N - 1 if case.option("ignore_index") != case.N - 1 else 0
    if case.values != "NaN at an ignored pixel":
        labels[0, :2, :2] = valid
        x[0, -1, 0, 0] = torch.inf if case.values == "inf" else torch.nan
    elif case.sizes != "one pixel":
        x[0, -1, 0, 0] = torch.nan


def _class_anchors(case, rng, device):
    (x,), (labels, _) = _features(case, rng, device, SIZES[case.sizes][1][:1]), _maps(case, rng, device)
    _break(case, x, labels)
    counts = []

    def loss(x):
        anchors, found = ck.class_anchors(x, labels, case.N, **case.all_options)
        counts.append(found)
        return anchors

    return Built(loss, loss, [laid_out(x, case.layout)], counts)


def _pixel_anchor_loss(case, rng, device):
    B, sizes = SIZES[case.sizes]
    (x,), (labels, _) = _features(case, rng, device, sizes[:1]), _maps(case, rng, device)
    _break(case, x, labels)
    anchors = torch.from_numpy(rng.standard_normal((case.N, case.D)) / case.D**0.5)
    anchors = anchors.to(torch.promote_types(x.dtype, torch.float32)).to(device)
    options = case.all_options
    if options["negatives"]:
        options["negatives"] = torch.from_numpy(rng.integers(-case.N, case.N + 2, (B, *sizes[0]))).to(device)
    if options["base"]:
        options["base"] = torch.from_numpy(rng.random((B, *sizes[0])) < 0.4).to(device)

    def loss(x, anchors):
        return ck.pixel_anchor_loss(x, labels, anchors, **options)

    return Built(loss, loss, [laid_out(x, case.layout), anchors], [])


def _contextrast_loss(case, rng, device):
    options = case.all_options
    sizes = SIZES[case.sizes][1][: len(options["layer_weights"])]
    xs, (labels, predictions) = _features(case, rng, device, sizes), _maps(case, rng, device)
    _break(case, xs[0], labels)
    if options["base_sampler"]:
        options["base_sampler"] = ck.Sampler("uniform", 40, 20)

    def loss(*xs):
        group = torch.distributed.group.WORLD if options["group"] else None
        given = {**options, "group": group}
        return ck.contextrast_loss(list(xs), labels, predictions, num_classes=max(case.N, 2), **given)

    def reference(*xs):
        given = {**options, "group": None}
        return ck.contextrast_loss(list(xs), labels, predictions, num_classes=max(case.N, 2), **given)

    return Built(loss, reference, [laid_out(x, case.layout) for x in xs], [])


ROWS_AND_COLUMNS = {"odd": (37, 70), "wide rows": (5, 300), "long row": (1, 9), "one pixel": (1, 1)}


def _info_nce(case, rng, device):
    own = case.option("columns") is None
    R, C = ROWS_AND_COLUMNS[case.sizes]
    C = R if own else C
    dtype, info = getattr(torch, case.dtype), torch.iinfo(getattr(torch, case.labels))
    ignore = case.option("ignore_index")
    void = ignore if info.min <= ignore <= info.max else info.max

    def vectors(n):
        return torch.from_numpy(2 * rng.standard_normal((n, case.D)) / case.D**0.5).to(dtype).to(device)

    def codes(n):
        drawn = np.where(rng.random(n) < 0.2, void, rng.integers(0, min(case.N, 100), n))
        return torch.from_numpy(drawn).to(getattr(torch, case.labels)).to(device)

    x = [vectors(R)] if own else [vectors(R), vectors(C)]
    labels = [codes(n) for n in ((R,) if own else (R, C))]
    if case.values != "plain":
        labels[0][0] = void if case.values == "NaN at an ignored pixel" else int(ignore == 0)
        x[0][0, -1] = torch.inf if case.values == "inf" else torch.nan
    options = case.all_options
    del options["columns"]
    made = {
        "row_negatives": lambda: codes(R).long(),
        "column_negatives": lambda: codes(C).long(),
        "column_weights": lambda: torch.from_numpy(rng.choice([0.0, 0.5, 1.0, 3.0], C)).float().to(device),
    }
    for name, make in made.items():
        if options[name]:
            options[name] = make()

    def loss(rows, columns=None):
        return ck.info_nce(rows, labels[0], columns, None if own else labels[1], **options)

    return Built(loss, loss, [laid_out(v, case.layout) for v in x], [])


def quick_and_sweep() -> list[tuple[Case, bool]]:
    """All cases, each with whether it is slow."""
    cases = [(case, False) for case in QUICK]
    return cases + [(case, True) for op in OPTIONS for case in sweep(op) if case not in QUICK]


def smaller(case: Case, D: int = 24, N: int = 19) -> Case:
    """The case with at most D channels and N classes, which the interpreter runs quickly."""
    return replace(case, D=min(case.D, D), N=min(case.N, N))
