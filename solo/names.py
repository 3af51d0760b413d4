"""What somebody who mistyped a name most likely meant."""

import difflib
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from os.path import commonprefix
from pathlib import Path

_FEW = 3        # names that a line has room for


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is one typing slip away, else the most alike one, else None."""
    known = list(known)
    slips = [other for other in known if one_slip(name.casefold(), other.casefold())]
    near = difflib.get_close_matches(name, slips, n=1, cutoff=0.0) or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return near[0] if near else None


def one_slip(typed: str, meant: str) -> bool:
    """Whether one letter was left out, added, mistaken, or swapped with its neighbour (or none was)."""
    same = len(commonprefix([typed, meant]))
    typed, meant = typed[same:], meant[same:]
    swapped = typed[:2] == meant[1::-1] and typed[2:] == meant[2:]
    return typed == meant[1:] or typed[1:] == meant or typed[1:] == meant[1:] or swapped


def few(names: Sequence[object]) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(map(str, names[:_FEW])) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def there(names: Sequence[object]) -> str:
    """What an error adds where there are names to choose from."""
    return f" (there: {few(names)})" if names else ""


def checkpoints_near(path: Path) -> list[Path]:
    """Other checkpoints and the runs in the nearest folder there is, or in the one around it; the newest first.

    For messages: what cannot be looked at is left out, as is all of the root, where a wrong path may be nearest to it.
    """
    folder = next((place for place in (path, *path.parents) if os.path.isdir(place)), Path())
    return _checkpoints_in(folder, path) or _checkpoints_in(folder.parent, path)


def _checkpoints_in(folder: Path, but: Path) -> list[Path]:
    files: dict[Path, Path] = {}
    with suppress(OSError):
        if (place := folder.resolve()) != place.parent:
            files |= {file: file for file in folder.glob("*.ckpt") if file != but}
            files |= {file.parent.parent: file for file in sorted(folder.glob("*/checkpoints/*.ckpt"))}
    ages = {name: (age, name) for name, file in files.items() if (age := _age(file)) is not None}
    return sorted(ages, key=ages.__getitem__, reverse=True)


def _age(file: Path) -> float | None:
    with suppress(OSError):             # its run may have just removed it
        found = file.stat()
        return found.st_mtime if stat.S_ISREG(found.st_mode) else None
    return None
