"""What the ranks of a run tell each other once an optimizer step, before its update, along with what a loss gathers."""

from collections.abc import Callable

import torch
from torch import Tensor

from solo.dist import Later, all_reduce, all_reduce_awake, rank, world_size


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
    """What each rank has to say at a step is asked, and all of it sent together.

    Attributes:
        found: by name, the numbers of all ranks at the last optimizer step.
    """

    def __init__(self) -> None:
        self.found: dict[str, list[float]] = {}
        self._facts: dict[str, Callable[[], int]] = {}
        self._sent: tuple[list[str], Later] | None = None

    def add(self, name: str, fact: Callable[[], int]) -> None:
        """Ask ``fact`` at every step from here on; every rank must add the same names in the same order."""
        self._facts[name] = fact

    def send(self, **measured: Tensor) -> None:
        """Ask now, and let it travel with the next gathering; what was sent before and not read is void.

        Args:
            measured: [] each, on the device.
        """
        said = [fact() for fact in self._facts.values()]
        row = torch.stack([*measured.values()]).float()
        row = torch.cat([row, row.new_zeros(len(said))])
        for place, number in enumerate(said, start=len(measured)):
            if number:                          # filled on the device: a copy from the host would wait for it
                row[place] = number
        self._sent = [*measured, *self._facts], Later(row[None])

    def reach(self, **measured: Tensor) -> dict[str, list[float]]:
        """Let all ranks know, by a message only where what was sent has not travelled yet, and by one wait.

        Args:
            measured: [] each, on the device; what was not sent before is the same on every rank.
        """
        if self._sent is None:
            self.send(**measured)
        assert self._sent is not None
        (names, letter), self._sent = self._sent, None
        (table,) = letter()                                                                         # [world, K]
        alike = {name: x.to(table.dtype).expand(len(table)) for name, x in measured.items() if name not in names}
        columns = torch.stack([*table.T, *alike.values()])
        self.found = dict(zip([*names, *alike], columns.tolist(), strict=True))
        return self.found
