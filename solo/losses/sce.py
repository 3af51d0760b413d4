"""Similarity contrastive estimation (Denize et al. 2023, https://arxiv.org/abs/2111.14585) without its similarity matrices.

With online similarities ``a = q keys^T / temperature`` and a target distribution ``w`` over the same keys, the loss of a row
is ``-sum_j w_j log softmax(a)_j = logsumexp(a) - q . t / temperature`` where ``t = w keys``. The keys are constants, so ``t``
[N, D] is all that is needed of a target view, and the gradient of ``logsumexp(a)`` is ``softmax(a) keys / temperature``. Both
are softmax attention over the keys: taken block by block, they leave nothing as long as the queue in memory.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.dist import gather, rank
from solo.kernels import queue_attention
from solo.precision import full_precision


def sce_loss_func(
    q: Tensor,
    k: Tensor,
    queue: Tensor | None,
    *,
    temperature: float = 0.1,
    temperature_m: float = 0.07,
    coeff: float = 0.5,
    mask_self: bool = False,
    in_batch: bool = False,
) -> Tensor:
    """Cross-entropy between each image's soft target and its online similarities, as in the paper.

    The keys of row i are ``k_i`` itself and the queue's rows; its target is ``coeff`` on itself and ``1 - coeff`` shared out
    by ``softmax(k_i keys^T / temperature_m)``. ``coeff=1`` is MoCo's InfoNCE; ``coeff=0`` with ``mask_self`` is ReSSL's
    relation loss, but for the image itself, which here is one more key of the online side.

    Args:
        q: [N, D] online predictions; normalised here.
        k: [N, D] target projections of another view, constants; normalised here.
        queue: [K, D] past targets, taken as they are, or None.
        temperature: of the online similarities.
        temperature_m: of the target similarities.
        coeff: lambda, in 0..1.
        mask_self: the image is left out of its own target similarities, as in the paper. Without it that similarity is 0,
            as in the released code: the positive weighs ``(1 - coeff) / (1 + sum_j exp(k_i . queue_j / temperature_m))`` more.
        in_batch: the targets of the other images of the global batch are keys too.

    Returns:
        Mean loss over the N local rows, a scalar.
    """
    return sce_multicrop_loss_func(
        [q], [k], queue, [(0, 0)],
        temperature=temperature, temperature_m=temperature_m, coeff=coeff, mask_self=mask_self, in_batch=in_batch,
    )


@full_precision
def sce_multicrop_loss_func(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    queue: Tensor | None,
    pairs: Sequence[tuple[int, int]],
    *,
    temperature: float = 0.1,
    temperature_m: float = 0.07,
    coeff: float = 0.5,
    mask_self: bool = False,
    in_batch: bool = False,
) -> Tensor:
    """Mean of `sce_loss_func` over pairs of views; each view meets the queue once, in however many pairs it is.

    Args:
        q: online predictions of V views, each [N, D].
        k: target projections of G views, each [N, D].
        queue: as for `sce_loss_func`, like the rest.
        pairs: (number in ``k``, number in ``q``).

    Raises:
        ValueError: there is nothing to compare with.
    """
    if queue is None and not in_batch:
        raise ValueError("no keys to compare with: give a queue or set in_batch=True")
    online = F.normalize(torch.stack(list(q)), dim=-1)                                              # [V, N, D]
    with torch.no_grad():
        own = F.normalize(torch.stack(list(k)), dim=-1)                                             # [G, N, D]
        batch = gather(own.transpose(0, 1)).unbind(1) if in_batch else None                         # G x [world * N, D]
    past = None if queue is None else _over_queue(online, own, queue, temperature, temperature_m)
    targets = _targets(own, past and past.targets, batch, temperature_m, coeff, mask_self)          # [G, N, D]
    losses = []
    for g, v in pairs:
        parts = [(online[v] * own[g]).sum(-1) / temperature]                                        # each [N]
        if past is not None:
            parts.append(past.online[v])
        if batch is not None:
            parts.append(_over_batch(online[v], batch[g], temperature)[1])
        positive = (online[v] * targets[g]).sum(-1) / temperature                                   # [N]
        losses.append((torch.stack(parts).logsumexp(0) - positive).mean())
    return torch.stack(losses).mean()


class _Past(NamedTuple):
    """What the views see of the queue: logsumexps [V, N] of the online ones, mean keys and logsumexps of the targets."""

    online: Tensor
    targets: tuple[Tensor, Tensor]


def _over_queue(online: Tensor, own: Tensor, queue: Tensor, temperature: float, temperature_m: float) -> _Past:
    """All views over the queue in one call: online [V, N, D], own [G, N, D]."""
    rows = torch.cat([online, own]).flatten(0, 1)                                                   # [(V + G) N, D]
    views, n, d = len(online), *own.shape[1:]
    scale = torch.cat([own.new_full((len(view), n), 1 / t) for view, t in ((online, temperature), (own, temperature_m))])
    mean, lse = queue_attention(rows, queue, scale.flatten())
    mean, lse = mean.view(-1, n, d), lse.view(-1, n)
    return _Past(lse[:views], (mean[views:], lse[views:].detach()))


def _over_batch(rows: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One view [N, D] over the other images of the global batch [world * N, D]."""
    return queue_attention(rows, keys, 1 / temperature, rank() * len(rows))


@torch.no_grad()
def _targets(
    own: Tensor, past: tuple[Tensor, Tensor] | None, batch: Sequence[Tensor] | None, temperature: float, coeff: float,
    mask_self: bool,
) -> Tensor:
    """The mean of each row's keys under its target distribution, [G, N, D]."""
    parts = [] if mask_self else [(own, own.new_zeros(own.shape[:-1]))]     # itself, at similarity 0
    if past is not None:
        parts.append(past)
    if batch is not None:
        views = [_over_batch(rows, keys, temperature) for rows, keys in zip(own, batch, strict=True)]
        means, sums = zip(*views, strict=True)
        parts.append((torch.stack(means), torch.stack(sums)))
    mean, lse = (torch.stack(part) for part in zip(*parts, strict=True))                            # [P, G, N, D], [P, G, N]
    similar = (lse.softmax(0)[..., None] * mean).sum(0)                                             # [G, N, D]
    return coeff * own + (1 - coeff) * similar
