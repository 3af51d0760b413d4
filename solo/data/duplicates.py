"""Images that are the same, and images that show the same, found without comparing each with each."""

import numpy as np
from PIL import Image

ROWS, COLUMNS = 16, 18  # of a thumbnail
FLAT = 2.0  # grey levels; a thumbnail of a smaller standard deviation shows nothing
_FAR = 8  # bits of 64 in which the hashes of a pair may differ
_ALIKE = 0.95  # correlation of its thumbnails
_REACH = 1024  # images of one word that each is compared with: more only where thousands share it
_BITS = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.uint8)


def thumbnail(image: Image.Image) -> np.ndarray:
    """[ROWS, COLUMNS] uint8, grey, each pixel the mean of its part of the image."""
    return np.asarray(image.convert("L").resize((COLUMNS, ROWS), Image.Resampling.BOX))


def contrast(thumbnails: np.ndarray) -> np.ndarray:
    """Standard deviation of each of [N, ROWS, COLUMNS] uint8 thumbnails: [N], in grey levels."""
    return thumbnails.reshape(len(thumbnails), ROWS * COLUMNS).std(axis=1, dtype=np.float32)


def equal_groups(digests: np.ndarray) -> list[np.ndarray]:
    """Positions of equal rows of [N, D] uint8, a sorted array for each that occurs more than once."""
    if not len(digests):
        return []
    rows = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")[:, 0]
    _, label = np.unique(rows, return_inverse=True)
    return _groups(label)


def similar_groups(thumbnails: np.ndarray) -> list[np.ndarray]:
    """Positions of images that show the same: copies compressed anew, resized, brightened; not shifted or mirrored ones.

    A pair is compared if its hashes agree in one of four words of 16 bits and differ in at most 8 of all 64: every pair that
    differs in up to 3 bits, most of those further apart. It counts if its thumbnails correlate by 0.95.

    Args:
        thumbnails: [N, ROWS, COLUMNS] uint8; those without contrast are in no group.

    Returns:
        Sorted positions, an array per group; the groups are those that pairs connect.
    """
    rows = np.flatnonzero(contrast(thumbnails) >= FLAT)
    thumbnails = thumbnails[rows]
    words = dhash(thumbnails).view(np.uint16).reshape(-1, 4)
    label = np.arange(len(rows))
    for word in range(4):
        _join_similar(label, thumbnails, words, np.lexsort([*words.T[:word], *words.T[word + 1 :], words[:, word]]), word)
    return [rows[group] for group in _groups(label)]


def dhash(thumbnails: np.ndarray) -> np.ndarray:
    """[N] uint64: whether each of 8 x 8 cells is darker than its right neighbour (the "difference hash")."""
    cells = thumbnails.reshape(-1, ROWS // 2, 2, COLUMNS // 2, 2).sum(axis=(2, 4), dtype=np.uint16)
    darker = (cells[:, :, :-1] < cells[:, :, 1:]).reshape(-1, 64)
    return np.packbits(darker, axis=1).view(np.uint64)[:, 0]


def _join_similar(label: np.ndarray, thumbnails: np.ndarray, words: np.ndarray, order: np.ndarray, word: int) -> None:
    """Give one label to similar images whose hashes agree in one word; in ``order``, [N], these follow each other."""
    first = np.arange(len(order))
    for step in range(1, _REACH):  # each with the next, the one after that, ... as long as the word is the same
        first = first[first + step < len(order)]
        first = first[words[order[first], word] == words[order[first + step], word]]
        if not len(first):
            return
        a, b = order[first], order[first + step]
        new = label[a] != label[b]
        a, b = a[new], b[new]
        near = _BITS[words[a] ^ words[b]].sum(axis=1) <= _FAR
        a, b = a[near], b[near]
        alike = _correlation(thumbnails, a, b) >= _ALIKE
        _join(label, a[alike], b[alike])


def _join(label: np.ndarray, first: np.ndarray, second: np.ndarray) -> None:
    """Give the pairs' groups one label each, the smallest; labels are positions of their group."""
    while (apart := label[first] != label[second]).any():
        first, second = first[apart], second[apart]
        smaller = np.minimum(label[first], label[second])
        for side in (first, second):
            np.minimum.at(label, label[side].copy(), smaller)
        while (label != label[label]).any():
            label[:] = label[label]


def _correlation(thumbnails: np.ndarray, first: np.ndarray, second: np.ndarray, at_once: int = 4096) -> np.ndarray:
    """Of the thumbnails of each pair: [n]."""
    found = np.empty(len(first), dtype=np.float32)
    for begin in range(0, len(first), at_once):
        part = slice(begin, begin + at_once)
        a, b = (thumbnails[side[part]].reshape(-1, ROWS * COLUMNS).astype(np.float32) for side in (first, second))
        a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
        found[part] = (a * b).sum(axis=1) / np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return found


def _groups(label: np.ndarray) -> list[np.ndarray]:
    """Positions of each label that occurs more than once, the group of the smallest position first."""
    order = np.argsort(label, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(label[order])) + 1)
    return sorted((part for part in parts if len(part) > 1), key=lambda part: int(part[0]))
