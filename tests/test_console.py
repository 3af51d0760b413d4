"""What commands show on the screen."""

import contextlib
import functools
import io
import os
import select
import sys

import pytest
from tqdm import tqdm

from solo.bars import Bar, watched
from solo.console import table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def unread():
    """A terminal of no size that nobody reads, whose write fails where it would wait, and what reads it after all."""
    reader, writer = os.openpty()
    os.set_blocking(writer, False)

    def read(until):
        text = b""
        while until.encode() not in text and select.select([reader], [], [], 10)[0]:
            text += os.read(reader, 1 << 20)
        return text.decode(errors="replace")

    with contextlib.suppress(OSError), open(writer, "w") as file:       # what was not taken is lost with the reader
        yield file, read
        os.set_blocking(writer, True)
        os.close(reader)


def test_columns_hold_their_widest_cell_words_to_the_left_and_numbers_to_the_right():
    assert table("accuracy in %", ["features", "top-1"], [["pixels", "9.50"], ["trained", "100.00"]]).splitlines() == [
        "accuracy in %",
        "features   top-1",
        "----------------",
        "pixels      9.50",
        "trained   100.00",
    ]
    assert table("", ["", "train"], [["mean", "0.5"]], left=(0, 1)) == "      train\n-----------\nmean  0.5"


def test_what_is_watched_without_a_terminal_says_nothing(capsys):
    assert list(watched(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_without_a_stream_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert list(watched(iter("abc"), "letters", 3)) == ["a", "b", "c"]


def test_a_terminal_shows_bars_whatever_its_size_and_the_settings_of_other_programs(unread, monkeypatch):
    monkeypatch.setattr(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))     # TQDM_DISABLE=1
    monkeypatch.delenv("COLUMNS", raising=False)
    file, read = unread
    monkeypatch.setattr(sys, "stdout", file)
    monkeypatch.setattr(sys, "__stdout__", file)
    bar = Bar(file=file, bar_format="x" * 100)
    assert read("\x1b[K").count("x") == 79
    monkeypatch.setenv("COLUMNS", "30")
    bar.refresh()
    assert read("\x1b[K").count("x") == 29
    bar.close()


@pytest.mark.parametrize("text", ["xxx", "x" * 7, "x" * 60, "x" * 510, "{bar}"])
@pytest.mark.parametrize("below", [0, 1])
def test_looks_at_a_terminal_that_takes_nothing_are_left_out(text, below, unread, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    file, read = unread
    bar = Bar(file=file, position=below, bar_format=text, total=1, initial=1, colour="cyan")
    looks = next(number for number in range(100_000) if not bar.display())
    assert looks > 10 and not bar.display()
    bar.close()
    assert list(Bar(range(3), file=file, leave=False)) == [0, 1, 2]
    shown = str(bar)[:199]
    assert shown in read(shown)


def test_slow_items_after_fast_ones_are_shown(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    now, bar = 0.0, watched(range(1003), "items", 1003)
    bar._time, bar.start_t, bar.last_print_t = lambda: now, now, now
    for item in bar:
        now += 0.001 if item < 1000 else 1
    assert "| 1001/1003" in sys.stdout.getvalue() and "| 1002/1003" in sys.stdout.getvalue()
