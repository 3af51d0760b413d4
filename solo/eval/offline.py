"""``main_knn.py``: k-NN accuracy of a checkpoint over a grid of settings."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor

from solo.config import bind, plain
from solo.console import say
from solo.devices import torch_device
from solo.errors import ConfigError
from solo.eval.features import extract
from solo.eval.knn import Distance, Vote, knn_hits, percent
from solo.eval.prepare import data_config, data_module
from solo.eval.results import record, run_directory, show, writable
from solo.export import load

GRID = (1, 5, 10, 20, 50, 100, 200)


@dataclass(kw_only=True)
class KNNEvaluation:
    """Which checkpoint, on which images, with which votes.

    ``backbone`` and ``data`` hold what differs from the checkpoint's own config; ``output`` is where ``results.json``
    goes, by default the checkpoint's run directory; ``device`` is cuda where there is one; ``k`` is by default what of
    `GRID` there are labelled train images for.
    """

    checkpoint: str
    output: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    k: list[int] | None = None
    temperature: list[float] = field(default_factory=lambda: [0.07])
    distance: list[Distance] = field(default_factory=lambda: ["cosine", "euclidean"])
    batch_size: int = 256
    device: str | None = None

    def __post_init__(self) -> None:
        lists = ("k", "temperature", "distance")
        problems = [f"{name} must list at least one value" for name in lists if getattr(self, name) == []]
        problems += [f"k must be at least 1, got {k}" for k in self.k or () if k < 1]
        problems += [f"temperature must be positive, got {t}" for t in self.temperature if t <= 0]
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        if problems:
            raise ValueError("\n".join(problems))

    def neighbours(self, bank: int) -> list[int]:
        """The k of the grid, where so many labelled train images vote.

        Raises:
            ConfigError: one was asked for that is more.
        """
        asked = self.k or list(GRID)
        many = [k for k in asked if k > bank > 0]  # `knn_hits` refuses a bank of none
        if many and self.k:
            raise ConfigError(f"k={many} is more than the {bank} labelled training images that vote: use at most {bank}")
        if many:
            say(f"k={many} left out of the grid: only {bank} labelled training images vote")
        return [k for k in asked if k not in many]

    def votes(self, ks: list[int]) -> list[Vote]:
        """The grid; the temperature has no part in euclidean votes."""
        cosine = [Vote(k=k, temperature=t) for t in self.temperature for k in ks] if "cosine" in self.distance else []
        euclidean = [Vote(k=k, distance="euclidean") for k in ks] if "euclidean" in self.distance else []
        return cosine + euclidean


def evaluate_knn(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Print the grid and record it in ``results.json`` under ``knn``.

    Args:
        values: keys of `KNNEvaluation`.

    Returns:
        One row per setting: distance, k, temperature (None for euclidean), acc1 and acc5 in percent.

    Raises:
        ConfigError: wrong keys, no such checkpoint, images that do not suit it, or fewer of them than a k.
    """
    config = bind(KNNEvaluation, values)
    device = torch_device(config.device)
    output = writable(config.output)
    source = load(config.checkpoint, config.backbone)
    data = data_module(source, data_config(source, config.data), [], config.batch_size)
    ks = config.neighbours(int(np.count_nonzero(data.labels >= 0)))
    backbone = source.backbone.to(device)
    bank, queries = (extract(backbone, data.clean_loader(train=train), device).to(device) for train in (True, False))
    votes = config.votes(ks)
    hits = knn_hits(bank, queries, data.spec.classes, votes)
    rows = [_row(vote, row) for vote, row in zip(votes, hits, strict=True)]
    counts = {"train_images": len(bank.labels), "test_images": int(hits[0, 2])}
    protocol = "weighted k-NN on backbone features, clean images, bank = training split, queries = validation split"
    caption = "{protocol}\n{train_images} train and {test_images} test images".format(protocol=protocol, **counts)
    _show(rows, ks, f"k-NN top-1 accuracy in % · {config.checkpoint}", caption)
    path = record(output or run_directory(source.path), "knn", {
        "metric": "accuracy in percent", "protocol": protocol, **counts, "results": rows, "checkpoint": str(source.path),
        "checkpoint_sha256": source.sha256,
        "config": {**plain(replace(config, k=ks)), "backbone": plain(source.config), "data": plain(data.config)},
    })
    say(f"results: {path}")
    return rows


def _row(vote: Vote, hits: Tensor) -> dict[str, Any]:
    temperature = vote.temperature if vote.distance == "cosine" else None
    return {"distance": vote.distance, "k": vote.k, "temperature": temperature, **percent(hits)}


def _show(rows: list[dict[str, Any]], ks: list[int], title: str, caption: str) -> None:
    """A line per k, a column per distance and temperature."""
    cells = {(_column(row), row["k"]): row["acc1"] for row in rows}
    columns = list(dict.fromkeys(_column(row) for row in rows))
    show(title, ["k", *columns], [[k, *(cells[column, k] for column in columns)] for k in ks], caption)


def _column(row: dict[str, Any]) -> str:
    return str(row["distance"]) if row["temperature"] is None else f"{row['distance']} T={row['temperature']:g}"
