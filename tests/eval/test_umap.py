"""The map of features: what is written, with and without labels and validation images, and without umap-learn."""

import json
import runpy
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from solo import checkpoint
from solo.errors import ConfigError, DataError, EnvironmentFault
from solo.eval import umap
from solo.eval.umap import UMAPEvaluation, embed, evaluate_umap
from tests.conftest import ROOT
from tests.eval.runs import make_run


@pytest.fixture
def flat(monkeypatch):
    """The first two features in the place of UMAP, which need not be installed."""
    monkeypatch.setattr(umap, "find_spec", lambda name: True)
    monkeypatch.setattr(umap, "embed", lambda config, features: {part: rows[:, :2] for part, rows in features.items()})


def test_what_is_written(tmp_path, flat):
    run = make_run(tmp_path)
    points = evaluate_umap({"checkpoint": str(run), "max_images": 40, "device": "cpu"})
    with np.load(run / "umap.npz", allow_pickle=False) as file:
        assert set(file.files) == {"train", "train_labels", "val", "val_labels"}
        assert all(np.array_equal(file[name], points[name]) for name in file.files)
    assert points["train"].shape == (40, 2) and points["val"].shape == (40, 2) and set(points["train_labels"]) == {0, 1, 2}
    section = json.loads((run / "results.json").read_text())["umap"]
    assert section["results"] == {"train_images": 40, "val_images": 40}
    assert section["checkpoint_sha256"] == checkpoint.digest(run / "checkpoints" / "step7.ckpt")
    assert Image.open(run / "umap.png").size == (1760, 880)


def test_images_without_labels_or_validation(tmp_path, flat):
    run = make_run(tmp_path / "run")
    (tmp_path / "images").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    data = {"dataset": "image_folder", "train_path": str(tmp_path / "images"), "num_workers": 0}
    points = evaluate_umap({"checkpoint": str(run), "data": data, "output": str(tmp_path / "out"), "device": "cpu"})
    assert set(points) == {"train", "train_labels"} and (points["train_labels"] == -1).all()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"umap.png", "umap.npz", "results.json"}


def test_without_the_package_it_is_one_line_and_code_5(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(umap, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"needs the package umap-learn: pip install 'solo-ssl\[umap\]'"):
        evaluate_umap({"checkpoint": str(make_run(tmp_path))})
    monkeypatch.setattr(sys, "argv", ["main_umap.py", f"checkpoint={tmp_path}"])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "main_umap.py"), run_name="__main__")
    assert caught.value.code == 5 and len(capfd.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "umap.npz").exists()


def test_wrong_requests(tmp_path):
    with pytest.raises(ConfigError, match=r"neighbors must be .*\nmax_images must be .*\nmin_dist must lie"):
        evaluate_umap({"checkpoint": "x", "neighbors": 1, "max_images": 2, "min_dist": 2.0})
    with pytest.raises(ConfigError, match="unknown key neighbours: did you mean neighbors"):
        evaluate_umap({"checkpoint": "x", "neighbours": 3})


@pytest.mark.slow
@pytest.mark.skipif(find_spec("umap") is None, reason="umap-learn is not installed (the extra umap)")
def test_classes_that_lie_apart_stay_apart():
    draw = np.random.default_rng(0)
    labels = np.arange(90) % 3
    rows = (6 * np.eye(3, 12)[labels] + draw.normal(size=(90, 12))).astype(np.float32)
    config = UMAPEvaluation(checkpoint="x", neighbors=10)
    points = embed(config, {"train": rows[:60], "val": rows[60:]})
    assert torch.get_num_threads() == 1
    again = embed(config, {"train": rows[:60], "val": rows[60:]})
    assert points["train"].shape == (60, 2) and all(np.array_equal(points[part], again[part]) for part in points)
    centres = np.stack([points["train"][labels[:60] == c].mean(0) for c in range(3)])
    nearest = np.linalg.norm(points["val"][:, None] - centres, axis=-1).argmin(1)
    assert (nearest == labels[60:]).mean() > 0.9
    assert embed(config, {"train": rows[:4]})["train"].shape == (4, 2)
    with pytest.raises(DataError, match="at least 3 images, and there are 2"):
        embed(config, {"train": rows[:2]})
