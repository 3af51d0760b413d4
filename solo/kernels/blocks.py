"""Similarities of rows and keys block by block, for the eager forms: nothing as large as the matrix of all is ever made."""

import math
from collections.abc import Iterator

from torch import Tensor

from solo.kernels.dispatch import accumulator

CPU, GPU = (512, 1024), (4096, 4096)    # rows and keys at a time: what stays in a core's cache, and what keeps a GPU busy


def _size(x: Tensor) -> tuple[int, int]:
    return CPU if x.device.type == "cpu" else GPU


def parts(rows: Tensor) -> list[slice]:
    """The rows in as many parts as it takes."""
    step = _size(rows)[0]
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def fit_one_block(keys: Tensor) -> bool:
    """Whether `similarities` has one block and no more to yield."""
    return 0 < len(keys) <= _size(keys)[1]


def scaled(rows: Tensor, keys: Tensor, scale: Tensor | float) -> Tensor:
    """Rows [N, D] as the keys' dtype has them, times ``scale``, in the dtype of sums."""
    return rows.to(keys.dtype).to(accumulator(keys.dtype)) / (1 / scale)      # by the temperature: rounded as the positives are


def similarities(
    rows: Tensor, part: slice, keys: Tensor, own: int | None
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Products [n, b] of a part of the scaled rows with each block of keys, the block [b, D], and where it lies in ``keys``.

    The product of row i and key ``own + i`` is -inf.
    """
    step = _size(rows)[1]
    for start in range(0, len(keys), step):
        which = slice(start, start + step)
        block = keys[which].to(rows.dtype)                                                          # [b, D]
        s = rows[part] @ block.T                                                                    # [n, b]
        if own is not None and -len(s) < (ahead := own + part.start - start) < s.shape[1]:
            s.diagonal(ahead).fill_(-math.inf)
        yield s, block, which


def finite(top: Tensor) -> Tensor:
    """A maximum to be taken off: -inf, that of no key at all, as 0, for -inf - -inf is not 0."""
    return top.masked_fill(top == -math.inf, 0)
