"""``bench/README.md`` and its picture: the newest measurement of each thing in ``bench/results.csv``, beside its goal."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from solo.files import write_file

Measured = Mapping[str, str]
_SHARE = "% of the peer's"
_AT_LEAST = ("x", "TFLOP/s", "images/s", "% busy")


class Goal(NamedTuple):
    """What rows with this id, these words in what they measure or in their peer's name, and this unit must reach.

    Attributes:
        unit: ``x`` for the ratio to the peer, `_SHARE` for the value as a share of the peer's, else the row's own.
        bound: the least of `_AT_LEAST`, the most of any other unit.
    """

    id: str
    words: str
    unit: str
    bound: float

    def __str__(self) -> str:
        unit = self.unit if self.unit == "x" else f" {self.unit}"
        return f"{'>=' if self.unit in _AT_LEAST else '<='} {self.bound:g}{unit}"

    def fits(self, entry: Measured) -> bool:
        named = entry["id"] == self.id or f"({self.id})" in entry["what"]
        has = {"x": bool(entry["ratio"]), _SHARE: bool(entry["peer_value"]) and entry["unit"] in ("MB", "MiB")}
        own = has.get(self.unit, self.unit == entry["unit"])
        return named and own and all(word in f"{entry['what']}, {entry['peer']}" for word in self.words.split(" & "))

    def met(self, entry: Measured) -> bool:
        """By the value; or by the median of the ratios, if no more than one pair falls short by more than a tenth."""
        if self.unit == "x":
            short = [ratio for ratio in map(float, (entry.get("ratios") or "").split()) if ratio < 0.9 * self.bound]
            return float(entry["ratio"]) >= self.bound and len(short) <= 1
        value = float(entry["value"])
        if self.unit == _SHARE:
            value *= 100 / float(entry["peer_value"])
        return value >= self.bound if self.unit in _AT_LEAST else value <= self.bound


GOALS = tuple(map(Goal._make, (
    ("D1", "", "x", 25),
    ("D2", "FFCV-SSL", "x", 3),
    ("D2", "OpenCV and numpy", "x", 3),
    ("D2", "DALI", "x", 8),
    ("D2", "kornia", "x", 12),
    ("D3", "", "x", 5),
    ("D4", "DALI", "x", 2),
    ("D4", "solo-learn", "x", 5),
    ("D5", "solo-learn", "x", 3),
    ("D6", "", "ms", 50),
    ("Dx", "whole range", "%", 20),
    ("Dx", "views over", "times", 1.1),
    ("S1", "nnclr, concat", "operations", 400),
    ("S1", "all4one, concat", "operations", 1100),
    ("S2", "", "waits", 0),
    ("S3", "", "x", 5),
    ("S3", "", "us", 500),
    ("S4", "", "operations", 40),
    ("S4", "", "difference", 0),
    ("S5", "nnclr, float32", "x", 1),
    ("S5", "all4one, float32", "x", 1.03),
    ("S5", "bf16-mixed", "x", 1.6),
    ("S5", "finite check", "% of a step", 0.5),
    ("S6", "", "collectives", 2),
    ("Sx", "over one rank", "times", 1.15),
    ("L1", "dense", "x", 2.3),
    ("L1", "peak of the peer's", "%", 2),
    ("L1", "at 2N: time", "times", 2.4),
    ("L1", "at 2N: peak", "times", 2.2),
    ("L1", "at 2Q: time", "times", 2.2),
    ("L1", "at 2Q: peak", "times", 1.1),
    ("L2", "Barlow Twins N=256 D=2048 & dense", "x", 3),
    ("L2", "Barlow Twins N=256 D=2048 & solo-learn's own", "x", 3),
    ("L2", "VICReg N=256 D=2048 & dense", "x", 4.5),
    ("L2", "VICReg N=256 D=2048 & solo-learn's own", "x", 4.5),
    ("L2", "Barlow Twins N=256 D=8192 & dense", "x", 20),
    ("L2", "Barlow Twins N=256 D=8192 & solo-learn's own", "x", 20),
    ("L2", "VICReg N=256 D=8192 & dense", "x", 35),
    ("L2", "VICReg N=256 D=8192 & solo-learn's own", "x", 35),
    ("L3", "top-1 & dense", "x", 3),
    ("L3", "top-1 & solo-learn's own", "x", 3),
    ("L3", "top-5 & dense", "x", 2),
    ("L3", "top-5 & solo-learn's own", "x", 2),
    ("L3", "at 2N: time", "times", 2.4),
    ("L3", "at 2N: peak", "times", 2.2),
    ("L3", "at 2Q: time", "times", 2.2),
    ("L3", "at 2Q: peak", "times", 1.1),
    ("L4", "dense", "x", 1.7),
    ("L4", "solo-learn's own", "x", 1.7),
    ("L4", "at 2N: peak", "times", 2.2),
    ("L5", "dense", "x", 1.4),
    ("K1", "official formula, autocast", "x", 5),
    ("K1", "official formula, torch.compile", "x", 1.3),
    ("K1", "peak & autocast", _SHARE, 2),
    ("K2", "masks over exponentials, autocast", "x", 3.5),
    ("K2", "peak & autocast", _SHARE, 3),
    ("K3", "2 x 256, & autocast", "x", 2.5),
    ("K3", "2 x 4096, & autocast", "x", 1.3),
    ("K3", "peak", "MB", 5),
    ("K4", "autocast", "x", 3),
    ("K5", "SCE N=4096", "TFLOP/s", 355),
    ("K5", "NT-Xent 2N=8192", "TFLOP/s", 355),
    ("K5", "nearest 1 of & 2 x 4096", "TFLOP/s", 355),
    ("E1", "end to end", "images/s", 20_000),
    ("E1", "", "% busy", 90),
    ("E1", " 4 workers", "x", 3.5),
    ("E1", " 16 workers", "x", 1.5),
    ("E2", " 4 workers", "x", 3),
    ("E2", " 16 workers", "x", 1.7),
    ("E3", "from JPEGs & 16 workers", "x", 1.4),
    ("E3", "synthetic", "x", 1.05),
    ("E4", "", "min", 10),
)))
# Goals that depend on a method's sizes, by id and unit; the head of the page says why they are missed.
_NAMED = {("S6", "bytes"): "2 D + 8 bytes a row"}
_SUBJECTS = {"D": "Data engine", "S": "Step", "L": "Losses", "K": "Kernels", "E": "Training"}
_HEAD = ("| id | what | ours | peer | ratio | goal | met |", "|---|---|---|---|---|---|---|")
_MET, _MISSED = "#1f6fb4", "#e07b1a"


def render(results: Path) -> Path:
    """Write README.md and ratios.png beside the results and return the page's path."""
    with results.open(newline="", encoding="utf-8") as file:
        rows = newest(csv.DictReader(file))
    compared = [entry for entry in rows if entry["ratio"]]
    pictured = bool(compared) and find_spec("matplotlib") is not None       # a borrowed GPU machine may not have it
    if pictured:
        write_file(results.parent / "ratios.png", _picture(compared))
    page = results.parent / "README.md"
    write_file(page, _page(rows, pictured).encode())
    return page


def newest(rows: Iterable[Measured]) -> list[Measured]:
    """The last row of each thing on each hardware, in the order of their ids."""
    last = {(entry["id"], entry["what"], setting(entry), entry["peer"], entry["hardware"]): entry for entry in rows}
    return sorted(last.values(), key=lambda entry: _place(entry["id"]))


def _place(id: str) -> tuple[int, str]:
    return "DSLKE".find(id[0]), id


def setting(entry: Measured) -> str:
    """What the row says of itself; of a row from before that column, the recipe that its command names, or nothing."""
    if entry.get("setting"):
        return entry["setting"]
    found = re.search(r"--recipe (\S+)", entry["command"])
    return found[1] if found else ""


def goals(entry: Measured) -> list[Goal]:
    """Those that are set for the row."""
    return [goal for goal in GOALS if goal.fits(entry)]


def _page(rows: list[Measured], pictured: bool) -> str:
    lines = [
        "# Measurements",
        "",
        "Drawn by `python -m solo.bench` from `results.csv`, which also holds each row's revision, versions and command.",
        "Ours and the peer's way are timed in turn, A B A B, in one process, but for a checkout's own code, which has a",
        "process of its own, and for two ranks (L5, Sx), which are two; a ratio is the median over the pairs, with the least",
        "and largest behind it. Peers are the published ways written out in `solo/bench/baselines`, or with `--peer` their",
        "own code. A ratio meets its goal if the median does and no more than one pair is short of it by over a tenth;",
        "another unit (S3's us, the times of Sx, Dx and L) is judged by its median alone, as are ratios from before the file",
        "held those of all pairs. S1's goals are for `view_batching=concat`; `separate`, the default, has none. S6's bytes are",
        "over their goal, a gathered row of D numbers in bfloat16 and 8 bytes: rows travel in float32, so that several ranks",
        "compute what one does, and NNCLR gathers five for an image, two predictions, two neighbours and the queue's own.",
    ]
    if pictured:
        lines += ["", "![Speed against the peer, with the range over the pairs, and the goals](ratios.png)"]
    for letter, subject in _SUBJECTS.items():
        for hardware in sorted({entry["hardware"] for entry in rows if entry["id"][0] == letter}):
            part = [entry for entry in rows if entry["id"][0] == letter and entry["hardware"] == hardware]
            lines += ["", f"## {subject}: {hardware}", "", *_HEAD, *map(_line, part)]
    waiting = {goal.id for goal in GOALS if goal.id[0] in "KE" and not any(map(goal.fits, rows))}
    if waiting:
        lines += ["", f"For want of a GPU these goals wait: {', '.join(sorted(waiting, key=_place))} (`make bench-gpu`)."]
    return "\n".join(lines) + "\n"


def _line(entry: Measured) -> str:
    aims = goals(entry)
    met = {True: "yes", False: "**no**"}[all(goal.met(entry) for goal in aims)] if aims else ""
    if named := _NAMED.get((entry["id"], entry["unit"])):
        met = "**no**"
    peer = f"{_number(entry['peer_value'])} ({entry['peer']})" if entry["peer_value"] else ""
    ratio, low, high = (f"{float(entry[key]):.3g}" if entry[key] else "" for key in ("ratio", "ratio_min", "ratio_max"))
    cells = [entry["id"], _name(entry), f"{_number(entry['value'])} {entry['unit']}", peer]
    cells += [f"{ratio}x ({low}-{high})" if ratio else "", named or ", ".join(map(str, aims)), met]
    return f"| {' | '.join(cells)} |"


def _name(entry: Measured) -> str:
    return ", ".join(filter(None, (entry["what"], setting(entry))))


def _number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _picture(rows: list[Measured]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(rows):
        ratio, low, high = (float(entry[key]) for key in ("ratio", "ratio_min", "ratio_max"))
        bounds = [goal for goal in goals(entry) if goal.unit == "x"]
        met = all(goal.met(entry) for goal in bounds)
        axes.barh(place, ratio - 1, left=1, color=_MET if met else _MISSED, height=0.7)
        axes.plot([low, high], [place, place], color="#333333", linewidth=1)
        axes.annotate(f" {ratio:.3g}x", (max(ratio, high), place), va="center", fontsize=8)
        for goal in bounds:
            axes.plot([goal.bound] * 2, [place - 0.4, place + 0.4], color="#333333", linewidth=2)
    axes.set_yticks(range(len(rows)), [f"{entry['id']} {_name(entry)}" for entry in rows], fontsize=8)
    figure.suptitle("Times the peer's speed; orange: goal missed; thick line: goal; thin: range over the pairs", fontsize=10)
    axes.set(xscale="log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.axvline(1, color="#333333", linewidth=0.8)
    axes.invert_yaxis()
    axes.margins(x=0.15, y=0.02)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
