"""A training step as solo-learn writes it: the same networks and the same loss, each part in its published form.

Each view passes by itself, is looked up by itself and has a term of its own. Not here: the online classifier and the logging,
which a step of ours leaves to callbacks (`solo.bench.step.overhead` times those).
"""

from collections.abc import Iterable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from solo.batch import Batch
from solo.batching import ViewBatching
from solo.losses.all4one import feature_loss_func
from solo.methods import Method
from solo.methods.all4one import All4One
from solo.methods.nnclr import NNCLR
from solo.nn import Queue, Teacher, neighbour_accuracy


class LoopLARS(Optimizer):
    """`solo.optim.LARS` tensor by tensor, asking the device for the norms before it rescales."""

    def __init__(self, params: Iterable[Any], lr: float, momentum: float, eta: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, eta=eta, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update, with ``clip_lr`` and ``exclude_bias_n_norm``."""
        for group in self.param_groups:
            decay = group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    p_norm, g_norm = torch.norm(p), torch.norm(update)
                    if p_norm != 0 and g_norm != 0:
                        ratio = p_norm / (g_norm + p_norm * decay + 1e-8) * group["eta"]
                        ratio = min(ratio / group["lr"], 1)
                        update = update.add(p, alpha=decay).mul(ratio)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    buffer = state["momentum_buffer"] = update.clone()
                else:
                    buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


class LoopQueue(Queue):
    """Similarities anew for each thing that is asked of them, and a pointer that is read on the host."""

    @torch.no_grad()
    def nearest(self, z: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        z = F.normalize(z, dim=-1)
        first = (z @ self.keys.T).max(dim=1).indices[:, None]
        index = first if k == 1 else (z @ self.keys.T).topk(k, dim=1).indices
        return self.keys[index], self.labels[index]

    @torch.no_grad()
    def land(self) -> None:
        for pushed in self._pending:
            z, labels = pushed()
            start = int(self.pointer)
            self.keys[start : start + len(z)] = z
            self.labels[start : start + len(z)] = labels
            self.pointer[...] = (start + len(z)) % len(self.keys)
        self._pending.clear()


class LoopTeacher(Teacher):
    """New storage for every tensor at every step."""

    @torch.no_grad()
    def update(self, progress: float) -> float:
        tau = self.momentum.tau(progress)
        students = [parameter for module in self._students for parameter in module.parameters()]
        for student, teacher in zip(students, self.parameters(), strict=True):
            teacher.data = tau * teacher.data + (1 - tau) * student.data
        return tau


class PublishedNNCLR(NNCLR):
    """A search and a term for each view."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        f1, f2 = map(self.backbone, batch.views)                                # [B, dim]
        z1, z2 = self.projector(f1), self.projector(f2)                         # [B, D]
        p1, p2 = self.predictor(z1), self.predictor(z2)                         # [B, D]
        (n1, y), (n2, _) = self.queue.nearest(z1), self.queue.nearest(z2)       # [B, 1, D]
        t = self.config.temperature
        loss = _nce(n1[:, 0], p2, t) / 2 + _nce(n2[:, 0], p1, t) / 2
        self.queue.push(z1, batch.labels)
        return {"loss": loss, "feats": torch.cat([f1, f2]), "nn_acc": neighbour_accuracy(y[:, 0], batch.labels)}


class PublishedAll4One(All4One):
    """A search, two passes through the transformer and three terms for each view; heads run once more, for nothing."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        f1, f2 = map(self._forward, batch.views)                                # [B, dim]
        m1, m2 = (F.normalize(self.teacher(view), dim=-1) for view in batch.views)
        z1, z2 = self.projector(f1), self.projector(f2)                         # [B, D]
        p1, p2 = self.predictor(z1), self.predictor(z2)                         # [B, D]
        c1, c2 = self.centroid_predictor(z1), self.centroid_predictor(z2)       # [B, D]
        k, t, ct = self.config.neighbours, self.config.temperature, self.config.centroid_temperature
        (n1, y), (n2, _) = self.queue.nearest(m1, k), self.queue.nearest(m2, k)     # [B, k, D]
        b1, b2 = (torch.cat([c[:, None], n[:, :-1]], dim=1) for c, n in ((c1, n1), (c2, n2)))
        a1, a2, b1, b2 = (self.transformer(tokens + self.position)[:, 0] for tokens in (n1, n2, b1, b2))    # [B, D]
        centroid = _nce(a1, b2, ct) / 2 + _nce(a2, b1, ct) / 2
        neighbour = _nce(n1[:, 0], p2, t) / 2 + _nce(n2[:, 0], p1, t) / 2
        loss = (centroid + neighbour + feature_loss_func((z1, z2), (m1, m2))) / 2
        self.queue.push(m1, batch.labels)
        return {"loss": loss, "feats": torch.cat([f1, f2]), "nn_acc": neighbour_accuracy(y[:, 0], batch.labels)}

    def _forward(self, view: Tensor) -> Tensor:
        features = self.backbone(view)
        self.predictor(self.projector(features))        # thrown away, and computed anew by the step
        return features


def _nce(x: Tensor, y: Tensor, temperature: float) -> Tensor:
    logits = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / temperature    # [B, B]
    return F.cross_entropy(logits, torch.arange(len(x), device=x.device))


_AS_PUBLISHED: dict[type, type] = {
    Queue: LoopQueue, Teacher: LoopTeacher, NNCLR: PublishedNNCLR, All4One: PublishedAll4One,
}


def as_published(method: Method) -> Method:
    """The method with each of these parts in its published form, changed in place."""
    method.each = ViewBatching("separate")
    for module in method.modules():
        if kind := _AS_PUBLISHED.get(type(module)):
            module.__class__ = kind
    return method


class LoggedAtOnce(pl.LightningModule):
    """A module that hands its metrics to Lightning at every step, for the step, the epoch and all ranks.

    Args:
        network: what is trained.
        metrics: how many scalars are logged.
    """

    def __init__(self, network: torch.nn.Module, metrics: int) -> None:
        super().__init__()
        self.network, self.metrics = network, metrics

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.network(batch).square().mean()
        values = {f"metric{i}": loss.detach() for i in range(self.metrics)}
        self.log_dict(values, on_step=True, on_epoch=True, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)
