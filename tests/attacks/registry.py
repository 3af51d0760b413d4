"""What every attack is made of: a register of makers, and payloads that create a file named ``RAN`` when unpickled."""

import os
import runpy
import subprocess
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

Maker = Callable[[Path, Path], object]
ATTACKS: dict[str, Maker] = {}          # "surface/name" -> make(file, ran)


def attack(name: str) -> Callable[[Maker], Maker]:
    def add(make: Maker) -> Maker:
        assert name not in ATTACKS
        ATTACKS[name] = make
        return make

    return add


def each(surface: str, **makers: Maker) -> None:
    for name, make in makers.items():
        attack(f"{surface}/{name.replace('_', '-')}")(make)


@cache
def zeros() -> bytes:
    """256 MiB of them, compressed."""
    return zlib.compress(bytes(1 << 28))


class Payload:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(ran: Path) -> dict[str, Payload]:
    script = ran.with_name("touch.py")
    script.write_text(f"open({str(ran)!r}, 'w')")
    return {
        "os-system": Payload(os.system, f"touch {ran}"),
        "popen": Payload(subprocess.Popen, ["touch", str(ran)]),
        "exec": Payload(exec, f"open({str(ran)!r}, 'w')"),
        "eval": Payload(eval, f"open({str(ran)!r}, 'w')"),
        "open": Payload(open, str(ran), "w"),
        "path": Payload(Path.touch, ran),
        "runpy": Payload(runpy.run_path, str(script)),
        "torch-load": Payload(torch.load, str(script)),
        "getattr": Payload(getattr, Path, "touch"),
    }
