"""Does a method learn? Trains on the real CIFAR-10 images and tables k-NN and linear accuracy over time.

``python scripts/bench/learn.py nnclr [--recipe scripts/bench/small] [--images N] [--epochs E] [key=value ...]`` writes
``bench/learn/<run>.csv`` (one row per evaluated epoch, epoch 0 is the untrained backbone) and a row in LAB.md's table that
links to it. Other settings or another revision of the code make another file.
The images are ``data/cifar10-jpeg.npz`` below ``SOLO_SHARED`` (default: ``../shared``).
"""

import argparse
import csv
import hashlib
import os
import platform
import subprocess
import time
from pathlib import Path

import pytorch_lightning as pl
import torch

from solo.config import load
from solo.console import quiet_libraries, say
from solo.data.module import DataModule
from solo.errors import ConfigError, reported
from solo.eval.features import extract
from solo.eval.knn import knn_accuracy
from solo.eval.linear import linear_accuracy
from solo.experiment import experiment
from solo.run import pretrain

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ("epoch", "seconds", "knn20", "knn200", "linear")
TABLE = "<!-- learn.py -->"


class Curve(pl.Callback):
    """Accuracy of the backbone on all clean test images every n epochs; its own time does not count."""

    def __init__(self, file: Path, every: int) -> None:
        self.file, self.every = file, every
        self.rows: list[dict[str, float]] = []
        self.writes = True  # rank 0 does
        self.spent = 0.0
        self.mark = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.writes = trainer.is_global_zero
        self.measure(trainer, pl_module, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.spent += time.monotonic() - self.mark
        epoch = trainer.current_epoch + 1
        if epoch % self.every == 0 or epoch == trainer.max_epochs:
            self.measure(trainer, pl_module, epoch)
        self.mark = time.monotonic()

    def measure(self, trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
        data: DataModule = trainer.datamodule  # type: ignore[attr-defined]
        backbone, device = pl_module.backbone, pl_module.device
        train = extract(backbone, data.clean_loader(train=True, batch_size=512), device)  # type: ignore[arg-type]
        test = extract(backbone, data.clean_loader(train=False, batch_size=512), device)  # type: ignore[arg-type]
        row = {"epoch": epoch, "seconds": round(self.spent, 1)}
        row |= {f"knn{k}": round(knn_accuracy(*train, *test, data.spec.classes, k=k)["acc1"], 2) for k in (20, 200)}
        row["linear"] = round(linear_accuracy(train, test, data.spec.classes)["acc1"], 2)
        self.rows.append(row)
        if self.writes:
            self.write()
        self.mark = time.monotonic()

    def write(self) -> None:
        """The rows so far to the file, the newest to the screen."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("w", newline="") as out:
            writer = csv.DictWriter(out, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        print(self.rows[-1], flush=True)


def hardware() -> str:
    """The device that trains, in words."""
    return (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{torch.get_num_threads()} CPU threads ({platform.machine()})"
    )


def revision() -> str:
    """The commit that runs; with a ``+`` when code or recipes differ from it."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    commit = git("rev-parse", "--short", "HEAD").stdout.strip() or "unknown"
    return commit + "+" * (git("diff", "--quiet", "HEAD", "--", "solo", "scripts").returncode == 1)


def main() -> None:
    """Parse, train, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--every", type=int, default=5, help="epochs between evaluations")
    parser.add_argument("overrides", nargs="*", help="key=value, over the recipe")
    parser.add_argument("--recipe", default="scripts/pretrain/cifar", help="folder of <method>.yaml")
    options = parser.parse_intermixed_args()
    quiet_libraries()
    images = Path(os.environ.get("SOLO_SHARED", ROOT.parent / "shared")) / "data" / "cifar10-jpeg.npz"
    settings = {
        "data.dataset": "npz",
        "data.train_path": images,
        "data.train_size": options.images,
        "max_epochs": options.epochs,
        "name": f"learn-{options.method}",
        "knn.enabled": "false",
        "report.enabled": "false",
        "limit_val_batches": 0,  # the seconds are training's alone
        "resume": "never",
    }
    overrides = [*(f"{key}={value}" for key, value in settings.items()), *options.overrides]
    config = experiment(load(ROOT / options.recipe / f"{options.method}.yaml", overrides))
    settings_hash = hashlib.sha256(" ".join([options.recipe, *options.overrides]).encode()).hexdigest()[:6]
    name = f"{options.method}-{options.images}-{options.epochs}-{settings_hash}-{revision()}"
    curve = Curve(ROOT / "bench" / "learn" / f"{name}.csv", options.every)
    say(f"curve: {curve.file}")
    pretrain(config, extra_callbacks=[curve])
    if curve.writes:
        note(options, curve)


def note(options: argparse.Namespace, curve: Curve) -> None:
    """Append the run to the table in LAB.md."""
    first, last = curve.rows[0], curve.rows[-1]
    cells = [
        options.method,
        options.images,
        options.epochs,
        " ".join([options.recipe, *options.overrides]),
        hardware(),
        f"{last['seconds']:.0f}",
        *(f"{first[name]:.1f} -> **{last[name]:.1f}**" for name in COLUMNS[2:]),
        f"[{curve.file.stem.rpartition('-')[2]}]({curve.file.relative_to(ROOT).as_posix()})",
    ]
    row = "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
    lab = ROOT / "LAB.md"
    text = lab.read_text()
    if TABLE not in text:
        raise ConfigError(f"{lab} has no line {TABLE} to put the result before: {row}")
    lab.write_text(text.replace(TABLE, f"{row}\n{TABLE}"))


if __name__ == "__main__":
    with reported():
        main()
