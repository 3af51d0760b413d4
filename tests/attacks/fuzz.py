"""Damages good files at random and reads them: ``python -m tests.attacks.fuzz [INPUTS] [PARSER ...]``, 10,000 each by default.

Each input is refused by a `SoloError` or read; anything else, a crash, a hang or memory beyond bounds, is a fault.
"""

import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from solo import checkpoint
from solo.config_files import CheckedFiles
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.decoding import BadImage, decode
from solo.data.hdf5 import open_hdf5
from solo.data.sources import Source
from solo.data.tar import TarSource
from solo.data.voc import read_annotation
from solo.errors import ConfigError, DataError
from solo.reading import read_safetensors
from tests.attacks import configs, datasets, hdf5
from tests.attacks.checkpoints import ROW, W, manifest, safetensors, save, whole
from tests.attacks.sandbox import MIB, SECONDS, confined

CHUNK = 100             # inputs of one child process
SPARE = 512 * MIB


def good_checkpoint(file: Path) -> None:
    weights = {f"backbone.{i}": torch.arange(i + 1.0) for i in range(5)}
    save(whole(state_dict=weights, optimizer_states=[{"state": {0: 1.5}}]), file)


def read_all(source: Source | None) -> None:
    for i in range(len(source or ())):
        try:
            source.load(i)  # type: ignore[union-attr]
        except BadImage:
            pass


def read_npz(file: Path) -> None:
    read_all(DATASETS["npz"].open(DataConfig(dataset="npz", train_path=str(file)), True))


def read_hdf5(file: Path) -> None:
    read_all(open_hdf5(file, 3, "key"))


def read_packed(file: Path) -> None:
    """As if who damaged it had set its checksum right."""
    with mock.patch("solo.data.hdf5.checksum", lambda **arrays: 1):
        read_hdf5(file)


def read_jpeg(file: Path) -> None:
    try:
        decode(file.read_bytes(), 3)
    except BadImage as error:
        raise DataError(str(error)) from error


def read_xml(file: Path) -> None:
    try:
        read_annotation(file)
    except ValueError as error:
        raise DataError(str(error)) from error


NOWHERE = Path("RAN")
XML = "<annotation><object><name>cat</name><difficult>0</difficult></object><object><name>dog</name></object></annotation>"
# name -> (writes a good file, reads one)
PARSERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "x.ckpt": (good_checkpoint, checkpoint.read),
    "x.safetensors": (lambda file: safetensors({"w": W})(file, NOWHERE), read_safetensors),
    "manifest.json": (lambda file: manifest([ROW, {**ROW, "step": 2}])(file, NOWHERE),
                      lambda file: checkpoint.manifest(file.parent)),
    "x.yaml": (lambda file: file.write_text(configs.BASE),
               lambda file: CheckedFiles("x", str(file.parent)).load_config(file.name)),
    "x.npz": (lambda file: datasets.npz()(file, NOWHERE), read_npz),
    "x.tar": (lambda file: datasets.tar(("a/1.png", {}, datasets.png(8, 8)))(file, NOWHERE),
              lambda file: read_all(TarSource(file, "", 3, "key"))),
    "packed.h5": (hdf5.good_unsealed, read_packed),
    "groups.h5": (hdf5.good_groups, read_hdf5),
    "x.jpg": (lambda file: file.write_bytes(datasets.jpeg()), read_jpeg),
    "x.png": (lambda file: file.write_bytes(datasets.png(16, 16)), read_jpeg),
    "x.xml": (lambda file: file.write_text(XML), read_xml),
}


def damaged(content: bytes, draw: random.Random) -> bytes:
    """One to four changes: bits, bytes, numbers at their limits, parts left out, doubled, moved, cut."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        if not data:
            break
        at, to = sorted((draw.randrange(len(data)), draw.randrange(len(data))))
        to = min(to, at + 64) if draw.random() < 0.7 else to
        kind = draw.randrange(7)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at] = draw.choice((0, 1, 9, 10, 32, 34, 42, 46, 123, 127, 128, 255, draw.randrange(256)))
        elif kind == 2:
            number = draw.choice((0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1))
            data[at : at + 8] = number.to_bytes(8, draw.choice(("little", "big")))[: draw.choice((2, 4, 8))]
        elif kind == 3:
            del data[at:to]
        elif kind == 4:
            data[at:at] = data[at:to] * draw.choice((1, 2, 100))
        elif kind == 5:
            data[to:to] = data[at:to]
            del data[at:to]
        else:
            del data[to:]
    return bytes(data)


def campaign(name: str, inputs: int, seed: int = 0) -> tuple[int, int, float, int]:
    """How many inputs were refused and how many read, the longest time of one in seconds, and the most memory in bytes.

    Raises:
        AssertionError: an input ended otherwise; it stays in the folder that the message names.
    """
    write, read = PARSERS[name]
    folder = Path(tempfile.mkdtemp(prefix="solo-fuzz-"))
    file, counts = folder / name, folder / "counts"
    write(file)
    good = file.read_bytes()
    refused, longest, grown = 0, 0.0, 0
    for first in range(0, inputs, CHUNK):

        def some(first: int = first) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)        # what libjpeg has to say
            refused, longest = 0, 0.0
            for i in range(first, min(first + CHUNK, inputs)):
                file.write_bytes(damaged(good, random.Random(f"{name} {seed} {i}")))
                began = time.perf_counter()
                try:
                    read(file)
                except (ConfigError, DataError):
                    refused += 1
                longest = max(longest, time.perf_counter() - began)
            counts.write_text(f"{refused} {longest}")

        end = confined(some, SPARE, seconds=10 * SECONDS)
        assert end.kind == "returned", f"{file}: {end}"
        refused += int(counts.read_text().split()[0])
        longest, grown = max(longest, float(counts.read_text().split()[1])), max(grown, end.grown)
    for path in (file, counts):
        path.unlink()
    os.rmdir(folder)
    return refused, inputs - refused, longest, grown


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'parser':14} {'refused':>8} {'read':>8} {'longest':>9} {'memory':>9}")
    for chosen in sys.argv[2:] or PARSERS:
        no, yes, seconds, memory = campaign(chosen, int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
        print(f"{chosen:14} {no:8,} {yes:8,} {seconds * 1000:6.0f} ms {memory / MIB:5.0f} MiB", flush=True)
