"""Softmax of rows over keys (InfoNCE, NT-Xent), forward and backward, without its matrix.

With ``s_ij = scale row_i . key_j`` and ``p_ij = exp(s_ij - lse_i)`` the forward pass is `row_logsumexp`, ``lse_i = log sum_j
exp(s_ij)``, and the gradients of ``sum_i lse_i`` are one operation, `weighted_keys`::

    d row_i = scale sum_j exp(s_ij - lse_i) key_j
    d key_j = scale sum_i exp(s_ij - lse_i) row_i

or, where rows and keys are the same tensor (NT-Xent), both at once. The weights are made again from one number per row, so the
ranks of a process group need to exchange no more: with rows of this rank and the keys of all, the gradient of the local rows
is complete, and no gradient has to be summed over ranks. Positives are pairs, of which there are few: they need no kernel.

`row_logsumexp_eager` and `weighted_keys_eager` are the eager forms, `solo.kernels.triton_contrast` has the Triton forms.
"""

import math

import torch
from torch import Tensor

from solo.kernels.blocks import finite, fit_one_block, parts, scaled, similarities
from solo.kernels.dispatch import uses_triton


def row_logsumexp(rows: Tensor, keys: Tensor, scale: float, own: int | None = None) -> Tensor:
    """``log sum_j exp(scale row_i . key_j)`` [N], float32 (float64 for float64 keys); without gradient.

    Args:
        rows: [N, D], taken in the keys' dtype.
        keys: [K, D].
        scale: 1 / temperature.
        own: leave out, for row i, key ``own + i``. A row without any key has -inf.
    """
    if not uses_triton(rows, keys):
        return row_logsumexp_eager(rows, keys, scale, own)
    from solo.kernels import triton_contrast

    return triton_contrast.row_logsumexp(rows, keys, scale, own)


def row_logsumexp_eager(rows: Tensor, keys: Tensor, scale: float, own: int | None = None) -> Tensor:
    """A running maximum, and a sum that shrinks when it grows."""
    rows = scaled(rows, keys, scale)                                                                # [N, D]
    lse = rows.new_empty(len(rows))                                                                 # [N]
    for part in parts(rows):
        if fit_one_block(keys):
            ((s, _, _),) = similarities(rows, part, keys, own)
            lse[part] = s.logsumexp(1)
            continue
        top = rows.new_full((len(rows[part]),), -math.inf)                                          # [n]
        total = torch.zeros_like(top)                                                               # [n]
        for s, _, _ in similarities(rows, part, keys, own):
            above = torch.maximum(top, s.amax(1))
            shift = finite(above)
            total = total * (top - shift).exp() + s.sub_(shift[:, None]).exp_().sum(1)
            top = above
        lse[part] = top + total.log()
    return lse


def weighted_keys(
    rows: Tensor, keys: Tensor, scale: float, row_lse: Tensor | None, key_lse: Tensor | None, own: int | None = None
) -> Tensor:
    """``sum_j [exp(s_ij - row_lse_i) + exp(s_ij - key_lse_j)] key_j``, the similarities computed anew: [N, D].

    The first part is what the softmax of row i over the keys pulls it by, the second what the softmaxes of the keys, each over
    all rows, do to row i. In float32 (float64 for float64 keys); without gradient.

    Args:
        rows: [N, D], taken in the keys' dtype.
        keys: [K, D].
        scale: 1 / temperature.
        row_lse: [N]; None: the first part is left out.
        key_lse: [K]; None: the second part is left out.
        own: leave out, for row i, key ``own + i``.
    """
    if row_lse is None and key_lse is None:
        raise ValueError("give row_lse, key_lse or both")
    if not uses_triton(rows, keys):
        return weighted_keys_eager(rows, keys, scale, row_lse, key_lse, own)
    from solo.kernels import triton_contrast

    return triton_contrast.weighted_keys(rows, keys, scale, row_lse, key_lse, own)


def weighted_keys_eager(
    rows: Tensor, keys: Tensor, scale: float, row_lse: Tensor | None, key_lse: Tensor | None, own: int | None = None
) -> Tensor:
    """Weights and their product, block by block."""
    rows = scaled(rows, keys, scale)                                                                # [N, D]
    of_rows, of_keys = (None if lse is None else finite(lse) for lse in (row_lse, key_lse))
    out = torch.zeros_like(rows)
    for part in parts(rows):
        for s, block, which in similarities(rows, part, keys, own):
            if of_rows is not None and of_keys is not None:
                weights = (s - of_rows[part, None]).exp_().add_(s.sub_(of_keys[which]).exp_())      # [n, b]
            elif of_rows is not None:
                weights = s.sub_(of_rows[part, None]).exp_()
            elif of_keys is not None:
                weights = s.sub_(of_keys[which]).exp_()
            out[part].addmm_(weights, block)
    return out
