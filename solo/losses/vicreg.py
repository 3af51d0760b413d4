"""VICReg: variance, invariance, covariance (Bardes et al. 2022, https://arxiv.org/abs/2105.04906)."""

import torch.nn.functional as F
from torch import Tensor

from solo.losses.moments import Moments
from solo.precision import full_precision

_EPSILON = 1e-4


@full_precision
def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    """Weighted sum of the mean squared difference of the views, hinges on each feature's standard deviation, and squared
    covariances between features (paper, eq. 6).

    Variance and covariance are those of the rows of all ranks. The hinges of the two views are summed, as solo-learn has it;
    the authors' code takes their mean.

    Args:
        z1, z2: [B, D] projections of the two views.
        sim_loss_weight, var_loss_weight, cov_loss_weight: lambda, mu and nu of the paper.

    Returns:
        A scalar; its invariance is the mean over the local rows.
    """
    moments = Moments(z1, z2)
    degrees, d = moments.count - 1, z1.shape[1]
    variances = moments.xx / degrees, moments.yy / degrees                                          # [D] each
    hinges = sum((1 - (variance + _EPSILON).sqrt()).relu().mean() for variance in variances)
    covariances = sum(
        (squared / degrees**2 - variance.square().sum()) / d
        for squared, variance in zip(moments.squared_own(), variances, strict=True)
    )
    return sim_loss_weight * F.mse_loss(z1, z2) + var_loss_weight * hinges + cov_loss_weight * covariances
