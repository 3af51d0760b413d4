"""What peers of small images share: the images, and the crop's box as torchvision draws it."""

import math
import random

import numpy as np

from solo.data.engines import Job
from solo.data.sources import ArraySource
from solo.data.views import CROP_TRIES, LOG_RATIO, Crop
from solo.errors import ConfigError


def pixels(job: Job) -> np.ndarray:
    """The job's images, [N, H, W, C] uint8."""
    if not isinstance(job.source, ArraySource):
        raise ConfigError("--peer: this one is timed on images in memory")
    return np.asarray(job.source.images)  # a memory map is slow to index


def box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width."""
    if crop.enabled:
        for _ in range(CROP_TRIES):
            area = height * width * random.uniform(crop.crop_min_scale, crop.crop_max_scale)
            ratio = math.exp(random.uniform(*LOG_RATIO))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return random.randint(0, height - h), random.randint(0, width - w), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side
