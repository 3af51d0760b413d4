"""Softmax sums over many keys, block by block: nothing as large as the matrix of similarities is ever made.

Similarities are ``s_ij = rows_i . keys_j / temperature``. What a contrastive loss needs of them is, per row, their logsumexp
and sums of keys weighted with ``exp(s_ij - ...)``. Every gradient here follows from ``d logsumexp_j(s_ij) / d rows_i =
sum_j softmax_j(s_ij) keys_j / temperature``, which is attention with keys as values.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solo.precision import full_precision

# Rows and keys of a block of similarities: what stays in a core's cache, and what keeps a GPU busy.
CPU_BLOCK, GPU_BLOCK = (512, 1024), (4096, 4096)


def attend(rows: Tensor, keys: Tensor, temperature: float, own: int | None = None) -> tuple[Tensor, Tensor]:
    """``logsumexp_j(s_ij)`` and ``sum_j softmax_j(s_ij) keys_j``: attention over a queue.

    Args:
        rows: [..., D]; [N, D] with ``own``.
        keys: [K, D].
        temperature: divides the products.
        own: leave out, for row i, key ``own + i``.

    Returns:
        [...] and [..., D].
    """
    flat = rows.reshape(-1, rows.shape[-1])                                                         # [N, D]
    lse, mean = flat.new_empty(len(flat)), torch.empty_like(flat)                                   # [N], [N, D]
    for part in _parts(flat):
        top = flat.new_full((len(flat[part]),), -math.inf)                                          # [n]
        total, sums = torch.zeros_like(top), torch.zeros_like(flat[part])                           # [n], [n, D]
        for s, block, _ in _similarities(flat, part, keys, temperature, own):
            above = torch.maximum(top, s.amax(1))
            weights = s.sub_(above[:, None]).exp_()                                                 # [n, b]
            shrink = (top - above).exp()
            total = total * shrink + weights.sum(1)
            sums = torch.addmm(sums * shrink[:, None], weights, block)
            top = above
        lse[part], mean[part] = top + total.log(), sums / total[:, None]
    return lse.view(rows.shape[:-1]), mean.view(rows.shape)


def row_logsumexp(rows: Tensor, keys: Tensor, temperature: float, own: int | None = None) -> Tensor:
    """The first result of `attend` alone, for rows [N, D]: [N]; no gradient."""
    lse = rows.new_empty(len(rows))
    for part in _parts(rows):
        top = rows.new_full((len(rows[part]),), -math.inf)                                          # [n]
        total = torch.zeros_like(top)
        for s, _, _ in _similarities(rows, part, keys, temperature, own):
            above = torch.maximum(top, s.amax(1))
            total = total * (top - above).exp() + s.sub_(above[:, None]).exp_().sum(1)
            top = above
        lse[part] = top + total.log()
    return lse


@full_precision
def weighted_keys(
    rows: Tensor,
    keys: Tensor,
    temperature: float,
    row_lse: Tensor | None = None,
    key_lse: Tensor | None = None,
    own: int | None = None,
) -> Tensor:
    """``sum_j [exp(s_ij - row_lse_i) + exp(s_ij - key_lse_j)] keys_j``, the similarities computed anew: [N, D].

    The first part is what the softmax over row i's keys pulls it by, the second what the softmaxes of the keys, if each
    is taken over all rows, do to row i.

    Args:
        rows: [N, D].
        keys: [K, D].
        temperature: divides the products.
        row_lse: [N]; without it the first part is left out.
        key_lse: [K]; without it the second part is left out.
        own: leave out, for row i, key ``own + i``.
    """
    out = torch.zeros_like(rows)
    for part in _parts(rows):
        for s, block, which in _similarities(rows, part, keys, temperature, own):
            if row_lse is not None and key_lse is not None:
                weights = (s - row_lse[part, None]).exp_().add_(s.sub_(key_lse[which]).exp_())      # [n, b]
            elif row_lse is not None:
                weights = s.sub_(row_lse[part, None]).exp_()
            elif key_lse is not None:
                weights = s.sub_(key_lse[which]).exp_()
            else:
                raise ValueError("give row_lse, key_lse or both")
            out[part].addmm_(weights, block)
    return out


class LogSumExp(torch.autograd.Function):
    """The first result of `attend`; the second, its gradient, is all that is kept. Keys are constants."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, temperature: float, own: int | None) -> Tensor:
        lse, mean = attend(rows, keys, temperature, own)
        ctx.save_for_backward(mean)
        ctx.temperature = temperature
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (mean,) = ctx.saved_tensors
        return (grad / ctx.temperature)[..., None] * mean, None, None, None


def _block(x: Tensor) -> tuple[int, int]:
    return CPU_BLOCK if x.device.type == "cpu" else GPU_BLOCK


def _parts(rows: Tensor) -> list[slice]:
    step = _block(rows)[0]
    return [slice(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]


def _similarities(
    rows: Tensor, part: slice, keys: Tensor, temperature: float, own: int | None
) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Similarities [n, b] of a part of the rows to each block of keys, the block [b, D], and where it lies in ``keys``."""
    scaled, step = rows[part] / temperature, _block(rows)[1]
    for start in range(0, len(keys), step):
        which = slice(start, start + step)
        s = scaled @ keys[which].T                                                                  # [n, b]
        if own is not None and -len(s) < (ahead := own + part.start - start) < s.shape[1]:
            s.diagonal(ahead).fill_(torch.finfo(s.dtype).min)
        yield s, keys[which], which
