"""A run continued from any of its checkpoints sees exactly the images the uninterrupted run saw."""

import errno
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from solo.batch import Batch
from solo.data.module import DataConfig, DataModule
from solo.data.resume import SettledCounters
from solo.data.sources import ArraySource, EncodedSource, FakeSource, FolderSource, listing
from solo.data.tar import TarSource
from solo.data.views import Chance, ColorJitter, View
from solo.errors import ConfigError
from tests.data.common import make_folder

SIZE, BATCH, EPOCHS = 8, 8, 3
VIEWS = [View(crop_size=SIZE, horizontal_flip=Chance(prob=0.5), color_jitter=ColorJitter(prob=0.8, brightness=0.4, hue=0.1))]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


class Tracer(pl.LightningModule):
    """Learns nothing and writes down what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.trace: list[tuple[list[int], float]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.trace.append((batch.index.tolist(), batch.views[0].double().sum().item()))
        return self.weight.sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert len(batch.views) == 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Saver(pl.Callback):
    """Saves after every optimizer step and at the end of every epoch, if to a folder; ends the run after ``stop`` steps."""

    def __init__(self, folder: Path | None, stop_step: int | None = None) -> None:
        self.folder, self.stop_step = folder, stop_step
        self.saved: list[tuple[int, Path]] = []  # batches trained, file

    def on_train_batch_end(self, trainer: pl.Trainer, module: Tracer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self._save(trainer, "step")
        if self.stop_step is not None and trainer.global_step >= self.stop_step:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Tracer) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: pl.Trainer, kind: str) -> None:
        if self.folder is None:
            return
        path = self.folder / f"{kind}-{trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((trainer.fit_loop.epoch_loop.batch_progress.total.processed, path))


def run(
    folder: Path | None = None,
    engine: str = "fast",
    workers: int = 0,
    ckpt: Path | None = None,
    stop: int | None = None,
    **trainer_flags: Any,
) -> tuple[Tracer, Saver, pl.Trainer]:
    if folder is not None:
        folder.mkdir(exist_ok=True)
    config = DataConfig(dataset="fake", train_size=8 * BATCH + 5, size=SIZE, engine=engine, num_workers=workers)
    data = DataModule(config, VIEWS, BATCH, seed=3)
    model, saver = Tracer(), Saver(folder, stop)
    flags = {"max_epochs": EPOCHS, **trainer_flags}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[saver, SettledCounters()],
        **flags,
    )
    try:
        trainer.fit(model, datamodule=data, ckpt_path=ckpt)
    except (KeyboardInterrupt, SystemExit):
        assert stop is not None
    return model, saver, trainer


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    import logging

    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


FLAGS = {
    "plain": {},
    "no validation": {"limit_val_batches": 0},
    "accumulate": {"accumulate_grad_batches": 3},
    "max_steps": {"max_epochs": -1, "max_steps": 24},
    "short epochs": {"limit_train_batches": 5},
}


@pytest.mark.slow
@pytest.mark.parametrize("flags", FLAGS)
def test_every_checkpoint_continues_exactly(flags: str, tmp_path: Path) -> None:
    whole, saver, trainer = run(tmp_path / "whole", **FLAGS[flags])
    assert len(whole.trace) == (15 if flags == "short epochs" else 24)
    every = 1 if flags == "plain" else 2
    for trained, path in saver.saved[::-every]:
        model, _, resumed = run(ckpt=path, **FLAGS[flags])
        assert model.trace == whole.trace[trained:], path.name
        assert (resumed.global_step, resumed.current_epoch) == (trainer.global_step, trainer.current_epoch), path.name


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "workers"), [("torchvision", 0), ("torchvision", 2)])
def test_every_step_with_workers(engine: str, workers: int, tmp_path: Path) -> None:
    whole, saver, _ = run(tmp_path / "whole", engine, workers)
    steps = saver.saved if workers == 0 else saver.saved[::4]  # starting workers is what takes the time
    for trained, path in steps:
        assert run(None, engine, workers, ckpt=path)[0].trace == whole.trace[trained:], path.name


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["plain", "accumulate"])
@pytest.mark.parametrize("gap", [1, 8])
def test_stopped_and_continued_again_and_again(gap: int, flags: str, tmp_path: Path) -> None:
    whole, _, trainer = run(tmp_path / "whole", **FLAGS[flags])
    trace, path, step = [], None, 0
    while step < trainer.global_step:
        model, _, part = run(tmp_path / "chain", ckpt=path, stop=step + gap, **FLAGS[flags])
        assert part.global_step > step
        trace += model.trace
        step = part.global_step
        path = tmp_path / "chain" / f"step-{step}.ckpt"
    assert trace == whole.trace


def test_a_finished_run_has_nothing_left(tmp_path: Path) -> None:
    _, saver, _ = run(tmp_path)
    for _, path in saver.saved[-2:]:
        assert run(ckpt=path)[0].trace == []


def test_workers_and_number_of_them_change_nothing() -> None:
    traces = [run(None, "torchvision", workers, max_epochs=1)[0].trace for workers in (0, 1, 2)]
    assert traces[0] == traces[1] == traces[2]


def test_epochs_differ_and_each_visits_every_image_once() -> None:
    trace = run()[0].trace
    epochs = [[i for index, _ in trace[e * 8 : e * 8 + 8] for i in index] for e in range(EPOCHS)]
    assert all(len(set(epoch)) == len(epoch) == 64 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_another_batch_size_or_seed_cannot_continue(tmp_path: Path) -> None:
    config = DataConfig(dataset="fake", train_size=64, size=SIZE)
    state = DataModule(config, VIEWS, 8, seed=3).state_dict()
    with pytest.raises(ConfigError) as caught:
        DataModule(config, VIEWS, 16, seed=4).load_state_dict(state)
    assert "optimizer.batch_size x devices is 16, it was 8" in str(caught.value)
    assert "seed is 4, it was 3" in str(caught.value)


def edited(root: Path, change: str) -> Path:
    """A copy of six images in which one thing is another."""
    paths = make_folder(root, {"a": 3, "b": 3})
    first = paths[0]
    if change == "name":
        first.rename(first.with_name("0000a.png"))  # in the same place of the list
    elif change == "label":
        (root / "a").rename(root / "c")
    elif change == "size":
        first.write_bytes(first.read_bytes() + b"\0")
    return root


@pytest.mark.parametrize("change", ["nothing", "name", "label", "size"])
def test_other_images_cannot_continue_unless_they_are_accepted(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As many images, elsewhere: what counts are their names, labels and sizes."""

    def data(folder: Path, **more: bool) -> DataModule:
        return DataModule(DataConfig(dataset="image_folder", train_path=str(folder), **more), VIEWS, 2, seed=3)

    state = data(edited(tmp_path / "before", "nothing")).state_dict()
    after = edited(tmp_path / "after", change)
    if change == "nothing":
        data(after).load_state_dict(state)
        return
    with pytest.raises(ConfigError, match="other names, labels or sizes than .*data.accept_changed=true") as said:
        data(after).load_state_dict(state)
    assert "\n" not in str(said.value)
    accepted = data(after, accept_changed=True)
    accepted.load_state_dict({**state, "epoch": 1, "batch": 2})
    assert len(list(accepted.train_dataloader())) == 1 and "other names, labels or sizes" in caplog.text


def test_every_source_lists_its_images(tmp_path: Path) -> None:
    """Twice the same text, and another one for other images; sizes of a folder are asked for evenly."""
    files = [path.read_bytes() for path in make_folder(tmp_path / "a", {"x": 4})]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "a", "a")
    bounds, labels = np.cumsum([0, *map(len, files)]), np.zeros(4, np.int64)
    packed = np.frombuffer(b"".join(files), np.uint8)
    makers = [
        lambda n: FakeSource(n, 8, 2, 3, seed=1),
        lambda n: ArraySource(np.zeros((4, n, 8, 3), np.uint8), labels, ["x"]),
        lambda n: EncodedSource(packed, bounds, np.arange(4)[-n:], labels[-n:], ["x"], 3, tmp_path / "a.npz"),
        lambda n: TarSource(tmp_path / "a.tar", "a" if n == 4 else "b", 3, "key"),
        lambda n: FolderSource(tmp_path / ("a" if n == 4 else "b"), 3, "key"),
    ]
    make_folder(tmp_path / "b", {"x": 3})
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        archive.add(tmp_path / "b", "b")
    for make in makers:
        assert listing(make(4)) == listing(make(4)) != listing(make(3))
    assert len({listing(make(4)) for make in makers}) == len(makers)
    images = np.zeros((4, 8, 8, 3), np.uint8)
    kinds = [(labels, ["x", "y"]), (labels + 1, ["x", "y"]), (labels, ["x", "z"])]
    assert len({listing(ArraySource(images, *kind)) for kind in kinds}) == 3


@pytest.mark.parametrize("times, whole", [(2, True), (9, False)])
def test_a_passing_error_is_no_change_of_an_image_and_a_lasting_one_ends_nothing(
    times: int, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be reached counts as a bad image does, so a rank or a run that reaches it again lists others."""
    make_folder(tmp_path, {"a": 2, "b": 2})
    source = FolderSource(tmp_path, 3, "data.train_path")
    before, errors, stat = listing(source), iter([OSError(errno.ESTALE, "Stale file handle")] * times), Path.stat

    def stale(path: Path, **options: bool) -> os.stat_result:
        if path.suffix == ".png" and (error := next(errors, None)):
            raise error
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", stale)
    monkeypatch.setattr("solo.data.reads.time.sleep", lambda seconds: None)
    assert (listing(source) == before) is whole
