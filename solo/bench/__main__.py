"""``python -m solo.bench data [...]``: each subject is a module of this package with ``main(argv)``."""

import sys
from importlib import import_module

from solo.console import quiet_libraries
from solo.errors import ConfigError, reported

SUBJECTS = ("data", "step", "train", "loss", "kernel", "gpu", "chaos")


def main(argv: list[str]) -> None:
    subject = argv[0] if argv else ""
    if subject not in SUBJECTS:
        raise ConfigError(f"python -m solo.bench takes one of {', '.join(SUBJECTS)} first, got {subject!r}")
    module = import_module(f"solo.bench.{subject}")
    quiet_libraries()       # after the import: Lightning sets its own level when it is imported
    module.main(argv[1:])


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
