"""What several data tests share."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from solo.data.config import DataConfig
from solo.data.module import DataModule
from solo.data.views import Chance, ColorJitter, View

SIZE = 32
VIEWS = [View(crop_size=16)]
KINDS = ["empty", "noise", "truncated", "bomb", "html"]  # of broken files


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


def module(batch_size: int = 8, views: list[View] = VIEWS, **config: object) -> DataModule:
    return DataModule(DataConfig(**config), views, batch_size, seed=1)


def folder(path: Path, **config: object) -> DataModule:
    return module(dataset="image_folder", train_path=str(path), **config)


# --- files that are no images ----------------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def bomb() -> bytes:
    """A PNG of a few hundred bytes that declares 400 million pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def broken(kind: str) -> bytes:
    good = encoded(Image.fromarray(picture(1, 40, 40)), "JPEG").getvalue()
    half = good[: len(good) // 2]
    return {"empty": b"", "noise": bytes(range(256)), "truncated": half, "bomb": bomb(), "html": b"<html>"}[kind]
