"""The errors a user can cause or meet. Each ends a command with one line and its own exit code."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class SoloError(Exception):
    """Base of every error this library raises on purpose."""

    kind = "error"
    exit_code = 1


class ConfigError(SoloError):
    """The request itself is wrong: a key, a value, a name, a path. Several problems may share one error."""

    kind = "config error"
    exit_code = 2


class DataError(SoloError):
    """The images cannot be used."""

    kind = "data error"
    exit_code = 3


class NumericsError(SoloError):
    """A loss or a weight stopped being finite."""

    kind = "numerics error"
    exit_code = 4


class EnvironmentFault(SoloError):
    """The machine lacks something the run needs: a device, space, an optional package."""

    kind = "environment error"
    exit_code = 5


class Interrupted(SoloError):
    """A signal ended the run after its state was saved; ``128 + signal`` is the exit code."""

    kind = "interrupted"

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


@contextmanager
def reported() -> Iterator[None]:
    """Turn a `SoloError` into one stderr line per problem and its exit code; ``SOLO_DEBUG=1`` keeps the traceback."""
    try:
        yield
    except SoloError as error:
        if os.environ.get("SOLO_DEBUG"):
            raise
        for line in str(error).splitlines():
            print(f"{error.kind}: {line}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        print("interrupted: nothing was running yet that could be saved", file=sys.stderr)
        raise SystemExit(130) from None
