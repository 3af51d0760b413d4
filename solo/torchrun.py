"""torchrun that ends as its processes do: with the first failed one's exit code, and no traceback of its own."""

import logging
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run() -> int:
    """torchrun on this process's command line.

    Returns:
        The first failed process's exit code, or 128 + n where signal n ended it or was sent to all.
    """
    logging.disable(logging.ERROR)
    try:
        main()
    except SignalException as ended:
        return 128 + int(ended.sigval)
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if failure.exitcode >= 0:
            return int(failure.exitcode)        # the process has said why
        print(f"environment error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - int(failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(run())
