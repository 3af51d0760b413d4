"""What a command tells its user: plain lines on standard output, from rank 0 only."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence

log = logging.getLogger("solo")


def main_process() -> bool:
    """Whether this is rank 0, as the environment says before the processes have met."""
    return not int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", os.environ.get("SLURM_PROCID", "0"))))


def say(text: str) -> None:
    """Tell the user something, once for all ranks."""
    if main_process():
        log.info(text)


def warn(text: str) -> None:
    """Tell the user something that is probably not meant, once for all ranks."""
    if main_process():
        log.warning(text)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[int] = (0,)) -> str:
    """A text in columns, below a title where there is one; those not in ``left`` stand to the right."""
    lines = [list(columns), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = ["<" if place in left else ">" for place in range(len(columns))]
    text = ["  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, sides, widths, strict=True)) for line in lines]
    text.insert(1, "-" * len(text[0]))
    return "\n".join([title] * bool(title) + [line.rstrip() for line in text])


def quiet_libraries() -> None:
    """For commands: show this library's own lines and silence the chatter of those below it."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    log.setLevel(logging.INFO)
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    warnings.filterwarnings("ignore", module="torch.distributed")
