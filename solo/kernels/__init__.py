"""Fused kernels of the losses. Each function has an eager twin, which it is wherever Triton cannot run."""

from solo.kernels.attention import queue_attention
from solo.kernels.contrast import Side, Statistics, info_nce, pull, row_statistics
from solo.kernels.nearest import neighbours

__all__ = ["Side", "Statistics", "info_nce", "neighbours", "pull", "queue_attention", "row_statistics"]
