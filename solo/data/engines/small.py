"""The fast engine's side for small images: in memory, batches made ahead by a background thread, no worker processes."""

import weakref
from collections import defaultdict, deque
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from solo.batch import Batch
from solo.data.bad import stand_in
from solo.data.engines import Job, Payload, Slot
from solo.data.engines.ahead import ahead
from solo.data.engines.kernels import kernel
from solo.data.sources import ArraySource

_AHEAD = 4  # finished batches kept ready


class SmallEngine:
    """One background thread makes batches ahead of the consumer; ``data.threads`` share the images of a batch."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.source, ArraySource)
        self._job, self._labels, self._unreadable = job, job.source.labels, job.source.unreadable
        self._channels = job.source.images.shape[-1]
        self._kernel = kernel(job.config.kernel)(job, np.ascontiguousarray(job.source.images))
        self._memory = Memory(pinned=torch.cuda.is_available())
        threads = job.config.threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="solo-fast-kernel") if threads > 1 else None

    def batches(self, plan: Iterable[Slot]) -> Generator[Payload, None, None]:
        return ahead((self._make(slot) for slot in plan), _AHEAD, "solo-fast-engine")

    def finish(self, batch: Batch) -> Batch:
        """Nothing is left to do."""
        return batch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def _make(self, slot: Slot) -> Payload:
        samples = np.ascontiguousarray(slot.samples, dtype=np.int64)
        shown = np.array([self._readable(slot.epoch, int(i)) for i in samples]) if self._unreadable else samples
        sizes = [view.crop_size for view in self._job.views]
        views = [self._memory.take((len(samples), self._channels, size, size)) for size in sizes]
        self._fill(views, slot.epoch, samples, shown)
        return Payload(Batch(views, self._memory.hold(self._labels[shown]), self._memory.hold(shown.copy())), [])

    def _fill(self, views: list[Tensor], epoch: int, samples: np.ndarray, shown: np.ndarray) -> None:
        def fill(part: slice) -> None:
            for number, out in enumerate(views):
                self._kernel.fill(out[part], number, epoch, samples[part], shown[part])

        if self._pool is None:
            fill(slice(None))
        else:
            share = -(-len(samples) // self._job.config.threads)
            list(self._pool.map(fill, (slice(i, i + share) for i in range(0, len(samples), share))))

    def _readable(self, epoch: int, index: int) -> int:
        shown, attempt = index, 0
        while shown in self._unreadable:
            shown, attempt = stand_in(self._job.seed, epoch, index, attempt, len(self._labels)), attempt + 1
        return shown


class Memory:
    """Memory of batches, taken again when nobody holds any part of the batch that was there before.

    A tensor handed out is the only owner of a lease, and so is every tensor that shares its memory; the lease's end
    puts the memory back. Whoever keeps all batches simply gets fresh memory. Pinned memory comes from torch's own
    allocator, which keeps it likewise and also waits for the copies to the device that are still under way.
    """

    def __init__(self, pinned: bool) -> None:
        self._device = torch.cuda.current_device() if pinned else None
        self._free: dict[tuple[int, ...], deque[np.ndarray]] = defaultdict(lambda: deque(maxlen=2 * _AHEAD))

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """An uninitialised float32 tensor."""
        if self._device is not None:
            with torch.cuda.device(self._device):  # else the thread would open a context on the first one
                return torch.empty(shape, pin_memory=True)
        free = self._free[shape]
        try:
            memory = free.pop()
        except IndexError:
            memory = torch.empty(shape).numpy()
        lease = memory.view()
        weakref.finalize(lease, free.append, memory).atexit = False
        return torch.from_numpy(lease)

    def hold(self, array: np.ndarray) -> Tensor:
        """A tensor of this array, pinned like the others."""
        small = torch.from_numpy(array)
        if self._device is None:
            return small
        with torch.cuda.device(self._device):
            return small.pin_memory()
