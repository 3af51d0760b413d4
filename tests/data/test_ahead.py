"""What makes things ahead ends with the interpreter, also where nobody closes it and one stands behind another."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from solo.data.engines import ahead

ENDS = """
import runpy, sys, time
ahead = runpy.run_path(sys.argv[1])["ahead"]

def things():
    while True:
        time.sleep(float(sys.argv[2]))
        yield 0

def relayed():
    yield from ahead(things(), 2, "inner")

outer = ahead(relayed(), 2, "outer")
next(outer)
"""


@pytest.mark.parametrize("seconds", ["0.05", "0"], ids=["slow reading", "fast reading"])
def test_one_behind_another_ends_with_the_interpreter(seconds: str) -> None:
    subprocess.run([sys.executable, "-c", ENDS, ahead.__file__, seconds], check=True, timeout=10)


def test_leaving_early_closes_what_is_made() -> None:
    closed: list[bool] = []

    def things() -> Iterator[int]:
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    kept = things()
    made = ahead.ahead(kept, 2, "x")
    next(made)
    made.close()
    assert closed == [True]
