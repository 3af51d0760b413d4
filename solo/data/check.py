"""``python -m solo.data.check PATH``: a dataset's health before training: what is in it, and what is wrong with it."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from solo.console import quiet_libraries
from solo.data.check_report import Finding, Group, Part, Place, draw, show, summary
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS, kind_of
from solo.data.duplicates import FLAT, contrast, equal_groups, similar_groups
from solo.data.reads import watch
from solo.data.scan import scan as look_at
from solo.errors import ConfigError, DataError, EnvironmentFault, Parser, reported

_SMALL, _LONG = 8, 8  # shorter side in pixels; longer side over the shorter one


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    config = _config(arguments)
    watch(config.timeout)
    row = DATASETS[config.dataset]
    opened = {"train": row.open(config, True), "val": row.open(config, False)}
    in_chans = config.in_chans or row.in_chans
    for path in filter(None, (arguments.json, arguments.picture)):
        _writable(path)
    parts = [
        Part(name, source, look_at(source, config, in_chans, f"{name} images"))
        for name, source in opened.items()
        if source is not None
    ]
    found = [finding for finding in findings(parts) if finding.groups]
    show(config.dataset, parts, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(summary(config.dataset, parts, found), indent=2, ensure_ascii=False), "utf-8")
    if arguments.picture:
        draw(parts, found, arguments.picture)
    for part in parts:
        if not len(part.scan):
            raise DataError(f"none of the {len(part.source)} {part.name} images can be read: {part.scan.failed[0][1]}")
    if arguments.strict and found:
        raise DataError(f"--strict: {', '.join(f'{len(finding.groups):,} x {finding.kind}' for finding in found)}")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m solo.data.check", description=__doc__)
    parser.add_argument("path", nargs="?", metavar="PATH", help="as data.train_path: a folder, a .npz, .tar or .h5 file")
    parser.add_argument("--val", metavar="PATH", help="as data.val_path; default: what data.dataset finds by itself")
    parser.add_argument("--dataset", metavar="NAME", help="as data.dataset; default: by the kind of PATH")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there, every file by name")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw it there, as PNG")
    parser.add_argument("--workers", type=int, default=DataConfig.num_workers, metavar="N", help="processes that read images")
    parser.add_argument("--strict", action="store_true", help="exit 3 if anything was found")
    parser.add_argument("--timeout", type=float, default=DataConfig.timeout, metavar="SECONDS", help="as data.timeout")
    return parser.parse_args(argv)


def _config(arguments: argparse.Namespace) -> DataConfig:
    dataset = arguments.dataset
    if dataset is None:
        if arguments.path is None:
            raise ConfigError("give the PATH of the images, or --dataset NAME")
        dataset = kind_of(arguments.path)
    try:
        return DataConfig(
            dataset=dataset,
            train_path=arguments.path,
            val_path=arguments.val,
            num_workers=arguments.workers,
            timeout=arguments.timeout,
        )
    except ValueError as error:
        raise ConfigError(str(error).replace("num_workers", "--workers").replace("timeout", "--timeout")) from error


def _writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror}") from error


# --- what is wrong ----------------------------------------------------------------------------------------------------


def findings(parts: list[Part]) -> list[Finding]:
    """Everything looked for, also what was not found."""
    scans = [part.scan for part in parts]
    number = np.concatenate([np.full(len(scan), i) for i, scan in enumerate(scans)])
    index, digests, thumbnails = (
        np.concatenate([getattr(scan, name) for scan in scans]) for name in ("index", "digest", "thumbnail")
    )
    equal = equal_groups(digests)
    once = np.setdiff1d(np.arange(len(index)), [i for group in equal for i in group[1:]]).astype(np.int64)
    similar = [once[group] for group in similar_groups(thumbnails[once])]

    def group(rows: np.ndarray) -> Group:
        return Group([Place(int(number[i]), int(index[i])) for i in rows])

    def groups(of: list[np.ndarray], across: bool) -> list[Group]:
        return [group(rows) for rows in of if (len(set(number[rows])) > 1) == across]

    blank = np.flatnonzero(contrast(thumbnails) < FLAT)
    torn = [one for one in map(group, equal) if len({_class(parts, place) for place in one.places} - {None}) > 1]
    return [
        Finding("unreadable", "replaced in training; more than data.max_bad_fraction of them stop it", _unreadable(parts)),
        Finding("leak", "an image of the training part is in the validation part: its score is too good", groups(equal, True)),
        Finding("near leak", "nearly the same image in both parts", groups(similar, True)),
        Finding("duplicate", "the same pixels more than once", groups(equal, False)),
        Finding("near duplicate", "nearly the same image more than once", groups(similar, False)),
        Finding("label conflict", "the same pixels in several classes", torn),
        Finding("blank", "of one tone, nothing to see", [group(np.array([i])) for i in blank]),
        Finding("odd shape", f"a side below {_SMALL} px, or one more than {_LONG} times the other", list(_odd_shapes(parts))),
        Finding("class", "classes without images, or that only one part has", list(_odd_classes(parts))),
    ]


def _class(parts: list[Part], place: Place) -> str | None:
    source = parts[place.part].source
    label = int(source.labels[place.index])
    return source.classes[label] if 0 <= label < len(source.classes) else None


def _unreadable(parts: list[Part]) -> list[Group]:
    failed = [(number, i, reason) for number, part in enumerate(parts) for i, reason in part.scan.failed]
    return [Group([Place(number, i)], reason) for number, i, reason in failed]


def _odd_shapes(parts: list[Part]) -> Iterator[Group]:
    for number, part in enumerate(parts):
        sides = np.stack([part.scan.height, part.scan.width])
        short, long = sides.min(axis=0), sides.max(axis=0)
        for row in np.flatnonzero((short < _SMALL) | (long > _LONG * short)):
            yield Group([Place(number, int(part.scan.index[row]))], f"{part.scan.width[row]} x {part.scan.height[row]} px")


def _odd_classes(parts: list[Part]) -> Iterator[Group]:
    for number, part in enumerate(parts):
        outside = np.flatnonzero((part.source.labels < -1) | (part.source.labels >= max(len(part.source.classes), 1)))
        for i in outside:
            yield Group([Place(number, int(i))], f"label {part.source.labels[i]} is none of {len(part.source.classes)} classes")
        for name, count in part.per_class().items():
            if not count:
                yield Group([], f"{part.name}: class {name} has no image")
    for part, other in zip(parts, reversed(parts), strict=True):
        if part.source.classes and other.source.classes:
            for name in sorted(set(part.source.classes) - set(other.source.classes)):
                yield Group([], f"class {name} is in {part.name} only")


if __name__ == "__main__":
    quiet_libraries()
    with reported():
        main()
