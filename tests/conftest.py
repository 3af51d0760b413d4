"""Golden values and real images are reached by ``SOLO_SHARED`` (default: ``../shared`` beside the repository)."""

import gc
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.faults import named

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SOLO_SHARED", ROOT.parent / "shared"))


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:    # a shell's background job: its commands would rightly ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:    # the same of nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # the models here are tiny: more threads only wait for each other


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: no garbage is sought while it is read, nor later in it, by a test or its forks."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Whatever a test or a library it used has set: with more threads sums have other bits."""
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)


# Files with the longest tests: they begin first, so that two workers end together. In the first of those that run alone the
# process has a memory that no other test has used and given back.
LONGEST = (
    "test_step_counts", "test_chaos", "test_readme", "test_leaks", "test_compiling", "test_resume", "test_two_processes",
    "test_cli",
)


@pytest.hookimpl(tryfirst=True)     # before what is asked for by -m is chosen
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those of faults get their mark; long ones come before the many short ones, with which the last seconds are shared."""
    of_faults = named()
    for item in items:
        if (item.path, getattr(item, "originalname", item.name)) in of_faults:
            item.add_marker("faults")

    def place(item: pytest.Item) -> tuple[bool, int]:
        name = item.path.stem
        return item.get_closest_marker("slow") is None, LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=place)


class Golden(dict[str, torch.Tensor]):
    """Arrays of one golden file as tensors, and its parameters."""

    params: dict[str, Any]


def shared(*parts: str) -> Path:
    """A file of the shared folder; the test skips where there is none, and fails in CI."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        if os.environ.get("CI"):
            pytest.fail(f"CI must have {'/'.join(parts)}: set SOLO_SHARED")
        pytest.skip(f"no {'/'.join(parts)} under SOLO_SHARED")
    return path


def load_golden(name: str) -> Golden:
    with np.load(shared("golden", f"{name}.npz")) as file:
        golden = Golden({key: torch.from_numpy(np.array(file[key])) for key in file.files if key != "params"})
        golden.params = json.loads(str(file["params"]))
    return golden


def near(address: Any) -> bool:
    """Whether a socket's address is on this machine."""
    host = address[0] if isinstance(address, tuple) else ""         # a path, of a Unix socket
    return host in ("", "localhost", "0.0.0.0", "::", "::1", socket.gethostname()) or str(host).startswith("127.")


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """A test that reaches out fails, also where the caller forgives every `Exception`; child processes are told to stay."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, _guarded(getattr(socket.socket, name)))
        patch.setattr(socket, "getaddrinfo", _guarded_look_up(socket.getaddrinfo))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("WANDB_MODE", "offline")
        yield


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(self: socket.socket, *arguments: Any) -> Any:
        address = next(argument for argument in reversed(arguments) if not isinstance(argument, (bytes, int)))
        return method(self, *arguments) if near(address) else _refuse(address)

    return guarded


def _guarded_look_up(look_up: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(host: Any, *arguments: Any, **options: Any) -> Any:
        return look_up(host, *arguments, **options) if near((host or "",)) else _refuse(host)

    return guarded


def _refuse(address: Any) -> None:
    pytest.fail(f"a test reached out to {address}")


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """A command makes this library's logger talk (`quiet_libraries`): it must not talk in the tests that follow."""
    log = logging.getLogger("solo")
    level = log.level
    yield
    log.setLevel(level)


@pytest.fixture
def golden() -> Callable[[str], Golden]:
    return load_golden


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    return lambda name: shared("data", name)
