"""The k rows of a queue with the largest inner product, without the matrix of products.

The k largest of a row lie in the k groups of queue rows with the largest maxima: otherwise k groups would each hold something
larger. So a scan keeps one maximum per group and sorts nothing, and only the rows of a few groups are looked at again, in
float32. The scan is in bfloat16 where that is faster: for rows of length 1 a product is then off by 2^-8 at most.

The eager form, `neighbours_eager`, knows that bound and searches again those rows for which the groups that were left out
might hold a nearer one: its result is that of float32. The Triton form, in `solo.kernels.triton_nearest`, keeps three groups
more than needed instead, for looking at a bound would make the host wait: it misses a neighbour only among near-ties.
"""

import math
import platform
from functools import cache

import torch
from torch import Tensor

from solo.kernels.dispatch import accumulator, uses_triton

MOST, LONGEST = 13, 2**18   # neighbours and queue rows that the kernel takes
GROUP = 16                  # queue rows of which the eager scan keeps one number
SPARE = 8                   # groups that are compared in full, besides k, before a row is searched again
LARGE = 8192                # queue rows from which on bfloat16 can pay on a CPU
BLOCK = (512, 1024)         # rows and queue rows at a time
_PLAIN = 16384              # queue rows at a time of the plain form
_SPAN = 16                  # blocks whose groups are ranked at once
_COMPARED = 4096            # queue rows that are compared in full at a time
_PROBE = 64                 # rows that show whether bfloat16 pays
_UNIT = 2.0**-9             # relative error of rounding to bfloat16, at most
_SLACK = 1e-4               # for all smaller errors: of products of errors, of float32, of lengths that are not quite 1
_CLOSE = 1e-6               # products that float32 cannot tell apart


def neighbours(x: Tensor, queue: Tensor, k: int, *, shadow: Tensor | None = None, exact: bool = False) -> Tensor:
    """Numbers of the queue rows with the largest inner product, largest first; the lower number where they tie.

    NaN counts as largest, as it does for ``torch.topk``, so that it is seen.

    Args:
        x: [N, D], rows of length 1.
        queue: [K, D], rows of length 1.
        k: at most K.
        shadow: the queue in bfloat16, where one is kept (see `wants_shadow`): no scan has to make one then.
        exact: the Triton form scans in float32, or with ``torch.set_float32_matmul_precision`` in TF32; for tests.

    Returns:
        [N, k] int64.
    """
    if not 1 <= k <= len(queue):
        raise ValueError(f"k must lie between 1 and the queue's {len(queue)} rows, got {k}")
    with torch.autocast(x.device.type, enabled=False):      # whose products of float32 rows are those of bfloat16
        if not _fits_kernel(x, queue, k):
            return neighbours_eager(x, queue, k, shadow)
        from solo.kernels import triton_nearest

        scanned = queue if shadow is None or exact else shadow
        return triton_nearest.neighbours(x.detach(), queue, scanned, k, exact)


def wants_shadow(queue: Tensor) -> bool:
    """Whether searches of this queue are faster with a copy of it in bfloat16, half as large."""
    if queue.dtype != torch.float32:
        return False
    return _bfloat16_is_fast(queue) if queue.device.type == "cpu" else _fits_kernel(queue, queue, 1)


def _fits_kernel(x: Tensor, queue: Tensor, k: int) -> bool:
    return uses_triton(x, queue) and k <= MOST and len(queue) <= LONGEST


@torch.no_grad()
def neighbours_eager(x: Tensor, queue: Tensor, k: int, shadow: Tensor | None = None) -> Tensor:
    """On a CPU the scan by groups; elsewhere the plain form, for which the host never waits."""
    dtype = accumulator(queue.dtype)
    x, queue = x.to(dtype), queue.to(dtype)
    if x.device.type != "cpu":
        return _plain(x, queue, k)
    return torch.cat([_searched(rows, queue, k, shadow) for rows in x.split(BLOCK[0])])


def _searched(x: Tensor, queue: Tensor, k: int, shadow: Tensor | None) -> Tensor:
    """By scans one more exact than the other, each over the rows for which the last was not sure."""
    index = torch.empty(len(x), k, dtype=torch.long)
    left = torch.arange(len(x))
    if _bfloat16_is_fast(queue) and _pays(x, queue, k, shadow):
        index, unsure = _search(x, queue, k, SPARE, torch.bfloat16, shadow)
        left = left[unsure]
    if len(left):
        index[left], unsure = _search(x[left], queue, k, 0, x.dtype)
        left = left[unsure]
    if len(left):
        index[left] = _plain(x[left], queue, k)
    return index


def _search(
    x: Tensor, queue: Tensor, k: int, spare: int, dtype: torch.dtype, shadow: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest [m, k] after a scan in ``dtype``, and for which rows [m] these may be other ones."""
    groups, maxima = _scan(x, queue if shadow is None else shadow, k + spare + 1, dtype)        # [m, k + spare + 1] each
    error = x.new_full((len(x),), _CLOSE)                                                       # [m]
    if dtype != x.dtype:
        error = (x - x.to(dtype)).norm(dim=1) + _UNIT * (1 + maxima[:, 0].abs()) + _SLACK
    index = torch.empty(len(x), k, dtype=torch.long)
    unsure = torch.ones(len(x), dtype=torch.bool)
    for count in sorted({k + min(spare, 1), k + spare}):                                        # a few groups, then all
        left = unsure.nonzero()[:, 0]
        if not len(left):
            break
        found, similarity = _compare(x[left], queue, groups[left, :count], min(k + 1, len(queue)))
        index[left] = found[:, :k]
        apart = (similarity[:, :-1] - similarity[:, 1:] > _CLOSE).all(1)                        # in falling order, no NaN
        unsure[left] = ~(apart & (similarity[:, k - 1] > maxima[left, count] + error[left]))
    return index, unsure


def _pays(x: Tensor, queue: Tensor, k: int, shadow: Tensor | None) -> bool:
    """Whether few rows would have to be searched again: an eighth of the queue and of the spare groups shows it.

    Where queue rows crowd around the rows, bfloat16 cannot tell them apart.
    """
    part = max(len(queue) // 8, k)
    shadow = shadow if shadow is None else shadow[:part]
    _, unsure = _search(x[:_PROBE], queue[:part], k, SPARE // 8, torch.bfloat16, shadow)
    return int(unsure.sum()) <= len(unsure) // 4


def _scan(x: Tensor, queue: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ``count`` groups [m, count] with the largest maxima, and these, falling; -1 and -inf where there are fewer.

    With blocks of b queue rows, row j of block i belongs to group ``i * b / GROUP + j % (b / GROUP)``.
    """
    block = _block(queue)
    rows = x.to(dtype)
    best = x.new_full((len(x), count), -math.inf)
    groups = torch.full((len(x), count), -1)
    for start in range(0, len(queue), _SPAN * block):
        maxima = []
        for part in queue[start : start + _SPAN * block].split(block):
            s = rows @ part.to(dtype).T                                                         # [m, b]
            if len(part) < block:
                s = torch.nn.functional.pad(s, (0, block - len(part)), value=-math.inf)
            maxima.append(s.view(len(x), GROUP, -1).amax(1))                                    # [m, b / GROUP]
        found = torch.cat(maxima, dim=1).to(x.dtype)
        number = torch.arange(found.shape[1]) + start // GROUP
        best, place = torch.cat([best, found], dim=1).topk(count)
        groups = torch.cat([groups, number.expand(len(x), -1)], dim=1).gather(1, place)
    return groups, best


def _compare(x: Tensor, queue: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest [m, k] in these groups [m, C] to each row, and their inner products; -inf where there are fewer."""
    wide = _block(queue) // GROUP
    first = groups // wide * (wide * GROUP) + groups % wide                                     # [m, C]
    index = first[..., None] + wide * torch.arange(GROUP)                                       # [m, C, GROUP]
    index = index.where(groups[..., None] >= 0, len(queue)).flatten(1)                          # [m, C * GROUP]
    rows = max(1, _COMPARED // index.shape[1])
    similarity = torch.cat([
        torch.bmm(queue.index_select(0, part.flatten()).view(*part.shape, -1), each[..., None])[..., 0]
        for part, each in zip(index.clamp(max=len(queue) - 1).split(rows), x.split(rows), strict=True)
    ])                                                                                          # [m, C * GROUP]
    values, place = similarity.masked_fill(index >= len(queue), -math.inf).topk(k)
    return index.gather(1, place), values


def _plain(x: Tensor, queue: Tensor, k: int) -> Tensor:
    """Blocks of the queue, each adding its k best to the k best so far; decides ties and NaN."""
    score = x.new_empty(len(x), 0)                                                              # [N, <= k]
    index = torch.empty(len(x), 0, dtype=torch.long, device=x.device)                           # [N, <= k]
    for start in range(0, len(queue), _PLAIN):
        s = (x @ queue[start : start + _PLAIN].T).nan_to_num_(math.inf, math.inf, -math.inf)    # [N, b]
        for _ in range(min(k, s.shape[1])):
            best, at = s.max(1, keepdim=True)           # the first one of equals
            s.scatter_(1, at, -math.inf)
            score, index = torch.cat([score, best], 1), torch.cat([index, at + start], 1)
        order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
        score, index = score.gather(1, order), index.gather(1, order)
    return index


def _block(queue: Tensor) -> int:
    """Queue rows at a time: whole groups, and no more than there are."""
    return min(BLOCK[1], -(-len(queue) // GROUP) * GROUP)


def _bfloat16_is_fast(queue: Tensor) -> bool:
    """Whether bfloat16 is worth a look: many float32 rows, on a processor with instructions for it."""
    return len(queue) >= LARGE and queue.dtype == torch.float32 and multiplies_bfloat16()


@cache
def multiplies_bfloat16() -> bool:
    """On x86 as the processor says: oneDNN says yes to any AVX-512, where a product in bfloat16 takes three times as long."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", bool)
    return bool(supported())                                            # all three are private: they may go
