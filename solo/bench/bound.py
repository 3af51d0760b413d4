"""Which part of a training run is the slowest on this machine, and what to do about it."""

import os
import statistics
import time
from itertools import islice
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from solo.batch import Batch
from solo.data.datasets import DATASETS
from solo.data.decoding import BadImage
from solo.data.engines import Job
from solo.data.engines.small import SmallEngine
from solo.data.engines.workers import same
from solo.data.loaders import Order, Position
from solo.data.sources import ArraySource
from solo.devices import settle
from solo.experiment import Experiment
from solo.run import build

_CPU_BATCH = 32
ADVICE = {
    "augment": "raise data.threads; without numba: pip install 'solo-ssl[fast]'",
    "transfer": "uint8 views would need a quarter of the bytes; see whether other processes use the bus",
    "step": "the data keeps up: a faster device, precision=bf16-mixed or more devices help, data.threads does not",
}


def bound(config: Experiment, job: Job, augmented: float) -> str:
    """A table of images/s of every stage and the advice for the slowest one.

    Args:
        augmented: images per CPU second of one engine thread.
    """
    rates = {"augment": augmented * min(job.config.threads, os.cpu_count() or 1)}
    if torch.cuda.is_available():
        rates["transfer"] = _transfer(job)
    rates["step"] = _step(config, job)
    slowest = min(rates, key=lambda stage: rates[stage])
    lines = [f"  {stage:9} {value:12,.0f} images/s" for stage, value in rates.items()]
    if not torch.cuda.is_available():
        lines.insert(1, "  transfer  there is no GPU to measure it")
    once = _decode(config)
    lines.insert(0, f"  decode    {'in memory already' if once is None else f'{once:12,.0f} images/s, once: then kept'}")
    return "\n".join([*lines, f"bound: {slowest}: {ADVICE[slowest]}"])


def _decode(config: Experiment) -> float | None:
    source = DATASETS[config.data.dataset].open(config.data, True)
    if source is None or isinstance(source, ArraySource):
        return None
    began, count = time.process_time(), min(512, len(source))
    for i in range(count):
        try:
            source.load(i)
        except BadImage:
            continue
    return count / (time.process_time() - began)


def _batches(job: Job, size: int, count: int) -> list[Batch]:
    order = Order(job.seed, len(job.source), size, 0, 1)
    return [payload.batch for payload in SmallEngine(job).batches(islice(order.onwards(Position(0, 0)), count))]


def _transfer(job: Job) -> float:
    views, copies = _batches(job, 256, 1)[0].views, 20

    def send() -> None:
        for view in views:
            view.cuda(non_blocking=True)
        torch.cuda.synchronize()

    send()
    began = time.monotonic()
    for _ in range(copies):
        send()
    return copies * 256 / (time.monotonic() - began)


class _Stopwatch(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = self._now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(self._now() - self._began)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.monotonic()


def _step(config: Experiment, job: Job) -> float:
    """Images/s of the recipe's method by wall time: the median step after a warm-up; a small batch where there is no GPU."""
    size, steps = (config.optimizer.batch_size, 20) if torch.cuda.is_available() else (_CPU_BATCH, 3)
    given = {key: value for key, value in config.trainer.items() if key in ("accelerator", "precision")}
    arguments, _ = settle({**given, "devices": 1, "max_epochs": 1})
    watch = _Stopwatch()
    for key in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        arguments[key] = False
    batches = DataLoader(cast(Dataset, _batches(job, size, steps + 1)), batch_size=None, collate_fn=same)
    pl.Trainer(**arguments, callbacks=[watch]).fit(build(config), train_dataloaders=batches)
    return size / statistics.median(watch.seconds[1:])
