"""Paired timing, and the rows it leaves in ``bench/results.csv``."""

import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import torchvision

from solo.bench.board import render

_OPTIONAL = ("numba", "simplejpeg", "kornia", "opencv-python-headless")  # what, where it is installed, may change a figure
RESULTS = Path("bench/results.csv")


@dataclass(frozen=True)
class Comparison:
    """Rates of two ways to do the same, measured in turn.

    Attributes:
        rates: median rate of each way, in things per second.
        ratio, low, high: median, least and largest ratio of the first way's rate to the second's over the pairs.
    """

    rates: tuple[float, float]
    ratio: float
    low: float
    high: float
    pairs: int


def rate(work: Callable[[], int], clock: Callable[[], float] = time.process_time) -> float:
    """Things done per second; ``work`` does some and returns how many. By default of CPU time of all threads."""
    began = clock()
    count = work()
    return count / (clock() - began)


def alternate(first: Callable[[], int], second: Callable[[], int], pairs: int) -> Comparison:
    """Both in turn, A B A B, after each has warmed up once."""
    first(), second()
    measured = [(rate(first), rate(second)) for _ in range(pairs)]
    ratios = [a / b for a, b in measured]
    medians = (statistics.median(a for a, _ in measured), statistics.median(b for _, b in measured))
    return Comparison(medians, statistics.median(ratios), min(ratios), max(ratios), pairs)


@dataclass(frozen=True)
class Row:
    """One line of the results: a value of ours, and how it compares if there is a peer."""

    id: str
    what: str
    value: float
    unit: str
    peer: str = ""
    peer_value: float | None = None
    ratio: float | None = None
    ratio_min: float | None = None
    ratio_max: float | None = None
    pairs: int | None = None


def row(id: str, what: str, unit: str, peer: str, found: Comparison) -> Row:
    return Row(id, what, found.rates[0], unit, peer, found.rates[1], found.ratio, found.low, found.high, found.pairs)


def write(rows: list[Row], path: Path = RESULTS) -> None:
    """Append the rows with where and how they were measured, and draw the board anew."""
    columns = [field.name for field in fields(Row)]
    circumstances = provenance()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *circumstances])
        if new:
            writer.writeheader()
        for entry in rows:
            values = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in asdict(entry).items()}
            writer.writerow({**values, **circumstances})
    render(path)


def provenance() -> Mapping[str, str]:
    """Revision, hardware, versions and command of this process."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions["numpy"] = np.__version__
    for package in _OPTIONAL:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "revision": _revision(),
        "hardware": _hardware(),
        "versions": " ".join(f"{name} {version}" for name, version in versions.items()),
        "command": " ".join(["python -m solo.bench", *sys.argv[1:]]),
    }


def _revision() -> str:
    try:
        changes = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench"]       # but for the results themselves
        head, changed = (
            subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


def _hardware() -> str:
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        cpu = f"{facts['model name']} (family {facts['cpu family']} model {facts['model']})"
    except (OSError, KeyError):
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {torch.get_num_threads()} thread, {gpu}"


def table(rows: list[Row]) -> str:
    """The rows to be read."""
    lines = [f"{'id':4} {'what':52} {'value':>12} {'unit':14} {'peer':>10} {'ratio':>7}  pairs' ratios"]
    for entry in rows:
        line = f"{entry.id:4} {entry.what:52} {entry.value:12,.4g} {entry.unit:14}"
        if entry.peer_value is not None:
            line += f" {entry.peer_value:10,.4g}"
            if entry.ratio is not None:
                line += f" {entry.ratio:6.1f}x  {entry.ratio_min:.1f}-{entry.ratio_max:.1f} ({entry.pairs})"
            line += f" against {entry.peer}"
        lines.append(line)
    return "\n".join(lines)
