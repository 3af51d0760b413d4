"""What the checks compare with, and how they say what they found."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.methods import Method


class Measured(NamedTuple):
    """The largest difference a check found and the one it allows; 0 allowed: the same bits.

    Attributes:
        note: what is not compared, where that is the method's or its backbone's doing.
    """

    largest: float
    bound: float
    note: str = ""


class Absent(NamedTuple):
    """A method has not what a check is about.

    Attributes:
        why: what it has instead.
    """

    why: str


SAME_BITS = Measured(0.0, 0.0)


class Differs(AssertionError):
    """A difference above its bound.

    Attributes:
        measured: both.
    """

    def __init__(self, message: str, measured: Measured) -> None:
        super().__init__(message)
        self.measured = measured


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


def same(a: Any, b: Any, what: str) -> None:
    """Equal to the bit, however nested."""
    if isinstance(a, Tensor):
        require(torch.equal(a, b), f"{what} differ")
    elif isinstance(a, Mapping):
        require(a.keys() == b.keys(), f"{what}: keys {sorted(map(str, a.keys() ^ b.keys()))}")
        for key in a:
            same(a[key], b[key], f"{what}: {key}")
    elif isinstance(a, list):
        require(len(a) == len(b), f"{what}: {len(a)} and {len(b)}")
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{what}: {i}")
    else:
        require(a == b, f"{what}: {a!r} and {b!r}")


def gradients(model: Method, batch: Batch, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one batch."""
    torch.manual_seed(seed)
    model.zero_grad()
    outputs = model.losses(batch)
    outputs["loss"].backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def zeros(grads: dict[str, Tensor]) -> set[str]:
    """Names of gradients that are rounding errors beside the largest one (float64)."""
    largest = max(float(grad.abs().max()) for grad in grads.values())
    return {name for name, grad in grads.items() if float(grad.abs().max()) <= 1e-12 * largest}


def double(batch: Batch) -> Batch:
    return batch._replace(views=[view.double() for view in batch.views])


def of(model: nn.Module, kind: type[nn.Module]) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def within(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, bound: float = 1e-8) -> Measured:
    """The largest difference between two sets of tensors, relative to each number's size + 0.01 (float64).

    Raises:
        AssertionError: their names differ, or a `Differs` that names the tensor.
    """
    require(expected.keys() == found.keys(), f"{where}: only one has {sorted(expected.keys() ^ found.keys())}")
    largest = 0.0
    for name, value in expected.items():
        a, b = value.double(), found[name].double()
        difference = float(((a - b).abs() / (a.abs() + 0.01)).nan_to_num(torch.inf).max()) if a.numel() else 0.0
        if difference > bound:
            raise Differs(f"{name} {where} differs: by {difference:.2g}, allowed is {bound:g}", Measured(difference, bound))
        largest = max(largest, difference)
    return Measured(largest, bound)
