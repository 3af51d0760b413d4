"""Worker processes that hang, die, or lack memory or files: one line that says which, and no waiting."""

import errno
import gc
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from solo import errors
from solo.data import loaders
from solo.data.engines import workers
from solo.data.random import order
from solo.data.sources import FakeSource
from solo.errors import EnvironmentFault, Interrupted, reported
from tests import forks
from tests.data.common import module


class Slow(FakeSource):
    def load(self, i: int) -> np.ndarray:
        time.sleep(1.5)
        return super().load(i)


class Deaf(FakeSource):
    def load(self, i: int) -> np.ndarray:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        return super().load(i)


class Crowded(FakeSource):
    """Shared memory takes no more from its worker: a file size limit counts there as well."""

    def load(self, i: int) -> np.ndarray:
        assert get_worker_info()
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return super().load(i)


class Deadly(FakeSource):
    def load(self, i: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        return super().load(i)


@pytest.mark.slow
def test_what_a_stuck_worker_was_at_is_named() -> None:
    data = module(1, dataset="fake", engine="torchvision", num_workers=1, timeout=0.5)
    data._train = Slow(64, 32, 10, 3, seed=0)
    first = int(order(1, 0, 64)[0])
    with pytest.raises(EnvironmentFault, match=f"rank 0: no batch .* waiting for the batch that begins with {first}$"):
        next(iter(data.train_dataloader()))
    data.teardown("fit")


def stuck() -> None:
    """A command whose worker waits long and heeds no SIGTERM, as in a read that the system does not return from."""
    data = module(1, dataset="fake", engine="torchvision", num_workers=1, timeout=0.5)
    data._train = Deaf(64, 32, 10, 3, seed=0)
    with reported():
        next(iter(data.train_dataloader()))


def test_a_command_does_not_wait_for_a_worker_that_heeds_nothing() -> None:
    """Neither here nor at the exit, where Python joins every child."""
    ended = forks.run([sys.executable, "-c", "from tests.data.test_workers import stuck; stuck()"], timeout=30)
    assert ended.returncode == 5, ended
    assert ended.stderr.splitlines()[-1].startswith("environment error: rank 0: no batch from a data worker within")


@pytest.mark.parametrize("clean", [False, True], ids=["of training", "of clean images"])
def test_a_programs_workers_end_with_its_loader(clean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that heeds nothing too, which Python would wait for at the exit of a program that goes on and ends."""
    monkeypatch.setattr(workers, "_LEAVING", 0.1)
    monkeypatch.setattr(loaders, "_CLEAN_WORKERS_FROM", 0)
    data = module(1, dataset="fake", engine="torchvision", num_workers=1, timeout=0.5)
    data._train = Deaf(64, 32, 10, 3, seed=0)
    with pytest.raises(EnvironmentFault, match="no batch") as kept:         # with all that its traceback holds
        next(iter(data.clean_loader(train=True) if clean else data.train_dataloader()))
    data.teardown("fit")
    assert not multiprocessing.active_children(), kept


@pytest.mark.slow
def test_a_program_that_keeps_an_iterator_to_its_end_ends() -> None:
    """It closes when the interpreter is half gone and can start no thread."""
    lines = (
        "from solo.data import loaders; loaders._CLEAN_WORKERS_FROM = 0",
        "from solo.data.config import DataConfig",
        "from solo.data.module import DataModule",
        "data = DataModule(DataConfig(dataset='fake', num_workers=1, train_size=64, engine='torchvision'), [], 8, 0)",
        "kept = iter(data.clean_loader(train=True)); next(kept); print('bye')",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr


def test_a_worker_that_no_kill_ends_is_left_behind(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """As in a read of a file system that hangs; a stand-in, as no process here is one: it is not killed."""
    monkeypatch.setattr(errors, "_DYING", 0.05)
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    worker.start()
    monkeypatch.setattr(worker, "kill", lambda: None)
    try:
        with pytest.raises(SystemExit) as ended, reported():
            raise EnvironmentFault("no batch")
        assert ended.value.code == 5 and worker.is_alive()
        assert caplog.messages == [f"process {worker.pid} does not end, as the system waits in it: it is left behind"]
        assert worker not in multiprocessing.active_children()              # which Python would join at its exit
    finally:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "said"), [(Slow, "data.timeout=0.5"), (Deadly, "data.num_workers")])
def test_a_hung_or_killed_worker_stops_the_run(source: type[FakeSource], said: str) -> None:
    data = module(1, dataset="fake", engine="torchvision", num_workers=1, timeout=0.5)
    data._train = source(64, 32, 10, 3, seed=0)
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match=said):
        next(iter(data.train_dataloader()))
    data.teardown("fit")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(("free", "said"), [(10_000, "lower data.num_workers"), (60_000, "makes only one ahead")])
def test_too_little_shared_memory_is_said_before_it_is_needed(
    free: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One worker's batch of 16 views of 16 px: 48 KiB as floats; two ahead would be 96."""
    monkeypatch.setattr(workers, "free_shared_memory", lambda: free)
    data = module(16, dataset="fake", engine="torchvision", num_workers=1)
    if free < 16 * 3 * 16 * 16 * 4:
        with pytest.raises(EnvironmentFault, match=said):
            next(iter(data.train_dataloader()))
    else:
        assert len(next(iter(data.train_dataloader())).index) == 16 and said in caplog.text
    data.teardown("fit")


def test_shared_memory_that_runs_out_later_is_said_with_sizes() -> None:
    data = module(64, dataset="fake", engine="torchvision", num_workers=1, timeout=5)
    data._train = Crowded(64, 96, 10, 3, seed=0)
    with pytest.raises(EnvironmentFault, match=r"^a data worker's batch of .* MiB found no room.* MiB free: lower data.num_w"):
        next(iter(data.train_dataloader()))
    data.teardown("fit")


@pytest.mark.parametrize("where", ["here", "in a worker"])
def test_too_many_open_files_is_said_in_one_line(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here torch asks why an answer did not come, and says it in its own words."""

    def refused(*arguments: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    data = module(8, dataset="fake", engine="torchvision", num_workers=1, timeout=5)
    if where == "here":
        monkeypatch.setattr(resource_sharer.DupFd, "detach", refused)
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", refused)
    else:
        monkeypatch.setattr(torch.Tensor, "share_memory_", no_descriptor)
    with pytest.raises(EnvironmentFault, match="^rank 0: too many open files: raise the limit, ulimit -n, or lower data.num_w"):
        next(iter(data.train_dataloader()))
    data.teardown("fit")


@pytest.mark.slow
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EAGAIN], ids=["semaphores", "a process"])
@pytest.mark.parametrize("kind", ["training", "clean"])
def test_a_worker_that_cannot_be_started_is_said_in_one_line(
    number: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(8, dataset="fake", engine="torchvision", num_workers=2, timeout=5)
    where = "multiprocessing.synchronize.SemLock.__init__" if number == errno.ENOSPC else "multiprocessing.Process.start"
    monkeypatch.setattr(loaders, "_CLEAN_WORKERS_FROM", 0)
    loader = data.train_dataloader() if kind == "training" else data.clean_loader(train=True)
    monkeypatch.setattr(where, refusing(number))
    with pytest.raises(EnvironmentFault, match=r"^rank 0: a data worker cannot be started \(.* MiB free\)\): lower data.num_w"):
        next(iter(loader))
    monkeypatch.undo()
    data.teardown("fit")
    del loader, data
    gc.collect()                                    # what torch has left half made says nothing when it goes


def refusing(number: int) -> Callable[..., None]:
    def refused(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.slow
@pytest.mark.parametrize(("source", "said"), [(Slow, "no batch .* within data.timeout=0.5 s$"), (Deadly, "worker ended")])
def test_clean_images_are_waited_for_no_longer(source: type[FakeSource], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = module(1, dataset="fake", engine="torchvision", num_workers=1, timeout=0.5)
    monkeypatch.setattr(loaders, "_CLEAN_WORKERS_FROM", 0)
    data._train = source(64, 32, 10, 3, seed=0)
    with pytest.raises(EnvironmentFault, match=said):
        next(iter(data.clean_loader(train=True)))


def no_descriptor(tensor: torch.Tensor) -> None:
    raise RuntimeError("unable to open shared memory object </torch_1> in read-write mode: Too many open files (24)")


@pytest.mark.slow
def test_open_files_do_not_grow_over_epochs() -> None:
    data = module(8, dataset="fake", engine="torchvision", num_workers=1)
    loader, counts = data.train_dataloader(), []
    for _ in range(4):
        list(loader)
        counts.append(len(os.listdir("/proc/self/fd")))
    data.teardown("fit")
    assert max(counts[1:]) <= counts[0] + 4


def test_a_signal_while_a_batch_is_awaited_stays_one() -> None:
    with pytest.raises(Interrupted, match="at once") as caught, workers.explained(1.0, lambda: None):
        raise Interrupted("at once", signal.SIGINT)
    assert caught.value.exit_code == 130
