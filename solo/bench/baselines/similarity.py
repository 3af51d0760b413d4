"""The similarity losses and look-ups as the methods' own projects write them: every similarity at once, in memory."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sce(q: Tensor, k: Tensor, queue: Tensor, t: float = 0.1, tm: float = 0.07, coeff: float = 0.5) -> Tensor:
    """SCE: q [N, D], k [N, D] and the queue [K, D] of unit rows; the target's own logit is 0, as released."""
    with torch.no_grad():
        own = torch.zeros(len(k), 1, device=k.device)
        target = (torch.cat([own, k @ queue.T], 1) / tm).softmax(1)                                 # [N, 1 + K]
        positive = torch.zeros_like(target)
        positive[:, 0] = 1
        target = coeff * positive + (1 - coeff) * target
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / t                          # [N, 1 + K]
    return -(target * logits.log_softmax(1)).sum(1).mean()


def nt_xent(z: Tensor, t: float = 0.2) -> Tensor:
    """NT-Xent by masks over exponentials: z [2 N, D] unit rows, the views one after the other."""
    n = len(z) // 2
    similarity = (z @ z.T / t).exp()                                                                # [2 N, 2 N]
    index = torch.arange(n, device=z.device).repeat(2)
    positive = index[:, None] == index[None]
    positive.fill_diagonal_(False)
    negative = index[:, None] != index[None]
    pos, neg = (similarity * positive).sum(1), (similarity * negative).sum(1)
    return -(pos / (pos + neg)).log().mean()


@torch.no_grad()
def nearest(views: tuple[Tensor, Tensor], queue: Tensor) -> Tensor:
    """NNCLR: one product and one arg-max per view."""
    return torch.cat([(z @ queue.T).max(1).indices for z in views])[:, None]


@torch.no_grad()
def five_nearest(views: tuple[Tensor, Tensor], queue: Tensor) -> Tensor:
    """All4One: the product once for the nearest and once more for the five."""
    found = []
    for z in views:
        (z @ queue.T).max(1)
        found.append((z @ queue.T).topk(5).indices)
    return torch.cat(found)


def unit(*shape: int, device: str, seed: int) -> Tensor:
    """Random rows of length 1."""
    generator = torch.Generator(device).manual_seed(seed)
    return F.normalize(torch.randn(*shape, device=device, generator=generator), dim=-1)
