"""NT-Xent, the normalised temperature-scaled cross-entropy (Chen et al. 2020, https://arxiv.org/abs/2002.05709)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.dist import gather_packed, rank
from solo.losses.contrast import NTXent
from solo.precision import full_precision


@full_precision
def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1, *, positives: int | None = None) -> Tensor:
    """NT-Xent of each row against the rows of the whole global batch (paper, eq. 1); gradients reach all ranks' rows.

    The positives of a row are the other rows with its index. Where there are several, their exponentials are summed inside the
    logarithm, as solo-learn has it: ``-log(sum_positives / sum_all_others)``.

    Args:
        z: [V * B, D] projections of V views, view after view; normalised here.
        indexes: [V * B] number of the image a row comes from.
        temperature: divides the cosines.
        positives: how many a row has at most; None: counted, for which the host waits for the device.

    Returns:
        Mean loss over the local rows, a scalar; infinite if a row has no positive.
    """
    z = F.normalize(z, dim=-1)
    bank, everyones = gather_packed(z.detach(), indexes)                        # [M, D], [M]
    return NTXent.apply(z, bank, _positives(indexes, everyones, positives), temperature)


def _positives(mine: Tensor, everyones: Tensor, most: int | None) -> Tensor:
    """Row numbers [n, P] in the global batch of each local row's positives, -1 where it has fewer than P.

    Args:
        mine: [n] indexes.
        everyones: [M] indexes.
        most: P, or None for what is needed.
    """
    order = everyones.argsort(stable=True)                                      # [M], rows of one image side by side
    ordered = everyones[order]
    first, end = (torch.searchsorted(ordered, mine, right=right) for right in (False, True))        # [n] each
    count = int((end - first).max()) if most is None else most + 1
    place = first[:, None] + torch.arange(count, device=mine.device)            # [n, P + 1]
    row = order[place.clamp(max=len(order) - 1)]
    itself = torch.arange(len(mine), device=mine.device) + rank() * len(mine)
    row = row.masked_fill((place >= end[:, None]) | (row == itself[:, None]), -1)
    return row.sort(descending=True).values[:, : count - 1]
