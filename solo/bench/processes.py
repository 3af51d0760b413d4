"""Forks of a warm process: what a run imports is there already, and a rank starts in milliseconds."""

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import torch
from pytorch_lightning.utilities import rank_zero_only

from solo.errors import SoloError

PAUSE = 0.002       # seconds between two looks whether a process has ended


def fork(ranks: int, log: Path, body: Callable[[int], object]) -> list[int]:
    """Start ``body(rank)`` in processes of their own, which end with the exit code a command would have.

    Args:
        ranks: how many; more than one find each other as Lightning's launcher lets them.
        log: what they say; rank 1 says it to ``log-rank1``.
        body: what each does.

    Returns:
        Their ids.
    """
    port = _free_port() if ranks > 1 else 0
    children = []
    for rank in range(ranks):
        child = os.fork()
        if not child:
            _run(rank, ranks, port, of_rank(log, rank), body)
        children.append(child)
    return children


def of_rank(path: Path, rank: int) -> Path:
    """Where a rank writes its own."""
    return path.with_name(f"{path.name}-rank{rank}") if rank else path


def wait(children: Iterable[int], seconds: float) -> dict[int, int]:
    """The exit statuses of those that end within this time."""
    children, deadline = list(children), time.monotonic() + seconds
    found: dict[int, int] = {}
    while len(found) < len(children):
        for child in children:
            if child not in found:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    found[child] = status
        if time.monotonic() >= deadline:
            break
        time.sleep(PAUSE)
    return found


def kill(children: Iterable[int]) -> None:
    """SIGKILL to each, at once."""
    for child in children:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def killed(status: int) -> bool:
    """Whether a process ended by SIGKILL."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def note_modules(path: Path) -> None:
    """Write what this process has imported, for `import_noted` in its parent: later forks need not import it again."""
    path.write_text("\n".join(sorted(sys.modules)))


def import_noted(path: Path) -> None:
    """Import what a fork has imported."""
    for name in path.read_text().splitlines():
        with suppress(Exception):
            if name not in sys.modules and not name.startswith("__"):
                import_module(name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(rank: int, ranks: int, port: int, log: Path, body: Callable[[int], object]) -> NoReturn:
    torch.set_num_threads(1)
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(said, 1), os.dup2(said, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), NODE_RANK="0")
        rank_zero_only.rank = rank              # type: ignore[attr-defined]
    end_with(lambda: body(rank))


def end_with(work: Callable[[], object]) -> NoReturn:
    """Do it and end this process at once, with the exit code a command would have."""
    code: object = 1
    try:
        work()
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    except SoloError as error:
        code = error.exit_code
        os.write(2, f"{error.kind}: {error}\n".encode())
    except BaseException:
        with suppress(Exception):
            os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(code if isinstance(code, int) else 1)
