"""The one module that writes and reads checkpoints: tensors and JSON, whole or not at all.

A checkpoint counts when its directory's ``manifest.json`` names it and its SHA-256 matches. It is written to a
temporary file beside its place, synced, renamed, and only then entered in the manifest, so an interrupted write
leaves the previous one in force.
"""

import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins import CheckpointIO
from torch import Tensor

from solo.errors import ConfigError, NumericsError
from solo.reading import parse_json, read_json, read_tensors

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint of a manifest; ``keep`` exempts it from pruning."""

    file: str
    sha256: str
    step: int
    epoch: int
    keep: bool = False

    def __post_init__(self) -> None:
        """A manifest is a file like any other: what it names is opened and removed, so it must lie beside it."""
        text = isinstance(self.file, str) and isinstance(self.sha256, str)
        if not text or not re.fullmatch(r"[^./\\\0][^/\\\0]*", self.file) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"it names {self.file!r}, which is no file beside it, or no SHA-256")
        if type(self.step) is not int or type(self.epoch) is not int or type(self.keep) is not bool:
            raise ValueError(f"step, epoch or keep of {self.file} is of another type")


def write_file(path: str | Path, write: bytes | Callable[[BinaryIO], object]) -> str:
    """Write a file so that its name always holds the old or the new content, whatever happens meanwhile.

    Args:
        path: the file; its folder is made.
        write: the content, or a function that writes it.

    Returns:
        SHA-256 of the content, hexadecimal.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w+b") as file:
            file.write(write) if isinstance(write, bytes) else write(file)
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest_hex = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return digest_hex


def _sha256(file: BinaryIO) -> str:
    total = hashlib.sha256()
    while block := file.read(1 << 20):
        total.update(block)
    return total.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return _sha256(file)


def manifest(folder: str | Path) -> list[Entry]:
    """The checkpoints of a folder in the order of their steps."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return []
    try:
        return sorted((Entry(**row) for row in read_json(path)), key=lambda entry: entry.step)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"{path} is not a manifest of checkpoints ({error}): remove it to start over from scratch") from error


def _write_manifest(folder: Path, entries: list[Entry]) -> None:
    write_file(folder / MANIFEST, json.dumps([asdict(entry) for entry in entries], indent=1).encode())


def save(checkpoint: Mapping[str, Any], path: str | Path, keep: bool = False) -> None:
    """Write a checkpoint and enter it in its folder's manifest.

    Args:
        checkpoint: tensors and plain values; ``global_step`` and ``epoch`` go to the manifest.
        path: the file.
        keep: never prune it.

    Raises:
        NumericsError: a weight is not finite; nothing is written.
    """
    path = Path(path)
    broken = [name for name, value in checkpoint["state_dict"].items() if not _finite(value)]
    if broken:
        raise NumericsError(
            f"checkpoint at step {checkpoint['global_step']} refused: {len(broken)} tensors are not finite, "
            f"first {broken[0]}; the last good checkpoint stays"
        )
    sha256 = write_file(path, lambda file: torch.save(dict(checkpoint), file))
    entry = Entry(file=path.name, sha256=sha256, step=int(checkpoint["global_step"]), epoch=int(checkpoint["epoch"]), keep=keep)
    _write_manifest(path.parent, [other for other in manifest(path.parent) if other.file != path.name] + [entry])


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())


def prune(folder: str | Path, newest: int = 2) -> None:
    """Remove all but the newest ones and those to keep; the manifest forgets them first."""
    folder = Path(folder)
    entries = manifest(folder)
    dropped = [entry for entry in entries[:-newest] if not entry.keep]
    if dropped:
        _write_manifest(folder, [entry for entry in entries if entry not in dropped])
        for entry in dropped:
            (folder / entry.file).unlink(missing_ok=True)


def newest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a folder whose checksum holds, or None where there never was one.

    Raises:
        ConfigError: there are checkpoints, and each is damaged.
    """
    folder = Path(folder)
    damaged: list[str] = []
    entries = manifest(folder)
    if not entries and (strays := sorted(path.name for path in folder.glob("*.ckpt"))):
        log.warning("%s: %s not named by %s (an interrupted write?): ignored", folder, ", ".join(strays), MANIFEST)
    for entry in reversed(entries):
        path = folder / entry.file
        if path.is_file() and digest(path) == entry.sha256:
            for line in damaged:
                log.warning("%s; going back to %s", line, path.name)
            return path
        damaged.append(f"{path} is {'damaged (its checksum differs)' if path.is_file() else 'missing'}")
    if damaged:
        raise ConfigError("\n".join(damaged) + f"\nno valid checkpoint is left in {folder}: start anew with resume=never")
    return None


def resolve(path: str | Path, key: str = "checkpoint") -> Path:
    """A checkpoint file from what a user named: the file, a run's directory, or that directory's name without its hash.

    Raises:
        ConfigError: there is nothing of the kind, or several runs of that name.
    """
    path = Path(path)
    if path.is_file():
        return path
    name = re.compile(re.escape(path.name) + "-[0-9a-f]{8}")
    runs = sorted(run for run in path.parent.glob("*") if name.fullmatch(run.name))
    if not path.exists() and len(runs) > 1:
        raise ConfigError(f"{key}={path} could be {', '.join(map(str, runs))}: name one")
    path = runs[0] if not path.exists() and runs else path
    if path.is_dir():
        for folder in (path / "checkpoints", path):
            if found := newest(folder):
                return found
        raise ConfigError(f"{key}={path} holds no checkpoint")
    near = sorted(str(other) for other in path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
    raise ConfigError(f"{key}={path} does not exist" + (f" (there: {', '.join(near)})" if near else ""))


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this library onto the CPU, never running code from it.

    Raises:
        ConfigError: missing, damaged, or holding anything but tensors and plain values.
    """
    path = resolve(path)
    expected = {entry.file: entry.sha256 for entry in manifest(path.resolve().parent)}.get(path.resolve().name)
    if expected is not None and digest(path) != expected:
        raise ConfigError(f"{path} is damaged: its checksum differs from {MANIFEST}")
    content = read_tensors(path)
    state = content.get("state_dict")
    if not isinstance(content.get("solo"), str) or not isinstance(state, dict):
        raise ConfigError(f"{path} is not a checkpoint of solo")
    if wrong := [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]:
        raise ConfigError(f"{path} is not a checkpoint of solo: {wrong[0]!r} in its state_dict is no tensor")
    if wrong := [name for name in ("global_step", "epoch") if type(content.get(name)) is not int]:
        raise ConfigError(f"{path} is not a checkpoint of solo: {wrong[0]} is no whole number")
    return content


def provenance(content: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What a checkpoint says of its origin: ``version``, ``method`` and the plain ``config``.

    Raises:
        ConfigError: it does not say so.
    """
    try:
        facts = parse_json(content["solo"])
    except ValueError as error:
        raise ConfigError(f"{path} does not say where it comes from: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("method"), str) or not isinstance(facts.get("config"), dict):
        raise ConfigError(f"{path} does not say where it comes from: method and config are missing")
    return facts


def misfit(model: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """What keeps a state dict from fitting a model's: missing, unexpected and differently shaped keys; or nothing."""
    missing, unexpected = sorted(set(model) - set(state)), sorted(set(state) - set(model), key=str)
    shapes = [
        f"{key} {tuple(getattr(state[key], 'shape', ()))} instead of {tuple(model[key].shape)}"
        for key in sorted(set(model) & set(state))
        if getattr(state[key], "shape", None) != model[key].shape
    ]
    parts = ((f"missing {len(missing)}", missing), (f"unexpected {len(unexpected)}", unexpected), ("shape of", shapes))
    return "; ".join(
        f"{title}: {', '.join(map(str, keys[:5]))}{', ...' if len(keys) > 5 else ''}" for title, keys in parts if keys
    )


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's door to this module. Its own writer may destroy the good file when it is interrupted."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, path, keep=bool((storage_options or {}).get("keep")))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
