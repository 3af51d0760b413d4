"""One job to a run's directory."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import pytorch_lightning as pl

from solo import files, lease
from solo.data.bad import BadImages
from solo.errors import DataError, EnvironmentFault
from solo.experiment import experiment
from solo.lease import owning
from solo.run import pretrain
from tests.tiny import values


def link(folder):
    return folder.with_name(f".{folder.name}.lease")


def own():
    return f"{files.HOST}-{os.getpid()}.{files.birth(os.getpid())}"


@pytest.fixture
def living():
    """The number of a process of this host that is alive."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


@pytest.mark.parametrize("told", [True, False], ids=["by Linux", "elsewhere"])
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_is_readable_by_whom_the_umask_lets(tmp_path, monkeypatch, umask, told):
    if not told:
        monkeypatch.setattr(files, "_UMASK", re.compile("(?!)"))
    before = os.umask(umask)
    try:
        files.write_file(tmp_path / "a", b"x")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_owned_while_it_lasts(tmp_path):
    folder = tmp_path / "runs" / "run"
    with owning(folder):
        assert os.readlink(link(folder)) == own()
        with owning(folder):            # the same process, one run inside another
            pass
    assert not list(folder.parent.iterdir())


def test_a_second_job_is_refused_in_one_line_and_the_first_undisturbed(tmp_path, living):
    content = values("nnclr", tmp_path, max_epochs=1)
    run_dir = experiment(content).run_dir(8)
    link(run_dir).symlink_to(f"{files.HOST}-{living}")
    for resume in ("auto", "never"):
        with pytest.raises(EnvironmentFault) as caught:
            pretrain(experiment({**content, "resume": resume}))
        assert str(caught.value) == f"{run_dir} belongs to process {living}, which is running: end it, or wait for it"
    assert os.readlink(link(run_dir)).endswith(f"-{living}") and not run_dir.exists()


def test_what_the_dead_owned_is_taken_over(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    content = values("nnclr", tmp_path, max_epochs=1)
    run_dir = experiment(content).run_dir(8)
    link(run_dir).symlink_to(f"{files.HOST}-{process.pid}")
    assert pretrain(experiment(content)).checkpoint.exists() and not link(run_dir).is_symlink()


def test_a_killed_owner_whose_parent_has_not_asked_for_it_is_dead(tmp_path):
    """It has its number, and began when it did, until then; what it was writing is swept as well."""
    if not (child := os.fork()):
        signal.pause()
        os._exit(0)
    folder = tmp_path / "run"
    written = tmp_path / f".x.{files.HOST}-{child}.y.tmp"
    try:
        link(folder).symlink_to(f"{files.HOST}-{child}.{files.birth(child)}")
        written.touch()
        with pytest.raises(EnvironmentFault, match="belongs to process"):
            owning(folder).__enter__()
        assert written.exists()
    finally:
        os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)         # dead, and still there
    try:
        assert files.birth(child)
        with owning(folder):
            assert os.readlink(link(folder)) == own() and not written.exists()
    finally:
        os.waitpid(child, 0)


def test_a_number_that_another_process_has_now_is_that_of_a_dead_one(tmp_path, living):
    folder = tmp_path / "run"
    world, begun = files.birth(living).split(".")
    link(folder).symlink_to(f"{files.HOST}-{living}.{world}.{begun}")
    with pytest.raises(EnvironmentFault, match="belongs to process"):
        owning(folder).__enter__()
    link(folder).unlink()
    link(folder).symlink_to(f"{files.HOST}-{living}.{world}.{int(begun) - 1}")
    with owning(folder):
        assert os.readlink(link(folder)) == own()


class Clock:
    """Stands in for `time` in `solo.lease`; sleeping takes none, and at a moment somebody touches a link."""

    def __init__(self, touched=None, at=1e9):
        self.passed, self.touched, self.at = 0.0, touched, at

    def time(self):
        return time.time() + self.passed

    def monotonic(self):
        return self.passed

    def sleep(self, seconds):
        self.passed += seconds
        if self.passed >= self.at:
            os.utime(self.touched, follow_symlinks=False)


def of_another_host(folder, owner, silent):
    link(folder).symlink_to(owner)
    os.utime(link(folder), (time.time() - silent,) * 2, follow_symlinks=False)


@pytest.mark.parametrize("owner", ["elsewhere-1", "another machine of this name"])
@pytest.mark.parametrize(("silent", "waits"), [(60, 60), (0, 120), (-3600, 120), (180, 0)])
def test_on_another_host_silence_is_waited_for(tmp_path, living, monkeypatch, caplog, owner, silent, waits):
    """A requeued job comes back sooner than the killed one counts as dead; whatever the other host's clock says."""
    caplog.set_level("INFO", "solo")
    folder, clock = tmp_path / "run", Clock()
    monkeypatch.setattr(lease, "time", clock)
    strange = f"{files.HOST}-{living}.0123abcd.{files.birth(living).split('.')[1]}"
    owner = owner if owner == "elsewhere-1" else strange
    of_another_host(folder, owner, silent)
    with owning(folder):
        assert os.readlink(link(folder)) == own()
    assert waits - 2 <= clock.passed <= waits + 1
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (waits > 0) and all(f"{folder} belongs to another job ({owner}, seen " in line for line in said)


def test_on_another_host_a_sign_of_life_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    of_another_host(folder, "elsewhere-1", 10)
    clock = Clock(link(folder), 9)
    monkeypatch.setattr(lease, "time", clock)
    with pytest.raises(EnvironmentFault) as refused:
        owning(folder).__enter__()
    assert str(refused.value) == f"{folder} belongs to another job (elsewhere-1), which is running: end it, or wait for it"
    assert clock.passed <= 10 and os.readlink(link(folder)) == "elsewhere-1" and len(list(tmp_path.iterdir())) == 1


def test_what_is_given_back_while_it_is_waited_for_is_free(tmp_path, monkeypatch):
    folder, clock = tmp_path / "run", Clock()
    of_another_host(folder, "elsewhere-1", 10)
    monkeypatch.setattr(lease, "time", clock)
    monkeypatch.setattr(clock, "sleep", lambda seconds: link(folder).unlink())
    with owning(folder):
        assert os.readlink(link(folder)) == own() and clock.passed == 0


def gone():
    """An owner of this host that is dead."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{files.HOST}-{process.pid}"


@pytest.mark.parametrize("dead_takers", [0, 2])
def test_of_two_that_take_a_dead_ones_one_owns_it(tmp_path, living, monkeypatch, dead_takers):
    """Both have seen that it is dead before either takes it, and one of them stops in the middle; also where takers died."""
    folder, both, owners = tmp_path / "run", threading.Barrier(2), [own(), f"{files.HOST}-{living}"]
    for taker in range(dead_takers + 1):
        link(folder).with_name(link(folder).name + ".taker" * taker).symlink_to(gone())
    looks, write = lease._refuse_living, lease.write_link

    def seen_by_both(path, owner, folder):
        looks(path, owner, folder)
        if path == link(folder):
            both.wait(10)

    def slow(path, target):
        if path == link(folder) and target == owners[1]:
            time.sleep(0.2)
        write(path, target)

    monkeypatch.setattr(lease, "_refuse_living", seen_by_both)
    monkeypatch.setattr(lease, "write_link", slow)
    have, refused = [], []

    def take(owner):
        try:
            lease._take(link(folder), owner, folder)
            have.append(owner)
        except EnvironmentFault as fault:
            refused.append(str(fault))

    threads = [threading.Thread(target=take, args=(owner,)) for owner in owners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(have) == len(refused) == 1 and os.readlink(link(folder)) == have[0]
    assert list(tmp_path.iterdir()) == [link(folder)]


def test_what_a_killed_taker_leaves_is_swept(tmp_path):
    folder = tmp_path / "run"
    left, young = (tmp_path / f".{link(folder).name}.{owner}.link.tmp" for owner in (gone(), f"{files.HOST}-{os.getpid()}"))
    left.symlink_to("x")
    young.symlink_to("x")
    with owning(folder):
        assert not left.is_symlink() and young.is_symlink()


class Overtaken(pl.Callback):
    """At a step, what a process finds that was suspended for so long that another job took its folder over."""

    def __init__(self, step, lease, change):
        self.step, self.lease, self.change = step, lease, change

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            self.change(self.lease)
            self.there = listed(self.lease.parent)


def listed(folder):
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def taken_over(lease):
    lease.unlink()
    lease.symlink_to("elsewhere-7.0123abcd.99")


@pytest.mark.slow
@pytest.mark.parametrize("change", [taken_over, Path.unlink], ids=["another job trains", "another job has trained"])
def test_a_job_that_wakes_up_after_it_was_taken_over_leaves_without_writing(tmp_path, change):
    content = values("nnclr", tmp_path, max_epochs=3, loggers=[])
    run_dir = experiment(content).run_dir(8)
    woken = Overtaken(10, link(run_dir), change)
    with pytest.raises(EnvironmentFault, match=f"another job took {run_dir} over while this one stood still") as caught:
        pretrain(experiment(content), [woken])
    assert len(str(caught.value).splitlines()) == 1
    assert listed(tmp_path) == woken.there


def test_a_folder_that_vanished_with_its_lease_was_taken_by_nobody(tmp_path):
    folder = tmp_path / "runs" / "run"
    with owning(folder):
        folder.mkdir()
        shutil.rmtree(folder.parent)
        lease.still_own(folder)
        assert os.readlink(link(folder)) == own()
        shutil.rmtree(folder.parent)
        link(folder).parent.mkdir()
        link(folder).symlink_to("elsewhere-7")          # another job was the first to come back
        with pytest.raises(lease.Taken, match="its lease: elsewhere-7"):
            lease.still_own(folder)
    assert os.readlink(link(folder)) == "elsewhere-7"


class Named:
    def __len__(self):
        return 100

    def name(self, index):
        return f"image {index}"


@pytest.mark.parametrize("removed", ["run", "."], ids=["the run's", "that of all runs"])
@pytest.mark.parametrize("first", ["an unreadable image", "a save"])
def test_whoever_makes_a_vanished_folder_anew_the_run_stays_its_owner(tmp_path, removed, first):
    folder = tmp_path / "runs" / "run"
    images = BadImages(Named(), 1.0, folder)
    with owning(folder):
        folder.mkdir()
        shutil.rmtree(folder.parent / removed)
        if first == "a save":
            lease.still_own(folder)
        images.add([(3, "cut")])
        lease.still_own(folder)
        assert os.readlink(link(folder)) == own() and "image 3" in (folder / "bad_samples.jsonl").read_text()


def test_a_job_that_was_taken_over_lists_no_images(tmp_path, caplog):
    folder = tmp_path / "runs" / "run"
    images = BadImages(Named(), 0.01, folder)
    with owning(folder):
        folder.mkdir()
        taken_over(link(folder))
        images.add([(3, "cut")])
        assert not list(folder.iterdir())
        with pytest.raises(DataError, match="the first: image 3, image 4"):     # not: listed in
            images.add([(4, "cut")])
    said = [record.getMessage() for record in caplog.records if "cannot be written" in record.getMessage()]
    assert len(said) == 1 and "another job took" in said[0]


def test_an_answer_that_does_not_come_takes_nothing(tmp_path, monkeypatch):
    def fails(path):
        raise OSError(116, "ESTALE")

    with owning(tmp_path / "run"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "readlink", fails)
            lease.still_own(tmp_path / "run")
        lease.still_own(tmp_path / "run")
        assert os.readlink(link(tmp_path / "run")) == own()
    lease.still_own(tmp_path / "never owned")
    assert not os.path.lexists(link(tmp_path / "never owned"))


def test_the_owner_gives_signs_of_life_and_leaves_alone_what_was_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "BEAT", 0.02)
    folder = tmp_path / "run"
    with owning(folder):
        os.utime(link(folder), (1e9, 1e9), follow_symlinks=False)
        deadline = time.monotonic() + 10
        while link(folder).lstat().st_mtime < 1e9 + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - link(folder).lstat().st_mtime < 60
        link(folder).unlink()
        link(folder).symlink_to("elsewhere-7")
    assert os.readlink(link(folder)) == "elsewhere-7"


@pytest.mark.parametrize("moment", ["at the end", "at the beginning"])
def test_a_folder_that_has_become_read_only_hides_no_error(tmp_path, monkeypatch, moment):
    folder = tmp_path / "run"

    def read_only(path, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system")

    def refused(path, target):
        raise EnvironmentFault("why it ends")

    with pytest.raises(EnvironmentFault, match="^why it ends$"), monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        if moment == "at the beginning":
            link(folder).symlink_to(gone())
            patch.setattr(lease, "write_link", refused)
        with owning(folder):
            refused(None, None)
    assert link(folder).is_symlink()


def test_the_heart_goes_on_when_the_file_system_did_not_answer(tmp_path, monkeypatch):
    """A heart that stopped at the first error would let another host take the folder of a run that lives."""
    monkeypatch.setattr(lease, "BEAT", 0.02)
    utime, readlink, failures = os.utime, os.readlink, [5] * 4 + [116] * 4      # EIO, ESTALE

    def failing(call):
        def act(*arguments, **more):
            if failures and str(arguments[0]).endswith(".lease"):
                raise OSError(failures.pop(), "no answer")
            return call(*arguments, **more)

        return act

    folder = tmp_path / "run"
    with owning(folder):
        monkeypatch.setattr(os, "utime", failing(utime))
        monkeypatch.setattr(os, "readlink", failing(readlink))
        deadline = time.monotonic() + 10
        while failures and time.monotonic() < deadline:
            time.sleep(0.01)
        utime(link(folder), (1e9, 1e9), follow_symlinks=False)
        while link(folder).lstat().st_mtime < 1e9 + 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - link(folder).lstat().st_mtime < 60 and not failures
    assert not list(tmp_path.iterdir())
