"""Nearest-neighbour contrastive loss (Dwibedi et al. 2021, https://arxiv.org/abs/2104.14548)."""

import torch.nn.functional as F
from torch import Tensor

from solo.losses.contrast import InfoNCE
from solo.precision import full_precision


@full_precision
def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of each neighbour against the predictions of the whole global batch (paper, eq. 4).

    Gradients reach both, of all ranks; row i's positive is this rank's ``p_i``.

    Args:
        nn: [B, D] neighbours of one view's projections; normalised here.
        p: [B, D] predictions of the other view; normalised here.
        temperature: divides the cosines.

    Returns:
        Mean loss over the B local rows, a scalar.
    """
    return InfoNCE.apply(F.normalize(nn, dim=-1), F.normalize(p, dim=-1), temperature)
