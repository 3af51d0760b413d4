"""Worker processes that make whole batches: what the engines with workers share, and what happens when one fails."""

import errno
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from solo import errors
from solo.console import warn
from solo.data.engines import Job, Payload, Slot
from solo.dist import rank
from solo.errors import EnvironmentFault, Interrupted, SoloError

_SHARED = Path("/dev/shm")  # where Linux workers put their batches
_NO_FILES = ("Too many open files", "ancdata")  # what the system, torch and sockets say where descriptors run out
_NO_ROOM = ("No space left", "File too large", "unable to allocate", "unable to resize", "unable to write")
_NOT_STARTED = {errno.ENOSPC, errno.ENOMEM, errno.EAGAIN}  # no room for a queue's semaphores, or for another process
_LEAVING = 1.0  # seconds that workers have to leave when they are asked to
_PREFETCH = 2  # batches that each worker makes ahead


class Workers:
    """A DataLoader whose workers live as long as the engine; the plan tells them which batches to make.

    Args:
        maker: makes the `Payload` of a `Slot`, in a worker.
        view_bytes: of one pixel of a view as it comes from a worker.
    """

    def __init__(self, job: Job, maker: Dataset, view_bytes: int) -> None:
        self._job, self._maker, self._view_bytes = job, maker, view_bytes
        self._plan: Iterable[Slot] = ()
        self._asked: deque[Slot] = deque()  # batches that workers have been told to make, the next one first
        self._loader: DataLoader | None = None

    def batches(self, plan: Iterable[Slot]) -> Generator[Payload, None, None]:
        """The batches of ``plan`` in its order.

        Raises:
            EnvironmentFault: a worker died, hung, or lacked memory or files; names it and what to do.
        """
        slots = iter(plan)
        first = next(slots, None)
        if first is None:
            return
        self._plan = chain([first], slots)
        self._asked.clear()
        if self._loader is None:
            self._loader = self._start(len(first.samples))
        with explained(self._job.config.timeout, self._awaited):
            try_queues(self._loader.num_workers)
            for payload in self._loader:
                self._asked.popleft()
                yield payload

    def close(self) -> None:
        """End the workers."""
        iterator = getattr(self._loader, "_iterator", None)
        self._loader = None
        end_workers(iterator)

    def _start(self, images: int) -> DataLoader:
        workers = worker_count(self._job.config.num_workers)
        options: dict[str, Any] = {}
        if workers:
            options = {"prefetch_factor": self._prefetch(workers, images), "timeout": self._job.config.timeout}
        return DataLoader(
            self._maker,
            sampler=_Plan(self),
            batch_size=None,
            collate_fn=_shared if workers else same,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # so that making an iterator does not advance the global one
            **options,
        )

    def _prefetch(self, workers: int, images: int) -> int:
        """How many batches each worker may make ahead, so that they all fit into shared memory."""
        batch, free = self._bytes(images), free_shared_memory()
        if free is None or _PREFETCH * workers * batch <= free:
            return _PREFETCH
        need = f"{workers} data workers with batches of {_mib(batch)} need {_mib(_PREFETCH * workers * batch)}"
        have = f"{_SHARED} has {_mib(free)} free"
        if workers * batch > free:
            advice = f"lower data.num_workers to {free // (2 * batch)}, or give the container more (--shm-size)"
            raise EnvironmentFault(f"{need} of shared memory, {have}: {advice}")
        warn(f"{need} of shared memory, {have}: each makes only one ahead")
        return 1

    def _bytes(self, images: int) -> int:
        channels = self._job.in_chans
        return sum(images * channels * view.crop_size**2 * self._view_bytes for view in self._job.views)

    def _awaited(self) -> str | None:
        return self._job.source.name(int(self._asked[0].samples[0])) if self._asked else None


@contextmanager
def explained(timeout: float, awaited: Callable[[], str | None]) -> Iterator[None]:
    """Around what comes from a DataLoader with workers.

    Args:
        timeout: the loader's own.
        awaited: the name of the first image of the batch that comes next, where it is known.

    Raises:
        EnvironmentFault: a worker died or hung, or one could not be started or send its batch for want of memory or files.
    """
    try:
        yield
    except Interrupted:
        raise
    except SoloError as error:
        raise type(error)(_own_words(error)) from error
    except (RuntimeError, OSError) as error:
        if (fault := _trouble(error, timeout, awaited)) is None:
            raise
        raise EnvironmentFault(f"rank {rank()}: {fault}") from error


def end_workers(iterator: Any) -> None:
    """End the workers of a DataLoader's iterator, those too that heed no request and no SIGTERM: Python would wait for them
    at the exit of a program. A command kills all that it has started when it ends.
    """
    mine = [worker for worker in getattr(iterator, "_workers", ()) if worker._parent_pid == os.getpid()]
    own = [worker for worker in mine if worker.is_alive()]
    if not own or errors.command is not None:
        return
    with errors.deaf_to_children():
        if not sys.is_finalizing():         # else there is neither a thread nor torch's own end any more
            iterator._workers_done_event.set()
            for queue in iterator._index_queues:
                queue.put(None)
            until = time.monotonic() + _LEAVING
            for worker in own:
                worker.join(max(0.0, until - time.monotonic()))
        for worker in own:
            worker.kill()
        if not sys.is_finalizing():
            iterator._shutdown_workers()
    errors.end(own)


def try_queues(workers: int) -> None:
    """See whether there is room for the semaphores of so many workers: torch's iterator, half made, would show a traceback.

    Raises:
        OSError: there is not.
    """
    if workers:
        _ = [torch.multiprocessing.Queue() for _ in range(workers + 3)]  # all at once: one each, one for results, an event's


def _trouble(error: Exception, timeout: float, awaited: Callable[[], str | None]) -> str | None:
    """What to tell the user, or ``None`` if this is no failure of the workers."""
    message = str(error)
    if any(sign in message for sign in _NO_FILES):
        return "too many open files: raise the limit, ulimit -n, or lower data.num_workers"
    if isinstance(error, OSError) and error.errno in _NOT_STARTED:
        return f"a data worker cannot be started ({error.strerror}{_room()}): lower data.num_workers"
    if not message.startswith("DataLoader"):
        return None
    waiting = f"; waiting for the batch that begins with {name}" if (name := awaited()) else ""
    if "timed out" in message:
        return f"no batch from a data worker within data.timeout={timeout:g} s{waiting}"
    advice = f"out of memory or shared memory{_room()}? Lower data.num_workers"
    return f"a data worker ended ({message.splitlines()[0]}){waiting}; {advice}"


def _room() -> str:
    free = free_shared_memory()
    return "" if free is None else f" ({_SHARED} has {_mib(free)} free)"


class _Plan:
    """The sampler of the loader: the slots of the engine's current plan."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers

    def __iter__(self) -> Iterator[Slot]:
        for slot in self._workers._plan:
            self._workers._asked.append(slot)
            yield slot


def free_shared_memory() -> int | None:
    """Bytes, or ``None`` where there is no such place."""
    return shutil.disk_usage(_SHARED).free if _SHARED.is_dir() else None


def worker_count(wanted: int) -> int:
    """Worker processes to start: as many as wanted, but no more than processors."""
    return min(wanted, os.cpu_count() or 1)


def same(payload: Any) -> Any:
    """Collation that has nothing left to do."""
    return payload


def _shared(payload: Any) -> Any:
    """Collation in a worker: moved to shared memory here, where torch can hand an error over; later it only prints one.

    Raises:
        EnvironmentFault: there is no room.
    """
    tensors = list(_tensors(payload))
    size = sum(tensor.nbytes for tensor in tensors)
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NO_ROOM):
            raise
        have = f"{_SHARED} has {_mib(free_shared_memory() or 0)} free"
        advice = "lower data.num_workers, or give the container more (--shm-size)"
        need = f"a data worker's batch of {_mib(size)} found no room in shared memory"
        raise EnvironmentFault(f"{need}, {have}: {advice}") from error
    return payload


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (list, tuple)) or is_dataclass(content):
        for part in content if isinstance(content, (list, tuple)) else vars(content).values():
            yield from _tensors(part)


def _own_words(error: SoloError) -> str:
    """The message of an error, without the traceback that torch puts before one from a worker."""
    text = str(error)
    return text.rstrip().splitlines()[-1].split(": ", 1)[-1] if text.startswith("Caught ") else text


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
