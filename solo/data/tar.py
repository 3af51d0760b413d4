"""Images straight out of an uncompressed tar file: read where they lie, never extracted."""

import tarfile
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from solo.console import say
from solo.data.decoding import BadImage, decode, patiently
from solo.data.reads import noted
from solo.data.sources import digest, is_image, printable, stamp
from solo.errors import ConfigError

MAX_MEMBER = 256 << 20  # bytes


class TarSource:
    """The image files below one folder of a tar file; the folder above each is its class.

    Nothing is written to disk, so no member can be placed anywhere: what is not a regular file (links, devices), bears
    the name of another member or is larger than `MAX_MEMBER` is left out and counted. What a truncated archive has lost
    is a `BadImage`.

    Args:
        part: the folder inside, e.g. ``train``; empty: all of it.
        key: the setting that errors name.

    Raises:
        ConfigError: the file is missing, no tar file, compressed, or has no images in ``part``.
    """

    def __init__(self, path: str | Path, part: str, in_chans: int, key: str) -> None:
        self.path, self._in_chans = Path(path), in_chans
        if not self.path.is_file():
            raise ConfigError(f"{key}={path} is not a file; data.dataset=tar reads one .tar file of images")
        self.ignored: Counter[str] = Counter()
        self._members = sorted(self._index(key, PurePosixPath(part)))  # (name, offset, size)
        if not self._members:
            raise ConfigError(f"{key}={path}: no images in {part or 'it'}")
        if self.ignored:
            say(f"{path}: ignored {', '.join(f'{count} {kind}' for kind, count in self.ignored.most_common())}")
        folders = [PurePosixPath(name).parent.name for name, _, _ in self._members]
        known = sorted(set(folders)) if all(folders) else []
        self.classes = [printable(name) for name in known]
        number = {name: i for i, name in enumerate(known)}
        self.labels = np.array([number.get(folder, -1) for folder in folders], dtype=np.int64)
        say(f"{path}: {len(self)} images, {f'{len(self.classes)} classes' if self.classes else 'without labels'}")

    def __len__(self) -> int:
        return len(self._members)

    def encoded(self, i: int) -> bytes:
        """The bytes of image i; `BadImage` where they cannot be read."""
        return patiently(lambda: self._read(i), self.path)

    def _read(self, i: int) -> bytes:
        _, offset, size = self._members[i]
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise BadImage(f"the archive ends {size - len(content)} bytes before the image does")
        return content

    def load(self, i: int) -> np.ndarray:
        return decode(self.encoded(i), self._in_chans)

    def name(self, i: int) -> str:
        return printable(f"{self.path}:{self._members[i][0]}")

    def fingerprint(self) -> str:
        return digest(str(self.path.resolve()), stamp(self.path), len(self), self._members[0], self._in_chans)

    def listing(self) -> object:
        return [(name, size) for name, _, size in self._members]

    def _index(self, key: str, part: PurePosixPath) -> list[tuple[str, int, int]]:
        found: dict[str, tuple[str, int, int]] = {}
        try:
            with noted(lambda: tarfile.open(self.path, "r:"), self.path) as archive:
                last = -1
                while (member := noted(archive.next, self.path)) is not None:
                    if member.offset <= last or member.size < 0:        # a negative size would lead back, for ever
                        raise tarfile.ReadError(f"member {member.name!r} has no possible size")
                    last = member.offset
                    inside = PurePosixPath(member.name).is_relative_to(part)
                    if member.isdir() or not inside:
                        continue
                    if not member.isreg() or member.issparse():
                        self.ignored["links or devices"] += 1
                    elif not is_image(PurePosixPath(member.name).name):
                        self.ignored["other files"] += 1
                    elif member.name in found:
                        self.ignored["members of a name that is taken"] += 1
                    elif member.size > MAX_MEMBER:
                        self.ignored[f"members above {MAX_MEMBER >> 20} MiB"] += 1
                    else:
                        found[member.name] = (member.name, member.offset_data, member.size)
        except (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError) as error:
            if not found:
                raise ConfigError(f"{key}={self.path} is no uncompressed tar file ({error})") from error
            say(f"{self.path}: the archive is damaged after {len(found)} images ({error})")
        return list(found.values())
