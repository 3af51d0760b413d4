"""The nearest rows of a queue, found block by block: memory does not grow with the queue.

The keys are scanned in groups of `GROUP`, of which only the largest similarity is kept. The k nearest keys lie in the k groups
with the largest maxima (otherwise k groups would each hold a nearer one), so the scan sorts nothing, and only the keys of a
few groups are compared in full.

Where the processor multiplies bfloat16 fast, the scan is in bfloat16. It errs by at most a known bound: rows for which the
groups that were left out might hold a nearer key are searched again, so that the result is that of float32.
"""

import torch
from torch import Tensor

GROUP = 16                  # keys of which the scan keeps one number
SPARE = 14                  # groups that the bfloat16 scan keeps besides the first k + 1
_CPU, _GPU = (512, 2048), (4096, 8192)      # rows and keys at a time
_SPAN = 8                   # blocks of keys whose groups are ranked at once
_UNIT = 2.0**-9             # largest relative error of rounding to bfloat16


@torch.no_grad()
def nearest(z: Tensor, keys: Tensor, k: int = 1) -> Tensor:
    """Numbers of the k keys with the largest inner product with each row, nearest first; of equal ones any.

    Args:
        z: [M, D], of length 1.
        keys: [K, D], of length 1, in the type of ``z``.

    Returns:
        [M, k].
    """
    rows = (_CPU if z.device.type == "cpu" else _GPU)[0]
    return torch.cat([_nearest(part, keys, k) for part in z.split(rows)])


def _nearest(z: Tensor, keys: Tensor, k: int) -> Tensor:
    if not _bfloat16_is_fast(z):
        return _exact(z, keys, k)
    groups, maxima = _scan(z, keys, k + 1 + SPARE, torch.bfloat16)                      # [m, C] each, falling
    error = (z - z.bfloat16()).norm(dim=1) * (1 + _UNIT) + _UNIT * 1.01 + _UNIT * maxima[:, 0].abs() + 1e-5     # [m]
    index = torch.empty(len(z), k, dtype=torch.long, device=z.device)
    left = torch.arange(len(z), device=z.device)
    for count in (k + 1, groups.shape[1] - 1):                                          # a few groups, then all
        index[left], similarity = _compare(z[left], keys, groups[left, :count], k)
        left = left[similarity[:, -1] < maxima[left, count] + error[left]]
    if len(left):
        index[left] = _exact(z[left], keys, k)
    return index


def _exact(z: Tensor, keys: Tensor, k: int) -> Tensor:
    groups, _ = _scan(z, keys, k, z.dtype)
    return _compare(z, keys, groups, k)[0]


def _scan(z: Tensor, keys: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ``count`` groups [m, count] with the largest maxima, and these; where there are fewer, maxima of -inf.

    With blocks of b keys, key j of block i belongs to group ``i * b / GROUP + j % (b / GROUP)``.
    """
    block = _block(keys)
    rows = z.to(dtype)
    best = z.new_full((len(z), count), -torch.inf)
    groups = torch.zeros(len(z), count, dtype=torch.long, device=z.device)
    for start in range(0, len(keys), _SPAN * block):
        maxima = []
        for part in keys[start : start + _SPAN * block].split(block):
            s = rows @ part.to(dtype).T                                                 # [m, b]
            if len(part) < block:
                s = torch.nn.functional.pad(s, (0, block - len(part)), value=-torch.inf)
            maxima.append(s.view(len(z), GROUP, -1).amax(1))                            # [m, b / GROUP]
        found = torch.cat(maxima, dim=1).to(z.dtype)
        number = torch.arange(found.shape[1], device=z.device) + start // GROUP
        best, place = torch.cat([best, found], dim=1).topk(count)
        groups = torch.cat([groups, number.expand(len(z), -1)], dim=1).gather(1, place)
    return groups, best


def _compare(z: Tensor, keys: Tensor, groups: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest keys [m, k] of these groups [m, C] to each row, and their inner products."""
    wide = _block(keys) // GROUP
    first = groups // wide * (wide * GROUP) + groups % wide                             # [m, C]
    index = (first[..., None] + wide * torch.arange(GROUP, device=z.device)).flatten(1)  # [m, C * GROUP]
    candidates = keys[index.clamp(max=len(keys) - 1)]                                   # [m, C * GROUP, D]
    similarity = (candidates @ z[..., None])[..., 0].masked_fill(index >= len(keys), -torch.inf)
    values, place = similarity.topk(k)
    return index.gather(1, place), values


def _block(keys: Tensor) -> int:
    return (_CPU if keys.device.type == "cpu" else _GPU)[1]


def _bfloat16_is_fast(z: Tensor) -> bool:
    """Whether a scan in bfloat16 pays: float32 on a processor with such matrix instructions.

    On a GPU the second look at some rows would make the host wait for the device.
    """
    if z.device.type != "cpu" or z.dtype != torch.float32:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
