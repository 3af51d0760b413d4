"""``python -m solo.data.pack PATH FILE.h5``: many small files as one, with each image's bytes as they are."""

import argparse
import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from solo.bars import watched
from solo.console import quiet_libraries, say
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS, kind_of
from solo.data.decoding import BadImage
from solo.data.hdf5 import COMPLETE, MARK, checksum
from solo.data.hdf5_content import library, reason
from solo.data.reads import watch
from solo.data.sources import Source, encoded, printable
from solo.errors import ConfigError, DataError, EnvironmentFault, Parser, reported
from solo.files import replaced, sweep

_VECTOR = 64 << 20  # bytes after which a vector is written
_AT_ONCE = 1024  # images


def main(argv: list[str] | None = None) -> None:
    arguments = _arguments(argv)
    path, file = Path(arguments.path), arguments.file
    if file.suffix.lower() not in (".h5", ".hdf5"):
        raise ConfigError(f"{file} must be called .h5 or .hdf5")
    if file.exists():
        raise ConfigError(f"{file} exists: remove it, or give another name")
    if arguments.workers < 1:
        raise ConfigError(f"--workers must be at least 1, got {arguments.workers}")
    if not 0 < arguments.timeout < math.inf:
        raise ConfigError(f"--timeout must be positive and finite, got {arguments.timeout:g}")
    library()
    watch(arguments.timeout)
    dataset = arguments.dataset or kind_of(path)
    config = DataConfig(dataset=dataset, train_path=str(path), no_labels=arguments.no_labels)
    source = DATASETS[dataset].open(config, arguments.part == "train")
    if source is None:
        raise ConfigError(f"{path} has no validation part of its own")
    pack(source, file, [_inner(source.name(i), path) for i in range(len(source))], arguments.workers)
    say(f"{file}: {len(source):,} images, {file.stat().st_size / 2**20:,.1f} MiB")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("python -m solo.data.pack", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="as data.train_path: a folder, a .tar, .npz or .h5 file")
    parser.add_argument("file", type=Path, metavar="FILE.h5", help="to be written, for data.dataset=hdf5")
    parser.add_argument("--part", choices=("train", "val"), default="train", help="which part of PATH, if it has two")
    parser.add_argument("--dataset", metavar="NAME", help="as data.dataset; default: by the kind of PATH")
    parser.add_argument("--no-labels", action="store_true", help="as data.no_labels=true")
    parser.add_argument("--workers", type=int, default=8, metavar="N", help="threads that read images")
    parser.add_argument("--timeout", type=float, default=DataConfig.timeout, metavar="SECONDS", help="as data.timeout")
    return parser.parse_args(argv)


def _inner(name: str, path: Path) -> str:
    """An image's name below ``path``."""
    above = printable(str(path))
    return name[len(above) + 1 :] if name.startswith(above) else name


def pack(source: Source, path: Path, names: list[str], workers: int = 1) -> None:
    """Write a packed file (`solo.data.hdf5`) of all images, in their order; ``path`` is there when it is whole.

    Args:
        names: how reports are to name each image, after the file.
        workers: threads that read images.

    Raises:
        ConfigError: the images are not encoded.
        DataError: an image's bytes cannot be read, or its source fails otherwise.
        EnvironmentFault: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with replaced(path) as opened, library().File(opened.name, "w", libver=("v110", "v110"), locking=False) as file:
            file.attrs[MARK] = 1
            sizes = _write_bytes(file.create_group("bytes"), source, workers)
            offsets, labels = np.cumsum([0, *sizes]), np.asarray(source.labels, dtype=np.int64)
            texts = [np.array([text.encode("utf-8", "surrogateescape") for text in words], dtype=np.bytes_)
                     for words in (names, source.classes)]
            arrays = dict(zip(("offsets", "labels", "names", "classes"), (offsets, labels, *texts), strict=True))
            for name, array in arrays.items():
                utf8 = library().string_dtype("utf-8", array.itemsize)
                file[name] = array.astype(utf8) if array.dtype.kind == "S" else array
            file.flush()
            file.attrs[COMPLETE] = checksum(**arrays)
    except (OSError, RuntimeError) as error:  # HDF5 has both for a full disk; those of the reader are `DataError` by now
        raise EnvironmentFault(f"{path} cannot be written: {reason(error)}") from error


def _write_bytes(group: Any, source: Source, workers: int) -> list[int]:
    """How many bytes each image has."""
    sizes: list[int] = []
    waiting = bytearray()
    for content in watched(_contents(source, workers), "packing images", len(source)):
        sizes.append(len(content))
        waiting += content
        if len(waiting) >= _VECTOR or len(sizes) == len(source):
            group.create_dataset(f"{len(group):06d}", data=np.frombuffer(waiting, dtype=np.uint8))
            waiting = bytearray()
    return sizes


def _content(source: Source, i: int) -> bytes:
    try:
        content = encoded(source, i)
    except (BadImage, OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{source.name(i)} cannot be read, so nothing is packed: {reason(error)}") from error
    if content is None:
        raise ConfigError(f"image {source.name(i)} is not kept encoded, so there is nothing to pack")
    return content


def _contents(source: Source, workers: int) -> Iterator[bytes]:
    """The bytes of all images, in order."""
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(source), _AT_ONCE):
            yield from pool.map(functools.partial(_content, source), range(first, min(first + _AT_ONCE, len(source))))


if __name__ == "__main__":
    quiet_libraries()
    with reported():
        main()
