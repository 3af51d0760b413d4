"""Early signs of a run that learns nothing, and the end of one that is no longer finite."""

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from solo.agreement import Agreement
from solo.batch import Batch
from solo.callbacks.failed import not_finite
from solo.callbacks.signs import WORDS, Motion, effective_rank, feature_std, jump, of_modules
from solo.dist import all_reduce, end_together, rank, world_size
from solo.errors import NumericsError
from solo.nn import Queue

log = logging.getLogger(__name__)
_FIRST = 0.5        # seconds that rank 0 has to be the one who speaks


@dataclass(kw_only=True)
class HealthConfig:
    """Checks every ``every`` optimizer steps; a sign must show ``patience`` times in a row before it is told.

    ``min_std``: feature std relative to features spread evenly over the sphere (1). ``min_rank``: effective rank.
    ``plateau``: relative distance of a loss from ln K that counts as chance. ``max_distance``: of the teacher's weights from
    the student's, relative to the student's length. ``max_own``: share of images that find themselves in a queue.
    ``spike``: times the median of the 100 batches before, told once and at once. ``stop_on_collapse``: a sign ends the run;
    a spike does not.
    """

    enabled: bool = True
    every: int = 50
    patience: int = 5
    min_std: float = 0.01
    min_rank: float = 1.5
    plateau: float = 0.01
    max_distance: float = 1.0
    max_own: float = 0.1
    spike: float = 5.0
    stop_on_collapse: bool = False

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least 1, got {value}" for name, value in
                    (("every", self.every), ("patience", self.patience)) if value < 1]
        problems += [f"{name} must not be negative, got {value}" for name, value in
                     (("min_std", self.min_std), ("min_rank", self.min_rank), ("plateau", self.plateau),
                      ("max_distance", self.max_distance), ("max_own", self.max_own)) if value < 0]
        problems += [f"{name} is a share of 1, got {value}" for name, value in
                     (("min_std", self.min_std), ("max_own", self.max_own)) if value > 1]
        problems += ["stop_on_collapse needs enabled=true"] * (self.stop_on_collapse and not self.enabled)
        problems += [f"spike must be above 1, got {self.spike}"] * (self.spike <= 1)
        if problems:
            raise ValueError("\n".join(problems))


class FiniteGuard(Callback):
    """Ends a run on all ranks at the first non-finite loss or gradient, before its weights change.

    Args:
        agreement: what else the ranks tell each other at the same time.

    Raises:
        NumericsError: naming method, step (counted from 1 as the loggers count), rate and tensors; these are rank 0's, but
            where only another rank's gradient is broken, behind DDP's sum.
    """

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.agreement = agreement or Agreement()
        self._bad: Tensor | None = None
        self._reduced = False
        self._batch: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad
        self._reduced = isinstance(trainer.model, DistributedDataParallel) and pl_module.automatic_optimization
        if self._reduced:
            self.agreement.send(loss=self._bad)     # DDP will give all ranks one gradient, of which they need not tell

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer) -> None:
        loss_bad = self._bad if self._bad is not None else torch.zeros((), dtype=torch.bool, device=pl_module.device)
        self._bad = None
        gradient_bad = torch.zeros_like(loss_bad)
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # a scaler expects overflows and skips them
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            gradient_bad = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients)).reshape(loss_bad.shape)
        found = self.agreement.reach(loss=loss_bad, gradient=gradient_bad)         # the one host sync of a step
        if what := next((what for what in ("loss", "gradient") if any(found[what])), ""):
            step = trainer.global_step
            names = not_finite(self._batch, pl_module)
            tensors = ", ".join(names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
            tensors = tensors or f"the {'norm of the ' * (what == 'gradient')}{what} alone"
            error = NumericsError(
                f"non-finite {what} of {type(pl_module).__name__} at step {step + 1} (epoch {trainer.current_epoch + 1}, "
                f"lr {optimizer.param_groups[0]['lr']:.3g}; not finite: {tensors}): "
                f"stopped before the update, so the weights are those of step {step}; "
                "lower optimizer.lr, lengthen scheduler.warmup_epochs, or set precision=32-true"
            )
            if what == "gradient" and self._reduced and rank():
                time.sleep(_FIRST)          # rank 0 has found the same, but for what broke the gradient behind DDP's sum
                raise error
            end_together(error)
        self._batch = None


_WINDOW = 100       # batches that a loss is compared with


class Health(FiniteGuard):
    """Measures collapse, chance and what stands still, and warns once of each in plain words; and what `FiniteGuard` does.

    Attributes:
        step_scalars: ``feature_std`` (1 = spread evenly over the sphere, 0 = one point) and ``effective_rank`` of the
            last train batch, ``teacher_distance`` and ``own_neighbours`` (`solo.callbacks.signs`), where they were measured.
    """

    def __init__(self, config: HealthConfig | None = None, agreement: Agreement | None = None) -> None:
        super().__init__(agreement)
        self.config = config or HealthConfig()
        self.step_scalars: dict[str, Tensor] = {}
        self._signs: dict[str, int] = {}
        self._told: set[str] = set()
        self._checked = -1
        self._motion = Motion()
        self._losses: deque[Tensor] = deque()
        self._fresh = 0             # losses since the last check

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._half = trainer.estimated_stepping_batches / 2

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        self.step_scalars = {}
        self._losses.append(outputs["loss"].detach().float().reshape(()))
        self._fresh += 1
        step = trainer.global_step
        if step % self.config.every or step == self._checked:
            return
        self._checked = step
        feats = outputs["feats"][: len(batch.labels)].detach().float()                              # [B, D]
        self.step_scalars = {"feature_std": feature_std(feats), "effective_rank": effective_rank(feats)}
        self.step_scalars |= of_modules(pl_module)
        losses = {name: value.detach().float().reshape(()) for name, value in outputs.items()
                  if name.endswith("loss") and isinstance(value, Tensor) and value.numel() == 1}
        losses["loss"] = losses["loss"] * trainer.accumulate_grad_batches
        moved = self._motion.of(pl_module)
        measured = {**self.step_scalars, **moved}
        values = torch.stack([*measured.values(), *losses.values(), *self._losses])
        means = iter((all_reduce(values) / world_size()).tolist())                                  # the one host sync
        self._judge({name: next(means) for name in measured}, full_rank=min(feats.shape), early=step < self._half)
        self._judge_losses({name: next(means) for name in losses}, pl_module, batch)
        self._judge_jump(list(means), trainer)

    def _judge(self, facts: dict[str, float], full_rank: int, early: bool) -> None:
        """Signs of features and weights; at the end of a run rates and 1 - tau go to 0, and all stands still."""
        config, std, rank = self.config, facts["feature_std"], facts["effective_rank"]
        self._sign("collapse", std < config.min_std, value=std)
        self._sign("rank", rank < config.min_rank <= full_rank, value=rank)
        still = early and facts["backbone moved"] == 0
        self._sign("still backbone", still)
        for fact, value in facts.items():
            what, _, name = fact.partition("/")
            if what == "own_neighbours":
                self._sign("own", value > config.max_own, name, who=f"the queue {name}".strip(), value=value)
            if what == "teacher_distance":
                who = f"the teacher {name}".strip()
                stands = early and not still and value > 0 and facts[fact.replace("teacher_distance", "teacher moved")] == 0
                self._sign("copy", value == 0, name, who=who)
                self._sign("far", value > config.max_distance, name, who=who, value=value)
                self._sign("still teacher", stands, name, who=who)

    def _judge_losses(self, losses: dict[str, float], pl_module: pl.LightningModule, batch: Batch) -> None:
        """Chance is ln K of the K rows that one is to be told from: a batch's, all other views', or a queue's."""
        images = len(batch.labels) * world_size()
        rows = {images, images * len(batch.views) - 1}
        rows |= {len(queue.keys) + 1 for queue in pl_module.modules() if isinstance(queue, Queue)}
        for name, value in losses.items():
            k = min(rows - {0, 1} or {1}, key=lambda k: abs(value - math.log(k)))
            chance = math.log(k)
            self._sign("plateau", abs(value - chance) < self.config.plateau * chance, name, name=name, k=k, value=chance)

    def _judge_jump(self, losses: list[float], trainer: pl.Trainer) -> None:
        window = min(_WINDOW, len(losses) - self._fresh)        # a young run knows fewer
        place, factor, middle = jump(losses, max(window, _WINDOW // 5))
        if factor > self.config.spike and "spike" not in self._told:
            self._told.add("spike")
            accumulated = trainer.accumulate_grad_batches
            step = trainer.global_step - (len(losses) - 1 - place) // accumulated
            value, middle = losses[place] * accumulated, middle * accumulated
            self._tell("spike", step=step, value=value, factor=factor, middle=middle)
        self._fresh = 0
        while len(self._losses) > _WINDOW:
            self._losses.popleft()

    def _sign(self, kind: str, shown: bool, suffix: str = "", **facts: Any) -> None:
        key = kind + suffix
        self._signs[key] = self._signs.get(key, 0) + 1 if shown else 0
        if self._signs[key] < self.config.patience or key in self._told:
            return
        self._told.add(key)
        if self.config.stop_on_collapse:
            end_together(NumericsError(f"{WORDS[kind].format(**facts)} (health.stop_on_collapse)"))
        self._tell(kind, **facts)

    def _tell(self, kind: str, **facts: Any) -> None:
        if rank() == 0:
            log.warning("%s", WORDS[kind].format(**facts))
