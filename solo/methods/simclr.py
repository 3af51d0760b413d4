"""SimCLR: a simple framework for contrastive learning (Chen et al. 2020, https://arxiv.org/abs/2002.05709)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import simclr_loss_func
from solo.methods.base import METHODS, Method
from solo.ranges import require


@METHODS.register("simclr")
class SimCLR(Method):
    """The views of an image are told from all other views of the global batch; smaller crops are views like the others."""

    multicrop = True
    gathers = "keys"

    @dataclass(kw_only=True)
    class Config:
        """Published values of solo-learn's CIFAR recipe."""

        temperature: float = 0.2
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 256

        def __post_init__(self) -> None:
            require(self, positive="temperature", at_least_1="proj_hidden_dim proj_output_dim")

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden, out = config.proj_hidden_dim, config.proj_output_dim
        self.projector = nn.Sequential(nn.Linear(self.dim, hidden), nn.ReLU(), nn.Linear(hidden, out))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        feats = self.each(self.backbone, batch.views)                           # V x [B, dim]
        z = torch.cat(self.each(self.projector, feats))                         # [V * B, out]
        views = len(feats)
        loss = simclr_loss_func(z, batch.index.repeat(views), self.config.temperature, positives=views - 1)
        return {"loss": loss, "feats": torch.cat(feats[: self.views])}
