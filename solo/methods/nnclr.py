"""NNCLR: With a Little Help from My Friends (Dwibedi et al. 2021, https://arxiv.org/abs/2104.14548)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import nnclr_loss_func
from solo.methods.base import METHODS, Method
from solo.nn import Queue, mlp, neighbour_accuracy
from solo.ranges import require


@METHODS.register("nnclr")
class NNCLR(Method):
    """Each view predicts the nearest neighbour, in a queue of past embeddings, of the other view."""

    gathers = "keys"

    @dataclass(kw_only=True)
    class Config:
        """Published values; ``queue_size`` must be a multiple of the global batch."""

        temperature: float = 0.2
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 256
        pred_hidden_dim: int = 4096
        queue_size: int = 65536

        def __post_init__(self) -> None:
            require(self, positive="temperature", at_least_1="proj_hidden_dim proj_output_dim pred_hidden_dim queue_size")

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden, out = config.proj_hidden_dim, config.proj_output_dim
        self.projector = mlp(self.dim, hidden, hidden, out, last_norm=True)
        self.predictor = mlp(out, config.pred_hidden_dim, out)
        self.queue = Queue(config.queue_size, out)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        f1, f2 = self.each(self.backbone, batch.views)                          # [B, dim]
        z1, z2 = self.each(self.projector, (f1, f2))                            # [B, out]
        p1, p2 = self.each(self.predictor, (z1, z2))                            # [B, out]
        n, y = self.queue.nearest(torch.cat([z1, z2]))                          # [2 B, 1, out], [2 B, 1]
        self.queue.push(z1, batch.labels)
        p = torch.stack([p2, p1])                                               # [2, B, out]: the other view's
        loss = nnclr_loss_func(n.view_as(p), p, self.config.temperature)
        return {"loss": loss, "feats": torch.cat([f1, f2]), "nn_acc": neighbour_accuracy(y[: len(z1), 0], batch.labels)}
