"""Weighted k-nearest-neighbour classification, as solo-learn's offline and online evaluation."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.errors import DataError
from solo.eval.features import Features

Distance = Literal["cosine", "euclidean"]
_ELEMENTS = 2**24  # of the largest intermediate matrix: 64 MB in float32


@dataclass(frozen=True, kw_only=True)
class Vote:
    """How neighbours vote.

    ``cosine``: L2-normalised features, weight exp(similarity / temperature).
    ``euclidean``: weight 1 / (distance + 1e-5); the temperature is not used.
    """

    k: int = 20
    temperature: float = 0.07
    distance: Distance = "cosine"

    def __post_init__(self) -> None:
        problems = []
        if self.k < 1:
            problems.append(f"k must be at least 1, got {self.k}")
        if self.temperature <= 0:
            problems.append(f"temperature must be positive, got {self.temperature}")
        if problems:
            raise ValueError("\n".join(problems))


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    num_classes: int,
    *,
    k: int,
    temperature: float = 0.07,
    distance: Distance = "cosine",
    chunk: int | None = None,
) -> Tensor:
    """Summed vote of the k nearest labelled train rows for each class.

    Args:
        train_features: [M, D].
        train_labels: [M], rows with -1 do not vote.
        features: [N, D], same device and dtype as the train rows.
        num_classes: classes of the dataset, C.
        k: neighbours; the whole bank where it is smaller.
        temperature: of the cosine weights.
        distance: ``cosine`` or ``euclidean``.
        chunk: rows compared at a time; by default as many as keep memory bounded.

    Returns:
        [N, C] float64 on the CPU (exp(1 / 0.01) does not fit float32).
    """
    vote = Vote(k=k, temperature=temperature, distance=distance)
    bank = Features(train_features, train_labels)
    parts = [_scores(weights, labels, num_classes, vote)
             for weights, labels, _ in _neighbours(bank, Features(features, features.new_zeros(len(features))), [vote], chunk)]
    return torch.cat(parts) if parts else torch.zeros(0, num_classes, dtype=torch.float64)  # [N, C]


def knn_hits(bank: Features, queries: Features, num_classes: int, votes: Sequence[Vote], chunk: int | None = None) -> Tensor:
    """Counts from which accuracies are made, so that ranks can be summed.

    Args:
        bank: train rows; those without label do not vote.
        queries: rows to classify; those without label are not counted.
        num_classes: classes of the dataset, C.
        votes: settings; all of one distance share one search.
        chunk: rows compared at a time.

    Returns:
        [len(votes), 3] int64 on the CPU: right at first guess, right among min(5, k, C) guesses, rows counted.

    Raises:
        DataError: no train row has a label.
    """
    hits = torch.zeros(len(votes), 3, dtype=torch.long)
    queries = queries.labelled()
    for distance in dict.fromkeys(vote.distance for vote in votes):
        chosen = [i for i, vote in enumerate(votes) if vote.distance == distance]
        for affinity, labels, targets in _neighbours(bank, queries, [votes[i] for i in chosen], chunk):
            for i in chosen:
                guesses = min(5, votes[i].k, labels.shape[1], num_classes)
                ranking = _scores(affinity, labels, num_classes, votes[i]).topk(guesses).indices  # [n, guesses]
                right = ranking == targets[:, None]
                hits[i] += torch.stack([right[:, 0].sum(), right.any(1).sum(), torch.tensor(len(targets))])
    return hits


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    k: int,
    temperature: float = 0.07,
    distance: Distance = "cosine",
    chunk: int | None = None,
) -> dict[str, float]:
    """``{"acc1", "acc5"}`` in percent of the labelled rows; arguments as `knn_scores`, ``labels`` [N]."""
    vote = Vote(k=k, temperature=temperature, distance=distance)
    hits = knn_hits(Features(train_features, train_labels), Features(features, labels), num_classes, [vote], chunk)
    return percent(hits[0])


def percent(hits: Tensor) -> dict[str, float]:
    """``{"acc1", "acc5"}`` of one row (top-1 hits, top-5 hits, rows counted)."""
    first, five, rows = hits.tolist()
    return {"acc1": 100 * first / rows, "acc5": 100 * five / rows} if rows else {"acc1": float("nan"), "acc5": float("nan")}


def _neighbours(
    bank: Features, queries: Features, votes: Sequence[Vote], chunk: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each chunk of queries: similarity (or distance) of the nearest rows [n, k], their labels [n, k], targets [n]; CPU."""
    bank = bank.labelled()
    if not len(bank.labels):
        raise DataError("k-NN needs labelled train images, and none has a label")
    k = min(max(vote.k for vote in votes), len(bank.labels))
    cosine = votes[0].distance == "cosine"
    train = F.normalize(bank.features, dim=-1) if cosine else bank.features                              # [M, D]
    squares = train.square().sum(1)                                                                      # [M]
    chunk = chunk or max(1, _ELEMENTS // max(len(train), k * train.shape[1]))
    for rows, targets in zip(queries.features.split(chunk), queries.labels.split(chunk), strict=True):
        if cosine:
            affinity, nearest = (F.normalize(rows, dim=-1) @ train.T).topk(k)                            # [n, k]
        else:
            nearest = (squares - 2 * rows @ train.T).topk(k, largest=False).indices                      # [n, k]
            # The expansion above loses the small distances, which weigh most: measure the chosen ones again.
            affinity, order = (rows[:, None] - train[nearest]).norm(dim=-1).sort(dim=-1)                 # [n, k]
            nearest = nearest.gather(1, order)
        yield affinity.cpu(), bank.labels[nearest].cpu(), targets.cpu()


def _scores(affinity: Tensor, labels: Tensor, num_classes: int, vote: Vote) -> Tensor:
    """Votes of the first ``vote.k`` columns, [n, C] float64."""
    affinity, labels = affinity[:, : vote.k].double(), labels[:, : vote.k]
    weights = (affinity / vote.temperature).exp() if vote.distance == "cosine" else 1 / (affinity + 1e-5)  # [n, k]
    return weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)                  # [n, C]
