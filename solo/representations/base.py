"""Names to representations, and how one is asked for."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from solo.losses.mvmr import WIDTH
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


def bands(images: Tensor, beyond: int = 0) -> Iterator[Tensor]:
    """One channel after the other, in bands of rows that have at most `WIDTH` pixels: [B, 1, h, W].

    Args:
        images: [B, C, H, W].
        beyond: rows that a band has more on each side, of its neighbours or reflected at the border: [B, 1, h + 2 beyond, W].
    """
    height, width = images.shape[-2:]
    rows = torch.arange(-beyond, height + beyond, device=images.device).abs()
    rows = height - 1 - (height - 1 - rows).abs()                               # reflected at the border
    high = max(1, WIDTH // width)
    for channel in images.split(1, dim=1):
        for top in range(0, height, high):
            yield channel[:, :, rows[top : min(top + high, height) + 2 * beyond]] if beyond else channel[:, :, top : top + high]
