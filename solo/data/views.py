"""Views: what each augmented copy of an image may undergo, and the random numbers that decide it.

Declared once, in solo-learn's YAML shape, and executed by any engine: `sample` draws plain arrays, an engine applies
them, and the same arrays mean the same image in every engine. The order of operations is the published one: crop
(bicubic) -> colour jitter (its four parts in a random order per image) -> grayscale -> Gaussian blur -> solarise ->
equalise -> horizontal flip -> normalise.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from solo.data.random import Draws

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # the numbers in `Params.order`
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the factors that change nothing
SOLARIZE_THRESHOLD = 128 / 255
SIGMA = (0.1, 2.0)
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))
CROP_TRIES = 10
_PER_TRY = 4  # numbers drawn for each


@dataclass(frozen=True, kw_only=True)
class Crop:
    """RandomResizedCrop. Disabled: the largest centred square, resized."""

    enabled: bool = True
    crop_min_scale: float = 0.08
    crop_max_scale: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.crop_min_scale <= self.crop_max_scale <= 1:
            raise ValueError(
                f"crop_min_scale must lie in (0, crop_max_scale] and crop_max_scale in (0, 1], "
                f"got {self.crop_min_scale} and {self.crop_max_scale}"
            )


@dataclass(frozen=True, kw_only=True)
class Chance:
    """An operation that is applied with probability ``prob``."""

    prob: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise ValueError(f"prob must lie in [0, 1], got {self.prob}")


@dataclass(frozen=True, kw_only=True)
class ColorJitter(Chance):
    """Factors are uniform in [1 - x, 1 + x] (not below 0), the hue shift in [-hue, hue] turns."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("brightness", "contrast", "saturation"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must lie in [0, 0.5], got {self.hue}")

    def ranges(self) -> list[tuple[float, float]]:
        """Bounds of the brightness, contrast and saturation factors and of the hue shift."""
        factors = (self.brightness, self.contrast, self.saturation)
        return [*((max(0.0, 1 - x), 1 + x) for x in factors), (-self.hue, self.hue)]


@dataclass(frozen=True, kw_only=True)
class View:
    """One kind of augmented copy; ``num_crops`` copies are drawn."""

    rrc: Crop = field(default_factory=Crop)
    color_jitter: ColorJitter = field(default_factory=ColorJitter)
    grayscale: Chance = field(default_factory=Chance)
    gaussian_blur: Chance = field(default_factory=Chance)
    solarization: Chance = field(default_factory=Chance)
    equalization: Chance = field(default_factory=Chance)
    horizontal_flip: Chance = field(default_factory=Chance)
    crop_size: int
    num_crops: int = 1

    def __post_init__(self) -> None:
        if self.crop_size < 1:
            raise ValueError(f"crop_size must be at least 1 pixel, got {self.crop_size}")
        if self.num_crops < 1:
            raise ValueError(f"num_crops must be at least 1, got {self.num_crops}")

    @property
    def augments(self) -> bool:
        """Whether it shows anything but the image as it is: its largest centred square, resized."""
        chances = (self.color_jitter, self.grayscale, self.gaussian_blur, self.solarization, self.equalization)
        return self.rrc.enabled or any(chance.prob > 0 for chance in (*chances, self.horizontal_flip))


def expand(views: Sequence[View]) -> list[View]:
    """One entry per copy, large crops first, otherwise in the order given."""
    copies = [dataclasses.replace(view, num_crops=1) for view in views for _ in range(view.num_crops)]
    return sorted(copies, key=lambda view: -view.crop_size)


@dataclass(frozen=True)
class Params:
    """What happens to n images, or to one after `row`.

    Attributes:
        box: [n, 4] int64 crop: top, left, height, width in source pixels.
        jitter: [n] bool; factors: [n, 4] brightness, contrast, saturation factors and hue shift; order: [n, 4].
        gray, blur, solarize, equalize, flip: [n] bool.
        sigma: [n] standard deviation of the blur in pixels of the crop.
    """

    box: np.ndarray
    jitter: np.ndarray
    factors: np.ndarray
    order: np.ndarray
    gray: np.ndarray
    blur: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray
    equalize: np.ndarray
    flip: np.ndarray

    def __len__(self) -> int:
        return len(self.box)

    def row(self, i: int | slice) -> "Params":
        """The numbers of image i, or of a slice of the images."""
        return Params(*(getattr(self, part.name)[i] for part in dataclasses.fields(self)))


def joined(parts: Sequence[Params]) -> Params:
    """The numbers of all images of the parts, one after the other."""
    names = [part.name for part in dataclasses.fields(Params)]
    return Params(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def sample(view: View, draws: Draws, heights: np.ndarray, widths: np.ndarray) -> Params:
    """Draw what ``view`` does to n images of the given source sizes ([n] integers, pixels)."""
    box = fixed_boxes(view.rrc, heights, widths)
    if view.rrc.enabled:
        _draw_boxes(view.rrc, draws, heights, widths, box)
    jitter = view.color_jitter
    return Params(
        box=box,
        jitter=draws.uniform() < jitter.prob,
        factors=np.stack([draws.uniform(*bounds) for bounds in jitter.ranges()], axis=1),
        order=draws.permutation(4),
        gray=draws.uniform() < view.grayscale.prob,
        blur=draws.uniform() < view.gaussian_blur.prob,
        sigma=draws.uniform(*SIGMA),
        solarize=draws.uniform() < view.solarization.prob,
        equalize=draws.uniform() < view.equalization.prob,
        flip=draws.uniform() < view.horizontal_flip.prob,
    )


def fixed_boxes(crop: Crop, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """[n, 4] crops where chance has no say: without a random crop, and where no random crop fits."""
    return _fallback_boxes(heights, widths) if crop.enabled else _centre_squares(heights, widths)


def _draw_boxes(crop: Crop, draws: Draws, heights: np.ndarray, widths: np.ndarray, box: np.ndarray) -> None:
    """torchvision's RandomResizedCrop: the first of ten tries that fits is written to ``box`` [n, 4], else it stays."""
    open_ = np.ones(len(box), dtype=bool)
    for tried in range(CROP_TRIES):
        if not open_.any():
            draws.skip(_PER_TRY * (CROP_TRIES - tried))
            return
        area = heights * widths * draws.uniform(crop.crop_min_scale, crop.crop_max_scale)
        ratio = np.exp(draws.uniform(*LOG_RATIO))
        w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        top = (draws.uniform() * (heights - h + 1)).astype(np.int64)
        left = (draws.uniform() * (widths - w + 1)).astype(np.int64)
        fits = open_ & (0 < w) & (w <= widths) & (0 < h) & (h <= heights)
        box[fits] = np.stack([top, left, h, w], axis=1)[fits]
        open_ &= ~fits


def _fallback_boxes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    narrowest, widest = math.exp(LOG_RATIO[0]), math.exp(LOG_RATIO[1])
    ratio = widths / heights
    h = np.where(ratio < narrowest, np.rint(widths / narrowest), heights).astype(np.int64)
    w = np.where(ratio > widest, np.rint(heights * widest), widths).astype(np.int64)
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def _centre_squares(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    side = np.minimum(heights, widths)
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1).astype(np.int64)
