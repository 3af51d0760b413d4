"""The launcher prints and runs the same command, and hands exit codes and signals through."""

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from solo import launch
from solo.errors import ConfigError, EnvironmentFault

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder with a main_pretrain.py that prints its arguments and exits with 7; the working directory."""
    (tmp_path / "main_pretrain.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    (tmp_path / "main_linear.py").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def dry(capsys, scripts, line):
    assert launch.main([*shlex.split(line), "--dry-run"], scripts) == 0
    return [shlex.split(printed) for printed in capsys.readouterr().out.splitlines()]


TORCHRUN = [PYTHON, "-m", "torch.distributed.run"]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", [PYTHON, "main_pretrain.py", "--config-name", "all4one.yaml"]),
        ("max_epochs=2", [PYTHON, "main_pretrain.py", "--config-name", "all4one.yaml", "max_epochs=2"]),
        ("-cn nnclr.yaml 'name=a b'", [PYTHON, "main_pretrain.py", "-cn", "nnclr.yaml", "name=a b"]),
        ("--config-name=nnclr.yaml -m seed=1,2", [PYTHON, "main_pretrain.py", "--config-name=nnclr.yaml", "-m", "seed=1,2"]),
        ("--script main_linear.py checkpoint=x", [PYTHON, "main_linear.py", "checkpoint=x"]),
        ("--gpus 1", [PYTHON, "main_pretrain.py", *launch.QUICK_START, "accelerator=gpu", "devices=1", "num_nodes=1"]),
        (
            "--processes 2 --config-path p --config-name nnclr.yaml",
            [
                *TORCHRUN,
                "--nproc-per-node=2",
                "--standalone",
                "main_pretrain.py",
                "--config-path",
                "p",
                "--config-name",
                "nnclr.yaml",
                "accelerator=cpu",
                "devices=2",
                "num_nodes=1",
            ],
        ),
        (
            "--gpus 4 --nodes 2 --rendezvous n1:29500",
            [
                *TORCHRUN,
                "--nproc-per-node=4",
                "--nnodes=2",
                "--rdzv-backend=c10d",
                "--rdzv-id=solo",
                "--rdzv-endpoint=n1:29500",
                "main_pretrain.py",
                *launch.QUICK_START,
                "accelerator=gpu",
                "devices=4",
                "num_nodes=2",
            ],
        ),
    ],
)
def test_dry_run_prints_the_command(capsys, scripts, line, expected):
    assert dry(capsys, scripts, line) == [expected]


def test_nodes_meet_where_the_environment_says(capsys, scripts, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "head")
    assert "--rdzv-endpoint=head:29500" in dry(capsys, scripts, "--gpus 1 --nodes 2")[0]


def test_slurm_starts_the_processes_itself(capsys, scripts):
    job, command = dry(capsys, scripts, "--slurm --gpus 2 --nodes 3 --time 1-01:30:00 --partition gpu --mem-gb 64 lr=1")
    assert job == [
        "sbatch",
        "--job-name=solo",
        "--nodes=3",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--mem=64GB",
        "--time=1530",
        "--partition=gpu",
    ]
    assert command == [
        "srun",
        PYTHON,
        "main_pretrain.py",
        *launch.QUICK_START,
        "lr=1",
        "accelerator=gpu",
        "devices=2",
        "num_nodes=3",
    ]


@pytest.mark.parametrize(
    "line, said",
    [
        ("--gpu 2", "unknown flag --gpu, did you mean '--gpus'?"),
        ("--confg-name=x", "unknown flag --confg-name, did you mean '--config-name'?"),
        ("--gpus two", "argument --gpus: invalid int value: 'two'"),
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--gpus 1 --processes 1", "--gpus and --processes exclude each other"),
        ("--gpus 2 ++devices=4", "devices is decided by --gpus"),
        ("--nodes 2", "--nodes needs --gpus N or --processes N"),
        ("--nodes 2 --gpus 1", "--nodes needs --rendezvous HOST:PORT"),
        ("--nodes 2 --gpus 1 --rendezvous 'a;b'", "--rendezvous must be HOST:PORT, got 'a;b'"),
        ("--partition gpu", "--partition is for SLURM jobs: add --slurm"),
        ("--slurm --gpus 1", "--slurm needs --time"),
        ("--slurm --gpus 1 --time tomorrow", "--time must be minutes or [days-]HH:MM:SS, got 'tomorrow'"),
        ("--slurm --gpus 1 --time 5 --account 'a\n#SBATCH x'", "--account must be a plain word"),
        ("--script main_linaer.py", "--script main_linaer.py does not exist, did you mean 'main_linear.py'?"),
    ],
)
def test_a_mistake_is_named(scripts, line, said):
    with pytest.raises(ConfigError) as error:
        launch.main(shlex.split(line), scripts)
    assert said in str(error.value)


def test_all_mistakes_come_at_once(scripts):
    with pytest.raises(ConfigError) as error:
        launch.main(["--nope", "--gpus", "0", "--nodes", "0"], scripts)
    assert len(str(error.value).splitlines()) == 3


def test_more_gpus_than_there_are(scripts, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(EnvironmentFault, match=r"^--gpus 3: this machine has 1, use --gpus 1$"):
        launch.main(["--gpus", "3"], scripts)


def test_the_childs_exit_code_comes_back(scripts, capfd):
    assert launch.main(["a=1"], scripts) == 7
    assert capfd.readouterr().out == "['--config-name', 'all4one.yaml', 'a=1']\n"


def test_a_child_ended_by_a_signal(scripts):
    (scripts / "main_pretrain.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert launch.main([], scripts) == 128 + signal.SIGKILL


def test_two_processes_under_torchrun(scripts):
    (scripts / "main_pretrain.py").write_text(
        "import os, pathlib\npathlib.Path(f\"rank{os.environ['RANK']}of{os.environ['WORLD_SIZE']}\").touch()\n"
    )
    assert launch.main(["--processes", "2"], scripts) == 0
    assert sorted(path.name for path in scripts.glob("rank*")) == ["rank0of2", "rank1of2"]


WAITER = """
import pathlib, signal, sys, time
def end(number, frame):
    with open("received", "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.3)                     # time for a second delivery, which must not come
    sys.exit(40)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
pathlib.Path("ready").touch()
time.sleep(60)
"""

# a suite that runs in the background inherits an ignored SIGINT: start from Python's own handlers
LAUNCH = """
import pathlib, signal, sys
from solo.launch import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main([], pathlib.Path(sys.argv[1])))
"""


@pytest.mark.parametrize("number, to_group", [(signal.SIGINT, True), (signal.SIGINT, False), (signal.SIGTERM, False)])
def test_a_signal_reaches_the_child_once_and_is_waited_for(scripts, number, to_group):
    (scripts / "main_pretrain.py").write_text(WAITER)
    process = subprocess.Popen(
        [PYTHON, "-c", LAUNCH, str(scripts)], env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True
    )
    wait_for(scripts / "ready")
    os.killpg(process.pid, number) if to_group else process.send_signal(number)  # a terminal's Ctrl-C goes to the group
    assert process.wait(30) == 40
    assert (scripts / "received").read_text().split() == [str(int(number))]


def test_nohup_stays_nohup(scripts):
    (scripts / "main_pretrain.py").write_text("import signal\nraise SystemExit(signal.getsignal(1) is signal.SIG_IGN)\n")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch.main([], scripts) == 1
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A fake SLURM: sbatch keeps the script it is given, srun exists."""
    pytest.importorskip("submitit")
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, body in {"sbatch": f'cp "$1" {folder}/script && echo "Submitted batch job 31"', "srun": ":"}.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def test_a_slurm_job_is_submitted_and_runs_the_command(scripts, cluster, capsys):
    line = "--slurm --processes 2 --nodes 1 --time 90 --account lab --cpus-per-task 4 'name=a b'"
    assert launch.main(shlex.split(line), scripts) == 0
    assert capsys.readouterr().out == "submitted job 31, its output goes to runs/slurm\n"
    script = (cluster / "script").read_text()
    for asked in ("--nodes=1", "--ntasks-per-node=2", "--time=90", "--account=lab", "--cpus-per-task=4", "--job-name=solo"):
        assert f"#SBATCH {asked}\n" in script
    assert "gpus" not in script
    (pickled,) = (scripts / "runs" / "slurm").glob("*.pkl")
    from submitit.core.utils import DelayedSubmission

    job = DelayedSubmission.load(pickled)
    assert job.function is subprocess.run and job.kwargs == {"check": True}
    assert job.args == (
        [PYTHON, "main_pretrain.py", *launch.QUICK_START, "name=a b", "accelerator=cpu", "devices=2", "num_nodes=1"],
    )


def test_no_slurm_here(scripts, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(scripts))
    with pytest.raises(EnvironmentFault, match="--slurm: Could not detect"):
        launch.main(["--slurm", "--gpus", "1", "--time", "5"], scripts)


def test_submitit_is_not_installed(scripts, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'solo-ssl\[slurm\]'"):
        launch.main(["--slurm", "--gpus", "1", "--time", "5"], scripts)


def test_the_script_reports_in_one_line():
    ended = subprocess.run([PYTHON, "launcher.py", "--gpsu", "2"], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "config error: unknown flag --gpsu, did you mean '--gpus'?\n"


def test_dry_run_needs_no_torch():
    source = "import sys, solo.launch; print(sorted({'torch', 'hydra', 'pytorch_lightning'} & set(sys.modules)))"
    ended = subprocess.run([PYTHON, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
