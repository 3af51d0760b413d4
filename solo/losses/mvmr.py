"""MV-MR: invariance, variance and distance correlation (Kinakh et al. 2023, https://arxiv.org/abs/2303.12130)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.precision import full_precision

Features = Tensor | Iterable[Tensor]    # [N, F], or its columns in blocks [N, f]
Sign = Literal["paper", "released"]

SCALE = 32.0        # published divisor of embeddings and most representations; the clamp makes it matter
_CLAMP = 1e-4       # smallest squared distance, as published
_EPSILON = 1e-12    # named deviation: a constant embedding has a finite loss and gradient
WIDTH = 1 << 14    # columns that are held at once


class MVMRTerms(NamedTuple):
    """Scalars: ``loss``, its weighted sum, and the terms without their weights.

    Attributes:
        invariance: mean squared difference of the two embeddings.
        variance: hinges on the standard deviation of each dimension, of both embeddings.
        views: distance correlation of the two embeddings.
        representations: distance correlation of each representation and the augmented view's embedding.
        teacher: the same for the teacher; None without one.
    """

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    views: Tensor
    representations: dict[str, Tensor]
    teacher: Tensor | None


@full_precision
def mvmr_loss_func(
    z: Tensor,
    z_original: Tensor,
    representations: Mapping[str, Features],
    teacher: Features | None = None,
    *,
    sign: Sign = "paper",
    std_margin: float = 1.0,
    invariance_weight: float = 1.0,
    variance_weight: float = 1.0,
    views_weight: float = 1.0,
    representation_weights: Mapping[str, float] | None = None,
    teacher_weight: float = 1.0,
) -> MVMRTerms:
    """The objective of MV-MR over the local batch; every weight is 1 as published.

    Args:
        z: [N, D] embeddings of the augmented views; divided by `SCALE` before distances are taken.
        z_original: [N, D] embeddings of the images as they are; likewise.
        representations: name -> features of the images as they are; constants, in the scale they have.
        teacher: features of the images from another network; constants, divided by `SCALE`.
        sign: ``paper`` adds 1 - dCor of each representation, which draws the embedding to it; ``released`` adds dCor,
            as the published code does. Views and teacher have 1 - dCor in both.
        std_margin: standard deviation below which a dimension is pushed apart.
        representation_weights: of representations whose weight is not 1.

    Raises:
        ValueError: a weight is for no representation, or a representation has no features.
    """
    weights = {**dict.fromkeys(representations, 1.0), **(representation_weights or {})}
    if unknown := sorted(set(weights) - set(representations)):
        raise ValueError(f"weights for {unknown}, but the representations are {sorted(representations)}")
    spread = _spread(z / SCALE)
    with torch.no_grad():
        constants = {name: _spread(features) for name, features in representations.items()}
        frozen = None if teacher is None else _spread(block / SCALE for block in _columns(teacher))

    invariance = F.mse_loss(z, z_original)
    variance = _hinge(z, std_margin) + _hinge(z_original, std_margin)
    views = _correlation(_spread(z_original / SCALE), spread)
    dependence = {name: _correlation(constant, spread) for name, constant in constants.items()}
    distilled = None if frozen is None else _correlation(frozen, spread)

    loss = invariance_weight * invariance + variance_weight * variance + views_weight * (1 - views)
    for name, value in dependence.items():
        loss = loss + weights[name] * (1 - value if sign == "paper" else value)
    if distilled is not None:
        loss = loss + teacher_weight * (1 - distilled)
    return MVMRTerms(loss, invariance, variance, views, dependence, distilled)


@full_precision
def distance_correlation(x: Features, z: Features) -> Tensor:
    """Distance correlation (Szekely et al. 2007) of two samples: 0 when independent, 1 when one is the other, scaled.

    The biased estimate, its root taken, of distances of at least 0.01, as the published code has it: because of that
    bound the scale matters, and close to it the gradient ends. In a batch all of whose rows are equal it is about 0.

    Args:
        x: [N, F] features of N samples, or an iterable of their columns in blocks [N, f].
        z: the same for the other side; gradients reach both.

    Returns:
        A scalar.
    """
    return _correlation(_spread(x), _spread(z))


class _Spread(NamedTuple):
    """Doubly centred distances [N, N] and the mean of their squares."""

    centred: Tensor
    variance: Tensor


def _spread(features: Features) -> _Spread:
    d = _distances(features)                                                    # [N, N]
    centred = d - d.mean(0) - d.mean(1, keepdim=True) + d.mean()
    return _Spread(centred, centred.square().mean())


def _correlation(x: _Spread, z: _Spread) -> Tensor:
    scale = (x.variance.clamp(min=_EPSILON) * z.variance.clamp(min=_EPSILON)).sqrt()
    return ((x.centred * z.centred).mean() / scale).clamp(min=_EPSILON).sqrt()


def _distances(features: Features) -> Tensor:
    """Euclidean distances [N, N] from a Gram matrix that is summed block by block."""
    gram = sum(block @ block.T for block in _columns(features))                 # [N, N]
    if not isinstance(gram, Tensor):
        raise ValueError("a representation must have features, got no block of them")
    norms = gram.diagonal()
    return (norms[:, None] + norms - 2 * gram).clamp(min=_CLAMP).sqrt()


def _columns(features: Features) -> Iterator[Tensor]:
    """Blocks of at most `WIDTH` centred columns: no distance changes, and float32 keeps its digits."""
    for block in (features,) if isinstance(features, Tensor) else features:
        for columns in block.split(WIDTH, dim=1):
            columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
            yield columns - columns.mean(0)


def _hinge(z: Tensor, margin: float) -> Tensor:
    return (margin - z.var(0).clamp(min=_EPSILON).sqrt()).relu().mean()
