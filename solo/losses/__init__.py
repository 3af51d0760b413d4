"""Losses as pure functions of tensors and keyword numbers."""

from solo.losses.all4one import All4OneTerms, all4one_loss_func, feature_loss_func
from solo.losses.barlow import barlow_loss_func
from solo.losses.mvmr import MVMRTerms, distance_correlation, mvmr_loss_func
from solo.losses.nnclr import nnclr_loss_func
from solo.losses.sce import sce_loss_func, sce_multicrop_loss_func
from solo.losses.simclr import simclr_loss_func
from solo.losses.unigrad import (
    unigrad_barlow_loss_func,
    unigrad_byol_directpred_loss_func,
    unigrad_loss_func,
    unigrad_moco_loss_func,
    unigrad_simclr_loss_func,
    unigrad_simsiam_loss_func,
    unigrad_vicreg_loss_func,
)
from solo.losses.vicreg import vicreg_loss_func

__all__ = [
    "All4OneTerms",
    "MVMRTerms",
    "all4one_loss_func",
    "barlow_loss_func",
    "distance_correlation",
    "feature_loss_func",
    "mvmr_loss_func",
    "nnclr_loss_func",
    "sce_loss_func",
    "sce_multicrop_loss_func",
    "simclr_loss_func",
    "unigrad_barlow_loss_func",
    "unigrad_byol_directpred_loss_func",
    "unigrad_loss_func",
    "unigrad_moco_loss_func",
    "unigrad_simclr_loss_func",
    "unigrad_simsiam_loss_func",
    "unigrad_vicreg_loss_func",
    "vicreg_loss_func",
]
