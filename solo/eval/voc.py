"""Multi-label classification of a folder in Pascal VOC layout: ``python -m solo.eval.voc checkpoint=PATH root=FOLDER``."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from solo.config import bind, main, plain, unknown_key
from solo.console import quiet_libraries, say
from solo.data.bad import LEFT_OUT, BadImages
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.loaders import CleanLoader
from solo.data.random import order
from solo.data.reads import watch
from solo.data.subsets import probe
from solo.data.voc import VOCSource, open_voc
from solo.errors import ConfigError, DataError
from solo.eval.ap import ap_area, per_class
from solo.eval.features import extract
from solo.eval.multilabel import METRICS, HeadConfig, Rows, SVMConfig, best, draw, head_scores, svm_scores
from solo.eval.results import record, run_directory, show
from solo.export import Pretrained, load

# What a class counts as in an image that shows it only in objects marked difficult.
_DIFFICULT = {"negative": -1, "positive": 1, "ignore": 0}
_SHOWN = ("size", "mean", "std", "num_workers", "timeout", "max_bad_fraction")


@dataclass(kw_only=True)
class VOCEvaluation:
    """Which checkpoint, on which folder.

    Attributes:
        root: the folder of ``Annotations``, ``ImageSets`` and ``JPEGImages``.
        train, val, test: splits by name. ``val`` chooses cost and weight decay, then joins ``train``; null: a fifth of
            ``train`` does.
        difficult: a class seen only in objects marked difficult (VOC's label 0) is ``negative`` as in the published
            numbers, ``positive``, or ``ignore``: that image neither trains nor judges that class.
        data: how images are shown, ``size``, ``mean`` and ``std``, by default as in training (224 px and ImageNet's where
            the file does not tell); ``num_workers``, ``timeout``, ``max_bad_fraction``: see `DataConfig`.
        backbone, output, batch_size, device: as for ``main_knn.py``.
    """

    checkpoint: str
    root: str
    output: str | None = None
    backbone: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    train: str = "train"
    val: str | None = "val"
    test: str = "test"
    difficult: Literal["negative", "positive", "ignore"] = "negative"
    svm: SVMConfig = field(default_factory=SVMConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    batch_size: int = 256
    seed: int = 5
    device: str | None = None

    def __post_init__(self) -> None:
        problems = [unknown_key(key, "data", _SHOWN) for key in self.data if key not in _SHOWN]
        if self.batch_size < 1:
            problems.append(f"batch_size must be at least 1, got {self.batch_size}")
        if problems:
            raise ValueError("\n".join(problems))


class Images(NamedTuple):
    """Features and labels of the images to fit, to choose the cost by, and to judge; the names of the classes."""

    train: Rows
    val: Rows
    test: Rows
    classes: list[str]


def evaluate_voc(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Print average precision of SVMs and of a linear head, and record it in ``results.json`` under ``voc``.

    Args:
        values: keys of `VOCEvaluation`.

    Returns:
        One row per classifier: ``classifier``, ``shots`` (None: all images), ``cost`` or ``weight_decay``,
        ``train_images``, and each of `METRICS` in percent; over draws the mean, and ``<name>_std``.

    Raises:
        ConfigError: wrong keys, no such checkpoint, or a folder or split that is not there.
        DataError: too many images or annotations cannot be read.
    """
    config = bind(VOCEvaluation, values)
    source = load(config.checkpoint, config.backbone)
    data = _shown(config, source)
    images = _images(config, source, data)
    for line in _remarks(config, images):
        say(line)
    rows = [*_svms(config.svm, images, config.seed), _head(config.head, images)]
    protocol = (f"frozen features of clean images; cost C and weight decay wd chosen by ap_area on {len(images.val.labels)} "
                f"validation images; all images: {len(images.train.labels) + len(images.val.labels)} train and validation "
                f"images; difficult: {config.difficult}; scores on {len(images.test.labels)} images of split {config.test}")
    show(f"average precision in % · {config.checkpoint}", ["classifier", "shots", "chosen", *METRICS],
         [_cells(row) for row in rows], protocol)
    path = record(Path(config.output) if config.output else run_directory(source.path), "voc", {
        "metric": "average precision in percent; ap_11point and ap_area are means over classes, ap_step_micro is one list",
        "protocol": protocol, "classes": images.classes, "results": rows,
        "checkpoint": str(source.path), "checkpoint_sha256": source.sha256,
        "config": {**plain(config), "backbone": plain(source.config), "data": {key: getattr(data, key) for key in _SHOWN}},
    })
    say(f"results: {path}")
    return rows


def _images(config: VOCEvaluation, source: Pretrained, data: DataConfig) -> Images:
    """Every split through the backbone, once."""
    splits = [config.train, config.test, *([config.val] if config.val else [])]
    if len(set(splits)) < len(splits):
        raise ConfigError(f"train, val and test must be different splits, got {', '.join(splits)}: "
                          f"val=null takes a fifth of train for val")
    assert data.size is not None and data.mean is not None and data.std is not None
    size, mean, std = data.size, tuple(data.mean), tuple(data.std)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = source.backbone.to(device)

    def rows(part: VOCSource) -> Rows:
        probe(part)
        bad = BadImages(part, data.max_bad_fraction, fate=LEFT_OUT)
        loader = CleanLoader(part, config.batch_size, size, mean, std, bad, 0, 1, data.num_workers, data.timeout)
        features, position = extract(backbone, loader, device)
        labels = torch.from_numpy(part.targets)[position].long()                                    # [N, C]
        return Rows(features, torch.where(labels == 0, _DIFFICULT[config.difficult], labels))

    watch(data.timeout)
    sources = open_voc(config.root, splits, source.in_chans)
    train, test, *rest = map(rows, sources)
    if rest:
        val = rest[0]
    else:
        shuffled = torch.from_numpy(order(config.seed, 0, len(train.labels)))
        fifth = max(1, len(shuffled) // 5)
        train, val = train.take(shuffled[fifth:].sort().values), train.take(shuffled[:fifth].sort().values)
    return Images(train, val, test, sources[0].classes)


def _shown(config: VOCEvaluation, source: Pretrained) -> DataConfig:
    """How images are shown: as asked, else as in training, else at 224 px with ImageNet's statistics; all filled in."""
    data = bind(DataConfig, {**source.experiment.get("data", {"dataset": "imagenet"}), **config.data}, "data")
    data.size = config.data.get("size") or source.image_size or 224
    for name in ("mean", "std"):
        given, published = getattr(data, name), getattr(DATASETS[data.dataset], name)
        if given is not None and len(given) != source.in_chans:
            raise ConfigError(f"data.{name} must have {source.in_chans} values, one per channel, got {len(given)}")
        fitting = list(published) if len(published) == source.in_chans else [fmean(published)] * source.in_chans
        setattr(data, name, given or fitting)
    return data


def _remarks(config: VOCEvaluation, images: Images) -> list[str]:
    """What a small folder does to the protocol, a line each.

    Raises:
        DataError: no class can be judged.
    """
    present, judged = ((rows.labels > 0).sum(0).tolist() for rows in (images.train, images.test))
    if not any(judged):
        raise DataError(f"no image of split {config.test} shows any class: there is no average precision")
    lines = []
    for k in config.svm.shots:
        few = [f"{name} {n}" for name, n in zip(images.classes, present, strict=True) if n < k]
        if few:
            lines.append(f"{k} shots: all positive train images are taken where there are fewer ({', '.join(few)})")
    if absent := [name for name, n in zip(images.classes, judged, strict=True) if not n]:
        lines.append(f"not in the mean, because no image of split {config.test} shows them: {', '.join(absent)}")
    return lines


def _svms(config: SVMConfig, images: Images, seed: int) -> list[dict[str, Any]]:
    """A row per number of shots, and one of all images; draws are from ``train``, so that ``val`` is new to them."""
    rows, unfinished, one_sided = [], 0, 0
    for shots in (*config.shots, None):
        fits = [images.train]
        if shots:
            fits = [images.train.take(draw(images.train.labels, shots, seed + i)) for i in range(config.draws)]

        def of_val(cost: float, fits: list[Rows] = fits) -> Iterator[Tensor]:
            return (svm_scores(fit, images.val.features, cost)[0] for fit in fits)

        cost = best(config.costs, of_val, images.val.labels)
        fits = fits if shots else [images.train.join(images.val)]
        scored = [svm_scores(fit, images.test.features, cost) for fit in fits]
        unfinished += sum(count for _, count in scored)
        one_sided += sum(int((scores == 0).all(0).sum()) for scores, _ in scored)
        rows.append({"classifier": "svm", "shots": shots, "cost": cost, **_merits(fits, [s for s, _ in scored], images)})
    if one_sided:
        say(f"SVMs that saw no image without their class, or none with it: {one_sided}; they score all images alike")
    if unfinished:
        say(f"SVMs that stopped at 2000 iterations, before their tolerance: {unfinished}")
    return rows


def _head(config: HeadConfig, images: Images) -> dict[str, Any]:
    train, val, test, _ = images
    decay = best(config.weight_decay, lambda decay: [head_scores(train, val.features, decay)], val.labels)
    whole = train.join(val)
    merits = _merits([whole], [head_scores(whole, test.features, decay)], images)
    return {"classifier": "linear head", "shots": None, "weight_decay": decay, **merits}


def _merits(fits: list[Rows], scores: list[Tensor], images: Images) -> dict[str, Any]:
    """Means over fits and their spread, in percent; of a single fit also `ap_area` of each class, None where unshown."""
    labels = images.test.labels
    values = {name: [100 * metric(found, labels) for found in scores] for name, metric in METRICS.items()}
    row: dict[str, Any] = {"train_images": round(fmean(len(fit.labels) for fit in fits))}
    row |= {name: fmean(found) for name, found in values.items()}
    if len(fits) > 1:
        return row | {f"{name}_std": stdev(found) for name, found in values.items()}
    each = zip(images.classes, per_class(ap_area, scores[0], labels), strict=True)
    return row | {"ap_area_per_class": {name: None if math.isnan(value) else 100 * value for name, value in each}}


def _cells(row: dict[str, Any]) -> list[Any]:
    spread = [f"{row[name]:.2f} ± {row[f'{name}_std']:.2f}" if f"{name}_std" in row else row[name] for name in METRICS]
    chosen = f"C={row['cost']:g}" if "cost" in row else f"wd={row['weight_decay']:g}"
    return [row["classifier"], row["shots"] or "all", chosen, *spread]


@main(config_path=".")
def command(values: dict[str, Any]) -> None:
    quiet_libraries()
    evaluate_voc(values)


if __name__ == "__main__":
    command()
