"""Self-supervised methods as LightningModules: ``NNCLR(backbone, NNCLR.Config(temperature=0.1))``."""

from solo.methods.all4one import All4One
from solo.methods.base import METHODS, Method
from solo.methods.mvmr import MVMR
from solo.methods.nnclr import NNCLR
from solo.methods.sce import SCE
from solo.methods.unigrad import UniGrad

__all__ = [
    "All4One",
    "METHODS",
    "MVMR",
    "Method",
    "NNCLR",
    "SCE",
    "UniGrad",
]
