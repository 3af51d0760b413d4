"""The k-NN command and the report of a run."""

import json

import pytest
import torch
from torch import nn

from solo import backbones, checkpoint, export
from solo.backbones import BackboneConfig
from solo.data.config import DataConfig
from solo.data.module import DataModule
from solo.data.views import Chance, View
from solo.errors import ConfigError, DataError, EnvironmentFault
from solo.eval.features import extract
from solo.eval.knn import knn_accuracy
from solo.eval.offline import evaluate_knn
from solo.eval.report import Pixels, ReportConfig, embedding, history, report
from solo.run import main
from solo.testing import tiny
from tests.data.common import make_folder
from tests.eval.runs import FAKE, NARROW, make_run


def test_knn_grid_is_recorded(tmp_path, capsys):
    run = make_run(tmp_path)
    rows = evaluate_knn({"checkpoint": str(run), "k": [1, 20], "temperature": [0.07, 0.2], "device": "cpu"})
    assert len(rows) == 6 and rows[-1]["temperature"] is None
    section = json.loads((run / "results.json").read_text())["knn"]
    assert section["results"] == rows and section["train_images"] == 96
    assert section["checkpoint_sha256"] == checkpoint.digest(run / "checkpoints" / "step7.ckpt")
    assert "cosine T=0.07" in capsys.readouterr().out
    data = DataModule(DataConfig(**FAKE), [], 16, 5)
    backbone = export.load_backbone(run)
    bank, queries = (extract(backbone, data.clean_loader(train=train), "cpu") for train in (True, False))
    assert rows[1]["acc1"] == knn_accuracy(*bank, *queries, 3, k=20)["acc1"]


def test_more_neighbours_than_images_that_vote(tmp_path, caplog, monkeypatch):
    run = make_run(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(ConfigError) as caught:
        patch.setattr("solo.eval.offline.extract", None)        # before any work
        evaluate_knn({"checkpoint": str(run), "k": [96, 97, 500], "device": "cpu"})
    assert str(caught.value) == "k=[97, 500] is more than the 96 labelled training images that vote: use at most 96"
    with caplog.at_level("INFO", logger="solo"):
        rows = evaluate_knn({"checkpoint": str(run), "distance": ["euclidean"], "device": "cpu"})
    assert [row["k"] for row in rows] == [1, 5, 10, 20, 50]
    assert caplog.messages.count("k=[100, 200] left out of the grid: only 96 labelled training images vote") == 1
    assert json.loads((run / "results.json").read_text())["knn"]["config"]["k"] == [1, 5, 10, 20, 50]


def test_foreign_checkpoint_must_be_told_its_images(tmp_path):
    backbone = export.load_backbone(make_run(tmp_path / "run"))
    path = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {f"encoder.{name}": value for name, value in backbone.state_dict().items()}}, path)
    with pytest.raises(ConfigError, match=r"data.dataset is missing: .*foreign.ckpt does not say"):
        evaluate_knn({"checkpoint": str(path), "backbone": NARROW})
    rows = evaluate_knn({"checkpoint": str(path), "backbone": NARROW, "data": FAKE, "k": [5], "output": str(tmp_path / "out")})
    assert rows and (tmp_path / "out" / "results.json").exists()


def test_wrong_knn_requests(tmp_path):
    with pytest.raises(ConfigError, match="k must be at least 1.*\ntemperature must be positive"):
        evaluate_knn({"checkpoint": str(tmp_path), "k": [0], "temperature": [0.0]})
    with pytest.raises(EnvironmentFault, match="device=gpu1 cannot be used"):
        evaluate_knn({"checkpoint": str(tmp_path), "device": "gpu1"})
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="output=.*file cannot be made: File exists"):
        evaluate_knn({"checkpoint": str(tmp_path), "output": str(tmp_path / "file"), "device": "cpu"})


@pytest.fixture
def data():
    views = [View(crop_size=16, horizontal_flip=Chance(prob=0.5), num_crops=2)]
    return DataModule(DataConfig(**FAKE), views, 16, 5)


@pytest.mark.slow
def test_report(tmp_path, data, capsys):
    run = make_run(tmp_path)
    source = export.load(run)
    log = run / "csv"
    for version, loss in (("version_0", 3.0), ("version_10", 1.0), ("version_2", 2.0)):
        (log / version).mkdir(parents=True)
        rows = f"epoch,step,train/loss,val/knn@20\n,5,{loss},\n0,5,,60.5\n,{int(10 * loss)},0.5,\n"
        (log / version / "metrics.csv").write_text(rows)
    assert history(run) == {"train/loss": [(5, 1.0), (10, 0.5), (20, 0.5), (30, 0.5)], "val/knn@20": [(5, 60.5)]}

    class Trained(nn.Module):
        backbone = source.backbone

    untrained = backbones.build(BackboneConfig(**NARROW), 3, 16)
    rows = report(ReportConfig(max_train=90, max_test=50, points=40, images=3), Trained(), untrained, data, run, source.path)
    assert [row["features"] for row in rows] == ["trained backbone", "same backbone, untrained", "raw pixels"]
    assert rows[0]["train_images"] == 90 and rows[0]["test_images"] == 50
    section = json.loads((run / "results.json").read_text())["comparison"]
    assert section["results"] == rows and section["checkpoint_sha256"] == source.sha256
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "raw pixels" in capsys.readouterr().out


def test_report_without_logs_labels_or_validation(tmp_path, data, monkeypatch):
    class Untouched(nn.Module):
        backbone = backbones.build(BackboneConfig(**NARROW), 3, 16)

    monkeypatch.setattr(data, "val_dataloader", list)
    assert report(ReportConfig(points=20, images=2), Untouched(), Untouched.backbone, data, tmp_path) == []
    assert (tmp_path / "report.png").exists() and not (tmp_path / "results.json").exists()


def test_sheet_shows_each_image_beside_its_own_views(data):
    sheet = data.sheet(4)
    assert len(sheet) == 4 and all(len(row) == 3 for row in sheet)
    assert all(image.shape == (3, 16, 16) and 0 <= image.min() and image.max() <= 1 for row in sheet for image in row)


def test_sheet_shows_what_training_saw(data):
    batch = next(iter(data.train_dataloader()))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.spec.mean, data.spec.std))
    sheet = data.sheet(len(data.selected))
    for i, *views in zip(batch.index, *batch.views, strict=True):
        for seen, shown in zip(views, sheet[i][1:], strict=True):
            torch.testing.assert_close(seen * std + mean, shown, atol=2e-3, rtol=0)


def run_on(images, tmp_path):
    """A whole run on a folder of 16-pixel images, as the command makes it."""
    content = tiny("nnclr", tmp_path / "runs", report={"enabled": True, "points": 20}, max_epochs=1)
    content["data"] = {"dataset": "image_folder", "train_path": str(images), "num_workers": 0}
    main(content)


@pytest.mark.slow
def test_damaged_images_do_not_end_a_finished_run(tmp_path, caplog):
    paths = make_folder(tmp_path / "images" / "train", {"a": 80, "b": 80}, size=(16, 16))
    make_folder(tmp_path / "images" / "val", {"a": 8, "b": 8}, size=(16, 16), start=500)
    paths[0].write_bytes(b"damaged")                            # the first one the sheet of views asks for
    with caplog.at_level("INFO", logger="solo"):
        run_on(tmp_path / "images", tmp_path)
    (run,) = (tmp_path / "runs").iterdir()
    assert (run / "report.png").exists() and "comparison" in (run / "results.json").read_text()
    assert f"checkpoint: {run / 'last.ckpt'}" in caplog.text and "report has no" not in caplog.text


def test_a_report_that_fails_is_a_line_and_no_end(tmp_path, monkeypatch, caplog):
    make_folder(tmp_path / "images" / "train", {"a": 8, "b": 8}, size=(16, 16))
    make_folder(tmp_path / "images" / "val", {"a": 4, "b": 4}, size=(16, 16), start=500)

    def fail(*_args):
        raise DataError("no\nluck")

    for part in ("comparison", "draw"):
        monkeypatch.setattr(f"solo.eval.report.{part}", fail)
    with caplog.at_level("INFO", logger="solo"):
        run_on(tmp_path / "images", tmp_path)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    reason = "(DataError: no luck); the run itself is whole"
    assert told == [f"the report has no {part} {reason}" for part in ("comparison", "picture")]
    assert "checkpoint: " in caplog.text


def test_pixels_are_small_and_embedding_is_flat():
    assert Pixels()(torch.zeros(2, 3, 224, 224)).shape == (2, 3072)
    assert embedding(torch.randn(5, 3)).shape == (5, 2) and embedding(torch.randn(5, 1)).shape == (5, 2)
