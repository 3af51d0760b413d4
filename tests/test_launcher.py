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
import yaml

from solo import checkpoint, launch
from solo.errors import ConfigError, EnvironmentFault
from tests import forks
from tests.tiny import values

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
    monkeypatch.setenv("SOLO_DEBUG", "")
    return tmp_path


def dry(capsys, scripts, line):
    assert launch.main([*shlex.split(line), "--dry-run"], scripts) == 0
    return [shlex.split(printed) for printed in capsys.readouterr().out.splitlines()]


TORCHRUN = [
    PYTHON, "-m", "solo.torchrun", "--signals-to-handle=SIGINT,SIGTERM,SIGHUP,SIGUSR1,SIGUSR2",
]


@pytest.mark.parametrize(
    "line, expected",
    [
        ("", [PYTHON, "main_pretrain.py", "--config-name", "all4one.yaml"]),
        ("max_epochs=2", [PYTHON, "main_pretrain.py", "--config-name", "all4one.yaml", "max_epochs=2"]),
        ("-cn nnclr.yaml 'name=a b'", [PYTHON, "main_pretrain.py", "-cn", "nnclr.yaml", "name=a b"]),
        ("--config-name=nnclr.yaml -m seed=1,2", [PYTHON, "main_pretrain.py", "--config-name=nnclr.yaml", "-m", "seed=1,2"]),
        ("max_epochs=2 --debug", [PYTHON, "main_pretrain.py", *launch.QUICK_START, "--debug", "max_epochs=2"]),
        ("--script main_linear.py checkpoint=x", [PYTHON, "main_linear.py", "checkpoint=x"]),
        ("--gpus 1", [PYTHON, "main_pretrain.py", *launch.QUICK_START, "accelerator=gpu", "devices=1", "num_nodes=1"]),
        ("--processes 2 --config-path p --config-name nnclr.yaml", [
            *TORCHRUN, "--nproc-per-node=2", "--standalone", "main_pretrain.py", "--config-path", "p", "--config-name",
            "nnclr.yaml", "accelerator=cpu", "devices=2", "num_nodes=1",
        ]),
        ("--gpus 4 --nodes 2 --rendezvous n1:29500", [
            *TORCHRUN, "--nproc-per-node=4", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=solo",
            "--rdzv-endpoint=n1:29500", "main_pretrain.py", *launch.QUICK_START, "accelerator=gpu", "devices=4", "num_nodes=2",
        ]),
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
        "--signal=USR2@120",
        "--requeue",
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


@pytest.mark.slow
def test_two_processes_under_torchrun(scripts):
    (scripts / "main_pretrain.py").write_text(
        "import os, pathlib\npathlib.Path(f\"rank{os.environ['RANK']}of{os.environ['WORLD_SIZE']}\").touch()\n"
    )
    assert launch.main(["--processes", "2"], scripts) == 0
    assert sorted(path.name for path in scripts.glob("rank*")) == ["rank0of2", "rank1of2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "ending, code, said",
    [("sys.exit(7 * (rank == '0'))", 7, ""), ("rank == '1' and os.kill(os.getpid(), 9)", 137, "rank 1 was ended by SIGKILL\n")],
)
def test_torchrun_ends_as_its_processes_do(scripts, capfd, ending, code, said):
    (scripts / "main_pretrain.py").write_text(f"import os, sys\nrank = os.environ['RANK']\n{ending}\n")
    assert launch.main(["--processes", "2"], scripts) == code
    assert capfd.readouterr().err == (f"environment error: {said}" if said else "")


PAIR = """
import os, pathlib, signal, sys, time
def end(number, frame):
    time.sleep(0.2)
    pathlib.Path(f"saved{os.environ['RANK']}").touch()
    sys.exit(0 if os.environ["RANK"] == "1" else 128 + number)
signal.signal(signal.SIGUSR2, end)
pathlib.Path(f"ready{os.environ['RANK']}").touch()
time.sleep(60)
"""


@pytest.mark.slow
def test_a_signal_reaches_all_processes_of_torchrun(scripts):
    (scripts / "main_pretrain.py").write_text(PAIR)
    source = LAUNCH.replace("main([]", "main(['--processes', '2']")
    process = subprocess.Popen(
        [PYTHON, "-c", source, str(scripts)], env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True
    )
    for rank in (0, 1):
        wait_for(scripts / f"ready{rank}", 60)
    process.send_signal(signal.SIGUSR2)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR2 and said == ""
    assert (scripts / "saved0").exists() and (scripts / "saved1").exists()


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
    assert "#SBATCH --signal=USR2@120\n" in script and "#SBATCH --requeue\n" in script
    (pickled,) = (scripts / "runs" / "slurm").glob("*.pkl")
    from submitit.core.utils import DelayedSubmission

    job = DelayedSubmission.load(pickled)
    words = (PYTHON, "main_pretrain.py", *launch.QUICK_START, "name=a b", "accelerator=cpu", "devices=2", "num_nodes=1")
    assert job.function == launch.Job(words) and not job.args and not job.kwargs


TASK = {
    "SLURM_JOB_ID": "31", "SLURM_JOB_NAME": "solo", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODEID": "0",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_NUM_NODES": "1", "OMP_NUM_THREADS": "1",
}


SRUN = """#!/bin/sh
while [ "${1#-}" != "$1" ]; do
    case "$1" in --output|--error) shift;; esac
    shift
done
exec "$@"
"""


def start_job(cluster, **environment):
    """The submitted script as slurmd would run it, with an srun that just runs its task."""
    (cluster / "srun").write_text(SRUN)
    words = ["bash", str(cluster / "script")]
    return subprocess.Popen(words, env={**os.environ, **TASK, **environment}, stderr=subprocess.PIPE, text=True)


def task_of(process):
    """The task that the batch script waits for."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


SAVER = """
import pathlib, signal, sys, time
def save(number, frame):
    time.sleep(0.5)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the task in /proc")
@pytest.mark.parametrize(
    "number, scontrol",
    [(signal.SIGTERM, "works"), *((signal.SIGUSR2, scontrol) for scontrol in ("works", "fails", "is absent"))],
)
def test_a_slurm_job_saves_first_and_is_requeued_when_its_time_ends(scripts, cluster, number, scontrol):
    (scripts / "main_pretrain.py").write_text(SAVER)
    if scontrol != "is absent":
        body = "echo busy >&2; exit 1" if scontrol == "fails" else f'echo "$@" > {cluster}/asked'
        (cluster / "scontrol").write_text(f"#!/bin/sh\n{body}\n")
        (cluster / "scontrol").chmod(stat.S_IRWXU)
    assert launch.main(shlex.split("--slurm --processes 1 --time 90"), scripts) == 0
    job = start_job(cluster)
    wait_for(scripts / "ready")
    os.kill(task_of(job), number)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + number and (scripts / "saved").exists() and "Traceback" not in said
    if number == signal.SIGTERM:
        assert "requeue" not in said and not (cluster / "asked").exists()
    elif scontrol == "works":
        assert (cluster / "asked").read_text() == "requeue 31\n" and "requeued job 31" in said
    else:
        assert f"not requeued: scontrol {'says' if scontrol == 'fails' else 'cannot be run'}" in said


def test_a_strange_job_number_is_not_handed_to_scontrol(cluster):
    assert "is no job's number" in launch._requeue("31; rm -rf /")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the task in /proc")
def test_a_requeued_job_continues(tmp_path, cluster, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = values("nnclr", "runs", data={"train_size": 1024}, max_epochs=2, knn={"enabled": False})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(content))
    line = "--slurm --processes 1 --time 90 --config-path . --config-name tiny.yaml resume=never"
    assert launch.main(shlex.split(line), ROOT) == 0
    (cluster / "scontrol").write_text("#!/bin/sh\n")
    (cluster / "scontrol").chmod(stat.S_IRWXU)
    job = start_job(cluster)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(task_of(job), signal.SIGUSR2)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGUSR2, said
    assert "SIGUSR2 at epoch 2" in said and "requeued job 31" in said
    (run_dir,) = (tmp_path / "runs").glob("nnclr-*")
    before = checkpoint.read(run_dir / "last.ckpt")["global_step"]
    again = start_job(cluster, SLURM_RESTART_COUNT="1")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert [path.name for path in (tmp_path / "runs").glob("nnclr-*")] == [run_dir.name]
    assert 128 < before < checkpoint.read(run_dir / "last.ckpt")["global_step"] == 256


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
    ended = forks.run([PYTHON, "launcher.py", "--gpsu", "2"], cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "config error: unknown flag --gpsu, did you mean '--gpus'?\n"


def test_dry_run_needs_no_torch():
    source = "import sys, solo.launch; print(sorted({'torch', 'hydra', 'pytorch_lightning'} & set(sys.modules)))"
    ended = subprocess.run([PYTHON, "-c", source], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
