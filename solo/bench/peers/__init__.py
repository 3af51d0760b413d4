"""Other programs, timed where they are installed (``--peer NAME``); none is a requirement.

Here are those that make a recipe's views. Their random numbers are their own, so their views are held to ours by what
batches of them look like. A folder with a peer's own losses and steps is for `solo.bench.peers.checkout`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import numpy as np
from torch import Tensor

from solo.data.engines import Job
from solo.errors import EnvironmentFault

PEERS = {
    "dali": "solo.bench.peers.dali",
    "ffcv": "solo.bench.peers.ffcv",
    "kornia": "solo.bench.peers.kornia",
    "opencv": "solo.bench.peers.opencv",
}
Batches = Callable[[np.ndarray], list[Tensor]]  # the views of these samples


class Peer(Protocol):
    """What each module of `PEERS` calls ``Peer``.

    Attributes:
        name: in the table, with what it does otherwise than the recipe says.
        images: of one measurement.
    """

    name: str
    images: int

    def __init__(self, job: Job) -> None: ...

    def batch(self, samples: np.ndarray) -> list[Tensor]:
        """The views of these images of the job, each [n, C, S, S], normalised."""
        ...


def peer(name: str) -> type[Peer]:
    """The peer of that name.

    Raises:
        EnvironmentFault: what it needs cannot be imported.
    """
    try:
        return import_module(PEERS[name]).Peer
    except ImportError as error:
        raise EnvironmentFault(f"--peer {name}: {error}") from error


def named(subject: str) -> list[str]:
    """The names that ``--peer`` takes for a subject of `solo.bench`, besides a folder."""
    return {"data": list(PEERS), "loss": ["torch-compile"]}.get(subject, [])
