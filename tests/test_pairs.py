"""Values that are each fine and cannot be meant together: one line a pair, all of them at once, before any work."""

import pytest

from solo import pairs, run
from solo.config import load
from solo.errors import ConfigError
from solo.eval import protocol
from solo.eval.linear import LinearConfig
from solo.eval.protocol import evaluate_linear
from solo.experiment import TRAINER_ARGUMENTS, experiment
from solo.optim import scaled_lr
from solo.run import pretrain
from tests.conftest import ROOT
from tests.tiny import values

SMALL = {"crop_size": 1, "num_crops": 2, "gaussian_blur": {"prob": 1.0}}
# (keys, what the line says); 64 images in 8 batches of 8, one epoch
PAIRS = [
    ({"scheduler": {"warmup_epochs": 2}}, "scheduler.warmup_epochs=2 is longer than the whole run, max_epochs=1: "
     "use scheduler.warmup_epochs=1, or fast_dev_run=true for a try"),
    ({"max_epochs": 100, "max_steps": 4}, "scheduler.warmup_epochs=1 are 8 steps, more than max_steps=4: "
     "use scheduler.warmup_epochs=0.5, or fast_dev_run=true for a try"),
    ({"max_epochs": -1, "max_steps": 4}, "scheduler.warmup_epochs=1 are 8 steps, more than max_steps=4"),
    ({"min_epochs": 2}, "min_epochs=2 is more than max_epochs=1: use min_epochs=1 or max_epochs=2"),
    ({"min_steps": 9}, "min_steps=9 is more than the 8 steps of the run: use at most 8, or a longer run"),
    ({"val_check_interval": 9}, "val_check_interval=9 is more than the 8 batches of an epoch: "
     "check_val_every_n_epoch=null counts on over epochs"),
    ({"accumulate_grad_batches": 9}, "accumulate_grad_batches=9 is more than the 8 batches of an epoch: "
     "no step has so many, use at most 8"),
    ({"overfit_batches": 4, "limit_train_batches": 4}, "overfit_batches and limit_train_batches both say"),
    ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm=value clips nothing without gradient_clip_val"),
    ({"num_sanity_val_steps": -2}, "num_sanity_val_steps must be at least -1, which means all, got -2"),
    ({"knn": {"enabled": True, "k": [5, 20], "max_train": 10}}, "knn.k=[20] is more than max_train=10"),
    ({"report": {"enabled": True, "max_train": 10}}, "report.k=20 is more than max_train=10"),
    ({"health": {"stop_on_collapse": True, "enabled": False}}, "health.stop_on_collapse needs enabled=true"),
    ({"health": {"min_std": 1.5}}, "health.min_std is a share of 1, got 1.5"),
    ({"loggers": ["csv", "csv"]}, "loggers names one twice: csv, csv"),
    ({"augmentations": [SMALL]}, "augmentations[0].crop_size must be at least 2 for gaussian_blur"),
    ({"method_kwargs": {"queue_size": 20}}, "method_kwargs.queue_size=20 is not a multiple of the global batch 8"),
    ({"micro_batch": 3}, "micro_batch=3 does not divide optimizer.batch_size=8"),
]
# (keys, the note)
IDLE = [
    ({"knn": {"enabled": True, "k": [5, 20, 30]}, "data": {"train_size": 12}},
     "knn.k=20, 30 is more than the 12 labelled training images: all of them vote"),
    ({"report": {"enabled": True}, "data": {"train_size": 12}},
     "report.k=20 is more than the 12 labelled training images: all of them vote"),
    ({"scheduler": {"name": "step", "lr_decay_steps": [0, 1]}},
     "scheduler.lr_decay_steps=[1] lie behind the end of the run, max_epochs=1"),
    ({"scheduler": {"min_lr": 0.04}}, "scheduler.min_lr=0.04 is above the scaled rate of 0.03125: the rate rises to it"),
    ({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2 is more than max_epochs=1: no epoch is validated"),
    ({"check_val_every_n_epoch": None, "val_check_interval": 9},
     "val_check_interval=9 is more than the batches of the run: none is validated"),
    ({"accumulate_grad_batches": 3, "limit_train_batches": 2},
     "accumulate_grad_batches=3 is more than the 2 batches an epoch is limited to: it is one step"),
    ({"accumulate_grad_batches": 5, "limit_train_batches": 0.5},
     "accumulate_grad_batches=5 is more than the 4 batches an epoch is limited to: it is one step"),
    ({"accumulate_grad_batches": 5, "overfit_batches": 4},
     "accumulate_grad_batches=5 is more than the 4 batches an epoch is limited to: it is one step"),
    ({"health": {"stop_on_collapse": True}},
     "health.stop_on_collapse comes after 250 steps at the earliest, and the run has 8"),
    ({"data": {"train_path": "here"}}, "data.train_path=here is not read: data.dataset=fake is drawn"),
    ({"data": {"dataset": "digits", "val_path": "here", "train_size": 16}},
     "data.val_path=here is not read: data.dataset=digits is drawn"),
]


def refused(folder, changes):
    with pytest.raises(ConfigError) as caught:
        pretrain(experiment(values("nnclr", folder / "runs", **{"max_epochs": 1, **changes})))
    assert not (folder / "runs").exists()
    return str(caught.value).splitlines()


@pytest.mark.parametrize(("changes", "said"), PAIRS, ids=[said[:40] for _, said in PAIRS])
def test_a_pair_that_cannot_be_is_one_line(tmp_path, changes, said):
    (line,) = refused(tmp_path, changes)
    assert line.startswith(said)


def test_all_pairs_at_once(tmp_path):
    assert len(refused(tmp_path, {"scheduler": {"warmup_epochs": 2}, "min_epochs": 2})) == 2
    images = {"min_steps": 20, "accumulate_grad_batches": 9, "method_kwargs": {"queue_size": 20}}
    assert len(refused(tmp_path, images)) == 3


@pytest.mark.parametrize(("changes", "note"), IDLE, ids=[note[:40] for _, note in IDLE])
def test_what_has_no_effect_is_a_note(tmp_path, monkeypatch, caplog, changes, note):
    def reached(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_fit", reached)
    caplog.set_level("INFO", logger="solo")
    config = experiment(values("nnclr", tmp_path, **{"max_epochs": 1, "loggers": [], **changes}))
    with pytest.raises(KeyboardInterrupt):
        pretrain(config)
    assert [line for line in caplog.messages if line.startswith("note: ")] == [f"note: {note}"]


def test_what_has_no_effect_trains(tmp_path, caplog):
    caplog.set_level("INFO", logger="solo")
    changes = {"knn": {"enabled": True}, "data": {"train_size": 12, "train_path": "datasets"}, "scheduler": {"min_lr": 1.0},
               "accumulate_grad_batches": 3, "limit_train_batches": 1, "health": {"stop_on_collapse": True}}
    pretrain(experiment(values("nnclr", tmp_path, **{"max_epochs": 1, **changes})))
    assert sum(line.startswith("note: ") for line in caplog.messages) == 5
    assert "val/knn@20" in next(tmp_path.rglob("metrics.csv")).read_text()


def test_what_is_switched_off_may_hold_anything(tmp_path):
    for block in ("knn", "report"):
        config = experiment(values("nnclr", tmp_path, **{block: {"enabled": False, "max_train": 10}}))
        assert not getattr(config, block).enabled
        with pytest.raises(ConfigError, match="max_train"):
            experiment(values("nnclr", tmp_path, **{block: {"enabled": True, "max_train": 10}}))


def test_a_recipe_trains_at_a_small_global_batch():
    """Its ``min_lr`` is then above the scaled rate."""
    file, overrides = ROOT / "scripts/pretrain/imagenet/mvmr.yaml", ["optimizer.batch_size=8", "data.train_path=images"]
    recipe = experiment(load(file, overrides))
    trainer, lr = recipe.trainer, scaled_lr(recipe.optimizer.lr, 8)
    assert pairs.of_epochs(trainer, recipe.scheduler) + pairs.of_steps(trainer, recipe.scheduler, 100) == []
    (note,) = pairs.idle(trainer, recipe.scheduler, 100, lr)
    assert note.startswith("scheduler.min_lr=")


def test_main_linear_judges_alike(caplog):
    caplog.set_level("INFO", logger="solo")
    with pytest.raises(ConfigError, match="warmup_epochs=5 is longer.*\nmin_epochs=4 is more than max_epochs=3: use"):
        evaluate_linear({"checkpoint": "x", "scheduler": {"name": "warmup_cosine", "warmup_epochs": 5}, "max_epochs": 3,
                         "min_epochs": 4}, TRAINER_ARGUMENTS)
    with pytest.raises(ConfigError, match="accumulate_grad_batches=9 is more than the 8 batches of an epoch"):
        protocol._suits(LinearConfig(checkpoint="x", trainer={"accumulate_grad_batches": 9}), 64, 8)
    protocol._suits(LinearConfig(checkpoint="x", trainer={"max_epochs": 70}), 64, 8)
    assert caplog.messages == ["note: scheduler.lr_decay_steps=[80] lie behind the end of the run, max_epochs=70"]


@pytest.mark.parametrize("changes", [
    {"fast_dev_run": True, "scheduler": {"warmup_epochs": 10}},
    {"scheduler": {"warmup_epochs": 1}, "knn": {"enabled": True, "k": [64]}, "accumulate_grad_batches": 8},
    {"limit_val_batches": 0, "check_val_every_n_epoch": 5, "scheduler": {"name": "none", "warmup_epochs": 5}},
    {"data": {"train_size": 16}, "knn": {"enabled": False}, "report": {"enabled": False}, "limit_train_batches": 1.0},
])
def test_what_can_be_meant_runs(tmp_path, changes):
    pretrain(experiment(values("nnclr", tmp_path, **{"max_epochs": 1, "loggers": [], **changes})))
