"""InfoNCE over the global batch: local rows against gathered columns, block by block, with recomputation in the backward pass.

The losses are means over a rank's own rows. A rank's gradient holds what the losses of all ranks do to its rows, as if each
had come back through the gathering: after DDP has averaged, it is the gradient of the mean of the ranks' losses. For that the
others need no more of a rank than its rows, which they have from the forward pass, and one or two numbers per row.

The losses get float32, also under mixed precision. On a GPU ``torch.set_float32_matmul_precision("high")`` has the kernels of
`solo.kernels` multiply in TF32 on tensor cores; by default they take three such products, nearly as exact as float32.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from solo.dist import gather, rank
from solo.kernels import queue_attention, row_logsumexp, weighted_keys
from solo.precision import full_precision

Term = tuple[Tensor, Tensor, float]


@full_precision
def info_nce(*terms: Term) -> list[Tensor]:
    """InfoNCE of several pairs of rows, which share one collective each way.

    Args:
        terms: rows a and keys b, [B, D] or [V, B, D] each, normalised here, and the temperature t. Each a_i is compared with
            the b_j of all ranks, of several views with those of the same view; its positive is this rank's b_i.

    Returns:
        For each term the mean of ``logsumexp_j(a_i . b_j / t) - a_i . b_i / t``, a scalar.

    Raises:
        ValueError: the two of a term have different shapes.
    """
    for a, b, _ in terms:
        if a.shape != b.shape:
            raise ValueError(f"InfoNCE takes rows and keys of one shape, got {list(a.shape)} and {list(b.shape)}")
    rows = [_pairs(F.normalize(a, dim=-1) / t) for a, _, t in terms]                                # [V, B, D] each
    keys = [_pairs(F.normalize(b, dim=-1)) for _, b, _ in terms]
    losses = InfoNCE.apply(torch.cat(rows), torch.cat(keys))                                        # [G]
    return [part.mean() for part in losses.split([len(part) for part in rows])]


def _pairs(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


class InfoNCE(torch.autograd.Function):
    """Mean over i of ``logsumexp_j(a_i . b_j) - a_i . b_i`` for each of G pairs a, b [G, n, D]; j over the rows of all ranks.

    With ``p_ij = softmax_j(a_i . b_j)`` the gradients are ``(sum_j p_ij b_j - b_i) / n`` for a_i, known at the end of the
    forward pass, and ``(sum_i p_ij a_i - a_j) / n`` for b_j, which takes the logsumexps of all ranks.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        pairs, _, width = a.shape
        everyone = gather(torch.cat([*a, *b], dim=1))                                               # [M, 2 G D]
        rows, keys = everyone.view(-1, 2, pairs, width).permute(1, 2, 0, 3)                         # [G, M, D] each
        mean = None
        if ctx.needs_input_grad[0]:
            found = [queue_attention(x, y, 1.0) for x, y in zip(a, keys, strict=True)]
            mean, lse = (torch.stack(each) for each in zip(*found, strict=True))                    # [G, n, D], [G, n]
        else:
            lse = torch.stack([row_logsumexp(x, y, 1.0) for x, y in zip(a, keys, strict=True)])     # [G, n]
        ctx.save_for_backward(a, b, rows, lse, mean)
        return (lse - (a * b).sum(2)).mean(1)

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b, rows, lse, mean = ctx.saved_tensors
        scale = (grad / a.shape[1])[:, None, None]
        for_a = for_b = None
        if mean is not None:
            for_a = scale * (mean - b)
        if ctx.needs_input_grad[1]:
            everyones = gather(lse.T).T                                                             # [G, M]
            pulled = [weighted_keys(x, y, 1.0, None, sums) for x, y, sums in zip(b, rows, everyones, strict=True)]
            for_b = scale * (torch.stack(pulled) - a)
        return for_a, for_b


class NTXent(torch.autograd.Function):
    """Mean over i of ``logsumexp_{j != i}(s_ij) - logsumexp_{j in P(i)}(s_ij)``, ``s_ij = z_i . z_j / t``, j over all ranks.

    s is symmetric, so that row i of the gradient is ``1 / (n t) sum_j [p_ij + p_ji - r_ij - r_ji] z_j`` with p_ij the softmax
    over all j != i and r_ij that over P(i): one product to compute s anew, one to sum up, and both logsumexps of every row.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, bank: Tensor, positives: Tensor, temperature: float) -> Tensor:
        own = rank() * len(z)
        lse = row_logsumexp(z, bank, 1 / temperature, own)                                          # [n]
        s = torch.stack([(z * _rows(bank, index)).sum(1) for index in positives.T], 1) / temperature  # [n, P]
        positive_lse = s.masked_fill(positives < 0, -math.inf).logsumexp(1)                         # [n]
        ctx.save_for_backward(z, bank, positives, torch.stack([lse, positive_lse], 1))
        ctx.temperature, ctx.own = temperature, own
        return (lse - positive_lse).mean()

    @staticmethod
    @once_differentiable
    @full_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        z, bank, positives, local = ctx.saved_tensors
        t = ctx.temperature
        lse, positive_lse = gather(local).unbind(1)                                                 # [M] each
        out = weighted_keys(z, bank, 1 / t, local[:, 0], lse, ctx.own)                              # [n, D]
        for index in positives.T:
            others = _rows(bank, index)                                                             # [n, D]
            s = (z * others).sum(1) / t                                                             # [n]
            pull = (s - local[:, 1]).exp() + (s - _rows(positive_lse, index)).exp()
            out.addcmul_(others, pull.where(index >= 0, 0.0)[:, None], value=-1)
        return out.mul_(grad / (len(z) * t)), None, None, None


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """The rows of x at ``index``; any where it is -1."""
    return x[index.clamp(min=0)]
