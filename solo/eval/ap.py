"""Average precision under its names: three published areas under a precision-recall curve, and their means.

Scores that are equal are one threshold: they are accepted together, so the order of the images never matters.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], float]


def curve(scores: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and recall when everything at or above each distinct score is accepted.

    Args:
        scores: [N], larger is more certain.
        positive: [N] bool.

    Returns:
        Precision [T] and recall [T] float64, from the highest threshold to the lowest; nan where nothing is positive.

    Raises:
        ValueError: a score is nan.
    """
    if scores.isnan().any():
        raise ValueError("average precision needs numbers to rank by, and a score is nan")
    ordered, order = scores.sort(descending=True)
    last = torch.ones_like(ordered, dtype=torch.bool)                                               # of its tie
    last[:-1] = ordered[1:] != ordered[:-1]
    hits = positive[order].cumsum(0)[last].double()                                                 # [T]
    accepted = torch.arange(1, len(scores) + 1, device=scores.device)[last]                         # [T]
    return hits / accepted, hits / positive.sum()


def ap_11point(scores: Tensor, positive: Tensor) -> float:
    """Mean over the recalls 0, 0.1, ..., 1 of the best precision at that recall or more (PASCAL VOC 2007).

    At recall 0 the precision counts as 1, as in the published transfer results (Ericsson et al. 2021), whose curve starts
    there. VOC's own kit takes the best precision reached: a class that is never ranked first gets up to 1/11 less.
    """
    precision, recall = curve(scores, positive)
    reached = recall >= torch.arange(1, 11, device=scores.device)[:, None].double() / 10            # [10, T]
    best = torch.where(reached, precision, 0.0).amax(1)                                             # [10]
    return float((1 + best.sum()) / 11) if positive.any() else float("nan")


def ap_area(scores: Tensor, positive: Tensor) -> float:
    """Area under the curve whose precision is made to fall monotonically (PASCAL VOC from 2010 on)."""
    precision, recall = curve(scores, positive)
    envelope = precision.flip(0).cummax(0).values.flip(0)                                           # [T]
    return _under(envelope, recall)


def ap_step(scores: Tensor, positive: Tensor) -> float:
    """Sum of precision times the recall gained at each threshold, without interpolation (scikit-learn's)."""
    return _under(*curve(scores, positive))


def _under(precision: Tensor, recall: Tensor) -> float:
    return float((precision * recall.diff(prepend=recall.new_zeros(1))).sum())


def per_class(metric: Metric, scores: Tensor, labels: Tensor) -> list[float]:
    """A metric for each class, nan for a class without a positive image.

    Args:
        metric: one of this module's.
        scores: [N, C].
        labels: [N, C]: 1 there, -1 not there, 0 not counted.
    """
    columns = zip(scores.T, labels.T, strict=True)
    return [metric(s[known], y[known] > 0) if (y > 0).any() else float("nan") for s, y in columns for known in [y != 0]]


def mean_ap(metric: Metric, scores: Tensor, labels: Tensor) -> float:
    """Mean over the classes that have a positive image; arguments as `per_class`."""
    return float(torch.tensor(per_class(metric, scores, labels), dtype=torch.float64).nanmean())


def ap_step_micro(scores: Tensor, labels: Tensor) -> float:
    """`ap_step` of all classes' scores in one list, as MV-MR publishes it: no mean over classes, so no mAP."""
    known = labels != 0
    return ap_step(scores[known], labels[known] > 0)
