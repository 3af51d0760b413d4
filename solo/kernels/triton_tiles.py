"""What the kernels of this package have in common."""

import triton
import triton.language as tl


@triton.jit
def _tile(x, row, N, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Rows ``row`` [B] of x [N, D], padded with 0: [B, BD]."""
    d = tl.arange(0, BD)
    rows = tl.load(x + row[:, None] * D + d[None, :], mask=(row < N)[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:      # the interpreter multiplies the bits of bfloat16
        rows = rows.to(tl.float32)
    return rows


@triton.jit
def _logits(x, y, factor, row, column, K, own, OWN: tl.constexpr, PRECISION: tl.constexpr):
    """``factor x y'`` [BM, BN]; -inf where there is no key, and for key ``own + i`` of row i where it is left out."""
    t = tl.dot(x, tl.trans(y), input_precision=PRECISION) * factor
    t = tl.where((column < K)[None, :], t, float("-inf"))
    if OWN:
        t = tl.where(column[None, :] == own + row[:, None], float("-inf"), t)
    return t
