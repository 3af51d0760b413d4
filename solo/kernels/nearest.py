"""The k rows of a queue with the largest inner product, without the matrix of products.

The k largest of a row lie in the k groups of 32 queue rows with the largest maxima: otherwise k groups would each hold
something larger. So the scan keeps one maximum per group, and only the rows of a few groups are looked at again.

The scan is a product in bfloat16: for rows of length 1 a product is off by 2^-8 at most, typically by 1e-3. Three groups
more than needed are kept, and their rows are compared in float32: a neighbour is missed only among near-ties of the scan.
"""

import math

import torch
from torch import Tensor

from solo.kernels.dispatch import accumulator, uses_triton

_BLOCK = 4096               # queue rows at a time
MOST, LONGEST = 13, 2**18   # neighbours and queue rows that the kernel takes


def neighbours(x: Tensor, queue: Tensor, k: int, *, shadow: Tensor | None = None, exact: bool = False) -> Tensor:
    """Numbers of the queue rows with the largest inner product, largest first; the lower number where they tie.

    NaN counts as largest, as it does for ``torch.topk``, so that it is seen.

    Args:
        x: [N, D], rows of length 1 (their length does not change the order).
        queue: [K, D].
        k: at most K.
        shadow: the queue in bfloat16, where one is kept: it halves what the kernel reads.
        exact: scan in float32, or with ``torch.set_float32_matmul_precision`` in TF32; for tests and comparisons.

    Returns:
        [N, k] int64.
    """
    if not 1 <= k <= len(queue):
        raise ValueError(f"k must lie between 1 and the queue's {len(queue)} rows, got {k}")
    if not uses_triton(x, queue) or k > MOST or len(queue) > LONGEST:
        return neighbours_eager(x, queue, k)
    from solo.kernels import triton_nearest

    scanned = queue if shadow is None or exact else shadow
    return triton_nearest.neighbours(x.detach(), queue, scanned, k, exact)


@torch.no_grad()
def neighbours_eager(x: Tensor, queue: Tensor, k: int) -> Tensor:
    """The twin of the kernels: blocks of the queue, each adding its k best to the k best so far."""
    dtype = accumulator(queue.dtype)
    x = x.to(dtype)
    score = x.new_empty(len(x), 0)                                                                  # [N, <= k]
    index = torch.empty(len(x), 0, dtype=torch.long, device=x.device)                               # [N, <= k]
    for start in range(0, len(queue), _BLOCK):
        s = (x @ queue[start : start + _BLOCK].to(dtype).T).nan_to_num_(math.inf, math.inf, -math.inf)      # [N, b]
        for _ in range(min(k, s.shape[1])):
            best, at = s.max(1, keepdim=True)           # the first one of equals
            s.scatter_(1, at, -math.inf)
            score, index = torch.cat([score, best], 1), torch.cat([index, at + start], 1)
        order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        score, index = score.gather(1, order), index.gather(1, order)
    return index
