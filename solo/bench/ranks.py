"""What a step costs between processes: collectives, bytes, and its time on two ranks beside one."""

import statistics
import tempfile
import time
from pathlib import Path

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from solo.batch import Batch
from solo.bench.counts import Collectives, Steps
from solo.bench.measure import Row
from solo.bench.recipe import Step
from solo.console import quiet_libraries
from solo.dist import world_size
from solo.methods import Method
from solo.run import pretrain
from solo.strategy import without_buffers
from solo.testing.case import Case
from solo.testing.ranks import run_ranks

_IMAGES = 2         # of a rank, where it is counted
_STEPS = 3          # of a measurement


def messages(method: str) -> list[Row]:
    """S6: what the method itself sends on 2 and on 4 ranks; the bytes for each image of the global batch are the same.

    They are over the goal of 2 D + 8 bytes for a row: rows travel in float32, as in bfloat16 ranks would compute other losses
    than one process does.
    """
    rows = []
    for world in (2, 4):
        calls, received = max(run_ranks(counted, method, world=world))
        rows.append(Row("S6", f"{method}: collectives of a step on {world} ranks", calls, "collectives"))
        what = f"{method}: gathered by a rank for an image of the global batch on {world} ranks"
        rows.append(Row("S6", what, received / (world * _IMAGES), "bytes"))
    return rows


def counted(rank: int, method: str) -> tuple[int, int]:
    """Collectives of a step and the bytes that this rank receives from them, DDP's own left out."""
    step = Step(method, _IMAGES, "separate", queue_size=16)
    step()
    with Collectives() as seen:
        step()
    return sum(seen.names.values()), seen.received


def of_a_run(method: str) -> Row:
    """S6: what a rank of two sends in a step of a whole run, its callbacks' too, between two reports."""
    with tempfile.TemporaryDirectory() as folder:
        sent = max(run_ranks(_counted_in_a_run, method, Path(folder)))
    return Row("S6", f"{method}: collectives of a run's step on 2 ranks", sent, "collectives")


def _counted_in_a_run(rank: int, method: str, folder: Path) -> int:
    quiet_libraries()
    config = Case(method).experiment(folder, devices=2, max_epochs=1, log_every_n_steps=4)
    with Collectives() as seen:
        steps = Steps(seen)
        pretrain(config, [steps])
    return sum(steps.between(1, 2)[0].values())


def pace(method: str, batch: int, pairs: int) -> Row:
    """Sx: wall time of a step of two ranks over that of one rank with the same batch, started in turn."""
    times = [(max(run_ranks(_seconds, method, batch)), run_ranks(_seconds, method, batch, world=1)[0]) for _ in range(pairs)]
    what = f"{method}: a step of 2 ranks over one rank, batch {batch} each (wall)"
    return Row("Sx", what, statistics.median(two / one for two, one in times), "times", pairs=pairs)


class _Loss(nn.Module):
    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, batch: Batch) -> Tensor:
        return self.method.losses(batch)["loss"]


def _seconds(rank: int, method: str, batch: int) -> float:
    step = Step(method, batch, "separate")
    if world_size() > 1:
        step.loss = DistributedDataParallel(_Loss(step.model), **without_buffers())
    step()
    began = time.perf_counter()
    for _ in range(_STEPS):
        step()
    return (time.perf_counter() - began) / _STEPS
