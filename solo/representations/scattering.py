"""The scattering transform of Bruna and Mallat (2013): two scales, eight angles, two orders."""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.losses.mvmr import SCALE
from solo.representations.base import REPRESENTATIONS

_J, _L = 2, 8           # scales, angles
_STEP = 2**_J           # pixels between two outputs
_PI = 3.1415            # of the published filters' norm
_AT_ONCE = 1 << 23      # complex numbers that are transformed at once


@REPRESENTATIONS.register("scattering")
def scattering(images: Tensor) -> Iterator[Tensor]:
    """81 maps of a quarter of the resolution per colour channel, divided by 32 as published, in 17 blocks of each."""
    return (channel.flatten(1) / SCALE for maps in scattering_maps(images) for channel in maps.unbind(1))


@torch.no_grad()
def scattering_maps(images: Tensor) -> Iterator[Tensor]:
    """Maps [B, C, P, H/4, W/4]: alone the image smoothed; then, for each scale and angle, its modulus smoothed, followed
    by the 8 smoothed moduli of that modulus at the next scale.

    Smoothing is separable, so that with its subsampling and the cropping of the border it is a small matrix per axis.
    """
    height, width = images.shape[-2:]
    filters = _filters(height, width, images.dtype, images.device)
    (left, right), (top, bottom) = _border(width), _border(height)
    x = F.pad(images, (left, right, top, bottom), mode="reflect")
    yield filters.smooth[0](x)[:, :, None]
    spectrum = torch.fft.fft2(x)[:, :, None]                                    # [B, C, 1, H', W']
    angles = max(1, _AT_ONCE // spectrum.numel())
    for scale in range(_J):
        for wavelet in filters.wavelets[0][scale]:
            first = _modulus(spectrum, wavelet, 2**scale)
            maps = [filters.smooth[scale](first)]
            for second in range(scale + 1, _J):
                inner = torch.fft.fft2(first)
                maps += [filters.smooth[second](_modulus(inner, some, 2 ** (second - scale)))
                         for some in filters.wavelets[scale][second].split(angles)]
            yield torch.cat(maps, dim=2)


def _padded(size: int) -> int:
    """The side after padding: a multiple of 4 with a border of at least 2 pixels on each side."""
    return ((size + _STEP) // _STEP + 1) * _STEP


def _border(size: int) -> tuple[int, int]:
    extra = _padded(size) - size
    return extra // 2, extra - extra // 2


def _modulus(spectrum: Tensor, wavelet: Tensor, step: int) -> Tensor:
    """|image * wavelet| at every ``step``-th pixel: the product of the spectra, folded and averaged."""
    (x, y), *rest = zip(_tiles(spectrum, step), _tiles(wavelet, step), strict=True)
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
    """``wavelets[r][j]``: spectra [8, H', W'] of scale j for maps of resolution 2^-r; ``smooth[r]`` for such maps."""

    wavelets: list[list[Tensor]]
    smooth: list[_Smooth]


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _filters(height: int, width: int, dtype: torch.dtype, device: torch.device) -> _Filters:
    sides = _padded(height), _padded(width)
    spectra = [torch.stack([torch.fft.fft2(_morlet(sides, j, t)).real for t in range(_L)]) for j in range(_J)]
    wavelets = [[_coarse(_coarse(spectrum, r, -2), r, -1).to(device, dtype.to_complex()) for spectrum in spectra]
                for r in range(_J)]
    smooth = [_Smooth(*(_low_pass(side, r).to(device, dtype) for side in sides)) for r in range(_J)]
    return _Filters(wavelets, smooth)


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


def _coarse(spectrum: Tensor, r: int, dim: int) -> Tensor:
    """A filter's spectrum at resolution 2^-r along one axis: the middle band set to zero, the rest folded."""
    side = spectrum.shape[dim]
    kept = torch.ones(side, dtype=spectrum.dtype)
    kept[side // 2 ** (r + 1) :][: int(side * (1 - 2.0**-r))] = 0
    kept = kept.view(-1, *[1] * (-1 - dim))
    return (spectrum * kept).unflatten(dim, (2**r, side // 2**r)).sum(dim - 1)


def _low_pass(side: int, r: int) -> Tensor:
    """The Gaussian on maps of resolution 2^-r, then every 2^(2-r)-th value, then one less on each side: a matrix."""
    sigma = 0.8 * 2 ** (_J - 1)
    x = torch.arange(-2 * side, 3 * side, dtype=torch.float64)
    gauss = torch.exp(x.square() / (-2 * sigma**2)).unflatten(0, (5, side)).sum(0) / math.sqrt(2 * _PI * sigma**2)
    spectrum = _coarse(torch.fft.fft(gauss).real, r, -1)
    circulant = torch.fft.ifft(torch.fft.fft(torch.eye(side // 2**r, dtype=torch.float64)) * spectrum).real
    return circulant[:: 2 ** (_J - r)][1:-1]
