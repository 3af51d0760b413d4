"""Maths that must not lose digits to mixed precision."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


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
