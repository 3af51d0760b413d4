"""A read that does not come back ends the command: what waits in it cannot be woken, but a thread beside it can speak."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakSet

from solo import errors
from solo.dist import rank
from solo.errors import DataError, EnvironmentFault, end_at_once

T = TypeVar("T")
_LOOKS = 8  # in the time that a read may take, so that it ends at most an eighth of it later
_PASSING = {errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ETIMEDOUT, errno.EINTR}  # what a network file system may get over
_WAITS = (0.05, 0.2, 1.0)  # seconds before each further try
_reading: dict[int, "_Read"] = {}  # what each thread is at; another one with each read, and with each entry of a folder
_watched: WeakSet[threading.Event] = WeakSet()  # commands that have a watcher


@dataclass(eq=False, slots=True)
class _Read:
    path: object
    clock: int | None = None  # each of whose ticks is progress

    def ticks(self) -> int:
        try:
            return 0 if self.clock is None else time.clock_gettime_ns(self.clock)
        except OSError:  # of a thread that has ended since
            return 0


def noted(read: Callable[[], T], path: object, clock: int | None = None) -> T:
    """What ``read`` returns of a file, known to who `watch`es meanwhile."""
    thread = threading.get_ident()
    outer = _reading.get(thread)
    _reading[thread] = _Read(path, clock)
    try:
        return read()
    finally:
        if outer is None:
            del _reading[thread]
        else:
            _reading[thread] = outer


def moving(read: Callable[[], T], path: object) -> T:
    """As `noted`, of what reads a file as a whole, however long that takes: what comes of it takes this thread processor time.

    Where the system has no clock of that, nobody watches.
    """
    clock = getattr(time, "pthread_getcpuclockid", None)
    return read() if clock is None else noted(read, path, clock(threading.get_ident()))


def retried(read: Callable[[], T], path: Path) -> T:
    """What ``read`` returns of a file; an error that may pass is given three more tries.

    Raises:
        EnvironmentFault: this process may open no more files.
        OSError: any other.
    """
    for wait in (*_WAITS, None):
        try:
            return noted(read, path)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise EnvironmentFault(f"too many open files ({path}): raise the limit, ulimit -n") from error
            if error.errno not in _PASSING or wait is None:
                raise
        time.sleep(wait)  # out of the block above, so that the error keeps no file
    raise AssertionError("unreachable")


def listed(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders in a folder, links to such too, and of all else; each that comes is progress to who `watch`es.

    Raises:
        DataError: it cannot be listed, so nobody knows how many images there are.
    """
    thread = threading.get_ident()

    def read() -> tuple[list[str], list[str]]:
        folders: list[str] = []
        others: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                _reading[thread] = _Read(folder)
                (folders if _leads_to_folder(entry) else others).append(entry.name)
        return folders, others

    try:
        return retried(read, Path(folder))
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be listed ({error.strerror or error}), so its images cannot be counted: "
                        "let it be read, or move it elsewhere") from error


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:     # a link that leads round in a circle, or where nobody may look
        return False


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk`` from above, links followed: a folder, and what is `listed` in it; each folder once, wherever links lead.

    What is taken out of the list of folders is not gone into; errors as of `listed`.
    """
    waiting, seen = [os.fspath(root)], set()
    while waiting:
        folder = waiting.pop()
        real = noted(partial(os.path.realpath, folder), folder)
        if real in seen:
            continue
        seen.add(real)
        folders, others = listed(folder)
        yield folder, folders, others
        waiting += [os.path.join(folder, name) for name in reversed(folders)]


def watch(seconds: float) -> None:
    """End this process where one read of an image, or the next entry of a folder, takes longer, until the command that it is
    has ended; the first to ask says how long.

    A process that is no command is its user's, and is left alone. Data workers have no such thread: what asks them does not
    wait for longer.
    """
    if errors.command is not None and errors.command not in _watched:
        _watched.add(errors.command)
        threading.Thread(target=_look, args=(seconds, errors.command), name="solo-reads", daemon=True).start()


def _look(seconds: float, over: threading.Event) -> None:
    """Looks are counted, not seconds: a process that stood still meanwhile has not waited for a file."""
    before: dict[int, tuple[_Read, int]] = {}
    looks: dict[int, int] = {}
    while not over.wait(seconds / _LOOKS):
        now = {thread: (read, read.ticks()) for thread, read in dict(_reading).items()}
        looks = {thread: looks.get(thread, 0) + 1 for thread, seen in now.items() if seen == before.get(thread)}
        before = now
        for thread in looks:
            if looks[thread] >= _LOOKS:
                end_at_once(f"rank {rank()}: no answer within data.timeout={seconds:g} s from {now[thread][0].path}")

