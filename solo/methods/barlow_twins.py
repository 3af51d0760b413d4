"""Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import barlow_loss_func
from solo.methods.base import METHODS, Method
from solo.nn import mlp
from solo.ranges import require


@METHODS.register("barlow_twins")
class BarlowTwins(Method):
    """The cross-correlation of the two views' projections is drawn to the identity.

    Named deviation: the projector's last layer has no bias. The published one never learns: the loss takes means off.
    """

    gathers = "statistics"

    @dataclass(kw_only=True)
    class Config:
        """Defaults of solo-learn; its CIFAR and ImageNet-100 recipes have ``scale_loss=0.1``."""

        lamb: float = 0.0051
        scale_loss: float = 0.024
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 2048

        def __post_init__(self) -> None:
            require(self, positive="scale_loss", at_least_0="lamb", at_least_1="proj_hidden_dim proj_output_dim")

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden = config.proj_hidden_dim
        self.projector = mlp(self.dim, hidden, hidden, config.proj_output_dim, last_bias=False)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        f1, f2 = self.each(self.backbone, batch.views)                          # [B, dim]
        z1, z2 = self.each(self.projector, (f1, f2))                            # [B, out]
        loss = barlow_loss_func(z1, z2, self.config.lamb, self.config.scale_loss)
        return {"loss": loss, "feats": torch.cat([f1, f2])}
