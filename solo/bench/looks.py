"""Whether a peer does the same work: its random numbers are its own, so its views are held to ours by what they look like."""

import torch

from solo.errors import NumericsError

_FAR = 0.1  # how far looks may differ


def looks(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> str:
    """Holds views of the same images made with other random numbers to what ours look like.

    Raises:
        NumericsError: a view's values, or the means of its images, have another mean or spread.
    """
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise NumericsError(f"the peer's views are {tuple(b.shape)}, ours {tuple(a.shape)}")
        (mean, spread, images), (other, *others) = _looks(a), _looks(b)
        off = [abs(mean - other) / spread, abs(others[0] / spread - 1), abs(others[1] / images - 1)]
        worst = max(worst, *(value.max().item() for value in off))
    if not worst < _FAR:
        raise NumericsError(f"the peer's views do not look like ours: their mean or spread is off by {worst:.0%} of a spread")
    return f"correct: mean and spread of the peer's views, and of their images' means, within {worst:.1%} of ours"


def _looks(view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per channel: mean and spread of all values, spread of the images' means."""
    view = view.float()
    return view.mean((0, 2, 3)), view.std((0, 2, 3)), view.mean((2, 3)).std(0)
