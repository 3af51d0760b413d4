"""``python -m solo.bench data``: what the data engine makes of a recipe, beside torchvision on PIL, and what bounds it.

The clock is CPU time of the whole process, one thread computing, so that other programs disturb little; waiting (time to
the first batch) is wall time.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from solo.bench import large
from solo.bench.baselines.pil import PILBaseline
from solo.bench.bound import bound, bound_of_files
from solo.bench.looks import looks, shown
from solo.bench.measure import Row, alternate, rate, row, table, told, write
from solo.bench.peers import PEERS, Batches, Peer, peer
from solo.config import load
from solo.data.config import KernelName
from solo.data.engines import Job, Slot
from solo.data.engines.kernel_torch import TorchKernel
from solo.data.engines.kernels import kernel
from solo.data.engines.small import SmallEngine
from solo.data.engines.torchvision import TorchvisionEngine
from solo.data.loaders import Order, Position, TrainLoader
from solo.data.module import DataModule
from solo.data.sources import ArraySource
from solo.errors import ConfigError, NumericsError, Parser
from solo.experiment import Experiment, experiment

RECIPES = {
    "cifar-asym": ("scripts/pretrain/cifar/nnclr.yaml", "augmentations=asymmetric"),
    "cifar-sym": ("scripts/pretrain/cifar/nnclr.yaml", "augmentations=symmetric"),
    "in224": ("scripts/pretrain/imagenet-100/nnclr.yaml", "augmentations=asymmetric"),
}
BATCHES = (64, 256, 1024, 4096)
SIZES = (5_000, 50_000)
_STEP = 0.02  # seconds a training step is taken to last
_OURS, _THEIRS = 8192, 384  # images of one measurement: about as long for both
_TIMES = 4  # as many views, as in multi-crop
_ROUNDS = 3  # of short measurements for each pair of long ones
_LOOKED_AT = 4096  # images whose views are held to a peer's


def main(argv: list[str]) -> None:
    arguments = _arguments(argv)
    other = peer(arguments.peer) if arguments.peer else None
    torch.set_num_threads(1)
    config = _experiment(arguments)
    data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, config.seed)
    setting = setting_of(arguments.recipe, config.data.kernel, arguments.overrides)
    if not isinstance(data.job.source, ArraySource):
        large.main(arguments, data, setting)
        if not arguments.no_step and not other:
            print(bound_of_files(config, data.job))
        return
    if arguments.stage is not None:
        raise ConfigError("--stage is for images above 64 px: small ones have one stage")
    print(f"{arguments.recipe}: {len(data.selected):,} images, {len(data.views)} views, batch {data.batch_size}", flush=True)
    print(correctness(data), flush=True)
    if other:
        rows = [against(data, other(data.job), arguments.pairs)]
    else:
        rows = compare(data.job, arguments.pairs, data.batch_size)
        rows += first_batch(data, epochs=arguments.pairs)
        rows += flatness(data.job, rounds=_ROUNDS * arguments.pairs)
        rows.append(many_views(data.job, arguments.pairs, data.batch_size))
    print(table(rows), flush=True)
    if not arguments.no_step and not other:
        print(bound(config, data.job, next(entry.value for entry in rows if entry.id == "D1")))
    if not arguments.no_write:
        write(rows, setting=setting)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m solo.bench data", description=__doc__)
    parser.add_argument("--recipe", default="cifar-asym", help=f"{', '.join(RECIPES)}, or a pretraining YAML file")
    parser.add_argument("--stage", choices=large.STAGES, help="of images above 64 px: only this; default: each")
    parser.add_argument("--peer", choices=PEERS, help="only beside this one, where it is installed; above 64 px: dali")
    parser.add_argument("--pairs", type=int, default=7, help="measurements of each way, in turn")
    parser.add_argument("--no-step", action="store_true", help="do not run the recipe's method to name the bound")
    parser.add_argument("--no-write", action="store_true", help="do not append to bench/results.csv")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, e.g. data.train_path=...")
    return parser.parse_args(argv)


def setting_of(recipe: str, wanted: KernelName, overrides: list[str]) -> str:
    """The recipe, the kernel that computes where it is not numba's, and what else was overridden."""
    others = [word for word in told(overrides) if not word.startswith("data.kernel=")]
    slow = ["data.kernel=torch"] if kernel(wanted) is TorchKernel else []
    return ", ".join([recipe, *slow, *others])


def _experiment(arguments: argparse.Namespace) -> Experiment:
    path, *more = RECIPES.get(arguments.recipe, (arguments.recipe,))
    if not Path(path).is_file():
        raise ConfigError(f"--recipe {arguments.recipe} is neither a file nor, in this repository's folder, one of "
                          f"{', '.join(RECIPES)}")
    return experiment(load(path, [*more, *arguments.overrides]))


# --- the same images, whoever makes them -------------------------------------------------------------------------------


def correctness(data: DataModule) -> str:
    """Holds the engine against the reference with shared numbers.

    Raises:
        NumericsError: they differ by more than a grey level in more than a thousandth of the values.
    """
    slot = next(_slots(data.job, 128))
    job = replace(data.job, config=replace(data.config, num_workers=0))
    quick, slow = (next(engine(job).batches([slot])).batch.views for engine in (SmallEngine, TorchvisionEngine))
    levels = torch.cat([(a - b).abs().flatten() for a, b in zip(quick, slow, strict=True)]) * min(data.spec.std) * 255
    outside = (levels > 1).float().mean().item()
    if not outside < 1e-3:
        raise NumericsError(f"{outside:.2%} of the values differ by more than a grey level from the reference engine")
    return f"correct: median difference from the reference engine {levels.median():.1e} grey levels, {outside:.1e} above one"


def looks_like(job: Job, batch: Batches) -> str:
    """Holds a peer's views of images in memory to what ours look like; errors as of `looks`."""
    slot = next(_slots(job, _LOOKED_AT))
    ours = next(SmallEngine(job).batches([slot])).batch.views
    a, b = (shown(views, job.mean, job.std) for views in (ours, batch(slot.samples)))
    return looks(a, b, _array(job)[slot.samples])


# --- rates -------------------------------------------------------------------------------------------------------------


def _slots(job: Job, batch_size: int) -> Iterator[Slot]:
    return Order(job.seed, len(job.source), min(batch_size, len(job.source)), 0, 1).onwards(Position(0, 0))


def _array(job: Job) -> np.ndarray:
    if not isinstance(job.source, ArraySource):
        raise ConfigError("this comparison is of images in memory")
    return job.source.images


def engine_work(job: Job, kernel: KernelName, batch_size: int, images: int) -> Callable[[], int]:
    """Batches through the whole engine, its thread included, each call going on where the last one ended."""
    engine = SmallEngine(replace(job, config=replace(job.config, kernel=kernel)))
    slots, count = _slots(job, batch_size), max(1, images // batch_size)
    return lambda: sum(len(payload.batch.index) for payload in engine.batches(islice(slots, count)))


def pil_work(job: Job, images: int) -> Callable[[], int]:
    """Batches of 64 through torchvision on PIL."""
    baseline, slots = PILBaseline(job), _slots(job, 64)
    return lambda: sum(len(baseline.batch(slot.samples)[0]) for slot in islice(slots, images // 64))


def compare(job: Job, pairs: int, batch_size: int) -> list[Row]:
    """D1 and D3: both kernels against torchvision on PIL, whose views are first held to what ours look like."""
    print(looks_like(job, PILBaseline(job).batch), flush=True)
    rows = []
    kernels: list[tuple[str, KernelName, int]] = [("D1", "numba", _OURS), ("D3", "torch", _OURS // 8)]
    for id, name, images in kernels:
        found = alternate(engine_work(job, name, batch_size, images), pil_work(job, _THEIRS), pairs)
        rows.append(row(id, f"fast engine, {name} kernel", "images/CPU-s", "torchvision v1 on PIL", found))
    return rows


def against(data: DataModule, other: Peer, pairs: int) -> Row:
    """D2: the engine against another program, whose views are first held to what ours look like."""
    job, kernel = data.job, data.config.kernel
    print(looks_like(job, other.batch), flush=True)
    slots = _slots(job, 256)
    count = other.images // 256
    found = alternate(
        engine_work(job, kernel, data.batch_size, _OURS),
        lambda: sum(len(other.batch(slot.samples)[0]) for slot in islice(slots, count)),
        pairs,
    )
    return row("D2", "fast engine", "images/CPU-s", other.name, found)


def first_batch(data: DataModule, epochs: int) -> list[Row]:
    """D6: wall time to an epoch's first batch, when the stream begins anew and when the epoch before was just trained."""
    loader = data.train_dataloader()
    next(iter(loader))  # compiles
    anew, after = [], []
    for epoch in range(epochs):
        loader.position = Position(10 * (epoch + 1), 0)  # not the epoch that is made ahead
        anew.append(_wait(loader))
        after.append(_wait(loader))
    loader.close()
    return [
        Row("D6", "first batch of a new start, median (wall)", statistics.median(anew), "ms"),
        Row("D6", "first batch of the next epoch, median (wall)", statistics.median(after), "ms"),
        Row("D6", "first batch, worst of all (wall)", max(*anew, *after), "ms"),
    ]


def _wait(loader: TrainLoader) -> float:
    """Milliseconds to the first batch; the rest of the epoch is then consumed at a training's pace."""
    began = time.monotonic()
    batches = iter(loader)
    next(batches)
    waited = 1000 * (time.monotonic() - began)
    for _ in islice(batches, len(loader) - 8):
        pass
    for _ in batches:
        time.sleep(_STEP)
    return waited


def flatness(job: Job, rounds: int) -> list[Row]:
    """Rates over batch sizes and dataset sizes, in turn, and their range: of parts of a round's median, as clocks change."""
    pixels = _array(job)
    works = {f"batch {size:,}": engine_work(job, job.config.kernel, size, max(_OURS, size)) for size in BATCHES}
    for size in SIZES:
        part = np.resize(pixels, (size, *pixels.shape[1:]))
        source = ArraySource(part, np.zeros(size), job.source.classes)
        works[f"{size:,} images"] = engine_work(replace(job, source=source), job.config.kernel, 256, _OURS)
    for work in works.values():
        work()
    measured = np.array([[rate(work) for work in works.values()] for _ in range(rounds)])           # [rounds, works]
    rows = [Row("Dx", name, float(value), "images/CPU-s") for name, value in zip(works, np.median(measured, 0), strict=True)]
    parts = np.median(measured / np.median(measured, 1, keepdims=True), 0)                          # [works]
    return [*rows, Row("Dx", "whole range over the median", 100 * float(np.ptp(parts)), "%")]


def many_views(job: Job, pairs: int, batch_size: int) -> Row:
    """The time of four times the views, in multiples of four times the time: more views must not cost more each."""
    more = replace(job, views=_TIMES * job.views)
    few = engine_work(job, job.config.kernel, batch_size, _OURS)
    found = alternate(few, engine_work(more, job.config.kernel, batch_size, _OURS // _TIMES), pairs)
    what = f"{len(more.views)} views over {_TIMES} times {len(job.views)} views"
    return Row("Dx", what, statistics.median(found.ratios) / _TIMES, "times")
