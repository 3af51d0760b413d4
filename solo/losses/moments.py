"""Second moments of features over the global batch, in the cheaper of two forms.

The losses that decorrelate features need ``|X' Y|^2``, the sum of squares of a D x D matrix. It equals ``<X X', Y Y'>``, the
inner product of two N x N matrices (Gram form): with N rows of all ranks and N < D that is less work, and D x D numbers less
memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from solo.dist import all_reduce, gather_joint, sum_joint, world_size
from solo.precision import full_precision

GRAM_BELOW = 1.0    # rows per feature


class Moments:
    """Of features x [B, D] and y [B, D], the local rows; sums over the N rows of all ranks, means taken off.

    Every rank has the same values, and gradients that are right once DDP has averaged them.

    Attributes:
        count: N.
        xx, yy, xy: [D] sums of squares and of products of the same feature.
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.count = world_size() * len(x)
        d = x.shape[1]
        self._gram = self.count < GRAM_BELOW * d
        if self._gram and world_size() > 1:
            x, y = gather_joint(torch.cat([x, y], dim=1)).split(d, dim=1)                           # [N, D] each
        totals = torch.stack([x.detach().sum(0), y.detach().sum(0)])                                # [2, D]
        mean_x, mean_y = (totals if self._gram else all_reduce(totals)) / self.count
        self._x, self._y = x - mean_x, y - mean_y       # nothing below changes with the means: these are constants
        rows = self._x, self._y
        sums = torch.stack([(a * b).sum(0) for a, b in ((rows[0], rows[0]), (rows[1], rows[1]), (rows[0], rows[1]))])
        self.xx, self.yy, self.xy = sums if self._gram else sum_joint(sums)                         # [D] each

    def squared_cross(self, scale_x: Tensor, scale_y: Tensor) -> Tensor:
        """``|X' Y|^2`` over all D x D entries, columns scaled by the two [D]."""
        if self._gram:
            return _SquaredGram.apply(self._x * scale_x, self._y * scale_y)
        return (sum_joint(self._x.T @ self._y) * scale_x[:, None] * scale_y).square().sum()

    def squared_own(self) -> tuple[Tensor, Tensor]:
        """``|X' X|^2`` and ``|Y' Y|^2`` over all D x D entries."""
        if self._gram:
            return _SquaredGram.apply(self._x, None), _SquaredGram.apply(self._y, None)
        xx, yy = sum_joint(torch.stack([self._x.T @ self._x, self._y.T @ self._y]))
        return xx.square().sum(), yy.square().sum()


class _SquaredGram(torch.autograd.Function):
    """``<X X', Y Y'>``, with the gradients ``2 (Y Y') X`` and ``2 (X X') Y``; without Y ``|X X'|^2``, with ``4 (X X') X``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        gram_x = x @ x.T                                                                            # [N, N]
        gram_y = gram_x if y is None else y @ y.T
        ctx.save_for_backward(x, y, gram_x, gram_y)
        return (gram_x * gram_y).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, y, gram_x, gram_y = ctx.saved_tensors
        if y is None:
            return _product(gram_x, x, 4 * grad), None
        return _product(gram_y, x, 2 * grad), _product(gram_x, y, 2 * grad)


@full_precision
def _product(gram: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    return (gram @ x).mul_(factor)
