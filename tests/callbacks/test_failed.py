"""The step that was not finite can be looked into afterwards, and drawn again."""

import json

import pytest
import pytorch_lightning as pl
import torch

from solo.data.module import DataModule
from solo.errors import ConfigError, NumericsError
from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import tiny


class At(pl.Callback):
    """Does something to the first batch behind so many steps."""

    def __init__(self, act, step=3):
        self.act, self.step, self.indices = act, step, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.indices.append(batch.index.tolist())
            if len(self.indices) == 1:
                self.act(batch)


def spoil(batch):
    batch.views[1][2] = float("nan")


def refuse(batch):
    raise ConfigError("something else")


def run(folder, callback, max_epochs=1, **changes):
    content = tiny("nnclr", folder, max_epochs=max_epochs, loggers=[], probe={"enabled": False}, **changes)
    pretrain(experiment(content), [callback])


def test_batch_numbers_and_names_are_kept(tmp_path):
    callback = At(spoil)
    with pytest.raises(NumericsError) as caught:
        run(tmp_path, callback)
    (path,) = tmp_path.glob("*/failed_step.json")
    kept = json.loads(path.read_text())
    assert (kept["method"], kept["step"]) == ("nnclr", 4)
    assert kept["batches"] == [{"batch": 3, "indices": callback.indices[0]}]
    assert kept["random"] == {"seed": 5, "rank": 0, "epoch": 0} and kept["lr"] > 0
    assert kept["not_finite"][0] == "views[1]" and "predictor.0.weight.grad" in kept["not_finite"]
    assert "predictor.0.weight" not in kept["not_finite"] and "views[0]" not in kept["not_finite"]
    said = "of NNCLR at step 4 (epoch 1, lr 0.0134; not finite: views[1], backbone."
    assert said in str(caught.value) and f" and {len(kept['not_finite']) - 3} more)" in str(caught.value)


def test_the_batch_is_drawn_again_from_what_was_kept(tmp_path):
    """And from the run's own config; by the numbers of its second epoch."""
    seen = []

    def keep_and_spoil(batch):
        seen.append(([view.clone() for view in batch.views], batch.labels.clone()))
        spoil(batch)

    with pytest.raises(NumericsError):
        run(tmp_path, At(keep_and_spoil, step=11), max_epochs=2)
    (path,) = tmp_path.glob("*/failed_step.json")
    kept, config = json.loads(path.read_text()), experiment(json.loads((path.parent / "config.json").read_text()))
    random, (failed,) = kept["random"], kept["batches"]
    assert random["epoch"] == 1 and failed["batch"] == 3
    data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, random["seed"])
    data.set_position(random["epoch"], failed["batch"])
    again = next(iter(data.train_dataloader()))
    ((views, labels),) = seen
    assert again.index.tolist() == failed["indices"] and torch.equal(again.labels, labels)
    assert len(views) == len(again.views) and all(map(torch.equal, again.views, views))


def test_every_batch_of_an_accumulated_step_is_kept(tmp_path):
    callback = At(spoil)
    with pytest.raises(NumericsError):
        run(tmp_path, callback, accumulate_grad_batches=2)
    (path,) = tmp_path.glob("*/failed_step.json")
    first, second = callback.indices
    assert json.loads(path.read_text())["batches"] == [{"batch": 6, "indices": first}, {"batch": 7, "indices": second}]


def test_other_ends_leave_none(tmp_path):
    with pytest.raises(ConfigError):
        run(tmp_path, At(refuse))
    run(tmp_path, At(lambda batch: None))
    assert not list(tmp_path.glob("*/failed_step*"))
