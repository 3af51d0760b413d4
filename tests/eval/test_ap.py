"""Average precision: golden values of the published codes, known answers, ties, classes without a positive image."""

import math

import numpy as np
import pytest
import torch

from solo.eval.ap import ap_11point, ap_area, ap_step, ap_step_micro, mean_ap, per_class

ALL = [ap_11point, ap_area, ap_step]


@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_golden(golden, dtype, rtol):
    g = golden("voc_ap_small")
    scores, labels = g["scores"].to(dtype), torch.where(g["labels"] > 0, 1, -1)                     # [40, 5]
    for metric, name in ((ap_11point, "ap_11point"), (ap_area, "ap_area"), (ap_step, "ap_step_per_class")):
        assert per_class(metric, scores, labels) == pytest.approx(g[name].tolist(), rel=rtol, abs=0), name
        assert mean_ap(metric, scores, labels) == pytest.approx(g[name].mean().item(), rel=rtol, abs=0), name
    assert ap_step_micro(scores, labels) == pytest.approx(g["ap_step_micro"].item(), rel=rtol, abs=0)


def loops(scores, positive):
    """The three definitions in plain Python, one threshold at a time."""
    points = []
    for threshold in sorted(set(scores), reverse=True):
        accepted = [p for s, p in zip(scores, positive, strict=True) if s >= threshold]
        points.append((sum(accepted) / sum(positive), sum(accepted) / len(accepted)))
    best = lambda at: max((p for r, p in points if r >= at), default=0.0)  # noqa: E731
    eleven = (1 + sum(best(k / 10) for k in range(1, 11))) / 11
    steps = [(r - before, r, p) for (before, _), (r, p) in zip([(0, 0), *points], points, strict=False)]
    return {"ap_11point": eleven, "ap_area": sum(d * best(r) for d, r, _ in steps), "ap_step": sum(d * p for d, _, p in steps)}


@pytest.mark.parametrize("seed", range(8))
def test_loops_with_ties(seed):
    draw = np.random.default_rng(seed)
    scores, positive = draw.integers(0, 9, 30) / 7, draw.random(30) < 0.3
    positive[0] = True
    expected = loops(scores.tolist(), positive.tolist())
    for metric in ALL:
        assert metric(torch.tensor(scores), torch.tensor(positive)) == pytest.approx(expected[metric.__name__], abs=1e-14)


@pytest.mark.parametrize("metric", ALL)
def test_known_answers(metric):
    scores, positive = torch.tensor([0.9, 0.8, 0.3, 0.1]), torch.tensor([True, True, False, False])
    assert metric(scores, positive) == 1.0                                  # a perfect ranking
    assert metric(scores, torch.ones(4, dtype=torch.bool)) == 1.0           # nothing to confuse with
    assert math.isnan(metric(scores, torch.zeros(4, dtype=torch.bool)))     # nothing to find
    with pytest.raises(ValueError, match="nan"):
        metric(torch.tensor([0.9, math.nan]), torch.tensor([True, False]))


def test_worst_ranking_and_what_tells_the_three_apart():
    scores, positive = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([False, False, True, True])
    assert ap_step(scores, positive) == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert ap_area(scores, positive) == pytest.approx(0.5)                  # precision 1/3 is lifted to the later 1/2
    assert ap_11point(scores, positive) == pytest.approx((1 + 10 * 0.5) / 11)


@pytest.mark.parametrize("metric", [ap_area, ap_step])
def test_equal_scores_give_the_prevalence_in_any_order(metric):
    positive = torch.tensor([True, False, False, True, False])
    for order in (torch.arange(5), torch.arange(5).flip(0), torch.randperm(5)):
        assert metric(torch.zeros(5), positive[order]) == pytest.approx(0.4)


def test_recalls_of_tenths_are_reached_exactly():
    """3 of 10 positives are a recall of 0.3, which 0.1 + 0.1 + 0.1 exceeds."""
    positive = torch.tensor([True] * 3 + [False] * 90 + [True] * 7)
    late = [(3 + j) / (93 + j) for j in range(1, 8)]
    expected = (1 + 3 * 1.0 + 7 * max(late)) / 11
    assert ap_11point(torch.arange(100.0).flip(0), positive) == pytest.approx(expected)


def test_uncounted_images_and_empty_classes():
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    labels = torch.tensor([[0, -1], [1, -1], [-1, 0]])
    first, second = per_class(ap_step, scores, labels)
    assert first == 1.0 and math.isnan(second) and mean_ap(ap_step, scores, labels) == 1.0
    known = torch.tensor([0.1, 0.8, 0.2, 0.7]), torch.tensor([False, True, False, False])
    assert ap_step_micro(scores, labels) == ap_step(*known)
