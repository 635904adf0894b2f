"""Contextrast in nnU-Net: a trainer that adds the loss on the encoder's stages to nnU-Net's Dice and cross-entropy.

export nnUNet_extTrainer=examples   # the folder of this file
nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerContextrast
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

import contextrast_kernels as ck


class WithContrast(nn.Module):
    """nnU-Net's loss, plus alpha times the contrastive loss while the network is in training mode."""

    def __init__(self, loss: nn.Module, contrast: ck.ContextrastLoss, network: nn.Module, alpha: float):
        super().__init__()
        self.loss, self.contrast, self.alpha = loss, contrast, alpha
        self.of_network = [network]  # in a list, so that the loss does not own the network's parameters

    def forward(self, output, target) -> Tensor:
        loss = self.loss(output, target)
        (network,) = self.of_network
        if not network.training:
            return loss
        logits, labels = (x[0] if isinstance(x, list | tuple) else x for x in (output, target))  # deep supervision
        features = network.contextrast_heads.features()
        return loss + self.alpha * self.contrast(features, labels[:, 0].long(), logits)


class nnUNetTrainerContextrast(nnUNetTrainer):
    alpha = 0.1
    weights = (1.0, 0.7, 0.4, 0.1)  # one for each tapped stage, from high to low resolution

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """nnU-Net calls this for inference too, so that checkpoints and networks have the same parameters."""
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
        )
        patch = torch.zeros(1, num_input_channels, *configuration_manager.patch_size)
        ck.attach(network, example_input=patch, dim=128)
        return network

    def _build_loss(self) -> nn.Module:
        if self.label_manager.has_regions:
            raise ValueError("labels: overlapping regions are not supported. Train on classes instead.")
        network = self.network.module if self.is_ddp else self.network
        network = getattr(network, "_orig_mod", network)  # below torch.compile
        ignored = self.label_manager.ignore_label
        contrast = ck.ContextrastLoss(
            self.label_manager.num_segmentation_heads,
            layer_weights=self.weights[: len(network.contextrast_heads.layers)],
            ignore_index=255 if ignored is None else ignored,
            sampling=tuple(self.configuration_manager.spacing),
            group=torch.distributed.group.WORLD if self.is_ddp else None,
        )
        return WithContrast(super()._build_loss(), contrast.to(self.device), network, self.alpha)
