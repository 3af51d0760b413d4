"""A run that is interrupted anywhere and continued ends with the same bits as one that is not."""

import errno
import json
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from solo import checkpoint
from solo.errors import EnvironmentFault
from solo.experiment import experiment
from solo.methods import METHODS
from solo.run import pretrain
from tests.tiny import values

STEPS = 24


class EveryStep(pl.Callback):
    """Saves after each optimizer step into its own folder and keeps the losses."""

    def __init__(self, folder):
        self.folder, self.losses = folder, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        stepped = trainer.global_step not in self.losses
        self.losses[trainer.global_step] = outputs["loss"].item()
        if self.folder is not None and stepped and trainer.global_step:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@pytest.fixture
def traced():
    """``run(values, folder)`` -> (final checkpoint, loss of each step)."""

    def run(content, folder=None):
        watcher = EveryStep(folder)
        result = pretrain(experiment(content), extra_callbacks=[watcher])
        return checkpoint.read(result.checkpoint), watcher.losses

    return run


def assert_same(a, b, path=""):
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


# What a checkpoint holds beside the state of the run: where it is stored, and how often Lightning restarted its loops.
def state(content):
    return {key: content[key] for key in ("state_dict", "optimizer_states", "callbacks", "epoch", "global_step", "DataModule")}


class Enough(Exception):
    """Ends a run that has shown what it should."""


class TwoSteps(EveryStep):
    """Ends the run behind its second step, or its last, with a checkpoint that stays in memory."""

    def __init__(self, monkeypatch):
        super().__init__(None)
        self.monkeypatch = monkeypatch

    def on_train_batch_end(self, trainer, *rest):
        super().on_train_batch_end(trainer, *rest)
        if len(self.losses) == 2 or trainer.global_step == STEPS:
            with self.monkeypatch.context() as patch:
                patch.setattr(checkpoint, "save", lambda content, *_, **__: setattr(self, "state", state(content)))
                trainer.save_checkpoint("nowhere")
            raise Enough


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_resume_from_every_step_is_bit_exact(method, workers, tmp_path, traced, monkeypatch):
    """Two steps from each one's checkpoint lead to the bits of the checkpoint two steps later, and so to all that follow.

    Every third one with workers, of which each start takes longer than the two steps.
    """
    content = {"data": {"num_workers": workers, "engine": "torchvision" if workers else "auto"}, "limit_val_batches": 2}
    saved = tmp_path / "saved"
    saved.mkdir()
    final, losses = traced(values(method, tmp_path / "whole", **content), saved)
    assert sorted(losses) == list(range(1, STEPS + 1)) and len(set(losses.values())) == STEPS
    for step in range(1, STEPS, 3 if workers else 1):
        again, watcher = values(method, tmp_path / f"from{step}", **content), TwoSteps(monkeypatch)
        with pytest.raises(Enough):
            pretrain(experiment({**again, "resume": str(saved / f"{step}.ckpt")}), [watcher])
        end = min(step + 2, STEPS)
        assert watcher.losses == {number: losses[number] for number in range(step + 1, end + 1)}, f"resumed after step {step}"
        assert_same(watcher.state, state(checkpoint.read(saved / f"{end}.ckpt")), f"resumed after step {step}: ")
    resumed, rest = traced(values(method, tmp_path / "rest", **content, resume=str(saved / "11.ckpt")))
    assert rest == {number: loss for number, loss in losses.items() if number > 11}
    assert_same(state(resumed), state(final))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_resume_with_accumulation(accumulate, tmp_path, traced):
    content = values("all4one", tmp_path / "whole", accumulate_grad_batches=accumulate)
    saved = tmp_path / "saved"
    saved.mkdir()
    final, _ = traced(content, saved)
    files = sorted(saved.glob("*.ckpt"), key=lambda path: int(path.stem))
    middle = files[len(files) // 2]
    resumed, _ = traced({**content, "checkpoint": {"dir": str(tmp_path / "rest")}, "resume": str(middle)})
    assert_same(state(resumed), state(final))


def test_same_command_continues_and_a_finished_run_stays(tmp_path, traced):
    content = values("all4one", tmp_path, max_epochs=2)
    run_dir = experiment(content).run_dir(8)
    whole, losses = traced(values("all4one", tmp_path / "whole", max_epochs=2))
    first, _ = traced(content)
    assert_same(state(first), state(whole))
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    again, rest = traced(content)
    assert rest == {} and {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()} == before
    assert_same(state(again), state(whole))
    assert len(losses) == 16


def test_another_temperature_is_another_directory(tmp_path):
    one = experiment(values("nnclr", tmp_path)).run_dir(8)
    other = experiment(values("nnclr", tmp_path, method_kwargs={"temperature": 0.3})).run_dir(8)
    same = experiment(values("nnclr", tmp_path, data={"num_workers": 3}, log_every_n_steps=7)).run_dir(8)
    assert one != other and one == same
    assert one != experiment(values("nnclr", tmp_path)).run_dir(16)


@pytest.mark.slow
def test_never_starts_anew_and_keeps_the_old(tmp_path, traced, caplog):
    content = values("nnclr", tmp_path, max_epochs=1)
    run_dir = experiment(content).run_dir(8)
    traced(content)
    caplog.set_level("INFO", "solo")
    _, losses = traced({**content, "resume": "never"})
    assert len(losses) == 8 and "starting anew" in caplog.text
    assert checkpoint.newest(run_dir.with_name(run_dir.name + ".old1") / "checkpoints") is not None


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, traced, caplog):
    content = values("nnclr", tmp_path, max_epochs=3)
    whole, losses = traced(content)
    run_dir = experiment(content).run_dir(8)
    latest = checkpoint.newest(run_dir / "checkpoints")
    data = bytearray(latest.read_bytes())
    data[len(data) // 2] ^= 1
    latest.write_bytes(data)
    resumed, rest = traced(content)
    assert "damaged" in caplog.text and sorted(rest) == list(range(17, 25))
    assert_same(state(resumed), state(whole))


def test_no_valid_checkpoint_is_never_from_scratch(tmp_path, traced):
    content = values("nnclr", tmp_path, max_epochs=1)
    traced(content)
    folder = experiment(content).run_dir(8) / "checkpoints"
    for path in folder.glob("*.ckpt"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(checkpoint.ConfigError, match="no valid checkpoint is left"):
        traced(content)


@pytest.mark.slow
def test_a_lost_manifest_is_never_from_scratch(tmp_path, traced, caplog):
    content = values("nnclr", tmp_path, max_epochs=2)
    traced(content)
    folder = experiment(content).run_dir(8) / "checkpoints"
    (folder / checkpoint.MANIFEST).unlink()
    _, rest = traced({**content, "max_steps": 20, "max_epochs": 3, "resume": str(folder.parent)})
    assert sorted(rest) == [17, 18, 19, 20]
    (folder / "step-000000016.ckpt").write_bytes(b"x")
    _, rest = traced(content)
    assert sorted(rest) == list(range(9, 17)) and (folder / "step-000000016.ckpt.corrupt").read_bytes() == b"x"


class Full(pl.Callback):
    """The disk is full from one step to another."""

    def __init__(self, monkeypatch, first, last):
        self.monkeypatch, self.full = monkeypatch, range(first, last + 1)

    def on_train_batch_end(self, trainer, *_):
        def full(content, path, keep=False, save=checkpoint.save):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        self.monkeypatch.undo()
        if trainer.global_step in self.full:
            self.monkeypatch.setattr(checkpoint, "save", full)


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path, traced, monkeypatch, caplog):
    """Saves fail after steps 3 and 4 and are tried again."""
    whole, _ = traced(values("nnclr", tmp_path / "whole", max_epochs=1))
    content = values("nnclr", tmp_path, max_epochs=1, checkpoint={"minutes": 0})
    result = pretrain(experiment(content), extra_callbacks=[Full(monkeypatch, 3, 4)])
    assert_same(state(checkpoint.read(result.checkpoint)), state(whole))
    warned = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert ["(1 of 3)" in warned[0], "(2 of 3)" in warned[1], len(warned)] == [True, True, 2]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "last", "kept"), [(3, 8, 2), (8, 8, 7)])
def test_a_full_disk_ends_the_run_with_its_last_checkpoint(tmp_path, traced, monkeypatch, first, last, kept):
    """After three saves in a row; at once where no other save would follow."""
    content = values("nnclr", tmp_path, max_epochs=1, checkpoint={"minutes": 0, "fallback": str(tmp_path / "other")})
    with pytest.raises(EnvironmentFault) as caught:
        pretrain(experiment(content), extra_callbacks=[Full(monkeypatch, first, last)])
    (line,) = str(caught.value).splitlines()
    assert "No space left on device" in line and "MB are free" in line and "the last checkpoint stays; " in line
    monkeypatch.undo()
    latest = checkpoint.newest(experiment(content).run_dir(8) / "checkpoints")
    assert latest.name == f"step-{kept:09d}.ckpt"
    _, rest = traced(content)
    assert sorted(rest) == list(range(kept + 1, 9))


def test_checkpoint_of_another_method_is_refused(tmp_path, traced):
    content = values("nnclr", tmp_path / "a", max_epochs=1)
    traced(content)
    run_dir = experiment(content).run_dir(8)
    with pytest.raises(checkpoint.ConfigError, match="written by method 'nnclr'"):
        traced(values("all4one", tmp_path / "b", resume=str(run_dir)))
    with pytest.raises(checkpoint.ConfigError, match="missing 0|unexpected|shape of"):
        traced(values("nnclr", tmp_path / "b", method_kwargs={"proj_output_dim": 16}, resume=str(run_dir)))


def test_what_a_run_leaves(tmp_path, traced):
    content = values("all4one", tmp_path)
    final, _ = traced(content)
    run_dir = experiment(content).run_dir(8)
    assert Path(run_dir / "last.ckpt").resolve() == checkpoint.newest(run_dir / "checkpoints")
    assert len(checkpoint.manifest(run_dir / "checkpoints")) == 2
    assert experiment(json.loads((run_dir / "config.json").read_text())) == experiment(content)
    assert json.loads(final["solo"])["method"] == "all4one"
