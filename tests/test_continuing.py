"""A checkpoint whose weights fit, but not the rest of its state, is refused in one line, and never taken for a fresh start."""

import contextlib
import copy
import signal

import pytest
import pytorch_lightning as pl
import torch

from solo import checkpoint
from solo.errors import ConfigError, DataError, Interrupted
from solo.experiment import experiment
from solo.run import pretrain
from tests.data.common import make_folder
from tests.tiny import values


def content(folder, **changes):
    return values("nnclr", folder, max_epochs=2, loggers=[], knn={"enabled": False}, **changes)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What the first of two epochs leaves."""
    folder = tmp_path_factory.mktemp("saved")
    return checkpoint.read(pretrain(experiment({**content(folder), "max_steps": 8})).checkpoint)


def loops(state):
    return state["loops"]["fit_loop"]


def groups(state):
    return state["optimizer_states"][0]["param_groups"]


def momentum(state, value):
    state["optimizer_states"][0]["state"][0]["momentum_buffer"] = value


STEP = "epoch_loop.automatic_optimization.optim_progress"
WRONG = {
    "it holds weights but no state of a training run": lambda s: (s.pop("loops"), s.pop("optimizer_states")),
    "it lacks loops": lambda s: s.pop("loops"),
    "loops is 'x', not of type dict": lambda s: s.update(loops="x"),
    "it lacks loops.fit_loop": lambda s: s.update(loops={}),
    "loops.fit_loop is 'x', not of type dict": lambda s: s["loops"].update(fit_loop="x"),
    "loops.fit_loop.epoch_loop.batch_progress is 'x'": lambda s: loops(s).update({"epoch_loop.batch_progress": "x"}),
    "it lacks loops.fit_loop.epoch_progress.current.ready": lambda s: loops(s)["epoch_progress"]["current"].clear(),
    "loops.fit_loop.epoch_progress.current.ready is -3": lambda s: loops(s)["epoch_progress"]["current"].update(ready=-3),
    f"it lacks loops.fit_loop.{STEP}.optimizer": lambda s: loops(s)[STEP].clear(),
    "it counts 8 steps in its loops, and calls itself step 9": lambda s: s.update(global_step=9),
    "it lacks optimizer_states": lambda s: s.pop("optimizer_states"),
    "it holds the states of 0 optimizers, not of one": lambda s: s["optimizer_states"].clear(),
    "optimizer_states[0] is 'x', not of type dict": lambda s: s.update(optimizer_states=["x"]),
    "it lacks optimizer_states[0].state": lambda s: s["optimizer_states"][0].pop("state"),
    "optimizer_states[0].param_groups[1] is None": lambda s: groups(s).__setitem__(1, None),
    "its optimizer has the groups none": lambda s: groups(s).clear(),
    "its optimizer has the groups projector (": lambda s: groups(s).reverse() or groups(s).insert(0, groups(s).pop(1)),
    "its optimizer has the groups backbone (1 tensors)": lambda s: groups(s)[0].update(params=[0]),
    "optimizer_states[0].state.0.momentum_buffer is of shape [2]": lambda s: momentum(s, torch.zeros(2)),
    "optimizer_states[0].state.0.momentum_buffer is 'x'": lambda s: momentum(s, "x"),
    "optimizer_states[0].state.3 is [1]": lambda s: s["optimizer_states"][0]["state"].update({3: [1]}),
    "callbacks is 'x', not of type dict": lambda s: s.update(callbacks="x"),
    "callbacks.OnlineProbe is 3, not of type dict": lambda s: s["callbacks"].update(OnlineProbe=3),
    "callbacks.OnlineProbe.head.weight is of shape [1]": lambda s: s["callbacks"]["OnlineProbe"].update(
        {"head.weight": torch.ones(1)}),
    "it lacks DataModule": lambda s: s.pop("DataModule"),
    "place in the data is damaged: its epoch is None": lambda s: s["DataModule"].clear(),
    "place in the data is damaged: its batch is -1": lambda s: s["DataModule"].update(batch=-1),
    "x.ckpt cannot be continued: its list of unreadable images is damaged": lambda s: s.update(unreadable={"x": 3}),
    "it lacks lr_schedulers": lambda s: s.pop("lr_schedulers"),
    "it does not name the version of pytorch-lightning": lambda s: s.update({"pytorch-lightning_version": "x"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("said", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(said, saved, tmp_path):
    state = copy.deepcopy(saved)
    WRONG[said](state)
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError) as caught:
        pretrain(experiment(content(tmp_path / "runs", resume=str(tmp_path / "x.ckpt"))))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.glob("runs/*/checkpoints"))


def test_what_fits_goes_on(saved, tmp_path):
    """Also without the probe's state, and with a state of somebody else's callback."""
    state = copy.deepcopy(saved)
    state["callbacks"] = {"Other": 3}
    torch.save(state, tmp_path / "x.ckpt")
    result = pretrain(experiment(content(tmp_path / "runs", resume=str(tmp_path / "x.ckpt"))))
    assert checkpoint.read(result.checkpoint)["global_step"] == 16


class Watch(pl.Callback):
    """What the optimizer's groups say and which images each step has; ends the run at a step by SIGTERM."""

    def __init__(self, last=None):
        self.last, self.options, self.images = last, {}, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.images[trainer.global_step + 1] = batch.index.tolist()
        self.options = {key: value for key, value in trainer.optimizers[0].param_groups[0].items() if key != "params"}

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.last:
            signal.raise_signal(signal.SIGTERM)


def watched(last=None, **config):
    watch = Watch(last)
    with contextlib.suppress(Interrupted):
        watch.result = pretrain(experiment(config), [watch])
    return watch


def of_sgd(folder, **changes):
    optimizer = {"name": "sgd", "batch_size": 8, "lr": 1.0, "kwargs": {"momentum": 0.9}, **changes.pop("optimizer", {})}
    return {**content(folder), "max_epochs": 3, "optimizer": optimizer, **changes}


@pytest.fixture(scope="module")
def by_sgd(tmp_path_factory):
    """The end of the first of three epochs of 8 steps."""
    folder = tmp_path_factory.mktemp("sgd")
    watched(8, **of_sgd(folder))
    return str(next(folder.glob("nnclr*/last.ckpt")))


def test_an_optimizer_option_that_is_another_now_counts(by_sgd, tmp_path, caplog):
    """What is said to be another is what trains."""
    caplog.set_level("INFO", "solo")
    changed = {"kwargs": {"momentum": 0.1, "nesterov": True}, "weight_decay": 0.3}
    watch = watched(9, **of_sgd(tmp_path, resume=by_sgd, optimizer=changed))
    assert (watch.options["momentum"], watch.options["nesterov"], watch.options["weight_decay"]) == (0.1, True, 0.3)
    assert "note: optimizer.kwargs.momentum is 0.1, it was 0.9 when this checkpoint was saved" in caplog.text


@pytest.mark.parametrize("optimizer", [{"name": "adamw", "kwargs": {}}, {"name": "lars", "kwargs": {"eta": 0.02}}])
def test_another_optimizer_is_refused(by_sgd, tmp_path, optimizer):
    """What one has kept is of no use to another."""
    with pytest.raises(ConfigError, match=f"optimizer.name=sgd kept, now it is {optimizer['name']}"):
        pretrain(experiment(of_sgd(tmp_path, resume=by_sgd, optimizer=optimizer)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_epochs_of_another_length_are_interrupted_like_any(by_sgd, tmp_path):
    """The place in the data is counted within the epoch, not from all batches there ever were."""
    shorter = {"limit_train_batches": 4}
    whole = watched(**of_sgd(tmp_path / "whole", resume=by_sgd, **shorter))
    parts = [watched(last, **of_sgd(tmp_path / "parts", resume=by_sgd, **shorter)) for last in (10, 13, None)]
    assert {step: images for part in parts for step, images in part.images.items()} == whole.images
    assert [len(part.images) for part in parts] == [2, 3, 3]


@pytest.mark.slow
def test_steps_end_within_an_epoch_and_more_are_asked_for(tmp_path):
    """Lightning goes on in the epoch that ``max_steps`` ended; from there on a signal finds it in the right one, too."""
    whole = watched(**of_sgd(tmp_path / "whole", max_epochs=None, max_steps=24))
    first = watched(**of_sgd(tmp_path / "first", max_epochs=None, max_steps=12))
    more = {"max_epochs": None, "max_steps": 24, "resume": str(first.result.run_dir)}
    parts = [first, *[watched(last, **of_sgd(tmp_path / "more", **more)) for last in (14, 19, None)]]
    assert [len(part.images) for part in parts] == [12, 2, 5, 5]
    assert {step: images for part in parts for step, images in part.images.items()} == whole.images


def test_what_only_rounds_otherwise_is_said(by_sgd, tmp_path, caplog):
    caplog.set_level("INFO", "solo")
    watched(9, **of_sgd(tmp_path, resume=by_sgd, view_batching="concat", probe={"enabled": False}))
    said = [record.getMessage().split(",")[0] for record in caplog.records if record.getMessage().startswith("note: ")]
    assert said == ["note: probe.enabled is False", "note: view_batching is concat"]


def of_bad_images(folder, limit=0.1, **changes):
    """Four of 64 images are none."""
    if not (folder / "images").exists():
        for path in make_folder(folder / "images", {"a": 64})[::16]:
            path.write_bytes(b"bad")
    data = {"dataset": "image_folder", "train_path": str(folder / "images"), "train_size": None, "engine": "torchvision"}
    data |= {"size": 16, "num_workers": 0, "max_bad_fraction": limit}
    return {**content(folder / "runs"), "max_epochs": 1, "data": data,
            **changes}


def test_unreadable_images_are_counted_on(tmp_path, caplog):
    """Those from before an interruption count, are not named again, and end a run that has too many of both."""
    watched(4, **of_bad_images(tmp_path))
    before = caplog.text.count("unreadable image ")
    result = watched(**of_bad_images(tmp_path)).result
    assert 0 < before < 4 == caplog.text.count("unreadable image ")
    assert len(checkpoint.read(result.checkpoint)["unreadable"]) == 4


def test_too_many_unreadable_images_over_a_resume_end_it(tmp_path):
    watched(4, **of_bad_images(tmp_path, limit=3 / 64))
    with pytest.raises(DataError, match="4 of 64 images cannot be read"):
        pretrain(experiment(of_bad_images(tmp_path, limit=3 / 64)))


def test_a_finished_run_under_another_config_is_said_to_be_the_end(tmp_path, caplog):
    done = pretrain(experiment(values("simclr", tmp_path / "runs", max_epochs=1)))
    caplog.set_level("INFO", "solo")
    changes = {"resume": str(done.checkpoint), "optimizer": {"batch_size": 16}}
    result = pretrain(experiment(values("simclr", tmp_path / "others", max_epochs=1, **changes)))
    assert result.checkpoint.resolve() == done.checkpoint.resolve()
    unsaved = experiment(values("simclr", tmp_path / "more", max_epochs=1, checkpoint={"enabled": False}, **changes))
    assert pretrain(unsaved).checkpoint is None
    assert f"{result.checkpoint} is the end of its training" in caplog.text and "the same images" not in caplog.text
