"""What is read of an HDF5 file: plain arrays that lie in the file itself, are no larger than it, and need no foreign code.

The first thing asked of a link is whether it is one, the first of a dataset where its data lie and how they are filtered:
HDF5 itself would open other files, load plugins and let gzip fill the memory. ``limit`` is the file's size in bytes.
"""

import re
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from solo.errors import EnvironmentFault

_SPARE = 64 << 20  # bytes that a compressed image may grow by, besides twice its size
_CHUNKS = 10_000  # of one image
BROKEN = (RuntimeError, ValueError, zlib.error)  # by HDF5 and zlib, of wrong bytes; so is OSError

T = TypeVar("T")


def library() -> Any:
    """h5py, which loads no plugins of HDF5 from here on: no file needs any, and each would be foreign code.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise EnvironmentFault("data.dataset=hdf5 needs the package h5py: pip install 'solo-ssl[h5]'") from error
    while h5py.h5pl.size():
        h5py.h5pl.remove(0)
    return h5py


def reason(error: Exception) -> str:
    """HDF5's words without what it was doing; of a file that was cut, where."""
    words = (str(error).strip("'\" ").splitlines() or [type(error).__name__])[0]
    if cut := re.search(r"truncated file: eof = (\d+).*stored_eof = (\d+)", words):
        return f"it was cut, or what wrote it was ended before: it ends at byte {cut[1]} of {cut[2]}"
    inner = re.search(r"^[Uu]nable to .*?\((.*)\)$", words)
    return (inner[1] if inner else words)[:200]


def asked(question: Callable[..., T], *words: object) -> T:
    """The answer of one call to h5py; its KeyError and TypeError are HDF5's words too, and nothing that is wrong with ours.

    Raises:
        ValueError: instead of these.
    """
    try:
        return question(*words)
    except (KeyError, TypeError) as error:
        raise ValueError(reason(error)) from error


def text(name: bytes) -> str:
    """A name as HDF5 keeps it, for reports."""
    return bytes(name).decode("utf-8", "backslashreplace")


def members(group: Any) -> list[bytes]:
    """Sorted names of what lies in a group.

    Raises:
        ValueError: it is no group, or one is a link to something that lies elsewhere.
    """
    if not isinstance(group, library().Group):
        raise ValueError(f"{group.name} is no group")
    names: list[bytes] = []
    links: list[bytes] = []

    def add(name: bytes, info: Any) -> None:
        (names if info.type == library().h5l.TYPE_HARD and b"/" not in name else links).append(name)

    group.id.links.iterate(add, info=True)
    if links:
        name = f"{group.name.rstrip('/')}/{text(links[0])}"
        raise ValueError(f"{name} is a link, which may lead anywhere: only what lies in the file itself is read")
    return sorted(names)


def read_number(file: Any, name: str) -> int | None:
    """An attribute that is a whole number, or ``None`` where there is none of that name."""
    h5py = library()
    attributes = asked(getattr, file, "attrs")
    if not asked(attributes.__contains__, name):
        return None
    attribute = h5py.h5a.open(file.id, name.encode())
    if attribute.get_type().get_class() != h5py.h5t.INTEGER or attribute.get_space().get_simple_extent_ndims():
        raise ValueError(f"its attribute {name} is no number")
    return int(asked(attributes.__getitem__, name))


def _judge(properties: Any) -> list[int]:
    """The filters of a dataset, in the order they were applied; to be asked for before anything else of it is.

    Raises:
        ValueError: its data lie elsewhere, or need more than gzip to be read.
    """
    h5py = library()
    if properties.get_layout() == h5py.h5d.VIRTUAL:
        raise ValueError("a virtual dataset, whose data lie elsewhere")
    if properties.get_external_count():
        raise ValueError("its data lie in another file")
    filters = [int(properties.get_filter(n)[0]) for n in range(properties.get_nfilters())]
    if foreign := set(filters) - {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}:
        raise ValueError(f"filtered by HDF5's number {min(foreign)}: only gzip and shuffle are read")
    return filters


def vector_in(file: Any, name: str, kinds: tuple[str, ...], limit: int) -> Any:
    """A dataset that is a vector in one piece, of these types in numpy's letters.

    Raises:
        ValueError: it is anything else.
    """
    h5py = library()
    dataset = asked(file.__getitem__, name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{name} is no array")
    try:
        _judge(dataset.id.get_create_plist())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    kind, shape = asked(getattr, dataset, "dtype"), dataset.shape
    if not kind.str[1:].startswith(kinds) or shape is None or len(shape) != 1:
        raise ValueError(f"{name} is of another type: {kind} {shape}")
    if shape[0] and (dataset.chunks or dataset.id.get_offset() is None) or shape[0] * kind.itemsize > limit:
        raise ValueError(f"{name} does not lie in the file in one piece")
    return dataset


def stored_size(dataset: Any) -> int:
    """Bytes that a dataset takes in the file."""
    _judge(dataset.get_create_plist())
    return int(dataset.get_storage_size())


def read_image(dataset: Any, limit: int) -> bytes:
    """The bytes of an encoded image: a vector of uint8, also in chunks, or one opaque value.

    Args:
        dataset: as ``h5py.h5d`` opens it.

    Raises:
        ValueError: it is anything else.
    """
    h5py = library()
    properties = dataset.get_create_plist()
    filters = _judge(properties)
    kind: Any = dataset.get_type()
    shape: tuple[int, ...] = dataset.shape or ()
    vector = kind.get_class() == h5py.h5t.INTEGER and kind.get_size() == 1 and len(shape) == 1
    if not vector and not (kind.get_class() == h5py.h5t.OPAQUE and shape == ()):
        raise ValueError("neither a vector of uint8 nor opaque: no encoded image")
    size = shape[0] if vector else kind.get_size()
    if properties.get_layout() == h5py.h5d.CHUNKED:
        return _inflated(dataset, filters, size, properties.get_chunk()[0], limit)
    if size > limit:
        raise ValueError(f"it declares {size} bytes, the file has {limit}")
    content = np.empty(size, dtype=np.uint8)
    dataset.read(h5py.h5s.ALL, h5py.h5s.ALL, content, kind)
    return content.tobytes()


def _inflated(dataset: Any, filters: list[int], size: int, chunk: int, limit: int) -> bytes:
    """The bytes of chunks. HDF5 would let gzip fill the memory, and has no need to know that shuffled bytes are themselves."""
    stored = min(stored_size(dataset), limit)
    if max(size, chunk) > 2 * stored + _SPARE or size > _CHUNKS * chunk:
        raise ValueError(f"it declares {size} bytes in chunks of {chunk}, and has {stored}")
    parts = []
    for start in range(0, size, chunk):
        if not 0 < dataset.get_chunk_info_by_coord((start,)).size <= limit:
            raise ValueError("a chunk is missing, or larger than the file")
        skipped, content = dataset.read_direct_chunk((start,))
        for n in reversed(range(len(filters))):
            if filters[n] == library().h5z.FILTER_DEFLATE and not skipped >> n & 1:
                gzip = zlib.decompressobj()
                content = gzip.decompress(content, chunk + 1)
                if not gzip.eof:
                    raise ValueError("a chunk is cut, or larger than it says")
        if len(content) != chunk:
            raise ValueError("a chunk is not of the size it says")
        parts.append(content)
    return b"".join(parts)[:size]
