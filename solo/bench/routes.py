"""``python -m solo.bench chaos --signals N``: a signal on any of the routes by which one can come saves the run and ends it.

The command is a fork of a warm process, and so are the processes that Lightning's launcher and torchrun's agent start:
only their ``Popen`` is another. All else is as a user's command has it: processes, sessions, handlers and exit codes.
"""

import mmap
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pytorch_lightning.strategies.launchers import subprocess_script
from pytorch_lightning.utilities import rank_zero_only
from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

from solo import torchrun
from solo.bench import processes
from solo.bench.leftovers import valid_steps
from solo.bench.ordeal import RECORD, Ordeal, Reference, Trace
from solo.bench.processes import of_rank
from solo.errors import SIGNALS, reported
from solo.launch import TORCHRUN
from solo.run import pretrain

STARTING, GONE = 120.0, 60.0        # seconds to the first step, and after which a process that stays counts as hung
TRIES = 3
LIMIT = 5.0                         # seconds in which all must be gone, beside a step; longer where steps took longer before


@dataclass(frozen=True)
class Route:
    """How a run is started, and whom the signal reaches: ranks, and -1 for torchrun's agent.

    ``times``: how often, within a second.
    """

    starter: str
    targets: tuple[int, ...]
    times: int = 1

    @property
    def ranks(self) -> int:
        return 1 if self.starter == "alone" else 2


ROUTES = {
    "one process": Route("alone", (0,)),
    "the first process of Lightning's launcher": Route("launcher", (0,)),
    "rank 1 of Lightning's launcher": Route("launcher", (1,)),
    "both of Lightning's launcher": Route("launcher", (0, 1)),
    "torchrun's agent": Route("torchrun", (-1,)),
    "rank 0 under torchrun": Route("torchrun", (0,)),
    "rank 1 under torchrun": Route("torchrun", (1,)),
    "both under torchrun": Route("torchrun", (0, 1)),
    "both under torchrun and the agent, twice": Route("torchrun", (0, 1, -1), times=2),
}


def interrupt(
    name: str, number: signal.Signals, wait: float, content: dict[str, Any], folder: Path, truth: Reference
) -> tuple[float | None, list[str]]:
    """Start a run, signal it, and let it go on to its end; again, in half the wait, where it was over before the signal came.

    Args:
        name: of the route.
        number: the signal.
        wait: seconds from the first step to it, at first.
        content: the run's config, of as many processes as the route has; it saves when it is told to and at its end.
        folder: where to work.
        truth: the run that nobody interrupts.

    Returns:
        Seconds from the signal until all processes were gone (none where no signal came in time), and what is wrong.
    """
    for attempt in range(TRIES):
        if found := _interrupt(ROUTES[name], number, wait / 2**attempt, Ordeal(content, folder / str(attempt), truth), truth):
            took, problems = found
            return took, [f"{problem} ({name}, {number.name})" for problem in problems]
    return None, [f"missed: over before the signal, {TRIES} times ({name}, {number.name})"]


def _interrupt(
    route: Route, number: signal.Signals, wait: float, run: Ordeal, truth: Reference
) -> tuple[float, list[str]] | None:
    before = run.look()
    (top,) = processes.fork(1, run.log, lambda _: _command(run, route.starter))
    ranks = _started(run, top)
    time.sleep(wait)
    began = time.monotonic()
    for _ in range(route.times):
        for target in route.targets:
            with suppress(ProcessLookupError):          # the second time it may be gone
                os.kill(top if target < 0 else ranks[target], number)
        time.sleep(0.3 * (route.times > 1))
    status = processes.wait([top], GONE).get(top)
    while (left := [pid for pid in ranks if _lives(pid)]) and time.monotonic() < began + GONE:
        time.sleep(0.01)
    took = time.monotonic() - began
    if status is None or left:
        processes.kill([top, *ranks])
        processes.wait([top], GONE)
        return took, [f"hang: still there after {GONE:g} s"]
    run.judge(before, finished=False)
    if run.losses.keys() == truth.losses.keys():
        return None
    run.problems += _verdict(run, status, number)
    if took > (most := _most_seconds(run.trace, began, truth.step_seconds)):
        run.problems.append(f"late: gone after {took:.1f} s, more than {most:.1f}")
    run.life()
    return took, run.problems


def _most_seconds(trace: Path, signalled: float, usual: float) -> float:
    """In which a run must be gone, by its median step before the signal: how slow the machine is, not how slow the answer.

    Args:
        trace: of its steps.
        signalled: when the signal came.
        usual: seconds of a step of the run that nobody interrupts.
    """
    times = [time for _, _, time in RECORD.iter_unpack(trace.read_bytes()) if time < signalled]
    step = statistics.median([later - earlier for earlier, later in pairwise(times)] or [usual])
    return LIMIT * max(1.0, step / usual) + step


def _verdict(run: Ordeal, status: int, number: signal.Signals) -> list[str]:
    """What is wrong with how a run ended: one save, of its last step, one line, 128 + the signal's number."""
    problems, noted = [], max(step for _, step in run.losses)
    if (code := os.waitstatus_to_exitcode(status)) != 128 + number:
        problems.append(f"exit: with {code}, not {128 + number}")
    if (saved := valid_steps(run.saved)) != [noted]:
        problems.append(f"not saved: ended after step {noted} with the checkpoints {saved}")
    said = [line for line in run.log.read_text(errors="replace").splitlines() if line.startswith("interrupted")]
    if len(said) != 1 or f"{number.name} at epoch" not in said[0]:
        problems.append(f"said: {said}, of: {run.log.read_text(errors='replace')[-2000:]}")
    return problems


def _started(run: Ordeal, top: int) -> list[int]:
    """The ids of the run's processes, once each has made a step."""
    deadline = time.monotonic() + STARTING
    files = [of_rank(run.folder / "pid", rank) for rank in range(run.ranks)]
    while not all(trace.stat().st_size for trace in run.traces):
        if time.monotonic() > deadline or not _lives(top):
            raise TimeoutError(f"{run.folder} does not start: {run.log.read_text(errors='replace')[-500:]}")
        time.sleep(0.002)
    return [int(file.read_text()) for file in files]


def _lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# --- the command's process --------------------------------------------------------------------------------------------


class _Fork:
    """Stands in for ``subprocess.Popen``: a fork that does the run's work, with handlers and environment as new."""

    def __init__(self, work: Callable[[], object], env: Mapping[str, str], own_session: bool) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            _as_new()
            os.environ.clear()
            os.environ.update(env)
            if own_session:
                os.setsid()
            processes.end_with(work)

    def poll(self) -> int | None:
        if self.returncode is None and (found := processes.wait([self.pid], 0)):
            self.returncode = os.waitstatus_to_exitcode(found[self.pid])
        return self.returncode

    def wait(self, timeout: float) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("fork", timeout)
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _command(run: Ordeal, starter: str) -> None:
    """What the user's command does."""
    os.setsid()
    _as_new()

    def work() -> None:
        _work(run)

    launcher: Any = subprocess_script
    launcher.subprocess = SimpleNamespace(Popen=lambda *_, env, **__: _Fork(work, env, own_session=False))
    handler: Any = SubprocessHandler
    handler._popen = lambda _, __, env: _Fork(work, env, own_session=True)
    if starter == "torchrun":
        sys.argv = ["torchrun", *TORCHRUN[2:], "--nproc-per-node=2", "--standalone", "train.py"]
        raise SystemExit(torchrun.run())
    work()


def _as_new() -> None:
    """The handlers of a new process; one in the background of a shell, or under nohup, inherits signals that are ignored."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _work(run: Ordeal) -> None:
    """What each process of the run does."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    rank_zero_only.rank = rank              # type: ignore[attr-defined]
    of_rank(run.folder / "pid", rank).write_text(str(os.getpid()))
    with reported():
        pretrain(run.config, [Trace(mmap.mmap(-1, 2), os.open(run.traces[rank], os.O_WRONLY | os.O_APPEND))])
