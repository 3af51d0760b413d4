"""A training step of a published recipe, ours and as the field writes it."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from solo import backbones, optim
from solo.backbones import BackboneConfig
from solo.batch import Batch
from solo.batching import Mode, ViewBatching
from solo.bench.baselines.step import LoopLARS, as_published
from solo.methods import METHODS, Method

_LR, _DECAY = 0.4, 1e-5


class Update:
    """The optimizer step of a method by LARS, with the settings of the published CIFAR recipes.

    Args:
        model: the method, which is changed in place.
        mode: how views are run; ``None`` for the whole step as the field writes it.
        precision: of the forward pass.
        device: where it computes.
    """

    def __init__(self, model: Method, mode: Mode | None, precision: torch.dtype = torch.float32, device: str = "cpu") -> None:
        self.model: Method = model.to(device)
        groups = optim.parameter_groups(self.model, _LR, _DECAY, self.model.param_options())
        self.optimizer: Optimizer
        if mode is None:
            as_published(self.model)
            self.optimizer = LoopLARS(groups, _LR, 0.9, 0.02)
        else:
            self.model.each = ViewBatching(mode)
            self.optimizer = optim.LARS(groups, _LR, 0.9, eta=0.02, clip_lr=True, exclude_bias_n_norm=True)
        self.precision, self.device = precision, device
        self.loss: Callable[[Batch], Tensor] = lambda batch: self.model.losses(batch)["loss"]

    def on(self, batch: Batch) -> int:
        """Make the step on a batch of the device and return its images."""
        self.optimizer.zero_grad()
        mixed = self.precision != torch.float32
        with torch.autocast(self.device, self.precision) if mixed else nullcontext():
            loss = self.loss(batch)
        loss.backward()
        self.optimizer.step()
        self.model.after_step(0.5)
        return len(batch.labels)


class Step(Update):
    """An `Update` on random images, always the same.

    Args:
        method: its name.
        batch: images.
        backbone: its network, by default that of the CIFAR recipes.
        size: pixels of an image's side.
        sizes: of ``method_kwargs``, else the published ones.
    """

    def __init__(
        self,
        method: str,
        batch: int,
        mode: Mode | None,
        precision: torch.dtype = torch.float32,
        device: str = "cpu",
        backbone: BackboneConfig | None = None,
        size: int = 32,
        **sizes: Any,
    ) -> None:
        torch.manual_seed(0)
        kind = METHODS[method]
        network = backbones.build(backbone or BackboneConfig(), 3, size)
        super().__init__(kind(network, kind.Config(**sizes)), mode, precision, device)
        views = [torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in range(2)]
        labels, index = torch.arange(batch) % 10, torch.arange(batch)
        self.batch = Batch([view.to(device) for view in views], labels.to(device), index.to(device))

    def __call__(self) -> int:
        """Make the step and return its images."""
        return self.on(self.batch)
