"""One job to a run's directory: the second is refused while the first lives."""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from solo.errors import EnvironmentFault
from solo.files import HOST, alive, write_link

BEAT = 15.0         # seconds between two signs of life
STALE = 120.0       # seconds without one after which a job on another host counts as dead


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Own a folder, which need not exist: ``.NAME.lease`` beside it is a link to ``HOST-PID``, touched while that lives.

    A link because it is made together with its content, and only where there is none.

    Raises:
        EnvironmentFault: another job that is alive owns it.
    """
    lease, own = folder.with_name(f".{folder.name}.lease"), f"{HOST}-{os.getpid()}"
    lease.parent.mkdir(parents=True, exist_ok=True)
    _take(lease, own, folder)
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(lease, own, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if _owner(lease) == own:
            lease.unlink(missing_ok=True)


def _take(lease: Path, own: str, folder: Path) -> None:
    try:
        lease.symlink_to(own)
        return
    except FileExistsError:
        owner = _owner(lease)
    if owner not in (None, own):
        _refuse_living(lease, owner or "", folder)
    write_link(lease, own)
    time.sleep(0.02)                    # of two that take a dead one's at once, the later stays
    if _owner(lease) != own:
        raise EnvironmentFault(f"{folder} has just been taken by another job ({_owner(lease)})")


def _refuse_living(lease: Path, owner: str, folder: Path) -> None:
    found = re.fullmatch(r"([\w-]+)-(\d+)", owner)
    try:
        silent = time.time() - lease.lstat().st_mtime
    except FileNotFoundError:           # it has just been given back
        return
    if found and found[1] == HOST:
        if alive(int(found[2])):
            raise EnvironmentFault(f"{folder} belongs to process {found[2]}, which is running: end it, or wait for it")
    elif silent < STALE:
        raise EnvironmentFault(
            f"{folder} belongs to another job ({owner}, seen {silent:.0f} s ago), which counts as dead after {STALE:.0f} s"
        )


def _owner(lease: Path) -> str | None:
    try:
        return os.readlink(lease)
    except OSError:
        return None


def _beat(lease: Path, own: str, done: threading.Event) -> None:
    """Until it is done or somebody else's; a file system that does not answer for a while is asked again."""
    while not done.wait(BEAT) and _owner(lease) in (own, None):
        with suppress(OSError):
            os.utime(lease, follow_symlinks=False)
