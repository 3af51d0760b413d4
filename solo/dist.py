"""The few collectives the library needs. In one process each is the identity."""

import time
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from solo.errors import SoloError

LIGHT = 2**20       # bytes of all ranks together up to which gathering a sum with others costs less than a reduction of its own


def world_size() -> int:
    """Number of processes in the default group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number in the default group, 0 without one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Concatenate rows of all ranks; the gradient of the local rows is the sum over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        return gather_packed(x)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """Rows of every rank in rank order, with gradient.

    After DDP has averaged the gradients, the result is the gradient of the mean of the ranks' losses.

    Args:
        x: [B, ...], the same shape on every rank.

    Returns:
        [world_size * B, ...].
    """
    return x if world_size() == 1 else _Gather.apply(x)


class _Joint(torch.autograd.Function):
    """Concatenation or sum over ranks from which every rank computes the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, concatenated: bool) -> Tensor:
        ctx.rows = len(x) if concatenated else None
        if concatenated:
            return gather(x)
        return all_reduce(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        local = grad if ctx.rows is None else grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]
        return local * world_size(), None


def gather_joint(x: Tensor) -> Tensor:
    """`gather` for a loss that every rank computes alike from all rows: the backward pass communicates nothing.

    All ranks have the same gradient of the result, so the sum over ranks is ``world_size`` times one's own.
    """
    return x if world_size() == 1 else _Joint.apply(x, True)


def sum_joint(x: Tensor) -> Tensor:
    """Sum over ranks, out of place, for a loss that every rank computes alike from it; see `gather_joint`."""
    return x if world_size() == 1 else _Joint.apply(x, False)


@torch.no_grad()
def gather_packed(*tensors: Tensor) -> list[Tensor]:
    """Rows of every rank in rank order of several tensors, by one collective; no gradient.

    Args:
        tensors: [B, ...] each, of any types, the same shapes on every rank.

    Returns:
        [world_size * B, ...] each.
    """
    if world_size() == 1:
        return list(tensors)
    waiting = _boarding(tensors[0])
    everything = [*tensors, *(tensor for later in waiting for tensor in later.own)]
    if len(everything) == 1:
        return [_all_gathered(tensors[0])]
    flat = [tensor.clone(memory_format=torch.contiguous_format).view(1, -1).view(torch.uint8) for tensor in everything]
    parts = _all_gathered(torch.cat(flat, dim=1)).split([each.shape[1] for each in flat], dim=1)    # [world, bytes] each
    found = [part.contiguous().view(x.dtype).view(-1, *x.shape[1:]) for part, x in zip(parts, everything, strict=True)]
    rest = iter(found[len(tensors) :])
    for later in waiting:
        later.found = [next(rest) for _ in later.own]
    return found[: len(tensors)]


def _all_gathered(x: Tensor) -> Tensor:
    out = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(out, x.contiguous())
    return out


class Later:
    """Rows that are not in a hurry: they travel with the next gathering on their device, at the latest when asked for.

    Every rank must make it, gather and ask in the same order, as for any collective.

    Args:
        tensors: [B, ...] each, as for `gather_packed`; constants.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.own = tensors
        self.found: list[Tensor] | None = None
        if world_size() > 1:
            _waiting.append(weakref.ref(self))

    def __call__(self) -> list[Tensor]:
        """[world_size * B, ...] of each tensor."""
        if self.found is None:
            self.found = []                     # no longer among those that wait
            self.found = gather_packed(*self.own)
        return self.found


_waiting: list[weakref.ref[Later]] = []


def send_nothing_old() -> None:
    """What waits travels with nothing any more, but is still there to be asked for.

    A run that ended in the middle of a step may have left rows, which not every rank still holds.
    """
    _waiting.clear()


def _boarding(x: Tensor) -> list[Later]:
    """Those that wait and travel with x; what nobody holds any more is forgotten."""
    waiting = [later for ref in _waiting if (later := ref()) is not None and later.found is None]
    going = [later for later in waiting if later.own[0].device == x.device and len(x)]
    _waiting[:] = [weakref.ref(later) for later in waiting if later not in going]
    return going


def sum_later(x: Tensor) -> Callable[[], Tensor]:
    """The sum over ranks of x, to be asked for once: until then it may travel as a `Later`, unless that is too heavy."""
    if world_size() == 1 or world_size() * x.nbytes > LIGHT:
        return lambda: all_reduce(x)
    later = Later(x[None])
    return lambda: later()[0].sum(0)


@torch.no_grad()
def gather_uneven(x: Tensor) -> Tensor:
    """Rows of every rank in rank order when ranks hold different numbers of rows; no gradient.

    Args:
        x: [B_r, ...], where B_r may differ between ranks.

    Returns:
        [sum of B_r, ...].
    """
    if world_size() == 1:
        return x
    sizes = x.new_zeros(world_size(), dtype=torch.long)
    sizes[rank()] = len(x)
    dist.all_reduce(sizes)
    counts = sizes.tolist()
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: len(x)] = x
    rows = gather(padded).chunk(world_size())
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])


def all_reduce(x: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def all_reduce_awake(x: Tensor, meanwhile: Callable[[], object]) -> Tensor:
    """`all_reduce` in which this process handles its signals while it waits for the others, and calls ``meanwhile``."""
    if world_size() > 1:
        work = dist.all_reduce(x, async_op=True)
        try:
            while not work.is_completed():
                meanwhile()
                time.sleep(0.01)
            work.wait()
        finally:
            del work        # what a signal's handler raises would keep it, and with it the group's connections
    return x


def gather_text(text: str, device: torch.device | str = "cpu") -> str:
    """What every rank says, one after the other in rank order; ``gather_text(text if rank() == 0 else "")`` is rank 0's.

    Args:
        text: may be empty.
        device: where the group's collectives work: the GPU under NCCL.
    """
    said = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    return bytes(gather_uneven(said).tolist()).decode()


def end_together(error: SoloError) -> NoReturn:
    """End every rank, where each knows that all end: rank 0 speaks, the others go as if well.

    Lightning kills rank 0 when it sees another one fail.

    Raises:
        SoloError: on rank 0.
        SystemExit: on the others, with the error as its cause.
    """
    if rank() != 0:
        raise SystemExit(0) from error
    raise error


def part() -> None:
    """Leave the group for good: from here on each process is one by itself."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
