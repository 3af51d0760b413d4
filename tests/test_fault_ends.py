"""How each fault of the catalogue that ends a run reads (G11): its exit code, one line, no traceback.

Here are those whose own test stops at the error that is raised; docs/reliability.md names the test of each other one.
"""

import copy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import get_worker_info

from solo import checkpoint, config, start
from solo.data.engines import workers
from solo.data.module import DataModule
from solo.data.sources import FakeSource
from solo.errors import reported
from solo.experiment import experiment
from solo.lease import owning
from solo.run import pretrain
from tests.conftest import ROOT
from tests.data.common import make_folder
from tests.tiny import values

KINDS = {2: "config error: ", 3: "data error: ", 4: "numerics error: ", 5: "environment error: "}
QUIET = {"loggers": [], "knn": {"enabled": False}}


class At(pl.Callback):
    """Does something in one of Lightning's hooks."""

    def __init__(self, hook, act):
        setattr(self, hook, lambda trainer, module, *rest: act(trainer, module, *rest))


class World(SimpleNamespace):
    """A test's folder, its patches, and ``saved``: the folder of a run that has made the first of its two epochs."""

    def content(self, method="nnclr", **changes):
        return values(method, self.folder / "runs", **{**QUIET, "max_epochs": 2, **changes})

    def train(self, *callbacks, method="nnclr", **changes):
        pretrain(experiment(self.content(method, **changes)), callbacks)

    def images(self, *classes, part="train", bad=0):
        paths = make_folder(self.folder / "images" / part, dict.fromkeys(classes, 32 // len(classes)), (16, 16))
        for path in paths[:bad]:
            path.write_bytes(b"no image")
        return {"dataset": "image_folder", "train_path": str(self.folder / "images" / "train"), "train_size": None}

    def edited(self, change):
        """The checkpoint of the run, changed, as a file by itself."""
        state = copy.deepcopy(checkpoint.read(next(self.saved.glob("checkpoints/*.ckpt"))))
        change(state)
        torch.save(state, self.folder / "edited.ckpt")
        return str(self.folder / "edited.ckpt")

    def in_a_worker(self, act, **options):
        """Train with a worker that does this where it should load an image."""
        load = FakeSource.load

        def struck(source, i):
            if get_worker_info():
                act()
            return load(source, i)

        self.patch.setattr(FakeSource, "load", struck)
        self.train(data={"engine": "torchvision", "num_workers": 1, **options})


FAULTS = {}


def fault(number, code, said):
    """Register what lets a fault happen, the exit code, and what its line says."""

    def add(act):
        FAULTS[f"{number} {act.__name__}"] = (act, code, said)
        return act

    return add


@fault("A11", 5, r"runs/.* cannot be written: No space left on device \(.*, \S+ MB are free\); the last checkpoint stays; ")
def disk_full(world):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    world.patch.setattr(checkpoint, "save", full)
    world.train(checkpoint={"minutes": 0, "fallback": str(world.folder / "other")})


@fault("A18", 2, r"no valid checkpoint is left")
def all_damaged(world):
    shutil.copytree(world.saved.parent, world.folder / "runs", symlinks=True)
    for path in (world.folder / "runs").glob("*/checkpoints/*.ckpt"):
        path.write_bytes(b"")
    world.train(max_steps=8)


@fault("A19", 5, r"runs/\S+ belongs to process \d+")
def second_job(world):
    with subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) as other:
        run_dir = experiment(world.content()).run_dir(8)
        with world.patch.context() as patch:
            patch.setattr(os, "getpid", lambda: other.pid)
            owned = owning(run_dir)
            owned.__enter__()
        world.train()


@fault("A21", 5, r"rank 0 does not see .*none.ckpt, which rank 0 does: all nodes need one file system")
def file_unseen(world):
    world.patch.setattr(start, "_PATIENCE", 0.0)
    start._wait_for(world.folder / "none.ckpt", 3)


@fault("A24", 4, r"step 3\b")
def weights_not_finite(world):
    def poison(trainer, module, *_):
        if trainer.global_step == 3:
            next(module.projector.parameters()).data.fill_(float("nan"))

    world.train(At("on_train_batch_end", poison), checkpoint={"minutes": 0})


@fault("B11", 2, r"optimizer.batch_size x devices is 4, it was 8 when the checkpoint was saved")
def other_batch(world):
    world.train(optimizer={"batch_size": 4}, resume=str(world.saved))


@fault("B14", 2, r"config.json cannot be loaded as tensors and plain values: .* \(there: \S+/last.ckpt\)")
def no_checkpoint(world):
    world.train(resume=str(world.saved / "config.json"))


@fault("B15", 2, r"was written by method 'nnclr', but method=all4one")
def other_method(world):
    world.train(method="all4one", resume=str(world.saved))


@fault("B16", 2, r"edited.ckpt is of checkpoint format 99, written by solo ")
def other_format(world):
    world.train(resume=world.edited(lambda s: s.update(solo=json.dumps({**json.loads(s["solo"]), "format": 99}))))


@fault("B17", 2, r"edited.ckpt cannot be continued: .*group")
def other_groups(world):
    world.train(resume=world.edited(lambda s: s["optimizer_states"][0]["param_groups"].reverse()))


@fault("C1", 3, r"of 32 images cannot be read, more than data.max_bad_fraction=0.01; listed in \S+bad_samples.jsonl")
def bad_images(world):
    world.train(data={**world.images("a", "b", bad=3), "num_workers": 0, "engine": "torchvision"})


@fault("C9", 2, r"the training images have other names, labels or sizes than when the checkpoint was saved: ")
def other_images(world):
    world.patch.setattr(DataModule, "listing", "others")
    world.train(resume=str(world.saved))


@fault("C10", 2, r"data.val_path has other classes than data.train_path \(only in training: b; only in validation: c\)")
def other_classes(world):
    world.images("a", "c", part="val")
    world.train(data=world.images("a", "b"))


@fault("C11", 5, r"rank 0: a data worker ended .*; waiting for the batch that begins with \d+; out of memory")
def worker_killed(world):
    world.in_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL))


@fault("C12", 5, r"rank 0: no batch from a data worker within data.timeout=0.4 s; waiting for the batch that begins with \d+$")
def worker_stuck(world):
    world.in_a_worker(lambda: time.sleep(0.8), timeout=0.4)


@fault("C13", 5, r"rank 0: a data worker ended .*; waiting for the batch that begins with \d+; out of memory")
def worker_gone(world):
    world.in_a_worker(lambda: os._exit(1), timeout=0.6)


@fault("C14", 5, r"of shared memory, /dev/shm has 0 MiB free: lower data.num_workers")
def shared_memory(world):
    world.patch.setattr(workers, "free_shared_memory", lambda: 1000)
    world.in_a_worker(lambda: None)


@fault("C15", 5, r"rank 0: too many open files: raise the limit, ulimit -n, or lower data.num_workers")
def open_files(world):
    def refused(*_):
        raise RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)")

    world.patch.setattr(torch.Tensor, "share_memory_", refused)
    world.in_a_worker(lambda: None)


@fault("C17", 3, r"data.train_path=\S+x.h5 cannot be read: ")
def no_hdf5(world):
    (world.folder / "x.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    world.train(data={"dataset": "hdf5", "train_path": str(world.folder / "x.h5"), "train_size": None})


@fault("C19", 2, r"data.train_path=\S+gone.tar")
def shard_missing(world):
    world.train(data={"dataset": "tar", "train_path": str(world.folder / "gone.tar"), "train_size": None})


@fault("C19", 3, r"none of .* images tried can be read")
def shard_cut(world):
    with tarfile.open(world.folder / "x.tar", "w") as archive:
        for i in range(16):
            member = tarfile.TarInfo(f"a/{i}.png")
            member.size = 512
            archive.addfile(member, io.BytesIO(bytes(512)))
    world.train(data={"dataset": "tar", "train_path": str(world.folder / "x.tar"), "train_size": None})


@fault("C26", 2, r"data.train_path: 1 labels lie outside 0..0, the first: 3 of image 1$")
def label_out_of_range(world):
    arrays = {"jpeg": np.zeros(10, np.uint8), "offsets": np.array([0, 5, 10]), "labels": np.array([0, 3], np.uint8)}
    np.savez(world.folder / "x.npz", **arrays, split=np.zeros(2, np.uint8), classes=np.array(["a"]))
    world.train(data={"dataset": "npz", "train_path": str(world.folder / "x.npz"), "train_size": None})


@fault("D1", 4, r"non-finite loss of NNCLR at step 2 .*views\[0\].*weights are those of step 1;")
def loss_not_finite(world):
    def poison(trainer, module, batch, *_):
        if trainer.global_step == 1:
            batch.views[0].fill_(float("nan"))

    world.train(At("on_train_batch_start", poison))


@fault("D2", 4, r"non-finite gradient of NNCLR at step 1 .*\.grad")
def gradient_not_finite(world):
    world.train(At("on_after_backward", lambda trainer, module: next(module.parameters()).grad.fill_(float("inf"))))


@fault("F1", 2, r"unknown key optimizer.lrr: did you mean optimizer.lr\?")
def unknown_key(world):
    (world.folder / "x.yaml").write_text(json.dumps(world.content()).replace('"lr"', '"lrr"'))
    experiment(config.load(world.folder / "x.yaml"))


@fault("F4", 2, r"x.yaml is not valid YAML.*duplicate key seed")
def key_twice(world):
    (world.folder / "x.yaml").write_text("seed: 1\nseed: 2\n")
    config.load(world.folder / "x.yaml")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run that has made one of two epochs."""
    folder = tmp_path_factory.mktemp("saved")
    return pretrain(experiment(values("nnclr", folder, **QUIET, max_epochs=2, max_steps=8))).run_dir


@pytest.mark.parametrize("name", FAULTS)
def test_it_ends_with_its_code_and_line(name, saved, tmp_path, monkeypatch, capfd):
    act, code, said = FAULTS[name]
    with pytest.raises(SystemExit) as left, reported():
        act(World(folder=tmp_path, patch=monkeypatch, saved=saved))
    monkeypatch.undo()
    written = capfd.readouterr().err
    lines = [line for line in written.splitlines() if line.startswith(KINDS[code])]
    assert left.value.code == code and "Traceback" not in written, written
    assert any(re.search(said, line) for line in lines), written
    assert len(lines) == 1 or name.startswith("A18"), written           # which has a line for each checkpoint


CATALOGUE = {"A": 25, "B": 20, "C": 26, "D": 10, "E": 12, "F": 8}        # numbers of faults of each part


def test_the_page_says_of_every_fault_how_it_ends_a_run_and_where_that_is_tested():
    page = (ROOT / "docs" / "reliability.md").read_text().split("### How each fault ends a run (G11)")[1].split("\n### ")[0]
    rows = {row[0]: row for row in re.findall(r"^\| ([A-F]\d+) \| (.+?) \| .* \| (.+?) \|$", page, re.MULTILINE)}
    others = re.findall(r"\b[A-F]\d+\b", page.split("These do not end a run")[1])
    every = [f"{part}{number + 1}" for part, count in CATALOGUE.items() for number in range(count)]
    assert sorted([*rows, *others]) == sorted(every)
    for number, code, tests in rows.values():
        assert re.fullmatch(r"[2345](, [23])?|130|143|128 \+ n|the error's; 1", code), number
        for file, _, function in re.findall(r"`([\w/]+\.py)(::(\w+))?`", tests):
            source = (ROOT / "tests" / file).read_text()
            assert not function or f"def {function}(" in source, f"{number}: no {function} in tests/{file}"
    told = {name.split()[0]: str(code) for name, (_, code, _) in FAULTS.items()}
    assert all(code in rows[number][1] and "test_fault_ends.py" in rows[number][2] for number, code in told.items())
    here = {number for number, _, tests in rows.values() if "test_fault_ends.py" in tests}
    assert here - {*told, "A12", "D6"} == set()         # which another one's line is
