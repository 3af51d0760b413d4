"""Representations that look at a pixel and its neighbours."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.errors import ConfigError
from solo.losses.mvmr import SCALE
from solo.representations.base import REPRESENTATIONS, bands, in_parts

_BINS, _CELL = 24, 8


@REPRESENTATIONS.register("raw")
def raw(images: Tensor) -> Iterator[Tensor]:
    """The pixels, divided by 32 as published, in `bands`."""
    return (band.flatten(1) / SCALE for band in bands(images))


@REPRESENTATIONS.register("local_std")
def local_std(images: Tensor) -> Iterator[Tensor]:
    """Standard deviation of each pixel's 3 x 3 neighbourhood, reflected at the border, in `bands`."""
    for x in bands(images, beyond=1):
        x = F.pad(x, (1, 1, 0, 0), mode="reflect")
        variance = F.avg_pool2d(x.square(), 3, 1) - F.avg_pool2d(x, 3, 1).square()
        yield (variance + 1e-8).clamp(min=0).sqrt().flatten(1)


@REPRESENTATIONS.register("hog")
def hog(images: Tensor) -> Iterator[Tensor]:
    """Histograms of 24 oriented gradients in cells of 8 x 8 pixels, a block [B, 24 * H/8 * W/8] per colour channel.

    As published, a pixel votes with its gradient's length m in the bin below its direction and with 1 - m (not an
    interpolation) in the bin above; both are one bin where the direction is a whole number of bins, and in flat areas.
    """
    height, width = images.shape[-2:]
    if min(height, width) < _CELL:
        raise ConfigError(f"the representation hog needs images of at least {_CELL} px, got {height} x {width}")
    return (in_parts(_histograms, channel, 16 * height * width) for channel in images.unbind(1))


def _histograms(channel: Tensor) -> Tensor:
    """[B, H, W] -> [B, 24 * H/8 * W/8]."""
    n, height, width = channel.shape
    rows, columns = height // _CELL, width // _CELL
    y, x = (torch.arange(cells * _CELL, device=channel.device) // _CELL for cells in (rows, columns))
    cell = _BINS * (y[:, None] * columns + x)                                   # [H, W], where its bins begin
    place = cell + _BINS * rows * columns * torch.arange(n, device=channel.device)[:, None, None]
    length, direction = (part[:, : len(y), : len(x)] for part in _gradient(channel))            # [B, H, W]
    votes = channel.new_zeros(n * rows * columns * _BINS)
    for edge, vote in ((direction.floor(), length), (direction.ceil(), 1 - length)):
        votes.index_add_(0, (place + edge.long() % _BINS).flatten(), vote.flatten())
    return votes.view(n, rows * columns, _BINS).transpose(1, 2).flatten(1) / _CELL**2


def _gradient(channel: Tensor) -> tuple[Tensor, Tensor]:
    """Length and direction, in bins between -24 and 24, of the Sobel gradient of [B, H, W], zero beyond the border."""
    x = F.pad(channel, (1, 1, 1, 1))
    across, down = x[..., :-2] - x[..., 2:], x[:, :-2] - x[:, 2:]
    g0 = across[:, :-2] + 2 * across[:, 1:-1] + across[:, 2:]
    g1 = down[..., :-2] + 2 * down[..., 1:-1] + down[..., 2:]
    return torch.hypot(g0, g1), torch.atan2(g0, g1) * (_BINS / math.pi)
