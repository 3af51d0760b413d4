"""The kernels of `solo.kernels.nearest`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from solo.kernels.dispatch import cut, input_precision, interpreted, padded
from solo.kernels.triton_tiles import _tile

GROUP = 32
_SPARE = 3                  # groups kept beyond k
_MEMORY = 4 << 20           # bytes of group maxima at a time

# Scan: a program has BM rows x and one part of the queue, and writes max_j in group g of x . queue_j for its groups.
# Select: a program has one row. It picks the largest maxima, the lower group where they tie, and of the rows of these groups,
# compared in float32, the k largest, the lower number where they tie: the same answer however the work is cut up.


@triton.jit
def _scan(x, queue, best, N, K, GROUPS, per_part, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
          G: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    a = _tile(x, row, N, D, BD, UPCAST)
    first = part * per_part
    for start in range(first, tl.minimum(first + per_part, K), BN):
        column = start + tl.arange(0, BN)
        b = _tile(queue, column, K, D, BD, False)                                                    # [BN, BD]
        b = b.to(tl.float32) if EXACT else b.to(tl.bfloat16)
        if UPCAST:
            b = b.to(tl.float32)
        s = tl.dot(a, tl.trans(b), input_precision=PRECISION)                                          # [BM, BN]
        s = tl.where(s != s, float("inf"), s)
        s = tl.where((column < K)[None, :], s, float("-inf"))
        largest = tl.max(tl.reshape(s, (BM, BN // G, G)), 2)                                        # [BM, BN / G]
        group = start // G + tl.arange(0, BN // G)
        tl.store(best + row[:, None] * GROUPS + group[None, :], largest, mask=(row < N)[:, None] & (group < GROUPS)[None, :])


@triton.jit
def _select(x, queue, best, index, K, GROUPS, D: tl.constexpr, NG: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
            k: tl.constexpr, BD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, NG)
    value = tl.load(best + row * GROUPS + group, mask=group < GROUPS, other=float("-inf"))
    place = tl.arange(0, C * G)
    candidate = tl.zeros((C * G,), tl.int32)
    for i in tl.static_range(C):
        chosen = tl.min(tl.where(value == tl.max(value, 0), group, NG), 0)
        candidate = tl.where(place // G == i, chosen * G + place % G, candidate)
        value = tl.where(group == chosen, float("-inf"), value)
        group = tl.where(group == chosen, NG, group)    # where all are taken, a number without rows comes out
    known = candidate < K
    score = tl.zeros((C * G,), tl.float32)
    for start in tl.static_range(0, D, BD):
        d = start + tl.arange(0, BD)
        a = tl.load(x + row * D + d, mask=d < D, other=0.0)
        b = tl.load(queue + candidate.to(tl.int64)[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0)
        score += tl.sum(a[None, :] * b.to(tl.float32), 1)
    score = tl.where(score != score, float("inf"), score)
    score = tl.where(known, score, float("-inf"))
    candidate = tl.where(known, candidate, K)
    for i in tl.static_range(k):
        nearest = tl.min(tl.where(score == tl.max(score, 0), candidate, K), 0)
        tl.store(index + row * k + i, nearest.to(tl.int64))
        score = tl.where(candidate == nearest, float("-inf"), score)
        candidate = tl.where(candidate == nearest, K, candidate)


def neighbours(x: Tensor, queue: Tensor, scanned: Tensor, k: int, exact: bool) -> Tensor:
    """See `solo.kernels.nearest.neighbours`; ``scanned`` is the queue or its shadow."""
    x, queue, scanned = x.float().contiguous(), queue.contiguous(), scanned.contiguous()
    n, d = x.shape
    groups, precision = triton.cdiv(len(queue), GROUP), input_precision()
    index = torch.empty(n, k, dtype=torch.long, device=x.device)
    rows = max(64, _MEMORY // (4 * groups) // 64 * 64)
    best = torch.empty(min(rows, n), groups, device=x.device)
    for part, found in zip(x.split(rows), index.split(rows), strict=True):
        shape, parts, per_part = cut(len(part), len(queue), scanned, precision if exact else "", accumulates=False)
        _scan[(triton.cdiv(len(part), shape.rows), parts)](
            part if exact else part.bfloat16(), scanned, best, len(part), len(queue), groups, per_part,
            D=d, BM=shape.rows, BN=shape.columns, BD=padded(d), G=GROUP, EXACT=exact, PRECISION=precision,
            UPCAST=interpreted(), num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        _select[(len(part),)](
            part, queue, best, found, len(queue), groups,
            D=d, NG=triton.next_power_of_2(groups), C=triton.next_power_of_2(k + _SPARE), G=GROUP, k=k, BD=32,
            num_warps=4 if groups <= 4096 else 8,
        )  # fmt: skip
    return index
