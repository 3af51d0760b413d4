"""Hand-crafted views of an image for `MVMR` to depend on: ``name -> function of images``."""

from solo.representations.augmented import augmented
from solo.representations.base import REPRESENTATIONS, Representation, represent
from solo.representations.pixels import hog, local_std, raw
from solo.representations.scattering import scattering

__all__ = ["REPRESENTATIONS", "Representation", "augmented", "hog", "local_std", "raw", "represent", "scattering"]
