"""Contextrast with the Trainer of transformers: SegFormer. Needs `pip install transformers accelerate`.

python examples/transformers_trainer.py
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from toy import NUM_CLASSES, Scenes
from transformers import SegformerConfig, SegformerForSemanticSegmentation, Trainer, TrainingArguments

import contextrast_kernels as ck


class WithContrast(nn.Module):
    """A segmentation model and its objective: Trainer calls it and reads "loss" from its output.

    The loss is computed inside forward, and therefore inside DDP, which Trainer wraps around the model with
    find_unused_parameters=True; the projection heads would look unused if the loss came later.
    """

    def __init__(self, model: nn.Module, num_classes: int):
        super().__init__()
        self.model = model
        ck.attach(model)
        self.criterion = ck.ContextrastCriterion(num_classes)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.model(pixel_values=pixel_values).logits
        logits = interpolate(logits, pixel_values.shape[-2:], mode="bilinear")
        outputs = {"logits": logits}
        if labels is not None and self.training:
            outputs["loss"] = self.criterion(self.model.contextrast_heads.features(), labels, logits)
        elif labels is not None:
            outputs["loss"] = cross_entropy(logits, labels, ignore_index=255)
        return outputs


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def main(**options) -> Trainer:
    """A small SegFormer from scratch; with pretrained weights, load them before WithContrast."""
    config = SegformerConfig(
        num_labels=NUM_CLASSES,
        depths=[1, 1, 1, 1],
        hidden_sizes=[16, 32, 48, 64],
        num_attention_heads=[1, 2, 3, 4],
        decoder_hidden_size=32,
    )
    settings = {"output_dir": "segformer_out", "learning_rate": 1e-3, "per_device_train_batch_size": 8, "max_steps": 50}
    trainer = Trainer(
        WithContrast(SegformerForSemanticSegmentation(config), NUM_CLASSES),
        TrainingArguments(**{**settings, **options}),
        data_collator=collate,
        train_dataset=Scenes(400),
        eval_dataset=Scenes(16),
    )
    trainer.train()
    trainer.model.model.contextrast_heads.detach()  # then trainer.model.model.save_pretrained(...)
    return trainer


if __name__ == "__main__":
    main()
