"""The one module that writes and reads checkpoints: tensors and JSON, whole or not at all.

A checkpoint counts when its directory's ``manifest.json`` names it and its SHA-256 matches. It is written to a
temporary file beside its place, synced, renamed, and only then entered in the manifest, so an interrupted write
leaves the previous one in force. Where the manifest is lost, what can be read whole stands in for it.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning_fabric.plugins import CheckpointIO
from torch import Tensor

from solo.errors import ConfigError, EnvironmentFault, NumericsError
from solo.files import digest, sweep, write_file
from solo.lease import still_own
from solo.names import checkpoints_near, few, there
from solo.reading import parse_json, read_json, read_tensors

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1      # of what a checkpoint holds; a change that an older version could misread counts it up
KEPT = 2        # newest ones of each kind that stay, of ends of epochs and of within one


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One checkpoint of a manifest; ``keep`` exempts it from pruning, ``epoch_end`` says that its epoch was complete."""

    file: str
    sha256: str
    step: int
    epoch: int
    keep: bool = False
    epoch_end: bool = False

    def __post_init__(self) -> None:
        """A manifest is a file like any other: what it names is opened and removed, so it must lie beside it."""
        text = isinstance(self.file, str) and isinstance(self.sha256, str)
        if not text or not re.fullmatch(r"[^./\\\0][^/\\\0]*", self.file) or not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"it names {self.file!r}, which is no file beside it, or no SHA-256")
        kinds = (type(self.step), type(self.epoch), type(self.keep), type(self.epoch_end))
        if kinds != (int, int, bool, bool):
            raise ValueError(f"step, epoch, keep or epoch_end of {self.file} is of another type")


def manifest(folder: str | Path) -> list[Entry]:
    """The checkpoints of a folder in the order of their steps.

    Raises:
        ConfigError: there is a manifest, and it holds something else.
        OSError: the file system does not let it be read.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        return []
    try:
        return sorted((Entry(**row) for row in read_json(path)), key=lambda entry: entry.step)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a manifest of checkpoints ({error})") from error


def _write_manifest(folder: Path, entries: list[Entry]) -> None:
    write_file(folder / MANIFEST, json.dumps([asdict(entry) for entry in entries], indent=1).encode())


def save(checkpoint: Mapping[str, Any], path: str | Path, keep: bool = False) -> None:
    """Write a checkpoint and enter it in its folder's manifest.

    Args:
        checkpoint: tensors and plain values; ``global_step``, ``epoch`` and whether it ends one go to the manifest.
        path: the file.
        keep: never prune it.

    Raises:
        NumericsError: a weight is not finite; nothing is written.
    """
    path = Path(path)
    tensors = _tensors({key: checkpoint[key] for key in ("state_dict", "optimizer_states") if key in checkpoint})
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise NumericsError(
            f"checkpoint at step {checkpoint['global_step']} refused: {len(broken)} tensors are not finite, "
            f"first {broken[0]}" + "; the last good checkpoint stays" * any(path.parent.glob("*.ckpt"))
        )
    others = _others(path.parent)
    sha256 = write_file(path, lambda file: _serialise(checkpoint, file))
    entry = _entry(path, sha256, checkpoint, keep)
    _write_manifest(path.parent, [other for other in others if other.file != path.name] + [entry])


def _entry(path: Path, sha256: str, checkpoint: Mapping[str, Any], keep: bool) -> Entry:
    loops = checkpoint.get("loops") or {}
    epochs = loops.get("fit_loop", {}).get("epoch_progress", {}).get("current", {})
    ended = bool(epochs) and epochs.get("processed") == epochs.get("started")
    step, epoch = int(checkpoint["global_step"]), int(checkpoint["epoch"])
    return Entry(file=path.name, sha256=sha256, step=step, epoch=epoch, keep=keep, epoch_end=ended)


def _rebuilt(path: Path, content: Mapping[str, Any]) -> Entry:
    """The entry of a file whose manifest is lost; the run's own config says whether it kept ends of epochs."""
    entry = _entry(path, digest(path), content, keep=True)
    try:
        keep = provenance(content, path)["config"]["checkpoint"]["keep_prev"] is not False and entry.epoch_end
    except (ConfigError, KeyError, TypeError):
        return entry
    return replace(entry, keep=keep)


def _others(folder: Path) -> list[Entry]:
    """What a manifest names; of one that was removed or garbled while its run went on, what can be read stands in for it."""
    try:
        entries = manifest(folder)
        if entries or not any(folder.glob("*.ckpt")):
            return entries
        log.warning("%s is gone; it is made anew", folder / MANIFEST)
    except ConfigError as error:
        log.warning("%s; it is made anew", error)
    try:
        return survey(folder).valid
    except ConfigError:
        return []


def _tensors(content: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, (Mapping, list, tuple)):
        items = content.items() if isinstance(content, Mapping) else enumerate(content)
        for key, value in items:
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def _serialise(checkpoint: Mapping[str, Any], file: BinaryIO) -> None:
    try:
        torch.save(dict(checkpoint), file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):      # a full disk, hidden by torch's own complaint about the rest
            raise error.__context__ from None
        raise


def prune(folder: str | Path, newest: int = KEPT) -> None:
    """Remove all but those to keep, the newest at ends of epochs and the newest in the middle of one.

    The manifest forgets them first. The two kinds do not push each other out: saves in the middle of an epoch follow one
    another sooner than a loss that jumps or features that collapse are noticed.
    """
    folder = Path(folder)
    entries = manifest(folder)
    there = [entry for entry in entries if (folder / entry.file).is_file()]
    kinds = ([entry for entry in there if entry.epoch_end == kind] for kind in (True, False))
    dropped = [entry for kind in kinds for entry in kind[:-newest] if not entry.keep]
    if dropped:
        _write_manifest(folder, [entry for entry in entries if entry not in dropped])
        for entry in dropped:
            (folder / entry.file).unlink(missing_ok=True)


@dataclass(frozen=True)
class Survey:
    """What a folder holds.

    Attributes:
        valid: what its manifest should name; of these the newest has been checked.
        damaged: files on the way to that one, and what is wrong with each.
    """

    valid: list[Entry]
    damaged: dict[str, str]


def survey(folder: str | Path) -> Survey:
    """Look from the newest checkpoint back for one that is whole; where no entry is, look at the files without one.

    Raises:
        ConfigError: there are checkpoints, and each is damaged.
    """
    folder, damaged, entries = Path(folder), {}, []
    try:
        entries = manifest(folder)
    except ConfigError as error:
        damaged[MANIFEST] = str(error)
    for entry in reversed(entries):
        path = folder / entry.file
        if path.is_file() and digest(path) == entry.sha256:
            break
        damaged[entry.file] = f"{path} is {'damaged (its checksum differs)' if path.is_file() else 'missing'}"
    valid = [entry for entry in entries if entry.file not in damaged]
    if not valid:
        for path in sorted(set(folder.glob("*.ckpt")) - {folder / entry.file for entry in entries}):
            damaged.setdefault(MANIFEST, f"{folder / MANIFEST} does not name {path.name}")
            try:
                content = _content(path)
            except ConfigError as error:
                damaged[path.name] = str(error)
            else:
                valid.append(_rebuilt(path, content))
    if damaged and not valid:
        lines = [*damaged.values(), f"no valid checkpoint is left in {folder}: start anew with resume=never"]
        raise ConfigError("\n".join(lines))
    return Survey(sorted(valid, key=lambda entry: entry.step), damaged)


def newest(folder: str | Path, found: Survey | None = None) -> Path | None:
    """The newest checkpoint of a folder that is whole, or None where there never was one; changes nothing.

    Args:
        folder: of checkpoints.
        found: what it holds, where that is known.

    Raises:
        ConfigError: there are checkpoints, and each is damaged.
        EnvironmentFault: the file system does not let them be read.
    """
    try:
        found = found or survey(folder)
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be read: {error.strerror}") from error
    if not found.valid:
        return None
    path = Path(folder) / found.valid[-1].file
    for line in found.damaged.values():
        log.warning("%s; going back to %s", line, path.name)
    return path


def repair(folder: str | Path) -> Survey:
    """Put a folder in order before its run goes on: the manifest names nothing that is known to be damaged.

    What is damaged is kept under another name, ``*.corrupt``; what killed writers left is removed, and so is, with a line,
    an older checkpoint that the manifest has forgotten.

    Returns:
        What it then holds.

    Raises:
        ConfigError: there are checkpoints, and each is damaged; then nothing is changed.
    """
    folder = Path(folder)
    sweep(folder)
    found = survey(folder)
    if not found.valid:
        return found
    for name, problem in found.damaged.items():
        if (folder / name).exists():
            os.replace(folder / name, folder / f"{name}.corrupt")
            problem += f", kept as {name}.corrupt"
        log.warning("%s; going back to %s", problem, found.valid[-1].file)
    if found.damaged:
        _write_manifest(folder, found.valid)
    named = {entry.file for entry in found.valid}
    last = found.valid[-1].file
    for path in folder.glob("step-*.ckpt"):             # a removal that was interrupted, or a copy that was put back by hand
        if path.name not in named and path.name < last:
            log.warning("%s is removed: %s does not name it and goes on from %s (a copy kept elsewhere: resume=PATH)",
                        path, MANIFEST, last)
            path.unlink()
    return Survey(found.valid, {})


def resolve(path: str | Path, key: str = "checkpoint") -> Path:
    """A checkpoint file from what a user named: the file, a run's directory, or that directory's name without its hash.

    Raises:
        ConfigError: there is nothing of the kind, or several runs of that name.
    """
    if not str(path):
        raise ConfigError(f"{key} must name a checkpoint or a run's directory")
    path = Path(path)
    try:
        if path.is_file():
            return path
        if not path.exists():
            name = re.compile(re.escape(path.name) + "-[0-9a-f]{8}")
            runs = sorted(run for run in path.parent.glob("*") if name.fullmatch(run.name))
            if len(runs) > 1:
                newest_first = [run for run in checkpoints_near(path) if run in runs]
                raise ConfigError(f"{key}={path} could be {few(list(dict.fromkeys(newest_first + runs)))}: name one")
            path = runs[0] if runs else path
        is_folder = path.is_dir()
    except OSError as error:
        raise ConfigError(f"{key}={path} cannot be reached: {error.strerror}") from error
    for folder in (path / "checkpoints", path) if is_folder else ():
        if found := newest(folder):
            return found
    problem = "holds no checkpoint itself" if is_folder else "does not exist"
    raise ConfigError(f"{key}={path} {problem}{there(checkpoints_near(path))}")


def read(path: str | Path, verified: bool = False) -> dict[str, Any]:
    """Load a checkpoint of this library onto the CPU, never running code from it.

    Args:
        path: the file, or what `resolve` finds it by.
        verified: `newest` has just compared its checksum.

    Raises:
        ConfigError: missing, damaged, or holding anything but tensors and plain values.
        EnvironmentFault: the file system does not let it be read, or its run has just removed it.
    """
    path = resolve(path)
    if verified:
        return _content(path)
    try:
        known = _known(path)
        same = known in (None, digest(path))
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be read: {error.strerror}") from error
    if not same:
        raise ConfigError(f"{path} is damaged: its checksum differs from {MANIFEST}")
    return _content(path)


def _known(path: Path) -> str | None:
    """The checksum of a file by its folder's manifest; None where there is none, and the file's own must do."""
    try:
        entries = manifest(path.resolve().parent)
    except ConfigError as error:
        log.warning("%s", error)
        return None
    return next((entry.sha256 for entry in entries if entry.file == path.resolve().name), None)


def _content(path: Path) -> dict[str, Any]:
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
    """What a checkpoint says of its origin: ``format``, ``version``, ``method`` and the plain ``config``.

    Raises:
        ConfigError: it does not say so, or is of a format that this version does not know.
    """
    try:
        facts = parse_json(content["solo"])
    except ValueError as error:
        raise ConfigError(f"{path} does not say where it comes from: {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("method"), str) or not isinstance(facts.get("config"), dict):
        raise ConfigError(f"{path} does not say where it comes from: method and config are missing")
    written = facts.get("format", 1)            # the first did not say so
    if type(written) is not int or not 1 <= written <= FORMAT:
        raise ConfigError(f"{path} is of checkpoint format {written!r:.20}, written by solo {str(facts.get('version'))[:20]}; "
                          f"this version reads formats up to {FORMAT}: use that one, or a later one")
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
    """Lightning's door to this module. Its own writer may destroy the good file when it is interrupted.

    Args:
        run_dir: nothing is written when another job has taken this folder over (`solo.lease.Taken`).

    Attributes:
        judged: what has been read of a file already, by its path; handed on once, in place of another look at the file.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.judged: dict[str, dict[str, Any]] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        still_own(self.run_dir)
        save(checkpoint, path, keep=bool((storage_options or {}).get("keep")))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return self.judged.pop(str(path), None) or read(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
