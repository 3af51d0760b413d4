"""A read that does not come back ends the command: what waits in it cannot be woken, but a thread beside it can speak."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar
from weakref import WeakSet

from solo import errors
from solo.dist import rank
from solo.errors import EnvironmentFault

T = TypeVar("T")
_LOOKS = 8  # in the time that a read may take, so that it ends at most an eighth of it later
_reading: dict[int, tuple[object]] = {}  # what each thread is at; another tuple with each read, and with each entry of a folder
_watched: WeakSet[threading.Event] = WeakSet()  # commands that have a watcher


def noted(read: Callable[[], T], path: object) -> T:
    """What ``read`` returns of a file, known to who `watch`es meanwhile."""
    thread = threading.get_ident()
    outer = _reading.get(thread)
    _reading[thread] = (path,)
    try:
        return read()
    finally:
        if outer is None:
            del _reading[thread]
        else:
            _reading[thread] = outer


def listed(folder: str | Path) -> tuple[list[str], list[str]]:
    """Names of the folders in a folder, links to such too, and of all else; each that comes is progress to who `watch`es."""
    folders: list[str] = []
    others: list[str] = []
    thread = threading.get_ident()

    def read() -> None:
        with os.scandir(folder) as entries:
            for entry in entries:
                _reading[thread] = (folder,)
                (folders if _leads_to_folder(entry) else others).append(entry.name)

    noted(read, folder)
    return folders, others


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:     # a link that leads round in a circle, or where nobody may look
        return False


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk`` from above, links followed: a folder, and what is `listed` in it; each folder once, wherever links lead.

    What is taken out of the list of folders is not gone into; a folder that cannot be listed is passed over.
    """
    waiting, seen = [os.fspath(root)], set()
    while waiting:
        folder = waiting.pop()
        try:
            real = noted(partial(os.path.realpath, folder), folder)
            if real in seen:
                continue
            seen.add(real)
            folders, others = listed(folder)
        except OSError:
            continue
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
    before: dict[int, tuple[object]] = {}
    looks: dict[int, int] = {}
    while not over.wait(seconds / _LOOKS):
        now = dict(_reading)
        looks = {thread: looks.get(thread, 0) + 1 for thread, read in now.items() if read is before.get(thread)}
        before = now
        for thread in looks:
            if looks[thread] >= _LOOKS:
                _end(f"rank {rank()}: no answer within data.timeout={seconds:g} s from {now[thread][0]}")


def _end(problem: str) -> None:
    sys.stdout.flush()
    print(f"{EnvironmentFault.kind}: {problem}", file=sys.stderr, flush=True)
    os._exit(EnvironmentFault.exit_code)
