"""The fast engine's kernel on a GPU, and where numba is absent: a batch of images at once in plain torch.

Which images an operation is for is decided on the host, where the numbers are: nothing here waits for a device.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad
from torchvision.transforms.v2 import functional

from solo.data.engines import Job
from solo.data.engines.torchvision import blur_radius
from solo.data.random import Draws
from solo.data.views import BRIGHTNESS, CONTRAST, HUE, NEUTRAL, SATURATION, SOLARIZE_THRESHOLD, Params, View, sample

_CHUNK, _LARGE_CHUNK = 128, 4  # images whose working set stays in the processor's cache
_MATRIX = 64  # pixels up to which a blur is a product of matrices, not a convolution
LUMA = (0.2989, 0.587, 0.114)


class TorchKernel:
    """Fills batches; see `solo.data.engines.kernels.Kernel`."""

    def __init__(self, job: Job, images: np.ndarray) -> None:
        self._job, self._images = job, torch.from_numpy(images)
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (job.mean, job.std))

    def fill(self, out: Tensor, number: int, epoch: int, samples: np.ndarray, shown: np.ndarray) -> None:
        heights, widths = (np.full(len(samples), side) for side in self._images.shape[1:3])
        params = sample(self._job.views[number], Draws(self._job.seed, epoch, samples, number), heights, widths)
        for i in range(0, len(samples), _CHUNK):
            part = slice(i, i + _CHUNK)
            x = _chunk(self._job.views[number], params.row(part), self._images[torch.from_numpy(shown[part])])
            torch.sub(x, self._mean, out=out[part]).div_(self._std)

    @staticmethod
    def finish(job: Job, number: int, params: Params, crops: Tensor) -> Tensor:
        """See `solo.data.engines.kernels.Kernel`."""
        mean, std = (_on(np.array(values, dtype=np.float32), crops).view(-1, 1, 1) for values in (job.mean, job.std))
        out = torch.empty(crops.shape, device=crops.device)
        chunk = len(crops) if crops.is_cuda else _LARGE_CHUNK
        for i in range(0, len(crops), chunk):
            part = slice(i, i + chunk)
            x = colour(job.views[number], params.row(part), crops[part].float().contiguous().div_(255))
            torch.sub(x, mean, out=out[part]).div_(std)
        return out


def apply(view: View, params: Params, images: np.ndarray) -> Tensor:
    """One augmented copy of each image [n, H, W, C] uint8: [n, C, S, S] float32 in 0..1."""
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(images), _CHUNK)]
    return torch.cat([_chunk(view, params.row(part), torch.from_numpy(images[part])) for part in chunks])


def _chunk(view: View, params: Params, images: Tensor) -> Tensor:
    return colour(view, params, _crop(images, params, view.crop_size))


def colour(view: View, params: Params, x: Tensor) -> Tensor:
    """What comes after crop and flip, in place: x [n, C, S, S] in 0..1, on any device."""
    if view.color_jitter.prob:
        _jitter(x, params)
    if view.grayscale.prob and x.shape[1] == 3:
        rows = _rows(params.gray, x)
        x[rows] = _luma(x[rows]).expand(-1, 3, -1, -1)
    if view.gaussian_blur.prob:
        rows = _rows(params.blur, x)
        x[rows] = _blur(x[rows], params.sigma[params.blur])
    if view.solarization.prob:
        rows = _rows(params.solarize, x)
        part = x[rows]
        x[rows] = part.lerp_(1 - part, part.ge(SOLARIZE_THRESHOLD).float())
    if view.equalization.prob:
        rows = _rows(params.equalize, x)
        x[rows] = functional.equalize(x[rows].contiguous())
    return x


def _on(array: np.ndarray, like: Tensor) -> Tensor:
    """The array on the device of ``like``, sent without waiting for it."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if like.is_cuda else x).to(like.device, non_blocking=True)


def _rows(mask: np.ndarray, like: Tensor) -> Tensor:
    return _on(np.flatnonzero(mask), like)


def _crop(images: Tensor, params: Params, size: int) -> Tensor:
    """Crop, resize and mirror: one interpolation matrix per image and axis. Returns [n, C, S, S]."""
    n, height, width, channels = images.shape
    top, left, box_height, box_width = params.box.T
    down = _resize_table(height, size)[_entry(top, box_height, height)].div_(255)  # [n, S, H]
    across = _resize_table(width, size)[_entry(left, box_width, width)]  # [n, S, W]
    flip = _rows(params.flip, across)
    across[flip] = across[flip].flip(1)
    x = images.transpose(2, 3).contiguous().view(n, height, channels * width).float()
    x = torch.bmm(down, x)  # [n, S, C * W]
    x = torch.bmm(x.view(n, size * channels, width), across.transpose(1, 2))  # [n, S * C, S]
    return x.view(n, size, channels, size).clamp_(0, 1).transpose(1, 2)


def _entry(offset: np.ndarray, length: np.ndarray, full: int) -> Tensor:
    """Row of `_resize_table` for the crop [offset, offset + length) of an axis of ``full`` pixels."""
    before = (length - 1) * (full + 1) - (length - 1) * length // 2  # crops of all smaller lengths
    return torch.from_numpy(before + offset)


@lru_cache(maxsize=32)
def _resize_table(full: int, size: int) -> Tensor:
    """Antialiased bicubic matrices of every crop of an axis: [full * (full + 1) / 2, size, full], by length, then offset."""
    table = torch.zeros(full * (full + 1) // 2, size, full)
    row = 0
    for length in range(1, full + 1):
        matrix = resize_matrix(length, size)
        for offset in range(full - length + 1):
            table[row, :, offset : offset + length] = matrix
            row += 1
    return table


def resize_matrix(length: int, size: int) -> Tensor:
    """[size, length]: Keys' cubic (a = -0.5), widened when shrinking, renormalised at the edges; as torch and Pillow do."""
    if length == size:
        return torch.eye(size)
    scale = length / size
    width = max(scale, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * scale
    source = torch.arange(length, dtype=torch.float64)
    first = (centre - 2 * width + 0.5).long().clamp(min=0)
    last = (centre + 2 * width + 0.5).long().clamp(max=length)
    x = ((source - centre[:, None] + 0.5) / width).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, torch.where(x < 2, ((-0.5 * x + 2.5) * x - 4) * x + 2, 0.0))
    weight = weight * ((source >= first[:, None]) & (source < last[:, None]))
    return (weight / weight.sum(1, keepdim=True)).float()


def _jitter(x: Tensor, params: Params) -> None:
    """Colour jitter in place: at each of the four places in the order, each part on the images that have it there."""
    adjust = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
    for place in range(4):
        for part, operation in adjust.items():
            mask = params.jitter & (params.order[:, place] == part) & (params.factors[:, part] != NEUTRAL[part])
            if mask.any():
                rows = _rows(mask, x)
                factor = _on(params.factors[mask, part].astype(np.float32), x).view(-1, 1, 1, 1)
                x[rows] = operation(x[rows], factor)


def _luma(x: Tensor) -> Tensor:
    """[n, C, S, S] -> [n, 1, S, S]."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2])


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return x.mul(factor).add_(other * (1 - factor)).clamp_(0, 1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return _blend(x, _luma(x).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else _blend(x, _luma(x), factor)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue: back from HSV each channel is v - chroma * clip(min(k, 4 - k), 0, 1), k = (n + 6 hue) mod 6."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.split(1, dim=1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    inverse = chroma.clamp(min=1e-12).reciprocal_()
    six = (r - g).mul_(inverse).add_(4)
    six.lerp_((b - r).mul_(inverse).add_(2), value.eq(g).float())  # several times faster than torch.where
    six.lerp_((g - b).mul_(inverse), value.eq(r).float())
    k = six + (6 * shift + torch.arange(5.0, 0.0, -2.0, device=x.device).view(1, 3, 1, 1))
    k.sub_((k / 6).floor_(), alpha=6)
    return torch.minimum(k, 4 - k).clamp_(0, 1).mul_(chroma).neg_().add_(value)


def _blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Each image's own Gaussian along both axes, reflected at the border; sigma [n]."""
    n, channels, size, _ = x.shape
    if not n:
        return x
    weight = _gauss(sigma, size)
    if size <= _MATRIX:  # faster there
        matrix = _on(_blur_matrices(weight, size), x)[:, None]  # [n, 1, S, S]
        return torch.matmul(matrix @ x, matrix.transpose(2, 3))
    reach, groups = weight.shape[1] // 2, n * channels
    taps = _on(weight, x).repeat_interleave(channels, 0, output_size=groups)[:, None, None]  # [n * C, 1, 1, taps]
    x = x.reshape(1, groups, size, size)
    x = conv2d(pad(x, (reach, reach, 0, 0), "reflect"), taps, groups=groups)
    x = conv2d(pad(x, (0, 0, reach, reach), "reflect"), taps.transpose(2, 3), groups=groups)
    return x.view(n, channels, size, size)


def _gauss(sigma: np.ndarray, size: int) -> np.ndarray:
    """[n, taps] float32 weights around the middle one, zero beyond each image's own radius."""
    radius = np.array([blur_radius(float(s), size) for s in sigma], dtype=np.int64)
    reach = int(radius.max())
    tap = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (tap / sigma[:, None]) ** 2) * (np.abs(tap) <= radius[:, None])
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def _blur_matrices(weight: np.ndarray, size: int) -> np.ndarray:
    """[n, S, S]: the Gaussian along one axis as a matrix."""
    taps = weight.shape[1]
    source = np.abs(np.arange(size)[:, None] + np.arange(taps) - taps // 2)  # [S, taps], reflected at 0
    source = np.where(source >= size, 2 * (size - 1) - source, source)
    matrices = np.zeros((len(weight), size, size), dtype=np.float32)
    for t in range(taps):
        matrices[:, np.arange(size), source[:, t]] += weight[:, t, None]
    return matrices
