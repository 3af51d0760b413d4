"""Augmentation as solo-learn does it: torchvision's version-1 transforms on PIL images, one image and view at a time."""

import io
import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from solo.data.engines import Job
from solo.data.sources import ArraySource, Source, encoded
from solo.data.views import SIGMA, View
from solo.errors import ConfigError


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(*SIGMA)))


def compose(view: View, mean: tuple[float, ...], std: tuple[float, ...]) -> Callable[[Image.Image], Tensor]:
    """The published pipeline of one view."""
    crop, jitter = view.rrc, view.color_jitter
    scale = (crop.crop_min_scale, crop.crop_max_scale)
    parts: list[Callable] = [
        transforms.RandomResizedCrop(view.crop_size, scale=scale, interpolation=InterpolationMode.BICUBIC)
        if crop.enabled
        else transforms.Resize(view.crop_size, interpolation=InterpolationMode.BICUBIC)
    ]
    if jitter.prob:
        change = transforms.ColorJitter(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        parts.append(transforms.RandomApply([change], p=jitter.prob))
    if view.grayscale.prob:
        parts.append(transforms.RandomGrayscale(p=view.grayscale.prob))
    if view.gaussian_blur.prob:
        parts.append(transforms.RandomApply([_blur], p=view.gaussian_blur.prob))
    if view.solarization.prob:
        parts.append(transforms.RandomApply([ImageOps.solarize], p=view.solarization.prob))
    if view.equalization.prob:
        parts.append(transforms.RandomApply([ImageOps.equalize], p=view.equalization.prob))
    if view.horizontal_flip.prob:
        parts.append(transforms.RandomHorizontalFlip(p=view.horizontal_flip.prob))
    return transforms.Compose([*parts, transforms.ToTensor(), transforms.Normalize(mean, std)])


def opened(source: Source, i: int) -> Image.Image:
    """Image i as the field's dataset hands it over: from an array in memory as torchvision's CIFAR10 holds it, or decoded by
    Pillow as its ImageFolder does.
    """
    if isinstance(source, ArraySource):
        return Image.fromarray(source.images[i])
    if (content := encoded(source, i)) is None:
        raise ConfigError("solo-learn's pipeline is timed on images in memory or in files")
    return Image.open(io.BytesIO(content)).convert("RGB")


class PILBaseline:
    """Batches of the same views of the same images, which `opened` hands over."""

    def __init__(self, job: Job) -> None:
        self._source = job.source
        self._views = [compose(view, job.mean, job.std) for view in job.views]

    def batch(self, samples: np.ndarray) -> list[Tensor]:
        """The views of these images, each [n, C, S, S]."""
        shown = []
        for i in samples:
            image = opened(self._source, int(i))
            shown.append([view(image) for view in self._views])
        return [torch.stack(view) for view in zip(*shown, strict=True)]
