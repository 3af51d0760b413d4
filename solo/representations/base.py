"""Names to representations, and how one is asked for."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from solo.registry import Registry

# Normalised images [B, C, H, W] to features [B, F], or to blocks [B, f] of their columns, so that F is never held whole.
Representation = Callable[[Tensor], Tensor | Iterable[Tensor]]

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
