"""Two embedded datasets drawn from the handwritten digits inside scikit-learn: nothing is downloaded."""

from functools import lru_cache

import numpy as np
from PIL import Image

from solo.data.random import Draws, order
from solo.data.sources import ArraySource

SIZE = 32
TRAIN = 1400
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


def colored_digits(train: bool) -> ArraySource:
    """The same digits, each in a random bright colour on a random dark ground, [1400 or 397, 32, 32, 3].

    What a pixel's colour is says nothing about the digit, so raw pixels do worse than on plain digits. The colours are
    the same in every run.
    """
    return ArraySource(*_colored(train), CLASSES)


@lru_cache(maxsize=2)
def _colored(train: bool) -> tuple[np.ndarray, np.ndarray]:
    strokes, labels = (array[_part(train)] for array in _strokes())
    draws = Draws(1 if train else 2, 0, np.arange(len(labels)), 0)
    ground, ink = (
        np.stack([draws.uniform(*span) for _ in range(3)], axis=1)[:, None, None] for span in ((0.0, 0.6), (0.4, 1.0))
    )  # [N, 1, 1, 3]
    return np.rint((ground + strokes[..., None] * (ink - ground)) * 255).astype(np.uint8), labels
