"""VICReg: variance, invariance, covariance (Bardes et al. 2022, https://arxiv.org/abs/2105.04906)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import vicreg_loss_func
from solo.methods.base import METHODS, Method
from solo.nn import mlp
from solo.ranges import require


@METHODS.register("vicreg")
class VICReg(Method):
    """Views agree, while each feature keeps its variance and no two features are correlated.

    Named deviation: the projector's last layer has no bias. The published one never learns: it cancels in all three terms.
    """

    gathers = "statistics"

    @dataclass(kw_only=True)
    class Config:
        """Published values; the paper's projector is 8192 wide, that of solo-learn's recipes 2048."""

        sim_loss_weight: float = 25.0
        var_loss_weight: float = 25.0
        cov_loss_weight: float = 1.0
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 2048

        def __post_init__(self) -> None:
            weights = "sim_loss_weight var_loss_weight cov_loss_weight"
            require(self, at_least_0=weights, at_least_1="proj_hidden_dim proj_output_dim")

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden = config.proj_hidden_dim
        self.projector = mlp(self.dim, hidden, hidden, config.proj_output_dim, last_bias=False)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        f1, f2 = self.each(self.backbone, batch.views)                          # [B, dim]
        z1, z2 = self.each(self.projector, (f1, f2))                            # [B, out]
        c = self.config
        loss = vicreg_loss_func(z1, z2, c.sim_loss_weight, c.var_loss_weight, c.cov_loss_weight)
        return {"loss": loss, "feats": torch.cat([f1, f2])}
