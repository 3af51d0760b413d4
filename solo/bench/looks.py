"""Whether a peer does the same work: its random numbers are its own, so its views are held to ours by what they look like."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from solo.data.views import SOLARIZE_THRESHOLD
from solo.errors import NumericsError

_FAR = 0.1  # how far mean and spread may differ, in spreads
_ERRORS = 4  # standard errors that chance may make of a difference
_GREY = 2 / 255  # how far apart the channels of a grey pixel may lie
_TINY = 1e-8


def looks(ours: Sequence[Tensor], theirs: Sequence[Tensor], images: Sequence[np.ndarray], but: Sequence[str] = ()) -> str:
    """Holds views of the same images made with other random numbers to what ours look like.

    Args:
        ours, theirs: per view [n, C, S, S], pixels in 0..1.
        images: what they were made of, each [H, W, C].
        but: names of `TRAITS` that are not compared.

    Raises:
        NumericsError: a view's values, or the means of its images, have another mean or spread; or on average its images
            are grey, solarised, mirrored or sharp to another degree.
    """
    traits = {name: TRAITS[name] for name in TRAITS if name not in but}
    worst, sides = 0.0, torch.cat([_lean(_tensor(image)) for image in images]).sign()
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), 1):
        if a.shape != b.shape:
            raise NumericsError(f"the peer's views are {tuple(b.shape)}, ours {tuple(a.shape)}")
        (mean, spread, means), (other, *others) = _looks(a), _looks(b)
        off = [abs(mean - other) / spread, abs(others[0] / spread - 1), abs(others[1] / means - 1)]
        worst = max(worst, *(value.max().item() for value in off))
        for name, (trait, allowed) in traits.items():
            x, y = trait(a, sides), trait(b, sides)
            difference = (x.mean() - y.mean()).item()
            chance = _ERRORS * ((x.var() + y.var()) / len(x)).sqrt().item()
            if not abs(difference) <= allowed + chance:
                raise NumericsError(
                    f"the peer's views do not look like ours: view {number} is {name} to {y.mean():.3f}, ours to {x.mean():.3f}"
                )
    if not worst < _FAR:
        raise NumericsError(f"the peer's views do not look like ours: their mean or spread is off by {worst:.0%} of a spread")
    return (f"correct: mean and spread of the peer's views, and of their images' means, within {worst:.1%} of ours; "
            f"{', '.join(traits)} as ours are")


def shown(views: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]) -> list[Tensor]:
    """Normalised views as pixels in 0..1."""
    shift, scale = (torch.tensor(each).view(-1, 1, 1) for each in (mean, std))
    return [view.float() * scale + shift for view in views]


def _looks(view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per channel: mean and spread of all values, spread of the images' means."""
    return view.mean((0, 2, 3)), view.std((0, 2, 3)), view.mean((2, 3)).std(0)


# --- traits of each image, [n]; ``sides``: 1 where the image that it was made of grows brighter to the right, else -1 -----


def _grey(view: Tensor, sides: Tensor) -> Tensor:
    """Whether its channels are one."""
    return ((view.amax(1) - view.amin(1)).amax((1, 2)) < _GREY).float()


def _solarised(view: Tensor, sides: Tensor) -> Tensor:
    """Whether nothing is brighter than what solarising leaves, as is true of few other images."""
    return (view.amax((1, 2, 3)) < SOLARIZE_THRESHOLD).float()


def _mirrored(view: Tensor, sides: Tensor) -> Tensor:
    """Whether its columns grow brighter the other way than the image's: from -1, the same way, over 0, no way, to 1."""
    return -_lean(view) * sides


def _lean(pixels: Tensor) -> Tensor:
    """The correlation of the columns' brightness with their place from left to right, of images [n, C, H, W]."""
    columns = pixels.mean((1, 2))                           # [n, W]
    place, bright = torch.linspace(-1, 1, columns.shape[1]), columns - columns.mean(1, keepdim=True)
    return bright @ place / (place.norm() * bright.norm(dim=1) + _TINY)


def _tensor(image: np.ndarray) -> Tensor:
    """[H, W, C] uint8 -> [1, C, H, W] in 0..1."""
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float() / 255


def _sharp(view: Tensor, sides: Tensor) -> Tensor:
    """The logarithm of its finest differences' share of its variance."""
    grey = view.mean(1)
    fine = sum((grey.diff(n=2, dim=axis) ** 2).mean((1, 2)) for axis in (1, 2))
    return torch.log((fine + _TINY) / (grey.var((1, 2)) + _TINY))


# name -> (trait, by how much its mean may differ for a peer's other interpolation and rounding)
TRAITS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], float]] = {
    "grey": (_grey, 0.02),
    "solarised": (_solarised, 0.02),
    "mirrored": (_mirrored, 0.02),
    "sharp": (_sharp, 0.3),
}
