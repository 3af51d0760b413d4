"""What computes in the fast engine: numba on the processor where it is installed, else torch; on a GPU always torch."""

from typing import Protocol

import numpy as np
from torch import Tensor

from solo.console import say
from solo.data.engines import Job
from solo.data.views import Params
from solo.errors import EnvironmentFault


class Kernel(Protocol):
    """Makes views; safe to call from several threads."""

    def __init__(self, job: Job, images: np.ndarray) -> None: ...

    def fill(self, out: Tensor, number: int, epoch: int, samples: np.ndarray, shown: np.ndarray) -> None:
        """Write view ``number`` into ``out`` [n, C, S, S]: images ``shown`` [n] with the numbers of ``samples`` [n]."""
        ...

    @staticmethod
    def finish(job: Job, number: int, params: Params, crops: Tensor) -> Tensor:
        """View ``number`` from its crops [n, C, S, S] uint8: all that comes after crop and flip, normalised, float32."""
        ...


def kernel(wanted: str) -> type[Kernel]:
    """The kernel ``numba``, ``torch``, or with ``auto`` the first of them that can be had.

    Raises:
        EnvironmentFault: ``numba`` is asked for and cannot be imported.
    """
    if wanted != "torch":
        try:
            from solo.data.engines.kernel_numba import NumbaKernel

            return NumbaKernel
        except ImportError as error:
            if wanted == "numba":
                raise EnvironmentFault(f"data.kernel=numba: {error}: pip install 'solo-ssl[fast]'") from error
            say("note: without numba augmentation takes several times longer: pip install 'solo-ssl[fast]'")
    from solo.data.engines.kernel_torch import TorchKernel

    return TorchKernel
