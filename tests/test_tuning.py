"""auto_batch_size and auto_lr: the run uses what is found, the same command finds it again, and nothing else changes."""

import itertools
import json
import math
import os
import signal

import pytest
import torch

from solo import checkpoint, tuning
from solo.errors import ConfigError, EnvironmentFault, NumericsError, reported
from solo.experiment import experiment
from solo.methods import All4One
from solo.methods.nnclr import NNCLR
from solo.run import pretrain
from tests.tiny import values


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tuning, "_RATE_STEPS", 20)
    return tmp_path


def run(method="nnclr", callbacks=(), **changes):
    return pretrain(experiment(values(method, "runs", **{"max_epochs": 2, **changes})), callbacks)


def weights(result):
    return checkpoint.read(result.checkpoint)["state_dict"]


BOTH = {"auto_batch_size": True, "auto_lr": True}


@pytest.mark.slow
def test_the_run_is_the_one_with_the_values_found(place, caplog):
    with caplog.at_level("INFO", "solo"):
        result = run(**BOTH)
    (found,) = (json.loads(path.read_text()) for path in (place / "runs").glob("*.json"))
    assert found["batch_size"] == 32 and "optimizer.batch_size=32, the largest" in caplog.text  # a queue of 32
    assert f"optimizer.lr={found['lr']:g} per 256 images" in caplog.text
    content = json.loads((result.run_dir / "config.json").read_text())
    assert content["optimizer"]["lr"] == found["lr"] and not content["auto_lr"] and not content["auto_batch_size"]
    assert caplog.text.count("lars: lr") == 1                               # the searches are silent
    assert {path.name for path in place.rglob("*")} & {".lr_find", "lightning_logs"} == set()
    assert sorted(path.suffix for path in (place / "runs").iterdir()) == ["", ".json"]
    assert [path.name for path in place.iterdir()] == ["runs"]
    given = run(optimizer={"batch_size": 32, "lr": found["lr"]}, resume="never")
    assert given.run_dir == result.run_dir                                  # one experiment, however its values came about
    old = checkpoint.read(place / f"{result.run_dir}.old1")["state_dict"]
    assert all(torch.equal(value, old[name]) for name, value in weights(given).items())


@pytest.mark.slow
@pytest.mark.parametrize("method, changes", [
    ("sce", {}),
    ("unigrad", {"method_kwargs": {"lambda_": 3.0}}),
    ("unigrad", {"method_kwargs": {"form": "simsiam"}, "momentum": None}),
    ("unigrad", {"method_kwargs": {"form": "byol_directpred"}}),
    ("unigrad", {"method_kwargs": {"form": "vicreg"}}),
    ("mvmr", {"optimizer": {"name": "adam", "lr": 1e-4, "kwargs": {}}}),
], ids=["sce", "unigrad", "simsiam", "byol_directpred", "vicreg", "mvmr"])
def test_losses_of_every_sign_and_size_find_both(caplog, monkeypatch, method, changes):
    """A loss may be below 0, near it, or rise at first."""
    monkeypatch.setattr(tuning, "MAX_BATCH", 16)
    config = experiment(values(method, "runs", **changes, **BOTH))
    with caplog.at_level("INFO", "solo"):
        found = tuning.tuned(config, {"accelerator": "cpu", "devices": 1}, 1, tuned_build).optimizer
    low, high = tuning._RATES.get(found.name, tuning._OTHER_RATES)
    assert low < found.lr * found.batch_size / 256 < high and found.batch_size == 16
    batch, rate = (line for line in caplog.messages if line.startswith("auto_"))    # in this order
    assert batch.startswith(f"auto_batch_size: optimizer.batch_size={found.batch_size}, ")
    assert rate.startswith(f"auto_lr: optimizer.lr={found.lr:g} per 256 images, ")
    assert f" at {found.batch_size} images a step" in rate


def scripted(monkeypatch, loss):
    """A search over a method whose loss at step n is ``loss(n)``."""
    steps, losses = itertools.count(), NNCLR.losses

    def instead(self, batch):
        out = losses(self, batch)
        return {**out, "loss": 0 * out["loss"] + loss(next(steps))}

    monkeypatch.setattr(NNCLR, "losses", instead)
    return tuning.tuned(experiment(values("nnclr", "runs", auto_lr=True)), {"accelerator": "cpu", "devices": 1}, 1, tuned_build)


@pytest.mark.slow
@pytest.mark.parametrize("after", [1e3, math.nan, math.inf])
def test_a_rate_is_not_sought_where_the_loss_has_diverged(monkeypatch, after):
    """It falls a little at each rate, bursts at the 15th, and then comes down by far more."""
    found = scripted(monkeypatch, lambda step: -0.5 - 0.01 * step if step < 15 else after - 1e6 * (step > 15))
    assert found.optimizer.lr * 8 / 256 < 1e-3 * 10 ** (4 * 15 / 20)


@pytest.mark.slow
def test_a_loss_that_diverges_at_once_is_one_line(monkeypatch, caplog):
    with pytest.raises(NumericsError, match=r"^auto_lr: the loss diverges already at a rate of 0.0\d+: give optimizer.lr$"):
        scripted(monkeypatch, lambda step: 10.0**step)
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


class Stop(Exception):
    pass


@pytest.mark.slow
def test_the_same_command_continues_its_run(place, monkeypatch, caplog):
    from pytorch_lightning import Callback

    class AfterOneEpoch(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                raise Stop

    with pytest.raises(Stop):
        run(auto_lr=True, callbacks=[AfterOneEpoch()])
    monkeypatch.setattr(tuning, "_search", lambda *_: pytest.fail("searched again"))
    with caplog.at_level("INFO", "solo"):
        continued = run(auto_lr=True)
    assert "as found before" in caplog.text and "continuing" in caplog.text
    assert len(list((place / "runs").glob("*-????????"))) == 1
    lr = json.loads((continued.run_dir / "config.json").read_text())["optimizer"]["lr"]
    whole = run(checkpoint={"dir": "elsewhere"}, optimizer={"lr": lr})
    assert all(torch.equal(value, weights(whole)[name]) for name, value in weights(continued).items())


@pytest.mark.slow
def test_what_a_search_depends_on_names_its_record(monkeypatch):
    path = lambda **changes: tuning._record(experiment(values("nnclr", "runs", **changes)), ["auto_lr"])  # noqa: E731
    base = path(auto_lr=True)
    assert base == path(auto_lr=True, optimizer={"lr": 0.7}) == path(auto_lr=True, knn={"enabled": True})
    assert base not in (path(auto_lr=True, optimizer={"batch_size": 16}), path(auto_lr=True, seed=6))
    both = path(**BOTH)
    assert both == path(**BOTH, optimizer={"batch_size": 16}) != path(**BOTH, method_kwargs={"queue_size": 64})
    seen = []
    monkeypatch.setattr(tuning, "_search", lambda config, *_: seen.append(config) or {"lr": 0.5})
    run(auto_lr=True, max_epochs=1)
    run(auto_lr=True, max_epochs=1, resume="never")                         # anew is anew
    assert len(seen) == 2


@pytest.mark.slow
@pytest.mark.parametrize("queue, fits, expected", [(48, 40, 24), (32, 20, 16), (48, 1000, 48), (5040, 1000, 63)])
def test_batch_is_the_largest_that_fits_and_divides(monkeypatch, queue, fits, expected):
    seen, losses = [], NNCLR.losses

    def limited(self, batch):
        seen.append(len(batch.labels))
        if seen[-1] > fits:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20 MiB")
        return losses(self, batch)

    monkeypatch.setattr(NNCLR, "losses", limited)
    config = experiment(values("nnclr", "runs", method_kwargs={"queue_size": queue}, auto_batch_size=True))
    found = tuning.tuned(config, {"accelerator": "cpu", "devices": 1}, 1, tuned_build)
    assert found.optimizer.batch_size == expected and found.optimizer.lr == config.optimizer.lr
    assert max(seen) <= 2 * fits and queue % expected == 0
    assert {size: seen.count(size) for size in set(seen) if size <= fits} == {size: 3 for size in set(seen) if size <= fits}


def tuned_build(config):
    from solo.run import build

    return build(config)


@pytest.mark.slow
def test_rates_grow_and_a_group_with_its_own_rate_keeps_it(monkeypatch):
    seen = []

    def record(self, progress):
        seen.append({group["name"]: group["lr"] for group in self.trainer.optimizers[0].param_groups})
        return {}

    monkeypatch.setattr(All4One, "after_step", record)
    config = experiment(values("all4one", "runs", auto_lr=True, method_kwargs={"transformer_lr": 0.123}))
    tuning.tuned(config, {"accelerator": "cpu", "devices": 1}, 1, tuned_build)
    assert {rates["transformer"] for rates in seen} == {0.123} and len(seen) <= 20
    rates = [step["backbone"] for step in seen]
    assert rates[0] == pytest.approx(1e-3) and all(b > a for a, b in zip(rates, rates[1:], strict=False))
    assert rates[1] / rates[0] == pytest.approx(10 ** (4 * 2 / 20), rel=1e-6)       # Lightning leaves one step out


@pytest.mark.slow
def test_memory_of_a_cpu_ends_the_search_before_the_system_does(monkeypatch):
    monkeypatch.setattr(tuning, "_memory", lambda: 1)
    config = experiment(values("nnclr", "runs", auto_batch_size=True))
    assert tuning.tuned(config, {"accelerator": "cpu", "devices": 1}, 1, tuned_build).optimizer.batch_size == 2
    assert tuning._peak() > 10**7


@pytest.mark.parametrize("changes, error, message", [
    ({"auto_lr": True, "devices": 2}, ConfigError, "auto_lr search in one process, and this run has 2: search with devices=1"),
    ({"auto_lr": True, "precision": "fp3"}, ConfigError, "precision must be one of"),
    ({"auto_lr": True, "optimizer": {"batch_size": 24}}, ConfigError, "queue_size=32 is not a multiple of the global batch 24"),
    ({"auto_lr": True, "optimizer": {"batch_size": 128}}, ConfigError, "0 steps"),
    ({**BOTH, "method_kwargs": {"queue_size": 67}}, ConfigError, "only a batch of 1 divides"),
    ({"auto_lr": True, "resume": "some.ckpt"}, ConfigError,
     "auto_lr searches with an untrained network, and resume=some.ckpt has a trained one: give optimizer.lr"),
    ({"auto_lr": "yes"}, ConfigError, "auto_lr must be true or false"),
])
def test_wrong_requests_train_nothing(place, monkeypatch, changes, error, message):
    monkeypatch.setattr(NNCLR, "losses", lambda *_: pytest.fail("a step was made"))
    with pytest.raises(error, match=message):
        run(**changes)
    assert not (place / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_in_a_search_is_one_line(place, monkeypatch, capsys, number):
    losses = NNCLR.losses

    def interrupted(self, batch):
        os.kill(os.getpid(), number)
        return losses(self, batch)

    monkeypatch.setattr(NNCLR, "losses", interrupted)
    with pytest.raises(SystemExit) as end, reported():
        run(auto_lr=True)
    assert end.value.code == 128 + number
    assert capsys.readouterr().err == (
        f"interrupted: {number.name} in a search: nothing is kept, the same command searches again\n"
    )
    assert not list(place.glob("runs/*.json"))


def test_damaged_record_and_place_that_cannot_be_written(place, monkeypatch):
    monkeypatch.setattr(tuning, "_search", lambda *_: {"lr": 0.5})
    (place / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="checkpoint.dir=file/runs cannot be written: Not a directory"):
        run(auto_lr=True, checkpoint={"dir": "file/runs"})
    run(auto_lr=True, max_epochs=1)
    (record,) = (place / "runs").glob("*.json")
    record.write_text("{")
    with pytest.raises(ConfigError, match="is damaged .*: remove it to search again"):
        run(auto_lr=True, max_epochs=1)
