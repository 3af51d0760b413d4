"""A failure of one process is the failure of all: told once, by rank 0 where it can, and every process leaves."""

import json
import math
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from solo.dist import part, rank, world_size
from solo.errors import SoloError, Unanswered

T = TypeVar("T")

# What gloo, NCCL and the store say where another process is gone or late.
_LOST = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Tt]imed? ?out|Broken pipe")
_GRACE = 2.5        # seconds that those who noticed have to say that they live
_LOOKS = 8          # in the time that an answer may take
_BEAT = 1.0         # seconds from one sign of life to the next
_LOOK = 0.05        # seconds from one look at a flag to the next: each costs a thread and a call over the network

_SUSPENDED = "no longer answers: it was suspended, or its machine cannot be reached"

_limit = 60.0       # seconds of a collective, and of an answer of the group's store


def set_timeout(seconds: float) -> None:
    """Let collectives of the default group, and what is asked of its store here, fail after this time from here on."""
    global _limit
    _limit = seconds
    limit = getattr(dist, "set_timeout", dist.distributed_c10d._set_pg_timeout)     # private up to torch 2.13
    limit(timedelta(seconds=seconds))


def answered(call: Callable[[], T], seconds: float) -> T:
    """What a call to the group's store returns: a thread of its own waits for it, and may be left behind.

    The store lives in rank 0, or in torchrun's agent, and torch waits for its answer without a limit: the system may have
    suspended that process. Looks are counted, not seconds: where this process stood still meanwhile, it has not waited.

    Raises:
        Unanswered: after ``seconds``.
    """
    found: list[T] = []
    failed: list[Exception] = []

    def ask() -> None:
        try:
            found.append(call())
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    for _ in range(_LOOKS):
        thread.join(seconds / _LOOKS)
    if failed:
        raise failed[0]
    if not found:
        of_an_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        raise Unanswered(f"{'torchrun' if of_an_agent else 'rank 0'} {_SUSPENDED}")
    return found[0]


class _Store:
    """The group's store, in which each of these calls is `answered` or fails."""

    def __init__(self, prefix: str, seconds: float | None = None) -> None:
        self._store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self._seconds = seconds

    def _ask(self, call: Callable[[], T]) -> T:
        return answered(call, _limit if self._seconds is None else self._seconds)

    def check(self, keys: list[str]) -> bool:
        return self._ask(lambda: self._store.check(keys))

    def get(self, key: str) -> bytes:
        return self._ask(lambda: self._store.get(key))

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def add(self, key: str, amount: int) -> int:
        return self._ask(lambda: self._store.add(key, amount))

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self._ask(lambda: self._store.compare_set(key, expected, value))


@contextmanager
def turn_of_first(name: str, seconds: float) -> Iterator[None]:
    """Around what only rank 0 works at: the others leave behind it, or after a time; also where it fails.

    Args:
        name: used once.
        seconds: how long the others wait, which may be longer than a collective.

    Raises:
        Unanswered: on the others, where rank 0 gives no sign of life for as long as a collective may take.
    """
    if world_size() == 1:
        yield
        return
    store, over = _Store("solo/turn"), threading.Event()
    if rank() == 0:
        threading.Thread(target=_beat, args=(store, f"{name}/beats", over), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if rank() == 0:
            store.set(name, "")
        else:
            _await_first(store, name, seconds)


def _beat(store: "_Store", name: str, over: threading.Event) -> None:
    with suppress(Exception):               # who waits for the beats notices
        while not over.wait(_BEAT):
            store.add(name, 1)


def _await_first(store: "_Store", name: str, seconds: float) -> None:
    """Until rank 0 is done; looks are counted, as of what is `answered`."""
    beats, still, deadline = -1, 0, time.monotonic() + seconds
    while not _until(lambda: store.check([name]), min(_limit / _LOOKS, deadline - time.monotonic())):
        if time.monotonic() >= deadline:
            return
        before, beats = beats, store.add(f"{name}/beats", 0)
        still = still + 1 if beats == before else 0
        if still >= _LOOKS:
            raise Unanswered(f"rank 0 {_SUSPENDED}")


class Flag:
    """What any process may raise for all of them, and each sees when it looks, up to `_LOOK` late: no collective.

    Args:
        name: once raised, it stays.
    """

    def __init__(self, name: str) -> None:
        alone = world_size() == 1
        self._store = None if alone else _Store("solo/flag")
        self._name, self._up, self._next = name, False, -math.inf

    def up(self, mine: bool) -> bool:
        """Whether it is raised; ``mine``: raise it."""
        if self._store is not None and not self._up:
            if mine:
                self._store.set(self._name, "")
            elif time.monotonic() >= self._next:
                self._up = self._store.check([self._name])
                self._next = time.monotonic() + _LOOK
        self._up = self._up or mine
        return self._up


@contextmanager
def together(timeout: float) -> Iterator[None]:
    """Around what several processes do together.

    The first to fail leaves word in the group's store and closes its connections, which wakes the others; of those, rank 0
    passes the word on. Where no word is left, rank 0 names who does not say that it lives.

    Args:
        timeout: seconds after which a collective fails from here on.

    Raises:
        SoloError: on rank 0, also for another rank's failure; on others only where rank 0 is silent.
        SystemExit: 0, on the ranks that rank 0 speaks for.
    """
    if world_size() == 1:
        yield
        return
    set_timeout(timeout)
    word = _Word(timeout)
    try:
        yield
    except SystemExit:              # agreed: rank 0 speaks
        word.heard()
        raise
    except Exception as error:
        raise word.judge(error) from error


class _Word:
    def __init__(self, timeout: float) -> None:
        self.store = _Store("solo/failure", _GRACE)
        self.rank, self.world, self.timeout = rank(), world_size(), timeout

    def heard(self) -> None:
        self.store.add("heard", 1)

    def judge(self, error: Exception) -> BaseException:
        """What this process ends with."""
        if isinstance(error, Unanswered):
            return Unanswered(str(error))                       # raised from it: what it came out of is said
        try:
            if (isinstance(error, SoloError) or not _LOST.search(str(error))) and self._first(error):
                return self._spoken_for(error)
            late = re.search("[Tt]imed? ?out", str(error))
            return self._followed(_GRACE if late else 0.3)      # where a connection closed, the lost one is dead
        except Unanswered as silent:
            if isinstance(error, SoloError):
                return error
            if not _LOST.search(str(error)):
                traceback.print_exception(error)                # nobody else will
            return silent
        except (RuntimeError, OSError):                         # the store lives in rank 0
            return Unanswered("rank 0 no longer answers: it was killed or lost its connection")

    def _first(self, error: Exception) -> bool:
        kind, text = (type(error).__name__, str(error)) if isinstance(error, SoloError) else (
            "SoloError", f"{type(error).__name__}: {error}")
        mine = json.dumps([self.rank, kind, text])
        return self.store.compare_set("failed", "", mine).decode() == mine

    def _spoken_for(self, error: Exception) -> BaseException:
        if self.rank and not isinstance(error, SoloError):
            traceback.print_exception(error)
        part()
        if self.rank == 0:
            _until(lambda: self.store.add("heard", 0) >= self.world - 1, _GRACE)
            return error
        if not self._comes("spoken", 2 * _GRACE):
            return error
        self.heard()
        return SystemExit(0)

    def _followed(self, grace: float) -> BaseException:
        lost: list[int] = []
        if not self._comes("failed", 0.5):
            self.store.set(f"alive/{self.rank}", "")
            part()
            if self.rank == 0:
                lost = self._find_the_lost(grace)
            elif not self._comes("failed", _GRACE + 1):
                late = f"it takes longer than step_timeout={self.timeout:g} s or lost its connection"
                return Unanswered(f"rank 0 no longer answers: {late}")
        part()
        failed, kind, text = json.loads(self.store.get("failed"))
        self.heard()
        if self.rank:
            return SystemExit(0)
        self.store.set("spoken", "")
        _until(lambda: self.store.add("heard", 0) >= self.world - len(lost), 1.0)      # the store goes with this process
        kinds: dict[str, type[SoloError]] = {each.__name__: each for each in SoloError.__subclasses__()}
        return kinds.get(kind, SoloError)(f"rank {failed}: {text}")

    def _comes(self, key: str, seconds: float) -> bool:
        return _until(lambda: self.store.check([key]), seconds)

    def _find_the_lost(self, grace: float) -> list[int]:
        others = {f"alive/{other}": other for other in range(1, self.world)}
        _until(lambda: self.store.check(list(others)), grace)
        lost = [other for key, other in others.items() if not self.store.check([key])]
        text = f"no answer: killed, unreachable, or longer in a step than step_timeout={self.timeout:g} s"
        self.store.set("failed", json.dumps([", ".join(map(str, lost)) or "?", "EnvironmentFault", text]))
        return lost


def _until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return held
