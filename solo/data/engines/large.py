"""The fast engine's side for large images: workers decode each once and crop it once per view; the rest is left for the device.

A crop leaves its worker as uint8, a quarter of the bytes of a finished view, mirrored if it is to be. Colour jitter,
grayscale, blur, solarisation, equalisation and normalisation follow in batch where the batch is to be used, with the
numbers that travel beside the crops on the host: no operation waits for the device to know what to do.

The one deviation from the reference engine: a crop is rounded to grey levels before its colours change. It is within
one level of the reference's; what follows is the same to a fortieth of a level.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from solo.batch import Batch
from solo.data.bad import load_or_replace
from solo.data.engines import Job, Payload, Slot
from solo.data.engines.kernel_torch import TorchKernel
from solo.data.engines.kernels import Kernel, kernel
from solo.data.engines.workers import Workers
from solo.data.random import Draws
from solo.data.views import Params, sample


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
        job = self._job
        loaded = [load_or_replace(job.source, job.seed, slot.epoch, int(i)) for i in slot.samples]
        shown = np.array([index for index, _, _ in loaded])
        images = [image for _, image, _ in loaded]
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
        crops, params = [], []
        for number, view in enumerate(job.views):
            params.append(sample(view, Draws(job.seed, slot.epoch, slot.samples, number), heights, widths))
            shape = (len(images), job.in_chans, view.crop_size, view.crop_size)
            out = torch.empty(shape, dtype=torch.uint8, memory_format=torch.channels_last)  # as the crops come
            for i, image in enumerate(images):
                out[i] = crop(image, params[-1].row(i), view.crop_size)
            crops.append(out)
        batch = Crops(crops, params, torch.from_numpy(job.source.labels[shown]), torch.from_numpy(shown))
        return Payload(batch, [pair for _, _, failed in loaded for pair in failed])


def crop(image: np.ndarray, params: Params, size: int) -> Tensor:
    """Crop, resize (antialiased bicubic, as Pillow's) and mirror one image.

    Args:
        image: [H, W, C] uint8.
        params: the numbers of this image (`Params.row`).

    Returns:
        [C, size, size] uint8.
    """
    box = [int(number) for number in params.box]
    x = torch.from_numpy(image).permute(2, 0, 1)  # channels last, which torch resizes fastest
    x = functional.resized_crop(x, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
    return x.flip(-1) if params.flip else x
