"""The bench of images above 64 px: what a core does for a GPU (``cpu``), and the whole recipe on cores (``all-cpu``)."""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from solo.bench.baselines.pil import PILBaseline
from solo.bench.looks import looks, shown
from solo.bench.measure import alternate, row, table, write
from solo.bench.peers import Batches, peer
from solo.data.engines import Job, Payload, Slot
from solo.data.engines.large import LargeEngine
from solo.data.engines.torchvision import TorchvisionEngine
from solo.data.loaders import Order, Position
from solo.data.module import DataModule
from solo.data.sources import FolderSource
from solo.data.tar import TarSource
from solo.errors import ConfigError, NumericsError

STAGES = {"cpu": ("D4", "decode and crops, uint8"), "all-cpu": ("D5", "all on the CPU")}
_BATCH, _BATCHES = 32, 2  # images of one measurement: two batches
_LOOKED_AT = 16  # batches whose views, or crops, are held to a peer's
_PEERS = ("dali",)  # of `PEERS`, those that also decode
_COPIES = "solo-learn's pipeline (Pillow and torchvision v1, rewritten)"


def main(arguments: argparse.Namespace, data: DataModule, setting: str) -> None:
    """Print and keep a row per stage."""
    if arguments.peer not in (None, *_PEERS):
        raise ConfigError(f"--peer {arguments.peer} is for images up to 64 px")
    job = replace(data.job, config=replace(data.config, num_workers=0))
    source = job.source
    if not isinstance(source, (FolderSource, TarSource)):
        raise ConfigError("solo.bench data --recipe in224 decodes files: data.dataset=tar or a folder of images")
    sizes = [source.load(i).shape for i in np.linspace(0, len(source) - 1, 32).astype(int)]
    pixels = statistics.mean(height * width for height, width, _ in sizes) / 1e6
    print(f"{arguments.recipe}: {len(source):,} images of {pixels:.2f} MP on average, {len(job.views)} views", flush=True)
    print(correctness(job), flush=True)
    rows = []
    for stage in [arguments.stage] if arguments.stage else STAGES:
        id, what = STAGES[stage]
        whose, batch, theirs = _other(job, arguments.peer, stage)
        print(f"{what}: {looks_like(job, batch, theirs)}", flush=True)
        found = alternate(engine_work(job, finish=stage == "all-cpu"), _work(job, batch), arguments.pairs)
        note = f"{what}, {len(job.views)} views of {job.views[0].crop_size} px, images of {pixels:.2f} MP"
        rows.append(row(id, note, "images/CPU-s", whose, found))
    print(table(rows), flush=True)
    if not arguments.no_write:
        write(rows, setting=setting)


def correctness(job: Job) -> str:
    """Holds the engine against the reference with shared numbers; without solarisation, which jumps at its threshold.

    Raises:
        NumericsError: the median differs by half a grey level, or a hundredth of the values by more than two.
    """
    views = [replace(view, solarization=replace(view.solarization, prob=0.0)) for view in job.views]
    job, slot = replace(job, views=views), _slots(job)(1)[0]
    engine = LargeEngine(job)
    quick = engine.finish(next(engine.batches([slot])).batch).views
    slow = next(TorchvisionEngine(job).batches([slot])).batch.views
    levels = torch.cat([(a - b).abs().flatten() for a, b in zip(quick, slow, strict=True)]) * min(job.std) * 255
    outside = (levels > 2).float().mean().item()
    if not (levels.median() < 0.5 and outside < 1e-2):
        raise NumericsError(f"{outside:.2%} of the values differ by more than two grey levels from the reference engine")
    return f"correct: median difference from the reference engine {levels.median():.1e} grey levels, {outside:.1e} above two"


def looks_like(job: Job, batch: Batches, stage: str) -> str:
    """Holds a peer's views, or its crops where the stage ends with them, to what ours look like; errors as of `looks`."""
    engine, slots = LargeEngine(job), _slots(job)(_LOOKED_AT)
    ours = [
        payload.batch.crops if stage == "cpu" else engine.finish(payload.batch).views for payload in engine.batches(slots)
    ]
    theirs = [batch(slot.samples) for slot in slots]
    if stage == "cpu":
        theirs = [[crops.permute(0, 3, 1, 2) for crops in views] for views in theirs]
    mean, std = ((0.0,), (1 / 255,)) if stage == "cpu" else (job.mean, job.std)
    a, b = (shown([torch.cat(parts) for parts in zip(*batches, strict=True)], mean, std) for batches in (ours, theirs))
    images = [job.source.load(int(i)) for slot in slots for i in slot.samples]
    return looks(a, b, images, ["mirrored"] if stage == "cpu" else [])     # who mirrors later is done with these crops too


def _slots(job: Job) -> Callable[[int], list[Slot]]:
    """The next so many batches, each call going on where the last one ended."""
    endless = Order(job.seed, len(job.source), min(_BATCH, len(job.source)), 0, 1).onwards(Position(0, 0))
    return lambda count: list(islice(endless, count))


def engine_work(job: Job, finish: bool) -> Callable[[], int]:
    """Batches as a worker makes them, and finished on the CPU or not."""
    engine, slots = LargeEngine(job), _slots(job)

    def done(payload: Payload) -> Any:
        return engine.finish(payload.batch) if finish else payload.batch

    return lambda: sum(len(done(payload).index) for payload in engine.batches(slots(_BATCHES)))


def _other(job: Job, name: str | None, stage: str) -> tuple[str, Batches, str]:
    """Whose way a stage is compared with, the way, and the stage that it ends with: solo-learn's never stops at the crops."""
    if name is not None:
        kind: Any = peer(name)
        other = kind(job, only_crops=stage == "cpu")
        return other.name, other.batch, stage
    return _COPIES, PILBaseline(job).batch, "all-cpu"


def _work(job: Job, batch: Batches) -> Callable[[], int]:
    slots = _slots(job)
    return lambda: sum(len(batch(slot.samples)[0]) for slot in slots(_BATCHES))
