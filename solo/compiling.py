"""``torch.compile`` of a method's networks, in place, so that a checkpoint has the same keys with and without."""

import os
import shutil
from importlib.util import find_spec

import torch
from torch import nn

from solo.errors import EnvironmentFault


def compile_networks(method: nn.Module, device: torch.device) -> None:
    """Have backbone, heads and teachers compiled at their first batch; never the method, whose logging cannot be.

    Raises:
        EnvironmentFault: there is nothing to compile with.
    """
    if missing := _missing(device):
        raise EnvironmentFault(f"compile=true needs {missing}, which is not here: install it or use compile=false")
    for network in method.children():
        if any(True for _ in network.parameters()):
            network.compile()


def _missing(device: torch.device) -> str:
    if device.type == "cuda" and find_spec("triton") is None:
        return "the package triton"
    named = os.environ.get("CXX" if device.type == "cpu" else "CC")
    usual = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    found = any(map(shutil.which, [named] if named else usual))
    return "" if found else f"a C++ compiler ({named or ' or '.join(usual)})"
