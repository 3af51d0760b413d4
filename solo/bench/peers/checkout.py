"""A peer's own code, from a checkout, timed in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import distributions
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from solo.bench.peers import named, worker
from solo.errors import ConfigError, EnvironmentFault

_NAMES = {"solo": "solo-learn", "lightly": "lightly"}


def package(path: Path, subject: str) -> str:
    """Which peer's package lies in the folder.

    Raises:
        ConfigError: none does.
    """
    for name, file in (("lightly", "loss/ntx_ent_loss.py"), ("solo", "losses/nnclr.py")):
        if (path / name / file).is_file() and not (path / name / "bench").exists():
            return name
    takes = ", ".join([*named(subject), "a folder with solo-learn's package `solo` or lightly's `lightly` in it"])
    raise ConfigError(f"--peer takes {takes}; {path} is none of these")


def release(peer: str | None) -> str:
    """Name and version of the package in a folder, by its metadata or its git; empty where neither knows."""
    if peer is None or not Path(peer).is_dir():
        return ""
    for found in distributions(path=[peer]):
        if found.name in _NAMES.values():
            return f"{found.name} {found.version}"
    command = ["git", "-C", peer, "rev-parse", "--show-toplevel", "--short", "HEAD"]
    asked = subprocess.run(command, capture_output=True, text=True)
    folder, _, revision = asked.stdout.strip().partition("\n")
    return f"{_NAMES[package(Path(peer), '')]} {revision}" if revision and Path(folder) == Path(peer).resolve() else ""


class Checkout:
    """The peer's process; a context manager.

    Args:
        path: a folder that holds the peer's package.
        subject: of `solo.bench`.

    Attributes:
        name: of the peer, as rows have it.
    """

    def __init__(self, path: Path, subject: str) -> None:
        self._package = package(path, subject)
        self.name = f"{_NAMES[self._package]}'s own code"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, worker.__file__, str(path.resolve()), self._package]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):         # it has died before it read all
            self._process.stdin.close()
        self._process.wait()

    def knows(self, formula: str) -> bool:
        """Whether this peer has it."""
        return formula in worker.FORMULAS[self._package]

    def prepare(
        self, formula: str, inputs: Sequence[Tensor], constants: Sequence[Tensor], numbers: Sequence[float]
    ) -> list[Tensor] | str:
        """The peer's values and its gradients to the inputs, or in a line why it has none; `rate` then times this formula."""
        arrays = {f"x{i}": x.detach().numpy() for i, x in enumerate(inputs)}
        arrays |= {f"c{i}": x.numpy() for i, x in enumerate(constants)}
        counts = {"inputs": len(inputs), "constants": len(constants), "numbers": list(numbers)}
        answer = self._asked(formula=formula, **counts, **arrays)
        if "error" in answer:
            return str(answer["error"])
        return [torch.from_numpy(answer[f"v{i}"]) for i in range(len(answer))]

    def rate(self, runs: int = 1) -> float:
        """Of what was prepared, per second of the peer's CPU time."""
        return runs / float(self._asked(runs=runs)["seconds"])

    def _asked(self, **message: object) -> dict:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            worker.send(self._process.stdin, **message)     # type: ignore[arg-type]
            answer = worker.receive(self._process.stdout)   # type: ignore[arg-type]
        except OSError:
            answer = {}
        if not answer:
            raise EnvironmentFault(f"{self.name}: its process ended with {self._process.wait()}")
        return answer
