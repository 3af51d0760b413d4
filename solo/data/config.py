"""The ``data`` block of an experiment."""

import math
from dataclasses import dataclass
from typing import Literal

KernelName = Literal["auto", "numba", "torch"]


@dataclass(kw_only=True)
class DataConfig:
    """Which images, and how they are fed.

    Attributes:
        dataset: a row of `solo.data.datasets.DATASETS`.
        train_path: folder or file of the training images; embedded datasets need none.
        val_path: the same for validation; null: the dataset's own test part, or the folder beside ``train`` called
            ``val``, ``valid``, ``validation`` or ``test``.
        engine: ``fast`` (images of one size up to 64 px in memory, augmented in one thread; larger ones decoded and cropped
            by workers, the rest on the device), ``torchvision`` (the reference: workers do it all), ``dali`` (JPEGs decoded
            and augmented on the GPU by NVIDIA's library; not to the bit the reference's) or ``auto``: fast.
        num_workers: worker processes, where the engine has some; threads that read, and threads of DALI, of ``dali``.
        threads: threads of the fast engine that share each batch of small images; one feeds a GPU.
        kernel: what computes in the fast engine on a CPU, ``numba``, ``torch`` (several times slower, always there) or
            ``auto``; on a GPU it is always torch.
        cache_dir: where decoded small images are kept; null: ``solo`` in the user's cache folder.
        download: let torchvision fetch the dataset into ``train_path``.
        no_labels: read an image folder without classes, whatever its folders are called.
        fraction: share of the training images to use, drawn per class without replacement.
        train_size: number of training images to use, the first of each class in proportion; for ``fake`` its size.
        size, mean, std, in_chans: override the dataset's row (``size`` draws ``fake``; ``in_chans`` 1 reads in grey).
        classes: number of classes of ``fake``.
        accept_changed: continue a run although its training images have other names, labels or sizes than before.
        max_bad_fraction: a larger share of unreadable images stops the run.
        timeout: seconds a worker may take for one batch, or the main process to read one file, before the run stops.
    """

    dataset: str = "digits"
    train_path: str | None = None
    val_path: str | None = None
    engine: Literal["auto", "fast", "torchvision", "dali"] = "auto"
    num_workers: int = 4
    threads: int = 1
    kernel: KernelName = "auto"
    cache_dir: str | None = None
    download: bool = False
    no_labels: bool = False
    fraction: float = 1.0
    train_size: int | None = None
    size: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    in_chans: int | None = None
    classes: int = 10
    accept_changed: bool = False
    max_bad_fraction: float = 0.01
    timeout: float = 120.0

    def __post_init__(self) -> None:
        problems = []
        if self.num_workers < 0:
            problems.append(f"num_workers must not be negative, got {self.num_workers}")
        if not 0 < self.fraction <= 1:
            problems.append(f"fraction must lie in (0, 1], got {self.fraction}")
        for name in ("train_size", "size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        if self.in_chans not in (None, 1, 3):
            problems.append(f"in_chans must be 1 or 3, got {self.in_chans}")
        if self.classes < 1:
            problems.append(f"classes must be at least 1, got {self.classes}")
        if self.std is not None and min(self.std, default=0) <= 0:
            problems.append(f"std must hold positive numbers, got {self.std}")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"max_bad_fraction must lie in [0, 1], got {self.max_bad_fraction}")
        if not 0 < self.timeout < math.inf:
            problems.append(f"timeout must be positive and finite, got {self.timeout}")
        if problems:
            raise ValueError("\n".join(problems))
