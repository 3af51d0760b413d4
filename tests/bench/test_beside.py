"""Epochs of ours and of the field's in turn, run dry on a CPU: that they run and what is counted, not how fast."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from solo.bench import beside, step
from solo.bench.baselines import step as published
from solo.bench.beside import Turns, computing
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.errors import ConfigError, EnvironmentFault
from tests.conftest import ROOT
from tests.test_learn import TINY, npz


def event(begins, ends, kind="kernel"):
    return {"ph": "X", "cat": kind, "ts": begins, "dur": ends - begins}


@pytest.mark.parametrize(("events", "share"), [
    ([event(0, 10)], 1.0),
    ([event(0, 2), event(8, 10)], 0.4),
    ([event(8, 10), event(0, 6), event(1, 2), event(4, 7)], 0.9),
    ([event(0, 2), *(event(0, 10, kind) for kind in ("gpu_memcpy", "gpu_memset", "gpu_user_annotation")), event(8, 10)], 0.4),
    ([event(0, 2), event(0, 10, "cpu_op"), event(0, 10, "cuda_runtime"), {"ph": "M", "ts": 0}, event(8, 10)], 0.4),
    ([event(0, 2, "cpu_op"), event(8, 10, "cpu_op")], 0.4),
], ids=["one", "a gap", "streams", "copies and names", "the CPU's", "only a CPU"])
def test_the_device_is_busy_while_a_kernel_runs(events, share):
    assert computing(events) == pytest.approx(share)


@pytest.mark.parametrize("events", [[], [{"ph": "M", "ts": 0}, event(0, 3, "cuda_runtime")]], ids=["empty", "only names"])
def test_a_trace_without_operations_is_said(events):
    with pytest.raises(EnvironmentFault, match="^torch.profiler has recorded no operation"):
        computing(events)


def test_a_trace_without_operations_costs_only_the_share(monkeypatch, capsys):
    monkeypatch.setattr(beside, "_events", lambda _: [])
    busy, trainer = beside.Busy(0), SimpleNamespace(current_epoch=0, num_training_batches=1)
    busy.on_train_batch_start(trainer, None, None, 0)
    busy.on_train_batch_end(trainer, None, None, None, 0)
    assert busy.share is None and "no share of time busy: torch.profiler has recorded" in capsys.readouterr().out


def test_each_of_the_others_has_its_turn_and_then_none(monkeypatch):
    clock, order = [0.0], []

    def train(name, seconds):
        order.append(name)
        clock[0] += seconds

    monkeypatch.setattr("solo.bench.epochs.now", lambda: clock[0])
    monkeypatch.setattr(beside, "now", lambda: clock[0])
    turns = Turns([lambda: train("B", 3.0), lambda: train("C", 2.0)], rounds=2)
    for seconds in (9.0, 1.0, 1.5, 1.25, 1.0):
        turns.on_train_epoch_start()
        train("A", seconds)
        turns.on_train_epoch_end()
    assert "".join(order) == "ABACABACA" and turns.seconds == [9.0, 1.0, 1.5, 1.25, 1.0]
    assert turns.pairs == [[(9.0, 3.0), (1.5, 3.0)], [(1.0, 2.0), (1.25, 2.0)]]


def test_a_precision_that_the_published_step_has_not(monkeypatch):
    with pytest.raises(ConfigError, match="precision=16-mixed: beside the published step it must be bf16-mixed or 32-true"):
        beside.Published(SimpleNamespace(trainer={"precision": "16-mixed"}), None, 0, "cpu")


@pytest.mark.slow
def test_the_published_step_is_held_to_ours(monkeypatch):
    assert "differs by" in step.correctness("nnclr", beside._TINY)
    nce = published._nce
    monkeypatch.setattr(published, "_nce", lambda *words: 1.1 * nce(*words))
    with pytest.raises(AssertionError, match="nnclr: the update differs by"):
        step.correctness("nnclr", beside._TINY)


def jpegs(path: Path, count: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (count, 40, 48, 3), np.uint8)
    with tarfile.open(path, "w") as archive:
        for i, image in enumerate(pixels):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "JPEG")
            member = tarfile.TarInfo(f"{'ab'[i % 2]}/{i}.jpg")
            member.size = file.tell()
            archive.addfile(member, io.BytesIO(file.getvalue()))
    return path


def test_a_few_images_are_repeated(tmp_path):
    few = jpegs(tmp_path / "few.tar", 4)
    sources = [DATASETS["tar"].open(DataConfig(dataset="tar", train_path=str(path)), True)
               for path in (few, beside.repeated(few, tmp_path / "many.tar", 3))]
    assert [len(source) for source in sources] == [4, 12]
    assert [np.bincount(source.labels).tolist() for source in sources] == [[2, 2], [6, 6]]


@pytest.mark.slow
def test_rows_of_both_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(beside, "correctness", str)             # see above
    npz(tmp_path / "data" / "cifar10.npz", 40, 40)
    tiny = [*TINY, f"checkpoint.dir={tmp_path / 'runs'}", "data.num_workers=0"]
    cifar = ["data.dataset=npz", f"data.train_path={tmp_path / 'data' / 'cifar10.npz'}"]
    rows = beside.small("E1", "nnclr", [*cifar, *tiny], "cpu", rounds=2)
    rate, seconds, busy, ratio = rows
    assert [row.unit for row in rows] == ["images/s", "s/epoch", "% busy", "images/s"] and 0 < busy.value <= 100
    assert rate.value * seconds.value == pytest.approx(32) and "epochs 2 to 3" in rate.what and ratio.pairs == 2
    assert ratio.peer == "solo-learn's pipeline and step, 0 workers" and ratio.ratio > 0
    crops = ["augmentations.0.crop_size=32", "augmentations.1.crop_size=32"]
    rows = beside.large(jpegs(tmp_path / "x.tar", 40), [*tiny, *crops], "cpu", rounds=1)
    assert {row.id for row in rows} == {"E3"} and rows[0].value * rows[1].value == pytest.approx(32) and rows[3].pairs == 1
