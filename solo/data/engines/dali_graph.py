"""The DALI engine's graph: decodes, crops and colours as `apply` of the reference engine does, node by node.

No number is drawn here: what happens to an image comes in beside its bytes, and a part of the graph that is for some images
only is run with those. The only module of the data engine that imports DALI.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from torch import Tensor

from solo.data.engines.kernel_torch import LUMA
from solo.data.engines.torchvision import blur_radius
from solo.data.views import BRIGHTNESS, CONTRAST, HUE, NEUTRAL, SATURATION, SOLARIZE_THRESHOLD, Params, View

_UNTOUCHED = -1  # beside the parts of colour jitter, the numbers in `Params.order`
Node = Any  # what flows through the graph: a value per image


class Graph:
    """A pipeline for batches of at most ``images`` images.

    Args:
        device: where it decodes and computes.
        threads: of its own, on the CPU.

    Raises:
        RuntimeError: DALI cannot compute there.
    """

    def __init__(
        self, views: Sequence[View], mean: Sequence[float], std: Sequence[float], device: torch.device, images: int,
        threads: int,
    ) -> None:
        self._views, self._channels = views, len(mean)
        number = (device.index or 0) if device.type == "cuda" else None
        build = pipeline_def(_graph, enable_conditionals=True)
        options = {"num_threads": threads, "device_id": number, "prefetch_queue_depth": 1, "exec_dynamic": True}
        self._pipeline = build(views, mean, std, number is not None, batch_size=images, **options)
        self._pipeline.build()

    def run(self, contents: list[np.ndarray], params: Sequence[Params]) -> list[Tensor]:
        """The views, each [n, C, S, S] float32 and normalised, where the graph computes.

        Args:
            contents: [n] encoded images, uint8.
            params: of each view, what happens to the images.

        Raises:
            RuntimeError: an image cannot be decoded; this graph is of no more use.
        """
        values: dict[str, Any] = {"image": contents}
        for n, (view, drawn) in enumerate(zip(self._views, params, strict=True)):
            values |= {f"{name}{n}": value for name, value in _values(view, drawn, self._channels).items()}
        return [torch.from_dlpack(views.as_tensor()) for views in self._pipeline.run(**values)]


def _values(view: View, params: Params, channels: int) -> dict[str, np.ndarray]:
    """What the graph of one view asks for, by name: a row per image."""
    flag, number = np.int32, np.float32
    corner, extent = (np.ascontiguousarray(part, flag) for part in np.split(params.box, 2, axis=1))
    values = {"start": corner, "shape": extent, "flip": params.flip.astype(flag)}
    if view.color_jitter.prob:
        for slot, part in enumerate(params.order.T):
            factor = params.factors[np.arange(len(part)), part]
            changes = params.jitter & (factor != np.array(NEUTRAL)[part])
            part = np.where(changes, part, _UNTOUCHED)
            values |= {f"part{slot}_": part.astype(flag), f"factor{slot}_": factor.astype(number)}
    if view.grayscale.prob and channels == 3:
        values["gray"] = params.gray
    if view.gaussian_blur.prob:
        radius = [blur_radius(float(sigma), view.crop_size) for sigma in params.sigma]
        values |= {"blur": params.blur, "sigma": params.sigma.astype(number), "window": 2 * np.array(radius, flag) + 1}
    if view.solarization.prob:
        values["solarize"] = params.solarize
    return values


def _graph(views: Sequence[View], mean: Sequence[float], std: Sequence[float], gpu: bool) -> tuple[Node, ...]:
    kind = types.RGB if len(mean) == 3 else types.GRAY
    # One decoder for all: with a share left to a GPU's JPEG hardware, pixels would depend on the place in the batch.
    how = {"device": "mixed", "hw_decoder_load": 0.0} if gpu else {"device": "cpu"}
    image = fn.decoders.image(fn.external_source(name="image"), **how, output_type=kind, jpeg_fancy_upsampling=True)
    return tuple(_view(view, image, partial(_value, n), mean, std, gpu) for n, view in enumerate(views))


def _value(view: int, name: str) -> Node:
    return fn.external_source(name=f"{name}{view}")


def _view(
    view: View, image: Node, value: Callable[[str], Node], mean: Sequence[float], std: Sequence[float], gpu: bool
) -> Node:
    """One view of the decoded images; ``value`` gives what `_values` has under that name."""
    x = fn.slice(image, start=value("start"), shape=value("shape"), axes=(0, 1))
    size = (view.crop_size, view.crop_size)
    x = fn.resize(x, size=size, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.FLOAT)
    x = math.clamp(x / 255.0, 0.0, 1.0)  # [S, S, C]
    if view.color_jitter.prob:
        for slot in range(4):
            factor = value(f"factor{slot}_")
            x = _jitter(x, value(f"part{slot}_"), factor.gpu() if gpu else factor, len(mean))
    if view.grayscale.prob and len(mean) == 3:
        if value("gray"):
            x = fn.coord_transform(x, M=LUMA * 3)
    if view.gaussian_blur.prob:
        if value("blur"):
            x = fn.gaussian_blur(x, sigma=value("sigma"), window_size=value("window"))
    if view.solarization.prob:
        if value("solarize"):
            x = x + (x >= SOLARIZE_THRESHOLD) * (1.0 - 2.0 * x)
    return fn.crop_mirror_normalize(x, mirror=value("flip"), mean=mean, std=std, output_layout="CHW", dtype=types.FLOAT)


def _jitter(x: Node, part: Node, factor: Node, channels: int) -> Node:
    """One of the four parts of colour jitter, another one for each image."""
    if part == BRIGHTNESS:
        x = math.clamp(x * factor, 0.0, 1.0)
    elif part == CONTRAST:
        x = _towards(x, _luma(fn.reductions.mean(x, axes=[0, 1], keep_dims=True), channels), factor)
    elif part == SATURATION:
        x = _towards(x, _luma(x, channels), factor) if channels == 3 else x
    elif part == HUE:
        x = _hue(x, factor) if channels == 3 else x
    return x


def _towards(x: Node, grey: Node, factor: Node) -> Node:
    return math.clamp(x * factor + (1.0 - factor) * grey, 0.0, 1.0)


def _luma(x: Node, channels: int) -> Node:
    return fn.coord_transform(x, M=LUMA) if channels == 3 else x


def _hue(x: Node, shift: Node) -> Node:
    """As `solo.data.engines.chain`: from HSV each channel is v - chroma * clip(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6.

    6 hue + 2 is, of the channels that are the largest, the largest number that one of them would make it.
    """
    value, least = (reduced(x, axes=[2], keep_dims=True) for reduced in (fn.reductions.max, fn.reductions.min))
    chroma = value - least
    numbers = fn.coord_transform(x / math.max(chroma, 1e-6), M=[0, 1, -1, -1, 0, 1, 1, -1, 0], T=[2, 4, 6])
    six = fn.reductions.max((x == value) * numbers, axes=[2], keep_dims=True) + 6.0 * shift
    k = fn.coord_transform(six, M=[1, 1, 1], T=[3, 1, -1]) / 6.0
    k = 6.0 * (k - math.floor(k))
    return value - chroma * math.clamp(math.min(k, 4.0 - k), 0.0, 1.0)
