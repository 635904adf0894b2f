"""Contextrast in a LightningModule. Needs `pip install lightning`.

python examples/lightning_module.py
"""

import lightning
import torch
from torch.utils.data import DataLoader
from toy import NUM_CLASSES, Network, Scenes

import contextrast_kernels as ck


class Segmenter(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Network()
        # In the constructor: the optimizer and every strategy then see the heads as part of the model.
        ck.attach(self.model)
        self.criterion = ck.ContextrastCriterion(NUM_CLASSES)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, index):
        images, labels = batch
        logits = self(images)
        loss = self.criterion(self.model.contextrast_heads.features(), labels, logits)
        self.log_dict({"loss": loss, **{name: self.criterion.last[name] for name in ("cross_entropy", "contrast")}})
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(**options) -> lightning.Trainer:
    trainer = lightning.Trainer(**{"max_epochs": 1, "log_every_n_steps": 10, **options})
    trainer.fit(Segmenter(), DataLoader(Scenes(400), batch_size=8))
    return trainer


if __name__ == "__main__":
    main()
