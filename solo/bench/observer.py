"""A process that looks a thousand times a second whether a run's checkpoints are there and whole."""

import mmap
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from solo import checkpoint
from solo.bench.leftovers import digest, entries, state_of

PERIOD = 0.0009     # seconds from one look to the next: a thousand a second, though some take longer, as a new file is read


class Observer:
    """Looks how many checkpoints are valid, from two on never fewer, and at the manifest, once there never missing or garbled.

    Args:
        folder: of the checkpoints.
        findings: file for what it found.
    """

    def __init__(self, folder: Path, findings: Path) -> None:
        self.board, self.findings = mmap.mmap(-1, 1), findings
        findings.unlink(missing_ok=True)
        self.process = os.fork()
        if not self.process:
            self._watch(folder)

    def _watch(self, folder: Path) -> NoReturn:
        try:
            with suppress(OSError, AttributeError):     # where it may, it is woken before others
                os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
            try:
                found = Watch(folder).until(self.board)
            except Exception as error:
                found = f"0 0\nobserver: {type(error).__name__}: {' '.join(str(error).split())}"
            self.findings.write_text(found)
        finally:
            os._exit(0)

    def end(self) -> tuple[int, float, list[str]]:
        """Number of looks, the seconds over which they spread, and what was wrong, a line each."""
        self.board[0] = 1
        os.waitpid(self.process, 0)
        if not self.findings.exists():
            return 0, 0.0, ["observer: ended before the run"]
        counted, *wrong = self.findings.read_text().splitlines()
        looks, seconds = counted.split()
        return int(looks), float(seconds), wrong


class Watch:
    """What one process remembers from look to look."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, folder / checkpoint.MANIFEST
        self.named: dict[tuple[int, ...], dict[str, str]] = {}
        self.looks = self.seen = 0
        self.first = self.last = 0.0                # when it looked at a manifest

    def until(self, board: mmap.mmap) -> str:
        wrong: dict[str, None] = {}                 # each once, in the order found
        ended, due = False, time.monotonic()
        while not ended:
            ended = bool(board[0])                  # a last look comes behind the end
            if finding := self._look():
                wrong[finding] = None
            due = max(due + PERIOD, now := time.monotonic())      # what a look takes counts, and none follows to catch up
            time.sleep(due - now)
        return "\n".join([f"{self.looks} {self.last - self.first:.3f}", *wrong])

    def _look(self) -> str | None:
        """What is wrong now."""
        try:
            now = state_of(self.manifest)
            if now not in self.named:
                self.named = {now: entries(self.folder)}
            valid = sum(_digest(self.folder / name) == sha256 for name, sha256 in self.named[now].items())
            if state_of(self.manifest) != now:     # the files of a manifest that is no longer in force
                return None
        except FileNotFoundError:
            return "manifest: gone" if self.named else None
        except (ValueError, LookupError, TypeError) as error:
            return f"manifest: {type(error).__name__}: {' '.join(str(error).split())}"
        self.last = time.monotonic()
        self.first = self.first or self.last
        self.looks, self.seen = self.looks + 1, max(self.seen, valid)
        return f"too few: of {sorted(self.named[now])}, {valid} valid" if valid < min(self.seen, 2) else None


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except FileNotFoundError:
        return "missing"
