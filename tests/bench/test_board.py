"""The page of measurements says what the results say."""

import csv
import shutil
from dataclasses import asdict

import pytest

from solo.bench import board, measure
from solo.bench.data import setting_of
from solo.bench.measure import Comparison, Row
from solo.bench.peers.checkout import release
from tests.conftest import ROOT


def test_the_page_of_this_repository_is_drawn_from_its_results(tmp_path):
    shutil.copy(ROOT / "bench" / "results.csv", tmp_path)
    assert board.render(tmp_path / "results.csv").read_text() == (ROOT / "bench" / "README.md").read_text()


def page(tmp_path, rows):
    path = tmp_path / "results.csv"
    measure.write(rows, path)
    return path, (tmp_path / "README.md").read_text()


def found(ratio):
    return Comparison(tuple((part * ratio, 1.0) for part in (0.9, 1, 1, 1, 1.1)))


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


def test_the_bytes_that_no_bound_judges_name_their_goal(tmp_path):
    what = "nnclr: gathered by a rank for an image of the global batch on 2 ranks"
    _, text = page(tmp_path, [Row("S6", what, 5136.0, "bytes"), Row("S6", "nnclr: collectives", 2.0, "collectives")])
    gathered, collectives = [line for line in text.splitlines() if line.startswith("| S6")]
    assert gathered.endswith("| 5,136 bytes |  |  | 2 D + 8 bytes a row | **no** |")
    assert collectives.endswith("| <= 2 collectives | yes |")
    assert "S6's bytes are\nover their goal" in text


def test_two_pairs_short_by_over_a_tenth_miss_a_goal_that_the_median_meets(tmp_path):
    rows = []
    for what, worst in (("one", (21.0, 24.0)), ("two", (21.0, 22.0))):
        rows.append(measure.row("D1", what, "images/CPU-s", "PIL", Comparison(tuple((r, 1.0) for r in (*worst, 26, 26, 27)))))
    _, text = page(tmp_path, rows)
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| D1")] == ["yes", "**no**"]


def test_rows_from_before_a_column_was_there_stay(tmp_path):
    path, text = page(tmp_path, [measure.row("D1", "engine", "images/CPU-s", "PIL", found(30.0))])
    path.write_text("".join(f"{line.rsplit(',', 2)[0]}\n" for line in path.read_text().splitlines()))
    _, both = page(tmp_path, [Row("D6", "first batch", 11.0, "ms")])
    first, second = csv.DictReader(path.open())
    assert first["ratios"] == "" and first["ratio"] == "30" and second["what"] == "first batch" and second["ratios"] == ""
    assert [line for line in both.splitlines() if line.startswith("| D1")] == [
        line for line in text.splitlines() if line.startswith("| D1")]


KERNEL = "nearest 1 of 65536, 2 x 4096, D=256"


def test_goals_know_the_rows_of_a_gpu_by_their_words():
    peer = "a product per look-up, autocast"
    entry = {"value": "4", "ratio": "", "peer_value": "", "peer": "", "unit": "steps/s"}
    k3 = {**entry, "id": "K3", "what": KERNEL}
    judged = [
        ({**k3, "peer": peer, "ratio": "1.2", "ratios": "1.2 1.2"}, [(">= 1.3x", False)]),
        ({**k3, "peer": "itself", "ratio": "1.2", "what": f"{KERNEL}: the same twice"}, []),
        ({**k3, "what": f"{KERNEL}: peak above inputs", "unit": "MB", "peer": peer, "peer_value": "600"}, [("<= 5 MB", True)]),
        ({**k3, "what": f"{KERNEL}: rate of the products (K5)", "unit": "TFLOP/s", "value": "400"}, [(">= 355 TFLOP/s", True)]),
        ({**k3, "id": "K1", "what": "SCE N=4096 K=65536 D=256: peak above inputs", "unit": "MB", "value": "30",
          "peer": "official formula, autocast", "peer_value": "1000"}, [("<= 2 % of the peer's", False)]),
        ({**k3, "id": "S3", "ratio": "6", "value": "510", "unit": "us"}, [(">= 5x", True), ("<= 500 us", False)]),
    ]
    for row, expected in judged:
        assert [(str(goal), goal.met(row)) for goal in board.goals(row)] == expected, row


def test_what_waits_for_a_gpu_is_said(tmp_path):
    _, text = page(tmp_path, [Row("E4", "nnclr, CIFAR-10, 200 epochs with their validation", 9.0, "min")])
    assert "these goals wait: K1, K2, K3, K4, K5, E1, E2, E3 (" in text and "<= 10 min | yes" in text


def test_rows_of_other_hardware_and_recipes_stand_beside_each_other():
    entry = {key: "" for key in asdict(Row("D1", "x", 1.0, "s"))} | {"id": "D1", "what": "x", "hardware": "a", "command": ""}
    others = [entry | {"hardware": "b"}, entry | {"command": "python -m solo.bench data --recipe cifar-sym --pairs 5"}]
    assert board.newest([entry, *others, entry]) == [entry, *others]


def test_a_setting_is_the_row_and_a_default_is_what_it_stands_for(tmp_path):
    overrides = ["data.train_path=a.npz", "data.kernel=torch"]
    auto, torch = setting_of("cifar-asym", "auto", overrides[:1]), setting_of("cifar-asym", "torch", overrides)
    assert (auto, torch) == ("cifar-asym", "cifar-asym, data.kernel=torch")
    assert setting_of("in224", "numba", ["data.dataset=tar", "data.num_workers=4"]) == "in224, data.num_workers=4"
    entry = {key: "" for key in asdict(Row("D2", "x", 1.0, "s"))} | {"id": "D2", "what": "x", "hardware": "a"}
    named = entry | {"command": "python -m solo.bench data --recipe cifar-asym"}       # from before rows had a setting
    told = [entry | {"command": "python -m solo.bench data", "setting": setting} for setting in (auto, torch)]
    assert board.newest([named, *told]) == told
    for setting in (auto, torch):
        measure.write([Row("D2", "fast engine", 1.0, "images/CPU-s")], tmp_path / "results.csv", setting)
    assert all(f"| D2 | fast engine, {setting} |" in (tmp_path / "README.md").read_text() for setting in (auto, torch))


@pytest.mark.parametrize(("id", "what", "peer", "expected"), [
    ("E1", "nnclr, CIFAR-10 recipe, epochs in turn (wall)", "solo-learn's pipeline and step, 4 workers", [3.5]),
    ("E1", "nnclr, CIFAR-10 recipe, epochs in turn (wall)", "solo-learn's pipeline and step, 16 workers", [1.5]),
    ("E1", "nnclr, CIFAR-10 recipe, epochs in turn (wall)", "solo-learn's pipeline and step, 8 workers", []),
    ("E2", "all4one, CIFAR-10 recipe, epochs in turn (wall)", "solo-learn's pipeline and step, 4 workers", [3]),
    ("E3", "nnclr, ResNet-50 at 224 px, from JPEGs, epochs in turn", "solo-learn's pipeline and step, 16 workers", [1.4]),
    ("ES", "nnclr, step on synthetic images of 224 px, resnet50, batch 256 (E3)", "as published", [1.05]),
    ("D5", "all on the CPU", "DALI on the CPU", []),
    ("D5", "all on the CPU", "solo-learn's pipeline", [3]),
    ("L3", "NN top-1, 2 views", "solo-learn's own code", [3]),
    ("L3", "NN top-5, 2 views", "solo-learn's own code", [2]),
])
def test_goals_are_for_the_peer_they_name(id, what, peer, expected):
    entry = {"id": id, "what": what, "peer": peer, "ratio": "2", "peer_value": "1", "unit": "per CPU-s"}
    assert [goal.bound for goal in board.goals(entry)] == expected


def test_versions_name_the_checkout(tmp_path):
    assert release(None) == release("torch-compile") == release(str(tmp_path)) == ""
    metadata = tmp_path / "solo_learn-1.0.2.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: solo-learn\nVersion: 1.0.2\n")
    assert release(str(tmp_path)) == "solo-learn 1.0.2"
    measure.write([Row("S4", "LARS", 1.0, "per CPU-s")], tmp_path / "results.csv", peer=release(str(tmp_path)))
    (line,) = csv.DictReader((tmp_path / "results.csv").open())
    assert line["versions"].endswith(" solo-learn 1.0.2") and "pytorch-lightning 2" in line["versions"]


def test_no_picture_without_a_ratio(tmp_path):
    _, text = page(tmp_path, [Row("Dx", "batch 64", 1.0, "images/CPU-s")])
    assert "ratios.png" not in text and "**no**" not in text and not (tmp_path / "ratios.png").exists()
