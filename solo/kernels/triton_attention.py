"""The kernel of `solo.kernels.attention`."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from solo.kernels.dispatch import cut, input_precision, interpreted, padded
from solo.kernels.triton_tiles import _logits, _tile

# A program has BM rows and one part of the queue. It holds, over the keys it has seen, with t_ij = s_ij log2(e),
#   top = max_j t_ij          total = sum_j 2^(t_ij - top)          mean = sum_j 2^(t_ij - top) queue_j
# and a tile of keys whose maximum is above `top` shrinks the sums by 2^(top - above) first. The tile is loaded once for both
# products. The parts of a row are merged by the same rule: with lse = top + log2(total), part p weighs 2^(lse_p - lse).


@triton.jit
def _attend(q, keys, scale, lse, mean, N, K, per_part, own, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
            BD: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    d = tl.arange(0, BD)
    x = _tile(q, row, N, D, BD, UPCAST)
    factor = tl.load(scale + row, mask=row < N, other=0.0) * 1.4426950408889634
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, K), BN):
        column = start + tl.arange(0, BN)
        y = _tile(keys, column, K, D, BD, UPCAST)                                                    # [BN, BD]
        t = _logits(x, y, factor[:, None], row, column, K, own, OWN, PRECISION)                      # [BM, BN]
        above = tl.maximum(top, tl.max(t, 1))
        shift = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(t - shift[:, None])
        shrink = tl.exp2(top - shift)
        total = total * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None] + tl.dot(p.to(y.dtype), y, input_precision=PRECISION)
        top = above
    at = part.to(tl.int64) * N + row
    tl.store(lse + at, top + tl.log2(total), mask=row < N)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(mean + at[:, None] * D + d[None, :], acc, mask=(row < N)[:, None] & (d < D)[None, :])


def attend(q: Tensor, queue: Tensor, scale: Tensor, own: int | None) -> tuple[Tensor, Tensor]:
    """See `solo.kernels.attention.attend`."""
    (n, d), k = q.shape, len(queue)
    precision = input_precision()
    shape, parts, per_part = cut(n, k, queue, precision, accumulates=True)
    lse = torch.empty(parts, n, device=q.device)
    mean = torch.empty(parts, n, d, device=q.device)
    _attend[(triton.cdiv(n, shape.rows), parts)](
        q.to(queue.dtype).contiguous(), queue.contiguous(), scale.float().contiguous(), lse, mean, n, k, per_part, own or 0,
        D=d, BM=shape.rows, BN=shape.columns, BD=padded(d), OWN=own is not None, PRECISION=precision,
        UPCAST=interpreted(), num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    lse = lse * math.log(2)
    if parts == 1:
        return mean[0], lse[0]
    whole = lse.logsumexp(0)                                                                        # [N]
    weight = (lse - whole.masked_fill(whole == -math.inf, 0)).exp()                                 # [P, N]
    return torch.einsum("pn,pnd->nd", weight, mean), whole
