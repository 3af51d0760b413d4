"""Goal G5: a thousand files of which one is bad train to the end, counted exactly; fifty bad ones stop within an epoch."""

import os
from pathlib import Path

import pytest

from solo.data import sources
from solo.data.bad import AgreedCount
from solo.errors import DataError
from solo.testing import run_ranks
from tests.data.common import folder, make_folder

FILES = 1000
OPENED: list[Path] = []


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one class; links, since only their names differ."""
    root = tmp_path_factory.mktemp("thousand")
    (first,) = make_folder(root, {"a": 1}, (8, 8))
    for i in range(1, FILES):
        os.link(first, first.with_name(f"{i:04d}.png"))
    return root


def with_bad(root: Path, count: int) -> list[str]:
    """Names of so many files of the folder, evenly spread, that are cut off from here on."""
    bad = [root / "a" / f"{(2 * i + 1) * FILES // (2 * count):04d}.png" for i in range(count)]
    for path in bad:
        path.unlink()
        path.write_bytes(b"\x89PNG\r\n\x1a\n cut")
    return [str(path) for path in bad]


def mend(bad: list[str]) -> None:
    for path in map(Path, bad):
        path.unlink()
        os.link(path.with_name("0000.png"), path)


def epoch(rank: int, root: Path) -> tuple[list[str], str, int, int]:
    """Names of bad files, how it ended, batches and files opened of one epoch, agreed on as in a run."""
    OPENED.clear()
    read = sources.read_file
    sources.read_file = lambda path: (OPENED.append(path), read(path))[1]
    data, done, ended = folder(root, engine="torchvision", num_workers=0, batch_size=5), 0, ""
    try:
        loader = data.train_dataloader()
        often = max(1, len(loader) // AgreedCount.OFTEN)
        for done, _ in enumerate(loader, start=1):
            if done % often == 0:
                data.bad.agree("cpu")
    except (DataError, SystemExit) as error:
        ended = f"{type(error).__name__} {error}"
    sources.read_file = read
    return data.bad.names, ended, done, len(OPENED)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_bad_file_of_a_thousand_is_counted_exactly_and_costs_one_look_more(thousand: Path, ranks: int) -> None:
    bad = with_bad(thousand, 1)
    found = run_ranks(epoch, thousand, world=2) if ranks == 2 else [epoch(0, thousand)]
    mend(bad)
    assert [(names, ended, batches) for names, ended, batches, _ in found] == [(bad, "", FILES // 5 // ranks)] * ranks
    opened = sum(each[3] for each in found)
    assert opened == FILES + 1 + ranks      # the stand-in, and a look of each process before its first step


@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_bad_files_of_a_thousand_stop_within_the_epoch(thousand: Path, ranks: int) -> None:
    bad = with_bad(thousand, 50)
    found = run_ranks(epoch, thousand, world=2) if ranks == 2 else [epoch(0, thousand)]
    mend(bad)
    said = [ended for _, ended, _, _ in found]
    assert said[0].startswith("DataError") and "of 1000 images cannot be read, more than data.max_bad_fraction=0.01" in said[0]
    assert said[1:] == ["SystemExit 0"] * (ranks - 1)
    assert all(batches < FILES // 5 // ranks // 2 for _, _, batches, _ in found)
    assert all(11 <= len(names) < 50 and set(names) <= set(bad) for names, *_ in found)
