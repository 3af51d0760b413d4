"""One job to a run's directory: the second is refused while the first lives, and one that lost it writes no more."""

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from solo.console import say
from solo.errors import EnvironmentFault
from solo.files import HOST, alive, birth, sweep, write_link

BEAT = 15.0         # seconds between two signs of life
STALE = 120.0       # seconds without one after which a job on another host counts as dead

log = logging.getLogger(__name__)
_held: dict[Path, str] = {}         # leases of this process, and what they say


class Taken(PermissionError):
    """Another job has taken over a folder that this process owned, while it stood still."""


@contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Own a folder, which need not exist: ``.NAME.lease`` beside it is a link to ``HOST-PID.BIRTH``, touched while
    that lives.

    A link because it is made together with its content, and only where there is none. What a job on another host owns is
    waited for until that has given no sign of life for `STALE` seconds.

    Raises:
        EnvironmentFault: another job that is alive owns it.
    """
    lease, own = _lease(folder), f"{HOST}-{os.getpid()}.{birth(os.getpid())}"
    lease.parent.mkdir(parents=True, exist_ok=True)
    sweep(lease.parent)
    _take(lease, own, folder)
    done = threading.Event()
    thread = threading.Thread(target=_beat, args=(lease, own, done), daemon=True)
    thread.start()
    _held[lease] = own
    try:
        yield
    finally:
        done.set()
        thread.join()
        _held.pop(lease, None)
        if _owner(lease) == own:
            _give_back(lease)


def still_own(folder: Path) -> None:
    """Before something is written to a folder: a job that was suspended may wake up after it was taken for dead.

    Who takes over puts its own lease there, and removes that at its end: a folder without a lease has had another owner.
    One that went away with its lease has not, so whoever makes a folder anew asks here first.

    Raises:
        Taken: this process owned it and does so no longer.
    """
    lease = _lease(folder)
    if (own := _held.get(lease)) is None:
        return
    try:
        owner = os.readlink(lease)
    except FileNotFoundError:
        if not folder.exists() and _made_anew(lease, own):
            return
        owner = _owner(lease) or "given back"
    except OSError:                     # a file system that does not answer says nothing of owners
        return
    if owner != own:
        raise Taken(errno.EPERM, f"another job took {folder} over while this one stood still (its lease: {owner})")


def _made_anew(lease: Path, own: str) -> bool:
    """A lease that went away together with its folder: nobody's, unless another job is the first to come back."""
    try:
        lease.parent.mkdir(parents=True, exist_ok=True)
        lease.symlink_to(own)
    except FileExistsError:
        return False
    except OSError:                     # what is written next fails as well, and says why
        return True
    return True


def _lease(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lease")


def _take(link: Path, own: str, folder: Path) -> None:
    """Own a link that is nobody's or a dead one's; of several that take a dead one's, who owns the link beside it meanwhile.

    That one may be a dead taker's, and is taken likewise.
    """
    with suppress(FileExistsError):
        link.symlink_to(own)
        return
    owner = _owner(link)
    if owner not in (None, own):
        _refuse_living(link, owner or "", folder)
    beside = link.with_name(f"{link.name}.taker")
    _take(beside, own, folder)
    try:
        if _owner(link) == owner:
            write_link(link, own)
        else:
            link.symlink_to(own)            # given back while it was looked at
    except FileExistsError:
        raise EnvironmentFault(f"{folder} has just been taken by another job ({_owner(link)})") from None
    finally:
        _give_back(beside)


def _give_back(link: Path) -> None:
    """One that cannot be removed is taken over once its owner has ended; what ends this one now is what matters."""
    try:
        link.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s stays: %s", link, error.strerror)


def _refuse_living(link: Path, owner: str, folder: Path) -> None:
    found = re.fullmatch(r"([\w-]+)-(\d+)(?:\.(\w*)\.(\d+)|\.)?", owner)
    world = birth(os.getpid()).partition(".")[0]
    if found and found[1] == HOST and found[3] in (None, world):        # else another machine or container of this name
        if alive(int(found[2])) and (found[4] is None or birth(int(found[2])) == f"{found[3]}.{found[4]}"):
            raise EnvironmentFault(f"{folder} belongs to process {found[2]}, which is running: end it, or wait for it")
    else:
        _refuse_touched(link, owner, folder)


def _refuse_touched(link: Path, owner: str, folder: Path) -> None:
    """Wait until the owner's last sign of life is old enough, which it is after `STALE` by whatever clock, or is followed."""
    seen = _touched(link)
    silent = time.time() - seen if seen else STALE
    deadline = time.monotonic() + min(STALE, STALE - silent)
    if silent < STALE:
        say(f"{folder} belongs to another job ({owner}, seen {silent:.0f} s ago): waiting up to "
            f"{min(STALE, STALE - silent):.0f} s for a sign that it lives")
    while seen and time.monotonic() < deadline:
        time.sleep(1.0)
        now = _touched(link)
        if now not in (seen, None):
            raise EnvironmentFault(f"{folder} belongs to another job ({owner}), which is running: end it, or wait for it")
        seen = now


def _touched(link: Path) -> float | None:
    """When the owner gave its last sign of life; None where the link has been given back."""
    try:
        return link.lstat().st_mtime
    except FileNotFoundError:
        return None


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
