"""Parts of a source, and a source read into memory."""

from pathlib import Path

import numpy as np

from solo.data.cache import decoded
from solo.data.decoding import BadImage
from solo.data.random import integers
from solo.data.sources import ArraySource, Source, digest, encoded
from solo.errors import DataError

_MEMORY = 4 << 30  # bytes an array of images may take
_PROBES = 8


class Subset:
    """Some images of a source: ``rows`` [n] are their positions in it."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        self.source, self.rows = source, rows
        self.labels, self.classes = source.labels[rows], source.classes

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, i: int) -> np.ndarray:
        return self.source.load(int(self.rows[i]))

    def name(self, i: int) -> str:
        return self.source.name(int(self.rows[i]))

    def encoded(self, i: int) -> bytes | None:
        return encoded(self.source, int(self.rows[i]))

    def fingerprint(self) -> str | None:
        whole = getattr(self.source, "fingerprint", lambda: None)()
        return None if whole is None else digest(whole, self.rows.tobytes())


def stratified(labels: np.ndarray, count: int, first: bool) -> np.ndarray:
    """Sorted positions of ``count`` samples with each class in proportion, every class at least once where possible.

    Args:
        first: take the first samples of each class; else a fixed pseudo-random choice without replacement.
    """
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    exact = sizes * (count / len(labels))
    quota = np.floor(exact).astype(np.int64)
    if count >= len(names):
        quota = np.maximum(quota, 1)
    while quota.sum() != count:
        step = 1 if quota.sum() < count else -1
        gap = np.where(quota < sizes, exact - quota, -np.inf) if step > 0 else np.where(quota > 1, quota - exact, -np.inf)
        quota[gap.argmax()] += step
    rank = np.arange(len(labels))
    if not first:
        rank = np.argsort(integers(1 << 53, len(labels), rank), kind="stable")
    chosen = [rank[inverse[rank] == c][:q] for c, q in enumerate(quota)]
    return np.sort(np.concatenate(chosen))


def in_memory(source: Source, max_size: int, cache_dir: Path | None = None) -> Source:
    """The source as an `ArraySource` if all its images have one size of at most ``max_size`` px; else itself.

    Args:
        cache_dir: where many decoded images are kept for the next time; the user's cache folder if not given.
    """
    if isinstance(source, ArraySource):
        return source
    if isinstance(source, Subset) and isinstance(source.source, ArraySource):
        return ArraySource(source.source.images[source.rows], source.labels, source.classes, origin=source)
    shape = _first_shape(source)
    if shape is None or max(shape) > max_size or np.prod(shape) * len(source) > _MEMORY:
        return source
    content = decoded(source, shape, cache_dir)
    return source if content is None else ArraySource(content.images, source.labels, source.classes, source, content.unreadable)


def _first_shape(source: Source) -> tuple[int, ...] | None:
    for i in range(min(len(source), _PROBES)):
        try:
            return source.load(i).shape
        except BadImage:
            continue
    return None


def probe(source: Source) -> None:
    """Raise a `DataError` when none of a few images spread over the source can be read."""
    reason = ""
    for i in np.linspace(0, len(source) - 1, _PROBES).astype(int):
        try:
            source.load(int(i))
            return
        except BadImage as error:
            reason = f"{source.name(int(i))}: {error}"
    raise DataError(f"none of {_PROBES} images tried can be read; the last: {reason}")
