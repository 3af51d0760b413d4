"""All4One: symbiotic neighbour contrastive learning (Estepa et al. 2023, https://arxiv.org/abs/2303.09417)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from positional_encodings.torch_encodings import PositionalEncodingPermute1D
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import all4one_loss_func
from solo.methods.base import METHODS, Method
from solo.nn import Momentum, Queue, Teacher, mlp, neighbour_accuracy, unit
from solo.ranges import require


@METHODS.register("all4one")
class All4One(Method):
    """Contrast of neighbours, of their attention-pooled centroids, and of features.

    Named deviation: each projector and predictor runs once per view. The published code runs them twice, which
    moves their BatchNorm running statistics twice per view; loss and gradients are the same.
    """

    @dataclass(kw_only=True)
    class Config:
        """Published values; ``queue_size`` must be a multiple of the global batch.

        ``transformer_lr`` is taken as it is, whatever the batch, as published.
        """

        temperature: float = 0.2
        centroid_temperature: float = 0.1
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 256
        pred_hidden_dim: int = 4096
        queue_size: int = 98304
        neighbours: int = 5
        depth: int = 3
        heads: int = 8
        dropout: float = 0.1
        transformer_lr: float = 0.1
        momentum: Momentum = field(default_factory=Momentum)

        def __post_init__(self) -> None:
            out, heads, also = self.proj_output_dim, self.heads, []
            if heads > 0 and out % heads:
                below, above = out // heads * heads, -(-out // heads) * heads
                also.append(f"proj_output_dim={out} is not divisible by heads={heads}: use {below or above} or {above}")
            if not 2 <= self.neighbours <= self.queue_size:
                also.append(f"neighbours must lie between 2 and queue_size, got {self.neighbours}")
            sizes = "proj_hidden_dim proj_output_dim pred_hidden_dim queue_size depth heads"
            require(self, positive="temperature centroid_temperature", at_least_0="transformer_lr", at_least_1=sizes,
                    below_1="dropout", also=also)

    gathers = "keys"
    local_terms = {"feature": 0.5}      # as published
    position: Tensor

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden, out = config.proj_hidden_dim, config.proj_output_dim
        self.projector = mlp(self.dim, hidden, hidden, out, last_norm=True)
        self.predictor = mlp(out, config.pred_hidden_dim, out)
        self.centroid_predictor = mlp(out, config.pred_hidden_dim, out)
        layer = nn.TransformerEncoderLayer(out, config.heads, 2 * out, config.dropout, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, config.depth)
        self.register_buffer("position", positional_code(config.neighbours, out), persistent=False)
        self.teacher = Teacher(backbone, self.projector, momentum=config.momentum)
        self.queue = Queue(config.queue_size, out)

    def param_options(self) -> Mapping[str, Mapping[str, Any]]:
        return {"transformer": {"lr": self.config.transformer_lr}}

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        f1, f2 = self.each(self.backbone, batch.views)                          # [B, dim]
        z1, z2 = self.each(self.projector, (f1, f2))                            # [B, D]
        p1, p2 = self.each(self.predictor, (z1, z2))                            # [B, D]
        m1, m2 = map(unit, self.each(self.teacher, batch.views))                # [B, D], constants

        k = self.config.neighbours
        n, y = self.queue.nearest(torch.cat([m1, m2]), k)                       # [2 B, k, D], [2 B, k]
        n1, n2 = n.chunk(2)                                                     # [B, k, D]
        self.queue.push(m1, batch.labels)
        a1, a2 = n1, n2                                                         # [B, k, D]
        b1, b2 = self._shifted(z1, n1), self._shifted(z2, n2)                   # [B, k, D]
        sequences = torch.cat([a1, a2, b1, b2]) + self.position                 # [4 B, k, D]
        a1, a2, b1, b2 = self.transformer(sequences)[:, 0].chunk(4)             # [B, D]

        terms = all4one_loss_func(
            (a1, a2), (b1, b2), (n1[:, 0], n2[:, 0]), (p1, p2), (z1, z2), (m1, m2),
            temperature=self.config.temperature, centroid_temperature=self.config.centroid_temperature,
        )
        return {"feats": torch.cat([f1, f2]), "nn_acc": neighbour_accuracy(y[: len(m1), 0], batch.labels), **terms._asdict()}

    def _shifted(self, z: Tensor, neighbours: Tensor) -> Tensor:
        """The second prediction in front of all neighbours but the last."""
        return torch.cat([self.centroid_predictor(z)[:, None], neighbours[:, :-1]], dim=1)


def positional_code(tokens: int, dim: int) -> Tensor:
    """Sine code [tokens, dim] as published: positions run along the features, and the tokens are its channels."""
    return PositionalEncodingPermute1D(tokens)(torch.zeros(1, tokens, dim))[0].contiguous()
