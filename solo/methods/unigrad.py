"""UniGrad: siamese learning via a unified gradient framework (Tao et al. 2022, https://arxiv.org/abs/2112.05141)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses.unigrad import (
    Gradients,
    barlow_gradients,
    direct_metric,
    direct_predictor,
    directpred_gradients,
    moco_gradients,
    simclr_gradients,
    unigrad_gradients,
    vicreg_gradients,
)
from solo.methods.base import METHODS, Gathers, Method
from solo.nn import Correlation, Momentum, Queue, Teacher, mlp
from solo.ranges import require

# Constants of each form. Published, but for the queue's size (MoCo's own) and the steps between eigendecompositions.
_DIRECTPRED = {"rho": 0.99, "eps": 0.3, "eigen_every": 10}
CONSTANTS: dict[str, dict[str, Any]] = {
    "unigrad": {"lambda_": 100.0, "rho": 0.99},
    "simclr": {"temperature": 0.2},
    "moco": {"temperature": 0.2, "queue_size": 65536},
    "simsiam": _DIRECTPRED,
    "byol_directpred": _DIRECTPRED,
    "barlow": {"lambda_": 50.0},
    "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
}
_GATHERS: dict[str, Gathers] = {**dict.fromkeys(CONSTANTS, "statistics"), "simclr": "keys", "moco": "none"}
_BOUNDS = {"rho": (0, 1), "temperature": (1e-3, math.inf), "eigen_every": (1, math.inf), "queue_size": (1, math.inf)}


@METHODS.register("unigrad")
class UniGrad(Method):
    """A teacher's targets, no predictor, and the gradient of one of seven methods.

    The loss has the objective's value and the form's gradient. Without teacher (``momentum: null``) the targets are the
    projections themselves as constants.

    Named deviations: F is float32 also under autocast; the DirectPred forms decompose it every ``eigen_every`` steps
    (1: as published); the teacher follows after the optimizer step, with the tau of one step earlier.
    """

    @dataclass(kw_only=True)
    class Config:
        """Published values. A constant that is null takes the form's own, see `CONSTANTS`; another form's is refused.

        ``cutmix`` is alpha of the Beta distribution of the areas; 0 mixes no images.
        """

        form: Literal["unigrad", "simclr", "moco", "simsiam", "byol_directpred", "barlow", "vicreg"] = "unigrad"
        proj_hidden_dim: int = 2048
        proj_output_dim: int = 2048
        momentum: Momentum | None = field(default_factory=lambda: Momentum(base_tau=0.996))
        cutmix: float = 0.0
        lambda_: float | None = None
        rho: float | None = None
        temperature: float | None = None
        queue_size: int | None = None
        eps: float | None = None
        eigen_every: int | None = None
        invariance: float | None = None
        variance: float | None = None
        covariance: float | None = None

        def __post_init__(self) -> None:
            own, problems = CONSTANTS[self.form], []
            for name in dict.fromkeys(name for constants in CONSTANTS.values() for name in constants):
                value, (low, high) = getattr(self, name), _BOUNDS.get(name, (0, math.inf))
                if value is None:
                    setattr(self, name, own.get(name))
                elif name not in own:
                    problems.append(f"{name}={value} means nothing to form={self.form}, which has {', '.join(own)}")
                elif not (math.isfinite(value) and low <= value <= high):
                    problems.append(f"{name} must lie between {low} and {high}, got {value}")
            if self.cutmix and self.momentum is None:
                problems.append("cutmix needs a teacher, which sees the images unmixed: leave momentum=null or cutmix away")
            require(self, at_least_1="proj_hidden_dim proj_output_dim", at_least_0="cutmix", also=problems)

        @property
        def constants(self) -> dict[str, Any]:
            """The form's own by name."""
            return {name: getattr(self, name) for name in CONSTANTS[self.form]}

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden, out, c = config.proj_hidden_dim, config.proj_output_dim, config.constants
        cancels = config.form == "vicreg"                   # what it adds to each row is in no difference of rows
        self.projector = mlp(self.dim, hidden, hidden, out, bias=False, last_bias=not cancels)
        self.teacher = Teacher(backbone, self.projector, momentum=config.momentum) if config.momentum else None
        match config.form:
            case "unigrad":
                self.correlation = Correlation(out, c["rho"])
            case "simsiam" | "byol_directpred":
                self.predictor = DirectPredictor(out, c["rho"], c["eps"], c["eigen_every"])
            case "moco":
                self.queue = Queue(c["queue_size"], out, views=2)

    @property
    def gathers(self) -> Gathers:
        return _GATHERS[self.config.form]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        views, other, share = cutmix(batch.views, self.config.cutmix)
        f1, f2 = self.each(self.backbone, views)                                # [B, dim]
        z1, z2 = self.each(self.projector, (f1, f2))                            # [B, D]
        if self.teacher is None:
            m1, m2 = z1.detach(), z2.detach()
        else:
            m1, m2 = self.each(self.teacher, batch.views)                       # [B, D], constants
        form = self._form(m1, m2, batch.labels)
        gradients = form(z1, z2, m1, m2)
        if self.config.cutmix:              # whatever the box: every rank gathers as often
            gradients = gradients.mixed(form(z1, z2, m1[other], m2[other]), share)
        positive, negative = gradients.norms()
        return {
            "loss": gradients.loss(),
            "feats": torch.cat([f1, f2]),
            "pos_sim": gradients.similarity,
            "positive_norm": positive,
            "negative_norm": negative,
        }

    def _form(self, m1: Tensor, m2: Tensor, labels: Tensor) -> Callable[..., Gradients]:
        """The gradient as a function of z1, z2, m1, m2, after its memory has seen this batch's targets."""
        c = self.config.constants
        match self.config.form:
            case "unigrad":
                return partial(unigrad_gradients, F=self.correlation(m1, m2), lambda_=c["lambda_"])
            case "simsiam" | "byol_directpred":
                W, A = self.predictor(m1, m2)
                return partial(directpred_gradients, W=W, A=A)
            case "moco":
                self.queue.push(m1, labels)
                self.queue.push(m2, labels)
                return partial(moco_gradients, queue=self.queue.keys, temperature=c["temperature"])
            case "simclr":
                return partial(simclr_gradients, **c)
            case "barlow":
                return partial(barlow_gradients, **c)
        return partial(vicreg_gradients, **c)


class DirectPredictor(Correlation):
    """The predictor that DirectPred derives from F instead of learning it.

    Where one is due, each micro-batch derives its own, and the one that stays is that of the whole step.

    Args:
        dim: width D.
        rho: decay of F.
        eps: added to the predictor's relative eigenvalues.
        every: optimizer steps between eigendecompositions; in between the predictor stays and F moves on.
    """

    W: Tensor
    largest: Tensor

    def __init__(self, dim: int, rho: float, eps: float, every: int) -> None:
        super().__init__(dim, rho)
        self.eps, self.every = eps, every
        self.register_buffer("W", torch.zeros(dim, dim))                        # [D, D]
        self.register_buffer("largest", torch.ones(()))
        self._count = 0                     # `steps` on the host: reading it from a GPU would wait for it
        self._derived: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def forward(self, m1: Tensor, m2: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """W and A [D, D] of `directpred_gradients`, with this micro-batch counted in."""
        F = super().forward(m1, m2)
        self._derived = direct_predictor(F, self.eps) if self._count % self.every == 0 else None
        W, largest = self._derived or (self.W, self.largest)
        return W, direct_metric(F, largest, self.eps)

    @torch.no_grad()
    def after_step(self, progress: float) -> dict[str, float]:
        derived, micro_batches, self._derived = self._derived, self._batches, None
        self._count += self._pending is not None
        super().after_step(progress)
        if derived is not None:
            W, largest = derived if micro_batches == 1 else direct_predictor(self.value, self.eps)
            self.W.copy_(W)
            self.largest.copy_(largest)
        return {}

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self._count = int(self.steps)


def cutmix(views: Sequence[Tensor], alpha: float) -> tuple[Sequence[Tensor], Tensor, float]:
    """Paste one box of other images of the batch into each image, the same in all views (Yun et al. 2019).

    Every image keeps the larger part of itself, so that its label stays the best guess.

    Args:
        views: [B, C, H, W] each.
        alpha: the box's share of the area is drawn from Beta(alpha, alpha); 0 mixes nothing.

    Returns:
        The mixed views, for each image the row [B] its pasted part comes from, and the share 0.5..1 that is its own.
    """
    images, (height, width) = len(views[0]), views[0].shape[-2:]
    if not alpha:
        return views, torch.arange(images, device=views[0].device), 1.0
    other = torch.randperm(images, device=views[0].device)
    side = math.sqrt(torch.distributions.Beta(alpha, alpha).sample().item())
    y, x = int(torch.randint(height, ())), int(torch.randint(width, ()))
    h, w = round(side * height / 2), round(side * width / 2)
    rows, columns = slice(max(y - h, 0), y + h), slice(max(x - w, 0), x + w)
    pasted = torch.zeros(height, width, dtype=torch.bool)
    pasted[rows, columns] = True
    share = 1 - pasted.float().mean().item()
    if share < 0.5:
        pasted, share = ~pasted, 1 - share
    pasted = pasted.to(views[0].device)
    return [torch.where(pasted, view[other], view) for view in views], other, share
