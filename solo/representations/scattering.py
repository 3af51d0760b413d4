"""The scattering transform of Bruna and Mallat (2013): two scales, eight angles, two orders."""

import math
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.losses.mvmr import SCALE
from solo.representations.base import REPRESENTATIONS, in_parts

_J, _L = 2, 8           # scales, angles
_STEP = 2**_J           # pixels between two outputs
_PI = 3.1415            # of the published filters' norm


@REPRESENTATIONS.register("scattering")
def scattering(images: Tensor) -> Iterator[Tensor]:
    """81 maps of a quarter of the resolution per colour channel, divided by 32 as published, in 9 blocks of each."""
    return (maps.flatten(1).div_(SCALE) for channel in images.split(1, dim=1) for maps in scattering_maps(channel))


@torch.no_grad()
def scattering_maps(images: Tensor) -> Iterator[Tensor]:
    """Maps [B, C, 9, H/4, W/4] of the image, then of its modulus at each of the finer scale's eight angles: it smoothed,
    followed by its eight smoothed moduli at the coarser scale.

    Smoothing is separable, so that with its subsampling and the cropping of the border it is a small matrix per axis.
    Each set begins with the images anew, a few at a time, so that no spectrum is held.
    """
    channels, height, width = images.shape[1:]
    filters = _filters(height, width, images.dtype, images.device)
    numbers = 16 * channels * _padded(height) * _padded(width)
    for wavelet in (None, *filters.fine):
        yield in_parts(partial(_maps, filters=filters, wavelet=wavelet), images, numbers)


def _maps(images: Tensor, filters: "_Filters", wavelet: Tensor | None) -> Tensor:
    height, width = images.shape[-2:]
    x = F.pad(images, (*_border(width), *_border(height)), mode="reflect")[:, :, None]      # [B, C, 1, H', W']
    x = x if wavelet is None else _modulus(x, wavelet, 1)
    return torch.cat([filters.smooth[0](x), filters.smooth[1](_modulus(x, filters.coarse, 2))], dim=2)


def _padded(size: int) -> int:
    """The side after padding: a multiple of 4 with a border of at least 2 pixels on each side."""
    return ((size + _STEP) // _STEP + 1) * _STEP


def _border(size: int) -> tuple[int, int]:
    extra = _padded(size) - size
    return extra // 2, extra - extra // 2


def _modulus(x: Tensor, wavelet: Tensor, step: int) -> Tensor:
    """|x * wavelet| at every ``step``-th pixel: the product of the spectra, folded and averaged."""
    (x, y), *rest = zip(_tiles(torch.fft.fft2(x), step), _tiles(wavelet, step), strict=True)
    folded = x * y
    for x, y in rest:
        folded.addcmul_(x, y)
    wave = torch.fft.ifft2(folded)
    return torch.hypot(wave.real, wave.imag) / step**2     # twice as fast as abs on a CPU


def _tiles(x: Tensor, step: int) -> list[Tensor]:
    return [tile for rows in x.chunk(step, -2) for tile in rows.chunk(step, -1)]


class _Smooth(NamedTuple):
    """One low-pass matrix per axis, [H/4, H'] and [W/4, W']."""

    rows: Tensor
    columns: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return self.rows @ (x @ self.columns.T)


class _Filters(NamedTuple):
    """Spectra [8, H', W'] of the two scales' wavelets; ``smooth[r]`` for maps of resolution 2^-r."""

    fine: Tensor
    coarse: Tensor
    smooth: list[_Smooth]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _filters(height: int, width: int, dtype: torch.dtype, device: torch.device) -> _Filters:
    sides = _padded(height), _padded(width)
    fine, coarse = (torch.stack([torch.fft.fft2(_morlet(sides, j, t)).real for t in range(_L)]).to(device, dtype.to_complex())
                    for j in range(_J))
    smooth = [_Smooth(*(_low_pass(side, r).to(device, dtype) for side in sides)) for r in range(_J)]
    return _Filters(fine, coarse, smooth)


def _morlet(sides: tuple[int, int], j: int, t: int) -> Tensor:
    """Wavelet of scale j and angle t with zero mean, complex [H', W']."""
    angle = ((_L - _L // 2 - 1) - t) * math.pi / _L
    sigma, slant, frequency = 0.8 * 2**j, 4 / _L, 0.75 * math.pi / 2**j
    wave, envelope = (_gabor(sides, sigma, angle, xi, slant) for xi in (frequency, 0.0))
    return wave - wave.sum() / envelope.sum() * envelope


def _gabor(sides: tuple[int, int], sigma: float, angle: float, frequency: float, slant: float) -> Tensor:
    """A plane wave under a Gaussian, made periodic over 5 x 5 tiles; complex [H', W']."""
    x, y = (torch.arange(-2 * side, 3 * side, dtype=torch.float64) for side in sides)
    x, y = x[:, None], y[None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    envelope = (along.square() + slant**2 * across.square()) / (-2 * sigma**2)
    wave = torch.exp(torch.complex(envelope, frequency * along))
    tiles = wave.unflatten(0, (5, sides[0])).unflatten(2, (5, sides[1])).sum((0, 2))
    return tiles / (2 * _PI * sigma**2 / slant)


def _at_resolution(spectrum: Tensor, r: int) -> Tensor:
    """The spectrum [side] of a filter at resolution 2^-r: the middle band set to zero, the rest folded."""
    side = len(spectrum)
    kept = torch.ones(side, dtype=spectrum.dtype)
    kept[side // 2 ** (r + 1) :][: int(side * (1 - 2.0**-r))] = 0
    return (spectrum * kept).view(2**r, -1).sum(0)


def _low_pass(side: int, r: int) -> Tensor:
    """The Gaussian on maps of resolution 2^-r, then every 2^(2-r)-th value, then one less on each side: a matrix."""
    sigma = 0.8 * 2 ** (_J - 1)
    x = torch.arange(-2 * side, 3 * side, dtype=torch.float64)
    gauss = torch.exp(x.square() / (-2 * sigma**2)).unflatten(0, (5, side)).sum(0) / math.sqrt(2 * _PI * sigma**2)
    spectrum = _at_resolution(torch.fft.fft(gauss).real, r)
    circulant = torch.fft.ifft(torch.fft.fft(torch.eye(side // 2**r, dtype=torch.float64)) * spectrum).real
    return circulant[:: 2 ** (_J - r)][1:-1]
