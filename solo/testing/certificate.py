"""The contract and the invariances of a method in numbers."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from solo.testing.case import Case
from solo.testing.checks import CHECKS
from solo.testing.compare import Differs, Measured
from solo.testing.invariance import OVER_RANKS


class Row(NamedTuple):
    """One check.

    Attributes:
        check: its name in words.
        problem: what was found wrong; empty where it holds.
        measured: the largest difference and its bound; None where the check is no comparison.
    """

    check: str
    problem: str
    measured: Measured | None


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


def _row(name: str, check: Callable[[], Measured | None]) -> Row:
    words = name.replace("_", " ")
    try:
        return Row(words, "", check())
    except Differs as error:
        return Row(words, str(error), error.measured)
    except AssertionError as error:
        return Row(words, str(error), None)
    except Exception as error:              # of the method's own: a check that cannot run does not hold
        return Row(words, f"{type(error).__name__}: {error}", None)
