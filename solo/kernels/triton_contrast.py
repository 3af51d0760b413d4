"""The kernels of `solo.kernels.contrast`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from solo.kernels.contrast import LOG2E, Side, Statistics
from solo.kernels.dispatch import cut, input_precision, interpreted, padded

# Forward: a program has BM rows and one part of the columns. Over the columns it has seen it holds, with t_ij = s_ij log2(e),
#   top = max_j t_ij        total = sum_j 2^(t_ij - top)        match = t_i,pos(i), from the one tile that has it
# and the parts of a row are merged by the same rule.
#
# Backward: a program has BM rows a and one part of the columns b. It makes t again and adds w_ab b for each tile, where
#   w_ab = g_a 2^(t_ab - top_a) / total_a + h_a [b = pos(a)]      (a's softmax over b, without b = own(a))
#        + g_b 2^(t_ab - top_b) / total_b + h_b [a = pos(b)]      (b's softmax over a, without a = own(b)).
# No two programs write the same place: nothing is atomic, and the same input gives the same bits.


@triton.jit
def _forward(rows, columns, positive, own, tops, totals, matches, N, M, per_part, factor, D: tl.constexpr, BM: tl.constexpr,
             BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    d = tl.arange(0, BD)
    x = tl.load(rows + row[:, None] * D + d[None, :], mask=(row < N)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:      # the interpreter multiplies the bits of bfloat16
        x = x.to(tl.float32)
    pos = tl.load(positive + row, mask=row < N, other=-1)
    out = tl.load(own + row, mask=row < N, other=-1)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    match = tl.zeros((BM,), tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, M), BN):
        column = start + tl.arange(0, BN)
        y = tl.load(columns + column[:, None] * D + d[None, :], mask=(column < M)[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            y = y.to(tl.float32)
        t = tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor                              # [BM, BN]
        match += tl.sum(tl.where(column[None, :] == pos[:, None], t, 0.0), 1)
        t = tl.where((column < M)[None, :] & (column[None, :] != out[:, None]), t, float("-inf"))
        above = tl.maximum(top, tl.max(t, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(t - shift[:, None]), 1)
        top = above
    at = part.to(tl.int64) * N + row
    tl.store(tops + at, top, mask=row < N)
    tl.store(totals + at, total, mask=row < N)
    tl.store(matches + at, match, mask=row < N)


def row_statistics(rows: Tensor, columns: Tensor, scale: float, positive: Tensor, own: Tensor) -> Statistics:
    """See `solo.kernels.contrast.row_statistics`."""
    (n, d), m = rows.shape, len(columns)
    precision = input_precision()
    shape, parts, per_part = cut(n, m, columns, precision, accumulates=False)
    tops, totals, matches = torch.empty(3, parts, n, device=rows.device)
    _forward[(triton.cdiv(n, shape.rows), parts)](
        rows.to(columns.dtype).contiguous(), columns.contiguous(), positive.contiguous(), own.contiguous(),
        tops, totals, matches, n, m, per_part, scale * LOG2E,
        D=d, BM=shape.rows, BN=shape.columns, BD=padded(d), PRECISION=precision, UPCAST=interpreted(),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    if parts == 1:
        return Statistics(tops[0], totals[0], matches[0] / LOG2E)
    top = tops.amax(0)                                                                              # [N]
    shift = top.masked_fill(top == -torch.inf, 0)
    return Statistics(top, (totals * (tops - shift).exp2()).sum(0), matches.sum(0) / LOG2E)


@triton.jit
def _backward(a, b, out, pos_a, own_a, top_a, share_a, match_a, pos_b, own_b, top_b, share_b, match_b, A, B, per_part, factor,
              D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, OF_A: tl.constexpr, OF_B: tl.constexpr,
              PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    d = tl.arange(0, BD)
    inside = (row < A)[:, None] & (d < D)[None, :]
    x = tl.load(a + row[:, None] * D + d[None, :], mask=inside, other=0.0)
    if UPCAST:      # the interpreter multiplies the bits of bfloat16
        x = x.to(tl.float32)
    if OF_A:
        a_pos = tl.load(pos_a + row, mask=row < A, other=-1)
        a_own = tl.load(own_a + row, mask=row < A, other=-1)
        a_top = tl.load(top_a + row, mask=row < A, other=0.0)
        a_share = tl.load(share_a + row, mask=row < A, other=0.0)
        a_match = tl.load(match_a + row, mask=row < A, other=0.0)
    acc = tl.zeros((BM, BD), tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, B), BN):
        column = start + tl.arange(0, BN)
        known = column < B
        y = tl.load(b + column[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
        if UPCAST:
            y = y.to(tl.float32)
        t = tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor                              # [BM, BN]
        w = tl.zeros((BM, BN), tl.float32)
        if OF_A:
            p = tl.where(known[None, :] & (column[None, :] != a_own[:, None]), tl.exp2(t - a_top[:, None]), 0.0)
            w += p * a_share[:, None] + tl.where(column[None, :] == a_pos[:, None], a_match[:, None], 0.0)
        if OF_B:
            b_pos = tl.load(pos_b + column, mask=known, other=-1)
            b_own = tl.load(own_b + column, mask=known, other=-1)
            b_top = tl.load(top_b + column, mask=known, other=0.0)
            b_share = tl.load(share_b + column, mask=known, other=0.0)
            b_match = tl.load(match_b + column, mask=known, other=0.0)
            p = tl.where(known[None, :] & (row[:, None] != b_own[None, :]), tl.exp2(t - b_top[None, :]), 0.0)
            w += p * b_share[None, :] + tl.where(row[:, None] == b_pos[None, :], b_match[None, :], 0.0)
        acc += tl.dot(w.to(y.dtype), y, input_precision=PRECISION)
    at = part.to(tl.int64) * A + row
    tl.store(out + at[:, None] * D + d[None, :], acc, mask=inside)


def pull(a: Tensor, b: Tensor, scale: float, of_a: Side | None, of_b: Side | None) -> Tensor:
    """See `solo.kernels.contrast.pull`."""
    (n, d), m = a.shape, len(b)
    precision = input_precision()
    shape, parts, per_part = cut(n, m, b, precision, accumulates=True)
    out = torch.empty(parts, n, d, device=a.device)
    _backward[(triton.cdiv(n, shape.rows), parts)](
        a.to(b.dtype).contiguous(), b.contiguous(), out, *_numbers(of_a, out), *_numbers(of_b, out),
        n, m, per_part, scale * LOG2E,
        D=d, BM=shape.rows, BN=shape.columns, BD=padded(d), OF_A=of_a is not None, OF_B=of_b is not None,
        PRECISION=precision, UPCAST=interpreted(), num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out.sum(0) * scale


def _numbers(side: Side | None, absent: Tensor) -> list[Tensor]:
    """What the kernel reads of a side; ``absent`` stands where nothing is read."""
    if side is None:
        return [absent] * 5
    share = side.grad_lse / side.total.clamp_min(torch.finfo(torch.float32).tiny)
    return [each.contiguous() for each in (side.positive, side.own, side.top, share, side.grad_match)]
