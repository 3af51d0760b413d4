"""The fast engine: small images in memory, all views of a batch at once in batched torch, no worker processes."""

import atexit
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from solo.batch import Batch
from solo.data.bad import stand_in
from solo.data.engines import ENGINES, Job, Payload, Slot
from solo.data.engines.torchvision import blur_radius, normalise
from solo.data.random import Draws
from solo.data.sources import ArraySource, Source
from solo.data.views import BRIGHTNESS, CONTRAST, HUE, NEUTRAL, SATURATION, SOLARIZE_THRESHOLD, Params, View, sample

MAX_SIZE = 64
_CHUNK = 256  # images whose working set stays in the processor's cache
_AHEAD = 3  # finished batches kept ready
_LUMA = (0.2989, 0.587, 0.114)


@ENGINES.register("fast")
class FastEngine:
    """One background thread makes batches ahead of the consumer."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.source, ArraySource)
        self._job = job
        self._images = torch.from_numpy(np.ascontiguousarray(job.source.images.transpose(0, 1, 3, 2)))  # [N, H, C, W]
        self._unreadable = job.source.unreadable
        self._labels = torch.from_numpy(job.source.labels)

    @classmethod
    def refusal(cls, source: Source) -> str | None:
        if not isinstance(source, ArraySource):
            return f"it needs images of one size up to {MAX_SIZE} px that fit in memory"
        side = max(source.images.shape[1:3])
        return None if side <= MAX_SIZE else f"it takes images up to {MAX_SIZE} px, these have {side}"

    def batches(self, plan: Sequence[Slot]) -> Generator[Payload, None, None]:
        return _ahead(self._make(slot) for slot in plan)

    def close(self) -> None:
        """Nothing outlives an iterator."""

    def _make(self, slot: Slot) -> Payload:
        shown = np.array([self._readable(slot.epoch, int(i)) for i in slot.samples]) if self._unreadable else slot.samples
        rows = torch.from_numpy(shown)
        images = self._images[rows]
        heights, widths = (np.full(len(shown), images.shape[axis]) for axis in (1, 3))
        views = []
        for number, view in enumerate(self._job.views):
            params = sample(view, Draws(self._job.seed, slot.epoch, slot.samples, number), heights, widths)
            views.append(normalise(apply(view, params, images), self._job.mean, self._job.std))
        return Payload(Batch(views, self._labels[rows], rows), [])

    def _readable(self, epoch: int, index: int) -> int:
        shown, attempt = index, 0
        while shown in self._unreadable:
            shown, attempt = stand_in(self._job.seed, epoch, index, attempt, len(self._labels)), attempt + 1
        return shown


def apply(view: View, params: Params, images: Tensor) -> Tensor:
    """One augmented copy of each image, not yet normalised.

    Args:
        images: [n, H, C, W] uint8: rows of channels, so that cropping both axes is two plain matrix products.

    Returns:
        [n, C, S, S] float32 in 0..1, as the reference engine makes them.
    """
    chunks = range(0, len(images), _CHUNK)
    return torch.cat([_chunk(view, params.row(slice(i, i + _CHUNK)), images[i : i + _CHUNK]) for i in chunks])


def _chunk(view: View, params: Params, images: Tensor) -> Tensor:
    x = _crop(images, params, view.crop_size)  # [n, C, S, S]
    if view.color_jitter.prob:
        _jitter(x, params)
    if view.grayscale.prob and x.shape[1] == 3:
        rows = _rows(params.gray)
        x[rows] = _luma(x[rows]).expand(-1, 3, -1, -1)
    if view.gaussian_blur.prob:
        rows = _rows(params.blur)
        x[rows] = _blur(x[rows], params.sigma[params.blur])
    if view.solarization.prob:
        rows = _rows(params.solarize)
        part = x[rows]
        x[rows] = torch.where(part >= SOLARIZE_THRESHOLD, 1 - part, part)
    if view.equalization.prob:
        rows = _rows(params.equalize)
        x[rows] = functional.equalize(x[rows].contiguous())
    return x


def _rows(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(np.flatnonzero(mask))


def _crop(images: Tensor, params: Params, size: int) -> Tensor:
    """Crop, resize and mirror: one interpolation matrix per image and axis. Returns [n, C, S, S]."""
    n, height, channels, width = images.shape
    top, left, box_height, box_width = params.box.T
    down = _resize_table(height, size)[_entry(top, box_height, height)]  # [n, S, H]
    across = _resize_table(width, size)[_entry(left, box_width, width)]  # [n, S, W]
    flip = _rows(params.flip)
    across[flip] = across[flip].flip(1)
    x = images.view(n, height, channels * width).float().div_(255)
    x = torch.bmm(down, x)  # [n, S, C * W]
    x = torch.bmm(x.view(n, size * channels, width), across.transpose(1, 2))  # [n, S * C, S]
    return x.view(n, size, channels, size).clamp_(0, 1).transpose(1, 2)


def _entry(offset: np.ndarray, length: np.ndarray, full: int) -> Tensor:
    """Row of `_resize_table` for the crop [offset, offset + length) of an axis of ``full`` pixels."""
    before = (length - 1) * (full + 1) - (length - 1) * length // 2  # crops of all smaller lengths
    return torch.from_numpy(before + offset)


@lru_cache(maxsize=32)
def _resize_table(full: int, size: int) -> Tensor:
    """Antialiased bicubic matrices of every crop of an axis: [full * (full + 1) / 2, size, full], by length, then offset."""
    table = torch.zeros(full * (full + 1) // 2, size, full)
    row = 0
    for length in range(1, full + 1):
        matrix = _resize_matrix(length, size)
        for offset in range(full - length + 1):
            table[row, :, offset : offset + length] = matrix
            row += 1
    return table


def _resize_matrix(length: int, size: int) -> Tensor:
    """[size, length]: Keys' cubic (a = -0.5), widened when shrinking, renormalised at the edges; as torch and Pillow do."""
    if length == size:
        return torch.eye(size)
    scale = length / size
    width = max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    source = torch.arange(length, dtype=torch.float64)
    first = (centre - 2 * width + 0.5).long().clamp(min=0)
    last = (centre + 2 * width + 0.5).long().clamp(max=length)
    x = ((source - centre[:, None] + 0.5) / width).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    weight = weight * ((source >= first[:, None]) & (source < last[:, None]))
    return (weight / weight.sum(1, keepdim=True)).float()


def _jitter(x: Tensor, params: Params) -> None:
    """Colour jitter in place: at each of the four places in the order, each part on the images that have it there."""
    adjust = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
    for place in range(4):
        for part, operation in adjust.items():
            mask = params.jitter & (params.order[:, place] == part) & (params.factors[:, part] != NEUTRAL[part])
            if mask.any():
                rows = _rows(mask)
                factor = torch.from_numpy(params.factors[mask, part].astype(np.float32)).view(-1, 1, 1, 1)
                x[rows] = operation(x[rows], factor)


def _luma(x: Tensor) -> Tensor:
    """[n, C, S, S] -> [n, 1, S, S]."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (r * _LUMA[0]).add_(g, alpha=_LUMA[1]).add_(b, alpha=_LUMA[2])


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return x.mul(factor).add_(other * (1 - factor)).clamp_(0, 1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else _blend(x, _luma(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue: back from HSV each channel is v - chroma * clip(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - least
    safe = torch.where(chroma == 0, 1.0, chroma)
    six = torch.where(value == r, (g - b) / safe, torch.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4))
    k = (six + 6 * shift + torch.tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder_(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """The Gaussian along both axes as one matrix per image, reflected at the border."""
    size = x.shape[-1]
    matrix = torch.from_numpy(_blur_matrices(sigma, size))[:, None]  # [n, 1, S, S]
    return torch.matmul(matrix @ x, matrix.transpose(2, 3))


def _blur_matrices(sigma: np.ndarray, size: int) -> np.ndarray:
    radius = np.array([blur_radius(float(s), size) for s in sigma], dtype=np.int64)
    reach = int(radius.max(initial=0))
    tap = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (tap / sigma[:, None]) ** 2) * (np.abs(tap) <= radius[:, None])
    weight = (weight / weight.sum(1, keepdims=True)).astype(np.float32)  # [n, taps]
    source = np.abs(np.arange(size)[:, None] + tap)  # [S, taps], reflected at 0
    source = np.where(source >= size, 2 * (size - 1) - source, source)
    matrices = np.zeros((len(sigma), size, size), dtype=np.float32)
    for t in range(len(tap)):
        matrices[:, np.arange(size), source[:, t]] += weight[:, t, None]
    return matrices


def _ahead(payloads: Iterator[Payload]) -> Generator[Payload, None, None]:
    """The same payloads, made by one thread a little ahead. Leaving early, or an error on either side, joins it."""
    ready: queue.Queue[Payload | BaseException | None] = queue.Queue(maxsize=_AHEAD)
    stop = threading.Event()

    def put(item: Payload | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for payload in payloads:
                if not put(payload):
                    return
            put(None)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, name="solo-fast-engine", daemon=True)

    def close() -> None:
        stop.set()
        thread.join()

    thread.start()
    atexit.register(close)  # the interpreter must not end under a running thread
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        close()
        atexit.unregister(close)
