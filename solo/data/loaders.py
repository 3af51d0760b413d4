"""The iterables that training and evaluation walk over."""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from solo.batch import Batch
from solo.data.bad import BadImages
from solo.data.decoding import BadImage
from solo.data.engines import Engine, Payload, Slot
from solo.data.engines.torchvision import clean, normalise
from solo.data.engines.workers import end_workers, explained, same, try_queues, worker_count
from solo.data.random import order
from solo.data.sources import ArraySource, Source

Pixels = tuple[Tensor, list[int], list[tuple[int, str]]]  # [n, C, S, S] in 0..1, of which images; those that failed, and why
_CLEAN_WORKERS_FROM = 2048  # images; below, starting workers costs more than they save


class Position(NamedTuple):
    """Where training stands: batches already trained in this epoch."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class Order:
    """Which samples this rank sees in which batch: a pure function of (seed, epoch).

    Global batch b of an epoch is its samples [b * G, (b + 1) * G), G = batch size x ranks; each rank takes its
    contiguous slice, so R ranks together see what one process with R times the batch would. The last incomplete
    batch is dropped.
    """

    seed: int
    images: int
    batch_size: int
    rank: int
    world: int

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self.images // (self.batch_size * self.world)

    def epoch(self, start: Position) -> list[Slot]:
        """This rank's batches of the epoch of ``start``, from its batch on."""
        visits = order(self.seed, start.epoch, self.images)
        stride = self.batch_size * self.world
        firsts = range(self.rank * self.batch_size, len(self) * stride, stride)
        return [Slot(start.epoch, visits[first : first + self.batch_size]) for first in firsts[start.batch :]]

    def onwards(self, start: Position) -> Iterator[Slot]:
        """The batches of this epoch and of all that follow."""
        while True:
            yield from self.epoch(start)
            start = Position(start.epoch + 1, 0)


class TrainLoader:
    """Batches of augmented views in their `Order`.

    Each iteration yields what is left of one epoch from ``position``; the next iteration begins the next epoch, whose
    first batches the engine makes while the last ones are trained. ``len`` is the whole epoch's, as Lightning expects.

    Args:
        finish_later: yield batches as the engine makes them; whoever brings them to the device then calls `finish`.
    """

    def __init__(self, engine: Engine, order: Order, bad: BadImages, finish_later: bool = False) -> None:
        self.position = Position(0, 0)
        self.finish = engine.finish
        self._finish_later = finish_later
        self._engine, self._order, self._bad = engine, order, bad
        self._payloads: Generator[Payload, None, None] | None = None
        self._comes: Position | None = None  # what the engine's next batch is the first of

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: the position moves with the first batch, not when Lightning makes an iterator just to see if it can.
        start = self.position
        after = self.position = Position(start.epoch + 1, 0)
        if self._payloads is None or self._comes != start:
            self._stop()
            self._payloads = self._engine.batches(self._order.onwards(start))
        self._comes, payloads, complete = None, self._payloads, False
        try:
            for left in range(len(self) - start.batch - 1, -1, -1):
                payload = next(payloads)
                self._bad.add(payload.failed)
                if not left:  # before the yield: whoever knows the length does not ask for more
                    self._comes, complete = after, True
                yield payload.batch if self._finish_later else self.finish(payload.batch)
        finally:
            if not complete:
                payloads.close()

    def _stop(self) -> None:
        if self._payloads is not None:
            self._payloads.close()
            self._payloads = None

    def close(self) -> None:
        """Release the engine's workers and threads."""
        self._stop()
        self._engine.close()


class CleanLoader:
    """Batches of one unaugmented view in dataset order; each rank walks its contiguous part.

    Unreadable images are left out and counted. ``len`` is that of the largest part, so that ranks agree on it: one whose part
    is smaller, or that has no image at all, yields less.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        bad: BadImages,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        timeout: float = 0,
        limit: int | None = None,
    ) -> None:
        shown = np.arange(len(source))
        if limit is not None and limit < len(source):
            shown = np.linspace(0, len(source) - 1, limit).astype(int)
        parts = np.array_split(shown, world)
        self._part, self._batches = parts[rank], -(-len(parts[0]) // batch_size)
        self._maker = _CleanMaker(source, size, mean, std)
        self._batch_size, self._bad = batch_size, bad
        few = isinstance(source, ArraySource) or len(self._part) < _CLEAN_WORKERS_FROM
        self._workers, self._timeout = 0 if few else worker_count(num_workers), timeout

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        slots = [Slot(0, self._part[i : i + self._batch_size]) for i in range(0, len(self._part), self._batch_size)]
        with explained(self._timeout, lambda: None):
            for payload in self._payloads(slots):
                self._bad.add(payload.failed)
                if len(payload.batch.index):
                    yield payload.batch

    def _payloads(self, slots: Sequence[Slot]) -> Iterator[Payload]:
        if not self._workers:
            yield from (self._maker[slot] for slot in slots)
            return
        try_queues(self._workers)
        loader = DataLoader(
            self._maker,
            sampler=slots,
            batch_size=None,
            collate_fn=same,
            num_workers=self._workers,
            timeout=self._timeout,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),
        )
        iterator = iter(loader)
        try:
            yield from iterator
        finally:
            end_workers(iterator)


class _CleanMaker(Dataset):
    def __init__(self, source: Source, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self._source, self._size, self._mean, self._std = source, size, mean, std

    def __getitem__(self, slot: Slot) -> Payload:
        source = self._source
        fits = isinstance(source, ArraySource) and source.images.shape[1:3] == (self._size, self._size)
        pixels, shown, failed = _at_once(cast(ArraySource, source), slot) if fits else self._one_by_one(slot)
        views = [normalise(pixels, self._mean, self._std)] if shown else []
        return Payload(Batch(views, torch.from_numpy(source.labels[shown]), torch.tensor(shown, dtype=torch.long)), failed)

    def _one_by_one(self, slot: Slot) -> Pixels:
        images, shown, failed = [], [], []
        for i in slot.samples.tolist():
            try:
                images.append(clean(self._source.load(i), self._size))
                shown.append(i)
            except BadImage as error:
                failed.append((i, str(error)))
        return torch.stack(images) if images else torch.empty(0), shown, failed


def _at_once(source: ArraySource, slot: Slot) -> Pixels:
    """The same bits of images that `clean` leaves as they are, brought into a tensor's order while they are still bytes."""
    samples, unreadable = slot.samples.tolist(), source.unreadable
    shown = [i for i in samples if i not in unreadable]
    pixels = torch.from_numpy(source.images[shown]).movedim(-1, -3).clone(memory_format=torch.contiguous_format)
    return pixels.float().div_(255), shown, [(i, unreadable[i]) for i in samples if i in unreadable]
