"""Softmax attention over a queue whose rows are keys and values: all that SCE, ReSSL and MoCo need of it.

With similarities ``s_ij = scale_i q_i . queue_j``::

    lse_i = log sum_j exp(s_ij)            out_i = sum_j exp(s_ij - lse_i) queue_j            d lse_i / d q_i = scale_i out_i

so the gradient of ``lse`` is known when the forward pass ends, and no row as long as the queue is ever kept. A key that is not
in the queue (the image's own, at logit 0 in SCE's released code) joins by its logit: ``torch.logaddexp(lse, logit)``.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solo.kernels.dispatch import accumulator, uses_triton

_BLOCK = 2048       # keys at a time


def queue_attention(q: Tensor, queue: Tensor, scale: Tensor, own: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of rows over a queue; branches of different temperature can share one call.

    Args:
        q: [N, D] rows, taken in the queue's dtype.
        queue: [K, D] keys and values, constants.
        scale: [N] what each row's similarities are multiplied with, 1 / temperature; constants.
        own: leave out, for row i, key ``own + i``.

    Returns:
        ``out`` [N, D], a constant, and ``lse`` [N], differentiable in ``q``; float32 (float64 for a float64 queue). A row
        without any key has 0 and -inf.
    """
    out, lse = _QueueAttention.apply(q, queue, scale, own)
    return out, lse


class _QueueAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, queue: Tensor, scale: Tensor, own: int | None) -> tuple[Tensor, Tensor]:
        out, lse = attend(q, queue, scale, own)
        ctx.mark_non_differentiable(out)
        ctx.save_for_backward(out, scale)
        ctx.dtype = q.dtype
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out, scale = ctx.saved_tensors
        return ((grad * scale)[:, None] * out).to(ctx.dtype), None, None, None


def attend(q: Tensor, queue: Tensor, scale: Tensor, own: int | None = None) -> tuple[Tensor, Tensor]:
    """`queue_attention` without gradient: by Triton where it can run."""
    if not uses_triton(q, queue):
        return attend_eager(q, queue, scale, own)
    from solo.kernels import triton_attention

    return triton_attention.attend(q, queue, scale, own)


def attend_eager(q: Tensor, queue: Tensor, scale: Tensor, own: int | None = None) -> tuple[Tensor, Tensor]:
    """The twin of the kernel: blocks of the queue, one after the other."""
    dtype = accumulator(queue.dtype)
    rows = q.to(queue.dtype).to(dtype)                                                              # [N, D]
    scale = scale.to(dtype)[:, None]                                                                # [N, 1]
    number = torch.arange(len(queue), device=queue.device)                                          # [K]
    top = rows.new_full((len(rows),), -math.inf)                                                    # [N]
    total, mean = torch.zeros_like(top), torch.zeros_like(rows)                                     # [N], [N, D]
    for start in range(0, len(queue), _BLOCK):
        block = queue[start : start + _BLOCK].to(dtype)                                             # [b, D]
        s = (rows @ block.T).mul_(scale)                                                            # [N, b]
        if own is not None:
            s.masked_fill_(number[start : start + _BLOCK] == number[own : own + len(rows), None], -math.inf)
        above = torch.maximum(top, s.amax(1))
        shift = above.masked_fill(above == -math.inf, 0)                                            # -inf - -inf is not 0
        s = s.sub_(shift[:, None]).exp_()
        shrink = (top - shift).exp()
        total = total * shrink + s.sum(1)
        mean = torch.addmm(mean * shrink[:, None], s, block)
        top = above
    return mean / total.masked_fill(total == 0, 1)[:, None], top + total.log()
