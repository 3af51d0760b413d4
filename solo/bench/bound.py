"""Which part of a training run is the slowest on this machine, and what to do about it."""

import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cache
from itertools import islice
from typing import Any, cast

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from solo.batch import Batch
from solo.bench.epochs import now
from solo.bench.measure import rate
from solo.data.datasets import DATASETS
from solo.data.decoding import BadImage
from solo.data.engines import Job
from solo.data.engines.large import LargeEngine
from solo.data.engines.small import SmallEngine
from solo.data.engines.workers import same, worker_count
from solo.data.loaders import Order, Position
from solo.data.sources import ArraySource, Source
from solo.devices import settle
from solo.experiment import Experiment
from solo.run import build

_CPU_BATCH, _CPU_BATCH_OF_FILES = 32, 4  # images of a step where there is no GPU: a step at 224 px takes long there
_DECODED = 512  # images, at most, that decoding is judged by
_NO_GPU = "there is no GPU to measure it"
_PLACES = (("augment",), ("decode", "crop"), ("transfer",), ("finish", "step"))  # stages of one place take turns there
ADVICE = {
    "augment": "raise data.threads; without numba: pip install 'solo-ssl[fast]'",
    "decode": "raise data.num_workers as far as there are cores; store smaller images; data.engine=dali decodes on a GPU",
    "crop": "raise data.num_workers as far as there are cores; store smaller images",
    "transfer": "fewer or smaller views are fewer bytes; see whether other processes use the bus",
    "finish": "colours and blur take longer than the step: a faster device or more devices help, data.num_workers does not",
    "step": "the data keeps up: a faster device, precision=bf16-mixed or more devices help, more threads or workers do not",
}


def bound(config: Experiment, job: Job, augmented: float) -> str:
    """A table of images/s of every stage and the advice for the slowest one, of images in memory.

    Args:
        augmented: images per CPU second of one engine thread.
    """
    source = DATASETS[config.data.dataset].open(config.data, True)
    in_memory = source is None or isinstance(source, ArraySource)
    on_gpu = torch.cuda.is_available()
    size = config.optimizer.batch_size if on_gpu else _CPU_BATCH
    return verdict({
        "decode": "in memory already" if in_memory else f"{_decode(cast(Source, source)):12,.0f} images/s, once: then kept",
        "augment": augmented * min(job.config.threads, os.cpu_count() or 1),
        "transfer": _transfer(job) if on_gpu else _NO_GPU,
        "step": _step(config, _batches(job, size, _steps() + 1)),
    })


def bound_of_files(config: Experiment, job: Job) -> str:
    """The same of images that workers decode and crop, and whose views are finished where they are used."""
    on_gpu, workers = torch.cuda.is_available(), max(1, worker_count(job.config.num_workers))
    size = min(config.optimizer.batch_size if on_gpu else _CPU_BATCH, len(job.source))
    decoded = copy(job.source)
    decoded.load = cache(decoded.load)  # type: ignore[method-assign]
    engine = LargeEngine(replace(job, source=decoded, config=replace(job.config, num_workers=0)))
    slot = next(Order(job.seed, len(decoded), size, 0, 1).onwards(Position(0, 0)))

    def cropped() -> Any:
        return next(engine.batches([slot])).batch

    crops = cropped()  # decodes
    if on_gpu:
        crops = crops.pin_memory()
    there, few = crops.to("cuda" if on_gpu else "cpu"), size if on_gpu else _CPU_BATCH_OF_FILES
    views, labels, index = engine.finish(crops)
    batch = Batch([view[:few] for view in views], labels[:few], index[:few])
    return verdict({
        "decode": workers * _decode(job.source),
        "crop": workers * rate(lambda: len(cropped().index)),
        "transfer": _wall(lambda: crops.to("cuda"), size) if on_gpu else _NO_GPU,
        "finish": _wall(lambda: engine.finish(there), size),
        "step": _step(config, [batch] * (_steps() + 1)),
    })


def verdict(stages: dict[str, float | str]) -> str:
    """What to print.

    Args:
        stages: images/s of each in the order of the work; words where it has none, which then bounds nothing.
    """
    rates = {stage: value for stage, value in stages.items() if not isinstance(value, str)}
    places = [[stage for stage in place if stage in rates] for place in _PLACES]
    seconds = [sum(1 / rates[stage] for stage in place) for place in places]
    place = places[seconds.index(max(seconds))]
    slowest = min(place, key=lambda stage: rates[stage])
    turns = f" ({' and '.join(place)} take turns: {1 / max(seconds):,.0f} images/s)" if len(place) > 1 else ""
    lines = [f"  {name:9} {value if isinstance(value, str) else f'{value:12,.0f} images/s'}" for name, value in stages.items()]
    return "\n".join([*lines, f"bound: {slowest}{turns}: {ADVICE[slowest]}"])


def _decode(source: Source) -> float:
    """Images per CPU second of one worker."""
    count = min(_DECODED, len(source))

    def load() -> int:
        for i in range(count):
            with suppress(BadImage):
                source.load(i)
        return count

    return rate(load)


def _batches(job: Job, size: int, count: int) -> list[Batch]:
    order = Order(job.seed, len(job.source), min(size, len(job.source)), 0, 1)
    return [payload.batch for payload in SmallEngine(job).batches(islice(order.onwards(Position(0, 0)), count))]


def _transfer(job: Job) -> float:
    views = _batches(job, 256, 1)[0].views
    return _wall(lambda: [view.cuda(non_blocking=True) for view in views], len(views[0]))


def _wall(work: Callable[[], object], images: int) -> float:
    """Images/s by wall time, after a first time that nobody measures."""
    times = _steps()
    work()
    began = now()
    for _ in range(times):
        work()
    return times * images / (now() - began)


def _steps() -> int:
    return 20 if torch.cuda.is_available() else 3


class _Stopwatch(pl.Callback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self._began = now()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(now() - self._began)


def _step(config: Experiment, batches: list[Batch]) -> float:
    """Images/s of the recipe's method by wall time: the median step after the first."""
    given = {key: value for key, value in config.trainer.items() if key in ("accelerator", "precision")}
    arguments, _ = settle({**given, "devices": 1, "max_epochs": 1})
    watch = _Stopwatch()
    for key in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        arguments[key] = False
    loader = DataLoader(cast(Dataset, batches), batch_size=None, collate_fn=same)
    pl.Trainer(**arguments, callbacks=[watch]).fit(build(config), train_dataloaders=loader)
    return len(batches[0].labels) / statistics.median(watch.seconds[1:])
