"""A linear classifier on the backbone's features while they are learned, without touching them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from solo.batch import Batch
from solo.dist import all_reduce, sum_later, world_size
from solo.schedules import cosine


@dataclass(kw_only=True)
class ProbeConfig:
    """Online linear probe; its rate is ``optimizer.classifier_lr``."""

    enabled: bool = True
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


class OnlineProbe(Callback):
    """Trains a linear head on detached float32 ``outputs["feats"]`` after every batch.

    It has its own weights, SGD and generator, so the backbone is bit-identical with or without it. Under several
    ranks the gradient is the one of the joined batch, so the heads stay equal.

    Args:
        dim: width of the features.
        num_classes: classes of the dataset.
        lr: rate at the start, already scaled with the global batch; a cosine takes it to 0 over the run.
        config: momentum and weight decay.

    Attributes:
        head: the classifier.
        step_scalars: ``probe_loss`` and ``probe_acc1`` (percent) of the last train batch, on the device.
    """

    def __init__(self, dim: int, num_classes: int, lr: float, config: ProbeConfig | None = None) -> None:
        config = config or ProbeConfig()
        self.lr = lr
        self._labels = torch.empty(0)
        self._sum: Callable[[], Tensor] | None = None
        self.head = nn.utils.skip_init(nn.Linear, dim, num_classes)
        bound, generator = 1 / math.sqrt(dim), torch.Generator().manual_seed(0)
        for p in self.head.parameters():
            nn.init.uniform_(p, -bound, bound, generator=generator)
        self.optimizer = torch.optim.SGD(
            self.head.parameters(), lr=lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.buffers = [torch.zeros_like(p) for p in self.head.parameters()]
        self._attach_buffers()
        self.step_scalars: dict[str, Tensor] = {}
        self._hits = torch.zeros(3)

    def _attach_buffers(self) -> None:
        for p, buffer in zip(self.head.parameters(), self.buffers, strict=True):
            self.optimizer.state[p]["momentum_buffer"] = buffer

    def state_dict(self) -> dict[str, Tensor]:
        parameters = {f"head.{name}": p.detach() for name, p in self.head.named_parameters()}
        momenta = {f"momentum.{name}": b for (name, _), b in zip(self.head.named_parameters(), self.buffers, strict=True)}
        return {name: tensor.clone() for name, tensor in {**parameters, **momenta}.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for (name, p), buffer in zip(self.head.named_parameters(), self.buffers, strict=True):
            p.copy_(state_dict[f"head.{name}"])
            buffer.copy_(state_dict[f"momentum.{name}"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.head.to(pl_module.device)
        self.buffers = [buffer.to(pl_module.device) for buffer in self.buffers]
        self._attach_buffers()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._total_steps = trainer.estimated_stepping_batches

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Batch, batch_idx: int) -> None:
        self._labels, self._sum = batch.labels, None
        pl_module.feats = torch.empty(0)        # of this batch there are none yet

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        feats: Any = pl_module.feats
        if world_size() > 1 and self._sum is None and len(feats):
            self._sum = sum_later(self._packed(*_rows(feats, self._labels)))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        lr = cosine(max(trainer.global_step - 1, 0) / self._total_steps, self.lr, 0.0)
        if self._sum is None:           # of one process, or of a method whose `training_step` is its own
            self.step_scalars = self.update(*_rows(outputs["feats"], batch.labels), lr)
        else:
            self.step_scalars = self._step(self._sum(), lr)

    def update(self, feats: Tensor, labels: Tensor, lr: float) -> dict[str, Tensor]:
        """One SGD step on the mean cross-entropy of all ranks' labelled rows.

        Args:
            feats: [N, D].
            labels: [N], -1 is left out.
            lr: rate of this step.

        Returns:
            ``probe_loss`` and ``probe_acc1`` in percent, NaN without a label; no host sync.
        """
        return self._step(all_reduce(self._packed(feats, labels)), lr)

    def _packed(self, feats: Tensor, labels: Tensor) -> Tensor:
        """Summed over this rank's labelled rows: the gradient, then cross-entropy, hits and 1."""
        with torch.enable_grad():
            logits = self.head(feats)                                                               # [N, C]
            loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            gradients = torch.autograd.grad(loss, list(self.head.parameters()))
        right = (logits.argmax(1) == labels).sum()
        return torch.cat([g.flatten() for g in gradients] + [torch.stack([loss.detach(), right, (labels >= 0).sum()])])

    def _step(self, packed: Tensor, lr: float) -> dict[str, Tensor]:
        rows, parameters = packed[-1], list(self.head.parameters())
        parts = (packed[:-3] / rows.clamp(min=1)).split([p.numel() for p in parameters])
        for p, part in zip(parameters, parts, strict=True):
            p.grad = part.view_as(p)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return {"probe_loss": packed[-3] / rows, "probe_acc1": 100 * packed[-2] / rows}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._hits = torch.zeros(3, device=pl_module.device)

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        logits, labels = self.head(outputs["feats"].float()), outputs["labels"]                     # [B, C], [B]
        right = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]                     # [B, 5]
        self._hits += torch.stack([right[:, 0].sum(), right.sum(), (labels >= 0).sum()])

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        first, five, rows = all_reduce(self._hits).tolist()
        if rows and not trainer.sanity_checking:
            metrics = {"val/probe_acc1": 100 * first / rows, "val/probe_acc5": 100 * five / rows}
            pl_module.log_dict(metrics, batch_size=1, sync_dist=True)


def _rows(feats: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features of all views [V * B, D] in float32, and a label for each, of those of the images [B]."""
    return feats.detach().float(), labels.repeat(len(feats) // len(labels))
