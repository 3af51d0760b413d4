"""Drawing ``report.png``."""

import io
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import Tensor

from solo.files import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _GRID = "#333333", "#e4e4e4"
_COLORS = ("#1f6fb4", "#e07b1a", "#3a9a4b", "#a04ab0")
_COLUMNS = 6


@dataclass(frozen=True)
class Picture:
    """What is drawn.

    Attributes:
        history: metric -> (step, value).
        comparison: rows with ``features`` and ``knn``.
        points: [N, 2] embedding; labels: [N], -1 where there is none.
        sheet: per image the original and its views, each [C, H, W] in 0..1.
    """

    history: dict[str, list[tuple[int, float]]]
    comparison: list[dict[str, Any]]
    points: Tensor
    labels: Tensor
    sheet: list[list[Tensor]]


def draw(picture: Picture, path: Path) -> Path:
    """Write the picture as PNG and return its path."""
    import matplotlib  # here: a run without a report does without
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 10, "axes.edgecolor": _INK, "axes.titlesize": 12, "axes.titleweight": "bold"}):
        figure = Figure(figsize=(16, 8), dpi=110, layout="constrained")
        left, middle, right = cast(Any, figure.subfigures(1, 3, width_ratios=[1.05, 1.2, 0.85], wspace=0.02))
        loss, accuracy = left.subplots(2, 1, sharex=True)
        _loss(loss, picture.history)
        _accuracy(accuracy, picture.history, picture.comparison)
        title = f"Features of {len(picture.points)} images, t-SNE"
        _embedding(middle.subplots(), title, picture.points.numpy(), picture.labels.numpy())
        _sheet(right, picture.sheet)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", facecolor="white")
    write_file(path, buffer.getvalue())
    return path


def draw_maps(maps: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> Path:
    """Write points [N, 2] coloured by their labels [N], titled by their key, side by side as PNG; all on one scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 * len(maps), 8), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (title, (points, labels)) in zip(panels, maps.items(), strict=True):
        _embedding(axes, title, points, labels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    write_file(path, buffer.getvalue())
    return path


def _plain(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _loss(axes: "Axes", history: dict[str, list[tuple[int, float]]]) -> None:
    _plain(axes, "Loss")
    curve = history.get("train/loss", [])
    if not curve:
        axes.text(0.5, 0.5, "no train/loss in the CSV logs", ha="center", va="center", transform=axes.transAxes, color=_INK)
        return
    steps, values = np.array(curve).T
    if len(steps) <= 40:
        axes.plot(steps, values, color=_COLORS[0], linewidth=2, marker="o", markersize=4)
    else:
        axes.plot(steps, values, color=_COLORS[0], linewidth=0.8, alpha=0.45)
        width = max(5, len(steps) // 30)
        smooth = np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width) / width, mode="valid")[: len(steps)]
        axes.plot(steps, smooth, color=_COLORS[0], linewidth=2)


def _accuracy(axes: "Axes", history: dict[str, list[tuple[int, float]]], comparison: list[dict[str, Any]]) -> None:
    _plain(axes, "Accuracy on test images, %")
    axes.set_xlabel("optimizer step", color=_INK)
    names = [name for name in history if name.startswith("val/knn@")] + [name for name in history if name == "val/probe_acc1"]
    for name, color in zip(names, cycle(_COLORS), strict=False):
        steps, values = np.array(history[name]).T
        text = name.removeprefix("val/").replace("knn@", "k-NN, k=").replace("probe_acc1", "linear probe")
        axes.plot(steps, values, color=color, linewidth=2, marker="o" if len(steps) < 40 else None, markersize=4, label=text)
    for row, style in zip(comparison[1:], ("--", ":"), strict=False):
        axes.axhline(row["knn"], color=_INK, linestyle=style, linewidth=1.2, label=f"k-NN, {row['features']}")
    if names or len(comparison) > 1:
        axes.legend(frameon=False, fontsize=9)


def _embedding(axes: "Axes", title: str, points: np.ndarray, labels: np.ndarray) -> None:
    axes.set_title(title, loc="left", color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    from matplotlib import colormaps

    classes = np.unique(labels[labels >= 0])
    few = len(classes) <= 20
    palette = colormaps["tab10" if len(classes) <= 10 else "tab20" if few else "turbo"]
    colors = {c: palette(i if few else i / (len(classes) - 1)) for i, c in enumerate(classes)}
    shades = [colors.get(label, "#b0b0b0") for label in labels]
    axes.scatter(points[:, 0], points[:, 1], s=16, c=shades, alpha=0.8, linewidths=0)
    for c in classes if few else ():
        x, y = np.median(points[labels == c], axis=0)
        box = {"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": colors[c], "linewidth": 1.5, "alpha": 0.9}
        axes.text(x, y, str(c), ha="center", va="center", fontsize=10, fontweight="bold", color=_INK, bbox=box)


def _sheet(figure: Any, sheet: list[list[Tensor]]) -> None:
    columns = min(_COLUMNS, max(len(row) for row in sheet))
    grid = figure.subplots(len(sheet), columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    titles = ["original", *(f"view {i}" for i in range(1, columns))]
    for cells, row in zip(grid, sheet, strict=True):
        for axes, image in zip(cells, row, strict=False):
            pixels = image.permute(1, 2, 0).squeeze(-1).numpy()                                     # [H, W, 3] or [H, W]
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for axes in grid.flat:
        axes.axis("off")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10, fontweight="normal", color=_INK)
