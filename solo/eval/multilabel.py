"""Linear classifiers of frozen features where an image has any number of classes: one-vs-rest SVMs, and a linear head.

Labels are [N, C]: 1 there, -1 not there, 0 not counted for that class.
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.svm import LinearSVC
from torch import Tensor

from solo.data.random import order
from solo.eval.ap import ap_11point, ap_area, ap_step_micro, mean_ap

# Name -> the figure of merit of scores [N, C] and labels [N, C]; the mean over classes unless it says micro.
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "ap_11point": lambda scores, labels: mean_ap(ap_11point, scores, labels),
    "ap_area": lambda scores, labels: mean_ap(ap_area, scores, labels),
    "ap_step_micro": ap_step_micro,
}


class Rows(NamedTuple):
    """Features [N, D] float32 and labels [N, C]."""

    features: Tensor
    labels: Tensor

    def take(self, rows: Tensor) -> "Rows":
        """Some of the rows, in that order."""
        return Rows(self.features[rows], self.labels[rows])

    def join(self, other: "Rows") -> "Rows":
        """Both, one below the other."""
        return Rows(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True, kw_only=True)
class SVMConfig:
    """One-vs-rest SVMs: ``shots`` positive images of each class, drawn ``draws`` times, and all images.

    ``costs`` are tried on the validation images, the best one for all classes is taken.
    """

    costs: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1, 0.5, 1.0, 10.0])
    shots: list[int] = field(default_factory=lambda: [16, 32, 64])
    draws: int = 5

    def __post_init__(self) -> None:
        problems = [f"shots must be at least 1, got {k}" for k in self.shots if k < 1]
        problems += [f"costs must be positive, got {cost}" for cost in self.costs if cost <= 0]
        if not self.costs:
            problems.append("costs must list at least one value")
        if self.draws < 1:
            problems.append(f"draws must be at least 1, got {self.draws}")
        if problems:
            raise ValueError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """A linear layer under binary cross-entropy; of the ``weight_decay`` values the validation images choose."""

    weight_decay: list[float] = field(default_factory=lambda: [1e-4, 1e-3, 1e-2, 1e-1, 1.0])

    def __post_init__(self) -> None:
        problems = [f"weight_decay must not be negative, got {value}" for value in self.weight_decay if value < 0]
        if not self.weight_decay:
            problems.append("weight_decay must list at least one value")
        if problems:
            raise ValueError("\n".join(problems))


def draw(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Rows of ``shots`` positive images of each class, all there are where there are fewer; joined, duplicates kept.

    Args:
        labels: [N, C].
        shots: images per class.
        seed: names the draw.
    """
    chosen = []
    for number, column in enumerate(labels.T):
        positive = (column > 0).nonzero()[:, 0]
        chosen.append(positive[torch.from_numpy(order(seed, number, len(positive))[:shots])])
    return torch.cat(chosen)


def svm_scores(train: Rows, features: Tensor, cost: float) -> tuple[Tensor, int]:
    """Margins of one linear SVM per class, as published for VOC 2007 (Goyal et al. 2019; Li et al. 2021).

    Squared hinge, L2, dual; a positive image weighs 2, a negative 1; features are divided by their norm + 1e-5.

    Args:
        train: rows to fit.
        features: [N, D] to score.
        cost: weight of the hinge against the squared norm.

    Returns:
        [N, C] float64, where a class that all counted train rows have, or none, scores 0 everywhere; and how many of
        the SVMs stopped at the published 2000 iterations, before their tolerance.
    """
    fitted, asked = (_unit(rows).double().numpy() for rows in (train.features, features))
    scores, unfinished = torch.zeros(len(features), train.labels.shape[1], dtype=torch.float64), 0
    for c, column in enumerate(train.labels.T):
        known = (column != 0).numpy()
        if len(column[known].unique()) == 2:
            machine = LinearSVC(C=cost, class_weight={1: 2, -1: 1}, tol=1e-4, max_iter=2000, dual=True, random_state=0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)                                 # counted below
                machine.fit(fitted[known], column[known].numpy())
            unfinished += int(machine.n_iter_ >= machine.max_iter)
            scores[:, c] = torch.from_numpy(machine.decision_function(asked))
    return scores, unfinished


def _unit(features: Tensor) -> Tensor:
    return features / (features.norm(dim=1, keepdim=True) + 1e-5)


def head_scores(train: Rows, features: Tensor, weight_decay: float) -> Tensor:
    """Logits of a linear layer on standardised features, where binary cross-entropy with logits is least.

    The loss is the mean over the train rows of the sum over classes, plus ``weight_decay`` / 2 times the squared norm of
    the weights. It is convex, so full-batch L-BFGS finds the one minimum: no rate, no epochs, no seed.

    Args:
        train: rows to fit.
        features: [N, D] to score.
        weight_decay: L2 coefficient.

    Returns:
        [N, C] float64.
    """
    x = train.features.double()
    mean, std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
    x, targets, counted = (x - mean) / std, (train.labels > 0).double(), (train.labels != 0).double()
    weight, bias = x.new_zeros(targets.shape[1], x.shape[1]), x.new_zeros(targets.shape[1])         # [C, D], [C]
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(parameters, max_iter=500, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        entropy = F.binary_cross_entropy_with_logits(F.linear(x, *parameters), targets, counted, reduction="sum") / len(x)
        value = entropy + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return F.linear((features.double() - mean) / std, *parameters)


def best(candidates: Sequence[float], scores: Callable[[float], Iterable[Tensor]], labels: Tensor) -> float:
    """The candidate whose scores have the best mean `ap_area`, the first of equals.

    Args:
        candidates: settings to choose from.
        scores: a setting -> scores [N, C] of each of several fits.
        labels: [N, C].
    """
    merits = [fmean(METRICS["ap_area"](found, labels) for found in scores(setting)) for setting in candidates]
    return candidates[int(torch.tensor(merits).nan_to_num(-1).argmax())]
