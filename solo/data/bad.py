"""Unreadable images: replaced, named once, counted, and too many of them an error."""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import pytorch_lightning as pl
import torch

from solo.agreement import Agreement
from solo.data.decoding import BadImage
from solo.data.random import integers
from solo.data.sources import Source
from solo.dist import end_together, gather_text, rank, world_size
from solo.errors import ConfigError, DataError
from solo.lease import still_own
from solo.reading import MAX_JSON, parse_json

log = logging.getLogger(__name__)

REPLACED, LEFT_OUT = "replaced by another one", "left out"     # what becomes of them: in training, and elsewhere
_TRIES = 100
_STAND_IN = 0x7375627374
T = TypeVar("T")
Loaded = tuple[int, np.ndarray, list[tuple[int, str]]]  # the index shown, its pixels, (index, reason) of all that failed


def stand_in(seed: int, epoch: int, index: int, attempt: int, n: int) -> int:
    """The image shown in the place of unreadable image ``index``: a pure function of the words, never itself if n > 1."""
    step = int(integers(max(n - 1, 1), _STAND_IN, seed, epoch, index, attempt)[0])
    return (index + 1 + step) % n


def load_or_replace(source: Source, seed: int, epoch: int, index: int) -> Loaded:
    """Image ``index`` or its stand-in.

    Raises:
        DataError: no readable image among the stand-ins tried.
    """
    return replaced(source.load, source, seed, epoch, index)


def replaced(
    load: Callable[[int], T], source: Source, seed: int, epoch: int, index: int
) -> tuple[int, T, list[tuple[int, str]]]:
    """The same of what ``load`` makes of an image of the source, or raises `BadImage` for."""
    failed: list[tuple[int, str]] = []
    shown = index
    for attempt in range(_TRIES):
        try:
            return shown, load(shown), failed
        except BadImage as error:
            failed.append((shown, str(error)))
            shown = stand_in(seed, epoch, index, attempt, len(source))
    raise DataError(f"{_TRIES} images tried in the place of {source.name(index)}, none can be read: {failed[0][1]}")


class BadImages:
    """The unreadable images of one source met so far, by this process until `agree`, then by all.

    Args:
        limit: largest accepted share of the source.
        report_dir: where rank 0 lists them, a line of JSON each in ``bad_samples.jsonl``, as soon as they are known; where
            that cannot be written, or would be larger than `MAX_JSON`, a warning says so once.
        fate: what becomes of such an image, for the log.
    """

    def __init__(self, source: Source, limit: float, report_dir: Path | None = None, fate: str = REPLACED) -> None:
        self._source, self._limit, self._fate = source, limit, fate
        self.report_dir = report_dir
        self._reasons: dict[int, str] = {}
        self._unsaid: set[int] = set()
        self._unlisted = False
        self._listed: set[str] | None = None        # once read

    @property
    def count(self) -> int:
        return len(self._reasons)

    @property
    def unsaid(self) -> int:
        """How many of them the other ranks do not know of."""
        return len(self._unsaid)

    @property
    def names(self) -> list[str]:
        """In dataset order."""
        return [self._source.name(i) for i in self.index]

    @property
    def index(self) -> list[int]:
        return sorted(self._reasons)

    def add(self, failed: Iterable[tuple[int, str]]) -> None:
        """Take note of (index, reason) pairs; each image is logged once.

        Raises:
            DataError: more than the accepted share is unreadable; with several ranks `agree` says so, on all of them.
        """
        for index, reason in failed:
            if index not in self._reasons:
                self._reasons[index] = reason
                self._unsaid.add(index)
                if rank() == 0:
                    self._list(index)
                    log.warning("unreadable image %s (%s): %s", self._source.name(index), reason, self._fate)
        if world_size() == 1 and self._too_many():
            raise DataError(self._verdict())

    def state_dict(self) -> dict[str, str]:
        """Index (as text, as in JSON) and reason of each."""
        return {str(index): self._reasons[index] for index in self.index}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Go on counting from those met before an interruption; all ranks load the same, and none is logged again.

        Raises:
            DataError: as `add`.
            ConfigError: it is no such state.
        """
        if not is_state(state):
            raise ConfigError("the checkpoint's list of unreadable images is damaged")
        self._reasons |= {int(index): reason for index, reason in state.items() if int(index) < len(self._source)}
        if world_size() == 1 and self._too_many():
            raise DataError(self._verdict())

    def agree(self, device: torch.device | str) -> None:
        """Let all ranks know what each has met since the last time.

        Raises:
            DataError: more than the accepted share is unreadable; rank 0 speaks, the others leave.
        """
        if world_size() == 1:
            return
        own = "".join(json.dumps([index, self._reasons[index]]) + "\n" for index in sorted(self._unsaid))
        self.add(map(json.loads, gather_text(own, device).splitlines()))
        self._unsaid.clear()
        if self._too_many():
            end_together(DataError(self._verdict()))

    def _too_many(self) -> bool:
        return self.count > self._limit * len(self._source)

    def _verdict(self) -> str:
        share = f"{self.count} of {len(self._source)} images cannot be read, more than data.max_bad_fraction={self._limit:g}"
        if self.report_dir is None or self._unlisted:
            return f"{share}; the first: {', '.join(self.names[:3])}"
        return f"{share}; listed in {self._path(self.report_dir)}"

    def _list(self, index: int) -> None:
        if self.report_dir is None:
            return
        path = self._path(self.report_dir)
        name = self._source.name(index)
        try:
            still_own(self.report_dir)
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a+b") as file:
                if self._listed is None:
                    self._listed = _names(file)
                if name in self._listed:            # a run that goes on meets them again
                    return
                line = json.dumps({"name": name, "reason": self._reasons[index]}, ensure_ascii=False).encode() + b"\n"
                size = file.seek(0, os.SEEK_END)
                if size + len(line) >= MAX_JSON:
                    raise ValueError(f"it would be larger than {MAX_JSON >> 20} MiB")
                file.seek(max(size - 1, 0))
                file.write(line if file.read(1) in (b"", b"\n") else b"\n" + line)
            self._listed.add(name)
        except (OSError, ValueError) as error:      # it ends at a save, if at all
            if not self._unlisted:
                log.warning("%s cannot be written, or read: %s; unreadable images are still named here", path,
                            getattr(error, "strerror", None) or error)
            self._unlisted = True

    @staticmethod
    def _path(folder: Path) -> Path:
        return Path(folder) / "bad_samples.jsonl"


def is_state(state: object) -> bool:
    """Whether a value is the state of a `BadImages`."""
    return isinstance(state, Mapping) and all(
        isinstance(state[key], str) and str(key).isdecimal() and len(str(key)) < 20 for key in state
    )


def _names(file: BinaryIO) -> set[str]:
    """The names in a list, but for lines that are none, as a power cut leaves them."""
    names = set()
    file.seek(0)
    for line in file.read(MAX_JSON + 1).splitlines():
        with suppress(ValueError, TypeError, KeyError):
            names.add(parse_json(line)["name"])
    return names


class AgreedCount(pl.Callback):
    """Makes the unreadable images of a `DataModule` those of all ranks: before training, `OFTEN` times in an epoch, at its
    end and at each save, so that a run with too many of them stops within the epoch that shows it.

    Args:
        agreement: in which the ranks say whether there are any to tell of; without it they tell each other even of none.
    """

    OFTEN = 20

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.agreement = agreement

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree(trainer)
        if self.agreement is not None:
            self.agreement.add("unreadable", lambda: sum(bad.unsaid for bad in self._all(trainer)))

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._agree(trainer)
        checkpoint["unreadable"] = trainer.datamodule.bad.state_dict()  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        data = trainer.datamodule       # type: ignore[attr-defined]
        if checkpoint["DataModule"].get("listing", data.listing) == data.listing:       # else their numbers are others'
            data.bad.load_state_dict(checkpoint.get("unreadable", {}))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        interval = max(1, int(trainer.num_training_batches) // self.OFTEN)
        if world_size() > 1 and (trainer.fit_loop.batch_idx + 1) % interval == 0:
            if self.agreement is None or any(self.agreement.found.get("unreadable", [1])):
                self._agree(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._agree(trainer)

    def _agree(self, trainer: pl.Trainer) -> None:
        for bad in self._all(trainer):
            bad.agree(trainer.strategy.root_device)

    @staticmethod
    def _all(trainer: pl.Trainer) -> list[BadImages]:
        both = trainer.datamodule.bad, trainer.datamodule.bad_val  # type: ignore[attr-defined]
        return [bad for bad in both if bad is not None]
