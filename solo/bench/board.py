"""``bench/README.md`` and its picture: the newest measurement of each thing in ``bench/results.csv``, beside its goal."""

import csv
import io
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

from solo.files import write_file

# Least ratio to the peer ("x"), or the most of the row's unit, by the row's id and words of what it measures or of its peer.
GOALS: tuple[tuple[str, str, str, float], ...] = (
    ("D1", "", "x", 25),
    ("D2", "FFCV-SSL", "x", 3),
    ("D2", "OpenCV and numpy", "x", 3),
    ("D2", "DALI", "x", 8),
    ("D2", "kornia", "x", 12),
    ("D3", "", "x", 5),
    ("D4", "DALI", "x", 2),
    ("D4", "", "x", 5),
    ("D5", "", "x", 3),
    ("D6", "", "ms", 50),
    ("Dx", "whole range", "%", 20),
    ("Dx", "views over", "times", 1.1),
    ("S1", "nnclr, concat", "operations", 400),
    ("S1", "all4one, concat", "operations", 1100),
    ("S2", "", "waits", 0),
    ("S3", "", "x", 5),
    ("S5", "nnclr, float32", "x", 1),
    ("S5", "all4one, float32", "x", 1.03),
    ("S5", "bf16-mixed", "x", 1.6),
    ("S5", "finite check", "% of a step", 0.5),
    ("S6", "", "collectives", 2),
    ("L1", "", "x", 2.3),
    ("L1", "peak of the peer's", "%", 2),
    ("L2", "Barlow Twins N=256 D=2048", "x", 3),
    ("L2", "VICReg N=256 D=2048", "x", 4.5),
    ("L2", "Barlow Twins N=256 D=8192", "x", 20),
    ("L2", "VICReg N=256 D=8192", "x", 35),
    ("L3", "top-1", "x", 3),
    ("L3", "top-5", "x", 2),
    ("L4", "", "x", 1.7),
    ("L5", "", "x", 1.4),
)
_SUBJECTS = {"D": "Data engine", "S": "Step", "L": "Losses", "K": "Kernels", "E": "Training"}
_HEAD = ("| id | what | ours | peer | ratio | goal | met |", "|---|---|---|---|---|---|---|")
_MET, _MISSED = "#1f6fb4", "#e07b1a"

Measured = Mapping[str, str]


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
    last = {(entry["id"], entry["what"], recipe(entry), entry["peer"], entry["hardware"]): entry for entry in rows}
    return sorted(last.values(), key=lambda entry: ("DSLKE".find(entry["id"][0]), entry["id"]))


def recipe(entry: Measured) -> str:
    """The recipe that the row's command names, or nothing."""
    found = re.search(r"--recipe (\S+)", entry["command"])
    return found[1] if found else ""


def goal(entry: Measured) -> tuple[str, bool] | None:
    """The goal in words and whether the row meets it, or None where none is set."""
    for id, words, unit, bound in GOALS:
        if entry["id"] == id and words in f"{entry['what']} {entry['peer']}":
            if unit == "x" and entry["ratio"]:
                return f">= {bound:g}x", float(entry["ratio"]) >= bound
            if unit == entry["unit"]:
                return f"<= {bound:g} {unit}", float(entry["value"]) <= bound
    return None


def _page(rows: list[Measured], pictured: bool) -> str:
    lines = [
        "# Measurements",
        "",
        "Drawn by `python -m solo.bench` from `results.csv`, which also holds each row's revision, versions and command.",
        "Ours and the peer's way are timed in turn in one process, A B A B; a ratio is the median over the pairs, with the",
        "least and the largest behind it. Peers are the published ways written out in `solo/bench/baselines`.",
    ]
    if pictured:
        lines += ["", "![Speed against the peer, with the range over the pairs, and the goals](ratios.png)"]
    for letter, subject in _SUBJECTS.items():
        for hardware in sorted({entry["hardware"] for entry in rows if entry["id"][0] == letter}):
            part = [entry for entry in rows if entry["id"][0] == letter and entry["hardware"] == hardware]
            lines += ["", f"## {subject}: {hardware}", "", *_HEAD, *map(_line, part)]
    return "\n".join(lines) + "\n"


def _line(entry: Measured) -> str:
    aim, met = goal(entry) or ("", None)
    peer = f"{_number(entry['peer_value'])} ({entry['peer']})" if entry["peer_value"] else ""
    ratio, low, high = (f"{float(entry[key]):.3g}" if entry[key] else "" for key in ("ratio", "ratio_min", "ratio_max"))
    cells = [entry["id"], _name(entry), f"{_number(entry['value'])} {entry['unit']}", peer]
    cells += [f"{ratio}x ({low}-{high})" if ratio else "", aim, {None: "", True: "yes", False: "**no**"}[met]]
    return f"| {' | '.join(cells)} |"


def _name(entry: Measured) -> str:
    return ", ".join(filter(None, (entry["what"], recipe(entry))))


def _number(text: str) -> str:
    value = float(text)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _picture(rows: list[Measured]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1 + 0.32 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots()
    for place, entry in enumerate(rows):
        ratio, low, high = (float(entry[key]) for key in ("ratio", "ratio_min", "ratio_max"))
        aim = goal(entry)
        axes.barh(place, ratio - 1, left=1, color=_MISSED if aim and not aim[1] else _MET, height=0.7)
        axes.plot([low, high], [place, place], color="#333333", linewidth=1)
        axes.annotate(f" {ratio:.3g}x", (max(ratio, high), place), va="center", fontsize=8)
        if aim and aim[0].endswith("x"):
            bound = float(aim[0].removeprefix(">= ").removesuffix("x"))
            axes.plot([bound, bound], [place - 0.4, place + 0.4], color="#333333", linewidth=2)
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
