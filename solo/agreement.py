"""What the ranks of a run tell each other once an optimizer step, before its update, by one all-reduce."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from solo.dist import all_reduce, all_reduce_awake, rank, world_size


def of_each_rank(
    row: Tensor, meanwhile: Callable[[], object] | None = None, sums: Sequence["Sum"] = ()
) -> list[list[float]]:
    """Numbers of every rank, by one collective and one wait for the device.

    Args:
        row: [K], this rank's.
        meanwhile: see `all_reduce_awake`; without it a signal is handled when all ranks are there.
        sums: what travels along, of the same type.

    Returns:
        K lists of one number for each rank.
    """
    table = row.new_zeros(len(row), world_size())
    table[:, rank()] = row
    packed = torch.cat([table.flatten(), *(each.x for each in sums)]) if sums else table
    found = all_reduce(packed) if meanwhile is None else all_reduce_awake(packed, meanwhile)
    parts = found.flatten().split([table.numel(), *(len(each.x) for each in sums)])
    for each, part in zip(sums, parts[1:], strict=True):
        each.x, each.done = part, True
    return parts[0].view_as(table).tolist()


class Sum:
    """The sum of x [N] over ranks, asked for later: until then it may travel with another message."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.done = x, False

    def __call__(self) -> Tensor:
        if not self.done:
            self.x, self.done = all_reduce(self.x), True
        return self.x


class Agreement:
    """What each rank has to say at a step is asked, and all of it sent together, where the first of them needs an answer.

    Attributes:
        found: by name, the numbers of all ranks at the last optimizer step.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        self._facts: dict[str, Callable[[], int]] = {}
        self._sums: list[Sum] = []

    def add(self, name: str, fact: Callable[[], int]) -> None:
        """Ask ``fact`` at every step from here on; every rank must add the same names in the same order."""
        self._facts[name] = fact

    def add_up(self, x: Tensor) -> Sum:
        """The sum over ranks of x [N] float32, by the message of the next step unless asked for before."""
        later = Sum(x)
        if world_size() > 1:
            self._sums = [*(each for each in self._sums if not each.done), later]      # those asked for are let go
        return later

    def reach(self, **measured: Tensor) -> dict[str, list[float]]:
        """Let all ranks know.

        Args:
            measured: [] each, on the device.
        """
        said = [fact() for fact in self._facts.values()]
        row = torch.stack([*measured.values()]).float()
        row = torch.cat([row, row.new_zeros(len(said))])
        for place, number in enumerate(said, start=len(measured)):
            if number:                          # filled on the device: a copy from the host would wait for it
                row[place] = number
        sums, self._sums = [each for each in self._sums if not each.done], []
        self.found = dict(zip([*measured, *self._facts], of_each_rank(row, sums=sums), strict=True))
        return self.found
