"""Softmax of rows over columns (InfoNCE, NT-Xent), forward and backward, without its matrix.

With ``s_ij = scale row_i . column_j``, ``own`` columns left out and ``p_ij = exp(s_ij - lse_i)``, an upstream gradient g of
``lse`` and h of the positives' logits ``s_i,pos(i)`` gives::

    d row_i    = scale sum_j (g_i p_ij + h_i [j = pos(i)]) column_j
    d column_j = scale sum_i (g_i p_ij + h_i [j = pos(i)]) row_i

Both are one operation, `pull`: an output row a sums over all b, weighted by what a's softmax says of b, by what b's says of
a, or by both (NT-Xent, where rows and columns are the same tensor). The weights are made again from two numbers per row,
``top`` and ``total``, so the ranks of a process group need to exchange no more than these: with rows of this rank as ``a``
and the gathered rows as ``b``, the gradient of the local rows is complete and no gradient has to be summed over ranks.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solo.kernels.dispatch import accumulator, uses_triton

_BLOCK = 1024       # rows at a time
LOG2E = 1 / math.log(2)


class Statistics(NamedTuple):
    """What a forward pass keeps of each row, [N] each.

    Attributes:
        top: largest ``s_ij log2(e)``; logits are kept to base 2, as the exponentials are.
        total: sum over j of ``2 ** (s_ij log2(e) - top)``.
        match: the positive's logit.
    """

    top: Tensor
    total: Tensor
    match: Tensor

    @property
    def lse(self) -> Tensor:
        """[N] ``log sum_j exp(s_ij)``."""
        return (self.top + self.total.log2()) * math.log(2)


class Side(NamedTuple):
    """One set of rows in the backward pass: their softmax over the other set and its upstream gradients, [N] each.

    Attributes:
        positive, own: as for `row_statistics`.
        top, total: of `Statistics`.
        grad_lse, grad_match: gradients of ``lse`` and ``match``.
    """

    positive: Tensor
    own: Tensor
    top: Tensor
    total: Tensor
    grad_lse: Tensor
    grad_match: Tensor


def info_nce(
    rows: Tensor, columns: Tensor | None, scale: float, positive: Tensor, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``lse`` and the positives' logits of each row, differentiable; their difference is the row's InfoNCE loss.

    Args:
        rows: [N, D].
        columns: [M, D], taken as they are; None: the rows themselves, whose gradient is then made in one pass.
        scale: 1 / temperature.
        positive: [N] number of each row's positive column.
        own: [N] number of a column that the row's softmax leaves out; None: none.

    Returns:
        [N] and [N], float32 (float64 for float64 rows).
    """
    own = torch.full_like(positive, -1) if own is None else own
    lse, match = _InfoNCE.apply(rows, columns, scale, positive, own)
    return lse, match


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, columns: Tensor | None, scale: float, positive: Tensor, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        found = row_statistics(rows, rows if columns is None else columns, scale, positive, own)
        ctx.save_for_backward(rows, columns, positive, own, found.top, found.total)
        ctx.scale = scale
        return found.lse, found.match

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor, grad_match: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (rows, columns, positive, own, top, total), scale = ctx.saved_tensors, ctx.scale
        side = Side(positive, own, top, total, grad_lse, grad_match)
        if columns is None:
            return pull(rows, rows, scale, side, side).to(rows.dtype), None, None, None, None
        of_rows = pull(rows, columns, scale, side, None).to(rows.dtype) if ctx.needs_input_grad[0] else None
        of_columns = pull(columns, rows, scale, None, side).to(columns.dtype) if ctx.needs_input_grad[1] else None
        return of_rows, of_columns, None, None, None


def row_statistics(rows: Tensor, columns: Tensor, scale: float, positive: Tensor, own: Tensor) -> Statistics:
    """The forward pass.

    Args:
        rows: [N, D], taken in the columns' dtype.
        columns: [M, D].
        scale: 1 / temperature.
        positive: [N] number of each row's positive column.
        own: [N] number of the column that a row leaves out, -1 for none.
    """
    if not uses_triton(rows, columns):
        return row_statistics_eager(rows, columns, scale, positive, own)
    from solo.kernels import triton_contrast

    return triton_contrast.row_statistics(rows, columns, scale, positive, own)


def row_statistics_eager(rows: Tensor, columns: Tensor, scale: float, positive: Tensor, own: Tensor) -> Statistics:
    """The twin of the forward kernel: blocks of rows against all columns."""
    dtype = accumulator(columns.dtype)
    rows, wide = rows.to(columns.dtype).to(dtype), columns.to(dtype)
    number = torch.arange(len(columns), device=columns.device)                                      # [M]
    tops, totals = [], []
    for x, out in zip(rows.split(_BLOCK), own.split(_BLOCK), strict=True):
        t = (x @ wide.T).mul_(scale * LOG2E).masked_fill_(number == out[:, None], -math.inf)        # [b, M]
        top = t.amax(1)
        tops.append(top)
        totals.append(t.sub_(top.masked_fill(top == -math.inf, 0)[:, None]).exp2_().sum(1))
    return Statistics(torch.cat(tops), torch.cat(totals), (rows * wide[positive]).sum(1) * scale)


def pull(a: Tensor, b: Tensor, scale: float, of_a: Side | None, of_b: Side | None) -> Tensor:
    """The backward pass: the gradient of rows ``a`` from the softmaxes of ``a`` over ``b``, of ``b`` over ``a``, or both.

    Args:
        a: [A, D], taken in the dtype of ``b``.
        b: [B, D].
        scale: 1 / temperature.
        of_a: the rows ``a`` as a side whose columns are ``b``.
        of_b: the rows ``b`` as a side whose columns are ``a``.

    Returns:
        [A, D] float32 (float64 for float64).
    """
    sides = [side for side in (of_a, of_b) if side is not None]
    peak = torch.stack([grad.abs().amax() for side in sides for grad in (side.grad_lse, side.grad_match)]).amax()
    peak = peak.clamp_min(torch.finfo(peak.dtype).tiny)             # weights of about 1: those of float16 must not vanish
    of_a, of_b = _scaled(of_a, 1 / peak), _scaled(of_b, 1 / peak)
    if not uses_triton(a, b):
        return pull_eager(a, b, scale, of_a, of_b) * peak
    from solo.kernels import triton_contrast

    return triton_contrast.pull(a, b, scale, of_a, of_b) * peak


def _scaled(side: Side | None, factor: Tensor) -> Side | None:
    return side and side._replace(grad_lse=side.grad_lse * factor, grad_match=side.grad_match * factor)


def pull_eager(a: Tensor, b: Tensor, scale: float, of_a: Side | None, of_b: Side | None) -> Tensor:
    """The twin of the backward kernel: blocks of ``a`` against all of ``b``."""
    dtype = accumulator(b.dtype)
    a, wide = a.to(b.dtype).to(dtype), b.to(dtype)
    column = torch.arange(len(b), device=b.device)                                                  # [B]
    pulled = []
    for start in range(0, len(a), _BLOCK):
        x = a[start : start + _BLOCK]                                                               # [r, D]
        t = (x @ wide.T).mul_(scale * LOG2E)                                                        # [r, B]
        weight = torch.zeros_like(t)
        if of_a is not None:
            weight += _weight(t, column, Side(*(each[start : start + _BLOCK, None] for each in of_a)))
        if of_b is not None:
            row = torch.arange(start, start + len(x), device=b.device)[:, None]                     # [r, 1]
            weight += _weight(t, row, of_b)
        pulled.append(weight @ wide)
    return torch.cat(pulled) * scale


def _weight(t: Tensor, other: Tensor, side: Side) -> Tensor:
    """Gradient of a softmax's outputs with respect to its logits; the side's numbers lie along its own axis of ``t``."""
    p = (t - side.top).exp2() / side.total
    return (p * side.grad_lse).masked_fill(other == side.own, 0) + side.grad_match * (other == side.positive)
