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
DRAWINGS = 5  # moved drawings per digit
MOVED_SIZE = 16
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


def moved_digits(train: bool) -> ArraySource:
    """The same digits turned, shrunk, moved and dimmed on faint noise, `DRAWINGS` of each; white on black.

    Where a pixel lies says little about the digit here, so raw pixels do badly. The drawings are the same in every
    run; test drawings come from test digits only.
    """
    return ArraySource(*_moved(train), CLASSES)


@lru_cache(maxsize=2)
def _moved(train: bool) -> tuple[np.ndarray, np.ndarray]:
    strokes, labels = (array[_part(train)] for array in _strokes())
    strokes, labels = np.repeat(strokes, DRAWINGS, axis=0), np.repeat(labels, DRAWINGS)
    draws = Draws(1 if train else 2, 0, np.arange(len(labels)), 0)
    ink = _place(torch.from_numpy(strokes), draws)
    brightness = _tensor(draws.uniform(0.6, 1.0)).view(-1, 1, 1, 1)
    noise = np.stack([draws.uniform(0, 0.15) for _ in range(MOVED_SIZE * MOVED_SIZE)], axis=1)
    image = (ink * brightness + _tensor(noise).view(-1, 1, MOVED_SIZE, MOVED_SIZE)).clamp(0, 1)
    pixels = image.mul(255).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return np.ascontiguousarray(pixels), labels


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))


def _place(strokes: Tensor, draws: Draws) -> Tensor:
    """Turn by up to 25 degrees, shrink to 50-80 % of the frame and move within it: [N, 1, 16, 16]."""
    angle, scale = _tensor(draws.uniform(-0.44, 0.44)), _tensor(draws.uniform(0.5, 0.8))
    dx, dy = (_tensor(draws.uniform(-1, 1)) * (1 - scale) for _ in range(2))
    cos, sin = angle.cos() / scale, angle.sin() / scale
    theta = torch.stack([cos, sin, -(cos * dx + sin * dy), -sin, cos, sin * dx - cos * dy], dim=1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, [len(strokes), 1, SIZE, SIZE], align_corners=False)
    large = functional.grid_sample(strokes[:, None], grid, align_corners=False)  # [N, 1, 32, 32]
    return functional.avg_pool2d(large, SIZE // MOVED_SIZE)
