"""What a killed trainer left on the disk, read without the library's own way of choosing."""

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solo import checkpoint, files
from solo.errors import SoloError

# What a checkpoint holds beside where it is stored, and how often Lightning restarted its loops.
STATE = ("state_dict", "optimizer_states", "callbacks", "epoch", "global_step", "DataModule")


def entries(folder: Path) -> dict[str, str]:
    """File names and checksums of a manifest."""
    path = folder / checkpoint.MANIFEST
    return {row["file"]: row["sha256"] for row in json.loads(path.read_text())} if path.exists() else {}


def digest(path: Path) -> str:
    """The checksum of a file, computed once for each state it is in; `FileNotFoundError` as of ``stat``."""
    return _digest(path, state_of(path))


@lru_cache(maxsize=256)
def _digest(path: Path, state: tuple[int, ...]) -> str:
    return files.digest(path)


def state_of(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced or written."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def valid_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that count: whole ones in the manifest, and before there is one, whole files."""
    try:
        named = entries(folder)
    except ValueError:
        named = {}
    valid = [name for name, sha256 in named.items() if (folder / name).is_file() and digest(folder / name) == sha256]
    valid = valid or [path.name for path in folder.glob("*.ckpt") if path.name not in named and not _unreadable(path)]
    return sorted(int(re.findall(r"\d+", name)[0]) for name in valid)


def broken(folder: Path, damaged: set[str]) -> Iterator[str]:
    """What is not whole, apart from files that were damaged on purpose: every name must hold a whole content."""
    try:
        named = entries(folder)
    except ValueError as error:
        yield f"{checkpoint.MANIFEST}: {error}"
        return
    for path in sorted({*folder.glob("*.ckpt"), *(folder / name for name in named)}):
        if path.name in damaged:
            continue
        if not path.is_file():
            yield f"the manifest names {path.name}, which is missing"
        elif path.name in named and digest(path) != named[path.name]:
            yield f"{path.name} is not what the manifest names"
        elif path.name not in named and (problem := _unreadable(path)):
            yield problem
    link = folder.parent / "last.ckpt"
    if link.is_symlink() and not link.exists():
        yield "last.ckpt points to nothing"
    newest = folder / list(named)[-1] if named else folder
    if newest.is_file() and not damaged and (problem := _unsound(newest, state_of(newest))):
        yield problem


def _unreadable(path: Path) -> str:
    try:
        checkpoint.read_tensors(path)
    except SoloError as error:
        return str(error)
    return ""


@lru_cache(maxsize=256)
def _unsound(path: Path, state: tuple[int, ...]) -> str:
    try:
        content = checkpoint.read_tensors(path)
    except SoloError as error:
        return str(error)
    tensors = [*content["state_dict"].values(), *_tensors(content["optimizer_states"])]
    if all(tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()):
        return ""
    return f"{path.name} holds numbers that are not finite"


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value)


def difference(a: Any, b: Any, path: str) -> str:
    """Where two states differ in a bit; empty where nowhere."""
    if type(a) is not type(b):
        return path
    if isinstance(a, Tensor):
        return "" if a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b) else path
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return path
        return next((where for key in a if (where := difference(a[key], b[key], f"{path}.{key}"))), "")
    if isinstance(a, (list, tuple)):
        pairs = enumerate(zip(a, b, strict=False))
        return path if len(a) != len(b) else next((w for i, (x, y) in pairs if (w := difference(x, y, f"{path}.{i}"))), "")
    return "" if a == b or (a != a and b != b) else path
