"""MV-MR: multi-views and multi-representations (Kinakh et al. 2023, https://arxiv.org/abs/2303.12130)."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo.batch import Batch
from solo.losses import mvmr_loss_func
from solo.losses.mvmr import Sign
from solo.methods.base import METHODS, Method
from solo.nn import mlp
from solo.ranges import require
from solo.registry import UnknownName
from solo.representations import REPRESENTATIONS, represent
from solo.towers import Tower, TowerConfig

PUBLISHED = ("raw", "scattering", "augmented", "hog", "local_std")


@METHODS.register("mvmr")
class MVMR(Method):
    """The embedding of an augmented view depends on that of the image as it is, and on hand-crafted representations of it
    or on a frozen network's.

    The first view is the image as it is; representations are those of its normalised pixels, as published.
    """

    @dataclass(kw_only=True)
    class Config:
        """Published values.

        ``representations`` maps the name of each that is used to its weight; ``teacher`` is a tower to distil from,
        published with ``representations: {}``. ``sign: released`` is the published code, which *lowers* the dependence on
        the representations; ``paper`` raises it.
        """

        proj_hidden_dim: int = 8192
        proj_output_dim: int = 8192
        normalize_z: bool = False
        std_margin: float = 1.0
        sign: Sign = "paper"
        invariance_weight: float = 1.0
        variance_weight: float = 1.0
        views_weight: float = 1.0
        representations: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PUBLISHED, 1.0))
        teacher: TowerConfig | None = None
        teacher_weight: float = 1.0

        def __post_init__(self) -> None:
            problems = []
            for name, weight in self.representations.items():
                try:
                    REPRESENTATIONS[name]
                except UnknownName as error:
                    problems.append(f"representations: {error}")
                if not 0 <= weight < math.inf:
                    problems.append(f"representations.{name} must be at least 0, got {weight}")
            terms = (self.invariance_weight, self.variance_weight, self.views_weight, *self.representations.values())
            if not any((*terms, self.teacher and self.teacher_weight)):
                problems.append("invariance_weight and all other weights are 0: nothing is left to learn from")
            if self.teacher is None and self.teacher_weight != 1:
                problems.append(f"teacher_weight={self.teacher_weight:g} weighs nothing: there is no teacher")
            weights = "invariance_weight variance_weight views_weight teacher_weight"
            require(self, at_least_1="proj_hidden_dim proj_output_dim", at_least_0=f"std_margin {weights}", also=problems)

    originals = 1
    local_terms = {"loss": 1.0}         # as published

    def __init__(self, backbone: nn.Module, config: Config) -> None:
        super().__init__(backbone, config)
        hidden = config.proj_hidden_dim
        self.projector = mlp(self.dim, hidden, hidden, config.proj_output_dim, bias=False)
        self.teacher = Tower(config.teacher) if config.teacher else None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        config, original = self.config, batch.views[0]
        f_original, f = self.each(self.backbone, batch.views)                           # [B, dim]
        z_original, z = self.each(self.projector, (f_original, f))                      # [B, D]
        if config.normalize_z:
            z_original, z = F.normalize(z_original, dim=-1), F.normalize(z, dim=-1)
        weights = {name: weight for name, weight in config.representations.items() if weight}
        terms = mvmr_loss_func(
            z, z_original, {name: represent(name, original) for name in weights},
            self.teacher(self.pixels(original)) if self.teacher else None,
            sign=config.sign, std_margin=config.std_margin,
            invariance_weight=config.invariance_weight, variance_weight=config.variance_weight,
            views_weight=config.views_weight, representation_weights=weights, teacher_weight=config.teacher_weight,
        )
        dependence = {"views": terms.views, **terms.representations}
        if terms.teacher is not None:
            dependence["teacher"] = terms.teacher
        logged = {"invariance": terms.invariance, "variance": terms.variance}
        logged |= {f"dcor_{name}": value for name, value in dependence.items()}
        return {"loss": terms.loss, "feats": torch.cat([f_original, f]), **logged}
