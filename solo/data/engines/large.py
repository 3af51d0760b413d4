"""The fast engine's side for large images: workers decode each once and crop it once per view; the rest is left for the device.

A crop leaves its worker as uint8, a quarter of the bytes of a finished view, mirrored if it is to be. Colour jitter,
grayscale, blur, solarisation, equalisation and normalisation follow in batch where the batch is to be used, with the
numbers that travel beside the crops on the host: no operation waits for the device to know what to do.

The one deviation from the reference engine: a crop is rounded and clipped to grey levels after each axis, as Pillow's is,
before its colours change. It is within two levels of Pillow's, and within one of the reference's but where bicubic
overshoots beyond black or white between the axes; what follows is the same to a fortieth of a level.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from solo.batch import Batch
from solo.data.bad import Loaded, load_or_replace
from solo.data.engines import Job, Payload, Slot
from solo.data.engines.kernel_torch import TorchKernel
from solo.data.engines.kernels import Kernel, kernel
from solo.data.engines.workers import Workers
from solo.data.random import Draws
from solo.data.views import Params, joined, sample

_HELD, _HELD_BYTES = 32, 64 << 20  # decoded images that a worker holds at a time: no further one beyond so many bytes


@dataclass
class Crops:
    """A batch whose views are only cropped and mirrored yet.

    Attributes:
        crops: one per view, [B, C, S, S] uint8, channels last in memory.
        params: the numbers of each view; they stay on the host.
        labels, index: as in `Batch`.
    """

    crops: list[Tensor]
    params: list[Params]
    labels: Tensor
    index: Tensor

    def to(self, device: torch.device | str) -> "Crops":
        """On its way to the device; what is pinned is not waited for."""
        crops = [x.to(device, non_blocking=True) for x in self.crops]
        labels, index = (x.to(device, non_blocking=True) for x in (self.labels, self.index))
        return Crops(crops, self.params, labels, index)

    def pin_memory(self) -> "Crops":
        """In memory that a GPU can fetch from by itself."""
        return Crops([x.pin_memory() for x in self.crops], self.params, self.labels.pin_memory(), self.index.pin_memory())


class LargeEngine(Workers):
    """Workers make `Crops`, `finish` the views of them."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _Cropper(job), view_bytes=1)
        self._on_cpu: type[Kernel] | None = None

    def finish(self, batch: Crops) -> Batch:
        """The batch's views, on the device that the crops are on."""
        maker: type[Kernel] = TorchKernel
        if batch.labels.device.type == "cpu":
            maker = self._on_cpu = self._on_cpu or kernel(self._job.config.kernel)
        views = [
            maker.finish(self._job, number, params, crops)
            for number, (params, crops) in enumerate(zip(batch.params, batch.crops, strict=True))
        ]
        return Batch(views, batch.labels, batch.index)


class _Cropper(Dataset):
    """Makes the crops of a whole batch from its slot, in a worker."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __getitem__(self, slot: Slot) -> Payload:
        job, count = self._job, len(slot.samples)
        crops = [_room(count, job.in_chans, view.crop_size) for view in job.views]
        params: list[list[Params]] = [[] for _ in job.views]
        shown: list[int] = []
        failed: list[tuple[int, str]] = []
        for first, loaded in self._decoded(slot):
            samples = slot.samples[first : first + len(loaded)]
            images = [image for _, image, _ in loaded]
            heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
            for number, view in enumerate(job.views):
                drawn = sample(view, Draws(job.seed, slot.epoch, samples, number), heights, widths)
                crop(images, drawn, crops[number][first : first + len(loaded)])
                params[number].append(drawn)
            shown += [index for index, _, _ in loaded]
            failed += [pair for _, _, pairs in loaded for pair in pairs]
        index = np.array(shown)
        labels = torch.from_numpy(job.source.labels[index])
        return Payload(Crops(crops, [joined(parts) for parts in params], labels, torch.from_numpy(index)), failed)

    def _decoded(self, slot: Slot) -> Iterator[tuple[int, list[Loaded]]]:
        """The slot's images a few at a time, with the place of the first of them."""
        held: list[Loaded] = []
        size = 0
        for place, i in enumerate(slot.samples, 1):
            held.append(load_or_replace(self._job.source, self._job.seed, slot.epoch, int(i)))
            size += held[-1][1].nbytes
            if len(held) == _HELD or size >= _HELD_BYTES or place == len(slot.samples):
                yield place - len(held), held
                held, size = [], 0


def crop(images: list[np.ndarray], params: Params, out: Tensor) -> None:
    """Crop, resize (antialiased bicubic, as Pillow's) and mirror images.

    Args:
        images: each [H, W, C] uint8.
        out: [n, C, S, S] uint8, channels last in memory, is filled.
    """
    size = list(out.shape[-2:])
    spare = _room(1, *out.shape[1:3])
    for i, (image, (top, left, height, width), flip) in enumerate(zip(images, params.box.tolist(), params.flip, strict=True)):
        cut = np.ascontiguousarray(image[top : top + height, left : left + width])
        x = torch.from_numpy(cut).permute(2, 0, 1)[None]  # channels last, which torch resizes fastest
        torch.ops.aten._upsample_bicubic2d_aa.out(x, size, False, out=spare if flip else out[i : i + 1])
        if flip:
            out[i] = spare[0].flip(-1)


def _room(count: int, channels: int, size: int) -> Tensor:
    return torch.empty((count, channels, size, size), dtype=torch.uint8, memory_format=torch.channels_last)
