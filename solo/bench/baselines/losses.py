"""The peers' loss formulas, dense as the field writes them: every similarity in one matrix, gradients by autograd."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def sce(q: Tensor, k: Tensor, queue: Tensor, temperature: float, temperature_m: float, coeff: float) -> Tensor:
    """SCE over a queue: target and online distributions over 1 + K keys (Denize et al. 2023, eq. 5)."""
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    online = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / temperature            # [N, 1 + K]
    with torch.no_grad():
        similar = torch.cat([k.new_zeros(len(k), 1), k @ queue.T / temperature_m], dim=1).softmax(1)
        target = (1 - coeff) * similar
        target[:, 0] += coeff
    return -(target * online.log_softmax(1)).sum(1).mean()


def barlow(z1: Tensor, z2: Tensor, lamb: float, scale_loss: float) -> Tensor:
    """Barlow Twins with its D x D cross-correlation (Zbontar et al. 2021, algorithm 1)."""
    n = len(z1)
    c = F.batch_norm(z1, None, None, training=True).T @ F.batch_norm(z2, None, None, training=True) / n     # [D, D]
    return scale_loss * ((c.diagonal() - 1).square().sum() + lamb * _off_diagonal(c).square().sum())


def vicreg(z1: Tensor, z2: Tensor, similarity: float, variance: float, covariance: float) -> Tensor:
    """VICReg with a D x D covariance per view (Bardes et al. 2022, algorithm 1), hinges summed over the views."""
    n, d = z1.shape
    loss = similarity * F.mse_loss(z1, z2)
    for z in (z1, z2):
        loss = loss + variance * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        x = z - z.mean(0)
        loss = loss + covariance * _off_diagonal(x.T @ x / (n - 1)).square().sum() / d
    return loss


def simclr(z: Tensor, indexes: Tensor, temperature: float) -> Tensor:
    """NT-Xent with masks of positives and negatives (Chen et al. 2020, eq. 1), over the rows of all ranks."""
    z = F.normalize(z, dim=1)
    everyone, ids = (_gathered(z), _gathered(indexes)) if dist.is_initialized() else (z, indexes)
    first = dist.get_rank() * len(z) if dist.is_initialized() else 0
    similarity = torch.exp(z @ everyone.T / temperature)                                            # [n, M]
    same = indexes[:, None] == ids
    positives = same & (first + torch.arange(len(z))[:, None] != torch.arange(len(everyone)))
    positive = (similarity * positives).sum(1)
    negative = (similarity * ~same).sum(1)
    return -torch.log(positive / (positive + negative)).mean()


def nnclr(nn: Tensor, p: Tensor, temperature: float) -> Tensor:
    """NNCLR's term of one direction: cross-entropy over all predictions (Dwibedi et al. 2021, eq. 2)."""
    logits = F.normalize(nn, dim=1) @ F.normalize(p, dim=1).T / temperature                         # [n, n]
    return F.cross_entropy(logits, torch.arange(len(p)))


def nearest(z: Tensor, queue: Tensor) -> Tensor:
    """NNCLR's lookup: the arg-max of one row of N x K (Dwibedi et al. 2021, eq. 2)."""
    return (z @ queue.T).max(dim=1).indices


def nearest_five(z: Tensor, queue: Tensor) -> Tensor:
    """All4One's lookup: the arg-max, for the accuracy, and then the five largest of the same product, computed twice."""
    nearest(z, queue)
    return (z @ queue.T).topk(5, dim=1).indices


def _off_diagonal(c: Tensor) -> Tensor:
    d = len(c)
    return c.flatten()[:-1].view(d - 1, d + 1)[:, 1:]


class _Gather(torch.autograd.Function):
    """All ranks' rows; the gradient of all of them is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        rows = len(grad) // dist.get_world_size()
        return grad[dist.get_rank() * rows : (dist.get_rank() + 1) * rows]


def _gathered(x: Tensor) -> Tensor:
    return _Gather.apply(x) if x.is_floating_point() else _Gather.forward(None, x)
