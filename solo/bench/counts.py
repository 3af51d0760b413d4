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


# What makes the host wait for a tensor's values, as a method or as a function.
_WAITS = {
    getattr(home, name)
    for home in (torch, Tensor)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero", "argwhere", "equal", "allclose", "is_nonzero", "masked_select"),
        *("unique", "unique_consecutive", "bincount", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
        *("__contains__", "__format__", "__array__"),
    )
    if hasattr(home, name)
}
_PUTS = {Tensor.__setitem__, Tensor.index_put, Tensor.index_put_}


class Waits(TorchFunctionMode):
    """Counts what would make the host wait for the device, were the tensors there.

    Not seen: a copy to the CPU whose device is not given by its name, for here the device of every tensor is the CPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _WAITS or _depends(func, args, kwargs):
            self.names["mask" if func is Tensor.__getitem__ else func.__name__] += 1
        return func(*args, **kwargs)


def _depends(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether these arguments make a function wait that does not always."""
    if func is Tensor.__getitem__:
        return _has_mask(args[1])
    if func in _PUTS:       # a number is filled in where the mask is, for a tensor the places are looked up
        return _has_mask(args[1]) and isinstance(args[2], Tensor)
    if func in (torch.where, Tensor.where):
        return len(args) + len(kwargs) == 1
    if func in (torch.repeat_interleave, Tensor.repeat_interleave):
        repeats = kwargs.get("repeats", args[1] if len(args) > 1 else args[0])
        return isinstance(repeats, Tensor) and kwargs.get("output_size") is None
    if func is Tensor.to:
        target = kwargs.get("device", args[1] if len(args) > 1 else None)
        return isinstance(target, str) and target == "cpu" and not kwargs.get("non_blocking")
    return False


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
