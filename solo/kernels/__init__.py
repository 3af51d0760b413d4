"""What the losses over many keys are made of. Each operation's module has its equations, its eager form, and the choice
between that and its Triton form in ``triton_*``."""

from solo.kernels.attention import queue_attention
from solo.kernels.contrast import row_logsumexp, weighted_keys
from solo.kernels.nearest import neighbours, wants_shadow

__all__ = ["neighbours", "queue_attention", "row_logsumexp", "wants_shadow", "weighted_keys"]
