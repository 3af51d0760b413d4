"""The writer of checkpoints: whole or not at all, checked when read, never running code."""

import errno
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from solo import checkpoint, files
from solo.callbacks.checkpoint import CheckpointConfig
from solo.errors import ConfigError, EnvironmentFault, NumericsError


def content(step=1, value=1.0):
    return {"state_dict": {"w": torch.full((64,), value)}, "global_step": step, "epoch": 0, "solo": json.dumps({"method": "x"})}


def test_round_trip_and_manifest(tmp_path):
    for step in (3, 1, 2):
        checkpoint.save(content(step), tmp_path / f"{step}.ckpt")
    assert [entry.step for entry in checkpoint.manifest(tmp_path)] == [1, 2, 3]
    assert checkpoint.newest(tmp_path).name == "3.ckpt"
    assert torch.equal(checkpoint.read(tmp_path / "2.ckpt")["state_dict"]["w"], torch.ones(64))
    assert checkpoint.digest(tmp_path / "2.ckpt") == checkpoint.manifest(tmp_path)[1].sha256


def test_prune_keeps_the_newest_and_those_to_keep(tmp_path):
    for step in range(1, 6):
        checkpoint.save(content(step), tmp_path / f"{step}.ckpt", keep=step == 2)
        checkpoint.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["2.ckpt", "4.ckpt", "5.ckpt"]


def test_saves_within_an_epoch_leave_those_of_its_end_alone(tmp_path):
    """Eight saves an epoch; what is there is at no moment less than two."""
    for step in range(1, 30):
        progress = {"started": (step - 1) // 8 + 1, "processed": step // 8}
        loops = {"fit_loop": {"epoch_progress": {"current": progress}}}
        checkpoint.save({**content(step), "loops": loops}, tmp_path / f"step-{step:02d}.ckpt")
        checkpoint.prune(tmp_path)
        entries = checkpoint.manifest(tmp_path)
        assert len(entries) >= min(step, 2) and {path.name for path in tmp_path.glob("*.ckpt")} == {e.file for e in entries}
    assert [(entry.step, entry.epoch_end) for entry in entries] == [(16, True), (24, True), (28, False), (29, False)]


@pytest.mark.parametrize("keep_prev", [False, True])
@pytest.mark.parametrize(("epochs", "frequency"), [(1, 1), (2, 1), (4, 1), (5, 2)])
def test_no_more_lie_there_than_room_was_made_for(tmp_path, monkeypatch, epochs, frequency, keep_prev):
    """Four saves an epoch, the last of them at its end: each end may be saved, by a signal or where the run ends."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)
    most = 0
    for step in range(1, 4 * epochs + 1):
        epoch, end = (step - 1) // 4 + 1, step % 4 == 0
        loops = {"fit_loop": {"epoch_progress": {"current": {"started": epoch, "processed": step // 4}}}}
        keep = end and keep_prev and epoch % frequency == 0
        if not keep_prev or keep or not end or epoch == epochs:
            checkpoint.save({**content(step), "loops": loops}, tmp_path / f"step-{step:02d}.ckpt", keep)
            most = max(most, len(list(tmp_path.glob("*.ckpt"))))
            checkpoint.prune(tmp_path)
    assert most == CheckpointConfig(frequency=frequency, keep_prev=keep_prev).most(epochs)


@pytest.mark.parametrize("text", [None, "[{"], ids=["removed", "garbled"])
def test_a_manifest_lost_while_a_run_goes_on_is_made_anew(tmp_path, caplog, text):
    for step in (1, 2):
        checkpoint.save(content(step), tmp_path / f"step-{step}.ckpt")
    path = tmp_path / checkpoint.MANIFEST
    assert not caplog.text
    path.unlink() if text is None else path.write_text(text)
    checkpoint.save(content(3), tmp_path / "step-3.ckpt")
    assert [entry.step for entry in checkpoint.manifest(tmp_path)] == [1, 2, 3]
    assert all(checkpoint.digest(tmp_path / entry.file) == entry.sha256 for entry in checkpoint.manifest(tmp_path))
    assert str(path) in caplog.text and "it is made anew" in caplog.text


@pytest.mark.parametrize("keep_prev", [False, True])
def test_a_manifest_lost_again_and_again_keeps_no_more_than_the_run_does(tmp_path, keep_prev):
    """Two saves an epoch; what keeps ends of epochs for good still does."""
    facts = json.dumps({"method": "x", "config": {"checkpoint": {"keep_prev": keep_prev}}})
    for step in range(1, 13):
        end = step % 2 == 0
        loops = {"fit_loop": {"epoch_progress": {"current": {"started": (step + 1) // 2, "processed": step // 2}}}}
        file = tmp_path / f"step-{step:02d}.ckpt"
        checkpoint.save({**content(step), "solo": facts, "loops": loops}, file, keep=keep_prev and end)
        checkpoint.prune(tmp_path)
        if step % 4 == 1:
            (tmp_path / checkpoint.MANIFEST).unlink()
    ends = [2, 4, 6, 8, 10, 12] if keep_prev else [10, 12]
    assert [entry.step for entry in checkpoint.manifest(tmp_path)] == sorted([*ends, 9, 11])
    assert len(list(tmp_path.glob("*.ckpt"))) == len(ends) + 2


@pytest.mark.parametrize("moment", ["write", "replace", "manifest"])
def test_an_interrupted_write_leaves_the_last_one_in_force(tmp_path, monkeypatch, moment):
    checkpoint.save(content(1), tmp_path / "1.ckpt")

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    if moment == "write":
        monkeypatch.setattr(torch, "save", lambda state, file: (file.write(b"half"), interrupted()))
    elif moment == "replace":
        monkeypatch.setattr(os, "replace", interrupted)
    else:
        monkeypatch.setattr(checkpoint, "_write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(content(2), tmp_path / "2.ckpt")
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path).name == "1.ckpt"
    assert not list(tmp_path.glob(".*.tmp"))


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    path, generator = tmp_path / "1.ckpt", random.Random(7)
    checkpoint.save(content(), path)
    good = path.read_bytes()
    flips = [(generator.randrange(len(good)), 1 << generator.randrange(8)) for _ in range(1000)]
    for bad in (
        *(good[:at] + bytes([good[at] ^ bit]) + good[at + 1:] for at, bit in flips),
        *(good[: generator.randrange(len(good))] for _ in range(200)),
    ):
        path.write_bytes(bad)
        with pytest.raises(ConfigError, match="damaged"):
            checkpoint.read(path)


def test_a_damaged_one_is_set_aside_and_two_valid_ones_follow(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save(content(step), tmp_path / f"step-{step}.ckpt")
    bad = bytearray((tmp_path / "step-2.ckpt").read_bytes())
    bad[len(bad) // 2] ^= 1
    (tmp_path / "step-2.ckpt").write_bytes(bad)
    checkpoint.repair(tmp_path)
    assert (tmp_path / "step-2.ckpt.corrupt").read_bytes() == bad and "step-2.ckpt is damaged" in caplog.text
    assert checkpoint.newest(tmp_path).name == "step-1.ckpt"
    checkpoint.save(content(3), tmp_path / "step-3.ckpt")
    checkpoint.prune(tmp_path)
    entries = checkpoint.manifest(tmp_path)
    assert [entry.step for entry in entries] == [1, 3]
    assert all(checkpoint.digest(tmp_path / entry.file) == entry.sha256 for entry in entries)


def test_a_file_that_vanished_counts_for_nothing(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(content(step), tmp_path / f"step-{step}.ckpt")
    (tmp_path / "step-2.ckpt").unlink()
    checkpoint.prune(tmp_path)
    assert checkpoint.read(tmp_path / "step-1.ckpt")["global_step"] == 1


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "[{", '[{"file": "x"}]', "\x00" * 40, '"text"'])
def test_a_lost_manifest_is_made_again_from_what_can_be_read(tmp_path, text, caplog):
    for step in (1, 2, 3):
        checkpoint.save(content(step), tmp_path / f"step-{step}.ckpt")
    bad = bytearray((tmp_path / "step-3.ckpt").read_bytes())
    bad[len(bad) // 2] ^= 1
    (tmp_path / "step-3.ckpt").write_bytes(bad)
    path = tmp_path / checkpoint.MANIFEST
    path.unlink() if text is None else path.write_text(text)
    assert checkpoint.newest(tmp_path).name == "step-2.ckpt" and not (tmp_path / "step-3.ckpt.corrupt").exists()
    checkpoint.repair(tmp_path)
    assert checkpoint.MANIFEST in caplog.text and (tmp_path / "step-3.ckpt.corrupt").exists()
    assert [(entry.step, entry.keep) for entry in checkpoint.manifest(tmp_path)] == [(1, True), (2, True)]
    assert checkpoint.read(tmp_path / "step-2.ckpt")["global_step"] == 2


def test_without_a_valid_one_nothing_is_changed_and_never_forgotten(tmp_path):
    for step in (1, 2):
        checkpoint.save(content(step), tmp_path / f"step-{step}.ckpt")
        (tmp_path / f"step-{step}.ckpt").write_bytes(b"" if step == 1 else b"x" * 5000)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("with its manifest", "without"):
        for _ in range(2):
            with pytest.raises(ConfigError, match="(?s)step-1.ckpt.*no valid checkpoint is left") as caught:
                checkpoint.repair(tmp_path)
            assert "step-2.ckpt" in str(caught.value), name
        assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
        before.pop(tmp_path / checkpoint.MANIFEST, None)
        (tmp_path / checkpoint.MANIFEST).unlink(missing_ok=True)


def test_a_manifest_names_files_beside_it_only(tmp_path):
    outside = tmp_path / "outside.ckpt"
    outside.write_text("mine")
    for name in ("../outside.ckpt", str(outside)):
        rows = [{"file": name, "sha256": "0", "step": step, "epoch": 0} for step in range(3)]
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / checkpoint.MANIFEST).write_text(json.dumps(rows))
        with pytest.raises(ConfigError, match="which is no file beside it"):
            checkpoint.prune(tmp_path / "run")
    assert outside.read_text() == "mine"


def test_mtimes_decide_nothing(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(content(step), tmp_path / f"{step}.ckpt")
        os.utime(tmp_path / f"{step}.ckpt", (1e9 - step, 1e9 - step))
    assert checkpoint.newest(tmp_path).name == "3.ckpt"


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_removed_and_of_the_living_kept(tmp_path, caplog):
    checkpoint.save(content(1), tmp_path / "step-1.ckpt")
    old, young = tmp_path / ".step-2.ckpt.elsewhere-7.abc_1.tmp", tmp_path / ".step-2.ckpt.elsewhere-8.abc_2.tmp"
    dead = tmp_path / f".step-2.ckpt.{files.HOST}-{dead_pid()}.xy.tmp"
    living = tmp_path / f".step-2.ckpt.{files.HOST}-{os.getpid()}.xy.tmp"
    other = tmp_path / ".notes.tmp"
    for path in (old, young, dead, living, other):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 10**6,) * 2)
    pruned = tmp_path / "step-0.ckpt"
    pruned.write_bytes(b"forgotten by the manifest, and then the process was killed")
    checkpoint.repair(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "step-1.ckpt", checkpoint.MANIFEST, young.name, living.name, other.name
    }
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{pruned} is removed: manifest.json does not name it and goes on from step-1.ckpt")


def test_a_killed_writer_leaves_a_file_that_names_it(tmp_path):
    """What `sweep` looks for is what `write_file` makes."""
    script = f"""
import os
from solo import files
files.write_file({str(tmp_path / "a.b-c.ckpt")!r}, lambda file: os.kill(os.getpid(), 9))
"""
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert len(list(tmp_path.iterdir())) == 1
    files.sweep(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_an_os_error_and_the_last_one_stays(tmp_path):
    checkpoint.save(content(1), tmp_path / "1.ckpt")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    large = {**content(2), "state_dict": {"a": torch.zeros(1 << 17), "b": torch.zeros(1 << 17)}}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
    try:
        with pytest.raises(OSError) as caught:
            checkpoint.save(large, tmp_path / "2.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno == errno.EFBIG
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_optimizer_states_are_refused(tmp_path, bad):
    state = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor([1.0, bad])}}, "param_groups": [{"lr": 0.1}]}
    with pytest.raises(NumericsError, match="step 2.*first optimizer_states.0.state.0.exp_avg$"):       # there is none to stay
        checkpoint.save({**content(2), "optimizer_states": [state]}, tmp_path / "2.ckpt")
    assert not list(tmp_path.iterdir())


def test_non_finite_weights_are_refused(tmp_path):
    checkpoint.save(content(1), tmp_path / "1.ckpt")
    with pytest.raises(NumericsError, match="step 2.*; the last good checkpoint stays$"):
        checkpoint.save(content(2, float("nan")), tmp_path / "2.ckpt")
    assert checkpoint.newest(tmp_path).name == "1.ckpt" and not (tmp_path / "2.ckpt").exists()


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_code_in_a_file_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "solo": "{}", "x": Exploit()}, tmp_path / "bad.ckpt")
    with pytest.raises(ConfigError, match="cannot be loaded as tensors and plain values"):
        checkpoint.read("bad.ckpt")
    assert not (tmp_path / "exploited").exists()


def test_what_is_not_a_checkpoint_is_named(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("hello")
    for name, reason in (
        ("other.ckpt", "not a checkpoint of solo"),
        ("text.ckpt", "cannot be loaded"),
        ("none.ckpt", "does not exist"),
    ):
        with pytest.raises(ConfigError, match=reason):
            checkpoint.read(tmp_path / name)


def test_misfit_names_keys():
    model = {"a": torch.zeros(2), "b": torch.zeros(2)}
    assert checkpoint.misfit(model, dict(model)) == ""
    text = checkpoint.misfit(model, {"a": torch.zeros(3), "c": torch.zeros(1)})
    assert text == "missing 1: b; unexpected 1: c; shape of: a (3,) instead of (2,)"


def test_a_run_is_found_by_file_directory_and_name(tmp_path):
    run = tmp_path / "quick-0123abcd"
    checkpoint.save(content(), run / "checkpoints" / "step-1.ckpt")
    for name in (run / "checkpoints" / "step-1.ckpt", run, tmp_path / "quick"):
        assert checkpoint.resolve(name).name == "step-1.ckpt"
    checkpoint.save(content(), tmp_path / "quick-99999999" / "checkpoints" / "step-1.ckpt")
    with pytest.raises(ConfigError, match="quick-99999999, .*quick-0123abcd: name one"):
        checkpoint.resolve(tmp_path / "quick")
    with pytest.raises(ConfigError, match="does not exist"):
        checkpoint.resolve(tmp_path / "slow")
    checkpoint.save(content(), tmp_path / "copied-0123abcd" / "step-1.ckpt")
    assert checkpoint.resolve(tmp_path / "copied") == tmp_path / "copied-0123abcd" / "step-1.ckpt"
    checkpoint.save(content(), tmp_path / "copied-99999999" / "checkpoints" / "step-1.ckpt")
    with pytest.raises(ConfigError, match="could be .*copied-99999999, .*copied-0123abcd: name one"):
        checkpoint.resolve(tmp_path / "copied")


def test_a_path_that_may_not_be_looked_at_is_one_line(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", forbidden)
    with pytest.raises(ConfigError, match=f"^resume={tmp_path}/x.ckpt cannot be reached: Permission denied$"):
        checkpoint.resolve(tmp_path / "x.ckpt", "resume")


def test_a_file_system_that_does_not_answer_is_no_damage(tmp_path, monkeypatch):
    """The manifest is not set aside, a save can be tried again, and who only reads gets one line."""
    path = tmp_path / "step-000000001.ckpt"
    checkpoint.save(content(1), path)
    before = (tmp_path / checkpoint.MANIFEST).read_bytes()

    def silent(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "read_json", silent)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.save(content(2), tmp_path / "step-000000002.ckpt")
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.repair(tmp_path)
    for look in (lambda: checkpoint.read(path), lambda: checkpoint.newest(tmp_path)):
        with pytest.raises(EnvironmentFault, match="cannot be read: Input/output error"):
            look()
    assert (tmp_path / checkpoint.MANIFEST).read_bytes() == before and not list(tmp_path.glob("*.corrupt"))


def test_a_pipe_in_the_place_of_a_manifest_is_none(tmp_path):
    """Whoever opens it waits for somebody who writes."""
    os.mkfifo(tmp_path / checkpoint.MANIFEST)
    with pytest.raises(ConfigError, match="is not a manifest of checkpoints"):
        checkpoint.manifest(tmp_path)
