"""A read that does not come back ends the command: what waits in it cannot be woken, but a thread beside it can speak."""

import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from solo import errors
from solo.dist import rank
from solo.errors import EnvironmentFault

T = TypeVar("T")
_LOOKS = 8  # in the time that a read may take, so that it ends at most an eighth of it later
_reading: dict[int, tuple[Path]] = {}  # what each thread is at; another tuple with each read


def noted(read: Callable[[], T], path: Path) -> T:
    """What ``read`` returns of a file, known to who `watch`es meanwhile."""
    thread = threading.get_ident()
    _reading[thread] = (path,)
    try:
        return read()
    finally:
        del _reading[thread]


def watch(seconds: float) -> None:
    """End this process where one read of an image takes longer, until the command that it is has ended.

    A process that is no command is its user's, and is left alone. Data workers have no such thread: what asks them does not
    wait for longer.
    """
    if errors.command is not None:
        threading.Thread(target=_look, args=(seconds, errors.command), name="solo-reads", daemon=True).start()


def _look(seconds: float, over: threading.Event) -> None:
    """Looks are counted, not seconds: a process that stood still meanwhile has not waited for a file."""
    before: dict[int, tuple[Path]] = {}
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
