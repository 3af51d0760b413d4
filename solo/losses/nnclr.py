"""Nearest-neighbour contrastive loss (Dwibedi et al. 2021, https://arxiv.org/abs/2104.14548)."""

from torch import Tensor

from solo.losses.contrast import info_nce


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """InfoNCE of each neighbour against the predictions of the whole global batch (paper, eq. 4).

    Gradients reach both, of all ranks; row i's positive is this rank's ``p_i``.

    Args:
        nn: [B, D] neighbours of one view's projections; normalised here. [V, B, D]: of several views, each by itself.
        p: [B, D] or [V, B, D] predictions of the other view; normalised here.
        temperature: divides the cosines.

    Returns:
        Mean loss over the local rows, a scalar.
    """
    return info_nce((nn, p, temperature))[0]
