"""How much a fault can cost, and how much time saving may take, by a clock that the test moves."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed import barrier

from solo.callbacks import checkpoint
from solo.callbacks.checkpoint import CheckpointConfig, Checkpointer
from solo.callbacks.signals import SignalGuard
from solo.dist import all_reduce
from solo.errors import EnvironmentFault
from solo.testing import run_ranks


class Run:
    """One epoch of steps and saves that take their time."""

    def __init__(self, folder, monkeypatch, steps, step_seconds, save_seconds, **config):
        self.clock, self.step_seconds, self.save_seconds, self.lost, self.fails = 0.0, step_seconds, save_seconds, [], False
        monkeypatch.setattr(checkpoint.time, "monotonic", lambda: self.clock)
        self.trainer = SimpleNamespace(
            global_step=0, num_training_batches=steps, accumulate_grad_batches=1, is_global_zero=True, global_rank=0,
            loggers=[], save_checkpoint=self.save, strategy=SimpleNamespace(barrier=lambda: None),
        )
        self.saver = Checkpointer(CheckpointConfig(**config), folder, {})
        self.saves, self.at = [], 0

    def save(self, path, storage_options):
        self.clock += self.save_seconds
        if self.fails:
            raise OSError(30, "Read-only file system")
        self.saves.append((self.clock, self.trainer.global_step))

    def train(self):
        self.saver.on_train_start(self.trainer, None)
        for batch in range(self.trainer.num_training_batches):
            self.clock += self.step_seconds
            self.trainer.global_step += 1
            self.saver.on_train_batch_end(self.trainer, None, None, None, batch)
        self.saver.teardown(self.trainer, None, "fit")
        return self

    def gaps(self):
        """The longest time and the most steps from one save to the next."""
        times, steps = zip((0.0, 0), *self.saves, (self.clock, self.trainer.global_step), strict=True)
        return (max(b - a for a, b in zip(each, each[1:], strict=False)) for each in (times, steps))


@pytest.mark.parametrize(
    ("steps", "step_seconds", "save_seconds"),
    [(36000, 10.0, 4.0), (20000, 0.5, 2.0), (3600, 1.0, 0.1)], ids=["100 hours", "3 hours", "an hour"],
)
def test_a_fault_costs_ten_minutes_or_a_fiftieth_of_an_epoch_at_most(tmp_path, monkeypatch, steps, step_seconds, save_seconds):
    run = Run(tmp_path, monkeypatch, steps, step_seconds, save_seconds).train()
    seconds, lost = run.gaps()
    assert seconds <= 600 + step_seconds + save_seconds and lost <= 0.02 * steps + 1
    assert len(run.saves) * save_seconds <= 0.03 * run.clock


def test_a_share_of_a_short_epoch_waits_for_a_minute(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, 600, 1.0, 0.1).train()
    times = [time for time, _ in run.saves]
    assert len(times) == 9 and all(60 <= b - a < 62 for a, b in zip(times, times[1:], strict=False))


def test_saves_that_take_long_are_rarer(tmp_path, monkeypatch):
    """30 s for each, where a fiftieth of the epoch is 72 s."""
    run = Run(tmp_path, monkeypatch, 3600, 1.0, 30.0).train()
    assert len(run.saves) >= 3 and (len(run.saves) - 1) * 30 <= 0.03 * run.clock


def test_a_save_that_failed_is_tried_again_after_ten_minutes(tmp_path, monkeypatch):
    run = Run(tmp_path, monkeypatch, 3600, 1.0, 0.1, fallback=str(tmp_path / "other"))
    run.fails = True
    with pytest.raises(EnvironmentFault, match=r"Read-only file system.*other/.* cannot be written either"):
        run.train()
    assert run.clock == pytest.approx(72 + 2 * 600 + 0.4, abs=2)


def full_on_rank_0(rank, folder):
    """What a rank ends with, at which step, the folders its saves were to go to, and how many ranks still answer then."""
    asked = []

    def save(path, storage_options):
        asked.append(path.parent.name)
        if rank == 0 and path.parent.name == "checkpoints":
            raise OSError(28, "No space left on device")
        barrier()                                   # Lightning's, behind a save

    trainer = SimpleNamespace(
        global_step=0, is_global_zero=rank == 0, global_rank=rank, loggers=[], save_checkpoint=save,
        strategy=SimpleNamespace(root_device="cpu", barrier=barrier),
    )
    saver = Checkpointer(CheckpointConfig(fallback=str(folder / "other")), folder / "run", {})
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    try:
        for trainer.global_step in range(1, 9):
            saver.save(trainer)
    except (EnvironmentFault, SystemExit) as error:
        return f"{type(error).__name__} {error}", trainer.global_step, asked, all_reduce(torch.ones(1)).item()


def test_ranks_agree_that_the_first_ones_disk_is_full(tmp_path):
    first, second = run_ranks(full_on_rank_0, tmp_path)
    assert first[1:] == second[1:] == (3, ["checkpoints"] * 3 + ["run"], 2)
    assert second[0] == "SystemExit 0"              # one voice
    assert "No space left on device" in first[0] and first[0].startswith("EnvironmentFault")
    assert first[0].endswith(f"this step is saved elsewhere: go on with resume={tmp_path}/other/run/step-000000003.ckpt")


def test_a_full_disk_without_the_folder_is_a_line_as_well(tmp_path, monkeypatch):
    run = Run(tmp_path / "runs" / "run", monkeypatch, 8, 1.0, 0.1, minutes=0, fallback=str(tmp_path / "other"))
    full = OSError(28, "No space left on device")
    assert run.saver._reason(full).startswith("No space left on device (the last one has 0.0 MB, ")

    def stale(folder):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", stale)
    assert run.saver._reason(full) == "No space left on device"


@pytest.mark.parametrize("broken", ["prune", "write_link"])
def test_what_fails_behind_a_save_is_a_warning(tmp_path, monkeypatch, caplog, broken):
    run = Run(tmp_path, monkeypatch, 8, 1.0, 0.1, minutes=0)

    def fails(*arguments):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(checkpoint.store if broken == "prune" else checkpoint, broken, fails)
    run.train()
    assert [step for _, step in run.saves] == list(range(1, 8))
    said = [record.getMessage() for record in caplog.records]
    tail = "step-000000001.ckpt is saved, but tidying up behind it failed: Operation not permitted"
    assert len(said) == 7 and said[0].endswith(tail)


def test_a_given_fallback_may_be_shared_and_the_default_may_not(tmp_path, monkeypatch):
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    given = Run(tmp_path / "run", monkeypatch, 8, 1.0, 0.1, fallback=str(shared))
    assert given.saver._elsewhere(given.trainer, "step-1.ckpt").endswith(f"resume={shared}/run/step-1.ckpt")
    own = Run(tmp_path / "run", monkeypatch, 8, 1.0, 0.1)
    monkeypatch.setattr(checkpoint.tempfile, "gettempdir", lambda: str(tmp_path))
    shared.rename(tmp_path / f"solo-{checkpoint.os.getuid()}")
    assert "others may write to" in own.saver._elsewhere(own.trainer, "step-1.ckpt")


def heard(rank, numbers):
    guard = SignalGuard()
    guard._signal = numbers[rank]
    trainer = SimpleNamespace(global_rank=rank, strategy=SimpleNamespace(root_device="cpu"))
    return guard.agreed(trainer, rank == 1)


@pytest.mark.parametrize(
    ("numbers", "obeyed"),
    [((15, 10), 10), ((12, 15), 12), ((0, 15), 15), ((1, 15), 1), ((10, 12), 10)],
)
def test_a_warning_before_the_end_counts_for_more_than_the_end(numbers, obeyed):
    """A job that one rank calls ended and another warned is put back into the queue; else the first rank's word counts."""
    assert run_ranks(heard, numbers) == [(obeyed, True)] * 2
