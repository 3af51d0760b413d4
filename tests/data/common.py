"""What several data tests share."""

from pathlib import Path

import numpy as np
from PIL import Image

from solo.data.views import Chance, ColorJitter, View

SIZE = 32


def full_view(size: int = SIZE) -> View:
    """Every operation, each often."""
    return View(
        crop_size=size,
        color_jitter=ColorJitter(prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        grayscale=Chance(prob=0.3),
        gaussian_blur=Chance(prob=0.5),
        solarization=Chance(prob=0.3),
        horizontal_flip=Chance(prob=0.5),
    )


def picture(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """A smooth random image, [height, width, channels] uint8."""
    rng = np.random.default_rng(seed)
    bands = []
    for _ in range(channels):
        small = Image.fromarray(rng.integers(0, 256, (5, 5), dtype=np.uint8))
        bands.append(np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)))
    return np.stack(bands, axis=-1)


def make_folder(root: Path, per_class: dict[str, int], size: tuple[int, int] = (20, 24), start: int = 0) -> list[Path]:
    """PNG files ``root/class/number.png``; returns their paths."""
    paths = []
    for name, count in per_class.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            paths.append(root / name / f"{i:04d}.png")
            Image.fromarray(picture(start + len(paths), *size)).save(paths[-1])
    return paths
