"""Softmax attention over keys that are values too: all that SCE, ReSSL and MoCo need of a queue.

With similarities ``s_ij = scale_i q_i . queue_j``::

    lse_i = log sum_j exp(s_ij)            out_i = sum_j exp(s_ij - lse_i) queue_j            d lse_i / d q_i = scale_i out_i

so the gradient of ``lse`` is known when the forward pass ends, and no row as long as the queue is ever kept. A key that is not
in the queue (the image's own, at logit 0 in SCE's released code) joins by its logit: ``torch.logaddexp(lse, logit)``.

`attend_eager` is the eager form, `solo.kernels.triton_attention` the Triton form.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solo.kernels.blocks import finite, parts, scaled, similarities
from solo.kernels.dispatch import accumulator, uses_triton


def queue_attention(q: Tensor, queue: Tensor, scale: Tensor | float, own: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of rows over a queue; branches of different temperature can share one call.

    Args:
        q: [N, D] rows, taken in the queue's dtype.
        queue: [K, D] keys and values, constants.
        scale: what similarities are multiplied with, 1 / temperature; [N] one of each row, or one number.
        own: leave out, for row i, key ``own + i``.

    Returns:
        ``out`` [N, D], a constant, and ``lse`` [N], differentiable in ``q``; float32 (float64 for a float64 queue). A row
        without any key has 0 and -inf.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full((len(q),), scale, dtype=accumulator(queue.dtype), device=q.device)
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
    """A running maximum, and sums that shrink when it grows."""
    rows = scaled(q, queue, scale[:, None])                                                         # [N, D]
    mean, lse = torch.empty_like(rows), rows.new_empty(len(rows))                                   # [N, D], [N]
    for part in parts(rows):
        top = rows.new_full((len(rows[part]),), -math.inf)                                          # [n]
        total, sums = torch.zeros_like(top), torch.zeros_like(rows[part])                           # [n], [n, D]
        for s, block, _ in similarities(rows, part, queue, own):
            above = torch.maximum(top, s.amax(1))
            shift = finite(above)
            weights = s.sub_(shift[:, None]).exp_()                                                 # [n, b]
            shrink = (top - shift).exp()
            total = total * shrink + weights.sum(1)
            sums = torch.addmm(sums * shrink[:, None], weights, block)
            top = above
        mean[part], lse[part] = sums / total.masked_fill(total == 0, 1)[:, None], top + total.log()
    return mean, lse
