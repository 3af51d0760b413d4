"""How the numba kernel is compiled and where it is kept."""

import os
import stat
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, register_model

_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
exact = njit(**_OPTIONS)
fast = njit(fastmath=True, **_OPTIONS)
inlined = njit(fastmath=True, forceinline=True, **_OPTIONS)


# --- what Python cannot say: memory fetched ahead, and eight numbers at once ---------------------------------------------

WIDTH = 8
_VECTOR = ir.VectorType(ir.FloatType(), WIDTH)


class _Lanes(types.Type):
    """`WIDTH` float32 in registers, however wide the processor's are."""


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: _Lanes) -> None:
        super().__init__(manager, kind, _VECTOR)


_lanes = _Lanes("lanes")


def _entry(target: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    return builder.gep(target.make_array(kind)(target, builder, array).data, [place])


def _fetch(_: Any, array: Any, place: Any) -> Any:
    """Let the cache line of entry ``place`` of a flat array, soon to be used, come from memory while work goes on."""

    def code(target: Any, builder: Any, _: Any, arguments: Any) -> Any:
        number = ir.IntType(32)
        entry = _entry(target, builder, array, *arguments)
        kind = ir.FunctionType(ir.VoidType(), [entry.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [entry.type], kind)
        builder.call(prefetch, [entry, number(int(array.mutable)), number(3), number(1)])  # to the nearest cache, data
        return target.get_dummy_value()

    return types.void(array, place), code


def _zeros(_: Any) -> Any:
    """Lanes of zeros."""
    return _lanes(), lambda *_: ir.Constant(_VECTOR, [0.0] * WIDTH)


def _load(_: Any, array: Any, place: Any) -> Any:
    """Lanes of what begins at entry ``place`` of a flat float32 array."""

    def code(target: Any, builder: Any, _: Any, arguments: Any) -> Any:
        entry = _entry(target, builder, array, *arguments)
        return builder.load(builder.bitcast(entry, _VECTOR.as_pointer()), align=4)

    return _lanes(array, place), code


def _store(_: Any, array: Any, place: Any, lanes: Any) -> Any:
    """Write lanes, from entry ``place`` of a flat float32 array on."""

    def code(target: Any, builder: Any, _: Any, arguments: Any) -> Any:
        entry = _entry(target, builder, array, *arguments[:2])
        builder.store(arguments[2], builder.bitcast(entry, _VECTOR.as_pointer()), align=4)
        return target.get_dummy_value()

    return types.void(array, place, lanes), code


def _plus(_: Any, total: Any, number: Any, lanes: Any) -> Any:
    """total + number * lanes; rounded once or twice, whichever the processor does faster."""

    def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        total, number, lanes = arguments
        zero = ir.IntType(32)(0)
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), number, zero)
        numbers = builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(zero.type, WIDTH), [zero] * WIDTH))
        return builder.fadd(total, builder.fmul(numbers, lanes, flags=["fast"]), flags=["fast"])

    return _lanes(total, number, lanes), code


def _clamp(_: Any, lanes: Any) -> Any:
    """Lanes limited to 0..1."""

    def code(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        (x,) = arguments
        for sign, bound in (("<", 1.0), (">", 0.0)):
            limit = ir.Constant(_VECTOR, [bound] * WIDTH)
            x = builder.select(builder.fcmp_ordered(sign, x, limit, flags=["fast"]), x, limit)
        return x

    return _lanes(lanes), code


clamp: Any = intrinsic(_clamp)
fetch: Any = intrinsic(_fetch)
load: Any = intrinsic(_load)
plus: Any = intrinsic(_plus)
store: Any = intrinsic(_store)
zeros: Any = intrinsic(_zeros)


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
