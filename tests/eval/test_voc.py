"""Folders in Pascal VOC layout: reading them safely, SVMs and the linear head on features, and the command."""

import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from solo import checkpoint
from solo.data.decoding import BadImage
from solo.data.voc import open_voc, read_annotation
from solo.errors import ConfigError, DataError
from solo.eval import voc
from solo.eval.ap import ap_11point, ap_area, mean_ap
from solo.eval.multilabel import METRICS, HeadConfig, Rows, SVMConfig, best, draw, head_scores, svm_scores
from solo.eval.voc import command, evaluate_voc
from tests.conftest import ROOT
from tests.eval.runs import make_run

KINDS = ("blue", "green", "red")
OBJECT = "<object><name>{}</name><difficult>{}</difficult><part><name>head</name></part></object>"
QUICK = {"svm": {"shots": [2, 100], "draws": 2, "costs": [0.1, 1.0]}, "head": {"weight_decay": [0.01, 1.0]}, "device": "cpu"}


def annotate(folder, name, objects):
    text = "".join(OBJECT.format(kind, int(difficult)) for kind, difficult in objects)
    (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation><filename>x</filename>{text}</annotation>")


def make_voc(folder, sizes={"train": 30, "val": 12, "test": 20}, kind="Main"):  # noqa: B006
    """Images whose colour channels are bright where the class of that colour is there."""
    for part in ("Annotations", "JPEGImages", f"ImageSets/{kind}"):
        (folder / part).mkdir(parents=True)
    draws, count = np.random.default_rng(0), 0
    for split, size in sizes.items():
        names = [f"{count + i:06d}" for i in range(size)]
        count += size
        (folder / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{name}  1\n" for name in names))
        for name in names:
            there = draws.random(3) < 0.4
            pixels = np.where(there[::-1], 220, 30) + draws.integers(-20, 20, (24, 20, 3))          # red first
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg")
            annotate(folder, name, [(kind, False) for kind, shown in zip(KINDS, there, strict=True) if shown])
    return folder


# --- the layout ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Main", "Layout"])
def test_layout(tmp_path, kind):
    folder = make_voc(tmp_path / "VOCdevkit" / "VOC2007", kind=kind)
    annotate(folder, "000000", [("red", True), ("blue", True), ("blue", False), ("zebra", True)])
    train, test = open_voc(folder.parent, ["train", "test"], 3)  # found below the folder given
    assert len(train) == 30 and len(test) == 20
    assert train.classes == test.classes == ["blue", "green", "red", "zebra"]  # the parts of an object are no classes
    assert train.targets[0].tolist() == [1, -1, 0, 0] and set(test.targets[:, 3]) == {-1}
    assert train.load(3).shape == (24, 20, 3) and train.labels.tolist() == list(range(30))


def test_wrong_layouts(tmp_path):
    folder = make_voc(tmp_path / "a")
    for request, message in [
        ((tmp_path / "nowhere", ["train"]), r"root=.*nowhere does not exist"),
        ((folder / "JPEGImages", ["train"]), r"needs the folders Annotations, ImageSets, JPEGImages"),
        ((folder, ["train", "trainval"]), r"no split trainval in .* \(there: test, train, val\)"),
    ]:
        with pytest.raises(ConfigError, match=message):
            open_voc(*request, 3)
    lists = folder / "ImageSets" / "Main"
    (lists / "test.txt").write_text("000003\n000003\n\n")
    with pytest.raises(ConfigError, match="1 images are in split train and in split test, first 000003"):
        open_voc(folder, ["train", "test"], 3)
    for content, message in (("../../etc/passwd\n", "not the name of an image"), ("\n", "is empty")):
        (lists / "test.txt").write_text(content)
        with pytest.raises(ConfigError, match=message):
            open_voc(folder, ["test"], 3)
    make_voc(tmp_path / "b")
    with pytest.raises(ConfigError, match="holds several folders in Pascal VOC layout: give .*a or .*b"):
        open_voc(tmp_path, ["train"], 3)


BOMB = '<!DOCTYPE a [<!ENTITY a "aaaaa"><!ENTITY b "&a;&a;&a;">]><annotation><object><name>&b;</name></object></annotation>'
OUTSIDE = '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><annotation><object><name>&x;</name></object></annotation>'


@pytest.mark.parametrize("content, message", [
    (BOMB, "document type"),
    (OUTSIDE, "document type"),
    (OUTSIDE.encode("utf-16"), "document type"),
    ("<annotation><object>", "cannot be read: no element found"),
    ("<annotation><object></object></annotation>", "an object without a name"),
    ("<html></html>", "its root is <html>"),
    ('<?xml version="1.0" encoding="klingon"?><annotation/>', "cannot be read"),
    ("", "cannot be read"),
    (b"\xff\xd8\xff\xe0 a JPEG", "cannot be read"),
    ("<annotation>" + " " * (4 << 20) + "</annotation>", "larger than"),
    (None, "cannot be opened"),
], ids=range(11))
def test_annotations_that_are_refused(tmp_path, content, message):
    path = tmp_path / "a.xml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_annotation(path)


def test_broken_files_are_named_and_left_out(tmp_path):
    folder = make_voc(tmp_path)
    (folder / "Annotations" / "000004.xml").write_text("<annotation>")
    (folder / "JPEGImages" / "000005.jpg").unlink()
    (train,) = open_voc(folder, ["train"], 3)
    for row, message in ((4, "its annotation 000004.xml cannot be read"), (5, "no such file")):
        with pytest.raises(BadImage, match=message):
            train.load(row)
    (folder / "Annotations" / "000004.xml").write_text("<annotation/>")
    assert (open_voc(folder, ["train"], 3)[0].targets[4] == -1).all()  # an image of nothing is an image
    for file in (folder / "Annotations").glob("*"):
        file.unlink()
    with pytest.raises(DataError, match="no annotation below .* names an object .*cannot be opened"):
        open_voc(folder, ["train"], 3)


# --- classifiers ---------------------------------------------------------------------------------------------------


def separable(n, seed, noise=0.3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.where(torch.rand(n, 3, generator=generator) < 0.4, 1, -1)
    features = labels.float() @ torch.eye(3, 8) + noise * torch.randn(n, 8, generator=generator) + 5.0
    return Rows(features, labels)


def test_both_classifiers_find_what_can_be_found():
    train, test = separable(200, 0), separable(100, 1)
    assert mean_ap(ap_area, svm_scores(train, test.features, 10.0)[0], test.labels) > 0.97
    assert mean_ap(ap_area, head_scores(train, test.features, 0.01), test.labels) > 0.97


def test_svm_is_the_published_one():
    train, test = separable(60, 0), separable(20, 1)
    scores, unfinished = svm_scores(train, test.features, 0.5)
    x, y = ((rows / (rows.norm(dim=1, keepdim=True) + 1e-5)).double().numpy() for rows in (train.features, test.features))
    settings = {"penalty": "l2", "loss": "squared_hinge", "dual": True, "tol": 1e-4, "max_iter": 2000, "random_state": 0}
    machine = LinearSVC(C=0.5, class_weight={1: 2, -1: 1}, **settings)
    expected = machine.fit(x, train.labels[:, 1].numpy()).decision_function(y)
    np.testing.assert_allclose(scores[:, 1].numpy(), expected, rtol=1e-9)
    assert unfinished == 0 and svm_scores(train, test.features, 1e6)[1] == 3


def test_uncounted_labels_neither_train_nor_judge():
    train, test = separable(60, 0), separable(20, 1)
    train.labels[::2, 0] = 0
    kept = Rows(train.features[1::2], train.labels[1::2])
    first, second = (svm_scores(rows, test.features, 1.0)[0][:, 0] for rows in (train, kept))
    torch.testing.assert_close(first, second)
    logits = head_scores(train, test.features, 0.1)
    scaler = StandardScaler().fit(train.features.double())
    model = LogisticRegression(C=1 / (0.1 * 60), tol=1e-8, max_iter=1000)
    model.fit(scaler.transform(kept.features.double()), kept.labels[:, 0])
    np.testing.assert_allclose(logits[:, 0], model.decision_function(scaler.transform(test.features.double())), rtol=1e-3)
    train.labels[:, 1] = 0
    assert (head_scores(train, test.features, 0.1)[:, 1] == 0).all()


def test_one_sided_classes_score_all_images_alike():
    train, test = separable(40, 0), separable(20, 1)
    train.labels[:, 2] = 1
    scores = svm_scores(train, test.features, 1.0)[0]
    assert (scores[:, 2] == 0).all() and scores[:, :2].abs().min() > 0


def test_draws():
    labels = torch.tensor([[1, -1], [1, 1], [-1, 1], [1, -1], [-1, 1], [0, -1]])
    rows = draw(labels, 2, seed=3)
    assert len(rows) == 4 and (labels[rows[:2], 0] == 1).all() and (labels[rows[2:], 1] == 1).all()
    assert len(rows[:2].unique()) == 2 and torch.equal(rows, draw(labels, 2, seed=3))
    assert len({tuple(draw(labels, 2, seed=s).tolist()) for s in range(9)}) > 1
    assert sorted(draw(labels, 64, seed=0).tolist()) == [0, 1, 1, 2, 3, 4]  # all there are; duplicates are kept


def test_cost_is_the_best_on_validation():
    train, val = separable(40, 0, noise=1.5), separable(200, 1, noise=1.5)
    costs = [1e-4, 1e-2, 1.0, 100.0]
    merits = [mean_ap(ap_area, svm_scores(train, val.features, cost)[0], val.labels) for cost in costs]
    chosen = best(costs, lambda cost: [svm_scores(train, val.features, cost)[0]], val.labels)
    assert len(set(merits)) > 1 and chosen == costs[int(np.argmax(merits))]


def test_head_is_logistic_regression_of_each_class():
    train, test = separable(60, 0), separable(20, 1)
    scaler = StandardScaler().fit(train.features.double())
    logits = head_scores(train, test.features, 0.05)
    for c in range(3):
        model = LogisticRegression(C=1 / (0.05 * 60), tol=1e-8, max_iter=1000)
        model.fit(scaler.transform(train.features.double()), train.labels[:, c])
        np.testing.assert_allclose(logits[:, c], model.decision_function(scaler.transform(test.features.double())), rtol=1e-3)


def test_defaults_are_the_published_shots_and_draws():
    assert (SVMConfig().shots, SVMConfig().draws) == ([16, 32, 64], 5)
    assert list(METRICS) == ["ap_11point", "ap_area", "ap_step_micro"]


def test_wrong_settings():
    with pytest.raises(ValueError, match="shots must be .*\ncosts must be .*\ndraws must be"):
        SVMConfig(shots=[0], costs=[0.0], draws=0)
    for wrong in ([], [-1.0]):
        with pytest.raises(ValueError, match="weight_decay must"):
            HeadConfig(weight_decay=wrong)


# --- the protocol --------------------------------------------------------------------------------------------------


def costs_of(config, images):
    return [row["cost"] for row in voc._svms(config, images, 0)]


def test_validation_chooses_the_cost_and_test_never_does():
    """Test labels turned round, so that what is best on validation is worst on them."""
    train, val = separable(40, 0, noise=1.5), separable(200, 1, noise=1.5)
    images = voc.Images(train, val, Rows(val.features, -val.labels), list(KINDS))
    config = SVMConfig(costs=[1e-4, 1e-2, 1.0, 100.0], shots=[4], draws=3)

    def merits(fits, judge):
        scores = {cost: [svm_scores(fit, val.features, cost)[0] for fit in fits] for cost in config.costs}
        return {cost: np.mean([mean_ap(ap_area, found, judge) for found in each]) for cost, each in scores.items()}

    drawn = [train.take(draw(train.labels, 4, seed)) for seed in range(3)]
    for chosen, fits in zip(costs_of(config, images), (drawn, [train]), strict=True):
        on_val, on_test = merits(fits, val.labels), merits(fits, -val.labels)
        assert chosen == max(on_val, key=on_val.get) != max(on_test, key=on_test.get)


def test_every_shot_is_drawn_as_often_as_asked(monkeypatch):
    train, val, test = (separable(60, seed) for seed in range(3))
    seeds = []
    monkeypatch.setattr(voc, "draw", lambda labels, shots, seed: seeds.append((shots, seed)) or draw(labels, shots, seed))
    rows = voc._svms(SVMConfig(costs=[1.0]), voc.Images(train, val, test, list(KINDS)), 7)
    assert seeds == [(shots, 7 + i) for shots in (16, 32, 64) for i in range(5)]
    several = [scores_of(train.take(draw(train.labels, 16, 7 + i)), test) for i in range(5)]
    for name, value in scores_of(train.join(val), test).items():
        assert rows[3][name] == pytest.approx(value, rel=1e-9)
        assert rows[0][name] == pytest.approx(np.mean([each[name] for each in several]), rel=1e-9)
    assert "ap_area_std" in rows[0] and "ap_area_std" not in rows[3]


def scores_of(fit, test):
    """Each average precision under its name, in percent; the micro one is scikit-learn's of one flat list."""
    scores, labels = svm_scores(fit, test.features, 1.0)[0], test.labels
    micro = average_precision_score(labels.flatten() > 0, scores.flatten())
    return {"ap_11point": 100 * mean_ap(ap_11point, scores, labels), "ap_area": 100 * mean_ap(ap_area, scores, labels),
            "ap_step_micro": 100 * micro}


def test_every_image_passes_the_backbone_once(tmp_path, monkeypatch):
    run, folder = make_run(tmp_path / "run"), make_voc(tmp_path / "voc")
    real, passed = voc.load, []

    def watched(*arguments):
        source = real(*arguments)
        source.backbone.register_forward_hook(lambda module, inputs, output: passed.append(len(output)))
        return source

    monkeypatch.setattr(voc, "load", watched)
    rows = evaluate_voc({"checkpoint": str(run), "root": str(folder), "batch_size": 8, **QUICK})
    assert len(rows) == 4 and sum(passed) == 30 + 12 + 20 and max(passed) == 8


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_evaluation_is_recorded(tmp_path, capsys, caplog):
    run, folder = make_run(tmp_path / "run"), make_voc(tmp_path / "voc", {"train": 150, "val": 30, "test": 40})
    (folder / "JPEGImages" / "000007.jpg").write_bytes(b"no image")
    with caplog.at_level("INFO", "solo"):
        rows = evaluate_voc({"checkpoint": str(run), "root": str(folder), **QUICK})
    section = json.loads((run / "results.json").read_text())["voc"]
    assert section["results"] == rows and section["classes"] == list(KINDS)
    assert section["checkpoint_sha256"] == checkpoint.digest(run / "checkpoints" / "step7.ckpt")
    assert section["config"]["difficult"] == "negative" and section["config"]["backbone"]["name"] == "resnet18"
    assert section["config"]["data"]["size"] == 16 and section["config"]["data"]["mean"] == [0.5] * 3  # as in training
    assert [(row["classifier"], row["shots"], row["train_images"]) for row in rows] == [
        ("svm", 2, 6), ("svm", 100, rows[1]["train_images"]), ("svm", None, 179), ("linear head", None, 179)]
    assert all(0 <= row[name] <= 100 for row in rows for name in ("ap_11point", "ap_area", "ap_step_micro"))
    assert set(rows[2]["ap_area_per_class"]) == set(KINDS) and rows[2]["ap_area"] > 60  # colours, seen by random weights
    assert caplog.text.count("000007 (UnidentifiedImageError") == 1 and "left out" in caplog.text
    assert caplog.text.count("100 shots: all positive train images are taken where there are fewer") == 1
    assert "ap_11point" in capsys.readouterr().out
    assert rows == evaluate_voc({"checkpoint": str(run), "root": str(folder), **QUICK})  # twice the same


@pytest.mark.slow
def test_difficult_objects(tmp_path):
    run, folder = make_run(tmp_path / "run"), make_voc(tmp_path / "voc")
    for i in range(42, 50):
        annotate(folder, f"{i:06d}", [("red", True)])
    found = {}
    for choice in ("negative", "positive", "ignore"):
        request = {"checkpoint": str(run), "root": str(folder), "difficult": choice, "val": None, **QUICK}
        found[choice] = evaluate_voc(request)[-1]["ap_area_per_class"]["red"]
    assert len(set(found.values())) == 3


def test_the_test_split_chooses_nothing(tmp_path):
    """Other test labels change the scores, never the costs."""
    run, folder = make_run(tmp_path / "run"), make_voc(tmp_path / "voc")
    request = {"checkpoint": str(run), "root": str(folder), **QUICK}
    before = evaluate_voc(request)
    for i in range(42, 62):
        annotate(folder, f"{i:06d}", [(KINDS[i % 3], False)])
    after = evaluate_voc(request)
    chosen = lambda rows: [row.get("cost", row.get("weight_decay")) for row in rows]  # noqa: E731
    assert chosen(before) == chosen(after)
    assert all(a["ap_area"] != b["ap_area"] for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("change, error, message", [
    ({"rot": 1, "svm": {"shot": 3}}, ConfigError, r"unknown key rot: did you mean root\?\n.*did you mean svm.shots\?"),
    ({"data": {"train_path": "x"}}, ConfigError, r"unknown key data.train_path \(known: size, mean"),
    ({"data": {"mean": [0.5]}}, ConfigError, "data.mean must have 3 values"),
    ({"difficult": "maybe"}, ConfigError, "difficult must be one of negative, positive, ignore"),
    ({"val": "test"}, ConfigError, "must be different splits.*val=null"),
    ({"test": "nothing"}, DataError, "no image of split nothing shows any class"),
    ({"train": "broken"}, DataError, r"3 of 4 images cannot be read, more than data.max_bad_fraction=0.01"),
])
def test_wrong_requests(tmp_path, change, error, message):
    run, folder = make_run(tmp_path / "run"), make_voc(tmp_path / "voc")
    for name, rows in (("nothing", "0n"), ("broken", "000000\nb1\nb2\nb3")):
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text(rows)
    Image.new("RGB", (8, 8)).save(folder / "JPEGImages" / "0n.jpg")
    annotate(folder, "0n", [])
    with pytest.raises(error, match=message):
        evaluate_voc({"checkpoint": str(run), "root": str(folder), **QUICK, **change})


def test_command(tmp_path, monkeypatch, capsys):
    run, folder = make_run(tmp_path / "run"), make_voc(tmp_path / "voc")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["voc.py", f"checkpoint={run}", f"root={folder}", "svm.shots=[2]", "svm.draws=2",
                                      "svm.costs=[1]", "head.weight_decay=[0.1]", "device=cpu"])
    command()
    assert "ap_area" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"run", "voc"}  # no folder of Hydra's
    monkeypatch.setattr(sys, "argv", ["voc.py", f"checkpoint={run}", f"rot={folder}"])
    with pytest.raises(SystemExit) as caught:
        command()
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert lines == ["config error: unknown key rot: did you mean root?", "config error: missing key root"]


@pytest.mark.slow
def test_blood_cells(tmp_path, shared_data):
    """The program, from its command line, on real images."""
    with tarfile.open(shared_data("bccd-voc.tar")) as archive:
        archive.extractall(tmp_path, filter="data")
    run = make_run(tmp_path / "run")
    words = [sys.executable, "-m", "solo.eval.voc", f"checkpoint={run}", f"root={tmp_path}", "data.size=32", "device=cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in METRICS)
    rows = json.loads((run / "results.json").read_text())["voc"]["results"]
    assert [(row["classifier"], row["shots"]) for row in rows] == [
        ("svm", 16), ("svm", 32), ("svm", 64), ("svm", None), ("linear head", None)]
    assert all(set(METRICS) <= set(row) for row in rows)
    assert [f"{name}_std" in row for row in rows for name in METRICS] == [True] * 9 + [False] * 6
    assert set(rows[-1]["ap_area_per_class"]) == {"Platelets", "RBC", "WBC"}
    assert rows[-1]["ap_area_per_class"]["Platelets"] > 100 * 39 / 72  # better than chance
