"""Two processes, started by Lightning as by a user's command: one run, one voice, and they leave together."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from solo import checkpoint
from tests.conftest import ROOT
from tests.forks import Fork
from tests.tiny import values

pytestmark = pytest.mark.slow
NO_REPORT = "report.enabled=false"


def start(folder, *arguments):
    """``main_pretrain.py`` with two processes; 16 steps in each of two epochs."""
    report = {"enabled": True, "points": 50, "images": 2, "max_train": 200}
    content = values("all4one", "runs", data={"train_size": 256}, max_epochs=2, devices=2, report=report, limit_val_batches=2)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, str(ROOT / "main_pretrain.py"), "--config-path", str(folder), "--config-name", "tiny.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return Fork(
        [*command, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(process, code):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out.strip().splitlines(), err.strip().splitlines()


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder, the lines and the weights of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    out, err = finished(start(folder), 0)
    return folder, out, err, checkpoint.read(next(folder.glob("runs/*/last.ckpt")))


def test_one_run_directory_and_one_voice(whole):
    folder, out, err, final = whole
    assert not err and len(out) == len(set(out)), out
    assert sum(line.startswith("epoch ") for line in out) == 2
    assert [line.endswith("(new)") for line in out if "run directory" in line] == [True]
    assert [path.name for path in folder.iterdir() if path.name != "tiny.yaml"] == ["runs"]
    (run_dir,) = (folder / "runs").iterdir()
    assert sorted(path.name for path in (run_dir / "csv").iterdir()) == ["version_0"]
    assert final["global_step"] == 32 and final["DataModule"]["global_batch"] == 16


def test_the_report_is_made_as_by_one_process(whole):
    folder, out, *_ = whole
    (run_dir,) = (folder / "runs").iterdir()
    rows = json.loads((run_dir / "results.json").read_text())["comparison"]["results"]
    assert [row["features"] for row in rows] == ["trained backbone", "same backbone, untrained", "raw pixels"]
    assert {(row["train_images"], row["test_images"]) for row in rows} == {(200, 256)}
    assert (run_dir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert sum(line.startswith("picture: ") for line in out) == 1


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the second process in /proc")
@pytest.mark.parametrize("target", ["parent", "rank 1"])
def test_a_signal_to_either_ends_both_and_the_same_command_continues(whole, tmp_path, target):
    running = start(tmp_path, NO_REPORT)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (second,) = children(running)
    os.kill(running.pid if target == "parent" else second, signal.SIGTERM)
    _, err = finished(running, 128 + signal.SIGTERM)
    assert len(err) == 1 and "SIGTERM at epoch 2" in err[0] and "run the same command to continue" in err[0], err
    gone(second)
    continues(whole, tmp_path)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the second process in /proc")
def test_killed_in_the_middle_of_an_epoch_the_same_command_continues(whole, tmp_path):
    """Both at once, as a lost node would, some steps behind the newest of the checkpoints of every step."""
    running = start(tmp_path, NO_REPORT, "checkpoint.minutes=0")
    deadline = time.monotonic() + 300
    while len(saved := sorted(tmp_path.glob("runs/*/checkpoints/step-*.ckpt"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    (second,) = children(running)
    for pid in (running.pid, second):
        os.kill(pid, signal.SIGKILL)
    finished(running, -signal.SIGKILL)
    gone(second)
    assert int(saved[-1].stem.removeprefix("step-")) % 16
    continues(whole, tmp_path)


def gone(pid):
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def continues(whole, folder):
    """The same command again leads to the bits of the run that nobody interrupts."""
    out, err = finished(start(folder, NO_REPORT), 0)
    assert sum("run directory" in line and "continuing step-" in line for line in out) == 1 and not err
    *_, final = whole
    resumed = checkpoint.read(next(folder.glob("runs/*/last.ckpt")))
    assert all(torch.equal(resumed["state_dict"][key], value) for key, value in final["state_dict"].items())
    assert str(resumed["optimizer_states"]) == str(final["optimizer_states"])


def test_another_number_of_processes_goes_on_with_the_same_images_and_says_what_changes(tmp_path):
    """One process, then two, then one; the images of a step and the place in the data are the same by construction."""
    seen, arguments = set(), []
    for epoch, (devices, before) in enumerate([(1, None), (2, 1), (1, 2)], start=1):
        sizes = [f"devices={devices}", f"optimizer.batch_size={16 // devices}", f"max_epochs={epoch}", "data.train_size=128"]
        out, err = finished(start(tmp_path, *sizes, NO_REPORT, *arguments), 0)
        notes = [line for line in out if line.startswith("note: each process")]
        assert len(notes) == (before is not None) and not err
        assert not before or f"takes {16 // devices} images of a step, it took {16 // before} when" in notes[0]
        (folder,) = {path.parent for path in tmp_path.glob("runs/*/last.ckpt")} - seen
        seen.add(folder)
        final = checkpoint.read(folder / "last.ckpt")
        assert final["global_step"] == 8 * epoch
        place = {key: value for key, value in final["DataModule"].items() if key != "listing"}
        assert place == {"epoch": epoch, "batch": 0, "global_batch": 16, "images": 128, "seed": 5}
        arguments = [f"resume={folder}"]
