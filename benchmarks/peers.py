"""The relatives' public code, on the same maps.

It is imported from checkouts in a folder that the user names, under their repositories' names; nothing of
theirs is in this tree:

    ContrastiveSeg    tfzhou/ContrastiveSeg      PixelContrastLoss, one layer (stride 4)
    MS_CS_ContrSeg    RViMLab/MS_CS_ContrSeg     DenseContrastiveLossV2_ms, all layers
    PNE_Loss          jingw193/PNE_Loss          ReverseContrastiveLoss, one layer (stride 8)
    RegionContrast    hzhupku/RegionContrast     the contrast of dec_deeplabv3_contrast, one layer (stride 8)

    python -m benchmarks.run --parts peers --peers DIR --out FOLDER     times them beside this package's

Their files run unchanged, with their published settings. Three things around them are replaced:

* Modules that they import and that the losses never use (loggers, registries, debuggers) are replaced by stand-ins.
* Without a CUDA device, `.cuda()` leaves a tensor where it is.
* RegionContrast's decoder computes its loss between its own layers. It is given the features and logits instead.

The time includes what a loss does itself (arg-max, normalisation of embeddings, sampling). It does not include what a
network does before its loss (projection, resizing of logits).
"""

import contextlib
import importlib
import importlib.util
import pathlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import contextrast_kernels as ck
from benchmarks.results import Absent

# ------------------------------------------------------------------------------------------------- other people's code


class StandIn(types.ModuleType):
    """A module in place of one that a loss's file imports and the loss never uses.

    With a ``path`` it is a package: its other modules come from the checkout, and its own __init__ does not run.
    """

    def __init__(self, name: str, path: pathlib.Path | None = None, **members):
        super().__init__(name)
        self.__dict__.update(members, **({"__path__": [str(path)]} if path else {}))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def imports_from(root: pathlib.Path, *stand_ins: StandIn) -> Iterator[None]:
    """Imports inside the block look into the checkout first. Its modules are forgotten afterwards: the checkouts share
    names such as ``lib`` and ``utils``."""
    kept = {}
    try:
        with (
            mock.patch.dict(sys.modules, {module.__name__: module for module in stand_ins}),
            mock.patch.object(sys, "path", [str(root), *sys.path]),
        ):
            before = set(sys.modules)
            try:
                yield
            finally:
                fresh = set(sys.modules) - before
                kept = {name: sys.modules[name] for name in fresh if not is_below(sys.modules[name], root)}
    finally:
        sys.modules.update(kept)


def is_below(module: types.ModuleType, root: pathlib.Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
    return any(place and root in pathlib.Path(place).parents for place in places)


@contextlib.contextmanager
def cuda_means(device: torch.device) -> Iterator[None]:
    """The relatives call ``.cuda()``. Inside the block it leaves tensors on the CPU if there is no GPU."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            yield
        return
    with (
        mock.patch.object(Tensor, "cuda", lambda self, *args, **kwargs: self),
        mock.patch.object(torch.cuda, "FloatTensor", torch.FloatTensor),
        mock.patch.object(torch.cuda, "LongTensor", torch.LongTensor),
    ):
        yield


def pixel_contrast(root, features, labels, logits, num_classes, ignore_index):
    """tau 0.1 over 0.07, 1024 samples, at most 100 views, as in configs/cityscapes/H_48_D_4.json.

    The code fails if no image has more pixels of a class than views. Such a batch gets fewer views.
    """
    with imports_from(root):
        loss_file = importlib.import_module("lib.loss.loss_contrast")
    x = features[0]
    seg = nearest(logits, x)
    layer_labels = F.interpolate(labels[:, None].double(), x.shape[2:]).long()
    most = max(int((layer_labels == n).flatten(1).sum(1).max()) for n in range(num_classes))
    views = 100 if most > 100 else max(1, most // 2)
    settings = {
        ("contrast", "temperature"): 0.1,
        ("contrast", "base_temperature"): 0.07,
        ("contrast", "max_samples"): 1024,
        ("contrast", "max_views"): views,
        ("loss", "params"): {"ce_ignore_index": ignore_index},
    }
    configer = types.SimpleNamespace(get=lambda *key: settings[key], exists=lambda *key: key in settings)
    loss = loss_file.PixelContrastLoss(configer)
    return lambda: loss(F.normalize(x, dim=1), labels, torch.max(seg, 1)[1]), f"1 layer, at most {views} views"


def multi_scale(root, features, labels, logits, num_classes, ignore_index):
    """tau 0.1, weights 1, 0.7, 0.4, 0.1 and cross-scale terms, as in configs/CITYSCAPES/hrnet_contrastive_CTS.json."""
    classes = {n: str(n) for n in range(num_classes)} | {255: "ignored"}
    maps = types.SimpleNamespace(CLASS_INFO={1: [None, classes]})
    utils = StandIn("utils", DATASETS_INFO={"": maps}, Logger=StandIn("Logger"), is_distributed=lambda: False)
    with imports_from(root, utils, StandIn("losses", root / "losses")):
        loss_file = importlib.import_module("losses.DenseContrastiveLossV2_ms")
    weights = [1.0, 0.7, 0.4, 0.1][: len(features)]
    config = {"experiment": 1, "dataset": "", "temperature": 0.1, "scales": len(features), "weights": weights}
    loss = loss_file.DenseContrastiveLossV2_ms({**config, "cross_scale_contrast": len(features) > 1})
    # Their data loader gives the ignored pixels the number after the last class.
    remapped = torch.where((labels < 0) | (labels >= num_classes) | (labels == ignore_index), num_classes, labels)
    return lambda: loss(remapped, features), f"{len(features)} layers, predictions unused"


def reverse_contrast(root, features, labels, logits, num_classes, ignore_index):
    """tau 1, weight 1.3, 100 pixels a pair, pairs of at most 199 errors, as in their only config."""
    register = types.SimpleNamespace(register_module=lambda: lambda cls: cls)
    folder = root / "mmseg" / "models"
    absent = [name for name in ("mmcv", "torchvision", "ipdb") if importlib.util.find_spec(name) is None]
    stand_ins = [StandIn(name) for name in absent]
    stand_ins += [StandIn("mmcv.utils")] if "mmcv" in absent else []
    stand_ins += [StandIn("mmseg", root / "mmseg"), StandIn("mmseg.utils"), StandIn("mmseg.models", folder)]
    stand_ins += [StandIn("mmseg.models.builder", LOSSES=register), StandIn("mmseg.models.losses", folder / "losses")]
    with imports_from(root, *stand_ins, StandIn("mmseg.models.losses.utils")):
        loss_file = importlib.import_module("mmseg.models.losses.reverse_contrastive_loss")
    settings = {"patch_size": 100, "temp": 1, "loss_weight": 1.3, "cal_function": "EQUAL", "cal_gate": [0, 199]}
    loss = loss_file.ReverseContrastiveLoss(**settings)
    x = features[min(1, len(features) - 1)]
    seg = nearest(logits, x)
    return lambda: loss(seg, labels[:, None], con_seg_logit=x), "1 layer"


def region_contrast(root, features, labels, logits, num_classes, ignore_index):
    """tau 0.2, queues of 2975, as in experiments/decoder_contrast/config.yaml."""
    folder = root / "pyseg"
    with imports_from(root, StandIn("pyseg", folder), StandIn("pyseg.models", folder / "models")):
        decoder_file = importlib.import_module("pyseg.models.decoder_contrast")
    x = features[min(1, len(features) - 1)]
    decoder = decoder_file.dec_deeplabv3_contrast(8, num_classes)
    decoder.aspp, decoder.head, decoder.final = nn.Identity(), nn.Identity(), Given(nearest(logits, x))
    decoder.to(x.device)

    def call():
        # The queues keep the graph of every step. They are detached, so that the time does not grow from step to step.
        for name, queue in decoder.named_buffers():
            decoder._buffers[name] = queue.detach()
        return decoder(x)[1]

    return call, "1 layer, labels unused; 19 classes and 256 channels are written into its code"


class Given(nn.Module):
    def __init__(self, value: Tensor):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


def nearest(logits: Tensor, x: Tensor) -> Tensor:
    """The relatives' networks give logits of the features' size."""
    return logits.detach() if logits.shape[2:] == x.shape[2:] else F.interpolate(logits.detach(), x.shape[2:])


RELATIVES = {
    "ContrastiveSeg": pixel_contrast,
    "MS_CS_ContrSeg": multi_scale,
    "PNE_Loss": reverse_contrast,
    "RegionContrast": region_contrast,
}


def official(
    name: str,
    folder: pathlib.Path | None,
    features: Sequence[Tensor],
    labels: Tensor,
    logits: Tensor,
    ignore_index: int = 255,
) -> tuple[Callable[[], Tensor], str]:
    """The call of a relative's published loss on one batch, and a note on what it computes. The call returns a scalar
    attached to the autograd graph. It samples with torch's CPU generator, so seed that generator to repeat a call.

    Args:
        name: one of RELATIVES.
        folder: has the checkout. Absent is raised if it has none.
        features, labels, logits: layers from high to low resolution; (B, H, W); (B, N, H', W').
    """
    root = folder / name if folder else None
    if root is None or not root.is_dir():
        raise Absent(f"no checkout {name} in a folder given with --peers or CONTEXTRAST_PEERS")
    with quiet():
        call, note = RELATIVES[name](root.resolve(), list(features), labels, logits, logits.shape[1], ignore_index)

    def on_device():
        with cuda_means(features[0].device):
            return call()

    return on_device, note


def ours(name: str, features: Sequence[Tensor], labels: Tensor, logits: Tensor) -> Callable[[], Tensor]:
    """The call of the same relative by this package, with the settings of the official code."""
    N, D = logits.shape[1], features[0].shape[1]
    layer = min(1, len(features) - 1)
    loss = {
        "ContrastiveSeg": lambda: ck.PixelContrastLoss(N),
        "MS_CS_ContrSeg": lambda: ck.MultiScaleContrastLoss(N),
        "PNE_Loss": lambda: ck.PNELoss(N, layer=layer),
        "RegionContrast": lambda: ck.RegionContrastLoss(N, ck.MemoryBank(N, D, pixels=0, regions=2975), layer=layer),
    }[name]()
    loss.to(features[0].device)
    return lambda: loss(features, labels, logits)


def failure(error: BaseException) -> str:
    """One line for the results' table."""
    text = str(error).strip()
    return f"failed: {type(error).__name__}: {text.splitlines()[0]}" if text else f"failed: {type(error).__name__}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of old code about newer libraries."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def module(name: str) -> tuple[Any, str]:
    """A module, or None and the reason."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} is not installed ({error})"
