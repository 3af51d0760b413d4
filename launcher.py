"""One front door: one device, several GPUs, several nodes, SLURM. ``python launcher.py --help``."""

import sys
from pathlib import Path

from solo.errors import reported
from solo.launch import main

if __name__ == "__main__":
    with reported():
        sys.exit(main(sys.argv[1:], Path(__file__).resolve().parent))
