"""The contract of a method: an author writes ``Config``, ``__init__`` and ``losses``."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from solo import optim
from solo.batch import Batch
from solo.batching import ViewBatching
from solo.console import say
from solo.dist import rank, send_nothing_old
from solo.errors import ConfigError
from solo.nn import Queue, StepModule
from solo.registry import Registry
from solo.schedules import SchedulerConfig, learning_rate

METHODS: Registry[type["Method"]] = Registry("solo.methods")
Gathers = Literal["none", "keys", "statistics"]


class Method(pl.LightningModule):
    """Base of every method.

    Args:
        backbone: images [B, C, H, W] to features [B, dim], with ``num_features`` = dim.
        config: an instance of the class's own ``Config`` dataclass.

    Attributes:
        dim: width of the features.
        optimizer_config, scheduler_config: the recipe; set them before fitting.
        views: full-size views of an image that `losses` takes.
        originals: how many of them, from the first on, must be the image as it is, not augmented.
        multicrop: whether smaller crops may follow them.
        mean, std: what the images are normalised with, per channel; set them, or None where no method asks.
        each: ``self.each(network, views)`` is ``[network(view) for view in views]``, the way ``view_batching`` says.
        seed: with rank, epoch and batch it decides every random number of a step.
        local_terms: outputs that each process computes from its own images alone, and their weights in the loss;
            without them the loss does not notice how many processes there are.
        gathers: what an image's loss takes from the other images of the global batch, `local_terms` left out: ``none``;
            ``keys``, each of which it is compared with; or ``statistics``, means over all of them. With ``none``
            micro-batches are exactly one batch, with the others they are not. A class attribute, or a property where the
            config decides.
        feats: of the last batch, [V * B, dim], constants.
        stepped: what the last optimizer step moved, to be logged, e.g. ``{"tau": 0.99}``.
    """

    Config: ClassVar[type]
    views: ClassVar[int] = 2
    originals: ClassVar[int] = 0
    multicrop: ClassVar[bool] = False
    local_terms: ClassVar[Mapping[str, float]] = {}
    backbone: nn.Module

    def __init__(self, backbone: nn.Module, config: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.dim = int(backbone.num_features)  # type: ignore[arg-type]
        self.optimizer_config = optim.OptimizerConfig()
        self.scheduler_config = SchedulerConfig()
        self.mean: Sequence[float] | None = None
        self.std: Sequence[float] | None = None
        self.seed = 5
        self.each = ViewBatching()
        self.feats = torch.empty(0)
        self.stepped: dict[str, float] = {}
        self._total_steps = 0           # none outside a run
        self._outside = 0.0             # progress there
        self._checked = False

    @property
    def gathers(self) -> Gathers:
        return "none"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """One step's ``"loss"``, the backbone's ``"feats"`` [V * B, dim] of all large views, and scalars to log."""
        raise NotImplementedError

    def param_options(self) -> Mapping[str, Mapping[str, Any]]:
        """Options per submodule, see `solo.optim.parameter_groups`."""
        return {}

    def parameter_groups(self, lr: float = 0.0) -> list[dict[str, Any]]:
        """What the optimizer trains, at the rate ``lr``, in groups that are named after submodules."""
        config = self.optimizer_config
        return optim.parameter_groups(self, lr, config.weight_decay, self.param_options(), config.exclude_bias_n_norm_wd)

    def forward(self, x: Tensor) -> Tensor:
        """Features [B, dim] of images."""
        return self.backbone(x)

    def pixels(self, x: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] as pixels in 0..1 again, for networks with a normalisation of their own."""
        if self.mean is None or self.std is None:
            raise ConfigError(f"{type(self).__name__} must know what its images are normalised with: set its mean and std")
        mean, std = (torch.tensor(each, dtype=x.dtype).to(x.device, non_blocking=True) for each in (self.mean, self.std))
        return x * std.view(-1, 1, 1) + mean.view(-1, 1, 1)

    @property
    def progress(self) -> float:
        """Share of the run's optimizer steps that are done, 0..1; outside a run 0, or what it is set to."""
        return self.trainer.global_step / self._total_steps if self._total_steps else self._outside

    @progress.setter
    def progress(self, share: float) -> None:
        self._outside = share

    def check(self, global_batch: int, crop_sizes: Sequence[int]) -> None:
        """Refuse what cannot train.

        Args:
            global_batch: images per step over all processes.
            crop_sizes: side in pixels of each view, largest first.

        Raises:
            ConfigError: the method takes other views, or a queue's size is not a multiple of what a batch pushes into it.
        """
        full = [size for size in crop_sizes if size == crop_sizes[0]]
        if len(full) != self.views or (len(crop_sizes) > len(full) and not self.multicrop):
            takes = f"{self.views} view{'s' * (self.views > 1)} of one size" + " and any smaller ones" * self.multicrop
            sizes = ", ".join(map(str, crop_sizes))
            raise ConfigError(f"augmentations: {type(self).__name__} takes {takes}, got crops of {sizes} px")
        for name, queue in self.named_modules():
            if not isinstance(queue, Queue) or len(queue.keys) % (pushed := global_batch * queue.views) == 0:
                continue
            size = len(queue.keys)
            below, above = size // pushed * pushed, math.ceil(size / pushed) * pushed
            nearest = f"{below} or {above}" if below else str(above)
            times = f" x {queue.views} views" if queue.views > 1 else ""
            key = f"method_kwargs.{name}_size={size}"
            raise ConfigError(f"{key} is not a multiple of the global batch {global_batch}{times}: use {nearest}")

    def after_step(self, progress: float) -> dict[str, float]:
        """Move every `StepModule` on: queues take what was pushed, teachers follow.

        Args:
            progress: share of the run done before this step.

        Returns:
            What the modules report, e.g. the teacher's tau; where several report one thing, ``tau/NAME`` of each.
        """
        modules = {name: module for name, module in self.named_modules() if isinstance(module, StepModule)}
        reports = {name: module.after_step(progress) for name, module in modules.items()}
        several = Counter(chain(*reports.values()))
        return {(f"{key}/{name}" if several[key] > 1 else key): value
                for name, report in reports.items() for key, value in report.items()}

    # --- Lightning -------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """The optimizer of the recipe over all parameters with ``requires_grad``; the rate is scaled here, once."""
        config = self.optimizer_config
        accumulated = self.trainer.accumulate_grad_batches
        global_batch = config.batch_size * self.trainer.world_size * accumulated
        lr = optim.scaled_lr(config.lr, global_batch)
        say(f"{config.name}: lr {config.lr:g} x {global_batch}/256 = {lr:g} (batch {config.batch_size} x "
                       f"{self.trainer.world_size} processes x {accumulated} accumulated)")
        optimizer = optim.build(config, self.parameter_groups(lr))
        self._group_options = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        return optimizer

    def on_fit_start(self) -> None:
        self.each.renew()
        send_nothing_old()

    def on_train_start(self) -> None:
        self._total_steps = int(self.trainer.estimated_stepping_batches)
        for group, options in zip(self._groups(), self._group_options, strict=True):
            group.update(options)                   # what the config says now, not what a checkpoint said

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if not self._checked:           # also batches of a notebook's own loader
            self.check(len(batch.labels) * self.trainer.world_size, [view.shape[-1] for view in batch.views])
            self._checked = True
        # The state of the global generator is a function of where the run is, so there is none to store.
        words = f"{self.seed}/{rank()}/{self.trainer.current_epoch}/{batch_idx}"
        seed = int.from_bytes(hashlib.blake2b(words.encode(), digest_size=7).digest(), "big")
        # torch.manual_seed takes half a millisecond where no other device was ever used: it formats the stack for later.
        (torch.default_generator if self.device.type == "cpu" else torch).manual_seed(seed)
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        for group, options in zip(self._groups(), self._group_options, strict=True):
            if group["schedule"]:
                group["lr"] = learning_rate(
                    self.scheduler_config, self.trainer.global_step, self._total_steps, per_epoch, options["lr"]
                )

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizers(use_pl_optimizer=False).param_groups  # type: ignore[union-attr]

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        outputs = self.losses(batch)
        name, each = type(self).__name__, self.each
        if each.mode == "concat" and not each.used:
            raise ConfigError(f"view_batching=concat has no effect: {name} runs its networks without self.each: leave it out")
        if each.micro_batch and not each.ran(self.backbone):
            raise ConfigError(f"micro_batch has no effect: {name} runs its backbone without self.each: leave it out")
        self.feats = outputs["feats"] = outputs["feats"].detach()
        return outputs

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        progress = self.progress
        closure = optim.of_fewer(optimizer_closure, optimizer, batch_idx, self.trainer.accumulate_grad_batches)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.stepped = self.after_step(progress)

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"feats": self.backbone(batch.views[0]), "labels": batch.labels}
