"""k-nearest-neighbour accuracy while a method trains: the number `solo.eval.knn` gives offline."""

import logging
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor

from solo.batch import Batch
from solo.callbacks.signals import heeding
from solo.dist import all_reduce
from solo.eval.features import Features, extract
from solo.eval.knn import Distance, Vote, knn_hits, percent

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class KNNConfig:
    """k-NN on clean images every ``every`` epochs and after the last; ``max_train`` bounds the bank (null: all)."""

    enabled: bool = True
    every: int = 1
    k: list[int] = field(default_factory=lambda: [20])
    temperature: float = 0.07
    distance: Distance = "cosine"
    max_train: int | None = 50_000

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least 1, got {value}" for name, value in
                    (("every", self.every), ("max_train", self.max_train), *(("k", k) for k in self.k))
                    if value is not None and value < 1]
        if not self.k:
            problems.append("k must list at least one number of neighbours")
        if self.enabled and self.max_train is not None and (many := [k for k in self.k if k > self.max_train]):
            problems.append(f"k={many} is more than max_train={self.max_train}")
        if self.temperature <= 0:
            problems.append(f"temperature must be positive, got {self.temperature}")
        if problems:
            raise ValueError("\n".join(problems))


class KNNCallback(Callback):
    """Logs ``val/knn@<k>``, top-1 percent of the validation images, voted by clean train images.

    The bank comes from ``trainer.datamodule.clean_loader(train=True, limit=max_train)``, the queries from what
    ``validation_step`` returns. Each rank classifies its own queries against the whole bank.

    Args:
        num_classes: classes of the dataset.
        config: when and how.
    """

    def __init__(self, num_classes: int, config: KNNConfig | None = None) -> None:
        self.num_classes = num_classes
        self.config = config or KNNConfig()
        self._possible = True
        self._active = False
        self._feats: list[Tensor] = []
        self._labels: list[Tensor] = []

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        due = epoch % self.config.every == 0 or epoch == trainer.max_epochs
        self._active = self._possible and due and not trainer.sanity_checking
        self._feats, self._labels = [], []

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._active:
            self._feats.append(outputs["feats"].detach().float())
            self._labels.append(outputs["labels"])

    @torch.no_grad()
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._active:
            return
        queries = Features(torch.cat(self._feats), torch.cat(self._labels)) if self._feats else None      # no image here
        self._feats, self._labels = [], []
        loader = trainer.datamodule.clean_loader(train=True, limit=self.config.max_train)  # type: ignore[attr-defined]
        with trainer.precision_plugin.forward_context():
            bank = extract(pl_module.backbone, heeding(trainer, loader), pl_module.device)  # type: ignore[arg-type]
        if not len(bank.labelled().labels):
            self._give_up(trainer, "train")
            return
        votes = [Vote(k=k, temperature=self.config.temperature, distance=self.config.distance) for k in self.config.k]
        hits = (torch.zeros(len(votes), 3, dtype=torch.long) if queries is None else
                knn_hits(bank.to(pl_module.device), queries, self.num_classes, votes))
        hits = all_reduce(hits.to(pl_module.device))
        if not hits[0, 2]:
            self._give_up(trainer, "validation")
            return
        metrics = {f"val/knn@{vote.k}": percent(row)["acc1"] for vote, row in zip(votes, hits, strict=True)}
        pl_module.log_dict(metrics, batch_size=1, sync_dist=True)

    def _give_up(self, trainer: pl.Trainer, part: str) -> None:
        self._possible = False
        if trainer.is_global_zero:
            log.warning("k-NN is left out: no %s image has a label", part)
