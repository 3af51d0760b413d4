"""A method, images and a data module small enough to train in a blink."""

from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from solo.batch import Batch

CLASSES, ROWS, BATCH = 3, 48, 8


def batches(views: int = 2) -> list[Batch]:
    """Noisy views of one of three patterns; every seventh image has no label."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randn(CLASSES, 1, 4, 4, generator=generator)
    labels = torch.arange(ROWS) % CLASSES
    copies = [patterns[labels] + 0.3 * torch.randn(ROWS, 1, 4, 4, generator=generator) for _ in range(views)]
    labels = torch.where(torch.arange(ROWS) % 7 == 6, -1, labels)
    parts = [slice(i, i + BATCH) for i in range(0, ROWS, BATCH)]
    return [Batch([copy[p] for copy in copies], labels[p], torch.arange(ROWS)[p]) for p in parts]


class ToyData(pl.LightningDataModule):
    def train_dataloader(self) -> DataLoader:
        return DataLoader(batches(), batch_size=None, shuffle=False)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(batches(views=1), batch_size=None, shuffle=False)

    def clean_loader(self, train: bool, batch_size: int | None = None, limit: int | None = None) -> Iterator[Batch]:
        return iter(batches(views=1))


class ToyBackbone(nn.Sequential):
    num_features = 6

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 6))


class Toy(pl.LightningModule):
    """Pulls two views together and the batch apart; consumes the global generator as dropout would."""

    def __init__(self, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ToyBackbone()
        self.poison_at = poison_at

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        f1, f2 = (self.backbone(view + 0.01 * torch.randn_like(view)) for view in batch.views)
        loss = (f1 - f2).square().mean() - 0.1 * f1.std(0).mean()
        if self.poison_at is not None and self.global_step == self.poison_at:
            loss = loss * float("nan")
        return {"loss": loss, "feats": torch.cat([f1, f2]).detach(), "spread": f1.std().detach()}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"feats": self.backbone(batch.views[0]), "labels": batch.labels}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def fit(callbacks: list[pl.Callback], module: Toy | None = None, **kwargs: object) -> tuple[Toy, pl.Trainer]:
    """Train on the CPU with nothing but ``callbacks``."""
    module = module or Toy()
    quiet = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False)
    if not any(isinstance(callback, pl.callbacks.ProgressBar) for callback in callbacks):
        quiet["enable_progress_bar"] = False
    trainer = pl.Trainer(callbacks=callbacks, **{"max_epochs": 2, "num_sanity_val_steps": 0, **quiet, **kwargs})
    trainer.fit(module, datamodule=ToyData())
    return module, trainer
