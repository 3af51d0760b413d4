"""How far something is, live on a terminal."""

import select
import shutil
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, TextIO, TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

T = TypeVar("T")
_WIDEST = 200       # columns

tqdm.set_lock(threading.RLock())        # its own is shared with workers, one of which may be killed while it holds it


def is_terminal(file: TextIO | None) -> bool:
    """Whether there is a file, and it is a terminal."""
    return file is not None and file.isatty()


def _takes(file: TextIO) -> bool:
    """Whether a write would not wait, as it does for a terminal that is paused or whose connection is stuck."""
    try:
        return bool(select.select([], [file], [], 0)[1])
    except (OSError, TypeError, ValueError):            # no file of the system
        return True


class Bar(tqdm):
    """A bar on a terminal, nothing elsewhere. It starts no thread; looks for which the terminal has no room are left out."""

    monitor_interval = 0

    def __init__(self, *given: Any, file: TextIO | None, **options: Any) -> None:
        options = {"ascii": " =", "miniters": 1, "nrows": 24, **options}      # rows: the terminal's may be unset, which is 0
        super().__init__(*given, file=file, disable=not is_terminal(file), **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if not _takes(self.fp):
            return False
        self.ncols = min(shutil.get_terminal_size().columns, _WIDEST) - 1
        self._draw(str(self) if msg is None else msg, abs(self.pos) if pos is None else pos)
        return True

    def clear(self, nolock: bool = False) -> None:
        self._draw("", abs(self.pos))           # what is printed next may wait

    def _draw(self, text: str, below: int) -> None:
        """One write of less than 256 bytes without a newline: a terminal with room for any of it takes it all."""
        with suppress(BlockingIOError):         # a terminal that does not wait either
            self.fp.write("\x1bD" * below + f"\r{text}\x1b[K" + "\x1b[A" * below)
            self.fp.flush()

    def close(self) -> None:
        self.leave: bool = self.leave and not self.disable and _takes(self.fp)        # else a newline follows the last look
        super().close()


def watched(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, on a terminal beside a bar of how far one is, which goes with the last."""
    return Bar(items, what, total, leave=False, file=sys.stdout)
