"""What a run has learned, at a glance: a table beside the untrained backbone and raw pixels, and ``report.png``."""

import csv
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo.checkpoint import digest
from solo.console import say
from solo.data.module import DataModule
from solo.eval.features import extract
from solo.eval.knn import knn_accuracy
from solo.eval.linear import linear_accuracy
from solo.eval.picture import Picture, draw
from solo.eval.results import record, show

log = logging.getLogger(__name__)

_PIXEL_SIDE = 32


@dataclass(kw_only=True)
class ReportConfig:
    """The summary after training: a table, ``results.json`` and ``report.png``.

    ``k``: neighbours of the k-NN. ``max_train`` and ``max_test`` bound the images compared, ``points`` those of the
    2-D embedding; ``images`` is how many are shown with their augmented views.
    """

    enabled: bool = True
    k: int = 20
    max_train: int = 10_000
    max_test: int = 10_000
    points: int = 1500
    images: int = 6

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least {least}, got {getattr(self, name)}" for name, least in
                    (("k", 1), ("max_train", 2), ("max_test", 1), ("points", 10), ("images", 1)) if getattr(self, name) < least]
        if self.enabled and self.k > self.max_train:
            problems.append(f"k={self.k} is more than max_train={self.max_train}")
        if problems:
            raise ValueError("\n".join(problems))


class Pixels(nn.Module):
    """The image itself as features, averaged down to at most 32 x 32: the baseline that learns nothing."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > _PIXEL_SIDE:
            x = F.adaptive_avg_pool2d(x, _PIXEL_SIDE)
        return x.flatten(1)                                                                         # [B, C * H * W]


def report(
    config: ReportConfig,
    method: nn.Module,
    untrained: nn.Module,
    data: DataModule,
    run_dir: Path,
    checkpoint: Path | None = None,
) -> list[dict[str, Any]]:
    """Compare, print, record and draw. What fails is told in one line: the run is done, and a report does not end it.

    Args:
        config: sizes.
        method: holds the trained ``backbone``.
        untrained: the same backbone before training.
        data: the run's images.
        run_dir: where ``results.json`` and ``report.png`` go, and where the CSV logs are.
        checkpoint: the run's last one, if saved.

    Returns:
        The rows of the table, empty where images have no labels or there is no validation part.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trained = method.get_submodule("backbone")
    rows: list[dict[str, Any]] = []
    with _spared("comparison"):
        if data.val_dataloader() and data.spec.classes > 1:
            networks = {"trained backbone": trained, "same backbone, untrained": untrained, "raw pixels": Pixels()}
            rows = comparison({name: network.to(device) for name, network in networks.items()}, data, config, device)
            _tell(rows, config, data, run_dir, checkpoint)
    with _spared("picture"):
        picture = _picture(trained.to(device), rows, config, data, run_dir, device)
        say(f"picture: {draw(picture, run_dir / 'report.png')}")
    return rows


@contextmanager
def _spared(what: str) -> Iterator[None]:
    """An error inside becomes a warning line; ``SOLO_DEBUG=1`` adds the traceback."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        debug = bool(os.environ.get("SOLO_DEBUG"))
        log.warning("the report has no %s (%s); the run itself is whole", what, reason[:300], exc_info=debug)


def _tell(
    rows: list[dict[str, Any]], config: ReportConfig, data: DataModule, run_dir: Path, checkpoint: Path | None
) -> None:
    """The table on the screen, and in ``results.json``."""
    caption = "{train_images} train and {test_images} test images".format(**rows[0])
    cells = [[row["features"], row["knn"], row["linear"]] for row in rows]
    show(f"{data.spec.name}: accuracy in %", ["features", f"k-NN (k={config.k})", "linear"], cells, caption)
    record(run_dir, "comparison", {
        "metric": "top-1 accuracy in percent",
        "protocol": f"clean images; k-NN: k={config.k}, cosine, temperature 0.07; "
                    "linear: logistic regression on standardised features",
        "results": rows, "checkpoint": str(checkpoint) if checkpoint else None,
        "checkpoint_sha256": digest(checkpoint) if checkpoint else None,
    })


def _picture(
    trained: nn.Module, rows: list[dict[str, Any]], config: ReportConfig, data: DataModule, run_dir: Path, device: torch.device
) -> Picture:
    has_val = bool(data.val_dataloader())
    shown = extract(trained, data.clean_loader(train=not has_val, limit=config.points), device)
    return Picture(
        history=history(run_dir), comparison=rows, points=embedding(shown.features), labels=shown.labels,
        sheet=data.sheet(config.images),
    )


def comparison(
    networks: dict[str, nn.Module], data: DataModule, config: ReportConfig, device: torch.device
) -> list[dict[str, Any]]:
    """k-NN and linear top-1 accuracy of each network's features, in percent, on the same clean images.

    Returns:
        One row per network: ``features`` (its name), ``knn``, ``linear``, ``train_images``, ``test_images``.
    """
    rows = []
    for name, network in networks.items():
        train = extract(network, data.clean_loader(train=True, limit=config.max_train), device).labelled()
        test = extract(network, data.clean_loader(train=False, limit=config.max_test), device).labelled()
        rows.append({
            "features": name,
            "knn": knn_accuracy(*train, *test, data.spec.classes, k=config.k)["acc1"],
            "linear": linear_accuracy(train, test, data.spec.classes)["acc1"],
            "train_images": len(train.labels),
            "test_images": len(test.labels),
        })
    return rows


def history(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every metric of the run's CSV logs as (step, value), merged over restarts; of one step the latest start counts."""
    merged: dict[str, dict[int, float]] = {}
    files = (run_dir / "csv").glob("version_*/metrics.csv")
    for file in sorted(files, key=lambda path: int(path.parent.name.removeprefix("version_"))):
        with file.open(newline="") as lines:
            for row in csv.DictReader(lines):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        merged.setdefault(name, {})[int(row["step"])] = float(value)
    return {name: sorted(values.items()) for name, values in merged.items()}


def embedding(features: Tensor) -> Tensor:
    """[N, D] features to [N, 2]: PCA to 50 dimensions, then t-SNE; PCA alone for fewer than 10 rows."""
    from sklearn.decomposition import PCA  # here: a run without a report does without
    from sklearn.manifold import TSNE

    rows = F.normalize(features, dim=-1).numpy()
    reduced = PCA(n_components=min(50, *rows.shape), random_state=0).fit_transform(rows)
    if len(rows) >= 10:
        reduced = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=0).fit_transform(reduced)
    flat = torch.zeros(len(rows), 2)
    columns = torch.from_numpy(reduced)[:, :2]
    flat[:, : columns.shape[1]] = columns
    return flat

