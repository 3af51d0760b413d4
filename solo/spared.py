"""A logger that cannot end what it logs."""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

AGAIN = 300.0       # seconds between two warnings of one logger
REST = 100          # times what a failure cost: so long a logger is left alone, and a server that is down costs 1 % of a run
ONCE = {"log_hyperparams", "log_graph"}     # calls that a run makes once, and which never work again


class Spared(Logger):
    """A logger whose failures cost lines of a log and never the run: a server that is down, a disk that is full.

    How many calls were lost is said when it works again, or else at the end.

    Args:
        title: how warnings call it.
        make: makes the logger, when it is first asked for something; tried again at each report until it works.
        rests: after a failure that took a while it is left alone for `REST` times as long, but not at the end.
        mortal: one that has failed works no more and is made anew.
    """

    def __init__(self, title: str, make: Callable[[], Logger], rests: bool, mortal: bool = False) -> None:
        super().__init__()
        self._title, self._make, self._rests, self._mortal = title, make, rests, mortal
        self._made: Logger | None = None
        self._lost, self._said, self._resting_until = 0, -AGAIN, -math.inf
        self._failing: set[str] = set()         # calls that failed and have not worked since
        self._warned = False                    # of these

    def _try(self, what: str, act: Callable[[Logger], Any]) -> Any:
        begun = time.monotonic()
        if self._rests and what != "finalize" and begun < self._resting_until:
            self._lost += 1
            return None
        try:
            if self._made is None:
                self._made = self._make()
            found = act(self._made)
        except Exception as error:      # each server and file system has its own
            self._lost += 1
            self._failing.add("start" if self._made is None else what)
            self._made = None if self._mortal else self._made
            now = time.monotonic()
            self._resting_until = now + REST * (now - begun)
            if now - self._said >= AGAIN:
                self._said, self._warned = now, True
                cause = error.__cause__ or error        # Lightning says of each failure of tensorboard that a value is wrong
                reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
                log.warning("logger %s fails (%s); training goes on, %d lost so far", self._title, reason, self._lost)
            return None
        worked, self._failing = self._failing & {"start", what}, self._failing - {"start", what, *(ONCE - {what})}
        if self._warned and worked and not self._failing:
            self._say_lost(" works again")
        return found

    def _say_lost(self, now: str) -> None:
        log.warning("logger %s%s: %d calls were lost", self._title, now, self._lost)
        self._lost, self._warned = 0, False

    @property
    def name(self) -> str | None:
        return self._try("name", lambda made: made.name)

    @property
    def version(self) -> int | str | None:
        return self._try("version", lambda made: made.version)

    @property
    def save_dir(self) -> str | None:
        return self._try("save_dir", lambda made: made.save_dir)

    @property
    def experiment(self) -> Any:
        """The wrapped logger's own, e.g. a SummaryWriter; None where it fails."""
        return self._try("experiment", lambda made: getattr(made, "experiment", None))

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._try("log_metrics", lambda made: made.log_metrics(metrics, step))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._try("log_hyperparams", lambda made: made.log_hyperparams(params, *args, **kwargs))

    def save(self) -> None:
        self._try("save", lambda made: made.save())

    def finalize(self, status: str) -> None:
        self._try("finalize", lambda made: made.finalize(status))
        if self._lost:                  # there is no later
            self._say_lost("")
