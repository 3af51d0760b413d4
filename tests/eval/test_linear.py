"""The quick probe, the published protocol, and the command."""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from solo import backbones, checkpoint, config
from solo.backbones import BackboneConfig
from solo.batch import Batch
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.module import DataModule
from solo.data.sources import ArraySource
from solo.errors import ConfigError, DataError, reported
from solo.eval.features import Features
from solo.eval.linear import Classifier, LinearConfig, linear_accuracy
from solo.eval.protocol import evaluate_linear
from solo.experiment import TRAINER_ARGUMENTS
from solo.optim import OptimizerConfig
from solo.schedules import SchedulerConfig
from tests.callbacks.toy import ToyBackbone, batches
from tests.eval.runs import FAKE, NARROW, make_run

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1,
         "optimizer": {"name": "sgd", "lr": 0.3, "weight_decay": 0, "batch_size": 16}}


def separable(n: int, seed: int) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    centres = 3 * torch.eye(4, 10)
    return Features(centres[labels] + 0.5 * torch.randn(n, 10, generator=generator), labels)


def test_quick_probe_learns_and_masks():
    train, test = separable(200, 0), separable(80, 1)
    assert linear_accuracy(train, test, 4)["acc1"] > 97
    assert linear_accuracy(train, test, 9) == linear_accuracy(train, test, 9)  # classes nobody shows, twice the same
    train.labels[::3], test.labels[:40] = -1, -1
    accuracy = linear_accuracy(train, test, 4)
    assert accuracy["acc1"] > 97 and accuracy["acc5"] == 100
    two = Features(train.features, train.labels.clamp(max=1))
    assert linear_accuracy(two, Features(test.features, test.labels.clamp(max=1)), 2)["acc1"] > 97
    with pytest.raises(DataError, match="two classes"):
        linear_accuracy(Features(train.features, torch.full((200,), -1)), test, 4)
    with pytest.raises(DataError, match="labelled test images"):
        linear_accuracy(train, Features(test.features, torch.full((80,), -1)), 4)


def test_quick_probe_is_the_minimum_of_its_objective():
    """Summed cross-entropy plus half of 0.03 D |W|^2 on standardised features, minimised in float64 by torch."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(10, 10, generator=generator) * torch.logspace(-2, 1, 10)
    noisy = [Features((f.features + 2 * torch.randn(f.features.shape, generator=generator)) @ mixing + 5, f.labels)
             for f in (separable(300, 0), separable(1000, 1))]
    mean, std = noisy[0].features.double().mean(0), noisy[0].features.double().std(0, correction=0)
    train, test = ((f.features.double() - mean) / std for f in noisy)
    weight, bias = torch.zeros(10, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    solver = torch.optim.LBFGS([weight.requires_grad_(), bias.requires_grad_()], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        solver.zero_grad()
        fit = nn.functional.cross_entropy(train @ weight + bias, noisy[0].labels, reduction="sum")
        loss = fit + 0.03 * 10 / 2 * weight.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    expected = 100 * ((test @ weight + bias).argmax(1) == noisy[1].labels).double().mean().item()
    assert 40 < expected < 90
    assert linear_accuracy(*noisy, 4)["acc1"] == pytest.approx(expected, abs=0.5)


def train_toy(backbone: nn.Module | None = None, **changes) -> Classifier:
    import pytorch_lightning as pl

    torch.manual_seed(0)
    settings = {"optimizer": OptimizerConfig(name="sgd", lr=3.0, weight_decay=0, batch_size=8), **changes}
    config = LinearConfig(checkpoint="-", **settings)
    model = Classifier(backbone or ToyBackbone(), 3, config).train()
    model.before = {name: value.clone() for name, value in model.state_dict().items()}
    loader = DataLoader(batches(), batch_size=None)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=8, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False)
    trainer.fit(model, loader, loader)
    return model


def changed(model: Classifier) -> set[str]:
    return {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, model.before[name])}


def test_frozen_backbone_stays_bit_identical_and_the_head_learns():
    model = train_toy()
    assert changed(model) == {"head"}
    assert model.best > 90


def test_rate_follows_the_schedule():
    model = train_toy(scheduler=SchedulerConfig(name="step", lr_decay_steps=[6]))
    assert model.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(3.0 * 8 / 256 * 0.1)


@pytest.mark.slow
def test_finetuning_with_mixup_layer_decay_and_unlabelled_images():
    backbone = backbones.build(BackboneConfig(**NARROW), in_chans=1, image_size=16)
    model = train_toy(backbone, finetune=True, mixup=0.8, cutmix=1.0, label_smoothing=0.1, layer_decay=0.5,
                      optimizer=OptimizerConfig(name="adamw", lr=0.5, weight_decay=0.05, batch_size=8))
    assert changed(model) == {"backbone", "head"}
    scales = {group["lr_scale"] for group in model.trainer.optimizers[0].param_groups}
    assert len(scales) > 2 and max(scales) == 1.0  # layers below the head really get smaller rates
    rates = {group["lr"] / group["lr_scale"] for group in model.trainer.optimizers[0].param_groups}
    assert max(rates) == pytest.approx(min(rates))


def test_label_smoothing_counts_without_mixup():
    batch = Batch([torch.randn(6, 1, 4, 4)], torch.tensor([0, 1, 2, -1, 0, 1]), torch.arange(6))
    losses = []
    for smoothing in (0.0, 0.2):
        torch.manual_seed(0)
        model = Classifier(ToyBackbone(), 3, LinearConfig(checkpoint="-", label_smoothing=smoothing))
        losses.append(model.training_step(batch, 0)["loss"])
        logits = model(batch.views[0])
        keep = batch.labels >= 0
        expected = nn.functional.cross_entropy(logits[keep], batch.labels[keep], label_smoothing=smoothing)
        torch.testing.assert_close(losses[-1], expected)
    assert losses[0] != losses[1]


def test_images_without_a_label_are_neither_right_nor_counted():
    class Knowing(nn.Module):
        num_features = 3

        def forward(self, x):
            return torch.eye(3)[x[:, 0, 0, 0].long()]

    model = Classifier(Knowing(), 3, LinearConfig(checkpoint="-"))
    with torch.no_grad():
        model.head.weight.copy_(torch.eye(3))
        model.head.bias.zero_()
    labels = torch.tensor([0, 1, 2, -1, -1, 2])
    x = labels.clamp(min=0).float().view(-1, 1, 1, 1)
    model.on_validation_epoch_start()
    for known in (labels, torch.full_like(labels, -1)):
        model.validation_step(Batch([x], known, torch.arange(6)), 0)
    assert model._hits.tolist() == [4, 4, 4]
    assert model.training_step(Batch([x], labels, torch.arange(6)), 0)["acc1"] == 100
    assert model.training_step(Batch([x], torch.full_like(labels, -1), torch.arange(6)), 0)["acc1"].isnan()


def test_only_labelled_images_are_trained_on(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    images, labels = np.zeros((120, 16, 16, 3), np.uint8), np.arange(120) % 3
    labels[30:] = -1                                            # as STL-10: most images have no label
    few = dataclasses.replace(DATASETS["fake"], open=lambda config, train: ArraySource(images, labels, ["a", "b", "c"]))
    monkeypatch.setitem(DATASETS._rows, "fake", few)
    request = {"checkpoint": str(run), "data": {"train_size": None}, **QUICK, "max_epochs": 1}
    evaluate_linear(request, TRAINER_ARGUMENTS)
    section = json.loads((run / "results.json").read_text())["linear"]
    assert "30 labelled train images" in section["protocol"]
    assert json.loads((run / section["indices"]).read_text()) == list(range(30))


def test_config_refuses_all_at_once():
    with pytest.raises(ValueError, match=r"label_smoothing .*\n.*mixup .*\n.*layer_decay needs finetune"):
        LinearConfig(checkpoint="-", label_smoothing=1.5, mixup=-1, layer_decay=0.5)


def test_protocol_records_what_it_did(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "results.json").write_text('{"comparison": 1}')
    accuracy = evaluate_linear({"checkpoint": str(run), "data": {"fraction": 0.5}, **QUICK}, TRAINER_ARGUMENTS)
    results = json.loads((run / "results.json").read_text())
    assert results["comparison"] == 1
    section = results["linear@0.5"]
    assert section["results"] == accuracy and set(accuracy) == {"acc1", "acc5", "best_acc1"}
    assert section["checkpoint_sha256"] == checkpoint.digest(run / "checkpoints" / "step7.ckpt")
    assert section["config"]["optimizer"]["lr"] == 0.3 and section["config"]["data"]["dataset"] == "fake"
    assert accuracy["acc5"] == 100  # three classes
    assert set(torch.load(run / "linear@0.5" / "weights.pt", weights_only=True)) == {"weight", "bias"}

    indices = json.loads((run / section["indices"]).read_text())
    whole = DataModule(DataConfig(**FAKE), [], 16, 5)
    labels = torch.cat([batch.labels for batch in whole.clean_loader(train=True)]).numpy()
    assert len(indices) == len(set(indices)) == 48
    assert np.abs(np.bincount(labels[indices], minlength=3) - np.bincount(labels, minlength=3) / 2).max() <= 1


@pytest.mark.parametrize("ending", [{"max_epochs": -1, "max_steps": 8}, {"max_epochs": 2, "check_val_every_n_epoch": 5}])
def test_the_last_epoch_is_evaluated_however_it_ends(tmp_path, ending):
    accuracy = evaluate_linear({"checkpoint": str(make_run(tmp_path)), **QUICK, **ending}, TRAINER_ARGUMENTS)
    results = json.loads((tmp_path / "results.json").read_text())["linear"]["results"]
    assert results == accuracy and accuracy["best_acc1"] >= accuracy["acc1"] > 0


def test_protocol_finetunes_to_another_folder(tmp_path):
    run = make_run(tmp_path / "run")
    before = checkpoint.digest(run / "checkpoints" / "step7.ckpt")
    request = {"checkpoint": str(run), "output": str(tmp_path / "out"), "finetune": True, **QUICK, "max_epochs": 1}
    evaluate_linear(request, TRAINER_ARGUMENTS)
    assert "finetune" in json.loads((tmp_path / "out" / "results.json").read_text())
    assert not (run / "results.json").exists() and checkpoint.digest(run / "checkpoints" / "step7.ckpt") == before


def test_a_disk_that_takes_nothing_ends_it_in_one_line_behind_the_numbers(tmp_path, capsys):
    """A file where the folder was to be: neither the logger nor the results can be written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "linear").write_text("in the way")
    request = {"checkpoint": str(make_run(tmp_path / "run")), "output": str(tmp_path / "out"), **QUICK, "max_epochs": 1}
    with pytest.raises(SystemExit) as left, reported():
        evaluate_linear(request, TRAINER_ARGUMENTS)
    said = capsys.readouterr()
    assert left.value.code == 5 and "last epoch" in said.out
    (line,) = [line for line in said.err.splitlines() if "error" in line]
    assert line.startswith(f"environment error: {tmp_path}/out/linear cannot be written: ") and "output=FOLDER" in line


@pytest.mark.parametrize("change, message", [
    ({"opimizer": 1, "maxepochs": 2}, r"opimizer: did you mean optimizer\?\nunknown key maxepochs: did you mean max_epochs\?"),
    ({"data": {"datset": "fake"}}, r"unknown key data.datset: did you mean data.dataset\?"),
    ({"backbone": {"name": "resnet34"}}, r"does not fit backbone resnet34: missing .*; unexpected "),
    ({"backbone": {"stem": "smal"}}, r"backbone.stem must be one of"),
    ({"data": {"in_chans": 1}}, r"set data.in_chans=3"),
    ({"accelerator": "cpuu"}, r"accelerator must be one of auto, .*, got 'cpuu': did you mean cpu\?"),
    ({"limit_val_batches": 0}, r"limit_val_batches=0 leaves nothing to evaluate on"),
    ({"seed": -1}, r"seed must lie in"),
])
def test_wrong_requests(tmp_path, change, message):
    run = make_run(tmp_path / "run")
    with pytest.raises(ConfigError, match=message):
        evaluate_linear({"checkpoint": str(run), **QUICK, **change}, TRAINER_ARGUMENTS)


@pytest.mark.parametrize("script", ["main_linear.py", "main_knn.py", "main_umap.py"])
@pytest.mark.parametrize("argument, message", [
    ("checkpoint=nowhere.ckpt", "config error: checkpoint=nowhere.ckpt does not exist"),
    ("seed=5", "config error: missing key checkpoint"),
    (f"checkpoint={__file__}", "cannot be loaded as tensors and plain values"),
])
def test_commands_end_with_one_line_and_code_2(monkeypatch, capfd, tmp_path, script, argument, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, argument])
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("config error")]
    assert caught.value.code == 2 and any(message in line for line in lines), lines


@pytest.mark.parametrize("fraction", [0.01, pytest.param(0.1, marks=pytest.mark.slow)])
def test_semi_supervised_recipe(tmp_path, fraction):
    size = [f"data.size={FAKE['size']}", "data.train_size=300", "max_epochs=1", "accelerator=cpu"]
    given = [f"checkpoint={make_run(tmp_path / 'run')}", f"data.fraction={fraction}", *size]
    values = config.load(ROOT / "scripts" / "linear" / "semi-supervised.yaml", given)
    assert values["augmentations"][0]["crop_size"] == 16
    assert config.load(ROOT / "scripts" / "linear" / "semi-supervised.yaml", given[:1])["augmentations"][0]["crop_size"] == 224
    evaluate_linear(values, TRAINER_ARGUMENTS)
    section = json.loads((tmp_path / "run" / "results.json").read_text())[f"finetune@{fraction:g}"]
    assert section["config"]["optimizer"]["name"] == "adam" and section["config"]["finetune"]
    indices = json.loads((tmp_path / "run" / section["indices"]).read_text())
    whole = DataModule(DataConfig(**{**FAKE, "train_size": 300}), [], 16, 5)
    labels = torch.cat([batch.labels for batch in whole.clean_loader(train=True)]).numpy()
    assert len(indices) == len(set(indices)) == 300 * fraction and set(labels[indices]) == {0, 1, 2}
