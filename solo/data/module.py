"""From the ``data`` block to batches."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.trainer.states import TrainerStatus
from torch import Tensor

from solo.batch import Batch
from solo.console import warn
from solo.data.bad import LEFT_OUT, REPLACED, BadImages, load_or_replace
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS, DatasetSpec, statistics
from solo.data.engines import ENGINES, Job, choose, require
from solo.data.engines import dali as _dali  # noqa: F401  registers itself
from solo.data.engines.fast import MAX_SIZE
from solo.data.engines.torchvision import apply, clean
from solo.data.loaders import CleanLoader, Order, Position, TrainLoader
from solo.data.random import Draws
from solo.data.reads import watch
from solo.data.sources import ArraySource, Source, listing
from solo.data.subsets import Subset, in_memory, probe, stratified
from solo.data.views import View, expand, sample
from solo.dist import rank, world_size
from solo.errors import ConfigError

__all__ = ["DataConfig", "DataModule"]

class DataModule(pl.LightningDataModule):
    """Training batches of views, validation batches of clean images, and the position needed to resume exactly.

    Args:
        config: the ``data`` block.
        views: the augmentations; none for evaluation only.
        batch_size: images of one step on one process.
        seed: of order and augmentation.
        labelled: leave out training images without a label.

    Attributes:
        spec: the dataset's row with the config's overrides and the classes found.
        selected: [N] positions, in the whole training set, of the images used.
        bad: unreadable training images met so far (``count``, ``names``).
        report_dir: folder for ``bad_samples.jsonl``, or ``None``.

    Raises:
        ConfigError: the dataset is missing, empty, or contradicts the config.
    """

    def __init__(
        self, config: DataConfig, views: Sequence[View], batch_size: int, seed: int, labelled: bool = False
    ) -> None:
        super().__init__()
        watch(config.timeout)
        self.config, self.batch_size, self.seed = config, batch_size, seed
        self.views = expand(views)
        require(choose(config), self.views)
        row = DATASETS[config.dataset]
        whole = row.open(config, True)
        assert whole is not None
        val = _judges(whole, row.open(config, False))
        for key, source in (("train_path", whole), ("val_path", val)):
            _check_labels(source, key)
        self.spec = _spec(row, config, whole)
        self.selected = _selection(config, whole.labels, labelled)
        self._whole = whole
        self._train = whole if len(self.selected) == len(whole) else Subset(whole, self.selected)
        self._val = val
        _check_views(self.views, self.spec)
        probe(self._train)
        self._check_steps(1)
        self.bad = BadImages(self._train, config.max_bad_fraction, fate=REPLACED if views else LEFT_OUT)
        self.bad_val = None if val is None else BadImages(val, config.max_bad_fraction, fate=LEFT_OUT)
        self._position: Position | None = None
        self._loader: TrainLoader | None = None
        self._engine_name: str | None = None

    @property
    def labels(self) -> np.ndarray:
        """[N] of the training images used, -1 where there is none."""
        return self._train.labels

    @property
    def report_dir(self) -> Path | None:
        return self.bad.report_dir

    @report_dir.setter
    def report_dir(self, path: Path | None) -> None:
        self.bad.report_dir = path

    @cached_property
    def listing(self) -> str:
        """Which training images these are: equal on all ranks, and whenever a run goes on."""
        return listing(self._whole)

    @property
    def engine(self) -> str:
        """Name of the engine in use; the first call loads small images into memory."""
        return self._settled()

    def _settled(self) -> str:
        if self._engine_name is None:
            if self.config.engine != "torchvision":
                cache = None if self.config.cache_dir is None else Path(self.config.cache_dir)
                self._train = _read(self._train, self.bad, cache)
                if self._val is not None and self.bad_val is not None:
                    self._val = _read(self._val, self.bad_val, cache)
            self._engine_name = choose(self.config)
        return self._engine_name

    @property
    def job(self) -> Job:
        """What the engine is told."""
        self._settled()
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        return Job(self._train, self.views, self.spec.mean, self.spec.std, self.seed, self.config, device)

    def train_dataloader(self) -> TrainLoader:
        """Batches of views, from the position last set or loaded, else from where the trainer stands."""
        if not self.views:
            raise ConfigError("augmentations is empty: training needs at least one view")
        world = world_size()
        self._check_steps(world)
        engine = ENGINES[self.engine]
        self._close()
        order = Order(self.seed, len(self._train), self.batch_size, rank(), world)
        self._loader = TrainLoader(engine(self.job), order, self.bad, finish_later=self._trains())
        self._loader.position = self._position or self._trained()
        self._position = None
        return self._loader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """A training batch's views may have been left unfinished for the device it now is on."""
        return batch if isinstance(batch, Batch) or self._loader is None else self._loader.finish(batch)

    def val_dataloader(self) -> CleanLoader | list[Any]:
        """Clean validation batches, or an empty list without validation images."""
        return [] if self._val is None else self.clean_loader(train=False)

    def clean_loader(self, train: bool, batch_size: int | None = None, limit: int | None = None) -> CleanLoader:
        """Clean batches of the training or validation images in dataset order, this rank's contiguous part.

        Args:
            limit: at most this many images, evenly spread over the dataset.

        Raises:
            ConfigError: validation images are asked for and there are none.
        """
        if not train and self._val is None:
            raise ConfigError(f"data.val_path is missing: {self.config.dataset} has no validation images of its own")
        source, bad = (self._train, self.bad) if train else (self._val, self.bad_val)
        assert source is not None and bad is not None
        size = self.views[0].crop_size if self.views else self.spec.size
        return CleanLoader(
            source,
            batch_size or self.batch_size,
            size,
            self.spec.mean,
            self.spec.std,
            bad,
            rank(),
            world_size(),
            self.config.num_workers,
            self.config.timeout,
            limit,
        )

    def sheet(self, count: int) -> list[list[Tensor]]:
        """For each of a few training images: the clean image, then its views of epoch 0; each [C, H, W] in 0..1.

        The images are evenly spread over the dataset; one that cannot be read is replaced, as in training.
        """
        rows = []
        for i in np.linspace(0, len(self._train) - 1, min(count, len(self._train))).astype(int):
            _, image, _ = load_or_replace(self._train, self.seed, 0, int(i))
            height, width = (np.array([side]) for side in image.shape[:2])
            params = [sample(view, Draws(self.seed, 0, i, n), height, width) for n, view in enumerate(self.views)]
            views = [apply(view, drawn.row(0), image) for view, drawn in zip(self.views, params, strict=True)]
            rows.append([clean(image, views[0].shape[-1]), *views])
        return rows

    def set_position(self, epoch: int, batch: int) -> None:
        """Let the next `train_dataloader` begin at this batch of this epoch."""
        self._position = Position(epoch, batch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batches *trained* (not fetched), and what gives it its meaning."""
        position = self._trained() if self.trainer is not None else self._position or Position(0, 0)
        return {**position._asdict(), **self._order_words(), "listing": self.listing}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises `ConfigError` when the saved position is none, or belongs to another order of images, or to other images."""
        places = [*Position._fields, *self._order_words()]
        wrong = [key for key in places if type(state_dict.get(key)) is not int or state_dict[key] < 0]
        if wrong:
            raise ConfigError(f"the checkpoint's place in the data is damaged: its {wrong[0]} is {state_dict.get(wrong[0])!r}")
        keys = {"global_batch": "optimizer.batch_size x devices", "images": "the number of training images", "seed": "seed"}
        changed = [
            f"{keys[key]} is {now}, it was {state_dict[key]} when the checkpoint was saved: the epoch cannot be continued"
            for key, now in self._order_words().items()
            if state_dict[key] != now
        ]
        if changed:
            raise ConfigError("\n".join(changed))
        if state_dict.get("listing", self.listing) != self.listing:
            what = "the training images have other names, labels or sizes than when the checkpoint was saved"
            if not self.config.accept_changed:
                raise ConfigError(f"{what}: data.accept_changed=true goes on with them, resume=never starts anew")
            warn(f"{what}; data.accept_changed=true goes on with them")
        self.set_position(state_dict["epoch"], state_dict["batch"])

    def teardown(self, stage: str) -> None:
        self._close()

    def on_exception(self, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._loader is not None:
            self._loader.close()
            self._loader = None

    def _trains(self) -> bool:
        """Whether a trainer asks, which hands each batch on to `on_after_batch_transfer`."""
        return self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING

    def _order_words(self) -> dict[str, int]:
        return {"global_batch": self.batch_size * world_size(), "images": len(self._train), "seed": self.seed}

    def _trained(self) -> Position:
        """(epoch, batch) after the batches the trainer has finished; the end of an epoch is the beginning of the next."""
        if self.trainer is None:
            return Position(0, 0)
        loop = self.trainer.fit_loop
        epoch = loop.epoch_progress.state_dict()["current"]
        batches = loop.epoch_loop.batch_progress.state_dict()["current"]["processed"]
        inside, by_steps = 0 < batches < self.trainer.num_training_batches, self.trainer.max_steps != -1
        if inside and (by_steps or epoch["processed"] < epoch["ready"]):    # Lightning goes on in an epoch that max_steps ended
            return Position(epoch["ready"] - 1, batches)
        return Position(epoch["ready"] - int(batches == 0 and epoch["processed"] < epoch["ready"]), 0)

    def _check_steps(self, world: int) -> None:
        if len(self._train) < self.batch_size * world and self.views:
            raise ConfigError(
                f"optimizer.batch_size={self.batch_size} on {world} device(s) is more than the {len(self._train)} training "
                f"images: an epoch would have 0 steps; use at most {len(self._train) // world}"
            )


def _read(source: Source, bad: BadImages, cache_dir: Path | None) -> Source:
    source = in_memory(source, MAX_SIZE, cache_dir)
    if isinstance(source, ArraySource):
        bad.add(sorted(source.unreadable.items()))
    return source


def _selection(config: DataConfig, labels: np.ndarray, labelled: bool) -> np.ndarray:
    chosen = np.flatnonzero(labels >= 0) if labelled and (labels >= 0).any() else np.arange(len(labels))
    if config.train_size is not None:
        if config.train_size > len(chosen):
            raise ConfigError(f"data.train_size={config.train_size} is more than the {len(chosen)} training images")
        chosen = chosen[stratified(labels[chosen], config.train_size, first=True)]
    if config.fraction < 1:
        count = max(1, round(config.fraction * len(chosen)))
        chosen = chosen[stratified(labels[chosen], count, first=False)]
    return chosen


def _spec(row: DatasetSpec, config: DataConfig, source: Source) -> DatasetSpec:
    mean, std = statistics(config)
    changes: dict[str, Any] = {"classes": len(source.classes), "size": config.size or row.size, "mean": mean, "std": std}
    return dataclasses.replace(row, in_chans=config.in_chans or row.in_chans, **changes)


def _judges(train: Source, val: Source | None) -> Source | None:
    """The validation images, unless they have no labels while the training images have.

    Raises:
        ConfigError: they have other classes.
    """
    if val is None or not train.classes or train.classes == val.classes:
        return val
    if not val.classes:
        warn(f"the validation images have no labels to judge by, so they are not used (the first: {val.name(0)})")
        return None
    only = [
        f"only in {part}: {', '.join(sorted(set(a) - set(b))[:5])}"
        for part, a, b in (("training", train.classes, val.classes), ("validation", val.classes, train.classes))
        if set(a) - set(b)
    ]
    raise ConfigError(f"data.val_path has other classes than data.train_path ({'; '.join(only) or 'in another order'})")


def _check_labels(source: Source | None, key: str) -> None:
    if source is None:
        return
    wrong = np.flatnonzero((source.labels < -1) | (source.labels >= max(len(source.classes), 1)))
    if len(wrong):
        first = f"{source.labels[wrong[0]]} of {source.name(int(wrong[0]))}"
        raise ConfigError(f"data.{key}: {len(wrong)} labels lie outside 0..{len(source.classes) - 1}, the first: {first}")


def _check_views(views: Sequence[View], spec: DatasetSpec) -> None:
    for i, view in enumerate(views):
        if view.gaussian_blur.prob and view.crop_size < 2:
            raise ConfigError(f"augmentations[{i}].crop_size must be at least 2 for gaussian_blur")
