"""Images through a frozen backbone, once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from solo.batch import Batch
from solo.dist import gather_uneven, world_size


class Features(NamedTuple):
    """What a backbone makes of a dataset.

    Attributes:
        features: [N, D] float32.
        labels: [N] int64, -1 where there is none.
    """

    features: Tensor
    labels: Tensor

    def labelled(self) -> "Features":
        """The rows that have a label."""
        known = self.labels >= 0
        return Features(self.features[known], self.labels[known])

    def to(self, device: torch.device | str) -> "Features":
        """Both tensors on ``device``."""
        return Features(self.features.to(device), self.labels.to(device))


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """``module`` in eval mode without gradients; each submodule gets its own mode back.

    The CPU random state is kept too, because a DataLoader's iterator draws from it.
    """
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield module
    finally:
        for m in training:
            m.training = True


def extract(backbone: nn.Module, loader: Iterable[Batch], device: torch.device | str) -> Features:
    """Features of the first view of every image, of all ranks, in dataset order.

    Args:
        backbone: [B, C, H, W] -> [B, D] with ``num_features`` = D; its modes are restored afterwards.
        loader: clean batches; under several ranks each rank's own share, of which some may be empty.
        device: where the backbone is.

    Returns:
        Features on the CPU, the same on every rank.
    """
    features: list[Tensor] = []
    labels: list[Tensor] = []
    index: list[Tensor] = []
    dtype = next((p.dtype for p in backbone.parameters()), torch.float32)       # 16 bits after precision=bf16-true
    with frozen(backbone):
        for batch in loader:
            features.append(backbone(batch.views[0].to(device, dtype, non_blocking=True)).float().cpu())  # [B, D]
            labels.append(batch.labels.cpu())
            index.append(batch.index.cpu())
    if not index:
        none = torch.empty(0, dtype=torch.long)
        features, labels, index = [torch.empty(0, int(backbone.num_features))], [none], [none]  # type: ignore[arg-type]
    rows = [torch.cat(part) for part in (features, labels, index)]
    if world_size() > 1:
        rows = [gather_uneven(part.to(device)).cpu() for part in rows]
    order = torch.argsort(rows[2], stable=True)
    return Features(rows[0][order], rows[1][order])
