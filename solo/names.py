"""What somebody who mistyped a name most likely meant."""

import difflib
from collections.abc import Iterable
from os.path import commonprefix


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
