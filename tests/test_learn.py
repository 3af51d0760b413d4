"""The bench that shows that a method learns, on a handful of images in the place of CIFAR-10's."""

import csv
import importlib.util
import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from solo.data.digits import colored_digits
from solo.errors import ConfigError
from tests.conftest import ROOT

TINY = [
    "backbone.kwargs={channels: [4,4,4,8], layers: [1,1,1,1]}", "optimizer.batch_size=16", "method_kwargs.queue_size=32",
    "method_kwargs.proj_hidden_dim=16", "method_kwargs.proj_output_dim=8", "method_kwargs.pred_hidden_dim=16",
    "accelerator=cpu",
]


def npz(path, train, test):
    """The first digits of both parts in the form of the shared CIFAR-10 file."""
    images, labels, split = [], [], []
    for part, count in ((True, train), (False, test)):
        source = colored_digits(part)
        for image, label in zip(source.images[:count], source.labels[:count], strict=True):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG")
            images.append(np.frombuffer(file.getvalue(), np.uint8))
            labels.append(label)
            split.append(int(not part))
    offsets = np.concatenate([[0], np.cumsum([len(image) for image in images])])
    path.parent.mkdir(parents=True)
    np.savez(path, jpeg=np.concatenate(images), offsets=offsets, labels=np.array(labels), split=np.array(split),
             classes=np.array([str(i) for i in range(10)]))


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """``learn(*arguments)`` in a repository of its own."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    npz(tmp_path / "shared" / "data" / "cifar10-jpeg.npz", 120, 40)
    spec = importlib.util.spec_from_file_location("learn", tmp_path / "scripts" / "bench" / "learn.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("SOLO_SHARED", str(tmp_path / "shared"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["learn.py", *arguments, "--recipe", "scripts/bench/small"])
        module.main()

    return run


@pytest.mark.slow
def test_a_run_leaves_its_curve_and_a_row_and_other_settings_another(learn, tmp_path):
    lab = tmp_path / "LAB.md"
    lab.write_text("| method |\n|---|\n<!-- learn.py -->\nbelow\n")
    learn("nnclr", "--images", "100", "--epochs", "2", "--every", "1", *TINY)
    learn("nnclr", "--images", "100", "--epochs", "2", "--every", "1", *TINY, "optimizer.lr=0.001")
    lines = lab.read_text().splitlines()
    assert len(lines) == 6 and lines[-2:] == ["<!-- learn.py -->", "below"]
    files = sorted((tmp_path / "bench" / "learn").iterdir())
    assert len(files) == 2 and all(any(f"](bench/learn/{file.name})" in line for line in lines) for file in files)
    with files[0].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"] and float(rows[0]["seconds"]) == 0 < float(rows[2]["seconds"])
    assert all(0 <= float(row[name]) <= 100 for row in rows for name in ("knn20", "knn200", "linear"))
    assert f"{float(rows[0]['knn20']):.1f} -> **{float(rows[2]['knn20']):.1f}**" in lab.read_text()


@pytest.mark.slow
def test_a_result_without_a_place_is_told_not_lost(learn, tmp_path):
    (tmp_path / "LAB.md").write_text("no table\n")
    with pytest.raises(ConfigError, match=r"has no line <!-- learn.py --> .*: \| nnclr \| 100 \| 1 \|"):
        learn("nnclr", "--images", "100", "--epochs", "1", *TINY, "scheduler.warmup_epochs=1")
