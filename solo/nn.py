"""Modules that methods are made of: heads, the queue, the teacher, running statistics."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from solo.dist import Later
from solo.kernels import neighbours, wants_shadow
from solo.losses.unigrad import correlation
from solo.precision import full_precision
from solo.schedules import cosine


def mlp(
    *dims: int, bias: bool = True, last_bias: bool | None = None, last_norm: bool = False, last_affine: bool = True
) -> nn.Sequential:
    """``Linear, BatchNorm1d, ReLU`` between every two of ``dims``; the last Linear alone, or with BatchNorm1d.

    Args:
        dims: widths from input to output, e.g. ``mlp(512, 2048, 2048, 256)``.
        bias: of the Linears; one in front of BatchNorm1d changes nothing.
        last_bias: of the last Linear; None: as the others.
        last_norm: end with BatchNorm1d.
        last_affine: scale and shift of that last BatchNorm1d.
    """
    layers: list[nn.Module] = []
    for wide, narrow in zip(dims[:-2], dims[1:-1], strict=True):
        layers += [nn.Linear(wide, narrow, bias=bias), nn.BatchNorm1d(narrow), nn.ReLU()]
    layers.append(nn.Linear(dims[-2], dims[-1], bias=bias if last_bias is None else last_bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(dims[-1], affine=last_affine))
    return nn.Sequential(*layers)


@full_precision
def unit(z: Tensor) -> Tensor:
    """Rows [..., D] scaled to length 1; in float32 where ``z`` has 16 bits."""
    return F.normalize(z, dim=-1)


class StepModule(nn.Module):
    """A module with state that moves once per optimizer step, however many micro-batches the step accumulates."""

    def after_step(self, progress: float) -> dict[str, float]:
        """Move on; called after each optimizer step of a run.

        Args:
            progress: share of the run done before this step.

        Returns:
            Numbers to log.
        """
        raise NotImplementedError


class Queue(StepModule):
    """First-in-first-out memory of L2-normalised embeddings and their labels, equal on all ranks.

    A push lands only when `land` is called, after the optimizer step: a lookup never meets the batch it comes from,
    and however many micro-batches a step accumulates, they see the same queue.

    From the first lookup on, where `wants_shadow`, a copy of the keys in bfloat16 is kept for the search: half as much memory
    again. It follows the keys and is in no checkpoint.

    Args:
        size: number of rows K.
        dim: width D.
        views: pushes that a batch makes.

    Attributes:
        lookup: the last search: rows [B, D] as they asked, and the nearest [B, D] to each.
    """

    keys: Tensor
    labels: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int, views: int = 1) -> None:
        super().__init__()
        self.views = views
        self.register_buffer("keys", F.normalize(torch.randn(size, dim), dim=-1))                   # [K, D]
        self.register_buffer("labels", torch.full((size,), -1, dtype=torch.long))                   # [K]
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self._pending: list[Later] = []
        self._shadow: tuple[Tensor, Tensor, int] | None = None      # of which keys, in which version
        self.lookup: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def nearest(self, z: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k rows with the largest cosine to each row of ``z``, nearest first; constants.

        Args:
            z: [B, D], normalised here.

        Returns:
            Neighbours [B, k, D] and their labels [B, k] (-1 where unknown).
        """
        z = unit(z).to(self.keys.dtype)
        index = neighbours(z, self.keys, k, shadow=self._current_shadow())                          # [B, k]
        found = self.keys[index]                                                                    # [B, k, D]
        self.lookup = z, found[:, 0]
        return found, self.labels[index]

    def _current_shadow(self) -> Tensor | None:
        """[K, D] bfloat16; made anew where the keys were written by others than `land`, e.g. by a checkpoint."""
        if not wants_shadow(self.keys):
            return None
        if self._shadow is None or not self._follows():
            self._shadow = self.keys.bfloat16(), self.keys, self.keys._version
        return self._shadow[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shadow": None}           # a copy's keys have versions of their own

    def _follows(self) -> bool:
        return self._shadow is not None and self._shadow[1] is self.keys and self._shadow[2] == self.keys._version

    @torch.no_grad()
    def push(self, z: Tensor, labels: Tensor) -> None:
        """Hand over this rank's embeddings of this step; with `land` those of all ranks land, in rank order.

        They travel with the next collective of the loss, see `solo.dist.Later`.

        Args:
            z: [B, D], normalised here.
            labels: [B].
        """
        self._pending.append(Later(unit(z.to(self.keys.dtype)), labels))

    @torch.no_grad()
    def land(self) -> None:
        """Write what was pushed since the last call over the oldest rows."""
        shadow = self._shadow[0] if self._shadow is not None and self._follows() else None
        for pushed in self._pending:
            z, labels = pushed()                                                # [world * B, D], [world * B]
            rows = (self.pointer + torch.arange(len(z), device=z.device)) % len(self.keys)
            self.keys[rows] = z
            if shadow is not None:
                shadow[rows] = z.bfloat16()
            self.labels[rows] = labels
            self.pointer.copy_((self.pointer + len(z)) % len(self.keys))
        self._pending.clear()
        self._shadow = None if shadow is None else (shadow, self.keys, self.keys._version)

    def after_step(self, progress: float) -> dict[str, float]:
        self.land()
        return {}


class Correlation(StepModule):
    """Moving average F of the correlation of L2-normalised rows, [D, D] with trace 1, equal on all ranks.

    F starts as the first step's correlation. A micro-batch sees F moved on by its own correlation; after the optimizer
    step F has moved on once, by the mean over the step's micro-batches.

    Args:
        dim: width D.
        rho: decay.
    """

    value: Tensor
    steps: Tensor

    def __init__(self, dim: int, rho: float) -> None:
        super().__init__()
        self.rho = rho
        self.register_buffer("value", torch.zeros(dim, dim))                                        # [D, D]
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._pending: Tensor | None = None
        self._batches = 0

    @torch.no_grad()
    def forward(self, m1: Tensor, m2: Tensor) -> Tensor:
        """F [D, D] with this micro-batch's rows counted in.

        Args:
            m1, m2: [B, D] each, normalised here.
        """
        batch = correlation(m1, m2).to(self.value.dtype)                                            # [D, D]
        self._pending = batch if self._pending is None else self._pending + batch
        self._batches += 1
        return self._moved(batch)

    def _moved(self, batch: Tensor) -> Tensor:
        first = self.value.new_ones(())                     # a tensor on the device: no wait for its value
        return self.value.lerp(batch, torch.where(self.steps > 0, first * (1 - self.rho), first))

    @torch.no_grad()
    def after_step(self, progress: float) -> dict[str, float]:
        if self._pending is not None:
            self.value.copy_(self._moved(self._pending / self._batches))
            self.steps += 1
            self._pending, self._batches = None, 0
        return {}


@dataclass(kw_only=True)
class Momentum:
    """Decay of a teacher: tau goes from base to final along half a cosine of the run."""

    base_tau: float = 0.99
    final_tau: float = 1.0

    def __post_init__(self) -> None:
        for name in ("base_tau", "final_tau"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")

    def tau(self, progress: float) -> float:
        """The decay at ``progress`` in 0..1."""
        return cosine(progress, self.base_tau, self.final_tau)


class Teacher(StepModule, nn.Sequential):
    """Exponential moving average of a chain of modules: parameters follow, BatchNorm statistics are its own.

    Args:
        students: the modules to follow, applied one after the other.
        momentum: the schedule of tau.
    """

    def __init__(self, *students: nn.Module, momentum: Momentum) -> None:
        super().__init__(*(copy.deepcopy(student) for student in students))
        self.requires_grad_(False)
        self.momentum = momentum
        self._students = students                   # a tuple: not registered twice

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """The chain's output, without gradient."""
        return super().forward(x)

    @torch.no_grad()
    def in_parts(self, x: Tensor, size: int) -> Tensor:
        """As `forward`, with ``size`` images at a time through the first module; the rest sees the whole batch."""
        first, *heads = self
        x = torch.cat([first(part) for part in x.split(size)])
        for head in heads:
            x = head(x)
        return x

    @torch.no_grad()
    def update(self, progress: float) -> float:
        """theta <- tau theta + (1 - tau) student, in place; returns tau."""
        tau = self.momentum.tau(progress)
        torch._foreach_lerp_(list(self.parameters()), self._followed(), 1 - tau)
        return tau

    @torch.no_grad()
    def distance(self) -> Tensor:
        """Length of the difference to the student's weights, relative to the length of those."""
        student = self._followed()
        away = torch._foreach_sub(list(self.parameters()), student)
        return torch.nn.utils.get_total_norm(away) / torch.nn.utils.get_total_norm(student)

    def _followed(self) -> list[Tensor]:
        return [parameter for module in self._students for parameter in module.parameters()]

    def after_step(self, progress: float) -> dict[str, float]:
        return {"tau": self.update(progress)}


def neighbour_accuracy(neighbours: Tensor, labels: Tensor) -> Tensor:
    """Share of samples whose neighbour has their label, among those where both are known; NaN where none is.

    Args:
        neighbours: [B] labels of the neighbours, -1 where unknown.
        labels: [B] labels of the samples, -1 where unknown.
    """
    known = (neighbours >= 0) & (labels >= 0)
    return ((neighbours == labels) & known).sum() / known.sum()
