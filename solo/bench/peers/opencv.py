"""OpenCV and numpy, one image at a time, as its users write it: 8 bits between the operations, tables where they do."""

import random

import cv2
import numpy as np
import torch
from torch import Tensor

from solo.bench.peers.arrays import box, pixels
from solo.data.engines import Job
from solo.data.views import BRIGHTNESS, CONTRAST, SATURATION, SIGMA, SOLARIZE_THRESHOLD, View

_LEVELS = np.arange(256)
_SOLARIZED = np.where(_LEVELS < 255 * SOLARIZE_THRESHOLD, _LEVELS, 255 - _LEVELS).astype(np.uint8)
_DEGREES = 180  # OpenCV's hue has two of the circle's degrees to each level


class Peer:
    """Otherwise than the recipe: a crop that is made smaller is not antialiased, and the hue turns in 180 steps."""

    name = "OpenCV and numpy"
    images = 1024

    def __init__(self, job: Job) -> None:
        cv2.setNumThreads(0)
        self._pixels, self._views = pixels(job), job.views
        self._scale = 1 / (255 * np.array(job.std, np.float32))
        self._shift = -np.array(job.mean, np.float32) / np.array(job.std, np.float32)

    def batch(self, samples: np.ndarray) -> list[Tensor]:
        views = [np.empty((len(samples), 3, view.crop_size, view.crop_size), np.float32) for view in self._views]
        for place, i in enumerate(samples):
            for view, out in zip(self._views, views, strict=True):
                shown = augment(view, self._pixels[i]) * self._scale + self._shift
                out[place] = shown.transpose(2, 0, 1)
        return [torch.from_numpy(view) for view in views]


def augment(view: View, image: np.ndarray) -> np.ndarray:
    """[H, W, 3] uint8 -> [S, S, 3] uint8."""
    top, left, height, width = box(view.rrc, *image.shape[:2])
    x = cv2.resize(image[top : top + height, left : left + width], (view.crop_size,) * 2, interpolation=cv2.INTER_CUBIC)
    if random.random() < view.color_jitter.prob:
        ranges = view.color_jitter.ranges()
        for part in random.sample(range(4), 4):
            x = _change(x, part, random.uniform(*ranges[part]))
    if random.random() < view.grayscale.prob:
        x = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    if random.random() < view.gaussian_blur.prob:
        x = cv2.GaussianBlur(x, (0, 0), random.uniform(*SIGMA))
    if random.random() < view.solarization.prob:
        x = cv2.LUT(x, _SOLARIZED)
    if random.random() < view.equalization.prob:
        x = cv2.merge([cv2.equalizeHist(channel) for channel in cv2.split(x)])
    return cv2.flip(x, 1) if random.random() < view.horizontal_flip.prob else x


def _change(x: np.ndarray, part: int, factor: float) -> np.ndarray:
    if part == BRIGHTNESS:
        return cv2.convertScaleAbs(x, alpha=factor)     # of its ways the fastest: a table takes longer to build than to apply
    if part == CONTRAST:
        return cv2.addWeighted(x, factor, x, 0, (1 - factor) * cv2.mean(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY))[0])
    if part == SATURATION:
        grey = cv2.cvtColor(cv2.cvtColor(x, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        return cv2.addWeighted(x, factor, grey, 1 - factor, 0)
    hue, saturation, value = cv2.split(cv2.cvtColor(x, cv2.COLOR_RGB2HSV))
    turned = cv2.LUT(hue, ((_LEVELS + round(factor * _DEGREES)) % _DEGREES).astype(np.uint8))
    return cv2.cvtColor(cv2.merge([turned, saturation, value]), cv2.COLOR_HSV2RGB)
