"""Views through one network: one after the other, as one batch with the statistics of each view, or in small parts."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from solo.nn import Teacher

Mode = Literal["separate", "concat"]


class ViewBatching:
    """Runs networks over views.

    ``separate`` runs each view by itself. ``concat`` runs all views of one shape as one batch, where every norm that uses
    batch statistics still takes them, and moves its running ones, view by view in their order: the same outputs, gradients
    and buffers. What a network draws at random, such as dropout, comes in another order.

    With a ``micro_batch``, images pass that many at a time, once forwards, and once more when their gradient comes back: the
    gradient is that of the whole batch, as in GradCache (Gao et al. 2021, https://arxiv.org/abs/2101.06983), and memory for
    activations that of a part. Norms by batch statistics take, and count, those of each part; heads see the whole batch.

    Args:
        mode: which of the two.
        micro_batch: images at a time, for ``separate``; None for all at once.

    Attributes:
        used: whether any network has been run.
    """

    def __init__(self, mode: Mode = "separate", micro_batch: int | None = None) -> None:
        self.mode, self.micro_batch = mode, micro_batch
        self.used = False
        self._layouts: WeakKeyDictionary[nn.Module, torch.memory_format] = WeakKeyDictionary()      # of networks looked at
        self._parts: WeakSet[nn.Module] = WeakSet()                                                 # and all they consist of

    def __call__(self, network: nn.Module, views: Sequence[Tensor]) -> list[Tensor]:
        """``[network(view) for view in views]``; images take the memory layout of the network's convolutions.

        Args:
            views: [B, ...] each.
        """
        self.used = True
        layout = self._layouts.get(network) or self._looked_at(network)
        views = [view.contiguous(memory_format=layout) if view.ndim == 4 else view for view in views]
        if self.mode == "separate":
            return [self._in_parts(network, view) for view in views]
        outputs: list[Tensor] = []
        for _, same in groupby(views, key=lambda view: view.shape):
            outputs += _batch.run(network, list(same))
        return outputs

    def _in_parts(self, network: nn.Module, view: Tensor) -> Tensor:
        size = self.micro_batch
        if size is None or view.ndim != 4 or len(view) <= size:
            return network(view)
        if isinstance(network, Teacher):
            return network.in_parts(view, size)
        context = partial(_both_times, network)
        return torch.cat([checkpoint(network, part, use_reentrant=False, context_fn=context) for part in view.split(size)])

    def note(self, network: nn.Module) -> str:
        """What is not as in a whole batch for this network, in a line, or nothing."""
        if self.micro_batch is None or not any(map(_counts, network.modules())):
            return ""
        size = self.micro_batch
        what = f"micro_batch={size}: the backbone's norms take their statistics from {size} images at a time"
        return f"{what}; the gradient is otherwise that of the whole batch"

    def renew(self) -> None:
        """Look at the networks anew: SyncBatchNorm may have taken the place of their norms."""
        self._layouts.clear()
        self._parts.clear()
        self.used = False

    def ran(self, module: nn.Module) -> bool:
        """Whether a module has been run, alone or within another one."""
        return module in self._parts

    def _looked_at(self, network: nn.Module) -> torch.memory_format:
        layout = self._layouts[network] = _layout(network)
        self._parts.update(network.modules())
        if self.mode == "concat":
            for module in network.modules():
                if _counts(module):
                    kind: Any = type(module)
                    module.__class__ = kind if issubclass(kind, PerView) else _per_view(kind)
        return layout

    def __getstate__(self) -> dict[str, Any]:
        return {"mode": self.mode, "micro_batch": self.micro_batch, "used": self.used}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _layouts=WeakKeyDictionary(), _parts=WeakSet())       # a copy looks at its own networks


def _both_times(network: nn.Module) -> tuple[Any, Any]:
    """What surrounds the first pass of a part, and the second."""
    return nullcontext(), _BuffersKept(network)


class _BuffersKept:
    """Running statistics moved in the first pass already: what is written within is thrown away.

    Entered once for each backward pass: a graph may be kept for several.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def __enter__(self) -> None:
        self._own = [(module, dict(module._buffers)) for module in self._network.modules() if module._buffers]
        for module, buffers in self._own:
            module._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in buffers.items()}

    def __exit__(self, *raised: object) -> None:
        for module, buffers in self._own:
            module._buffers = buffers


@dataclass(eq=False)
class _Batch:
    """The batch that a network runs at the moment.

    Attributes:
        views: how many its norms find in it.
        counters: of batches, of the norms that have just run; all move on in one operation.
    """

    views: int = 1
    counters: list[Tensor] = field(default_factory=list)

    def run(self, network: nn.Module, views: list[Tensor]) -> Sequence[Tensor]:
        if len(views) == 1:
            return [network(views[0])]
        self.views = len(views)
        try:
            return network(torch.cat(views)).chunk(len(views))
        finally:
            if self.counters:
                torch._foreach_add_(self.counters, self.views)
                self.counters.clear()
            self.views = 1


_batch = _Batch()       # one for all: a norm may be part of several networks, and of those of several methods


class PerView(nn.Module):
    """What makes a norm take the views of a batch, one behind the other, each by itself."""

    def forward(self, x: Tensor) -> Tensor:
        """[V * B, ...] -> the same shape."""
        forward: Any = super().forward
        if _batch.views == 1:
            return forward(x)
        return torch.cat([forward(view) for view in x.chunk(_batch.views)])

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        return _unpickled, (type(self).__bases__[1],), *reduced[2:]     # its own class has no name to be found by


class LeanPerView(PerView):
    """`PerView` of torch's own BatchNorm, which nearly all norms are, in few operations."""

    def forward(self, x: Tensor) -> Tensor:
        norm, views = cast(nn.BatchNorm2d, self), _batch.views
        lean = norm.training and norm.track_running_stats and norm.momentum is not None
        if views == 1 or not lean or torch.compiler.is_compiling():
            return super().forward(x)
        _batch.counters.append(cast(Tensor, norm.num_batches_tracked))
        return _BatchNorm.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, views, norm.momentum, norm.eps)


class _BatchNorm(torch.autograd.Function):
    """BatchNorm of each view, written into one tensor: no copy of the activations, and fewer operations."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor,
        views: int, momentum: float, eps: float,
    ) -> Tensor:
        out = torch.empty_like(x)
        statistics: list[Tensor] = []
        for rows, to in zip(x.chunk(views), out.chunk(views), strict=True):
            own = torch.empty_like(mean), torch.empty_like(var)
            torch.native_batch_norm(rows, weight, bias, mean, var, True, momentum, eps, out=(to, *own))
            statistics += own
        ctx.save_for_backward(x, weight, mean, var, *statistics)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, *statistics = ctx.saved_tensors
        views = len(statistics) // 2
        wanted = [ctx.needs_input_grad[0], weight is not None, weight is not None]
        parts = [
            torch.ops.aten.native_batch_norm_backward(
                to, rows, weight, mean, var, statistics[2 * i], statistics[2 * i + 1], True, ctx.eps, wanted
            )
            for i, (to, rows) in enumerate(zip(grad.chunk(views), x.chunk(views), strict=True))
        ]
        of_x = torch.cat([part[0] for part in parts]) if wanted[0] else None
        if weight is None:
            return of_x, *[None] * 7
        sums = parts[0][1:]
        for part in parts[1:]:
            sums = torch._foreach_add(sums, part[1:])
        return of_x, *sums, *[None] * 5


@cache
def _per_view(kind: Any) -> type[nn.Module]:
    mixin = LeanPerView if kind in (nn.BatchNorm1d, nn.BatchNorm2d) else PerView
    return type(f"PerView{kind.__name__}", (mixin, kind), {})


def _unpickled(kind: Any) -> nn.Module:
    per_view = _per_view(kind)
    return per_view.__new__(per_view)


def _counts(module: nn.Module) -> bool:
    """Whether a module is a norm by statistics of its batch."""
    return isinstance(module, _NormBase) or getattr(module, "running_var", None) is not None


def _layout(network: nn.Module) -> torch.memory_format:
    kernels = [p for p in network.parameters() if p.ndim == 4]
    last = any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)
    return torch.channels_last if last else torch.contiguous_format
