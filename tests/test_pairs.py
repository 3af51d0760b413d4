"""Values that are each fine and cannot be meant together: one line a pair, all of them at once, before any work."""

import pytest

from solo.errors import ConfigError
from solo.experiment import experiment
from solo.run import pretrain
from tests.tiny import values

SMALL = {"crop_size": 1, "num_crops": 2, "gaussian_blur": {"prob": 1.0}}
# (keys, what the line says); 64 images in 8 batches of 8, one epoch
PAIRS = [
    ({"scheduler": {"warmup_epochs": 2}}, "scheduler.warmup_epochs=2 is longer than the whole run, max_epochs=1"),
    ({"max_epochs": 100, "max_steps": 4}, "scheduler.warmup_epochs=1 are 8 steps, more than max_steps=4"),
    ({"max_epochs": -1, "max_steps": 4}, "scheduler.warmup_epochs=1 are 8 steps, more than max_steps=4"),
    ({"scheduler": {"name": "step", "lr_decay_steps": [0, 1]}}, "scheduler.lr_decay_steps=[1] lie behind the end of the run"),
    ({"scheduler": {"min_lr": 0.04}}, "scheduler.min_lr=0.04 is above the rate it should fall from, "
                                      "optimizer.lr=1 x 8/256 = 0.03125"),
    ({"min_epochs": 2}, "min_epochs=2 is more than max_epochs=1"),
    ({"min_steps": 9}, "min_steps=9 is more than the 8 steps of the run"),
    ({"check_val_every_n_epoch": 2}, "check_val_every_n_epoch=2 is more than max_epochs=1"),
    ({"val_check_interval": 9}, "val_check_interval=9 is more than the 8 batches of an epoch"),
    ({"accumulate_grad_batches": 9}, "accumulate_grad_batches=9 is more than the 8 batches of an epoch"),
    ({"accumulate_grad_batches": 3, "limit_train_batches": 2}, "accumulate_grad_batches=3 is more than the 2 batches"),
    ({"accumulate_grad_batches": 5, "limit_train_batches": 0.5}, "accumulate_grad_batches=5 is more than the 4 batches"),
    ({"accumulate_grad_batches": 5, "overfit_batches": 4}, "accumulate_grad_batches=5 is more than the 4 batches"),
    ({"overfit_batches": 4, "limit_train_batches": 4}, "overfit_batches and limit_train_batches both say"),
    ({"gradient_clip_algorithm": "value"}, "gradient_clip_algorithm=value clips nothing without gradient_clip_val"),
    ({"num_sanity_val_steps": -2}, "num_sanity_val_steps must be at least -1, which means all, got -2"),
    ({"knn": {"enabled": True, "k": [20, 65]}}, "knn.k=[65] is more than the 64 labelled training images that vote"),
    ({"knn": {"k": [5, 20], "max_train": 10}}, "knn.k=[20] is more than max_train=10"),
    ({"report": {"enabled": True, "k": 65}}, "report.k=65 is more than the 64 labelled training images that vote"),
    ({"report": {"max_train": 10}}, "report.k=20 is more than max_train=10"),
    ({"health": {"stop_on_collapse": True}}, "health.stop_on_collapse would come after health.every x health.patience = 250"),
    ({"health": {"stop_on_collapse": True, "enabled": False}}, "health.stop_on_collapse needs enabled=true"),
    ({"health": {"min_std": 1.5}}, "health.min_std is a share of 1, got 1.5"),
    ({"loggers": ["csv", "csv"]}, "loggers names one twice: csv, csv"),
    ({"data": {"train_path": "here"}}, "data.train_path=here, but data.dataset=fake is drawn, not read from there"),
    ({"data": {"val_path": "here"}}, "data.val_path=here, but data.dataset=fake is drawn, not read from there"),
    ({"data": {"dataset": "digits", "train_path": "here"}}, "data.train_path=here, but data.dataset=digits is drawn"),
    ({"augmentations": [SMALL]}, "augmentations[0].crop_size must be at least 2 for gaussian_blur"),
    ({"method_kwargs": {"queue_size": 20}}, "method_kwargs.queue_size=20 is not a multiple of the global batch 8"),
    ({"micro_batch": 3}, "micro_batch=3 does not divide optimizer.batch_size=8"),
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
    assert len(refused(tmp_path, {"scheduler": {"warmup_epochs": 2}, "min_epochs": 2, "check_val_every_n_epoch": 2})) == 3
    images = {"knn": {"enabled": True, "k": [65]}, "accumulate_grad_batches": 9, "method_kwargs": {"queue_size": 20}}
    assert len(refused(tmp_path, images)) == 3


@pytest.mark.parametrize("changes", [
    {"fast_dev_run": True, "scheduler": {"warmup_epochs": 10}},
    {"scheduler": {"warmup_epochs": 1}, "knn": {"enabled": True, "k": [64]}, "accumulate_grad_batches": 8},
    {"limit_val_batches": 0, "check_val_every_n_epoch": 5, "scheduler": {"name": "none", "warmup_epochs": 5}},
    {"data": {"train_size": 16}, "knn": {"enabled": False}, "report": {"enabled": False}, "limit_train_batches": 1.0},
])
def test_what_can_be_meant_runs(tmp_path, changes):
    pretrain(experiment(values("nnclr", tmp_path, **{"max_epochs": 1, "loggers": [], **changes})))
