"""Engines turn an image and sampled numbers into views; every engine makes the same image of the same numbers.

A new engine is one more row in `ENGINES`: a class with `Engine`'s methods, or what chooses one. A row may have a function
``require``, see there.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from solo.batch import Batch
from solo.data.config import DataConfig
from solo.data.sources import Source
from solo.data.views import View
from solo.registry import Registry


class Slot(NamedTuple):
    """One batch to make: of which epoch, and of which samples."""

    epoch: int
    samples: np.ndarray  # [B] int64


class Payload(NamedTuple):
    """A batch, and (index, reason) of the images that could not be read while it was made.

    The batch is a `Batch`, or what the engine's ``finish`` makes one of when it has come to its device.
    """

    batch: Any
    failed: list[tuple[int, str]]


@dataclass(frozen=True)
class Job:
    """All an engine must know.

    Attributes:
        source: the training images.
        views: one per copy, large crops first.
        mean, std: per channel.
        device: where the batches will be used.
    """

    source: Source
    views: list[View]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    config: DataConfig
    device: torch.device = torch.device("cpu")

    @property
    def in_chans(self) -> int:
        return len(self.mean)


class Engine(Protocol):
    """Makes batches."""

    def __init__(self, job: Job) -> None: ...

    def batches(self, plan: Iterable[Slot]) -> Generator[Payload, None, None]:
        """The batches of ``plan``, which may never end, in its order, made a little ahead.

        An iterator left early releases what it holds.
        """
        ...

    def finish(self, batch: Any) -> Batch:
        """Do what was left for the device that the batch is on by now, without waiting for it."""
        ...

    def close(self) -> None:
        """Release workers and threads."""
        ...


ENGINES: Registry[Callable[[Job], Engine]] = Registry("solo.engines")


def choose(config: DataConfig) -> str:
    """Name of the engine that ``data.engine`` asks for."""
    return "fast" if config.engine == "auto" else config.engine


def require(engine: str, views: Sequence[View]) -> None:
    """Let the engine of this name judge, before any image is read, whether it can make these views.

    Raises:
        ConfigError: an operation that it has not.
        EnvironmentFault: what it needs is not installed.
    """
    judge: Callable[[Sequence[View]], None] | None = getattr(ENGINES[engine], "require", None)
    if judge is not None:
        judge(views)
