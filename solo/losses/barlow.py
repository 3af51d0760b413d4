"""Barlow Twins: redundancy reduction (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230)."""

from torch import Tensor

from solo.losses.moments import Moments
from solo.precision import full_precision

_EPSILON = 1e-5     # of the BatchNorm that standardises in the published code


@full_precision
def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """``scale_loss * (sum_i (1 - C_ii)^2 + lamb * sum_{i != j} C_ij^2)`` with C the cross-correlation (paper, eq. 1 and 2).

    Features are standardised, and C is taken, over the rows of all ranks. Named deviation: the published code standardises over
    each rank's own rows, and leaves a gradient that DDP's averaging makes smaller the more ranks there are.

    Args:
        z1, z2: [B, D] projections of the two views.
        lamb: weight of the off-diagonal.
        scale_loss: weight of everything.

    Returns:
        A scalar, the same on all ranks.
    """
    moments = Moments(z1, z2)
    n = moments.count
    scale1, scale2 = ((sums / n + _EPSILON).rsqrt() for sums in (moments.xx, moments.yy))           # [D] each
    return scale_loss * _redundancy(moments, scale1, scale2, lamb)


def _redundancy(moments: Moments, scale1: Tensor, scale2: Tensor, lamb: float) -> Tensor:
    n = moments.count
    diagonal = moments.xy * scale1 * scale2 / n                                                     # [D], C_ii
    off = moments.squared_cross(scale1, scale2) / n**2 - diagonal.square().sum()
    return (diagonal - 1).square().sum() + lamb * off
