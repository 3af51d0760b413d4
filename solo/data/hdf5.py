"""Encoded images in one HDF5 file, of either of two layouts.

Packed, as `solo.data.pack` writes it. Once such a file is open it needs HDF5 no longer: each image is one read at a known
place. Its root has

- ``bytes``: a group of uint8 vectors, which in the order of their names make one long one; no image lies in two of them
- ``offsets`` [N + 1] int64: image i is ``bytes[offsets[i] : offsets[i + 1]]``
- ``labels`` [N] int64, -1 where there is none; ``names`` [N] and ``classes`` [K], UTF-8 of fixed length
- the attributes ``solo_images``, 1, and ``complete``, set last: the `checksum` of the four arrays

Grouped, as solo-learn writes it: a group per class, in it a dataset per image.
"""

import io
import os
import threading
import weakref
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from solo.console import say
from solo.data.decoding import BadImage, decode, patiently
from solo.data.hdf5_content import (
    BROKEN,
    asked,
    library,
    members,
    read_image,
    read_number,
    reason,
    stored_size,
    text,
    vector_in,
)
from solo.data.reads import noted, retried
from solo.data.sources import Source, digest, printable, spread, stamp
from solo.errors import ConfigError, DataError

SIGNATURE = b"\x89HDF\r\n\x1a\n"
MARK, COMPLETE = "solo_images", "complete"
ARRAYS = {"offsets": ("i", "u"), "labels": ("i", "u"), "names": ("S",), "classes": ("S",)}  # numpy's letters of types


def open_hdf5(path: Path, in_chans: int, key: str) -> Source:
    """The images of a file of either layout.

    Args:
        key: the setting that errors name.

    Raises:
        ConfigError: the file is missing, no HDF5, or of another layout.
        DataError: it is damaged, incomplete, or not data only.
        EnvironmentFault: h5py is not installed.
    """
    if not noted(path.is_file, path):
        raise ConfigError(f"{key}={path} is not a file; data.dataset=hdf5 reads one HDF5 file of encoded images")
    h5py = library()
    try:
        known = noted(partial(stamp, path), path)
        if not _is_hdf5(path):
            raise ConfigError(f"{key}={path} is no HDF5 file")
        with _opened(path, known) as file:
            packed = read_number(file, MARK) is not None
            for name in () if packed else members(file):
                if not isinstance(asked(file.__getitem__, name), h5py.Group):
                    raise ConfigError(f"{key}={path}: {text(name)} is no group of images, and solo.data.pack did not write it")
            source = (PackedSource if packed else GroupedSource)(path, file, known, in_chans)
        if not len(source):
            raise ConfigError(f"{key}={path} holds no images: neither packed by solo.data.pack nor a group of them per class")
    except (OSError, *BROKEN) as error:
        raise DataError(f"{key}={path} cannot be read: {reason(error)}") from error
    say(f"{path}: {len(source)} images, {f'{len(source.classes)} classes' if source.classes else 'without labels'}")
    return source


def checksum(offsets: np.ndarray, labels: np.ndarray, names: np.ndarray, classes: np.ndarray) -> int:
    """CRC-32 of the arrays of a packed file, numbers as little-endian int64, one after the other."""
    total = 0
    for array in (offsets.astype("<i8"), labels.astype("<i8"), names, classes):
        total = zlib.crc32(array.tobytes(), total)
    return total


class _Closeable(Protocol):
    def close(self) -> None: ...


F = TypeVar("F", bound=_Closeable)
T = TypeVar("T")


class PerProcess(Generic[F]):
    """A file that each process opens for itself, when it first needs it; what a fork inherits is closed before that.

    All threads of a process share it. It is closed when the last of them lets go of it, so each keeps it while it reads.
    """

    def __init__(self, open: Callable[[], F]) -> None:
        self._open = open
        self._held: tuple[int, F] | None = None
        self._locks: dict[int, threading.Lock] = {}

    @property
    def pid(self) -> int | None:
        """The process that opened what is held."""
        held = self._held
        return held[0] if held else None

    def get(self) -> F:
        with self._lock():
            if self._held is None or self._held[0] != os.getpid():
                if self._held is not None:
                    self._held[1].close()  # first: HDF5 would find the open file again, and share it with the parent
                self._held = os.getpid(), self._open()
            return self._held[1]

    def drop(self, file: F) -> None:
        """Open another one at the next `get`, in the place of this."""
        with self._lock():
            if self._held is not None and self._held[1] is file:
                self._held = None

    def _lock(self) -> threading.Lock:
        """This process's own: a fork may inherit one that is taken, and not the thread that would give it back."""
        return self._locks.setdefault(os.getpid(), threading.Lock())

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": self._open, "_held": None, "_locks": {}}


class _HDF5Source(ABC):
    """What both layouts have in common."""

    labels: np.ndarray
    classes: list[str]

    def __init__(self, path: Path, known: tuple[int, int], in_chans: int, open: Callable[..., Any]) -> None:
        self.path, self._known, self._in_chans = path, known, in_chans
        self.handle = PerProcess(partial(open, path, known))

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, i: int) -> bytes:
        """The bytes of image i; `BadImage` where they cannot be read."""
        return patiently(lambda: self._read(i), self.path)

    @abstractmethod
    def _read(self, i: int) -> bytes:
        """As `encoded`, in one try; an error of the system's may pass."""

    def load(self, i: int) -> np.ndarray:
        return decode(self.encoded(i), self._in_chans)

    def fingerprint(self) -> str:
        return digest(str(self.path.resolve()), self._known, self._in_chans)


class PackedSource(_HDF5Source):
    """The images of a packed file; arguments as of `open_hdf5`, and the open file."""

    def __init__(self, path: Path, file: Any, known: tuple[int, int], in_chans: int) -> None:
        super().__init__(path, known, in_chans, _binary)
        if read_number(file, MARK) != 1:
            raise ValueError("it was packed by a newer version")
        if (promised := read_number(file, COMPLETE)) is None:
            raise ValueError("it is incomplete: what wrote it was ended before")
        members(file)
        arrays = {name: vector_in(file, name, kinds, known[0])[()] for name, kinds in ARRAYS.items()}
        if checksum(**arrays) != promised:
            raise ValueError("its checksum is wrong")
        self.labels = arrays["labels"].astype(np.int64)
        self.classes = [text(name) for name in arrays["classes"]]
        self._names = arrays["names"]
        parts = members(asked(file.__getitem__, "bytes"))
        vectors = [vector_in(file, f"bytes/{text(part)}", ("u1",), known[0]) for part in parts]
        self._places, self._sizes = _places(arrays["offsets"].astype(np.int64), vectors, known[0])
        if not len(self.labels) == len(self._names) == len(self._sizes):
            raise ValueError("offsets, labels and names do not describe the same images")

    def _read(self, i: int) -> bytes:
        size, file = int(self._sizes[i]), self.handle.get()
        try:
            content = os.pread(file.fileno(), size, int(self._places[i]))
        except OSError:
            self.handle.drop(file)  # the next try opens it anew
            raise
        if len(content) < size:
            raise BadImage(f"the file ends {size - len(content)} bytes before the image does")
        return content

    def name(self, i: int) -> str:
        return printable(f"{self.path}:{text(self._names[i])}")

    def listing(self) -> object:
        return digest(self._names.tobytes()), digest(self._sizes.tobytes())


class GroupedSource(_HDF5Source):
    """The images of a file that holds a group per class; arguments as of `open_hdf5`, and the open file.

    The classes are the sorted names of the groups, also of empty ones.
    """

    def __init__(self, path: Path, file: Any, known: tuple[int, int], in_chans: int) -> None:
        super().__init__(path, known, in_chans, _opened)
        groups = members(file)
        images = [members(asked(file.__getitem__, name)) for name in groups]
        self.classes = [text(name) for name in groups]
        self.labels = np.repeat(np.arange(len(groups)), [len(names) for names in images])
        self._images = [group + b"/" + name for group, names in zip(groups, images, strict=True) for name in names]

    def _read(self, i: int) -> bytes:
        return self._of(i, lambda dataset: read_image(dataset, self._known[0]))

    def _of(self, i: int, question: Callable[[Any], T]) -> T:
        """What ``question`` finds of the dataset of image i; `BadImage` where its bytes are wrong."""
        file = self.handle.get()
        try:
            return question(asked(library().h5d.open, file.id, self._images[i]))
        except BROKEN as error:
            raise BadImage(reason(error)) from error
        except OSError as error:
            self.handle.drop(file)
            if error.errno is None:  # HDF5's own
                raise BadImage(reason(error)) from error
            raise

    def name(self, i: int) -> str:
        return printable(f"{self.path}:{text(self._images[i])}")

    def listing(self) -> object:
        return self._images, [self._size(i) for i in spread(list(range(len(self))))]

    def _size(self, i: int) -> int:
        """Bytes as they are stored, or -1 where the file is wrong and does not tell."""
        try:
            return retried(lambda: self._of(i, stored_size), self.path)
        except BadImage:
            return -1
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {reason(error)}") from error


def _checked(path: Path, known: tuple[int, int]) -> None:
    if noted(partial(stamp, path), path) != known:
        raise DataError(f"{path} has changed since it was opened")


class _Binary(io.FileIO):
    """A file whose last holder need not close it, and that is `noted` while the system is asked."""

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; zeros stand for what lies behind the file's end, as HDF5 itself has it."""
        view = memoryview(buffer).cast("B")
        left = view
        while left and (more := noted(partial(super().readinto, left), self.name)):
            left = left[more:]
        left[:] = bytes(len(left))
        return len(view)

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        return noted(partial(super().seek, place, whence), self.name)

    def __del__(self) -> None:
        self.close()


def _is_hdf5(path: Path) -> bool:
    """By the signature, at byte 0, 512, 1024, 2048, ..."""
    found = bytearray(len(SIGNATURE))
    with noted(partial(_Binary, path), path) as file:
        size = file.seek(0, os.SEEK_END)
        for place in (0, *(512 << n for n in range(size.bit_length()))):
            file.seek(place)
            file.readinto(found)
            if found == SIGNATURE:
                return True
    return False


def _binary(path: Path, known: tuple[int, int]) -> _Binary:
    _checked(path, known)
    return noted(partial(_Binary, path), path)


def _opened(path: Path, known: tuple[int, int]) -> Any:
    """HDF5 keeps the interpreter while it reads a file itself; where Python reads it on its behalf, others see how long."""
    file = library().File(_binary(path, known), "r")
    weakref.finalize(file, _closed, file.id)
    return file


def _closed(file: Any) -> None:
    """At Python's end at the latest: HDF5 closes what is left behind it, where there is no Python to ask."""
    if file.valid:
        file.close()


def _places(offsets: np.ndarray, vectors: list[Any], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each image begins in the file, and how many bytes it has."""
    lengths = np.array([len(vector) for vector in vectors] or [0], dtype=np.int64)
    begins = np.array([vector.id.get_offset() or 0 for vector in vectors] or [0], dtype=np.int64)
    bounds = np.concatenate([[0], lengths.cumsum()])
    sizes = np.diff(offsets)
    whole = len(offsets) and offsets[0] == 0 and offsets[-1] == bounds[-1] and (sizes >= 0).all()
    if not whole or lengths.sum() > limit or (begins + lengths > limit).any():
        raise ValueError("its offsets do not describe its bytes")
    vector = np.minimum(np.searchsorted(bounds, offsets[:-1], side="right") - 1, len(lengths) - 1)
    if (offsets[1:] > bounds[vector + 1]).any():
        raise ValueError("an image lies in two of its vectors")
    return begins[vector] + offsets[:-1] - bounds[vector], sizes
