"""How the numba kernel is compiled and where it is kept."""

import os
import stat
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
exact = njit(**_OPTIONS)
fast = njit(fastmath=True, **_OPTIONS)
inlined = njit(fastmath=True, forceinline=True, **_OPTIONS)


def _fetch(_: Any, array: Any, place: Any) -> Any:
    """Let the cache line of entry ``place`` of a flat array, soon to be written, come from memory while work goes on."""

    def code(target: Any, builder: Any, _: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        entry = builder.gep(target.make_array(array)(target, builder, arguments[0]).data, [arguments[1]])
        kind = ir.FunctionType(ir.VoidType(), [entry.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [entry.type], kind)
        builder.call(prefetch, [entry, number(1), number(3), number(1)])  # to write, to the nearest cache, data
        return target.get_dummy_value()

    return types.void(array, place), code


fetch: Any = intrinsic(_fetch)


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
