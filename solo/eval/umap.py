"""``main_umap.py``: a checkpoint's features in two dimensions."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from solo.config import bind, plain
from solo.console import say
from solo.errors import DataError, EnvironmentFault
from solo.eval.features import extract
from solo.eval.picture import draw_maps
from solo.eval.prepare import data_config, data_module
from solo.eval.results import record, run_directory
from solo.export import load
from solo.files import write_file


@dataclass(kw_only=True)
class UMAPEvaluation:
    """Which checkpoint, on which images, and UMAP's own ``neighbors``, ``min_dist`` and ``metric``.

    ``max_images`` bounds the images of each part, evenly spread (null: all). ``backbone``, ``data``, ``output``,
    ``batch_size`` and ``device`` are those of ``main_knn.py``; images need neither labels nor a validation part.
    """

    checkpoint: str
    output: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    neighbors: int = 15
    min_dist: float = 0.1
    metric: Literal["cosine", "euclidean"] = "cosine"
    max_images: int | None = 10_000
    batch_size: int = 256
    seed: int = 5
    device: str | None = None

    def __post_init__(self) -> None:
        problems = [f"{name} must be at least {least}, got {value}" for name, value, least in (
            ("neighbors", self.neighbors, 2), ("batch_size", self.batch_size, 1), ("max_images", self.max_images, 3))
            if value is not None and value < least]
        if not 0 <= self.min_dist <= 1:
            problems.append(f"min_dist must lie in [0, 1], got {self.min_dist}")
        if problems:
            raise ValueError("\n".join(problems))


def evaluate_umap(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Fit the map to the train images, place the validation images into it, write ``umap.png`` and ``umap.npz``.

    Args:
        values: keys of `UMAPEvaluation`.

    Returns:
        What the file holds: ``train`` [N, 2] and ``train_labels`` [N], and ``val``, ``val_labels`` where there are such.

    Raises:
        ConfigError: wrong keys, no such checkpoint, or images that do not suit it.
        EnvironmentFault: umap-learn is not installed.
        DataError: too few images.
    """
    config = bind(UMAPEvaluation, values)
    source = load(config.checkpoint, config.backbone)
    if find_spec("umap") is None:
        raise EnvironmentFault("main_umap.py needs the package umap-learn: pip install 'solo-ssl[umap]'")
    data = data_module(source, data_config(source, config.data), [], config.batch_size, judged=False)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = source.backbone.to(device)
    parts = {"train": True, "val": False} if data.val_dataloader() else {"train": True}
    found = {part: extract(backbone, data.clean_loader(train=train, limit=config.max_images), device)
             for part, train in parts.items()}
    points = embed(config, {part: rows.features.numpy() for part, rows in found.items()})
    content = {**points, **{f"{part}_labels": rows.labels.numpy() for part, rows in found.items()}}
    output = Path(config.output) if config.output else run_directory(source.path)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content)  # type: ignore[arg-type]
    write_file(output / "umap.npz", buffer.getvalue())
    titles = {"train": "train images", "val": "validation images, placed into the map of the train images"}
    maps = {f"{len(points[part])} {titles[part]}": (points[part], content[f"{part}_labels"]) for part in parts}
    say(f"picture: {draw_maps(maps, output / 'umap.png')}")
    path = record(output, "umap", {
        "protocol": f"UMAP of backbone features, clean images: {config.neighbors} neighbours, {config.metric} distance; "
                    f"fitted to the train images",
        "results": {f"{part}_images": len(points[part]) for part in parts}, "points": "umap.npz", "picture": "umap.png",
        "checkpoint": str(source.path), "checkpoint_sha256": source.sha256,
        "config": {**plain(config), "backbone": plain(source.config), "data": plain(data.config)},
    })
    say(f"results: {path}")
    return content


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """numba's parallel functions, which umap-learn is made of, set OpenMP's number of threads, and so torch's."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def embed(config: UMAPEvaluation, features: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Points [N, 2] of each part's features [N, D]; the first part makes the map, the others are placed into it.

    Raises:
        DataError: the first part has fewer than 3 images.
    """
    from umap import UMAP

    first, *others = features
    count = len(features[first])
    if count < 3:
        raise DataError(f"a map needs at least 3 images, and there are {count}")
    neighbors = min(config.neighbors, count - 1)
    if neighbors < config.neighbors:
        say(f"neighbors={neighbors}: there are only {count} images")
    with warnings.catch_warnings(), _torch_threads_kept():
        warnings.filterwarnings("ignore", module="umap")                    # on its single thread and its small graphs
        mapper = UMAP(n_neighbors=neighbors, min_dist=config.min_dist, metric=config.metric, random_state=config.seed, n_jobs=1,
                      init="random" if count < 10 else "spectral")
        points = {first: mapper.fit_transform(features[first])}
        return points | {part: mapper.transform(features[part]) for part in others}
