"""The tests that docs/reliability.md names: ``pytest -m faults``."""

import re
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"


@dataclass(frozen=True)
class Named:
    """By the page: whole files below ``tests`` or ``tests/data``, and functions of any."""

    files: frozenset[str]
    functions: frozenset[str]

    def __contains__(self, test: tuple[Path, str]) -> bool:
        path, function = test
        if not path.is_relative_to(TESTS):
            return False
        place = path.relative_to(TESTS).as_posix()
        return function in self.functions or place in self.files or place.removeprefix("data/") in self.files


def named() -> Named:
    """Where a file's functions follow its name, those alone count."""
    page = PAGE.read_text()
    found = re.findall(r"((?:[\w.]+/)*test_\w+\.py)(?:::(test_\w+))?`?(:?)", page)
    files = {re.sub(r"^(\.\./|tests/)*", "", file) for file, function, more in found if not function and not more}
    return Named(frozenset(files), frozenset([function for _, function, _ in found] + re.findall(r"`(?:::)?(test_\w+)`", page)))
