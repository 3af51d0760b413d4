"""The callbacks that report: k-NN, train metrics, progress."""

import csv
import io
import logging
import re
import sys
import threading

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader
from tqdm import tqdm

from solo.bars import Bar
from solo.callbacks.health import Health, HealthConfig
from solo.callbacks.knn import KNNCallback, KNNConfig
from solo.callbacks.metrics import MetricsLogger
from solo.callbacks.probe import OnlineProbe
from solo.callbacks.progress import RunProgress, _Above
from solo.eval.features import extract
from solo.eval.knn import knn_accuracy
from tests.callbacks.toy import CLASSES, Toy, ToyData, batches, fit
from tests.test_console import Terminal, unread  # noqa: F401


def test_knn_is_the_offline_number_and_changes_nothing():
    without, _ = fit([])
    module, trainer = fit([KNNCallback(CLASSES, KNNConfig(k=[1, 20]))])
    assert all(torch.equal(a, b) for a, b in zip(without.state_dict().values(), module.state_dict().values(), strict=True))
    bank = extract(module.backbone, batches(views=1), "cpu")
    for k in (1, 20):
        offline = knn_accuracy(*bank, *bank, CLASSES, k=k)["acc1"]
        assert float(trainer.callback_metrics[f"val/knn@{k}"]) == pytest.approx(offline)


def test_knn_every_n_epochs_and_after_the_last(monkeypatch):
    calls = []
    original = ToyData.clean_loader
    monkeypatch.setattr(ToyData, "clean_loader", lambda self, **kwargs: calls.append(kwargs) or original(self, **kwargs))
    fit([KNNCallback(CLASSES, KNNConfig(every=2, k=[5], max_train=7))], max_epochs=5)
    assert calls == [{"train": True, "limit": 7}] * 3  # epochs 2, 4 and 5


@pytest.mark.parametrize("part, method", [("train", "clean_loader"), ("validation", "val_dataloader")])
def test_knn_without_labels_says_so_once(part, method, monkeypatch, caplog):
    blind = [batch._replace(labels=torch.full_like(batch.labels, -1)) for batch in batches(1)]
    monkeypatch.setattr(ToyData, method, lambda self, **kwargs: DataLoader(blind, batch_size=None))
    _, trainer = fit([KNNCallback(CLASSES)])
    assert caplog.text.count(f"no {part} image has a label") == 1
    assert "val/knn@20" not in trainer.callback_metrics


def test_batches_without_labels_do_not_pull_an_accuracy_down():
    class Sometimes(Toy):
        def training_step(self, batch, batch_idx):
            never, seldom = torch.tensor(float("nan")), torch.tensor(float("nan") if batch_idx % 3 else 50.0)
            return {**super().training_step(batch, batch_idx), "seldom_acc": seldom, "never_acc": never}

    metrics = MetricsLogger()
    fit([metrics], Sometimes(), max_epochs=1)
    assert metrics.last["seldom_acc"] == 50 and "never_acc" not in metrics.last


def test_extract_restores_modes_and_dataset_order():
    module, _ = fit([], max_epochs=1)
    module.backbone.train()
    module.backbone[2].eval()
    state = torch.get_rng_state()
    forward = extract(module.backbone, batches(), "cpu")
    backward = extract(module.backbone, batches()[::-1], "cpu")
    assert torch.equal(forward.features, backward.features) and torch.equal(forward.labels, backward.labels)
    assert module.backbone.training and module.backbone[1].training and not module.backbone[2].training
    assert torch.equal(torch.get_rng_state(), state)


def test_train_metrics_reach_the_loggers_as_means(tmp_path):
    metrics, logger = MetricsLogger(), CSVLogger(tmp_path)
    probe = OnlineProbe(dim=6, num_classes=CLASSES, lr=0.1)
    callbacks = [probe, Health(HealthConfig(every=3)), metrics]
    fit(callbacks, logger=logger, log_every_n_steps=3, accumulate_grad_batches=2, max_epochs=3)
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert [row["step"] for row in rows] == ["3", "6", "9"]
    expected = {"loss", "spread", "lr", "probe_loss", "probe_acc1", "feature_std", "effective_rank"}
    assert {name for name, value in rows[-1].items() if value and name.startswith("train/")} == {f"train/{n}" for n in expected}
    assert metrics.last["lr"] == 0.05 and "feats" not in metrics.last


def test_metrics_of_many_batches_are_summed_before_they_are_many(monkeypatch):
    class Numbered(Toy):
        def training_step(self, batch, batch_idx):
            return {**super().training_step(batch, batch_idx), "number": torch.tensor(batch_idx), "one": torch.ones(1)}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            held.append(sum(map(len, metrics._batches.values())))

    monkeypatch.setattr("solo.callbacks.metrics._SUMMED", 4)
    metrics, held = MetricsLogger(), []
    fit([metrics, Watch()], Numbered(), max_epochs=1, log_every_n_steps=100)
    assert held == [1, 2, 3, 0, 1, 0] and metrics.last["number"] == 2.5      # the last batch is reported
    assert metrics.last["one"] == 1


def test_loss_is_not_divided_by_accumulation():
    plain, accumulated = MetricsLogger(), MetricsLogger()
    fit([plain], max_epochs=1, log_every_n_steps=2, limit_train_batches=2, limit_val_batches=0)
    fit([accumulated], max_epochs=1, log_every_n_steps=1, limit_train_batches=2, accumulate_grad_batches=2, limit_val_batches=0)
    assert plain.last["loss"] == pytest.approx(accumulated.last["loss"], rel=0.2)


def test_progress_is_a_line_per_epoch_without_a_terminal():
    metrics, out = MetricsLogger(), io.StringIO()
    bar = RunProgress(out)
    fit([OnlineProbe(dim=6, num_classes=CLASSES, lr=0.1), KNNCallback(CLASSES), metrics, bar], log_every_n_steps=2)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/2 · step 6 · loss ")
    for part in ("images/s", "data wait", "left 0:00:0", "knn@20", "probe_acc1"):
        assert part in lines[1]


def test_progress_is_live_on_a_terminal_and_stops_on_errors():
    out, before = Terminal(), threading.active_count()
    metrics = MetricsLogger()
    bar = RunProgress(out)
    streams = sys.stdout, sys.stderr
    fit([metrics, bar], log_every_n_steps=1)
    assert sys.stdout is streams[0] and sys.stderr is streams[1]
    assert "epoch 2/2" in out.getvalue() and "6/6" in out.getvalue() and not bar._bars
    assert threading.active_count() == before and type(tqdm.get_lock()) is type(threading.RLock())      # none of workers' too


def test_what_is_said_while_the_bar_runs_stays_above_it(monkeypatch):
    class Speaker(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                logging.getLogger("solo.speaker").warning("an image is bad")
                print("and a print", file=sys.stderr)

    out, early = Terminal(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", early)
    handler = logging.StreamHandler(sys.stdout)         # as `quiet_libraries` makes it, before there is a bar
    logging.root.addHandler(handler)
    try:
        fit([Speaker(), MetricsLogger(), RunProgress(out)], max_epochs=1)
    finally:
        logging.root.removeHandler(handler)
    shown = out.getvalue().splitlines()
    assert sum("an image is bad" in line for line in shown) == 1 and any("and a print" in line for line in shown)
    assert "epoch 1/1" in "".join(shown[-3:])                                       # the bar is below
    assert "bad" not in early.getvalue() and handler.stream is early                # nothing went behind its back


class At(pl.Callback):
    """Does something before a batch."""

    def __init__(self, batch, do):
        self.batch, self.do = batch, do

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            self.do()


def test_progress_without_a_stdout_is_silent(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    _, trainer = fit([MetricsLogger(), RunProgress()], max_epochs=1)
    assert trainer.global_step == 6


def test_progress_does_not_wait_for_a_terminal_that_takes_nothing(unread, monkeypatch):  # noqa: F811
    monkeypatch.setattr("solo.callbacks.progress._EACH", 0)
    file, _ = unread
    while Bar(file=file).display():
        pass
    monkeypatch.setattr(sys, "stdout", file)
    _, trainer = fit([MetricsLogger(), RunProgress()], max_epochs=1)
    assert trainer.global_step == 6


def test_the_bar_is_there_before_the_first_batch_and_follows_each(monkeypatch):
    monkeypatch.setattr("solo.callbacks.progress._EACH", 0)
    out, seen = Terminal(), []
    looks = [At(batch, lambda: seen.append(out.getvalue())) for batch in (0, 2)]
    fit([*looks, MetricsLogger(), RunProgress(out)], max_epochs=1)
    assert "epoch 1/1" in seen[0] and "0/6" in seen[0] and "left ?" in seen[0] and "0it" not in seen[0]
    assert "2/6" in seen[1] and "3/6" not in seen[1]


def test_a_line_begun_on_one_stream_is_not_ended_by_the_other_nor_lost():
    def speak():
        print("PARTIAL", end="", flush=True)
        print("of stderr", file=sys.stderr)

    out = Terminal()
    fit([At(1, speak), MetricsLogger(), RunProgress(out)], max_epochs=1)
    lines = re.sub(r"\x1b(\[\d*[a-zA-Z]|D)", "", out.getvalue()).splitlines()
    assert "of stderr" in lines and [line for line in lines if "PARTIAL" in line] == ["PARTIAL"]


def test_a_bar_of_somebody_elses_is_not_kept():
    above = _Above(Terminal())
    for number in range(1000):
        above.write(f"\rbar {number}")
    assert above._line == "bar 999"


def test_an_error_gives_streams_and_handlers_back():
    def fail():
        during.extend([sys.stdout, sys.stderr, handler.stream])
        raise RuntimeError("on purpose")

    out, during, before = Terminal(), [], (sys.stdout, sys.stderr)
    handler = logging.StreamHandler(sys.stderr)
    logging.root.addHandler(handler)
    try:
        with pytest.raises(RuntimeError, match="on purpose"):
            fit([At(1, fail), MetricsLogger(), RunProgress(out)], max_epochs=1)
    finally:
        logging.root.removeHandler(handler)
    assert during[0] is not before[0] and during[1] is during[2] is not before[1]
    assert (sys.stdout, sys.stderr, handler.stream) == (*before, before[1])
