"""One row per dataset: classes, size, statistics, and how it is opened."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torchvision.datasets
from filelock import FileLock

from solo.console import say
from solo.data.cifar20 import superclasses
from solo.data.config import DataConfig
from solo.data.decoding import convert_channels
from solo.data.digits import colored_digits, digits
from solo.data.hdf5 import open_hdf5
from solo.data.reads import listed, moving, noted
from solo.data.sources import (
    ArraySource,
    EncodedSource,
    FakeSource,
    FolderSource,
    Source,
    check_directory,
    holds_images,
)
from solo.data.tar import TarSource
from solo.errors import ConfigError, DataError
from solo.reading import read_arrays
from solo.registry import Registry

Opener = Callable[[DataConfig, bool], Source | None]


@dataclass(frozen=True)
class DatasetSpec:
    """A dataset's facts.

    Attributes:
        classes: number of classes; 0 in a row whose images tell, and for unlabelled images.
        size: side of its images, or the usual crop where they vary, in pixels.
        mean, std: per channel, of pixels in 0..1.
        open: ``open(config, train)``; ``None`` when there is no such part.
    """

    name: str
    classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    open: Opener
    in_chans: int = 3


DATASETS: Registry[DatasetSpec] = Registry("solo.datasets", DatasetSpec)
_BY_SUFFIX = {".npz": "npz", ".tar": "tar", ".h5": "hdf5", ".hdf5": "hdf5"}

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100_MEAN, CIFAR100_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


def kind_of(path: str | Path) -> str:
    """The row that reads what lies there: a folder, or a file by its extension.

    Raises:
        ConfigError: it is another file.
    """
    path = Path(path)
    if not path.is_file():
        return "image_folder"
    if path.suffix.lower() not in _BY_SUFFIX:
        known = f"{', '.join([*_BY_SUFFIX][:-1])} or {[*_BY_SUFFIX][-1]}"
        raise ConfigError(f"{path} is neither a folder nor a {known} file; --dataset NAME says what it is")
    return _BY_SUFFIX[path.suffix.lower()]


def statistics(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel that images are normalised with: the config's, else the dataset's.

    Raises:
        ConfigError: the config has not one value for each channel.
    """
    row = DATASETS[config.dataset]
    in_chans = config.in_chans or row.in_chans
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != in_chans:
            raise ConfigError(f"data.{name} must have {in_chans} values, one per channel, got {len(values)}")
    mean, std = ((sum(own) / len(own),) if in_chans == 1 else own for own in (row.mean, row.std))
    return tuple(config.mean or mean), tuple(config.std or std)


def _add(
    name: str,
    classes: int,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    open: Opener,
) -> None:
    DATASETS.register(name)(DatasetSpec(name, classes, size, mean, std, open))


def _embedded(draw: Callable[[bool], ArraySource]) -> Opener:
    def open(config: DataConfig, train: bool) -> Source:
        _say_no_path(config, train)
        source = draw(train)
        source.images = convert_channels(source.images, config.in_chans or 3)
        return source

    return open


def _say_no_path(config: DataConfig, train: bool) -> None:
    """A recipe's paths stay where only its dataset is exchanged."""
    key = "train_path" if train else "val_path"
    if (path := getattr(config, key)) is not None:
        say(f"note: data.{key}={path} is not read: data.dataset={config.dataset} is drawn")


def _fake(config: DataConfig, train: bool) -> Source:
    _say_no_path(config, train)
    n = (config.train_size or 1024) if train else 256
    return FakeSource(n, config.size or 32, config.classes, config.in_chans or 3, seed=1 if train else 2)


def _required(config: DataConfig, what: str) -> Path:
    if config.train_path is None:
        raise ConfigError(f"data.train_path is missing: data.dataset={config.dataset} needs {what}")
    return _reached(config.train_path, "data.train_path")


def _reached(text: str, key: str) -> Path:
    path = Path(text)
    try:
        noted(path.exists, path)
    except OSError as error:            # a name too long, for one
        raise ConfigError(f"{key}={path} cannot be reached: {error.strerror}") from error
    return path


def _torchvision(
    dataset: Callable[..., Any], train: dict[str, Any], test: dict[str, Any]
) -> Callable[[DataConfig, bool], ArraySource]:
    """Opener of a torchvision dataset that keeps its images as one array in ``data``."""

    def open(config: DataConfig, train_part: bool) -> ArraySource:
        root = _required(config, "the folder that holds it, or is to hold it with data.download=true")
        key = "data.train_path"
        if not train_part and config.val_path is not None:
            root, key = _reached(config.val_path, "data.val_path"), "data.val_path"
        if root.is_file():
            raise ConfigError(f"{key}={root} is a file; give the folder that holds {config.dataset}")
        try:
            if config.download:
                root.mkdir(parents=True, exist_ok=True)
                with FileLock(root / ".download.lock"):  # one process of a node fetches, the others find it there
                    fetched = partial(dataset, str(root), **(train if train_part else test), download=True)
                    data = moving(fetched, f"the download of {config.dataset}")
            else:
                data = moving(lambda: dataset(str(root), **(train if train_part else test)), root)
        except (RuntimeError, OSError) as error:
            if config.download:
                raise ConfigError(f"{key}={root}: downloading {config.dataset} failed: {error}") from error
            raise ConfigError(f"{key}={root}: {config.dataset} is not there; data.download=true fetches it") from error
        return _from_torchvision(data, config.in_chans or 3)

    return open


def _from_torchvision(data: Any, in_chans: int) -> ArraySource:
    labels = np.asarray(data.labels if hasattr(data, "labels") else data.targets)
    images = data.data if data.data.shape[-1] == 3 else np.ascontiguousarray(data.data.transpose(0, 2, 3, 1))
    return ArraySource(convert_channels(images, in_chans), labels, data.classes)


def _folder(config: DataConfig, train: bool) -> Source | None:
    root = _required(config, "a folder of images")
    key = "data.train_path"
    check_directory(root, key)
    found = _evaluation_folders(root)
    if train:
        root = root / "train" if found else root
    elif config.val_path is not None:
        root, key = _reached(config.val_path, "data.val_path"), "data.val_path"
    else:
        found = found or (_beside(root) if root.name == "train" else [])
        if not found:
            return None
        if len(found) > 1:
            names = " and ".join(path.name for path in found)
            raise ConfigError(f"{found[0].parent} holds {names}: name one, data.val_path=...")
        root = found[0]
    return FolderSource(root, config.in_chans or 3, key, labelled=not config.no_labels)


def _beside(train: Path) -> list[Path]:
    try:
        return _evaluation_folders(train.parent)
    except DataError:               # its own images can be read all the same
        say(f"note: no folder to validate on was looked for beside {train}, as {train.parent} cannot be listed: "
            "data.val_path=FOLDER names one")
        return []


def _evaluation_folders(root: Path) -> list[Path]:
    """The folder beside ``root/train`` to evaluate on, or none: ``val``; else ``valid`` or ``validation`` (both when both
    hold images), else ``test``. Not so when still other folders there hold images: then these names may be classes.
    """
    folders = {name: root / name for name in listed(root)[0] if not name.startswith(".")}
    if "train" not in folders:
        return []
    if "val" in folders:
        return [folders["val"]]
    ours = {"train", "valid", "validation", "test"}
    filled = {name: folder for name, folder in folders.items() if _may_hold_images(folder, otherwise=name in ours)}
    if set(filled) - ours:
        return []
    found = [filled[name] for name in ("valid", "validation") if name in filled]
    return found or [filled[name] for name in ("test",) if name in filled]


def _may_hold_images(folder: Path, otherwise: bool) -> bool:
    """Of a folder that cannot be listed: ``otherwise``. One to evaluate on is refused when it is listed again."""
    try:
        return holds_images(folder)
    except DataError:
        return otherwise


def _npz(config: DataConfig, train: bool) -> Source | None:
    """Arrays ``jpeg`` (uint8, encoded images end to end), ``offsets``, ``labels``, ``split`` (0 train, 1 test), ``classes``."""
    path, key, part = _required(config, "a .npz file of encoded images"), "data.train_path", 0 if train else 1
    if not train and config.val_path is not None:
        path, key = _reached(config.val_path, "data.val_path"), "data.val_path"
    if not path.is_file():
        raise ConfigError(f"{key}={path} is not a file; data.dataset=npz reads one .npz file of encoded images")
    try:
        arrays = ("jpeg", "offsets", "labels", "split", "classes")
        data, offsets, labels, split, names = moving(lambda: read_arrays(path, arrays), path)
        kinds = "".join(array.dtype.kind for array in (offsets, labels, split, names))
        flat = all(array.ndim == 1 for array in (data, offsets, labels, split, names))
        if data.dtype != np.uint8 or not re.fullmatch("[iu]{3}U", kinds) or not flat:
            raise ValueError("one is of another type")
    except (OSError, ValueError) as error:
        wanted = "it must hold plain arrays jpeg, offsets, labels, split and classes"
        raise ConfigError(f"{key}={path} cannot be read as a dataset: {wanted} ({str(error).splitlines()[0][:200]})") from error
    offsets = offsets.astype(np.int64)          # differences of unsigned numbers are never negative
    same = len(offsets) == len(labels) + 1 == len(split) + 1
    if not same or offsets[0] < 0 or offsets[-1] != len(data) or (np.diff(offsets) < 0).any():
        raise ConfigError(f"{key}={path} is damaged: offsets, labels and split do not describe the same images")
    rows = np.flatnonzero(split == part)
    if not len(rows):
        if not train:
            return None
        raise ConfigError(f"{key}={path} holds no image with split 0 (train)")
    return EncodedSource(data, offsets, rows, labels[rows], [str(name) for name in names], config.in_chans or 3, path)


def _file_per_part(suffix: str, source: Callable[[Path, int, str], Source]) -> Opener:
    """Each part is a file of its own."""

    def open(config: DataConfig, train: bool) -> Source | None:
        path, key = _required(config, f"a {suffix} file of images"), "data.train_path"
        if not train:
            if config.val_path is None:
                return None
            path, key = _reached(config.val_path, "data.val_path"), "data.val_path"
        return source(path, config.in_chans or 3, key)

    return open


_tar = _file_per_part(".tar", lambda path, in_chans, key: TarSource(path, "", in_chans, key))
_hdf5 = _file_per_part(".h5", open_hdf5)


_add("digits", 10, 32, (0.308,) * 3, (0.349,) * 3, _embedded(digits))
_add("colored_digits", 10, 32, (0.418, 0.419, 0.421), (0.211, 0.206, 0.208), _embedded(colored_digits))
_cifar_parts: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_add("cifar10", 10, 32, CIFAR10_MEAN, CIFAR10_STD, _torchvision(torchvision.datasets.CIFAR10, *_cifar_parts))
_cifar100 = _torchvision(torchvision.datasets.CIFAR100, *_cifar_parts)
_add("cifar100", 100, 32, CIFAR100_MEAN, CIFAR100_STD, _cifar100)
_add("cifar20", 20, 32, CIFAR100_MEAN, CIFAR100_STD, lambda config, train: superclasses(_cifar100(config, train)))
_add(
    "stl10",  # pretraining sees the 5,000 labelled and the 100,000 unlabelled images
    10,
    96,
    (0.4914, 0.4823, 0.4466),
    (0.247, 0.243, 0.261),
    _torchvision(torchvision.datasets.STL10, {"split": "train+unlabeled"}, {"split": "test"}),
)
_add("imagenet", 1000, 224, IMAGENET_MEAN, IMAGENET_STD, _folder)
_add("imagenet100", 100, 224, IMAGENET_MEAN, IMAGENET_STD, _folder)
_add("image_folder", 0, 224, IMAGENET_MEAN, IMAGENET_STD, _folder)
_add("npz", 0, 32, CIFAR10_MEAN, CIFAR10_STD, _npz)
_add("tar", 0, 224, IMAGENET_MEAN, IMAGENET_STD, _tar)
_add("hdf5", 0, 224, IMAGENET_MEAN, IMAGENET_STD, _hdf5)
_add("fake", 0, 32, (0.5,) * 3, (0.25,) * 3, _fake)
