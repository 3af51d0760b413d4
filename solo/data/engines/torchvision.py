"""The reference engine: one image at a time with torchvision's own operations, in worker processes."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from solo.batch import Batch
from solo.data.bad import load_or_replace
from solo.data.engines import ENGINES, Job, Payload, Slot
from solo.data.engines.workers import Workers
from solo.data.random import Draws
from solo.data.views import BRIGHTNESS, CONTRAST, HUE, NEUTRAL, SATURATION, SOLARIZE_THRESHOLD, Params, View, sample


@ENGINES.register("torchvision")
class TorchvisionEngine(Workers):
    """Workers make finished batches."""

    def __init__(self, job: Job) -> None:
        super().__init__(job, _Maker(job), view_bytes=4)

    def finish(self, batch: Batch) -> Batch:
        """Nothing is left to do."""
        return batch


class _Maker(Dataset):
    """Makes a whole batch from its slot, in a worker."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def __getitem__(self, slot: Slot) -> Payload:
        job = self._job
        loaded = [load_or_replace(job.source, job.seed, slot.epoch, int(i)) for i in slot.samples]
        shown = np.array([index for index, _, _ in loaded])
        images = [image for _, image, _ in loaded]
        heights, widths = (np.array([image.shape[axis] for image in images]) for axis in (0, 1))
        views = []
        for number, view in enumerate(job.views):
            params = sample(view, Draws(job.seed, slot.epoch, slot.samples, number), heights, widths)
            crops = torch.stack([apply(view, params.row(i), image) for i, image in enumerate(images)])
            views.append(normalise(crops, job.mean, job.std))
        batch = Batch(views, torch.from_numpy(job.source.labels[shown]), torch.from_numpy(shown))
        return Payload(batch, [pair for _, _, failed in loaded for pair in failed])


def blur_radius(sigma: float, size: int) -> int:
    """Taps on each side of the Gaussian: three standard deviations, as far as the crop can be reflected."""
    return min(math.ceil(3 * sigma), size - 1)


def apply(view: View, params: Params, image: np.ndarray) -> Tensor:
    """One augmented copy of one image, not yet normalised.

    Everything happens on floats in 0..1 with no rounding in between. The blur is a true Gaussian of the sampled
    sigma (reflected at the border), not PIL's approximation by repeated boxes.

    Args:
        params: the numbers of this image (`Params.row`).
        image: [H, W, C] uint8, C 1 or 3.

    Returns:
        [C, S, S] float32 in 0..1, S the view's ``crop_size``.
    """
    top, left, height, width = (int(number) for number in params.box)
    size = view.crop_size
    x = to_float(image)
    x = functional.resized_crop(x, top, left, height, width, [size, size], InterpolationMode.BICUBIC, antialias=True)
    x = x.clamp(0, 1)  # [C, S, S]
    if params.jitter:
        x = _jitter(x, params)
    if params.gray and len(x) == 3:
        x = functional.rgb_to_grayscale(x, num_output_channels=3)
    if params.blur:
        taps = 2 * blur_radius(float(params.sigma), size) + 1
        x = functional.gaussian_blur(x, [taps, 1], [float(params.sigma)])
        x = functional.gaussian_blur(x, [1, taps], [float(params.sigma)])
    if params.solarize:
        x = functional.solarize(x, SOLARIZE_THRESHOLD)
    if params.equalize:
        x = functional.equalize(x)
    return x.flip(-1) if params.flip else x


def _jitter(x: Tensor, params: Params) -> Tensor:
    adjust = {
        BRIGHTNESS: functional.adjust_brightness,
        CONTRAST: functional.adjust_contrast,
        SATURATION: functional.adjust_saturation,
        HUE: functional.adjust_hue,
    }
    for part in params.order:
        if params.factors[part] != NEUTRAL[part]:
            x = adjust[int(part)](x, float(params.factors[part]))
    return x


def clean(image: np.ndarray, size: int) -> Tensor:
    """An image as evaluation sees it, [C, size, size] in 0..1, not yet normalised.

    An image of that size stays as it is; any other is resized (shorter side to ``size * 256 / 224``) and centre-cropped.
    """
    x = to_float(image)
    if x.shape[-2:] == (size, size):
        return x
    x = functional.resize(x, [round(size * 256 / 224)], InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(x, [size, size]).clamp(0, 1)


def to_float(image: np.ndarray) -> Tensor:
    """[..., H, W, C] uint8 -> [..., C, H, W] float32 in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(image)).movedim(-1, -3).float().div(255)


def normalise(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std per channel of [..., C, H, W], contiguous."""
    shape = (-1, 1, 1)
    return ((x - x.new_tensor(mean).view(shape)) / x.new_tensor(std).view(shape)).contiguous()
