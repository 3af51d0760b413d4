"""The DALI engine: NVIDIA's library decodes and augments, on the GPU where the run is on one, else on the CPU.

DALI is given the bytes of each image and the numbers of `solo.data.views.sample`, and draws none itself: which images come,
in which order, and what happens to them is what every other engine does, on any number of threads and ranks and after any
resume. What it makes of the numbers is not the reference's to the bit: at the border of a crop DALI's bicubic repeats the
outermost pixels, where the reference weighs only those inside. On a GPU JPEGs are decoded by nvJPEG, which rounds in its own
way. Everything else is the reference's. It cannot equalise.

Bytes that are not plainly a whole JPEG are decoded by `solo.data.decoding`, which alone says that an image is bad, and
handed over as pixels. A JPEG that DALI cannot decode costs its graph; a new one is then given this one batch in pixels:
what a batch looks like does not depend on those before it.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from solo.batch import Batch
from solo.console import say, warn
from solo.data.bad import replaced
from solo.data.engines import ENGINES, Job, Payload, Slot
from solo.data.engines.ahead import ahead
from solo.data.engines.workers import worker_count
from solo.data.jpeg import jpeg_size
from solo.data.random import Draws
from solo.data.sources import encoded
from solo.data.views import View, sample
from solo.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    from solo.data.engines.dali_graph import Graph

_AHEAD = 2  # batches read, and batches made, that are kept ready
_LOST = 3  # graphs lost one after the other, for no bad image, before the run ends
_FAILURES = (RuntimeError, MemoryError)  # what DALI raises


class Image(NamedTuple):
    """What DALI decodes: uint8 bytes of a JPEG, or of a portable pixmap."""

    content: np.ndarray
    height: int
    width: int


class Read(NamedTuple):
    """The images of a slot, and (index, reason) of those that could not be read."""

    slot: Slot
    shown: np.ndarray  # [B] int64
    images: list[Image]
    failed: list[tuple[int, str]]


@ENGINES.register("dali")
class DaliEngine:
    """One thread reads batches, with the help of ``data.num_workers``; one runs DALI, which has as many threads of its own."""

    def __init__(self, job: Job) -> None:
        self._job, self._threads = job, max(1, worker_count(job.config.num_workers))
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="solo-dali-reader")
        self._graph: Graph | None = None
        self._lost, self._warned = 0, False
        if job.device.type != "cuda":
            say("note: data.engine=dali gains by decoding on a GPU; on a CPU data.engine=fast does the same in less time")

    @staticmethod
    def require(views: Sequence[View]) -> None:
        """See `solo.data.engines.require`; it cannot equalise, and DALI must be there."""
        for i, view in enumerate(views):
            if view.equalization.prob:
                what = "data.engine=dali cannot equalise; fast and torchvision can"
                raise ConfigError(f"augmentations[{i}].equalization: {what}")
        try:
            from solo.data.engines import dali_graph  # noqa: F401
        except ImportError as error:
            raise EnvironmentFault(f"data.engine=dali: {error}: pip install 'solo-ssl[dali]'") from error

    def batches(self, plan: Iterable[Slot]) -> Generator[Payload, None, None]:
        """The batches of ``plan`` in its order, on the job's device.

        Raises:
            EnvironmentFault: DALI cannot compute there, or fails for other reasons than an image.
        """
        return ahead(self._made(plan), _AHEAD, "solo-dali")

    def finish(self, batch: Batch) -> Batch:
        """Nothing is left to do."""
        return batch

    def close(self) -> None:
        self._pool.shutdown()
        self._graph = None

    def _made(self, plan: Iterable[Slot]) -> Generator[Payload, None, None]:
        with closing(ahead((self._read(slot, self._image) for slot in plan), _AHEAD, "solo-dali-reader")) as batches:
            for read in batches:
                yield self._payload(read)

    def _payload(self, read: Read) -> Payload:
        views = self._views(read)
        if isinstance(views, str):
            read, views = self._in_pixels(read, views)
        else:
            self._lost = 0
        labels = torch.from_numpy(self._job.source.labels[read.shown])
        return Payload(Batch(views, labels, torch.from_numpy(read.shown)), read.failed)

    def _in_pixels(self, read: Read, reason: str) -> tuple[Read, list[torch.Tensor]]:
        """The same slot without DALI's decoder, which failed for this reason or for an image that is bad."""
        name, device = "data.engine=dali", self._job.device
        pixels = self._read(read.slot, self._pixels)
        if len(pixels.failed) == len(read.failed):
            self._lost += 1
            if self._lost == _LOST:
                raise EnvironmentFault(f"{name} failed on {device} at {_LOST} batches one after the other: {reason}")
            if not self._warned:
                warn(f"{name} failed on {device}: {reason}; this batch, and others like it, are decoded without DALI")
                self._warned = True
        views = self._views(pixels)
        if isinstance(views, str):
            raise EnvironmentFault(f"{name} failed on {device} twice at the same batch: {views}")
        return pixels, views

    def _views(self, read: Read) -> list[torch.Tensor] | str:
        """The views of the images, or why DALI failed; the graph is then gone, with its memory."""
        job, slot = self._job, read.slot
        if self._graph is None:
            self._graph = self._built(len(read.images))
        heights, widths = (np.array([getattr(image, side) for image in read.images]) for side in ("height", "width"))
        draws = [Draws(job.seed, slot.epoch, slot.samples, number) for number in range(len(job.views))]
        params = [sample(view, drawn, heights, widths) for view, drawn in zip(job.views, draws, strict=True)]
        try:
            return self._graph.run([image.content for image in read.images], params)
        except _FAILURES as error:
            self._graph = None
            return _reason(error)

    def _built(self, images: int) -> "Graph":
        from solo.data.engines.dali_graph import Graph

        job = self._job
        try:
            return Graph(job.views, job.mean, job.std, job.device, images, self._threads)
        except _FAILURES as error:
            raise EnvironmentFault(f"data.engine=dali cannot compute on {job.device}: {_reason(error)}") from error

    def _read(self, slot: Slot, load: Callable[[int], Image]) -> Read:
        job = self._job

        def read(sample: int) -> tuple[int, Image, list[tuple[int, str]]]:
            return replaced(load, job.source, job.seed, slot.epoch, sample)

        shown, images, failed = zip(*self._pool.map(read, slot.samples.tolist()), strict=True)
        return Read(slot, np.array(shown), list(images), [pair for pairs in failed for pair in pairs])

    def _image(self, i: int) -> Image:
        """Image i; `BadImage` where it cannot be read."""
        content = None if self._job.in_chans != 3 else encoded(self._job.source, i)
        size = None if content is None else jpeg_size(content)
        return self._pixels(i) if content is None or size is None else Image(np.frombuffer(content, np.uint8), *size)

    def _pixels(self, i: int) -> Image:
        """Image i, decoded; `BadImage` where it cannot be."""
        return _pixmap(self._job.source.load(i))


def _reason(error: Exception) -> str:
    """What an operator of DALI met, a line, without where it stands in the graph."""
    lines = str(error).rpartition("encountered:")[2].split("\n")
    return next((line.strip() for line in lines if line.strip()), type(error).__name__)


def _pixmap(pixels: np.ndarray) -> Image:
    """Pixels [H, W, C] uint8 in the simplest format that DALI decodes."""
    height, width, channels = pixels.shape
    header = b"P%d\n%d %d\n255\n" % (6 if channels == 3 else 5, width, height)
    return Image(np.frombuffer(header + pixels.tobytes(), np.uint8), height, width)
