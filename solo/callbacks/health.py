"""Early signs of a run that learns nothing, and the end of one that is no longer finite."""

import logging
import math
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from solo.batch import Batch
from solo.dist import all_reduce, end_together, rank, world_size
from solo.errors import NumericsError

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class HealthConfig:
    """Checks every ``every`` optimizer steps; a sign must show ``patience`` times in a row before it is told.

    ``min_std``: feature std relative to features spread evenly over the sphere (1). ``min_rank``: effective rank.
    ``plateau``: relative distance of a loss from ln K that counts as chance.
    """

    enabled: bool = True
    every: int = 50
    patience: int = 5
    min_std: float = 0.01
    min_rank: float = 1.5
    plateau: float = 0.01
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least 1, got {value}" for name, value in
                    (("every", self.every), ("patience", self.patience)) if value < 1]
        problems += [f"{name} must not be negative, got {value}" for name, value in
                     (("min_std", self.min_std), ("min_rank", self.min_rank), ("plateau", self.plateau)) if value < 0]
        if problems:
            raise ValueError("\n".join(problems))


_WARNINGS = {
    "collapse": "the features of all images are nearly the same (std {value:.2g} of what evenly spread features have): the "
                "method has collapsed. Likely causes: optimizer.lr too high, a predictor or BatchNorm left out, momentum 1",
    "rank": "the features vary in about {value:.1f} directions only: dimensional collapse. Likely causes: optimizer.lr or "
            "weight_decay too high, augmentations too strong, a loss term with weight 0",
    "plateau": "{name} stays at ln {k} = {value:.2f}, which is chance: nothing is learned. Likely causes: optimizer.lr too low "
               "or too high, a temperature too high, both views unrelated, the backbone frozen",
}


class FiniteGuard(Callback):
    """Ends a run on all ranks at the first non-finite loss or gradient, before its weights change.

    Raises:
        NumericsError: naming the step, counted from 1 as the loggers count.
    """

    _bad: Tensor | None = None

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        loss_bad = self._bad if self._bad is not None else torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._bad = None
        gradient_bad = torch.zeros_like(loss_bad)
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # a scaler expects overflows and skips them
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradient_bad = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients)).reshape(loss_bad.shape)
        found = all_reduce(torch.stack([loss_bad, gradient_bad]).float()).tolist()  # the one host sync of a step
        if any(found):
            what, step = "loss" if found[0] else "gradient", trainer.global_step
            end_together(NumericsError(
                f"non-finite {what} at step {step + 1} (epoch {trainer.current_epoch + 1}): "
                f"stopped before the update, so the weights are those of step {step}; "
                "lower optimizer.lr, lengthen scheduler.warmup_epochs, or set precision=32-true"
            ))


class Health(FiniteGuard):
    """Measures collapse and chance, and warns once per kind in plain words; and what `FiniteGuard` does.

    Attributes:
        step_scalars: ``feature_std`` (1 = spread evenly over the sphere, 0 = one point) and ``effective_rank`` of the
            last train batch, where it was measured.
    """

    def __init__(self, config: HealthConfig | None = None) -> None:
        self.config = config or HealthConfig()
        self.step_scalars: dict[str, Tensor] = {}
        self._signs: dict[str, int] = {}
        self._told: set[str] = set()
        self._checked = -1

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.step_scalars = {}
        step = trainer.global_step
        if step % self.config.every or step == self._checked:
            return
        self._checked = step
        feats = outputs["feats"][: len(batch.labels)].detach().float()                              # [B, D]
        std, directions = feature_std(feats), effective_rank(feats)
        self.step_scalars = {"feature_std": std, "effective_rank": directions}
        losses = {name: value.detach().float().reshape(()) for name, value in outputs.items()
                  if name.endswith("loss") and isinstance(value, Tensor) and value.numel() == 1}
        losses["loss"] = losses["loss"] * trainer.accumulate_grad_batches
        means = (all_reduce(torch.stack([std, directions, *losses.values()])) / world_size()).tolist()
        self._sign("collapse", means[0] < self.config.min_std, value=means[0])
        self._sign("rank", means[1] < self.config.min_rank <= min(feats.shape), value=means[1])
        k = len(batch.labels) * world_size()
        chance = math.log(k) if k > 1 else math.nan
        for name, value in zip(losses, means[2:], strict=True):
            self._sign("plateau", abs(value - chance) < self.config.plateau * chance, name, name=name, k=k, value=chance)

    def _sign(self, kind: str, shown: bool, suffix: str = "", **facts: Any) -> None:
        key = kind + suffix
        self._signs[key] = self._signs.get(key, 0) + 1 if shown else 0
        if self._signs[key] < self.config.patience or kind in self._told:
            return
        self._told.add(kind)
        text = _WARNINGS[kind].format(**facts)
        if self.config.stop_on_collapse and kind != "plateau":
            end_together(NumericsError(f"{text} (health.stop_on_collapse)"))
        if rank() == 0:
            log.warning("%s", text)


def feature_std(feats: Tensor) -> Tensor:
    """Spread of L2-normalised rows: mean per-dimension std times sqrt(D), so 1 on the whole sphere and 0 at one point.

    Args:
        feats: [N, D].
    """
    return F.normalize(feats, dim=-1).std(dim=0, correction=0).mean() * math.sqrt(feats.shape[1])


def effective_rank(feats: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of centred L2-normalised rows (Roy and Vetterli 2007).

    Args:
        feats: [N, D]; the first 1024 rows are used.

    Returns:
        Between 1 and min(N, D).
    """
    rows = F.normalize(feats[:1024], dim=-1)
    values = torch.linalg.svdvals(rows - rows.mean(0))
    return torch.special.entr(values / values.sum().clamp(min=1e-12)).sum().exp()
