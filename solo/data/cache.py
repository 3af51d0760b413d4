"""Decoded small images kept on disk, so that a second start need not decode them again."""

import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from solo.bars import watched
from solo.console import log, say
from solo.data.decoding import BadImage
from solo.data.reads import moving
from solo.data.sources import Source
from solo.files import own_folder
from solo.reading import read_json

WORTH = 2048  # images; fewer are decoded faster than one would notice


class Decoded(NamedTuple):
    """Images of one size, and which could not be read and why; their pixels mean nothing."""

    images: np.ndarray  # [N, H, W, C] uint8
    unreadable: dict[int, str]


def default_folder() -> Path:
    """``solo`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "solo"


def decoded(source: Source, shape: tuple[int, ...], folder: Path | None = None) -> Decoded | None:
    """All images of ``source``, memory-mapped where they could be kept; ``None`` when one is not of ``shape``.

    A source is known by its ``fingerprint()``; one without is decoded every time. Of several processes one decodes and
    the others wait for it. A file that is damaged or incomplete is made anew, and one that cannot be written is done
    without.
    """
    fingerprint = getattr(source, "fingerprint", lambda: None)()
    if fingerprint is None or len(source) < WORTH:
        return decode_all(source, shape)
    try:
        folder = folder or default_folder()
        own_folder(folder)
        lock = FileLock(folder / f"{fingerprint}.lock")
        lock.acquire()
    except (OSError, RuntimeError) as error:  # no home, no folder, no locks on this file system
        log.warning("decoded images are not kept: %s; data.cache_dir=FOLDER keeps them elsewhere", error)
        return decode_all(source, shape)
    try:
        kept = moving(lambda: _open(folder / fingerprint, (len(source), *shape)), folder)
        if kept is None:
            say(f"decoding {len(source):,} images, once: they will be kept in {folder}")
            began = time.monotonic()
            kept = decode_all(source, shape)
            say(f"decoding took {time.monotonic() - began:.1f} s")
            if kept is not None:
                kept = _keep(folder / fingerprint, kept)
        return kept
    finally:
        lock.release()


def decode_all(source: Source, shape: tuple[int, ...]) -> Decoded | None:
    """All images of ``source``, or ``None`` when one is not of ``shape``."""
    images = np.zeros((len(source), *shape), dtype=np.uint8)
    unreadable: dict[int, str] = {}
    numbers: Iterable[int] = range(len(source))
    if len(source) >= WORTH:
        numbers = watched(numbers, "decoding images")
    # Threads would only wait for each other: decoding small images holds the interpreter lock.
    for i in numbers:
        try:
            image = source.load(i)
        except BadImage as error:
            unreadable[i] = str(error)
            continue
        if image.shape != shape:
            return None
        images[i] = image
    return Decoded(images, unreadable)


def _open(stem: Path, shape: tuple[int, ...]) -> Decoded | None:
    """What `_keep` wrote, or ``None`` if it is not there or not whole."""
    try:
        facts = read_json(stem.with_suffix(".json"))
        images = np.load(stem.with_suffix(".npy"), mmap_mode="c", allow_pickle=False)  # pages are private once written to
        if images.shape == shape and images.dtype == np.uint8 and zlib.crc32(images.data) == facts["crc32"]:
            return Decoded(images, {int(i): str(reason) for i, reason in facts["unreadable"].items()})
        log.warning("%s.npy is damaged and is made anew", stem)
    except FileNotFoundError:
        pass
    except (OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, OverflowError, MemoryError) as error:
        log.warning("%s.npy is damaged and is made anew (%s)", stem, error)
    return None


def _keep(stem: Path, content: Decoded) -> Decoded:
    """Write the pixels, then the facts that vouch for them; the same content, mapped, or as it was if that failed."""
    facts = {"crc32": zlib.crc32(content.images.data), "unreadable": content.unreadable}
    parts = {".npy": lambda file: np.save(file, content.images), ".json": lambda file: file.write(json.dumps(facts).encode())}
    scratch = None
    try:
        for suffix, write in parts.items():
            handle, scratch = tempfile.mkstemp(dir=stem.parent, suffix=".part")   # nobody can have linked this name elsewhere
            with os.fdopen(handle, "wb") as file:
                write(file)
            os.replace(scratch, stem.with_suffix(suffix))
    except OSError as error:
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        log.warning("decoded images are not kept: %s", error)
        return content
    return _open(stem, content.images.shape) or content
