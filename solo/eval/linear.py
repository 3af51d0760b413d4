"""Linear classification of frozen features, and fine-tuning: a quick probe, and the published protocol."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import timm.data
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from solo import optim
from solo.batch import Batch
from solo.console import say
from solo.data.views import View
from solo.dist import all_reduce
from solo.errors import DataError
from solo.eval.features import Features
from solo.optim import OptimizerConfig
from solo.precision import full_precision
from solo.schedules import SchedulerConfig, learning_rate


def linear_accuracy(train: Features, test: Features, num_classes: int, *, regularisation: float = 0.03) -> dict[str, float]:
    """A quick, deterministic linear probe for reports: logistic regression on standardised features.

    Args:
        train: rows to fit; those without label are left out, as in ``test``.
        test: rows to classify.
        num_classes: classes of the dataset.
        regularisation: weight of the squared norm against the summed cross-entropy, per feature: standardised rows
            have a squared norm of D, so one value suits all widths.

    Returns:
        ``{"acc1", "acc5"}`` in percent; acc5 counts min(5, num_classes) guesses.

    Raises:
        DataError: the train labels are of fewer than two classes, or there is no test label.
    """
    from sklearn.linear_model import LogisticRegression  # here: a run without a report does without
    from sklearn.preprocessing import StandardScaler

    train, test = train.labelled(), test.labelled()
    if len(train.labels.unique()) < 2:
        raise DataError("a linear probe needs train labels of at least two classes")
    if not len(test.labels):
        raise DataError("a linear probe needs labelled test images, and none has a label")
    scaler = StandardScaler().fit(train.features.numpy())
    model = LogisticRegression(C=1 / (regularisation * train.features.shape[1]), max_iter=200, tol=1e-3)
    model.fit(scaler.transform(train.features.numpy()), train.labels.numpy())
    scores = torch.zeros(len(test.labels), num_classes, dtype=torch.float64)                        # [N, C]
    probabilities = model.predict_proba(scaler.transform(test.features.numpy()))                    # [N, classes seen]
    scores[:, torch.from_numpy(model.classes_)] = torch.from_numpy(probabilities).double()
    first, five = _right(scores, test.labels)
    return {"acc1": 100 * float(first) / len(test.labels), "acc5": 100 * float(five) / len(test.labels)}


_linear = full_precision(F.linear)


def _right(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows right at the first guess, and among min(5, C) guesses; a label -1 is never right."""
    right = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return right[:, 0].sum(), right.sum()


@dataclass(kw_only=True)
class LinearConfig:
    """Training on top of a checkpoint: a frozen backbone with a linear head, or all of it with ``finetune``.

    ``backbone`` and ``data`` hold what differs from the checkpoint's own config. ``optimizer.lr`` holds for a batch of
    256 and is scaled with the global batch. ``augmentations``: one train view; by default a random resized crop and a
    flip. ``mixup`` and ``cutmix`` are the alphas of timm's Mixup; ``layer_decay`` multiplies the rate once per layer
    below the head. ``trainer`` holds what is passed to Lightning's Trainer under its own names.
    """

    checkpoint: str
    output: str | None = None
    finetune: bool = False
    backbone: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    augmentations: list[View] | None = None
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(name="sgd", lr=0.3, weight_decay=0.0))
    scheduler: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(name="step", lr_decay_steps=[60, 80]))
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    layer_decay: float | None = None
    seed: int = 5
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed must lie in [0, 2**32), got {self.seed}")
        if not 0 <= self.label_smoothing < 1:
            problems.append(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                problems.append(f"{name} must not be negative, got {getattr(self, name)}")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            problems.append(f"layer_decay must be in (0, 1], got {self.layer_decay}")
        if self.layer_decay is not None and not self.finetune:
            problems.append("layer_decay needs finetune=true: a frozen backbone has no layers to train")
        if self.augmentations is not None and sum(view.num_crops for view in self.augmentations) != 1:
            problems.append("augmentations must list exactly one view of one crop")
        if problems:
            raise ValueError("\n".join(problems))


class Classifier(pl.LightningModule):
    """A backbone and a linear head, trained on labels.

    Args:
        backbone: [B, C, H, W] -> [B, D] with ``num_features``; frozen and in eval mode unless ``config.finetune``.
        num_classes: classes of the dataset.
        config: the recipe.

    Attributes:
        best: highest ``val/acc1`` so far, percent.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, config: LinearConfig) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(config.finetune)
        self.head = nn.Linear(int(backbone.num_features), num_classes)  # type: ignore[arg-type]
        self.config = config
        self.best = 0.0
        self.mixup = None
        if config.mixup or config.cutmix:
            smoothing = config.label_smoothing
            self.mixup = timm.data.Mixup(config.mixup, config.cutmix, label_smoothing=smoothing, num_classes=num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, C] of images."""
        return self.logits(self.backbone(x))

    def logits(self, feats: Tensor) -> Tensor:
        """Logits [B, C] of features [B, D], in float32 also under autocast: 16 bits tie classes."""
        return _linear(feats, self.head.weight, self.head.bias)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        x, labels = batch.views[0], batch.labels
        targets: Tensor = labels
        if self.mixup is not None:
            rows = (labels >= 0).nonzero()[:, 0]
            rows = rows[: len(rows) // 2 * 2]                                                       # Mixup pairs them
            labels = labels[rows]
            x, targets = self.mixup(x[rows], labels)                                                # [B, C] soft targets
        self.backbone.train(self.config.finetune)
        with torch.set_grad_enabled(self.config.finetune):
            feats = self.backbone(x)                                                                # [B, D]
        logits = self.logits(feats)                                                                 # [B, C]
        smoothing = self.config.label_smoothing if self.mixup is None else 0.0                      # else it is in targets
        loss = F.cross_entropy(logits, targets, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
        count = (labels >= 0).sum()
        acc1 = 100 * (logits.argmax(1) == labels).sum() / count                                     # NaN without a label
        return {"loss": loss / count.clamp(min=1), "feats": feats.detach(), "acc1": acc1}

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        closure = optim.of_fewer(optimizer_closure, optimizer, batch_idx, self.trainer.accumulate_grad_batches)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def on_validation_epoch_start(self) -> None:
        self._hits = torch.zeros(3, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        first, five = _right(self(batch.views[0]), batch.labels)
        self._hits += torch.stack([first, five, (batch.labels >= 0).sum()])

    def on_validation_epoch_end(self) -> None:
        first, five, rows = all_reduce(self._hits).tolist()
        if rows and not self.trainer.sanity_checking:
            self.best = max(self.best, 100 * first / rows)
            self.log_dict({"val/acc1": 100 * first / rows, "val/acc5": 100 * five / rows}, batch_size=1, sync_dist=True)

    # --- optimisation ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        config = self.config.optimizer
        batch = config.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches
        self._lr = optim.scaled_lr(config.lr, batch)
        say(f"{config.name}: lr {config.lr:g} x {batch}/256 = {self._lr:g}")
        groups = self._groups(config.weight_decay, config.exclude_bias_n_norm_wd)
        return optim.build(config, [{"lr": self._lr * group["lr_scale"], **group} for group in groups])

    def _groups(self, weight_decay: float, exclude_one_dimensional: bool) -> list[dict[str, Any]]:
        """Parameter groups with ``lr_scale``; with ``layer_decay`` one per layer and kind."""
        if self.config.layer_decay is not None:
            named: set[str] = getattr(self.backbone, "no_weight_decay", set)()
            groups = param_groups_layer_decay(self.backbone, weight_decay, named, layer_decay=self.config.layer_decay)
            return [*groups, {"params": list(self.head.parameters()), "lr_scale": 1.0, "weight_decay": weight_decay}]
        groups = optim.parameter_groups(self, self._lr, weight_decay, split_one_dimensional=exclude_one_dimensional)
        return [{"params": group["params"], "weight_decay": group["weight_decay"], "lr_scale": 1.0} for group in groups]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        total = int(self.trainer.estimated_stepping_batches)
        lr = learning_rate(self.config.scheduler, self.trainer.global_step, total, per_epoch, self._lr)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = lr * group["lr_scale"]
