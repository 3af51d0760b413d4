"""What `solo.data.check` found: tables, JSON and a picture."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from solo.console import table
from solo.data.decoding import BadImage
from solo.data.scan import Scan
from solo.data.sources import Source

_INK, _GRID, _COLORS = "#333333", "#e4e4e4", {"train": "#1f6fb4", "val": "#e07b1a"}
_SHOWN, _TILE = 15, 96  # examples in the picture; side of an image there, in pixels
_CHARS = 32  # of a name in the picture
_FEW = 40  # classes that get a name each


@dataclass(frozen=True)
class Place:
    """Where an image is: which part, and its position there."""

    part: int
    index: int


class Group(NamedTuple):
    """Images that a finding is about, and why."""

    places: list[Place]
    why: str = ""


@dataclass(frozen=True)
class Finding:
    """One kind of trouble; without groups: none of it."""

    kind: str
    meaning: str
    groups: list[Group]

    def images(self, part: int) -> int:
        """How many of one part it is about."""
        return len({place for group in self.groups for place in group.places if place.part == part})


@dataclass(frozen=True)
class Part:
    """``train`` or ``val``."""

    name: str
    source: Source
    scan: Scan

    def per_class(self) -> dict[str, int]:
        """How many images each class has, readable or not."""
        labels = self.source.labels
        counts = np.bincount(labels[(labels >= 0) & (labels < len(self.source.classes))], minlength=len(self.source.classes))
        return dict(zip(self.source.classes, counts.tolist(), strict=True))

    def facts(self) -> dict[str, Any]:
        """All that is counted."""
        seen = self.scan
        facts: dict[str, Any] = {
            "images": len(self.source),
            "readable": len(seen),
            "unlabelled": int((self.source.labels < 0).sum()),
            "classes": self.per_class(),
        }
        if len(seen):
            facts["modes"] = dict(Counter(seen.mode.tolist()).most_common())
            for side in ("width", "height"):
                values = getattr(seen, side)
                facts[side] = {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
            facts["mean"], facts["std"] = seen.statistics()
        return facts


def summary(dataset: str, parts: list[Part], found: list[Finding]) -> dict[str, Any]:
    """All of it, JSON-able."""

    def group(one: Group) -> dict[str, Any]:
        images = [{"part": parts[place.part].name, "name": _name(parts, place)} for place in one.places]
        return {"images": images, "why": one.why}

    return {
        "dataset": dataset,
        "parts": {part.name: part.facts() for part in parts},
        "found": {finding.kind: [group(one) for one in finding.groups] for finding in found},
    }


def show(dataset: str, parts: list[Part], found: list[Finding]) -> None:
    """Print what is there, then what is wrong, with the first example of each."""
    columns = [_column(part.facts()) for part in parts]
    names = [part.name for part in parts]
    rows = [[name, *(column.get(name, "") for column in columns)] for name in columns[0]]
    print(table(dataset, ["", *names], rows, left=range(1 + len(parts))))
    if not found:
        print("nothing wrong was found")
    for finding in found:
        counts = ", ".join(f"{finding.images(number):,} of {name}" for number, name in enumerate(names))
        print(f"\n{finding.kind}: {finding.meaning}\n  groups: {len(finding.groups):,}; images: {counts}; the first:")
        first = finding.groups[0]
        examples = [f"{parts[place.part].name} {_name(parts, place)}" for place in _apart(first.places)]
        for line in [*examples, *filter(None, [first.why])]:
            print(f"  {line}")


def _column(facts: dict[str, Any]) -> dict[str, str]:
    counts = list(facts["classes"].values())
    column = {name: f"{facts[name]:,}" for name in ("images", "readable", "unlabelled")}
    column["classes"] = f"{len(counts):,}"
    column["images per class"] = f"{min(counts):,} to {max(counts):,}" if counts else "-"
    if not facts["readable"]:
        return column
    for side in ("width", "height"):
        low, median, high = facts[side].values()
        column[f"{side}, px"] = f"{low}" if low == high else f"{low} to {high}, median {median:.0f}"
    column["colours"] = ", ".join(f"{count:,} {mode}" for mode, count in facts["modes"].items())
    for name in ("mean", "std"):
        column[name] = " ".join(f"{value:.4f}" for value in facts[name])
    return column


def _apart(places: list[Place]) -> list[Place]:
    """Two of them at most, of both parts if there are two."""
    others = [place for place in places if place.part != places[0].part] if places else []
    return [*places[:1], *(others or places[1:])[:1]]


def _name(parts: list[Part], place: Place) -> str:
    return parts[place.part].source.name(place.index)


# --- the picture --------------------------------------------------------------------------------------------------------


def draw(parts: list[Part], found: list[Finding], path: Path) -> None:
    """Write classes, sizes and examples of what was found as PNG."""
    figure = Figure(figsize=(16, 8), dpi=110, layout="constrained")
    left, right = cast(Any, figure.subfigures(1, 2, width_ratios=[1, 1.3]))
    classes, sizes = left.subplots(2, 1)
    _classes(classes, parts)
    _sizes(sizes, parts)
    _examples(right, parts, found)
    figure.savefig(path, format="png", facecolor="white")


def _classes(axes: Axes, parts: list[Part]) -> None:
    names = list(dict.fromkeys(chain(*(part.source.classes for part in parts))))
    if len(names) > _FEW:
        _plain(axes, f"Images of each of {len(names)} classes, the largest first")
    else:
        _plain(axes, "Images per class" if names else "No labels")
    width = 0.8 / len(parts)
    for number, part in enumerate(parts):
        counts = [part.per_class().get(name, 0) for name in names]
        if len(names) > _FEW:
            axes.plot(sorted(counts, reverse=True), color=_COLORS[part.name], linewidth=2, label=part.name)
        else:
            middle = np.arange(len(names)) + (number - (len(parts) - 1) / 2) * width
            axes.bar(middle, counts, width, color=_COLORS[part.name], label=part.name)
    if 0 < len(names) <= _FEW:
        axes.set_xticks(range(len(names)), [name[:16] for name in names], rotation=30 if len(names) < 15 else 90, ha="right")
    if names:
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _sizes(axes: Axes, parts: list[Part]) -> None:
    sizes = [np.stack([part.scan.width, part.scan.height], axis=1) for part in parts]
    kinds = [np.unique(size, axis=0, return_counts=True) for size in sizes]
    count = len(np.unique(np.concatenate(sizes), axis=0))
    _plain(axes, f"{count:,} sizes, in pixels" if count != 1 else "One size, in pixels")
    for part, (size, often) in zip(parts, kinds, strict=True):
        area, color = 16 + 16 * np.log2(often), _COLORS[part.name]
        axes.scatter(size[:, 0], size[:, 1], s=area, color=color, alpha=0.5, linewidths=0, label=part.name)
    axes.set(xlabel="width", ylabel="height")
    if len(np.concatenate(sizes)):
        axes.set(xscale="log", yscale="log")
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _examples(figure: Any, parts: list[Part], found: list[Finding]) -> None:
    turns = zip_longest(*([(finding, group) for group in finding.groups if group.places] for finding in found))
    shown = [pair for pair in chain(*turns) if pair is not None][:_SHOWN]
    grid = figure.subplots(5, 3)
    for axes in grid.flat:
        axes.axis("off")
    if not shown:
        grid[0, 1].set_title("Nothing to show: no image is in trouble", color=_INK)
    for axes, (finding, group) in zip(grid.flat[: len(shown)], shown, strict=True):
        places = _apart(group.places)
        axes.imshow(np.concatenate([_tile(parts, place) for place in places], axis=1))
        names = [(parts[place.part].name, _name(parts, place)) for place in places]
        lines = [f"{part} {name if len(name) <= _CHARS else '…' + name[-_CHARS:]}" for part, name in names]
        axes.set_title("\n".join([finding.kind, *lines]), fontsize=7, color=_INK, loc="left", parse_math=False)


def _tile(parts: list[Part], place: Place) -> np.ndarray:
    """[_TILE, _TILE, 3] uint8; red where there is no image."""
    tile = Image.new("RGB", (_TILE, _TILE), "white")
    try:
        pixels = parts[place.part].source.load(place.index)
    except BadImage:
        return np.asarray(Image.new("RGB", (_TILE, _TILE), "#b03030"))
    image = Image.fromarray(pixels.squeeze(axis=2) if pixels.shape[2] == 1 else pixels).convert("RGB")
    scale = _TILE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    return np.asarray(tile)


def _plain(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=_INK, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
