"""HDF5 files of images, for tests."""

from pathlib import Path

import h5py
import numpy as np

from solo.data.hdf5 import open_hdf5
from solo.data.sources import Source

KEY = "data.train_path"


def group_per_class(images: Path, path: Path, **options: object) -> Path:
    """As solo-learn's users write it."""
    with h5py.File(path, "w") as file:
        for image in sorted(images.rglob("*.*")):
            content = np.frombuffer(image.read_bytes(), np.uint8)
            file.create_dataset(image.relative_to(images).as_posix(), data=content, **options)
    return path


def opened(path: Path) -> Source:
    return open_hdf5(path, 3, KEY)
