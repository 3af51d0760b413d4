"""The kernels of `solo.kernels.contrast`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from solo.kernels.dispatch import cut, input_precision, interpreted, padded
from solo.kernels.triton_tiles import _logits, _tile

# Logits are kept to base 2, as the exponentials are: t_ij = s_ij log2(e).
#
# Forward: a program has BM rows and one part of the keys. Over the keys it has seen it holds
#   top = max_j t_ij        total = sum_j 2^(t_ij - top)        lse = top + log2(total)
# and the parts of a row are merged by log sum exp.
#
# Backward: a program has BM rows a and one part of the keys b. It makes t again and adds w_ab b for each tile, where
#   w_ab = 2^(t_ab - lse_a)      (a's softmax over b)
#        + 2^(t_ab - lse_b)      (b's softmax over a).
# No two programs write the same place: nothing is atomic, and the same input gives the same bits.


@triton.jit
def _forward(rows, keys, lse, N, K, per_part, factor, own, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
             BD: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    x = _tile(rows, row, N, D, BD, UPCAST)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, K), BN):
        column = start + tl.arange(0, BN)
        y = _tile(keys, column, K, D, BD, UPCAST)                                                    # [BN, BD]
        t = _logits(x, y, factor, row, column, K, own, OWN, PRECISION)                               # [BM, BN]
        above = tl.maximum(top, tl.max(t, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(t - shift[:, None]), 1)
        top = above
    tl.store(lse + part.to(tl.int64) * N + row, top + tl.log2(total), mask=row < N)


def row_logsumexp(rows: Tensor, keys: Tensor, scale: float, own: int | None) -> Tensor:
    """See `solo.kernels.contrast.row_logsumexp`."""
    (n, d), k = rows.shape, len(keys)
    precision = input_precision()
    shape, parts, per_part = cut(n, k, keys, precision, accumulates=False)
    lse = torch.empty(parts, n, device=rows.device)
    _forward[(triton.cdiv(n, shape.rows), parts)](
        rows.to(keys.dtype).contiguous(), keys.contiguous(), lse, n, k, per_part, scale / math.log(2), own or 0,
        D=d, BM=shape.rows, BN=shape.columns, BD=padded(d), OWN=own is not None, PRECISION=precision, UPCAST=interpreted(),
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return (lse * math.log(2)).logsumexp(0)


@triton.jit
def _backward(a, b, out, lse_a, lse_b, A, B, per_part, factor, own, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
              BD: tl.constexpr, OF_A: tl.constexpr, OF_B: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr,
              UPCAST: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    d = tl.arange(0, BD)
    inside = (row < A)[:, None] & (d < D)[None, :]
    x = _tile(a, row, A, D, BD, UPCAST)
    if OF_A:
        a_lse = tl.load(lse_a + row, mask=row < A, other=0.0) * 1.4426950408889634
    acc = tl.zeros((BM, BD), tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, B), BN):
        column = start + tl.arange(0, BN)
        y = _tile(b, column, B, D, BD, UPCAST)                                                       # [BN, BD]
        t = tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor                              # [BM, BN]
        w = tl.zeros((BM, BN), tl.float32)
        if OF_A:
            w += tl.exp2(t - a_lse[:, None])
        if OF_B:
            b_lse = tl.load(lse_b + column, mask=column < B, other=0.0) * 1.4426950408889634
            w += tl.exp2(t - b_lse[None, :])
        w = tl.where((column < B)[None, :], w, 0.0)
        if OWN:
            w = tl.where(column[None, :] == own + row[:, None], 0.0, w)
        acc += tl.dot(w.to(y.dtype), y, input_precision=PRECISION)
    at = part.to(tl.int64) * A + row
    tl.store(out + at[:, None] * D + d[None, :], acc, mask=inside)


def weighted_keys(
    rows: Tensor, keys: Tensor, scale: float, row_lse: Tensor | None, key_lse: Tensor | None, own: int | None
) -> Tensor:
    """See `solo.kernels.contrast.weighted_keys`."""
    (n, d), k = rows.shape, len(keys)
    precision = input_precision()
    shape, parts, per_part = cut(n, k, keys, precision, accumulates=True)
    out = torch.empty(parts, n, d, device=rows.device)
    of_rows, of_keys = (out if lse is None else lse.contiguous() for lse in (row_lse, key_lse))     # `out`: nothing is read
    _backward[(triton.cdiv(n, shape.rows), parts)](
        rows.to(keys.dtype).contiguous(), keys.contiguous(), out, of_rows, of_keys, n, k, per_part, scale / math.log(2),
        own or 0, D=d, BM=shape.rows, BN=shape.columns, BD=padded(d), OF_A=row_lse is not None, OF_B=key_lse is not None,
        OWN=own is not None, PRECISION=precision, UPCAST=interpreted(), num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out.sum(0)
