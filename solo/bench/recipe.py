"""A training step of a published CIFAR recipe, ours and as the field writes it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.optim import Optimizer

from solo import backbones, optim
from solo.backbones import BackboneConfig
from solo.batch import Batch
from solo.batching import Mode, ViewBatching
from solo.bench.baselines.step import LoopLARS, as_published
from solo.compiling import compile_networks
from solo.methods import METHODS, Method

_LR, _DECAY = 0.4, 1e-5


class Step:
    """One optimizer step of a published CIFAR recipe on random images.

    Args:
        method: its name.
        batch: images.
        mode: how views are run; ``None`` for the whole step as the field writes it.
        precision: of the forward pass.
        compiled: as with ``compile=true``.
        sizes: of ``method_kwargs``, else the published ones.
    """

    def __init__(
        self,
        method: str,
        batch: int,
        mode: Mode | None,
        precision: torch.dtype = torch.float32,
        compiled: bool = False,
        **sizes: float,
    ) -> None:
        torch.manual_seed(0)
        kind = METHODS[method]
        self.model: Method = kind(backbones.build(BackboneConfig(), 3, 32), kind.Config(**sizes))
        groups = optim.parameter_groups(self.model, _LR, _DECAY, self.model.param_options())
        self.optimizer: Optimizer
        if mode is None:
            as_published(self.model)
            self.optimizer = LoopLARS(groups, _LR, 0.9, 0.02)
        else:
            self.model.each = ViewBatching(mode)
            self.optimizer = optim.LARS(groups, _LR, 0.9, eta=0.02, clip_lr=True, exclude_bias_n_norm=True)
        if compiled:
            compile_networks(self.model, torch.device("cpu"))
        views = [torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        self.batch = Batch(views, torch.arange(batch) % 10, torch.arange(batch))
        self.precision = precision
        self.loss: Callable[[Batch], Tensor] = lambda batch: self.model.losses(batch)["loss"]

    def __call__(self) -> int:
        """Make the step and return its images."""
        self.optimizer.zero_grad()
        mixed = self.precision != torch.float32
        with torch.autocast("cpu", self.precision) if mixed else nullcontext():
            loss = self.loss(self.batch)
        loss.backward()
        self.optimizer.step()
        self.model.after_step(0.5)
        return len(self.batch.labels)
