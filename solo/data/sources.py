"""Where images come from: memory, a folder, a file of encoded images, a torchvision dataset."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from solo.console import say, warn
from solo.data.decoding import BadImage, decode, read_file
from solo.data.random import integers
from solo.data.reads import noted, retried, walk
from solo.errors import ConfigError

T = TypeVar("T")
_SIZED = 4096  # files of a folder whose sizes are asked for, evenly spread: a network may take a millisecond for each
_OF_OTHERS = (".", "__MACOSX", "lost+found")  # how folders begin that no images are looked for in
EXTENSIONS = frozenset(".jpg .jpeg .png .bmp .webp .tif .tiff .gif .ppm .pgm".split())


class Source(Protocol):
    """Images by number.

    A source that is slow to decode may have a method ``fingerprint() -> str``: another text whenever an image is another.
    `solo.data.cache` then keeps small images in their decoded form. One of encoded images has ``encoded(i) -> bytes``;
    one of named ones ``listing() -> object``, whose text tells their names and sizes, wherever they lie.

    Attributes:
        labels: [N] int64, -1 where there is none.
        classes: names of the labels; empty for an unlabelled source.
    """

    labels: np.ndarray
    classes: list[str]

    def __len__(self) -> int: ...

    def load(self, i: int) -> np.ndarray:
        """Image i, [H, W, C] uint8.

        Raises:
            BadImage: it cannot be read.
        """
        ...

    def name(self, i: int) -> str:
        """How reports name image i: its path or its number."""
        ...


def digest(*words: object) -> str:
    """A short name for what the words say."""
    return hashlib.sha256(repr(words).encode()).hexdigest()[:24]


def printable(name: str) -> str:
    """A file's name for reports: what is not UTF-8 in it becomes ``\\xNN``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    facts = path.stat()
    return facts.st_size, facts.st_mtime_ns


def listing(source: Source) -> str:
    """A short name for which images a source holds: how many, their names, labels and sizes."""
    own: object = getattr(source, "listing", lambda: None)()
    return digest(len(source), source.classes, np.asarray(source.labels, dtype=np.int64).tobytes(), own)


def encoded(source: Source, i: int) -> bytes | None:
    """The bytes of image i, or ``None`` where the source does not hold encoded images; `BadImage` where they cannot be read."""
    own: bytes | None = getattr(source, "encoded", lambda _: None)(i)
    return own


def spread(items: list[T]) -> list[T]:
    """All of them, or of many at most `_SIZED`, evenly spread."""
    return items[:: max(1, -(-len(items) // _SIZED))]


def _stamp(path: Path) -> tuple[int, int]:
    """As `stamp`; -1 of what is gone or cannot be reached: a bad image, which is replaced, not an end of the run."""
    try:
        return retried(lambda: stamp(path), path)
    except OSError:
        return -1, -1


class ArraySource:
    """Images of one size in memory.

    Args:
        images: [N, H, W, C] uint8.
        origin: the source they were read from, which keeps the names.
        unreadable: the positions that could not be read, and why; their pixels mean nothing.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        origin: Source | None = None,
        unreadable: dict[int, str] | None = None,
    ) -> None:
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)
        self.unreadable = unreadable or {}
        self._origin = origin

    def __len__(self) -> int:
        return len(self.images)

    def load(self, i: int) -> np.ndarray:
        if i in self.unreadable:
            raise BadImage(self.unreadable[i])
        return self.images[i].copy()

    def name(self, i: int) -> str:
        return self._origin.name(i) if self._origin else str(i)

    def listing(self) -> object:
        return self.images.shape


class FakeSource:
    """Random pixels, the same on every machine, with labels in turn."""

    def __init__(self, n: int, size: int, classes: int, in_chans: int, seed: int) -> None:
        self.labels = np.arange(n) % classes
        self.classes = [f"class {i}" for i in range(classes)]
        self._shape = (size, size, in_chans)
        self._seed = seed

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, i: int) -> np.ndarray:
        return integers(256, self._seed, i, np.arange(math.prod(self._shape))).astype(np.uint8).reshape(self._shape)

    def name(self, i: int) -> str:
        return str(i)


class EncodedSource:
    """Encoded images end to end in one byte array.

    Args:
        data: uint8, all files one after the other.
        offsets: [M + 1] positions in ``data``.
        rows: [N] which of the M files belong to this source.
        path: the file all this was read from.
    """

    def __init__(
        self,
        data: np.ndarray,
        offsets: np.ndarray,
        rows: np.ndarray,
        labels: np.ndarray,
        classes: Sequence[str],
        in_chans: int,
        path: Path,
    ) -> None:
        self._data, self._offsets, self._rows, self._in_chans, self._path = data, offsets, rows, in_chans, path
        self.labels = np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)

    def __len__(self) -> int:
        return len(self._rows)

    def encoded(self, i: int) -> bytes:
        """The bytes of image i."""
        row = self._rows[i]
        return self._data[self._offsets[row] : self._offsets[row + 1]].tobytes()

    def load(self, i: int) -> np.ndarray:
        return decode(self.encoded(i), self._in_chans)

    def name(self, i: int) -> str:
        return f"image {self._rows[i]}"

    def fingerprint(self) -> str:
        return digest(str(self._path.resolve()), stamp(self._path), self._rows.tobytes(), self._in_chans)

    def listing(self) -> object:
        return self._rows.tobytes(), np.diff(self._offsets)[self._rows].tobytes()


class FolderSource:
    """Image files below a folder.

    The sub-folders of ``root`` are the classes when every image lies in one of them, in sorted order; when images lie
    in ``root`` itself or only deeper than its sub-folders, or with ``labelled=False``, no image has a label. A warning
    says why labels are not read although there are sub-folders. Files that are not images by their extension are left
    out and counted.

    Raises:
        ConfigError: the folder is missing, is a file, or holds no images; ``key`` names the setting.
        DataError: a folder in it cannot be listed.
    """

    def __init__(self, root: str | Path, in_chans: int, key: str, labelled: bool = True) -> None:
        self.root, self._in_chans = Path(root), in_chans
        check_directory(self.root, key)
        self._files, self.ignored = _image_files(self.root)
        if not self._files:
            found = _kinds(self.ignored)
            raise ConfigError(f"{key}={root}: no images there{found}; give a folder of {_extension_list()} files")
        if self.ignored:
            say(f"{root}: {sum(self.ignored.values())} files that are not images ignored{_kinds(self.ignored)}")
        first = [path.split("/", 1)[0] for path in self._files]
        obstacle = _without_classes(self._files) if labelled else None
        labelled = labelled and "/" in self._files[0] and obstacle is None
        folders = sorted(set(first)) if labelled else []
        self.classes = [printable(name) for name in folders]
        number = {name: i for i, name in enumerate(folders)}
        self.labels = np.array([number[name] if labelled else -1 for name in first], dtype=np.int64)
        say(f"{root}: {len(self)} images, {f'{len(self.classes)} classes' if labelled else 'without labels'}")
        if obstacle is not None:
            warn(f"{key}={root}: no image gets a label, because {obstacle}; data.no_labels=true says that this is meant")

    def __len__(self) -> int:
        return len(self._files)

    def encoded(self, i: int) -> bytes:
        """The bytes of file i; `BadImage` where they cannot be read."""
        return read_file(self.root / self._files[i])

    def load(self, i: int) -> np.ndarray:
        return decode(self.encoded(i), self._in_chans)

    def name(self, i: int) -> str:
        return printable(str(self.root / self._files[i]))

    def fingerprint(self) -> str:
        stamps = [(file, *_stamp(self.root / file)) for file in self._files]
        return digest(str(self.root.resolve()), stamps, self._in_chans)

    def listing(self) -> object:
        return self._files, [_stamp(self.root / file)[0] for file in spread(self._files)]


def _without_classes(files: list[str]) -> str | None:
    """Why folders that look like classes are none, or ``None``: every image is in a class, or there are no folders."""
    loose = [path for path in files if "/" not in path]
    holders = {path.rsplit("/", 1)[0] for path in files if "/" in path}
    deep = [path for path in files if "/" in path and path.split("/", 1)[0] not in holders]
    if loose and holders:
        return f"{len(loose)} lie beside the folders ({loose[0]})"
    if deep:
        return f"{deep[0].split('/', 1)[0]} holds images further down only ({deep[0]}): classes are the folders right below"
    return None


def holds_images(folder: Path) -> bool:
    """Whether an image file lies in ``folder`` itself or somewhere below."""
    return any(is_image(name) for _, _, names in walk(folder) for name in names)


def check_directory(path: Path, key: str) -> None:
    """Raise a `ConfigError` that names ``key`` unless ``path`` is a folder."""
    if noted(path.is_file, path):
        raise ConfigError(f"{key}={path} is a file; give the folder that holds the images")
    if not path.is_dir():
        existing = next(parent for parent in [*path.absolute().parents] if parent.is_dir())
        raise ConfigError(f"{key}={path} does not exist (the nearest folder that does: {existing})")


def _image_files(root: Path) -> tuple[list[str], Counter[str]]:
    """Sorted paths relative to ``root``, and how many other files there are of each extension."""
    files: list[str] = []
    ignored: Counter[str] = Counter()
    for folder, subfolders, names in walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(_OF_OTHERS))
        for name in names:
            if is_image(name):
                files.append(Path(folder, name).relative_to(root).as_posix())
            else:
                ignored[_extension(name) or name] += 1
    return sorted(files), ignored


def is_image(name: str) -> bool:
    """By its extension, and not hidden."""
    return _extension(name) in EXTENSIONS and not name.startswith(".")


def _extension(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _kinds(ignored: Counter[str]) -> str:
    found = ", ".join(f"{count} {kind}" for kind, count in ignored.most_common(4))
    return f" (files of other kinds: {found})" if found else ""


def _extension_list() -> str:
    return ", ".join(sorted(EXTENSIONS))
