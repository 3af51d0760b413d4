"""A run of several processes on images that they cannot share evenly."""

import tempfile
from typing import Any, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch

from solo.batch import Batch
from solo.data.module import DataModule
from solo.experiment import Experiment
from solo.run import pretrain
from solo.testing.advance import wrong_rate
from solo.testing.case import Case
from solo.testing.compare import SAME_BITS, Measured, require, same
from solo.testing.ranks import run_ranks

_IMAGES = 9     # of a process and step: of the digits to validate with, one of 2 or 4 processes has a batch more than another
_STEPS = 2


def ranks_share_uneven_images(case: Case, world: int = 2) -> Measured:
    """A run on images that no number of processes divides, where one has more validation batches than another.

    None waits in vain. Each step takes the images of one process's step, so that no incomplete batch is trained; each image is
    validated once; all end with the same bits, but for the statistics of BatchNorms, which are each one's own. At the start, in
    the middle and at the end the learning rate is one process's, and every rate and report is the same on all.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = _config(case, folder, world)
        data = DataModule(config.data, config.augmentations, _IMAGES * world, config.seed)
        shares = run_ranks(lambda rank: _share(config), world=world)
    steps = [len(share.trained) for share in shares]
    require(set(steps) == {_STEPS}, f"the processes made {steps} steps, {_STEPS} each are due")
    for step, batch in enumerate(data.train_dataloader()):
        trained = np.concatenate([share.trained[step] for share in shares])
        require(np.array_equal(trained, batch.index), f"step {step + 1} took other images than one process takes")
    validated = np.concatenate([index for share in shares for index in share.validated])
    due = torch.cat([batch.index for batch in data.clean_loader(train=False)])
    require(np.array_equal(validated, due), f"{len(validated)} images were validated, {len(due)} there are")
    for rank, share in enumerate(shares):
        require(not share.problems, f"on rank {rank} {'; '.join(share.problems)}")
        same(shares[0].said, share.said, f"on rank 0 and on rank {rank}: what schedules say")
    first, *others = ({name: torch.from_numpy(value) for name, value in share.state.items()} for share in shares)
    for rank, other in enumerate(others, start=1):
        same(first, other, f"on rank 0 and on rank {rank}")
    return SAME_BITS


def _config(case: Case, folder: str, world: int) -> Experiment:
    """One epoch, whose last 5 images make no batch."""
    kwargs = dict(case.changes.get("method_kwargs", {}))
    if getattr(case.experiment().method_kwargs, "queue_size", 0):
        kwargs["queue_size"] = 2 * _IMAGES * world          # one batch or two
    return case.experiment(
        folder, method_kwargs=kwargs, devices=world, max_epochs=1, scheduler={"warmup_epochs": 0}, step_timeout=60.0,
        checkpoint={"enabled": False}, loggers=[],
        data={"dataset": "digits", "size": None, "train_size": _IMAGES * world * _STEPS + 5},
        optimizer={**case.changes.get("optimizer", {}), "batch_size": _IMAGES},
    )


class _Share(NamedTuple):
    """What one process saw, by batches, what its schedules said in each step and behind the last, and what it has then."""

    trained: list[np.ndarray]
    validated: list[np.ndarray]
    said: list[dict[str, float]]
    problems: list[str]
    state: dict[str, np.ndarray]


def _share(config: Experiment) -> _Share:
    """This process's part in the run."""
    seen = _Seen()
    state = pretrain(config, [seen]).method.state_dict()
    joint = {name: value.numpy() for name, value in state.items() if "running_" not in name and "num_batches" not in name}
    return _Share(seen.trained, seen.validated, seen.said, seen.problems, joint)


class _Seen(pl.Callback):
    """Which images came by, and what was said of schedules."""

    def __init__(self) -> None:
        self.trained: list[np.ndarray] = []
        self.validated: list[np.ndarray] = []
        self.said: list[dict[str, float]] = []
        self.problems: list[str] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.trained.append(batch.index.numpy())
        self._listen(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module._set_learning_rates()             # as if another step followed
        self._listen(trainer, pl_module)

    def _listen(self, trainer: pl.Trainer, method: Any) -> None:
        self.problems += wrong_rate(method, len(self.said), _STEPS, _STEPS, _IMAGES * trainer.world_size)
        rates = {f"learning rate of {group['name']}": group["lr"] for group in method._groups()}
        self.said.append({"progress": method.progress, **method.stepped, **rates})

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.validated.append(batch.index.numpy())
