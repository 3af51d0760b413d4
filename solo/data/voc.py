"""Folders in Pascal VOC layout: images with any number of classes each."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.parsers import expat

import numpy as np

from solo.data.decoding import BadImage, decode, read_file
from solo.data.reads import listed, noted
from solo.data.sources import EXTENSIONS, check_directory
from solo.errors import ConfigError, DataError

PARTS = ("Annotations", "ImageSets", "JPEGImages")
_MAX_BYTES = 4 << 20  # of an annotation


class VOCSource:
    """The images of one split.

    Attributes:
        labels: [N] int64 each image's own position: it has no single class, and the position leads to ``targets``.
        targets: [N, C] int8: 1 the class is there, 0 only in objects marked difficult, -1 not there.
        classes: names of the columns.
    """

    def __init__(self, root: Path, names: Sequence[str], objects: Mapping[str, Any], classes: list[str], in_chans: int) -> None:
        self._root, self._names, self._in_chans = root, names, in_chans
        self._reasons = {name: objects[name] for name in names if isinstance(objects[name], str)}
        self.classes = classes
        self.labels = np.arange(len(names))
        self.targets = np.full((len(names), len(classes)), -1, dtype=np.int8)
        for row, name in enumerate(names):
            if name not in self._reasons:
                for kind, certain in objects[name].items():
                    self.targets[row, classes.index(kind)] = int(certain)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, i: int) -> np.ndarray:
        """Image i, [H, W, C] uint8; `BadImage` also where its annotation cannot be read."""
        name = self._names[i]
        if name in self._reasons:
            raise BadImage(f"its annotation {self._reasons[name]}")
        for extension in (".jpg", *sorted(EXTENSIONS)):
            path = self._root / "JPEGImages" / f"{name}{extension}"
            if path.is_file():
                return decode(read_file(path), self._in_chans)
        raise BadImage("there is no such file")

    def name(self, i: int) -> str:
        return str(self._root / "JPEGImages" / self._names[i])


def open_voc(root: str | Path, splits: Sequence[str], in_chans: int) -> list[VOCSource]:
    """One source per split, all with the same classes: every name met in their annotations, sorted.

    Args:
        root: the folder of ``Annotations``, ``ImageSets`` and ``JPEGImages``, or one that holds one such folder.
        splits: names of lists in ``ImageSets/Main``, or else ``ImageSets/Layout``; no image may be in two of them.
        in_chans: 3 for RGB, 1 for grey.

    Raises:
        ConfigError: not that layout, no such split, or splits that overlap.
        DataError: fewer than one class.
    """
    folder = _find(Path(root))
    names = {split: _names(folder, split) for split in splits}
    for i, first in enumerate(splits):
        for second in splits[i + 1 :]:
            if both := set(names[first]) & set(names[second]):
                raise ConfigError(f"{len(both)} images are in split {first} and in split {second}, first {min(both)}: "
                                  f"a score needs images that were not trained on")
    objects: dict[str, dict[str, bool] | str] = {}
    for name in {name for split in splits for name in names[split]}:
        try:
            objects[name] = read_annotation(folder / "Annotations" / f"{name}.xml")
        except ValueError as error:
            objects[name] = str(error)
    classes = sorted({kind for found in objects.values() if isinstance(found, dict) for kind in found})
    if not classes:
        reasons = [reason for reason in objects.values() if isinstance(reason, str)]
        raise DataError(f"no annotation below {folder} names an object" + (f" (the first {reasons[0]})" if reasons else ""))
    return [VOCSource(folder, names[split], objects, classes, in_chans) for split in splits]


def _find(root: Path) -> Path:
    check_directory(root, "root")
    candidates = [root, *sorted(root / name for name in listed(root)[0])]
    found = [path for path in candidates if all((path / part).is_dir() for part in PARTS)]
    if len(found) > 1 and found[0] != root:
        raise ConfigError(f"root={root} holds several folders in Pascal VOC layout: give {' or '.join(map(str, found))}")
    if not found:
        raise ConfigError(f"root={root} is not in Pascal VOC layout: it needs the folders {', '.join(PARTS)}")
    return found[0]


def _names(folder: Path, split: str) -> list[str]:
    """The images of a split, each once; a line may go on with VOC's -1, 0 or 1 of one class, which is not used."""
    found = [path for kind in ("Main", "Layout") for path in sorted((folder / "ImageSets" / kind).glob("*.txt"))]
    path = next((path for path in found if path.stem == split), None)
    if path is None:
        there = ", ".join([path.stem for path in found if "_" not in path.stem]) or "none"     # aeroplane_train is one class's
        raise ConfigError(f"no split {split} in {folder / 'ImageSets'} (there: {there})")
    names = list(dict.fromkeys(line.split()[0] for line in path.read_text("utf-8", "replace").splitlines() if line.strip()))
    if strange := [name for name in names if "/" in name or "\\" in name or name.startswith(".")]:
        raise ConfigError(f"{path} holds {strange[0]!r}, which is not the name of an image in JPEGImages")
    if not names:
        raise ConfigError(f"{path} is empty")
    return names


def read_annotation(path: str | Path) -> dict[str, bool]:
    """The classes of an annotation: whether one of their objects is not marked difficult.

    Files with a document type are refused unread: entities live there, and no annotation needs them.

    Raises:
        ValueError: the file is missing, damaged, too large or something else; the message says why.
    """
    try:
        content = noted(lambda: _content(path), path)
    except OSError as error:
        raise ValueError(f"{Path(path).name} cannot be opened: {error.strerror}") from error
    if len(content) > _MAX_BYTES:
        raise ValueError(f"{Path(path).name} is larger than {_MAX_BYTES} bytes")
    try:
        tree = _parse(content)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise ValueError(f"{Path(path).name} cannot be read: {error}") from error
    found: dict[str, bool] = {}
    for thing in tree.findall("object"):
        kind = (thing.findtext("name") or "").strip()
        if not kind:
            raise ValueError(f"{Path(path).name} holds an object without a name")
        found[kind] = found.get(kind, False) or (thing.findtext("difficult") or "0").strip() != "1"
    return found


def _content(path: str | Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MAX_BYTES + 1)


def _parse(content: bytes) -> ElementTree.Element:
    """ElementTree's own parser does not say when a document type begins; expat does."""
    builder = ElementTree.TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.StartDoctypeDeclHandler = _refuse
    parser.Parse(content, True)
    tree = builder.close()
    if tree.tag != "annotation":
        raise ValueError(f"its root is <{tree.tag}>, not <annotation>")
    return tree


def _refuse(*declaration: object) -> None:
    raise ValueError("it has a document type (<!DOCTYPE ...>), which could hold entities")
