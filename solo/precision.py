"""Maths that must not lose digits to mixed precision, and how many digits products of float32 have."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
MatmulPrecision = Literal["highest", "high", "medium"]


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: autocast is off inside, and 16-bit tensors among the arguments arrive as float32.

    float32 and float64 arguments stay as they are; tuples and lists of tensors are followed.
    """

    @functools.wraps(function)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((tensor.device.type for tensor in _tensors((*args, *kwargs.values()))), "cpu")
        with torch.autocast(device, enabled=False):
            wide: Any = function
            return wide(*map(_widened, args), **{name: _widened(value) for name, value in kwargs.items()})

    return exact


@contextmanager
def matmul_precision(value: MatmulPrecision | None) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a while; None leaves it as it is."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value or before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if type(value) in (tuple, list):
        return type(value)(map(_widened, value))
    return value
