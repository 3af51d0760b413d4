"""What the base class refuses, and what it passes on."""

import pytest
import pytorch_lightning as pl
import torch

from solo.batch import Batch
from solo.errors import ConfigError
from solo.eval.linear import Classifier, LinearConfig
from solo.experiment import experiment
from solo.methods import NNCLR, Method
from solo.run import pretrain
from solo.testing import Case
from solo.testing.advance import wrong_rate
from solo.testing.invariance import ranks_equal_one
from tests.callbacks.toy import CLASSES, ToyBackbone, ToyData
from tests.tiny import values


class Crops(Method):
    multicrop = True


@pytest.mark.parametrize("kind, sizes, refused", [
    (NNCLR, [32, 32], None),
    (NNCLR, [32], "NNCLR takes 2 views of one size, got crops of 32 px"),
    (NNCLR, [32, 32, 32], "takes 2 views of one size, got crops of 32, 32, 32 px"),
    (NNCLR, [32, 24], "takes 2 views"),
    (NNCLR, [32, 32, 16], "takes 2 views of one size, got"),
    (Crops, [32, 32, 16, 16], None),
    (Crops, [32, 16, 16], "takes 2 views of one size and any smaller ones"),
])
def test_views_are_counted(kind, sizes, refused):
    model = Case("nnclr").build()
    model.__class__ = kind
    if refused is None:
        model.check(8, sizes)
    else:
        with pytest.raises(ConfigError, match=refused):
            model.check(8, sizes)


def test_a_notebooks_own_batches_are_checked(tmp_path):
    model = Case("nnclr").build()
    model.optimizer_config.batch_size = 32                  # says 32, but the loader gives 5
    trainer = type("Trainer", (), {"world_size": 1})()
    model.__dict__["_trainer"] = trainer
    batch = Batch([torch.zeros(5, 3, 16, 16)] * 2, torch.zeros(5), torch.arange(5))
    with pytest.raises(ConfigError, match="queue_size=32 is not a multiple of the global batch 5: use 30 or 35"):
        model.on_train_batch_start(batch, 0)


class Claims(NNCLR):
    local_terms = {"loss": 1.0}         # but its negatives come from all ranks


@pytest.mark.slow
def test_a_local_term_must_be_local():
    with pytest.raises(AssertionError, match=r"\(local\) on rank 0 of 2 differs"):
        ranks_equal_one(Case("tests.methods.test_base:Claims"))


def test_tau_is_logged():
    seen = []

    class Watch(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            seen.append(next(c.last for c in trainer.callbacks if type(c).__name__ == "MetricsLogger"))

    Case("all4one", momentum={"base_tau": 0.9, "final_tau": 0.9}).train(Watch(), max_epochs=1)
    assert seen[0]["tau"] == pytest.approx(0.9)


def test_the_contract_holds_each_group_to_the_rate_of_its_own(monkeypatch):
    """One that is right does not speak for another, nor one that follows no schedule for any."""
    method = Case("all4one", scheduler={"name": "none"}, method_kwargs={"transformer_lr": 0.1}).build()
    due = {group["name"]: {**group, "lr": 0.1 if group["name"] == "transformer" else 0.25}
           for group in method.parameter_groups()}
    monkeypatch.setattr(method, "_groups", due.values)
    assert wrong_rate(method, 2, 8, 4, 64) == []
    due["transformer"]["lr"] = 0.25
    assert wrong_rate(method, 2, 8, 4, 64) == ["the learning rate of step 3 is 0.25 for transformer, due is 0.1"]
    options = {"transformer": {"schedule": False}}
    monkeypatch.setattr(method, "param_options", lambda: options)
    assert wrong_rate(method, 2, 8, 4, 64) == []


class Sizes(pl.Callback):
    """Of each step's gradient, over what Lightning has made of it."""

    def __init__(self, of):
        self.of, self.sizes = of, []

    def on_after_backward(self, trainer, module):
        self.summed = self.of(module).grad.clone()

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.sizes.append(float(self.of(module).grad.norm() / self.summed.norm()))


@pytest.mark.parametrize(("images", "shares"), [(40, [1, 4]), (48, [1, 2]), (64, [1, 1])])
def test_an_epochs_last_step_is_the_mean_of_its_own_batches(images, shares, tmp_path):
    """5, 6 and 8 batches, of which 4 make a step: the last one is no smaller for being of fewer."""
    sizes = Sizes(lambda method: method.backbone.conv1.weight)
    content = values("simclr", tmp_path, data={"train_size": images}, max_epochs=1, accumulate_grad_batches=4)
    pretrain(experiment(content), [sizes])
    assert sizes.sizes == pytest.approx(shares, rel=1e-6)


def test_so_it_is_of_the_linear_evaluation():
    sizes = Sizes(lambda module: module.head.weight)
    trainer = pl.Trainer(accelerator="cpu", devices=1, max_epochs=1, limit_train_batches=5, accumulate_grad_batches=4,
                         limit_val_batches=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                         enable_model_summary=False, callbacks=[sizes])
    trainer.fit(Classifier(ToyBackbone(), CLASSES, LinearConfig(checkpoint="x")), ToyData().train_dataloader())
    assert sizes.sizes == pytest.approx([1, 4], rel=1e-6)
