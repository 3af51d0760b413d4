"""SCE: Similarity Contrastive Estimation (Denize et al. 2023, https://arxiv.org/abs/2111.14585)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import sce_multicrop_loss_func
from solo.methods.base import METHODS, Gathers, Method
from solo.nn import Momentum, Queue, Teacher, mlp
from solo.ranges import require
from solo.schedules import Ramp, ends, value_at


@METHODS.register("sce")
class SCE(Method):
    """Each online view predicts, over past images, whom the target view of the same image is similar to.

    Named deviations: the target starts as a copy of the online network (one released version starts it at random), and
    there is no shuffling of BatchNorm statistics (the released CIFAR recipe has it).
    """

    @dataclass(kw_only=True)
    class Config:
        """Published values of ImageNet; ``queue_size`` must be a multiple of the global batch times the target views.

        ``coeff`` (the paper's lambda) and ``temperature_m`` may be ramps: ``{start: 0.04, end: 0.07, share: 0.1}``.
        ``symmetric``: both large views are targets of all other views; otherwise the first is the target of the rest and
        does not pass the online network. ``mask_self`` and ``in_batch``: see `solo.losses.sce_loss_func`.
        ``proj_last_norm``: the projector ends with BatchNorm without scale and shift, otherwise its last Linear has a bias.
        ``pred_hidden_dim=0``: no predictor. ``queue_size=0``: no queue.
        """

        temperature: float = 0.1
        temperature_m: float | Ramp = 0.07
        coeff: float | Ramp = 0.5
        symmetric: bool = True
        mask_self: bool = False
        in_batch: bool = False
        proj_layers: int = 3
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 256
        proj_last_norm: bool = True
        pred_hidden_dim: int = 4096
        queue_size: int = 65536
        momentum: Momentum = field(default_factory=Momentum)

        def __post_init__(self) -> None:
            rules = (
                (all(0 < end < math.inf for end in ends(self.temperature_m)),
                 f"temperature_m must be positive, got {self.temperature_m}"),
                (all(0 <= end <= 1 for end in ends(self.coeff)), f"coeff must lie in [0, 1], got {self.coeff}"),
                (self.queue_size or self.in_batch, "queue_size=0 leaves no image to compare with: set in_batch=true"),
                (self.mask_self or not self.in_batch, "in_batch=true compares an image with itself: set mask_self=true"),
            )
            require(
                self, positive="temperature", at_least_1="proj_layers proj_hidden_dim proj_output_dim",
                at_least_0="pred_hidden_dim queue_size", also=[problem for holds, problem in rules if not holds],
            )

    multicrop = True

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden, out, norm = config.proj_hidden_dim, config.proj_output_dim, config.proj_last_norm
        widths = [self.dim, *[hidden] * (config.proj_layers - 1), out]
        self.projector = mlp(*widths, bias=False, last_bias=not norm, last_norm=norm, last_affine=False)
        self.predictor = mlp(out, config.pred_hidden_dim, out, bias=False) if config.pred_hidden_dim else nn.Identity()
        self.teacher = Teacher(backbone, self.projector, momentum=config.momentum)
        self.queue = Queue(config.queue_size, out, views=1 + config.symmetric) if config.queue_size else None

    @property
    def gathers(self) -> Gathers:
        return "keys" if self.config.in_batch else "none"

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        first, targets = (0, batch.views[:2]) if c.symmetric else (1, batch.views[:1])
        feats = self.each(self.backbone, batch.views[first:])                               # V x [B, dim]
        q = self.each(self.predictor, self.each(self.projector, feats))                     # V x [B, D]
        k = self.each(self.teacher, targets)                                                # G x [B, D], constants
        if self.queue is not None:
            for view in k:
                self.queue.push(view, batch.labels)
        pairs = [(g, v) for g in range(len(k)) for v in range(len(q)) if g != v + first]    # of two views of an image
        loss = sce_multicrop_loss_func(
            q, k, None if self.queue is None else self.queue.keys, pairs,
            temperature=c.temperature, temperature_m=value_at(c.temperature_m, self.progress),
            coeff=value_at(c.coeff, self.progress), mask_self=c.mask_self, in_batch=c.in_batch,
        )
        return {"loss": loss, "feats": torch.cat(feats[: len(k)])}
