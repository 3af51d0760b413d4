"""A run whose folder goes away, whose metrics are written over several starts, whose precision is another one."""

import ctypes
import os
import shutil
import subprocess

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.trainer.connectors import accelerator_connector

from solo import checkpoint
from solo.bench import processes
from solo.errors import EnvironmentFault, reported
from solo.eval.report import history
from solo.experiment import experiment
from solo.run import pretrain
from tests.test_resume import EveryStep, assert_same, state
from tests.tiny import values

pytestmark = pytest.mark.slow


class At(pl.Callback):
    """Does something after a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            self.act()


def content(folder, **changes):
    at_each = {"minutes": 0, "fallback": str(folder / "fallback")}
    return values("nnclr", folder / "runs", **{"max_epochs": 1, "checkpoint": at_each, **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder and the last checkpoint of a run of eight steps that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    result = pretrain(experiment(content(folder)))
    return result.run_dir, checkpoint.read(result.checkpoint)


def test_the_manifest_says_which_save_ends_an_epoch(whole):
    entries = checkpoint.manifest(whole[0] / "checkpoints")
    assert [(entry.step, entry.epoch_end) for entry in entries] == [(6, False), (7, False), (8, True)]


@pytest.mark.parametrize("lost", ["the run's", "that of all runs"])
def test_a_folder_that_is_removed_is_made_anew(whole, tmp_path, lost):
    config = experiment(content(tmp_path))
    run_dir = config.run_dir(8)
    result = pretrain(config, [At(3, lambda: shutil.rmtree(run_dir if lost == "the run's" else run_dir.parent))])
    assert_same(state(checkpoint.read(result.checkpoint)), state(whole[1]))


def test_where_nothing_can_be_written_the_state_goes_elsewhere(whole, tmp_path):
    """A file is where the folder was, which stops root as well; the run goes on from the other folder."""
    config, away = experiment(content(tmp_path)), tmp_path / "away"
    run_dir = config.run_dir(8)

    def lost():
        run_dir.rename(away)
        run_dir.write_text("")

    with pytest.raises(EnvironmentFault) as ended:
        pretrain(config, [At(3, lost)])
    (line,) = str(ended.value).splitlines()
    elsewhere = tmp_path / "fallback" / run_dir.name
    saved = elsewhere / "step-000000005.ckpt"
    assert line.endswith(f"the last checkpoint stays; this step is saved elsewhere: go on with resume={saved}")
    assert list(elsewhere.glob("*.ckpt")) == [saved]
    shutil.copy(saved, elsewhere / "step-000000009.ckpt")        # of another run of that name
    (elsewhere / checkpoint.MANIFEST).unlink()
    assert checkpoint.newest(away / "checkpoints").name == "step-000000002.ckpt"
    run_dir.unlink()
    away.rename(run_dir)
    watcher = EveryStep(None)
    result = pretrain(experiment(content(tmp_path, resume=str(saved))), [watcher])
    assert sorted(watcher.losses) == [6, 7, 8]
    assert_same(state(checkpoint.read(result.checkpoint)), state(whole[1]))


def test_where_the_file_system_becomes_read_only_the_state_goes_elsewhere(tmp_path):
    """A real one, in a child's own world of mounts."""
    config = experiment(content(tmp_path, data={"num_workers": 0}))
    runs = config.run_dir(8).parent

    def mount(*words):
        subprocess.run(["mount", *map(str, words)], check=True)

    def read_only():
        mount("--bind", runs, runs)
        mount("-o", "remount,bind,ro", runs)

    def child(_):
        if ctypes.CDLL(None).unshare(0x20000) or subprocess.run(["mount", "--make-rprivate", "/"]).returncode:  # CLONE_NEWNS
            os._exit(77)
        with reported():
            pretrain(config, [At(3, read_only)])

    pid = processes.fork(1, tmp_path / "log", child)
    (status,) = processes.wait(pid, 120).values()
    if status == 77 << 8:
        pytest.skip("mounts are refused here")
    lines = (tmp_path / "log").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith("environment error: ")]
    saved = tmp_path / "fallback" / config.run_dir(8).name / "step-000000005.ckpt"
    assert status == EnvironmentFault.exit_code << 8 and "Read-only file system" in line
    assert line.endswith(f"go on with resume={saved}") and saved.exists() and not any("Traceback" in line for line in lines)


def test_metrics_hold_each_step_once_over_a_kill_and_a_resume(whole, tmp_path):
    """What the checkpoint of step 5 goes on behind is in the file, though the logger writes every hundred steps only."""
    config = experiment(content(tmp_path, data={"num_workers": 0}))
    child = processes.fork(1, tmp_path / "log", lambda _: pretrain(config, [At(6, lambda: os._exit(9))]))
    assert list(processes.wait(child, 120).values()) == [9 << 8]
    run_dir = pretrain(config).run_dir
    assert len(list(run_dir.glob("csv/version_*/metrics.csv"))) == 2
    expected = history(whole[0])
    assert history(run_dir) == expected and [step for step, _ in expected["train/loss"]] == list(range(1, 9))
    lines = [sum(len(file.read_text().splitlines()) for file in folder.rglob("metrics.csv")) for folder in (run_dir, whole[0])]
    assert lines[0] == lines[1] + 1                     # a header more: nothing twice


def test_another_precision_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "solo")
    saved = pretrain(experiment(content(tmp_path)), [Stop(2)]).run_dir
    pretrain(experiment(content(tmp_path, precision="bf16-mixed", resume=str(saved))), [Stop(4)])
    said = [record.getMessage() for record in caplog.records if "precision is" in record.getMessage()]
    assert said == ["note: precision is bf16-mixed, it was None when this checkpoint was saved"]


def test_the_gradient_scaler_goes_on(tmp_path, monkeypatch):
    """torch's own, on a CPU; it grows every third step, so what it has counted shows."""

    def scaled(*_):
        return MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3))

    monkeypatch.setattr(accelerator_connector, "MixedPrecision", scaled)
    ends = []
    for folder, first in (("whole", 8), ("parts", 4)):
        for last in sorted({first, 8}):
            result = pretrain(experiment(content(tmp_path / folder, max_steps=8, precision="bf16-mixed")), [Stop(last)])
        ends.append(checkpoint.read(result.checkpoint))
    assert ends[0]["MixedPrecision"]["scale"] == 64 * 2**2 and ends[0]["MixedPrecision"]["_growth_tracker"] == 2
    for part in ("state_dict", "optimizer_states", "MixedPrecision"):
        assert_same(ends[1][part], ends[0][part], part)


class Stop(At):
    """Ends a run after a step."""

    def __init__(self, step):
        super().__init__(step, None)

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.step
