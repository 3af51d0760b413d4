"""kornia: a batch at a time in torch."""

import math

import kornia.augmentation as K
import numpy as np
import torch
from torch import Tensor, nn

from solo.bench.peers.arrays import pixels
from solo.data.engines import Job
from solo.data.engines.torchvision import blur_radius
from solo.data.views import LOG_RATIO, SIGMA, SOLARIZE_THRESHOLD, View


class Peer:
    """Its own operations with the recipe's numbers. Otherwise than the recipe: one order of the colour jitter a batch,
    and a bilinear crop without antialiasing, in the faster of its two modes, which is not its default (``slice``)."""

    name = "kornia"
    images = 1024

    def __init__(self, job: Job) -> None:
        self._pixels = pixels(job)
        self._views = [nn.Sequential(*_operations(view), K.Normalize(job.mean, job.std)) for view in job.views]

    @torch.inference_mode()
    def batch(self, samples: np.ndarray) -> list[Tensor]:
        x = torch.from_numpy(self._pixels[samples]).permute(0, 3, 1, 2).float().div_(255)
        return [view(x) for view in self._views]


def _operations(view: View) -> list[nn.Module]:
    crop, jitter, size = view.rrc, view.color_jitter, (view.crop_size, view.crop_size)
    scale, ratio = (crop.crop_min_scale, crop.crop_max_scale), tuple(map(math.exp, LOG_RATIO))
    factors = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    taps = 2 * blur_radius(SIGMA[1], view.crop_size) + 1
    chances = [
        (jitter.prob, lambda p: K.ColorJitter(*factors, p=p)),
        (view.grayscale.prob, lambda p: K.RandomGrayscale(p=p)),
        (view.gaussian_blur.prob, lambda p: K.RandomGaussianBlur((taps, taps), SIGMA, p=p)),
        (view.solarization.prob, lambda p: K.RandomSolarize((SOLARIZE_THRESHOLD,) * 2, (0.0, 0.0), p=p)),
        (view.equalization.prob, lambda p: K.RandomEqualize(p=p)),
        (view.horizontal_flip.prob, lambda p: K.RandomHorizontalFlip(p=p)),
    ]
    first = K.RandomResizedCrop(size, scale, ratio, cropping_mode="resample") if crop.enabled else K.Resize(size)
    return [first, *(make(chance) for chance, make in chances if chance)]
