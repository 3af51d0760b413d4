"""What a step does that noise cannot touch: operations, waits for the device, messages between processes."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from solo.kernels import nearest

# What only names, reserves or looks at memory: no kernel runs for it.
_NO_KERNEL = {
    *("alias", "as_strided", "as_strided_", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh"),
    *("narrow", "new_empty", "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t"),
    *("transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view", "_local_scalar_dense", "is_pinned"),
}


@contextmanager
def search_of_a_gpu() -> Iterator[None]:
    """Counts are of what a GPU is given: the search by groups, which looks at numbers on its way, is for the CPU alone."""
    own = nearest._searched
    nearest._searched = lambda x, queue, k, shadow: nearest._plain(x, queue, k)
    try:
        yield
    finally:
        nearest._searched = own


class Operations(TorchDispatchMode):
    """Counts dispatched operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def kernels(self) -> int:
        """Operations for which a GPU would be started."""
        return sum(count for name, count in self.names.items() if _is_kernel(name))


def _is_kernel(name: str) -> bool:
    space, _, short = name.partition("::")
    return space not in ("profiler", "c10d") and short not in _NO_KERNEL


# What makes the host wait for a tensor's values.
_WAITS = {
    *(Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.nonzero, Tensor.__bool__, Tensor.__int__, Tensor.__float__),
    *(Tensor.__index__, Tensor.__contains__, Tensor.equal, torch.nonzero, torch.equal, torch.unique, torch.masked_select),
}


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for the device, were the tensors there."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masked = func is Tensor.__getitem__ and _has_mask(args[1])
        if func in _WAITS or masked:
            self.names["mask" if masked else func.__name__] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


class Collectives:
    """Counts collectives that Python starts; DDP's own all-reduce of the gradients is not among them.

    Attributes:
        names: calls by name.
        received: bytes of the tensors that they fill, which is the first argument of those that give one.
    """

    _KINDS = (
        *("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "barrier", "broadcast", "reduce"),
        *("broadcast_object_list", "gather", "scatter", "reduce_scatter_tensor", "all_to_all_single", "monitored_barrier"),
    )

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self.received = 0

    def __enter__(self) -> "Collectives":
        self._own = {kind: getattr(dist, kind) for kind in self._KINDS}
        for kind, own in self._own.items():
            setattr(dist, kind, self._counted(kind, own))
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name, own in self._own.items():
            setattr(dist, name, own)

    def _counted(self, kind: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.names[kind] += 1
            self.received += args[0].nbytes if args and isinstance(args[0], Tensor) else 0
            return own(*args, **kwargs)

        return counted


class Counting(Protocol):
    """What counts by name."""

    names: Counter[str]


class Steps(pl.Callback):
    """What has been counted when each batch of a run begins."""

    def __init__(self, *counters: Counting) -> None:
        self.counters = counters
        self.seen: list[list[Counter[str]]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.seen.append([Counter(counter.names) for counter in self.counters])

    def between(self, first: int, last: int) -> list[Counter[str]]:
        """Counted from the beginning of one step to that of another."""
        return [b - a for a, b in zip(self.seen[first], self.seen[last], strict=True)]
