"""CIFAR-100's superclasses against the list of numbers that is published with the data."""

import numpy as np

from solo.data import datasets
from solo.data.cifar20 import SUPERCLASSES, superclasses
from solo.data.config import DataConfig
from solo.data.sources import ArraySource

# coarse_labels of the 100 fine labels, in the order of CIFAR-100's own files
COARSE = [
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10),
    *(12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12),
    *(1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
]


def fine():
    """One image of each class, numbered as CIFAR-100 numbers them: by name."""
    names = sorted(name for members in SUPERCLASSES.values() for name in members.split())
    images = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), dtype=np.uint8)
    return ArraySource(images, np.arange(100), names)


def test_superclasses_are_the_published_ones():
    coarse = superclasses(fine())
    assert len(set(fine().classes)) == 100 and coarse.classes == sorted(SUPERCLASSES) and len(coarse.classes) == 20
    assert coarse.labels.tolist() == COARSE
    assert all((coarse.load(i) == i).all() for i in range(100))


def test_the_row_opens_cifar100(monkeypatch):
    monkeypatch.setattr(datasets, "_cifar100", lambda config, train: fine())
    row = datasets.DATASETS["cifar20"]
    source = row.open(DataConfig(dataset="cifar20", train_path="x"), True)
    assert row.classes == 20 == len(source.classes) and source.labels.tolist() == COARSE
    assert row.mean == datasets.DATASETS["cifar100"].mean
