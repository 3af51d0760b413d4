"""How far are the DALI engine's views from the reference's, in grey levels, and how fast are they made on a CPU?

``python scripts/bench/dali.py [--pairs N]`` gives both engines the same numbers, for 200 CIFAR-10 images and 40 ImageNet
photographs, then makes the recipes' batches with `fast` and with `dali` in turn, in CPU time of one thread. The images are
``data/cifar10-jpeg.npz`` and ``data/imagenet-sample-256.tar`` below ``SOLO_SHARED`` (default: ``../shared``).
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from solo.bench.data import RECIPES
from solo.bench.measure import alternate, row, table
from solo.config import load
from solo.data.engines import ENGINES, Job, Slot
from solo.data.loaders import Order, Position
from solo.data.module import DataModule
from solo.data.views import Chance, ColorJitter, Crop, View
from solo.errors import reported
from solo.experiment import experiment

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {  # recipe: kind of dataset, file, images whose views are compared, batch, images of one measurement
    "cifar-asym": ("npz", "cifar10-jpeg.npz", 200, 256, 1024),
    "in224": ("tar", "imagenet-sample-256.tar", 40, 32, 64),
}
COLOURS = {
    "brightness": {"color_jitter": ColorJitter(prob=1, brightness=0.8)},
    "contrast": {"color_jitter": ColorJitter(prob=1, contrast=0.8)},
    "saturation": {"color_jitter": ColorJitter(prob=1, saturation=0.8)},
    "hue": {"color_jitter": ColorJitter(prob=1, hue=0.5)},
    "grayscale": {"grayscale": Chance(prob=0.5)},
    "solarization": {"solarization": Chance(prob=0.5)},
    "horizontal_flip": {"horizontal_flip": Chance(prob=0.5)},
}


def levels(job: Job, views: list[View], count: int) -> np.ndarray:
    """Absolute differences of all values of the views of the first images."""
    channels = job.in_chans
    job = replace(job, views=views, mean=(0.0,) * channels, std=(1.0,) * channels)
    slot = Slot(0, np.arange(count))
    quick, slow = (list(ENGINES[name](job).batches([slot]))[0].batch.views for name in ("dali", "torchvision"))
    return np.concatenate([255 * (a - b).abs().numpy().ravel() for a, b in zip(quick, slow, strict=True)])


def work(name: str, job: Job, batch: int, images: int) -> Callable[[], int]:
    """Finished batches, each call going on where the last one ended."""
    engine, slots = ENGINES[name](job), Order(job.seed, len(job.source), batch, 0, 1).onwards(Position(0, 0))
    return lambda: sum(len(engine.finish(made.batch).index) for made in engine.batches(islice(slots, images // batch)))


def main() -> None:
    """Parse, compare, time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each engine, in turn")
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    folder, rows = Path(os.environ.get("SOLO_SHARED", ROOT.parent / "shared")) / "data", []
    print(f"{'grey levels':32} {'median':>9} {'mean':>9} {'above one':>10} {'largest':>8}")
    for recipe, (kind, file, count, batch, images) in IMAGES.items():
        path, *more = RECIPES[recipe]
        where = [f"data.dataset={kind}", f"data.train_path={folder / file}", "data.num_workers=0"]
        config = experiment(load(ROOT / path, [*more, *where, f"optimizer.batch_size={batch}"]))
        job = DataModule(config.data, config.augmentations, batch, config.seed).job
        size = job.views[0].crop_size
        compared = {"crop and resize": [View(crop_size=size)], "the recipe": job.views}
        if size == 32:  # whole images, so that a colour is alone
            compared |= {name: [View(crop_size=size, rrc=Crop(enabled=False), **what)] for name, what in COLOURS.items()}
        for name, views in compared.items():
            found = levels(job, views, count)
            line = f"{recipe + ': ' + name:32} {np.median(found):9.2g} {found.mean():9.2g} {(found > 1).mean():10.2%}"
            print(f"{line} {found.max():8.2g}", flush=True)
        if pairs:
            both = alternate(work("fast", job, batch, images), work("dali", job, batch, images), pairs)
            rows.append(row("", f"{recipe}: fast engine", "images/CPU-s", "dali engine", both))
    print(table(rows))


if __name__ == "__main__":
    with reported():
        main()
