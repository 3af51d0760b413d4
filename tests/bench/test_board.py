"""The page of measurements says what the results say."""

import csv
import shutil
from dataclasses import asdict

from solo.bench import board, measure
from solo.bench.measure import Comparison, Row
from tests.conftest import ROOT


def test_the_page_of_this_repository_is_drawn_from_its_results(tmp_path):
    shutil.copy(ROOT / "bench" / "results.csv", tmp_path)
    assert board.render(tmp_path / "results.csv").read_text() == (ROOT / "bench" / "README.md").read_text()


def page(tmp_path, rows):
    path = tmp_path / "results.csv"
    measure.write(rows, path)
    return path, (tmp_path / "README.md").read_text()


def found(ratio):
    return Comparison((ratio, 1.0), ratio, 0.9 * ratio, 1.1 * ratio, 5)


def test_the_newest_row_counts(tmp_path):
    page(tmp_path, [measure.row("D1", "engine", "images/CPU-s", "PIL", found(20.0))])
    path, text = page(tmp_path, [measure.row("D1", "engine", "images/CPU-s", "PIL", found(30.0))])
    (line,) = [line for line in text.splitlines() if line.startswith("| D1")]
    assert line == "| D1 | engine | 30 images/CPU-s | 1 (PIL) | 30x (27-33) | >= 25x | yes |"
    assert len(list(csv.reader(path.open()))) == 3 and (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")


def test_a_missed_goal_is_said(tmp_path):
    rows = [measure.row("D1", "engine", "images/CPU-s", "PIL", found(24.0)), Row("D6", "first batch", 51.0, "ms")]
    _, text = page(tmp_path, rows)
    assert text.count("**no**") == 2 and "<= 50 ms" in text


def test_rows_of_other_hardware_and_recipes_stand_beside_each_other():
    entry = {key: "" for key in asdict(Row("D1", "x", 1.0, "s"))} | {"id": "D1", "what": "x", "hardware": "a", "command": ""}
    others = [entry | {"hardware": "b"}, entry | {"command": "python -m solo.bench data --recipe cifar-sym --pairs 5"}]
    assert board.newest([entry, *others, entry]) == [entry, *others]


def test_no_picture_without_a_ratio(tmp_path):
    _, text = page(tmp_path, [Row("Dx", "batch 64", 1.0, "images/CPU-s")])
    assert "ratios.png" not in text and "**no**" not in text and not (tmp_path / "ratios.png").exists()
