"""Engines turn an image and sampled numbers into views; every engine makes the same image of the same numbers.

A new engine is one more row in `ENGINES`: a class with `Engine`'s methods.
"""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from solo.batch import Batch
from solo.data.config import DataConfig
from solo.data.sources import Source
from solo.data.views import View
from solo.errors import ConfigError
from solo.registry import Registry


class Slot(NamedTuple):
    """One batch to make: of which epoch, and of which samples."""

    epoch: int
    samples: np.ndarray  # [B] int64


class Payload(NamedTuple):
    """A finished batch, and (index, reason) of the images that could not be read while it was made."""

    batch: Batch
    failed: list[tuple[int, str]]


@dataclass(frozen=True)
class Job:
    """All an engine must know.

    Attributes:
        source: the training images.
        views: one per copy, large crops first.
        mean, std: per channel.
    """

    source: Source
    views: list[View]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    seed: int
    config: DataConfig


class Engine(Protocol):
    """Makes batches."""

    def __init__(self, job: Job) -> None: ...

    @classmethod
    def refusal(cls, source: Source) -> str | None:
        """Why this engine cannot serve these images, or ``None``."""
        ...

    def batches(self, plan: Iterable[Slot]) -> Generator[Payload, None, None]:
        """The batches of ``plan``, which may never end, in its order, made a little ahead.

        An iterator left early releases what it holds.
        """
        ...

    def close(self) -> None:
        """Release workers and threads."""
        ...


ENGINES: Registry[type[Engine]] = Registry("solo.engines")
AUTO = ("fast", "torchvision")


def choose(config: DataConfig, source: Source) -> str:
    """The engine that serves ``source``: the one asked for, or the first of `AUTO` that can.

    Raises:
        ConfigError: the engine asked for cannot; names one that can.
    """
    able = [name for name in AUTO if ENGINES[name].refusal(source) is None]
    if config.engine == "auto":
        return able[0]
    reason = ENGINES[config.engine].refusal(source)
    if reason is not None:
        raise ConfigError(f"data.engine={config.engine} cannot be used: {reason}; data.engine={able[0]} can")
    return config.engine
