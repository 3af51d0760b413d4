"""The contract and the invariances of a method in numbers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from solo.testing.case import Case
from solo.testing.checks import CHECKS
from solo.testing.compare import Absent, Differs, Measured
from solo.testing.invariance import OVER_RANKS


class Row(NamedTuple):
    """One check.

    Attributes:
        check: its name in words.
        problem: what was found wrong; empty where it holds.
        found: the largest difference and its bound, or why there is nothing to check; None where it is no comparison.
    """

    check: str
    problem: str
    found: Measured | Absent | None

    @property
    def result(self) -> str:
        """In a word."""
        return "fails" if self.problem else "absent" if isinstance(self.found, Absent) else "holds"

    @property
    def remark(self) -> str:
        """What more there is to say of it, if anything."""
        said = self.found.why if isinstance(self.found, Absent) else self.found.note if self.found else ""
        return self.problem or said


def certificate(case: Case, worlds: Sequence[int] = (2, 4)) -> Iterator[Row]:
    """Every check on one method, those over processes for each number of them.

    Args:
        case: the method.
        worlds: numbers of processes, at least 2 each.
    """
    for check in CHECKS:
        if check not in OVER_RANKS:
            yield _row(check.__name__, partial(check, case))
    for check in OVER_RANKS:
        for world in worlds:
            yield _row(f"{check.__name__}, {world} processes", partial(check, case, world))


def _row(name: str, check: Callable[[], Measured | Absent | None]) -> Row:
    words = name.replace("_", " ")
    try:
        return Row(words, "", check())
    except Differs as error:
        return Row(words, str(error), error.measured)
    except AssertionError as error:
        return Row(words, str(error), None)
    except Exception as error:              # of the method's own: a check that cannot run does not hold
        return Row(words, f"{type(error).__name__}: {error}", None)
