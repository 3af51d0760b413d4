"""What a data engine hands to a method."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One step's images.

    Attributes:
        views: augmented views, large crops first; each [B, C, H, W], normalised floats.
        labels: [B] int64 class of each image, -1 where there is none.
        index: [B] int64 position of each image in its dataset.
    """

    views: list[Tensor]
    labels: Tensor
    index: Tensor  # type: ignore[assignment]      # a field, not tuple.index
