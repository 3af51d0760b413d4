"""Makes files that try to run code, to reach other files or to use up memory: ``python -m tests.attacks.make FOLDER``.

The payload is always the same harmless one, the creation of a file named ``RAN``. Nothing made here is committed.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from tests.attacks import checkpoints, configs, datasets, hdf5
from tests.attacks.registry import ATTACKS

__all__ = ["ATTACKS", "checkpoints", "configs", "datasets", "hdf5", "made"]

SUFFIXES = {
    "checkpoint": ".ckpt", "safetensors": ".safetensors", "manifest": ".json", "yaml": ".yaml", "npz": ".npz", "tar": ".tar",
    "hdf5": ".h5", "tar-left-out": ".tar", "image": ".jpg", "voc": ".xml", "results": ".json", "search": ".json",
    "server": ".json",
}


def made(folder: Path, name: str, ran: Path) -> Path:
    """One attack's file, in a folder of its own."""
    surface, _, short = name.partition("/")
    file = folder / ("manifest" if surface == "manifest" else "results" if surface == "results" else short)
    file = file.with_name(file.name + SUFFIXES[surface])
    ATTACKS[name](file, ran)
    return file


def everything(folder: Path) -> Iterator[Path]:
    for name in ATTACKS:
        place = folder / name
        place.mkdir(parents=True)
        yield made(place, name, folder / "RAN")


if __name__ == "__main__":
    for path in everything(Path(sys.argv[1])):
        print(path)
