"""Two embedded datasets drawn from the handwritten digits inside scikit-learn: nothing is downloaded."""

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from solo.data.random import Draws, order
from solo.data.sources import ArraySource

SIZE = 32
TRAIN = 1400
DRAWINGS = 5  # cluttered drawings per digit
CLASSES = [str(digit) for digit in range(10)]


@lru_cache(maxsize=1)
def _strokes() -> tuple[np.ndarray, np.ndarray]:
    """All digits in a fixed shuffled order: [1797, 32, 32] float32 in 0..1 (0 paper, 1 ink), [1797] labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    shuffled = order(0, 0, len(data.target))
    grey = (data.images[shuffled] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC)) for image in grey]
    return np.stack(large).astype(np.float32) / 255, data.target[shuffled].astype(np.int64)


def _part(train: bool) -> slice:
    return slice(0, TRAIN) if train else slice(TRAIN, None)


def digits(train: bool) -> ArraySource:
    """White digits on black, [1400 or 397, 32, 32, 3]."""
    strokes, labels = (array[_part(train)] for array in _strokes())
    grey = np.rint(strokes * 255).astype(np.uint8)
    return ArraySource(np.repeat(grey[..., None], 3, axis=-1), labels, CLASSES)


def cluttered_digits(train: bool) -> ArraySource:
    """The same digits turned, scaled, moved and coloured on smooth coloured textures, `DRAWINGS` of each.

    The drawings are the same in every run; test drawings come from test digits only.
    """
    return ArraySource(*_cluttered(train), CLASSES)


@lru_cache(maxsize=2)
def _cluttered(train: bool) -> tuple[np.ndarray, np.ndarray]:
    strokes, labels = (array[_part(train)] for array in _strokes())
    strokes, labels = np.repeat(strokes, DRAWINGS, axis=0), np.repeat(labels, DRAWINGS)
    draws = Draws(1 if train else 2, 0, np.arange(len(labels)), 0)
    ink = _place(torch.from_numpy(strokes), draws)  # [N, 1, 32, 32]
    paper, colour = _texture(draws), _bright(draws)
    image = paper + ink * (colour - paper)  # [N, 3, 32, 32]
    dark_on_light = _tensor(draws.uniform()).view(-1, 1, 1, 1) < 0.5
    image = torch.where(dark_on_light, 1 - image, image)
    pixels = image.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).numpy()
    return np.ascontiguousarray(pixels), labels


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _place(strokes: Tensor, draws: Draws) -> Tensor:
    """Turn by up to 25 degrees, shrink to 45-85 % and move within the frame."""
    angle, scale = _tensor(draws.uniform(-0.44, 0.44)), _tensor(draws.uniform(0.45, 0.85))
    dx, dy = (_tensor(draws.uniform(-1, 1)) * (1 - scale) for _ in range(2))
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, sin, -(cos * dx + sin * dy), -sin, cos, sin * dx - cos * dy], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, [len(strokes), 1, SIZE, SIZE], align_corners=False)
    return functional.grid_sample(strokes[:, None], grid, align_corners=False)


def _texture(draws: Draws) -> Tensor:
    """A random colour plus smooth noise of two grain sizes: [N, 3, 32, 32], dark to middling."""
    texture = torch.stack([_tensor(draws.uniform(0.1, 0.45)) for _ in range(3)], dim=1)[:, :, None, None]
    for cells, strength in ((3, 0.2), (8, 0.08)):
        noise = np.stack([draws.uniform(-strength, strength) for _ in range(3 * cells * cells)], axis=1)
        coarse = _tensor(noise).view(-1, 3, cells, cells)
        texture = texture + functional.interpolate(coarse, (SIZE, SIZE), mode="bicubic", align_corners=True)
    return texture.clamp(0, 1)


def _bright(draws: Draws) -> Tensor:
    """A random colour for the ink: [N, 3, 1, 1]."""
    return torch.stack([_tensor(draws.uniform(0.6, 1.0)) for _ in range(3)], dim=1)[:, :, None, None]
