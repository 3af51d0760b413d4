"""The errors a user can cause or meet. Each ends a command with one line and its own exit code."""

import argparse
import logging
import math
import multiprocessing
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

from solo.console import main_process
from solo.redaction import spoken

log = logging.getLogger(__name__)
_DYING = 1.0        # seconds that killed processes have to end
_SPEAKING = 2.0     # seconds that a last line may take
_LEAVING = 10.0     # seconds in which a process that is on its way out hears no other request than Ctrl-C

# The signals that ask a run to end; one that is ignored, as under nohup, stays ignored.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class SoloError(Exception):
    """Base of every error this library raises on purpose."""

    kind = "error"
    exit_code = 1


class ConfigError(SoloError):
    """The request itself is wrong: a key, a value, a name, a path. Several problems may share one error."""

    kind = "config error"
    exit_code = 2


class DataError(SoloError):
    """The images cannot be used."""

    kind = "data error"
    exit_code = 3


class NumericsError(SoloError):
    """A loss or a weight stopped being finite."""

    kind = "numerics error"
    exit_code = 4


class EnvironmentFault(SoloError):
    """The machine lacks something the run needs: a device, space, an optional package."""

    kind = "environment error"
    exit_code = 5


class Unanswered(EnvironmentFault):
    """Rank 0, which speaks for all processes, no longer answers this one."""


class Interrupted(SoloError):
    """A signal ended the run after its state was saved; ``128 + signal`` is the exit code.

    Without a number: a second Ctrl-C on another rank, the one interruption of which the others only hear.
    """

    kind = "interrupted"

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def end_at_once(problem: str = "", code: int = EnvironmentFault.exit_code) -> NoReturn:
    """End this process from a thread beside one that waits where nothing can wake it; ``problem``: said before.

    Also where its streams are closed, or nobody takes what is written to them.
    """

    def speak() -> None:
        if problem:
            with suppress(Exception):
                print(f"{EnvironmentFault.kind}: {spoken(problem)}", file=sys.__stderr__, flush=True)
        with suppress(Exception):
            sys.stdout.flush()

    try:
        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(_SPEAKING)
    finally:                            # no more threads may be had
        os._exit(code)


def debug() -> None:
    """What the flag ``--debug`` of every command does: errors keep their traceback, those of the processes it starts too."""
    os.environ["SOLO_DEBUG"] = "1"


class _Debug(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *given: Any) -> None:
        debug()
        setattr(namespace, self.dest, True)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are `ConfigError`, without a page of usage before them; it knows ``--debug``."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.add_argument("--debug", action=_Debug, nargs=0, default=False, help="keep the traceback of an error")

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


# The command that this process is, for what may end it; set when it is over. None: a program that uses this library.
command: threading.Event | None = None

Handler = Callable[[int, FrameType | None], object]


@contextmanager
def hearing(handler: Handler) -> Iterator[None]:
    """Let ``handler`` take `SIGNALS`, then give each its own handler back; outside the main thread there is none to take."""
    main = threading.current_thread() is threading.main_thread()
    heeded = [number for number in SIGNALS if main and signal.getsignal(number) not in (signal.SIG_IGN, None)]
    previous = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, earlier)


@contextmanager
def reported() -> Iterator[None]:
    """Turn a `SoloError` into one stderr line per problem and its exit code; ``SOLO_DEBUG=1`` keeps the traceback.

    A signal outside training gets its line too, and the exit code ``128 + signal``.
    """
    global command
    process, outer, since = os.getpid(), command, math.inf
    command = over = threading.Event()

    def leave(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if (ending := _ending(sys.exc_info()[1])) is not None:
            since = min(since, time.monotonic())
            if number != signal.SIGINT and time.monotonic() < since + _LEAVING:
                return                  # torchrun and SLURM ask more than once
            if isinstance(ending, Interrupted) and os.getpid() == process and main_process():
                print(f"{ending.kind}: {ending}", file=sys.stderr)
            raise SystemExit(ending.exit_code if isinstance(ending, Interrupted) else ending.code)
        if os.getpid() == process and main_process():
            print(f"interrupted: {signal.Signals(number).name} outside training: nothing to save", file=sys.stderr)
        raise SystemExit(128 + number)

    with hearing(leave):
        try:
            yield
        except SoloError as error:
            if os.environ.get("SOLO_DEBUG"):
                raise
            if not main_process() and "TORCHELASTIC_RUN_ID" in os.environ and not isinstance(error, Unanswered):
                time.sleep(10)      # rank 0 has most likely said the same, and torchrun ends this process
            for line in spoken(str(error)).splitlines():
                print(f"{error.kind}: {line}", file=sys.stderr)
            raise SystemExit(error.exit_code) from None
        finally:
            over.set()
            command = outer
            if outer is None and os.getpid() == process:
                _end_children()


def _ending(error: BaseException | None) -> Interrupted | SystemExit | None:
    """What is being handled and ends the process anyway, which a signal need not do."""
    return error if error is None or isinstance(error, (Interrupted, SystemExit)) else _ending(error.__context__)


def _end_children() -> None:
    """Kill this process's workers: one that waits for a file heeds no SIGTERM, and Python waits at its exit until they end."""
    end([child for child in multiprocessing.active_children() if child.daemon])


def end(children: Sequence[BaseProcess]) -> None:
    """Kill processes that this one has started.

    One that a kill does not end either, as the system itself waits in it, is said, and waited for no longer.
    """
    own = [child for child in children if child._parent_pid == os.getpid()]  # type: ignore[attr-defined]
    if not own:
        return
    with deaf_to_children():
        for child in own:
            child.kill()
        until = time.monotonic() + _DYING
        for child in own:
            child.join(max(0.0, until - time.monotonic()))
            if child.is_alive():
                log.warning("process %s does not end, as the system waits in it: it is left behind", child.pid)
                multiprocessing.process._children.discard(child)  # type: ignore[attr-defined]


@contextmanager
def deaf_to_children() -> Iterator[None]:
    """Torch's handler would take the end of a worker for its failure; outside the main thread there is none to set aside."""
    main = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    try:
        yield
    finally:
        if earlier is not None:
            signal.signal(signal.SIGCHLD, earlier)
