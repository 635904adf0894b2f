"""Contextrast for MMSegmentation 1.x: a decode head that adds the contrastive loss of the backbone's stages.

    custom_imports = dict(imports=["contextrast_kernels.mmseg"])
    model = dict(
        type="EncoderDecoder",
        backbone=...,
        decode_head=dict(
            type="ContextrastHead",
            head=dict(type="ASPPHead", in_channels=2048, in_index=3, channels=512, num_classes=19, ...),
            in_channels=[256, 512, 1024, 2048],
        ),
    )

Only this module of the package imports mmseg.
"""

from collections.abc import Callable, Sequence

import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from contextrast_kernels import checks
from contextrast_kernels.modules import ContextrastLoss, ProjectionHead


@MODELS.register_module()
def ContextrastHead(  # a type's name in a config
    head: dict,
    in_channels: Sequence[int],
    in_index: Sequence[int] | None = None,
    weight: float = 0.1,
    dim: int = 256,
    **contrast,
) -> BaseDecodeHead:
    """Builds the decode head of a config and adds Contextrast to its training loss.

    The result is a subclass of the head's class: the same parameters by the same names, so that checkpoints of the
    plain head load, and the same predictions. In training ``loss_contrast`` (weight · L_PA) appears in the log.

    Args:
        head: the config of a head that computes its loss as ``BaseDecodeHead.loss`` does, such as FCN, ASPP or UPer.
        in_channels: channels of the backbone's stages to contrast, from high to low resolution.
        in_index: the indices of these stages in the backbone's output. None: the first ones.
        weight: α of Eq. 5.
        dim: D of the projected features.
        **contrast: options of ``ContextrastLoss``; num_classes and ignore_index are the head's.

    Raises:
        TypeError, ValueError: the head overrides the loss of BaseDecodeHead, the stages do not fit, or an option cannot
            be used.
    """
    if not isinstance(head, dict) or "type" not in head:
        raise TypeError(
            f"head: expected the config of a decode head, dict(type=...), got {checks.describe(head)}. "
            "Pass the config that decode_head had before."
        )
    settings = dict(head)
    kind = settings.pop("type")
    base = MODELS.get(kind) if isinstance(kind, str) else kind
    if not isinstance(base, type) or getattr(base, "loss", None) is not BaseDecodeHead.loss:
        raise TypeError(
            f"head: expected a decode head that computes its loss as BaseDecodeHead does, got {kind!r}. "
            "Use one such as FCNHead, ASPPHead, UPerHead or SegformerHead."
        )
    built = type(f"Contextrast{base.__name__}", (_WithContrast, base), {})(**settings)
    built.add_contrast(in_channels, range(len(in_channels)) if in_index is None else in_index, weight, dim, contrast)
    return built


class _WithContrast:
    """A mixin that goes before a decode head's class."""

    num_classes: int
    ignore_index: int
    forward: Callable
    loss_by_feat: Callable

    def add_contrast(self, in_channels, in_index, weight, dim, options) -> None:
        checks.real("weight", weight, low=0.0)
        if len(in_index) != len(in_channels):
            raise ValueError(
                f"in_index: expected {len(in_channels)} indices, one for each of in_channels, got {list(in_index)}. "
                "Set both for the same stages."
            )
        self.contrast_index = list(in_index)
        self.contrast_weight = weight
        self.contrast_heads = nn.ModuleList(ProjectionHead(channels, dim) for channels in in_channels)
        self.contrast = ContextrastLoss(self.num_classes, ignore_index=self.ignore_index, **options)

    def loss(self, inputs: tuple[Tensor, ...], batch_data_samples: list, train_cfg) -> dict[str, Tensor]:
        logits = self.forward(inputs)
        losses = self.loss_by_feat(logits, batch_data_samples)
        embeddings = [project(inputs[i]) for project, i in zip(self.contrast_heads, self.contrast_index)]
        labels = torch.stack([sample.gt_sem_seg.data for sample in batch_data_samples])
        losses["loss_contrast"] = self.contrast_weight * self.contrast(embeddings, labels, logits)
        return losses
