"""Runs something in a forked child of little memory and time, and says how it ended."""

import ctypes
import gc
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from solo.errors import SoloError

SECONDS = 5
MIB = 1 << 20
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class End:
    """How it ended.

    Attributes:
        kind: ``returned``, ``refused`` by a `SoloError`, ``raised`` something else, or ``died``.
        code: the exit code of a `SoloError`.
        text: its message, or the traceback.
        seconds: processor time.
        grown: bytes of memory beyond those at the start, at most.
    """

    kind: str
    code: int = 0
    text: str = ""
    seconds: float = 0.0
    grown: int = 0


def peak() -> int:
    """Bytes of memory this process has used at most, since `_from_here_on`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _from_here_on() -> None:
    """Let `peak` begin at what is used now: what the parent once used and has free, or left as garbage, would hide growth."""
    gc.freeze()
    if hasattr(_LIBC, "malloc_trim"):       # glibc keeps it, and its pages
        _LIBC.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def size() -> int:
    """Bytes of address space."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def confined(act: Callable[[], object], memory: int, seconds: int = 2 * SECONDS) -> End:
    """Run ``act`` with ``memory`` more bytes of address space than now and so many seconds of processor time."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        end = _ended(act, memory, seconds)
        os.write(writing, json.dumps(vars(end)).encode()[:60_000])
        os._exit(0)
    os.close(writing)
    content, deadline = b"", time.monotonic() + 12 * SECONDS        # a busy machine gives little processor time a second
    while select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0] and (part := os.read(reading, MIB)):
        content += part
    os.close(reading)
    if not content:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return End(**json.loads(content)) if content else End("died", text=f"wait status {status}")


def _ended(act: Callable[[], object], memory: int, seconds: int) -> End:
    resource.setrlimit(resource.RLIMIT_AS, (size() + memory, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    sys.setrecursionlimit(1000)         # pytest's own
    _from_here_on()
    before, began = peak(), time.process_time()
    kind, code, text = "returned", 0, ""
    try:
        act()
    except SoloError as error:
        kind, code, text = "refused", error.exit_code, str(error)
    except BaseException:
        kind, text = "raised", traceback.format_exc()[-3000:]
    return End(kind, code, text, time.process_time() - began, peak() - before)
