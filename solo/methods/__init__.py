"""Self-supervised methods as LightningModules: ``NNCLR(backbone, NNCLR.Config(temperature=0.1))``."""

from solo.methods.all4one import All4One
from solo.methods.barlow_twins import BarlowTwins
from solo.methods.base import METHODS, Method
from solo.methods.mvmr import MVMR
from solo.methods.nnclr import NNCLR
from solo.methods.sce import SCE
from solo.methods.simclr import SimCLR
from solo.methods.unigrad import UniGrad
from solo.methods.vicreg import VICReg

__all__ = [
    "All4One",
    "BarlowTwins",
    "METHODS",
    "MVMR",
    "Method",
    "NNCLR",
    "SCE",
    "SimCLR",
    "UniGrad",
    "VICReg",
]
