"""The three objectives of All4One (Estepa et al. 2023, https://arxiv.org/abs/2303.09417)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.losses.contrast import info_nce
from solo.precision import full_precision

Pair = tuple[Tensor, Tensor]
_EPSILON = 1e-12    # named deviation: where nothing is wrong, as with all rows 0, the root has a finite gradient


class All4OneTerms(NamedTuple):
    """Scalars: each term as published, and ``loss`` = half their sum."""

    loss: Tensor
    centroid: Tensor
    neighbour: Tensor
    feature: Tensor


def all4one_loss_func(
    centroids: Pair,
    shifted: Pair,
    neighbours: Pair,
    predictions: Pair,
    projections: Pair,
    targets: Pair,
    *,
    temperature: float = 0.2,
    centroid_temperature: float = 0.1,
) -> All4OneTerms:
    """Centroid, neighbour and feature contrast of two views; every argument holds (view 1, view 2), each [B, D].

    Args:
        centroids: transformer output for the sequence of a view's neighbours.
        shifted: transformer output for the sequence that begins with the second predictor's output.
        neighbours: nearest neighbour of each momentum projection; constants.
        predictions: first predictor's outputs.
        projections: online projections, not normalised.
        targets: momentum projections, L2-normalised; constants.
        temperature: of the neighbour term.
        centroid_temperature: of the centroid term; the published code fixes 0.1.
    """
    centroid, neighbour = info_nce(
        (torch.stack(centroids), torch.stack(shifted[::-1]), centroid_temperature),
        (torch.stack(neighbours), torch.stack(predictions[::-1]), temperature),
    )
    feature = feature_loss_func(projections, targets)
    return All4OneTerms((centroid + neighbour + feature) / 2, centroid, neighbour, feature)


@full_precision
def feature_loss_func(projections: Pair, targets: Pair, weight: float = 5.0) -> Tensor:
    """Redundancy reduction between features, ``weight * (on + off)``: the cross-correlation of each momentum view
    with the other online view is drawn to the identity. Columns are normalised over the local batch, not centred.

    Args:
        projections: online projections of the two views, each [B, D].
        targets: momentum projections of the two views, each [B, D].
    """
    (z1, z2), (m1, m2) = projections, targets
    on1, off1 = _identity_errors(_correlation(m1, z2))
    on2, off2 = _identity_errors(_correlation(m2, z1))
    on, off = (on1 + on2) / 2, (off1 + off2) / 2
    return weight * (on.clamp(min=_EPSILON).sqrt() + off.clamp(min=_EPSILON).sqrt())


def _correlation(m: Tensor, z: Tensor) -> Tensor:
    return F.normalize(m, dim=0).T @ F.normalize(z, dim=0)                      # [D, D]


def _identity_errors(c: Tensor) -> Pair:
    """Mean squared distance to the identity of the diagonal and of the rest."""
    d = len(c)
    on = c.diagonal()                                                           # [D]
    off = c.flatten()[:-1].view(d - 1, d + 1)[:, 1:]                            # [D - 1, D], all but the diagonal
    return (on - 1).square().mean(), off.square().mean()
