"""A randomly augmented copy of each image, made on the device in one batch."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.losses.mvmr import SCALE
from solo.representations.base import REPRESENTATIONS, bands

_LUMA = (0.2989, 0.587, 0.114)
_LOG_RATIO = math.log(4 / 3)


@REPRESENTATIONS.register("augmented")
def augmented(images: Tensor) -> Iterator[Tensor]:
    """Another random crop, flip, colours and blur of each normalised image, divided by 32, in `bands`.

    Scales, strengths and probabilities as published. Named deviations: each image has its own random numbers, where
    the published code draws one set per batch; colours are not clamped to 0..1, which there destroys every negative
    value of a normalised image, so hue is a rotation about the grey axis; a crop longer than a side is cut to it.
    """
    copies = _blurred(_recoloured(_cropped(images)))        # an image is held, the blocks are parts of it
    return (band.flatten(1) / SCALE for band in bands(copies))


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """[B] draws from torch's generator."""
    return torch.empty(len(x), dtype=x.dtype, device=x.device).uniform_(low, high)


def _cropped(x: Tensor) -> Tensor:
    """Crops of 8 % to 100 % of the area, sides 3:4 to 4:3, resized; half of them mirrored."""
    area, ratio = _uniform(x, 0.08, 1), _uniform(x, -_LOG_RATIO, _LOG_RATIO).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = (1 - wide) * _uniform(x, -1, 1), (1 - high) * _uniform(x, -1, 1)         # of the centre
    flip = torch.where(_uniform(x, 0, 1) < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(wide)
    affine = torch.stack([flip * wide, zero, left, zero, high, top], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(affine, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _recoloured(x: Tensor) -> Tensor:
    """Brightness, contrast, saturation (factors 0.2 to 1.8) and hue (0.2 turns) of 80 %, then 20 % in grey: one matrix each."""
    brightness, contrast, saturation = (_uniform(x, 0.2, 1.8).view(-1, 1, 1) for _ in range(3))
    jitter, grey = ((_uniform(x, 0, 1) < chance).view(-1, 1, 1) for chance in (0.8, 0.2))
    one, luma = _grey(x)
    turned = _rotation(_uniform(x, -0.2, 0.2)) if len(one) == 3 else one
    colours = torch.where(jitter, brightness * contrast * turned @ (saturation * one + (1 - saturation) * luma), one)
    colours = torch.where(grey, luma @ colours, colours)                                 # [B, C, C]
    mean = luma @ x.mean((2, 3))[..., None]                                              # [B, C, 1]
    shift = torch.where(jitter, brightness * (1 - contrast) * mean, 0.0)                 # [B, C, 1]
    return (colours @ x.flatten(2) + shift).view_as(x)


def _grey(x: Tensor) -> tuple[Tensor, Tensor]:
    """The identity and the projection on grey, [C, C]; grey images are grey already."""
    one = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    if len(one) != 3:
        return one, one
    return one, torch.tensor(_LUMA, dtype=x.dtype).to(x.device, non_blocking=True).expand(3, 3)


def _rotation(turns: Tensor) -> Tensor:
    """Rotations [B, 3, 3] about the grey axis."""
    angle = 2 * math.pi * turns
    cos, sin = angle.cos(), angle.sin() / math.sqrt(3)
    rest = (1 - cos) / 3
    first = torch.stack([cos + rest, rest - sin, rest + sin], dim=1)                     # [B, 3]
    return torch.stack([first, first.roll(1, 1), first.roll(2, 1)], dim=1)


def _blurred(x: Tensor) -> Tensor:
    """A Gaussian of 0.1 to 2 px over about a tenth of the side, reflected at the border."""
    n, channels, height, width = x.shape
    reach = min(height, width) // 20
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    weights = (-0.5 * (taps / _uniform(x, 0.1, 2)[:, None]).square()).softmax(1)        # [B, taps]
    weights = weights.repeat_interleave(channels, 0)[:, None, :, None]                   # [B * C, 1, taps, 1]
    x = F.pad(x, (reach,) * 4, mode="reflect").view(1, n * channels, height + 2 * reach, width + 2 * reach)
    x = F.conv2d(F.conv2d(x, weights, groups=n * channels), weights.transpose(2, 3), groups=n * channels)
    return x.view(n, channels, height, width)
