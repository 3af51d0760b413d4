"""``interpreted/`` runs the kernels themselves: on a GPU, or in a process of its own that `test_interpreter` starts."""

import os

import torch

RUNS = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore = [] if RUNS else ["interpreted"]
