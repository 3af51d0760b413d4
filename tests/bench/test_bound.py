"""``python -m solo.bench data`` names what bounds a run, of images in memory and of files."""

import pytest
from PIL import Image

from solo.bench import data, large
from solo.bench.bound import ADVICE, verdict
from solo.bench.measure import Row
from tests.data.common import picture

RECIPE = ["--recipe", "scripts/pretrain/nnclr.yaml", "--no-write"]
SMALL = ["backbone.kwargs={channels: [4, 4, 4, 8], layers: [1, 1, 1, 1]}", "optimizer.batch_size=8", "data.train_size=32"]


@pytest.mark.parametrize(("rates", "slowest"), [
    ({"decode": 100.0, "crop": 150.0, "finish": 500.0, "step": 90.0}, "decode"),         # together 60
    ({"decode": 150.0, "crop": 100.0, "finish": 500.0, "step": 90.0}, "crop"),
    ({"decode": 300.0, "crop": 300.0, "finish": 500.0, "step": 150.0}, "step"),          # together 115
    ({"decode": 300.0, "crop": 300.0, "finish": 150.0, "step": 500.0}, "finish"),
    ({"decode": 300.0, "crop": 300.0, "transfer": 110.0, "finish": 500.0, "step": 150.0}, "transfer"),
    ({"decode": "in memory already", "augment": 50.0, "transfer": "no GPU", "step": 60.0}, "augment"),
])
def test_stages_of_one_place_take_turns(rates, slowest):
    *lines, last = verdict(rates).splitlines()
    assert [line.split()[0] for line in lines] == list(rates)
    assert last.startswith(f"bound: {slowest}") and last.endswith(ADVICE[slowest])
    assert ("decode and crop take turns: 60 images/s" in last) == (rates["decode"] == 100 or rates.get("crop") == 100)


def _printed(capsys):
    lines = capsys.readouterr().out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("  decode"))
    return [line.split()[0] for line in lines[first:]], lines


def test_files_have_a_bound(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(large, "main", lambda *words: None)
    for i in range(32):
        Image.fromarray(picture(i, 70, 90)).save(tmp_path / f"{i}.jpg")
    files = [*SMALL, "data.dataset=image_folder", f"data.train_path={tmp_path}", "data.num_workers=1"]
    data.main([*RECIPE, *files])
    stages, lines = _printed(capsys)
    assert stages == ["decode", "crop", "transfer", "finish", "step", "bound:"]
    rates = {line.split()[0]: float(line.split()[1].replace(",", "")) for line in lines if line.endswith("images/s")}
    assert set(rates) >= {"decode", "crop", "finish", "step"} and min(rates.values()) > 0
    data.main([*RECIPE, "--no-step", *files])
    assert "bound:" not in capsys.readouterr().out


def test_images_in_memory_have_a_bound(monkeypatch, capsys):
    monkeypatch.setattr(data, "compare", lambda *words: [Row("D1", "fast engine", 1000.0, "images/CPU-s")])
    for work in ("first_batch", "flatness"):
        monkeypatch.setattr(data, work, lambda *words, **more: [])
    monkeypatch.setattr(data, "many_views", lambda *words: Row("Dx", "views", 1.0, "times"))
    data.main([*RECIPE, *SMALL, "data.dataset=fake", "data.size=16"])
    stages, lines = _printed(capsys)
    assert stages == ["decode", "augment", "transfer", "step", "bound:"]
    assert any(line.split() == ["augment", "1,000", "images/s"] for line in lines)
