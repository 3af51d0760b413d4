"""Self-supervised methods as LightningModules: ``NNCLR(backbone, NNCLR.Config(temperature=0.1))``."""

from solo.methods.all4one import All4One
from solo.methods.base import METHODS, Method
from solo.methods.nnclr import NNCLR
from solo.methods.unigrad import UniGrad

__all__ = ["METHODS", "All4One", "Method", "NNCLR", "UniGrad"]
