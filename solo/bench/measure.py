"""Paired timing, and the rows it leaves in ``bench/results.csv``."""

import csv
import hashlib
import io
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from solo.bench.board import render
from solo.files import write_file

_OPTIONAL = (                               # what, where it is installed, may change a figure
    "pytorch-lightning", "triton", "numba", "simplejpeg", "kornia", "opencv-python-headless", "nvidia-dali-cuda130",
)
_PLACE = re.compile(r"data\.(train|val)_path=|checkpoint\.dir=|data\.dataset=(npz|tar|folder|h5)$")
RESULTS = Path("bench/results.csv")


@dataclass(frozen=True)
class Comparison:
    """Rates of two ways to do the same, measured in turn.

    Attributes:
        measured: pairs of rates, in things per second.
    """

    measured: tuple[tuple[float, float], ...]

    @property
    def rates(self) -> tuple[float, float]:
        """Median rate of each way."""
        return statistics.median(a for a, _ in self.measured), statistics.median(b for _, b in self.measured)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Of the first way's rate to the second's, for each pair."""
        return tuple(a / b for a, b in self.measured)


def rate(work: Callable[[], int], clock: Callable[[], float] = time.process_time) -> float:
    """Things done per second; ``work`` does some and returns how many. By default of CPU time of all threads."""
    began = clock()
    count = work()
    return count / (clock() - began)


def alternate(first: Callable[[], int], second: Callable[[], int], pairs: int) -> Comparison:
    """Both in turn, A B A B, after each has warmed up once."""
    first(), second()
    return Comparison(tuple((rate(first), rate(second)) for _ in range(pairs)))


@dataclass(frozen=True)
class Row:
    """One line of the results: a value of ours, and how it compares if there is a peer.

    Attributes:
        ratio, ratio_min, ratio_max: median, least and largest of ``ratios``, those of all pairs.
    """

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
    ratios: tuple[float, ...] = ()


def row(id: str, what: str, unit: str, peer: str, found: Comparison) -> Row:
    return compared(id, what, unit, peer, found.rates, found.ratios)


def compared(id: str, what: str, unit: str, peer: str, values: tuple[float, float], ratios: Sequence[float]) -> Row:
    """A row from the value of each way and the ratios of the pairs."""
    middle, least, largest = statistics.median(ratios), min(ratios), max(ratios)
    return Row(id, what, values[0], unit, peer, values[1], middle, least, largest, len(ratios), tuple(ratios))


def write(rows: list[Row], path: Path = RESULTS, setting: str = "", peer: str = "") -> None:
    """Append the rows with where and how they were measured, and draw the board anew.

    Args:
        rows: what was found.
        path: of the results.
        setting: recipe and overrides; the newest row of each setting counts.
        peer: name and version of a checkout beside which it was measured.
    """
    circumstances = provenance()
    columns = [*(field.name for field in fields(Row) if field.name != "ratios"), *circumstances, "ratios", "setting"]
    circumstances |= {"versions": f"{circumstances['versions']} {peer}".strip(), "setting": setting}
    path.parent.mkdir(parents=True, exist_ok=True)
    _with_columns(path, columns)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        for entry in rows:
            writer.writerow({key: _text(value) for key, value in {**asdict(entry), **circumstances}.items()})
    render(path)


def _with_columns(path: Path, columns: list[str]) -> None:
    """A file with these columns; what stands in one with fewer stays, and is empty in the others."""
    lines: list[dict[str, str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, restval="")
            if reader.fieldnames == columns:
                return
            lines = list(reader)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(lines)
    write_file(path, text.getvalue().encode())


def _text(value: Any) -> Any:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:.4g}" if isinstance(value, float) else value


def told(overrides: Iterable[str]) -> list[str]:
    """Those that may change a figure: all but the ones that say where files lie."""
    return [word for word in overrides if not _PLACE.match(word)]


def provenance() -> dict[str, str]:
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
        return _contents(Path(__file__).parents[1])
    return head + ("+changes" if changed else "")


def _contents(package: Path) -> str:
    """What stands for the revision of code without its history: a hash of it."""
    found = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        found.update(f"{file.relative_to(package).as_posix()}\0".encode() + file.read_bytes())
    return f"files {found.hexdigest()[:12]}"


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
