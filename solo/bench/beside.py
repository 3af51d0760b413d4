"""E1-E3: epochs of a recipe in turn with epochs of the same recipe as solo-learn runs it, and how busy ours keep the GPU."""

import json
import tarfile
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import Dataset

from solo.backbones import BackboneConfig
from solo.batch import Batch
from solo.bench.baselines.pil import PILBaseline
from solo.bench.device import compare
from solo.bench.epochs import RECIPES, UNJUDGED, EpochClock, now
from solo.bench.measure import Comparison, Row, row
from solo.bench.recipe import Step, Update
from solo.bench.step import correctness
from solo.config import load
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.engines import Job, Payload, Slot
from solo.data.engines.workers import Workers, worker_count
from solo.data.loaders import Order, Position
from solo.data.module import DataModule
from solo.errors import ConfigError, EnvironmentFault
from solo.experiment import Experiment, experiment
from solo.run import build, pretrain

WORKERS = (4, 16)           # solo-learn's recipes have 4; 16 are what it can be given
_LARGE = "scripts/pretrain/imagenet-100/nnclr.yaml"
_IMAGES = 100 * 256         # of an epoch at 224 px: the peer's workers begin anew with each, as published
_PROFILED = 50              # steps
_PRECISIONS = {"bf16-mixed": torch.bfloat16, "32-true": torch.float32}
_TINY = BackboneConfig(kwargs={"channels": [16, 16, 16, 32], "layers": [1, 1, 1, 1]})


# --- as the field runs it -----------------------------------------------------------------------------------------------


class _Maker(Dataset):
    """Makes a whole batch from its slot, in a worker."""

    def __init__(self, job: Job) -> None:
        self._baseline, self._labels = PILBaseline(job), job.source.labels

    def __getitem__(self, slot: Slot) -> Payload:
        batch = Batch(
            self._baseline.batch(slot.samples), torch.from_numpy(self._labels[slot.samples]), torch.from_numpy(slot.samples)
        )
        return Payload(batch, [])


class Published:
    """A recipe's training as solo-learn runs it: torchvision on PIL in worker processes, and the step as published.

    Its workers begin anew with each epoch, as they do there. Not here: Lightning, logging and the online classifier, which
    would only take longer.

    Args:
        config: of the recipe.
        job: its images, in memory where they are small, and views.
        workers: processes, or 0 to make the batches in this one.
        device: where it trains.

    Raises:
        ConfigError: the recipe computes in a precision that the step as published does not know here.
    """

    def __init__(self, config: Experiment, job: Job, workers: int, device: str) -> None:
        precision = str(config.trainer.get("precision", "32-true"))
        if precision not in _PRECISIONS:
            raise ConfigError(f"precision={precision}: beside the published step it must be {' or '.join(_PRECISIONS)}")
        self.update = Update(build(config), None, _PRECISIONS[precision], device)
        self._job = replace(job, config=replace(job.config, num_workers=workers))
        self._order = Order(config.seed, len(job.source), config.optimizer.batch_size, 0, 1)
        self._epochs = count()

    def epoch(self) -> None:
        """Train one."""
        for batch in self._batches(Position(next(self._epochs), 0)):
            device = self.update.device
            views = [view.to(device, non_blocking=True, memory_format=torch.channels_last) for view in batch.views]
            self.update.on(Batch(views, batch.labels.to(device, non_blocking=True), batch.index))

    def _batches(self, start: Position) -> Generator[Batch, None, None]:
        engine = Workers(self._job, _Maker(self._job), view_bytes=4)
        try:
            with closing(engine.batches(self._order.epoch(start))) as payloads:
                for payload in payloads:
                    yield payload.batch
        finally:
            engine.close()


# --- observers of ours --------------------------------------------------------------------------------------------------


class Turns(EpochClock):
    """After each epoch of ours one of another's, in turn: A B A C A B ...

    Args:
        others: train an epoch each.
        rounds: how often each has its turn.

    Attributes:
        pairs: for each of the others, the seconds of an epoch of ours and of the one after it.
    """

    def __init__(self, others: Sequence[Callable[[], object]], rounds: int) -> None:
        super().__init__()
        self._others, self._rounds = others, rounds
        self.pairs: list[list[tuple[float, float]]] = [[] for _ in others]

    def on_train_epoch_end(self, *words: Any) -> None:
        super().on_train_epoch_end(*words)
        done, which = divmod(len(self.seconds) - 1, len(self._others))
        if done < self._rounds:
            began = now()
            self._others[which]()
            self.pairs[which].append((self.seconds[-1], now() - began))
            ours, theirs = self.pairs[which][-1]
            print(f"epoch {len(self.seconds)}: {ours:.3f} s, the peer's {theirs:.3f} s", flush=True)


class Busy(pl.Callback):
    """For which share of the time the device computes, over some steps of an epoch that nobody times.

    The profiler takes time of its own, so that it may be more.

    Args:
        epoch: which, from 0.
    """

    share: float | None = None          # None: the profiler has seen nothing

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._profile: profile | None = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self._epoch and batch_idx == self._first(trainer):
            now()
            self._profile = profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU])
            self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = min(self._first(trainer) + _PROFILED, int(trainer.num_training_batches)) - 1
        if self._profile is not None and batch_idx == last:
            now()
            self._profile.stop()
            try:
                self.share = computing(_events(self._profile))
            except EnvironmentFault as fault:       # the epochs that were timed are worth their rows
                print(f"no share of time busy: {fault}", flush=True)
            self._profile = None

    def _first(self, trainer: pl.Trainer) -> int:
        """Not the epoch's first steps, for which batches lie ready."""
        return int(trainer.num_training_batches) // 10


def computing(events: Sequence[dict[str, Any]]) -> float:
    """The share of the time from the first to the last kernel in which one runs.

    Args:
        events: as ``torch.profiler`` writes them to a file, in microseconds; a CPU's operations count where no kernel ran.

    Raises:
        EnvironmentFault: none has been recorded.
    """
    spans: dict[str, list[tuple[float, float]]] = {"kernel": [], "cpu_op": []}
    for event in events:
        if (kind := event.get("cat")) in spans:
            spans[kind].append((event["ts"], event["ts"] + event["dur"]))
    computed = sorted(spans["kernel"] or spans["cpu_op"])
    if not computed:
        raise EnvironmentFault("torch.profiler has recorded no operation: another profiler may hold the GPU's counters")
    busy, end = 0.0, computed[0][0]
    for begins, ends in computed:
        busy += max(0.0, ends - max(begins, end))
        end = max(end, ends)
    return float(busy / (end - computed[0][0]))


def _events(profiled: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(file))
        found: list[dict[str, Any]] = json.loads(file.read_bytes())["traceEvents"]
    return found


# --- rows ---------------------------------------------------------------------------------------------------------------


def small(id: str, method: str, overrides: list[str], device: str, rounds: int) -> list[Row]:
    """E1 and E2: a CIFAR-10 recipe."""
    print(correctness(method), flush=True)
    workers = sorted({worker_count(wanted) for wanted in WORKERS}) if device == "cuda" else [0]
    return _epochs(id, f"{method}, CIFAR-10 recipe", RECIPES / f"{method}.yaml", overrides, device, workers, rounds)


def large(images: Path, overrides: list[str], device: str, rounds: int) -> list[Row]:
    """E3: ResNet-50 at 224 px from the JPEGs of a ``.tar``, repeated where they are fewer than an epoch takes on a GPU."""
    held = len(DATASETS["tar"].open(DataConfig(dataset="tar", train_path=str(images)), True) or ())
    workers = worker_count(max(WORKERS)) if device == "cuda" else 0
    with tempfile.TemporaryDirectory() as folder:
        if device == "cuda" and held < _IMAGES:
            print(f"{images}: {held} images, repeated to {_IMAGES}", flush=True)
            images = repeated(images, Path(folder) / "repeated.tar", -(-_IMAGES // held))
        taken = _IMAGES if device == "cuda" else held
        settings = ["backbone.name=resnet50", "optimizer.batch_size=256", "devices=1", "data.dataset=tar"]
        settings += [f"data.train_path={images}", f"data.train_size={taken}", f"data.num_workers={workers}", *overrides]
        return _epochs("E3", "nnclr, ResNet-50 at 224 px, from JPEGs", Path(_LARGE), settings, device, [workers], rounds)


def repeated(images: Path, file: Path, times: int) -> Path:
    """``file``, written: each image of a ``.tar`` so many times, in folders of the same classes."""
    with tarfile.open(images) as source, tarfile.open(file, "w") as target:
        members = [member for member in source if member.isfile()]
        for i in range(times):
            for member in members:
                kept = tarfile.TarInfo(str(Path(member.name).with_name(f"{i}-{Path(member.name).name}")))
                kept.size = member.size
                target.addfile(kept, source.extractfile(member))
    return file


def synthetic(device: str, pairs: int) -> list[Row]:
    """E3's step alone, on images that are there already."""
    shape: dict[str, Any] = {"batch": 256, "backbone": BackboneConfig(name="resnet50"), "size": 224}
    steps = 20
    if device == "cpu":
        shape, steps = {"batch": 2, "backbone": _TINY, "size": 32, "queue_size": 16}, 1
    ours, theirs = (
        Step("nnclr", mode=mode, precision=torch.bfloat16, device=device, **shape) for mode in ("separate", None)
    )
    found = compare(lambda _: ours(), lambda _: theirs(), pairs, steps, device)
    found = Comparison(tuple((shape["batch"] * a, shape["batch"] * b) for a, b in found.measured))
    what = f"nnclr, step on synthetic images of {shape['size']} px, {shape['backbone'].name}, batch {shape['batch']} (E3)"
    return [row("ES", what, "images/s", "as published", found)]


def _epochs(
    id: str, what: str, recipe: Path, overrides: list[str], device: str, workers: Sequence[int], rounds: int
) -> list[Row]:
    epochs = len(workers) * (rounds + 1) + 1        # a first round to warm up, and one epoch under the profiler
    config = experiment(load(recipe, [*UNJUDGED, f"max_epochs={epochs}", *overrides]))
    data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, config.seed)
    images = len(data.selected) // data.batch_size * data.batch_size
    others = [Published(config, data.job, each, device) for each in workers]
    turns, busy = Turns([other.epoch for other in others], rounds + 1), Busy(epochs - 1)
    pretrain(config, [turns, busy])
    timed = turns.seconds[len(workers) : -1]
    seconds = float(np.mean(timed))
    span = f"epochs {len(workers) + 1} to {epochs - 1}"
    rows = [
        Row(id, f"{what}, {span}, end to end (wall)", images / seconds, "images/s"),
        Row(id, f"{what}, {span}, end to end (wall)", seconds, "s/epoch"),
    ]
    if busy.share is not None:
        rows.append(Row(id, f"{what}, an epoch under the profiler", 100 * busy.share, "% busy"))
    for each, pairs in zip(workers, turns.pairs, strict=True):
        found = Comparison(tuple((images / a, images / b) for a, b in pairs[1:]))
        peer = f"solo-learn's pipeline and step, {each} workers"
        rows.append(row(id, f"{what}, epochs in turn (wall)", "images/s", peer, found))
    return rows
