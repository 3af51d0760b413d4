"""Bytes of tensors alive at once, counted and not measured: noise cannot touch them."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Follows every storage that an operation returns while the mode is on.

    Scratch memory inside a single operation, e.g. of a matrix product, is not seen.

    Attributes:
        now, peak: bytes alive, and the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._follow(x.untyped_storage(), given)
        return out

    def _follow(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if not size or address in given or address in self._known:
            return
        self._known.add(address)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes of tensors that ``work`` has alive at once, besides those that were there before."""
    with LiveBytes() as live:
        work()
    return live.peak
