"""UniGrad and the gradients it unifies (Tao et al. 2022, https://arxiv.org/abs/2112.05141).

A form says by which vector each online row is moved: a positive part that pulls it to its target and a negative part
that keeps rows or dimensions apart. ``<form>_gradients`` computes both, and the objective they belong to;
``unigrad_<form>_loss_func(z1, z2, m1, m2[, memory], *, ...)`` is a scalar whose autograd delivers them, the positive
similarity and, of a form with a memory, the new one. Throughout, z1, z2 [B, D] are the online rows of two views and m1,
m2 [B, D] the target rows, constants; without teacher they are ``z1.detach()`` and ``z2.detach()``. Rows are L2-normalised
here, except by `vicreg_gradients`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize, relu

from solo.dist import all_reduce, gather, world_size
from solo.kernels import queue_attention
from solo.precision import full_precision

Pair = tuple[Tensor, Tensor]


class Gradients(NamedTuple):
    """What moves the online rows of (view 1, view 2).

    Attributes:
        rows: [B, D] each, where the gradients are taken: z1 and z2 as the form sees them, with their graph.
        positive, negative: [B, D] each, constants; their sum is B times the gradient of a view's objective.
        objective: what is minimised, mean over rows and views; a constant.
        similarity: mean cosine between a view's rows and the other view's targets; a constant.
    """

    rows: Pair
    positive: Pair
    negative: Pair
    objective: Tensor
    similarity: Tensor

    def carrier(self) -> Tensor:
        """The scalar whose gradient at the rows is (positive + negative) / 2 B. Its value means nothing."""
        (z1, z2), (p1, p2), (n1, n2) = self.rows, self.positive, self.negative
        return (_dot(z1, p1 + n1) + _dot(z2, p2 + n2)) / 2

    def loss(self) -> Tensor:
        """The objective's value with the carrier's gradient."""
        carrier = self.carrier()
        return self.objective + (carrier - carrier.detach())

    def norms(self) -> Pair:
        """Mean length of a row's positive and of its negative part."""
        positive, negative = (torch.cat(part).norm(dim=1).mean() for part in (self.positive, self.negative))
        return positive, negative

    def mixed(self, other: "Gradients", share: float) -> "Gradients":
        """``share`` of these and ``1 - share`` of the others, which were taken at the same rows with other targets."""

        def mix(mine: Tensor, theirs: Tensor) -> Tensor:
            return theirs.lerp(mine, share)

        (p1, p2), (n1, n2) = map(mix, self.positive, other.positive), map(mix, self.negative, other.negative)
        objective, similarity = mix(self.objective, other.objective), mix(self.similarity, other.similarity)
        return Gradients(self.rows, (p1, p2), (n1, n2), objective, similarity)


# --- the forms ---------------------------------------------------------------------------------------------------------


@full_precision
def unigrad_gradients(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, F: Tensor, *, lambda_: float) -> Gradients:
    """UniGrad: ``-m + lambda z F``, the gradient of ``-cos(z, m) + lambda / 2 z F z'``.

    Args:
        F: [D, D] moving average of `correlation`.
        lambda_: weight of the negative part.
    """

    def view(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        positive, negative = -m, lambda_ * z @ F
        return positive, negative, _dot(z, positive) + _dot(z, negative) / 2

    return _both(view, _unit(z1, z2), _unit(m1, m2))


@full_precision
def simclr_gradients(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, *, temperature: float) -> Gradients:
    """SimCLR: ``(-m + sum_v softmax_v(z v / t) v) / t`` over the targets v of both views and all ranks, the own
    ones among them; the gradient of that InfoNCE."""
    targets = _unit(m1, m2)
    bank = gather(torch.cat(targets))                                           # [world * 2 B, D]

    def view(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, lse = queue_attention(z, bank, 1 / temperature)                   # [B, D], [B]
        positive, negative = -m / temperature, mean / temperature
        return positive, negative, _dot(z, positive) + lse.mean()

    return _both(view, _unit(z1, z2), targets)


@full_precision
def moco_gradients(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, queue: Tensor, *, temperature: float) -> Gradients:
    """MoCo: SimCLR's with v over the row's own target and a queue [K, D] of past ones, normalised rows."""

    def view(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, past = queue_attention(z, queue, 1 / temperature)                 # [B, D], [B]
        logits = torch.stack([(z * m).sum(1) / temperature, past], dim=1)       # [B, 2], the own target and the queue
        own, others = logits.softmax(1).split(1, dim=1)                         # [B, 1] each
        positive, negative = -m / temperature, (own * m + others * mean) / temperature
        return positive, negative, _dot(z, positive) + logits.logsumexp(1).mean()

    return _both(view, _unit(z1, z2), _unit(m1, m2))


@full_precision
def directpred_gradients(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, W: Tensor, A: Tensor) -> Gradients:
    """BYOL and SimSiam with the predictor in closed form: ``(-m W + c z A) / |z W|`` with ``c = (z W m') / (z A z')``.

    The objective is ``-cos(z W, m)``. The published A is not W^2, so this is not exactly its gradient; c makes the
    gradient orthogonal to z all the same.

    Args:
        W, A: [D, D], see `direct_predictor`.
    """

    def view(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = (z @ W).norm(dim=1, keepdim=True).clamp(min=1e-12)             # [B, 1]
        pull, push = m @ W, z @ A                                               # [B, D]
        c = (z * pull).sum(1, keepdim=True) / (z * push).sum(1, keepdim=True).clamp(min=1e-12)
        positive, negative = -pull / length, c * push / length
        return positive, negative, _dot(z, positive)

    return _both(view, _unit(z1, z2), _unit(m1, m2))


@full_precision
def barlow_gradients(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, *, lambda_: float) -> Gradients:
    """Barlow Twins: ``2 (-m + lambda (m M') Z / N)`` with all N rows Z, M of all ranks, the gradient of
    ``-2 tr C + lambda |C|^2`` with ``C = Z' M / N`` [D, D].

    As published: L2-normalised rows, columns not standardised, and the diagonal weighted like the rest.
    """

    def view(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        all_z, all_m = gather(z), gather(m)                                     # [world * B, D]
        positive, negative = -2 * m, 2 * lambda_ * (m @ all_m.T) @ all_z / len(all_z)
        return positive, negative, _dot(z, positive) + _dot(z, negative) / 2

    return _both(view, _unit(z1, z2), _unit(m1, m2))


@full_precision
def vicreg_gradients(
    z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, *, invariance: float, variance: float, covariance: float
) -> Gradients:
    """VICReg: the gradient of ``2 (invariance mean (z - m)^2 + variance mean relu(1 - std) + covariance |off C|^2 / D)``
    where std and C are those of all ranks' rows of the view. Rows are not normalised.

    With m = z as constants this is the gradient of the loss of Bardes et al. (2022), which has the invariance once and
    the other terms for each view.
    """

    def view(z: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = gather(z)                                                        # [N, D]
        n, d = rows.shape
        x, centred = z - rows.mean(0), rows - rows.mean(0)
        std = (rows.var(0) + 1e-4).sqrt()                                       # [D]
        off = centred.T @ centred / (n - 1)                                     # [D, D]
        off.fill_diagonal_(0)
        hinge, spread = relu(1 - std), n / (n - 1)
        positive = 4 * invariance * (z - m) / d
        negative = 2 * spread / d * (4 * covariance * x @ off - variance * x * (hinge > 0) / std)
        terms = invariance * (z - m).square().mean() + variance * hinge.mean() + covariance * off.square().sum() / d
        return positive, negative, 2 * terms

    return _both(view, (z1, z2), (m1, m2))


View = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def _both(view: View, rows: Pair, targets: Pair) -> Gradients:
    """Each view's rows with the other view's targets; ``view(z, m)`` gives positive, negative and objective."""
    (z1, z2), (m1, m2) = rows, targets
    (p1, n1, o1), (p2, n2, o2) = view(z1, m2), view(z2, m1)
    similarity = (_dot(*_unit(z1, m2)) + _dot(*_unit(z2, m1))) / 2
    return Gradients(rows, (p1, p2), (n1, n2), (o1 + o2) / 2, similarity)


def _unit(a: Tensor, b: Tensor) -> Pair:
    return normalize(a, dim=1), normalize(b, dim=1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of their inner products."""
    return (a * b).sum(1).mean()


# --- their memories ----------------------------------------------------------------------------------------------------


@torch.no_grad()
@full_precision
def correlation(m1: Tensor, m2: Tensor) -> Tensor:
    """Mean of m' m over the L2-normalised rows of both views and all ranks, [D, D] with trace 1."""
    rows = torch.cat(_unit(m1, m2))                                             # [2 B, D]
    return all_reduce(rows.T @ rows / len(rows)) / world_size()


@torch.no_grad()
@full_precision
def direct_predictor(F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """DirectPred's optimal predictor for the correlation F = U diag(s) U' (Tian et al. 2021, arXiv:2102.06810).

    Returns:
        ``W = U diag(max(sqrt(s / s_max) + eps, 1e-4)) U'`` [D, D] and s_max, a scalar.
    """
    values, vectors = torch.linalg.eigh(F.nan_to_num())         # which raises where a loss may still say what is wrong
    largest = values[-1].clamp(min=1e-12)
    noise = 10 * torch.finfo(F.dtype).eps * largest         # what rounding leaves of a value 0: its root would be visible
    values = values.where(values > noise, 0.0)
    lengths = ((values / largest).sqrt() + eps).clamp(min=1e-4)
    return vectors * lengths @ vectors.T, largest


@torch.no_grad()
@full_precision
def direct_metric(F: Tensor, largest: Tensor, eps: float) -> Tensor:
    """``A = F / s_max + eps^2 I`` [D, D], which stands in for W^2 in the published gradient."""
    A = F / largest
    A.diagonal().add_(eps**2)
    return A


def _moved(F: Tensor | None, batch: Tensor, rho: float) -> Tensor:
    return batch if F is None else rho * F + (1 - rho) * batch


# --- losses ------------------------------------------------------------------------------------------------------------


def unigrad_loss_func(
    z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, F: Tensor | None, *, lambda_: float, rho: float
) -> tuple[Tensor, Tensor, Tensor]:
    """UniGrad as published: F moves on to this batch, then gives the gradient.

    Args:
        z1, z2: [B, D] online rows, normalised here.
        m1, m2: [B, D] target rows, normalised here.
        F: [D, D], None before the first step.
        lambda_: weight of the negative part.
        rho: decay of F.

    Returns:
        The scalar that carries the gradient (its value is not the objective), the mean cosine between a view and the
        other view's targets, and the new F.
    """
    F = _moved(F, correlation(m1, m2), rho)
    return *_delivered(unigrad_gradients(z1, z2, m1, m2, F, lambda_=lambda_)), F


def unigrad_byol_directpred_loss_func(
    z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, F: Tensor | None, *, rho: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `unigrad_loss_func`, with `directpred_gradients` of the new F and ``eps`` of `direct_predictor`. The loss is 0 up
    to rounding."""
    F = _moved(F, correlation(m1, m2), rho)
    W, largest = direct_predictor(F, eps)
    return *_delivered(directpred_gradients(z1, z2, m1, m2, W, direct_metric(F, largest, eps))), F


def unigrad_simsiam_loss_func(
    z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, F: Tensor | None, *, rho: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`unigrad_byol_directpred_loss_func` by its other name: SimSiam is BYOL whose targets are the online rows."""
    return unigrad_byol_directpred_loss_func(z1, z2, m1, m2, F, rho=rho, eps=eps)


def unigrad_simclr_loss_func(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, *, temperature: float) -> Pair:
    """`simclr_gradients`: the scalar that carries them, and the mean cosine to the targets."""
    return _delivered(simclr_gradients(z1, z2, m1, m2, temperature=temperature))


def unigrad_moco_loss_func(
    z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, queue: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`moco_gradients`: the scalar that carries them, the mean cosine to the targets, and the new queue.

    Args:
        queue: [K, D] normalised targets of past batches, the oldest first. In the new one those of both views and all
            ranks follow it and as many of the oldest are left out.
    """
    with torch.no_grad():
        moved = torch.cat([queue, *map(gather, _unit(m1, m2))])[-len(queue) :]
    return *_delivered(moco_gradients(z1, z2, m1, m2, queue, temperature=temperature)), moved


def unigrad_barlow_loss_func(z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, *, lambda_: float) -> Pair:
    """`barlow_gradients`: the scalar that carries them, and the mean cosine to the targets."""
    return _delivered(barlow_gradients(z1, z2, m1, m2, lambda_=lambda_))


def unigrad_vicreg_loss_func(
    z1: Tensor, z2: Tensor, m1: Tensor, m2: Tensor, *, invariance: float, variance: float, covariance: float
) -> Pair:
    """`vicreg_gradients`: the scalar that carries them, and the mean cosine to the targets."""
    return _delivered(
        vicreg_gradients(z1, z2, m1, m2, invariance=invariance, variance=variance, covariance=covariance)
    )


def _delivered(gradients: Gradients) -> Pair:
    return gradients.carrier(), gradients.similarity
