"""Processes of a run, through `pretrain`, leave what one process with all their images leaves."""

import csv
import json
import signal

import numpy as np
import pytest
import pytorch_lightning as pl
import torch.distributed as dist
from PIL import Image

from solo import checkpoint
from solo.errors import DataError, Interrupted
from solo.experiment import experiment
from solo.nn import Teacher
from solo.run import pretrain
from solo.testing import Case, run_ranks
from solo.testing.case import BACKBONE
from solo.testing.compare import of
from tests.test_continuing import of_bad_images

pytestmark = pytest.mark.slow

# Nothing normalises by a batch, of which each process would take its own rows alone.
ALONE = {**BACKBONE, "kwargs": {**BACKBONE["kwargs"], "norm_layer": "groupnorm1"}}
METHODS = {
    "simclr": {"proj_hidden_dim": 16, "proj_output_dim": 8},
    "sce": {"proj_layers": 1, "proj_last_norm": False, "proj_output_dim": 8, "pred_hidden_dim": 0, "queue_size": 144},
}


class InDouble(pl.Callback):
    """Weights and what networks compute are float64, where sums in another order differ by next to nothing."""

    def setup(self, trainer, pl_module, stage):
        pl_module.double()
        self.start = state(pl_module)
        for network in (pl_module.backbone, *(teacher[0] for teacher in of(pl_module, Teacher).values())):
            network.register_forward_pre_hook(lambda module, args: (args[0].double(),))


def state(method):
    return {name: value.numpy(force=True).copy() for name, value in method.state_dict().items()}


def trained(rank, folder, method, processes, data, images, k=5):
    """The state before and after 2 epochs with so many images to a step, and what rank 0 logged."""
    case = Case(method, method_kwargs=METHODS[method], backbone=ALONE)
    config = case.experiment(
        folder / str(processes), devices=processes, optimizer={"batch_size": images // processes}, max_epochs=2,
        data={"size": None, "train_size": None, "classes": 10, **data}, knn={"enabled": True, "k": [k]},
    )
    double = InDouble()
    result = pretrain(config, [double])
    if rank:
        return double.start, state(result.method), None
    with next(result.run_dir.rglob("metrics.csv")).open() as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    return double.start, state(result.method), rows


def validated(row):
    return {name: value for name, value in row.items() if name.startswith("val/")}


def equal(folder, method, data, images, world=2, k=5):
    start, one, said = trained(0, folder, method, 1, data, images, k)
    for begin, two, heard in run_ranks(trained, folder, method, world, data, images, k, world=world):
        for name, value in one.items():
            assert np.array_equal(begin[name], start[name]) and not np.array_equal(value, start[name]), name
            np.testing.assert_allclose(two[name], value, rtol=0, atol=1e-11 * abs(value - start[name]).max(), err_msg=name)
        if heard is not None:
            assert heard == [pytest.approx(row, rel=1e-5) for row in said]          # losses in float32
            assert [validated(row) for row in heard] == [validated(row) for row in said]
    return said


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_leave_the_weights_and_metrics_of_one(method, tmp_path):
    """Of 70 digits each epoch leaves 16 out. Of 397 to validate with, one process has 199, in 23 batches, the last of 1 image,
    and the other 198, in 22."""
    said = equal(tmp_path, method, {"dataset": "digits", "train_size": 70}, 18)
    assert len(said) == 8 and sum("val/knn@5" in row and "val/probe_acc1" in row for row in said) == 2


def stripes(folder, counts):
    """Images of class ``a`` have upright stripes and those of ``b`` level ones, of as many widths. Features of so small a
    network differ by 2e-5: enough for the nearest one, but not for five, whose order would be that of rounding."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            wave = np.sin(np.arange(24) * (0.3 + 0.1 * i)) * 100 + 128
            grey = np.tile(wave, (20, 1)) if name == "a" else np.tile(wave[:20, None], (1, 24))
            Image.fromarray(grey.astype(np.uint8)).save(folder / name / f"{i}.png")


def test_a_process_without_an_image_to_validate_with(tmp_path):
    stripes(tmp_path / "train", {"a": 9, "b": 9})
    stripes(tmp_path / "val", {"a": 1, "b": 1})
    data = {"dataset": "image_folder", "train_path": str(tmp_path / "train"), "val_path": str(tmp_path / "val")}
    equal(tmp_path, "simclr", data, 6, world=3, k=1)


def probed(rank, folder, enabled):
    config = Case("simclr").experiment(folder, devices=3, max_epochs=1, data={"train_size": 96}, probe={"enabled": enabled})
    return state(pretrain(config).method)


def test_a_probe_changes_no_bit_of_three_processes(tmp_path):
    """Three numbers are added in an order that follows from a message's length: nothing may travel with DDP's gradient."""
    on, off = (run_ranks(probed, tmp_path / str(enabled), enabled, world=3) for enabled in (True, False))
    for one, other in zip(on, off, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)


class Knows(pl.Callback):
    """Which unreadable images a process knows of at the start and at the end; a signal comes to both at one step."""

    def __init__(self, stop):
        self.stop, self.names = stop, []

    def note(self, trainer):
        self.names.append(sorted(path[-8:] for path in trainer.datamodule.bad.names))

    def on_train_start(self, trainer, pl_module):
        self.note(trainer)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.stop:
            signal.raise_signal(signal.SIGTERM)

    def on_train_end(self, trainer, pl_module):
        self.note(trainer)


def met(rank, folder, limit, stop=None):
    """How a run of two processes ended, and what each knew."""
    knows, ended = Knows(stop), "complete"
    config = experiment(of_bad_images(folder, limit, devices=2, optimizer={"batch_size": 4, "lr": 0.1}))
    try:
        pretrain(config, [knows])
    except (DataError, Interrupted, SystemExit) as error:
        ended = f"{type(error).__name__} {error}"
        if dist.is_initialized():       # the other one has left: nothing to meet for
            dist.destroy_process_group()
    return ended, knows.names


def left(folder):
    """The unreadable images by the newest checkpoint, and by the list beside it."""
    (run,) = (folder / "runs").iterdir()
    listed = [json.loads(line)["name"][-8:] for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    return checkpoint.read(run)["unreadable"], sorted(listed)


def test_two_processes_count_unreadable_images_exactly_and_over_a_resume(tmp_path):
    """Of 4 in 64 each process meets its own, and both know all; after a signal at step 4 of 8 both know those from before."""
    of_bad_images(tmp_path)
    bad, (whole, halves, many) = ["0000.png", "0016.png", "0032.png", "0048.png"], "whole halves many".split()
    for name in (whole, halves, many):
        (tmp_path / name).mkdir()
        (tmp_path / name / "images").symlink_to(tmp_path / "images")
    assert run_ranks(met, tmp_path / whole, 0.1) == [("complete", [[], bad])] * 2
    assert left(tmp_path / whole)[1] == bad and set(left(tmp_path / whole)[0]) == {"0", "16", "32", "48"}

    for name, limit in ((halves, 0.1), (many, 3 / 64)):
        first, second = run_ranks(met, tmp_path / name, limit, 4)
        assert first[0].startswith("Interrupted SIGTERM") and second[0] == "SystemExit 0"
    kept, listed = left(tmp_path / halves)
    assert 0 < len(kept) < 4 and listed == [f"{int(index):04d}.png" for index in kept]
    assert run_ranks(met, tmp_path / halves, 0.1) == [("complete", [listed, bad])] * 2
    assert left(tmp_path / halves)[1] == bad and left(tmp_path / halves)[0] == left(tmp_path / whole)[0]
    first, second = run_ranks(met, tmp_path / many, 3 / 64)
    assert first[0].startswith("DataError 4 of 64 images cannot be read") and second[0] == "SystemExit 0"
