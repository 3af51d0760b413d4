"""DALI on the CPU as its users write it for speed: its own operations and random numbers, bytes or pixels from outside."""

import math
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from torch import Tensor

from solo.data.engines import Job
from solo.data.sources import ArraySource, encoded
from solo.data.views import LOG_RATIO, SIGMA, SOLARIZE_THRESHOLD, View
from solo.errors import ConfigError

_SOLARIZED = [255 - level if level >= 255 * SOLARIZE_THRESHOLD else level for level in range(256)]
Node = Any  # what flows through the graph: a value per image


class Peer:
    """Otherwise than the recipe: colour jitter and grey are one linear map of the colours (``color_twist``) in one order,
    contrast is about middle grey, hue a rotation; all but the last numbers are grey levels.

    Args:
        only_crops: leave out what follows the crops, which then are [n, S, S, C] uint8.
    """

    name = "DALI on the CPU"
    images = 1024

    def __init__(self, job: Job, only_crops: bool = False) -> None:
        if any(view.equalization.prob for view in job.views):
            raise ConfigError("--peer dali: it cannot equalise")
        self._source = job.source
        self._batch = 256 if isinstance(job.source, ArraySource) else 32
        build = pipeline_def(_graph, enable_conditionals=True)
        options = {"num_threads": 1, "device_id": None, "prefetch_queue_depth": 1, "seed": job.seed}
        self._pipeline = build(job, only_crops, batch_size=self._batch, **options)
        self._pipeline.build()

    def batch(self, samples: np.ndarray) -> list[Tensor]:
        parts = [self._made(samples[i : i + self._batch]) for i in range(0, len(samples), self._batch)]
        return parts[0] if len(parts) == 1 else [torch.cat(views) for views in zip(*parts, strict=True)]

    def _made(self, samples: np.ndarray) -> list[Tensor]:
        source = self._source
        images = source.images[samples] if isinstance(source, ArraySource) else [self._bytes(int(i)) for i in samples]
        return [torch.from_dlpack(views.as_tensor()) for views in self._pipeline.run(image=images)]

    def _bytes(self, i: int) -> np.ndarray:
        content = encoded(self._source, i)
        if content is None:
            raise ConfigError("--peer dali: images that are neither in memory nor in files")
        return np.frombuffer(content, np.uint8)


def _graph(job: Job, only_crops: bool) -> tuple[Node, ...]:
    image = fn.external_source(name="image", layout="HWC" if isinstance(job.source, ArraySource) else None)
    if not isinstance(job.source, ArraySource):
        image = fn.decoders.image(image, output_type=types.RGB)
    if only_crops:
        return tuple(_crop(view, image) for view in job.views)
    return tuple(_finish(view, _crop(view, image), job) for view in job.views)


def _crop(view: View, image: Node) -> Node:
    size, crop = (view.crop_size, view.crop_size), view.rrc
    if not crop.enabled:
        return fn.crop(fn.resize(image, size=size, mode="not_smaller", interp_type=types.INTERP_CUBIC), crop=size)
    area, ratio = (crop.crop_min_scale, crop.crop_max_scale), [math.exp(bound) for bound in LOG_RATIO]
    return fn.random_resized_crop(
        image, size=size, random_area=area, random_aspect_ratio=ratio, interp_type=types.INTERP_CUBIC
    )


def _finish(view: View, x: Node, job: Job) -> Node:
    jitter, grey, blur, solarization = view.color_jitter, view.grayscale, view.gaussian_blur, view.solarization
    if jitter.prob or grey.prob:
        on, kept = fn.random.coin_flip(probability=jitter.prob), 1 - fn.random.coin_flip(probability=grey.prob)
        *factors, (low, high) = jitter.ranges()
        brightness, contrast, saturation = (1.0 + on * fn.random.uniform(range=[a - 1, b - 1]) for a, b in factors)
        hue = on * fn.random.uniform(range=[360 * low, 360 * high])
        x = fn.color_twist(x, brightness=brightness, contrast=contrast, saturation=saturation * kept, hue=hue)
    if blur.prob:
        if fn.random.coin_flip(probability=blur.prob, dtype=types.BOOL):
            x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=list(SIGMA)))
    if solarization.prob:
        if fn.random.coin_flip(probability=solarization.prob, dtype=types.BOOL):
            x = fn.lookup_table(x, keys=list(range(256)), values=_SOLARIZED, dtype=types.UINT8)
    mean, std = ([255 * value for value in values] for values in (job.mean, job.std))
    mirror = fn.random.coin_flip(probability=view.horizontal_flip.prob)
    return fn.crop_mirror_normalize(x, mirror=mirror, mean=mean, std=std, output_layout="CHW", dtype=types.FLOAT)
