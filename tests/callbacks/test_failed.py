"""The step that was not finite can be looked into afterwards, and drawn again."""

import json

import pytest
import pytorch_lightning as pl

from solo.errors import ConfigError, NumericsError
from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import tiny


class At(pl.Callback):
    """Does something to the batch of step 4."""

    def __init__(self, act):
        self.act = act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 3:
            self.indices = batch.index.tolist()
            self.act(batch)


def spoil(batch):
    batch.views[1][2] = float("nan")


def refuse(batch):
    raise ConfigError("something else")


def run(folder, callback):
    pretrain(experiment(tiny("nnclr", folder, max_epochs=1, loggers=[], probe={"enabled": False})), [callback])


def test_batch_numbers_and_names_are_kept(tmp_path):
    callback = At(spoil)
    with pytest.raises(NumericsError):
        run(tmp_path, callback)
    (path,) = tmp_path.glob("*/failed_step.json")
    kept = json.loads(path.read_text())
    assert (kept["method"], kept["step"], kept["indices"]) == ("nnclr", 4, callback.indices)
    assert kept["random"] == {"seed": 5, "rank": 0, "epoch": 0, "batch": 3} and kept["lr"] > 0
    assert kept["not_finite"][0] == "views[1]" and "predictor.0.weight.grad" in kept["not_finite"]
    assert "predictor.0.weight" not in kept["not_finite"] and "views[0]" not in kept["not_finite"]


def test_other_ends_leave_none(tmp_path):
    with pytest.raises(ConfigError):
        run(tmp_path, At(refuse))
    run(tmp_path, At(lambda batch: None))
    assert not list(tmp_path.glob("*/failed_step*"))
