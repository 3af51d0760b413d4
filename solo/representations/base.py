"""Names to representations, and how one is asked for."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from solo.losses.mvmr import WIDTH
from solo.registry import Registry

# Normalised images [B, C, H, W] to features [B, F], or to blocks [B, f] of their columns, so that F is never held whole.
Representation = Callable[[Tensor], Tensor | Iterable[Tensor]]

AT_ONCE = 1 << 25       # numbers that `in_parts` lets a function hold at once

REPRESENTATIONS: Registry[Representation] = Registry("solo.representations")


def represent(name: str, images: Tensor) -> Iterator[Tensor]:
    """Blocks [B, f] of a representation; nothing is computed before the first is asked for, so that a loss that asks for
    it decides on precision and gradient.

    Args:
        name: a row of `REPRESENTATIONS`, an entry point, or ``"module:function"``.
        images: [B, C, H, W]; 16-bit ones arrive as float32.
    """
    features = REPRESENTATIONS[name](images.to(torch.promote_types(images.dtype, torch.float32)))
    yield from [features] if isinstance(features, Tensor) else features


def rows_at_once(height: int, width: int) -> Iterator[tuple[int, int]]:
    """First row, and the one after the last, of one band of at most `WIDTH` pixels after the other."""
    high = max(1, WIDTH // width)
    return ((top, min(top + high, height)) for top in range(0, height, high))


def bands(images: Tensor, beyond: int = 0) -> Iterator[Tensor]:
    """One channel after the other, in bands of rows that have at most `WIDTH` pixels: [B, 1, h, W].

    Args:
        images: [B, C, H, W].
        beyond: rows that a band has more on each side, of its neighbours or reflected at the border: [B, 1, h + 2 beyond, W].
    """
    height, width = images.shape[-2:]
    for channel in images.split(1, dim=1):
        for top, bottom in rows_at_once(height, width):
            rows = reflected(top - beyond, bottom + beyond, height, images.device)
            yield channel[:, :, rows] if beyond else channel[:, :, top:bottom]


def reflected(first: int, end: int, size: int, device: torch.device) -> Tensor:
    """Indices from ``first`` to before ``end``, those beyond 0..size - 1 reflected there."""
    index = torch.arange(first, end, device=device).abs()
    return size - 1 - (size - 1 - index).abs()


def in_parts(function: Callable[[Tensor], Tensor], images: Tensor, numbers: int) -> Tensor:
    """A function [b, ...] -> [b, ...] of images [B, ...], of so many at once as keep what it holds meanwhile bounded.

    Args:
        numbers: what it holds of an image at most.
    """
    return torch.cat([function(part) for part in images.split(max(1, AT_ONCE // numbers))])
