"""The nearest rows of a queue, found block by block: memory does not grow with the queue.

The keys are scanned in groups of `GROUP`, of which only the largest similarity is kept. The k nearest keys lie in the k groups
with the largest maxima (otherwise k groups would each hold a nearer one), so the scan sorts nothing, and only the keys of a
few groups are compared in full.

Where the processor multiplies bfloat16 fast, the scan is in bfloat16. It errs by at most a known bound: rows for which the
groups that were left out might hold a nearer key are searched again, so that the result is that of float32.
"""

import torch
from torch import Tensor

from solo.precision import full_precision

GROUP = 16                  # keys of which the scan keeps one number
SPARE = 8                   # groups that are compared in full, besides k, before a row is searched again
LARGE = 8192                # keys from which on bfloat16 can pay
_CPU, _GPU = (512, 2048), (4096, 8192)      # rows and keys at a time
_SPAN = 8                   # blocks of keys whose groups are ranked at once
_COMPARED = 4096            # keys that are compared in full at a time
_PROBE = 64                 # rows that show whether bfloat16 pays
_UNIT = 2.0**-9             # relative error of rounding to bfloat16, at most
_SLACK = 1e-4               # for all smaller errors: of products of errors, of float32, of lengths that are not quite 1


@torch.no_grad()
@full_precision
def nearest(z: Tensor, keys: Tensor, k: int = 1) -> Tensor:
    """Numbers of the k keys with the largest inner product with each row, nearest first; of equal ones any.

    Args:
        z: [M, D], of length 1.
        keys: [K, D], of length 1, in the type of ``z``.

    Returns:
        [M, k].
    """
    return torch.cat([_nearest(rows, keys, k) for rows in z.split(_block(z)[0])])


def _nearest(z: Tensor, keys: Tensor, k: int) -> Tensor:
    if len(keys) < LARGE or not (_bfloat16_is_fast(z) and _pays(z, keys, k)):
        return _exact(z, keys, k)
    index, unsure = _quick(z, keys, k, SPARE)
    left = unsure.nonzero()[:, 0]
    if len(left):
        index[left] = _exact(z[left], keys, k)
    return index


def _exact(z: Tensor, keys: Tensor, k: int) -> Tensor:
    return _compare(z, keys, _scan(z, keys, k, z.dtype)[0], k)[0]


def _quick(z: Tensor, keys: Tensor, k: int, spare: int) -> tuple[Tensor, Tensor]:
    """The nearest keys [m, k] after a bfloat16 scan, and of which rows [m] there may be nearer ones."""
    groups, maxima = _scan(z, keys, k + spare + 1, torch.bfloat16)                      # [m, k + spare + 1] each
    error = (z - z.bfloat16()).norm(dim=1) + _UNIT * (1 + maxima[:, 0].abs()) + _SLACK  # [m]
    index = torch.empty(len(z), k, dtype=torch.long)
    unsure = torch.ones(len(z), dtype=torch.bool)
    for count in (k + 1, k + spare):                                                    # a few groups, then all
        left = unsure.nonzero()[:, 0]
        if not len(left):
            break
        index[left], similarity = _compare(z[left], keys, groups[left, :count], k)
        unsure[left] = similarity[:, -1] < maxima[left, count] + error[left]
    return index, unsure


def _pays(z: Tensor, keys: Tensor, k: int) -> bool:
    """Whether few rows would have to be searched again: an eighth of the keys and of the spare groups shows it.

    Where keys crowd around the rows, bfloat16 cannot tell them apart.
    """
    _, unsure = _quick(z[:_PROBE], keys[: max(len(keys) // 8, k)], k, SPARE // 8)
    return int(unsure.sum()) <= len(unsure) // 4


def _scan(z: Tensor, keys: Tensor, count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The ``count`` groups [m, count] with the largest maxima, and these, falling; -1 and -inf where there are fewer.

    With blocks of b keys, key j of block i belongs to group ``i * b / GROUP + j % (b / GROUP)``.
    """
    block = _block(keys)[1]
    rows = z.to(dtype)
    best = z.new_full((len(z), count), -torch.inf)
    groups = torch.full((len(z), count), -1, device=z.device)
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
    wide = _block(keys)[1] // GROUP
    first = groups // wide * (wide * GROUP) + groups % wide                             # [m, C]
    index = first[..., None] + wide * torch.arange(GROUP, device=z.device)              # [m, C, GROUP]
    index = index.where(groups[..., None] >= 0, len(keys)).flatten(1)                   # [m, C * GROUP]
    rows = max(1, _COMPARED // index.shape[1])
    similarity = torch.cat([
        torch.bmm(keys.index_select(0, part.flatten()).view(*part.shape, -1), each[..., None])[..., 0]
        for part, each in zip(index.clamp(max=len(keys) - 1).split(rows), z.split(rows), strict=True)
    ])                                                                                  # [m, C * GROUP]
    values, place = similarity.masked_fill(index >= len(keys), -torch.inf).topk(k)
    return index.gather(1, place), values


def _block(x: Tensor) -> tuple[int, int]:
    """Rows and keys at a time; whole groups of them, and no more keys than there are."""
    rows, keys = _CPU if x.device.type == "cpu" else _GPU
    return rows, min(keys, -(-len(x) // GROUP) * GROUP)


def _bfloat16_is_fast(z: Tensor) -> bool:
    """Whether bfloat16 is worth a look: float32 on a processor with instructions for it.

    On a GPU the second look at some rows would make the host wait for the device.
    """
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)            # private: it may go
    return z.device.type == "cpu" and z.dtype == torch.float32 and supported is not None and supported()
