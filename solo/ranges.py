"""Which numbers a config may hold; every one that is out of its range is named at once."""

import math
from collections.abc import Callable, Iterable

_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "positive": (lambda value: value > 0, "positive"),
    "at_least_0": (lambda value: value >= 0, "at least 0"),
    "at_least_1": (lambda value: value >= 1, "at least 1"),
    "below_1": (lambda value: 0 <= value < 1, "in [0, 1)"),
}


def require(
    config: object,
    *,
    positive: str = "",
    at_least_0: str = "",
    at_least_1: str = "",
    below_1: str = "",
    also: Iterable[str] = (),
) -> None:
    """Refuse a config whose numbers cannot work; for ``__post_init__``.

    ``require(self, positive="temperature", at_least_1="queue_size proj_output_dim", below_1="dropout")``

    Args:
        config: holds the fields; a field that is None is left out.
        positive, at_least_0, at_least_1, below_1: names of fields, separated by spaces; ``below_1`` means in [0, 1).
        also: further lines of what is wrong.

    Raises:
        ValueError: one line for each number out of its range, then those of ``also``.
    """
    wanted = {"positive": positive, "at_least_0": at_least_0, "at_least_1": at_least_1, "below_1": below_1}
    problems = []
    for rule, names in wanted.items():
        holds, words = _RULES[rule]
        for name in names.split():
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                problems.append(f"{name} must be {words}, got {value}")
    problems += also
    if problems:
        raise ValueError("\n".join(problems))
