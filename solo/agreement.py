"""What the ranks of a run tell each other once an optimizer step, before its update, by one all-reduce."""

from collections.abc import Callable

import torch
from torch import Tensor

from solo.dist import all_reduce, all_reduce_awake, rank, world_size


def of_each_rank(row: Tensor, meanwhile: Callable[[], object] | None = None) -> list[list[float]]:
    """Numbers of every rank, by one collective and one wait for the device.

    Args:
        row: [K], this rank's.
        meanwhile: see `all_reduce_awake`; without it a signal is handled when all ranks are there.

    Returns:
        K lists of one number for each rank.
    """
    table = row.new_zeros(len(row), world_size())
    table[:, rank()] = row
    return (all_reduce(table) if meanwhile is None else all_reduce_awake(table, meanwhile)).tolist()


class Agreement:
    """What each rank has to say at a step is asked, and all of it sent together, where the first of them needs an answer.

    Attributes:
        found: by name, the numbers of all ranks at the last optimizer step.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        self._facts: dict[str, Callable[[], int]] = {}

    def add(self, name: str, fact: Callable[[], int]) -> None:
        """Ask ``fact`` at every step from here on; every rank must add the same names in the same order."""
        self._facts[name] = fact

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
        self.found = dict(zip([*measured, *self._facts], of_each_rank(row), strict=True))
        return self.found
