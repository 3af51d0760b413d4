"""How the numba kernel is compiled and where it is kept."""

import os
import stat
from collections.abc import Callable
from typing import Any

from numba import njit

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
exact = njit(**_OPTIONS)
fast = njit(fastmath=True, **_OPTIONS)
inlined = njit(fastmath=True, forceinline=True, **_OPTIONS)


def kept(function: Callable[..., Any]) -> Any:
    """Compiled with all it calls, and kept on disk if only this user or root may write there.

    What lies in numba's cache is executed, so a folder that others can write to is not used.
    """
    try:
        compiled = njit(cache=True, **_OPTIONS)(function)
        folder = os.stat(str(compiled.stats.cache_path))
        if folder.st_uid in (0, os.getuid()) and not folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return compiled
    except (RuntimeError, OSError):
        pass  # no folder to keep it in
    return exact(function)
