"""Every image of a source looked at once."""

import hashlib
import io
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from solo.bars import watched
from solo.data.config import DataConfig
from solo.data.decoding import BadImage, decode
from solo.data.duplicates import COLUMNS, ROWS, thumbnail
from solo.data.engines import Job, Payload, Slot
from solo.data.engines.workers import Workers
from solo.data.sources import Source, encoded

_AT_ONCE = 64  # images
_WORTH = 512  # images; fewer need no workers
_LEVELS = np.arange(256) / 255
_MODES = {1: "L", 3: "RGB"}


@dataclass
class Scan:
    """What was seen of n readable images.

    Attributes:
        index: [n] positions in the source; rising.
        height, width: [n] pixels, upright.
        mode: [n] colours of the file, as Pillow names them (``RGB``, ``L``, ``CMYK``, ``P``, ``RGBA``, ``I;16``, ...).
        digest: [n, 16] uint8, equal where the decoded pixels are.
        thumbnail: [n, ROWS, COLUMNS] uint8.
        mean, square: [n, C] mean of the pixels and of their squares, in 0..1.
        failed: position and reason of those that cannot be read.
    """

    index: np.ndarray
    height: np.ndarray
    width: np.ndarray
    mode: np.ndarray
    digest: np.ndarray
    thumbnail: np.ndarray
    mean: np.ndarray
    square: np.ndarray
    failed: list[tuple[int, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.index)

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel, every image weighing the same."""
        mean = self.mean.mean(axis=0)
        return mean.tolist(), np.sqrt(np.maximum(self.square.mean(axis=0) - mean**2, 0)).tolist()


def scan(source: Source, config: DataConfig, in_chans: int, what: str = "images") -> Scan:
    """Look at all images, in ``config.num_workers`` processes where that is worth it.

    Raises:
        EnvironmentFault: a worker died or hung.
    """
    chunks = [np.arange(i, min(i + _AT_ONCE, len(source))) for i in range(0, len(source), _AT_ONCE)]
    if len(source) < _WORTH:
        config = replace(config, num_workers=0)
    workers = Workers(Job(source, [], (0.0,) * in_chans, (1.0,) * in_chans, 0, config), _Look(source, in_chans), view_bytes=0)
    payloads = workers.batches(Slot(0, chunk) for chunk in chunks)
    try:
        seen = list(watched(payloads, f"looking at {len(source):,} {what}", len(chunks)))
    finally:
        payloads.close()
        workers.close()
    return _joined([payload.batch for payload in seen], [pair for payload in seen for pair in payload.failed])


def _joined(parts: list[Scan], failed: list[tuple[int, str]]) -> Scan:
    names = "index height width mode digest thumbnail mean square".split()
    return Scan(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}, failed=failed)


class _Look(Dataset):
    """The `Scan` of the images of a slot, in a worker."""

    def __init__(self, source: Source, in_chans: int) -> None:
        self._source, self._in_chans = source, in_chans

    def __getitem__(self, slot: Slot) -> Payload:
        n = len(slot.samples)
        sizes, digest = np.zeros((2, n), dtype=np.int64), np.zeros((n, 16), dtype=np.uint8)
        thumbnails, modes = np.zeros((n, ROWS, COLUMNS), dtype=np.uint8), np.full(n, "", dtype="U8")
        moments = np.zeros((2, n, self._in_chans))
        failed = []
        for row, i in enumerate(slot.samples.tolist()):
            try:
                pixels, modes[row] = self._load(i)
            except BadImage as error:
                failed.append((i, str(error)))
                continue
            sizes[:, row] = pixels.shape[:2]
            digest[row] = np.frombuffer(_digest(pixels), dtype=np.uint8)
            image = Image.fromarray(pixels.squeeze(axis=2) if self._in_chans == 1 else pixels)
            thumbnails[row] = thumbnail(image)
            shares = np.array(image.histogram()).reshape(self._in_chans, 256) / (image.width * image.height)
            moments[:, row] = shares @ _LEVELS, shares @ _LEVELS**2
        good = modes != ""
        columns = (slot.samples, *sizes, modes, digest, thumbnails, *moments)
        return Payload(Scan(*(column[good] for column in columns)), failed)

    def _load(self, i: int) -> tuple[np.ndarray, str]:
        """Pixels of image i as training sees them, and the mode of the file."""
        content = encoded(self._source, i)
        if content is None:
            pixels = self._source.load(i)
            return pixels, _MODES[pixels.shape[2]]
        pixels = decode(content, self._in_chans)
        with Image.open(io.BytesIO(content)) as image:
            return pixels, image.mode


def _digest(pixels: np.ndarray) -> bytes:
    """16 bytes that tell images apart."""
    text = hashlib.sha256(repr(pixels.shape).encode())
    text.update(np.ascontiguousarray(pixels).data)
    return text.digest()[:16]
