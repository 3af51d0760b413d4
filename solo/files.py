"""Files whose names always hold a whole content, what writers that died leave behind, and who owns a folder."""

import hashlib
import os
import re
import shlex
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

HOST = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())
_TEMPORARY = re.compile(r"\..+\.(?P<host>[\w-]+)-(?P<pid>\d+)\.\w+\.tmp")
_FORGOTTEN = 86400.0        # seconds after which a temporary file of another host counts as left behind
_UMASK = re.compile(r"(?m)^Umask:\s*([0-7]+)")


def write_file(path: str | Path, write: bytes | Callable[[BinaryIO], object]) -> str:
    """Write a file so that its name always holds the old or the new content, whatever happens meanwhile.

    Args:
        path: the file; its folder is made.
        write: the content, or a function that writes it.

    Returns:
        SHA-256 of the content, hexadecimal.
    """
    with replaced(Path(path)) as file:
        file.write(write) if isinstance(write, bytes) else write(file)
        file.flush()
        file.seek(0)
        return _sha256(file)


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """An empty file beside ``path`` to write to; it takes that name when the block ends, and goes if an error ends it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{HOST}-{os.getpid()}."
    with tempfile.NamedTemporaryFile("w+b", dir=path.parent, prefix=prefix, suffix=".tmp", delete=False) as file:
        try:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    _sync_folder(path.parent)


def _umask() -> int:
    """Elsewhere than on Linux one can only ask by setting it, for all threads."""
    with suppress(OSError):
        if found := _UMASK.search(Path("/proc/self/status").read_text()):
            return int(found[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_link(path: Path, target: str | Path) -> None:
    """Let ``path`` be a symbolic link to ``target``, in one step."""
    temporary = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.link.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, path)


def own_folder(folder: Path) -> None:
    """Make a folder for oneself, in which nobody else can put a link that is written through, or a file that is read.

    Raises:
        OSError: it cannot be made, or others may write to it: it, or a link of its name, belongs to another user, or its
            mode lets its group or all write, where the sticky bit does not help.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if {folder.lstat().st_uid, folder.stat().st_uid} - {0, os.getuid()}:
        raise PermissionError(f"others may write to {folder}: it is another user's; use a folder of your own")
    if folder.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"others may write to {folder}: chmod go-w {shlex.quote(str(folder))}")


def try_folder(folder: Path) -> None:
    """Make a folder, and see whether a file can be written there.

    Raises:
        OSError: it cannot.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()


def digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def sweep(folder: Path) -> None:
    """Remove the temporary files of writers that are dead: of this host, or a day old."""
    for path in folder.glob(".*.tmp"):
        if found := _TEMPORARY.fullmatch(path.name):
            here = found["host"] == HOST
            with suppress(FileNotFoundError):       # others sweep as well
                if not alive(int(found["pid"])) if here else time.time() - path.lstat().st_mtime > _FORGOTTEN:
                    path.unlink()


def alive(pid: int) -> bool:
    """Whether this host runs a process of that number; one that has ended and awaits its parent runs no more."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:         # somebody else's
        pass
    return _facts(pid)[:1] not in (["Z"], ["X"])


def birth(pid: int) -> str:
    """What tells a process from a later one of its number: the machine's boot, the numbers' own world, the moment it began.

    Empty where the system does not say, or there is no such process.
    """
    begun = _facts(pid)[19:20]          # ticks since the boot
    return f"{_world()}.{begun[0]}" if begun else ""


def _facts(pid: int) -> list[str]:
    """The system's words on a process, from its state on (proc(5), ``stat``); none where it says nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _world() -> str:
    """This boot of this machine, and the container whose process numbers these are."""
    with suppress(OSError):
        text = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return hashlib.sha256(text.encode()).hexdigest()[:8]
    return ""


def _sha256(file: BinaryIO) -> str:
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
