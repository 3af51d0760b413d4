"""A randomly augmented copy of each image, made on the device in one batch."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.losses.mvmr import SCALE
from solo.representations.base import REPRESENTATIONS, reflected, rows_at_once

_LUMA = (0.2989, 0.587, 0.114)
_LOG_RATIO = math.log(4 / 3)


@REPRESENTATIONS.register("augmented")
def augmented(images: Tensor) -> Iterator[Tensor]:
    """Another random crop, flip, colours and blur of each normalised image, divided by 32, in bands of rows.

    Scales, strengths, probabilities and the blur's width as published. Named deviations: each image has its own random
    numbers, where the published code draws one set per batch; colours are not clamped to 0..1, which there destroys every
    negative value of a normalised image, so hue is a rotation about the grey axis; the four changes of colour have one
    order; a crop has any place and size, not whole pixels, and is cut, not drawn again, where it is longer than a side.
    """
    height, width = images.shape[-2:]
    boxes = _boxes(images)

    def crop(top: int, bottom: int, beyond: int = 0) -> Tensor:                 # [B, C, h + 2 beyond, W + 2 beyond]
        rows, columns = ((first - beyond, end + beyond) for first, end in ((top, bottom), (0, width)))
        return _cropped(images, boxes, reflected(*rows, height, images.device), reflected(*columns, width, images.device))

    sums = [crop(top, bottom).sum((2, 3)) for top, bottom in rows_at_once(height, width)]
    colours, shift = _colours(images, torch.stack(sums).sum(0) / (height * width))
    blur = _gaussians(images, min(height, width) // 20)
    for top, bottom in rows_at_once(height, width):
        yield from _finished(crop(top, bottom, beyond=blur.shape[1] // 2), colours, shift, blur)


def _finished(band: Tensor, colours: Tensor, shift: Tensor, blur: Tensor) -> Iterator[Tensor]:
    """The channels of a band of crops [B, C, h, w], coloured, blurred and divided, one after the other."""
    for matrix, offset in zip(colours.split(1, dim=1), shift.split(1, dim=1), strict=True):
        yield _blurred(torch.baddbmm(offset, matrix, band.flatten(2)).unflatten(2, band.shape[2:]), blur).flatten(1).div_(SCALE)


def _uniform(x: Tensor, low: float, high: float) -> Tensor:
    """[B] draws from torch's generator."""
    return torch.empty(len(x), dtype=x.dtype, device=x.device).uniform_(low, high)


def _boxes(x: Tensor) -> Tensor:
    """Crops of 8 % to 100 % of the area, sides 3:4 to 4:3, half of them mirrored: half width, x, half height and y of the
    centre [4, B, 1], where the image reaches from -1 to 1."""
    area, ratio = _uniform(x, 0.08, 1), _uniform(x, -_LOG_RATIO, _LOG_RATIO).exp()
    wide, high = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    left, top = (1 - wide) * _uniform(x, -1, 1), (1 - high) * _uniform(x, -1, 1)
    flip = torch.where(_uniform(x, 0, 1) < 0.5, -1.0, 1.0)
    return torch.stack([flip * wide, left, high, top])[..., None]


def _cropped(x: Tensor, boxes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels [B, C, rows, columns] of the boxes resized to the images."""
    wide, left, high, top = boxes                                               # [B, 1]
    down, across = ((2 * index + 1).to(x.dtype) / side - 1
                    for index, side in zip((rows, columns), x.shape[-2:], strict=True))
    down, across = high * down + top, wide * across + left                      # [B, rows], [B, columns]
    grid = torch.stack(torch.broadcast_tensors(across[:, None], down[..., None]), dim=-1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def _colours(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness, contrast, saturation (factors 0.2 to 1.8) and hue (0.2 turns) of 80 %, then 20 % in grey, of images whose
    channels have these means [B, C]: a matrix [B, C, C] and a shift [B, C, 1]."""
    brightness, contrast, saturation = (_uniform(x, 0.2, 1.8).view(-1, 1, 1) for _ in range(3))
    jitter, grey = ((_uniform(x, 0, 1) < chance).view(-1, 1, 1) for chance in (0.8, 0.2))
    one, luma = _grey(x)
    turned = _rotation(_uniform(x, -0.2, 0.2)) if len(one) == 3 else one
    colours = torch.where(jitter, brightness * contrast * turned @ (saturation * one + (1 - saturation) * luma), one)
    colours = torch.where(grey, luma @ colours, colours)
    shift = torch.where(jitter, brightness * (1 - contrast) * (luma @ means[..., None]), 0.0)
    return colours, shift


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


def _gaussians(x: Tensor, reach: int) -> Tensor:
    """Gaussians of 0.1 to 2 px [B, 2 reach + 1]."""
    taps = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    return (-0.5 * (taps / _uniform(x, 0.1, 2)[:, None]).square()).softmax(1)


def _blurred(x: Tensor, gaussians: Tensor) -> Tensor:
    """[B, 1, h, w] along both axes, without the border: [B, 1, h - taps + 1, w - taps + 1]."""
    weights = gaussians[:, None, :, None]                                       # [B, 1, taps, 1]
    x = F.conv2d(x.transpose(0, 1), weights, groups=len(x))
    return F.conv2d(x, weights.transpose(2, 3), groups=len(weights)).transpose(0, 1)
