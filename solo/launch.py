"""Starts a training or evaluation script: in one process, under torchrun on one or several nodes, or as a SLURM job."""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from solo.errors import SIGNALS, ConfigError, EnvironmentFault, Parser, hearing
from solo.registry import suggestion

PRETRAIN = "main_pretrain.py"
QUICK_START = ["--config-name", "all4one.yaml"]
# Hydra's flags that make sense behind a launcher; everything else with a dash is ours or a mistake.
HYDRA_FLAGS = {
    "--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd", "--cfg", "-c", "--package", "-p",
    "--info", "-i", "--multirun", "-m", "--resolve",
}
TORCHRUN = ("-m", "solo.torchrun", "--signals-to-handle=" + ",".join(number.name for number in SIGNALS))
LIBRARY = str(Path(__file__).resolve().parent.parent)       # what we start imports it, also where it is not installed
WARNING = 120        # seconds between the signal that a SLURM job has to end and its end


def main(argv: Sequence[str], root: Path) -> int:
    """Run the launcher's command line.

    Args:
        argv: the words after ``launcher.py``.
        root: folder of the ``main_*.py`` scripts.

    Returns:
        The child's exit code; 128 + n where signal n ended it; 0 for ``--dry-run`` and a submitted job.

    Raises:
        ConfigError: an unknown flag, contradicting arguments, no such script.
        EnvironmentFault: too few GPUs here, no SLURM, no submitit.
    """
    parser = _make_parser()
    options, rest = parser.parse_known_args(argv)
    _check(options, rest, parser)
    command = _command(options, rest, root)
    job = _job(options) if options.slurm else None
    if options.dry_run:
        if job:
            flags = [f"--{name.replace('_', '-')}={value}" for name, value in job.items()]
            print("sbatch " + shlex.join([*flags, f"--signal=USR2@{WARNING}", "--requeue"]))
        print(shlex.join(["srun", *command] if job else command))
        return 0
    if job:
        print(f"submitted job {_submit(command, job, options.logs)}, its output goes to {options.logs}")
        return 0
    if options.gpus:
        _require_gpus(options.gpus)
    return run(command)


def run(command: Sequence[str], own_session: bool = True) -> int:
    """Run a command, hand it every signal that asks this process to end, wait, and return its exit code.

    Args:
        command: the words.
        own_session: a terminal's Ctrl-C reaches the child once, through us, and not a second time from the terminal.
    """
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    library = os.pathsep.join([LIBRARY, *filter(None, [os.environ.get("PYTHONPATH")])])
    with hearing(forward):
        child = subprocess.Popen(command, start_new_session=own_session, env={**os.environ, "PYTHONPATH": library})
        for number in early:
            child.send_signal(number)
        code = child.wait()
    return 128 - code if code < 0 else code


@dataclass(frozen=True)
class Job:
    """What submitit runs in each task of a SLURM job: the command, and the job again after a signal to save.

    submitit's own handlers would act while the command still runs, and end it before it has saved.

    Attributes:
        command: the words.
    """

    command: tuple[str, ...]

    def __call__(self) -> None:
        code = run(self.command, own_session=False)
        if code - 128 in (signal.SIGUSR1, signal.SIGUSR2) and os.environ.get("SLURM_PROCID", "0") == "0":
            print(_requeue(os.environ.get("SLURM_JOB_ID", "")), file=sys.stderr)
        if code:
            raise SystemExit(code)          # no traceback, and the trainer's code is the job's


def _requeue(job: str) -> str:
    """Ask SLURM to start the job again; what came of it, in words."""
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"not requeued: SLURM_JOB_ID={job!r} is no job's number; submit the same command to continue"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not requeued: scontrol cannot be run ({error}); submit the same command to continue"
    if done.returncode:
        return f"not requeued: scontrol says {' '.join(done.stderr.split())!r}; submit the same command to continue"
    return f"requeued job {job}: it continues from its checkpoint"


def _make_parser() -> Parser:
    parser = Parser(
        prog="launcher.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python launcher.py [flags] [--config-path DIR] [--config-name FILE] [key=value ...]",
        description="Starts a script on one device, several GPUs, several nodes or SLURM.\n"
                    "With nothing named it runs All4One's quick start on one device.",
    )
    parser.add_argument("--script", default=PRETRAIN, help="what to run (default: %(default)s)")
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs, on each node")
    parser.add_argument("--processes", type=int, metavar="N", help="processes without a GPU, on each node")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="start the same command on each, or use --slurm")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="one of the nodes (default: $MASTER_ADDR:$MASTER_PORT)")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and end")
    slurm = parser.add_argument_group("SLURM, through submitit")
    slurm.add_argument("--slurm", action="store_true", help="submit a job in place of running here")
    slurm.add_argument("--partition", help="passed to sbatch, as the next three")
    slurm.add_argument("--account")
    slurm.add_argument("--qos")
    slurm.add_argument("--constraint")
    slurm.add_argument("--time", help="limit: minutes or [days-]HH:MM:SS")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="CPU cores of each process")
    slurm.add_argument("--mem-gb", type=int, metavar="N", help="memory of each node")
    slurm.add_argument("--logs", default="runs/slurm", metavar="DIR", help="folder of the jobs' output (default: %(default)s)")
    return parser


def _check(options: argparse.Namespace, rest: Sequence[str], parser: Parser) -> None:
    ours = [flag for action in parser._actions for flag in action.option_strings]
    problems = [f"unknown flag {word}{suggestion(word, [*ours, *HYDRA_FLAGS])}" for word in _unknown(rest)]
    for name in ("gpus", "processes", "nodes", "cpus_per_task", "mem_gb"):
        if (value := getattr(options, name)) is not None and value < 1:
            problems.append(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    workers = options.gpus or options.processes
    if options.gpus and options.processes:
        problems.append("--gpus and --processes exclude each other: a process has a GPU or it has none")
    if (options.nodes > 1 or options.slurm) and not workers:
        problems.append(f"{'--slurm' if options.slurm else '--nodes'} needs --gpus N or --processes N: how many on each node")
    given = {word.lstrip("+").partition("=")[0] for word in rest}
    for key in sorted(given & {"accelerator", "devices", "num_nodes"} if workers else ()):
        problems.append(f"{key} is decided by --gpus, --processes and --nodes: leave out {key}=...")
    if options.slurm and not options.time:
        problems.append("--slurm needs --time, in minutes or as [days-]HH:MM:SS")
    if not options.slurm:
        for name in ("partition", "account", "qos", "constraint", "time", "cpus_per_task", "mem_gb"):
            if getattr(options, name) is not None:
                problems.append(f"--{name.replace('_', '-')} is for SLURM jobs: add --slurm")
    if problems:
        raise ConfigError("\n".join(problems))


def _unknown(words: Iterable[str]) -> list[str]:
    return [name for word in words if word.startswith("-") and (name := word.partition("=")[0]) not in HYDRA_FLAGS]


def _command(options: argparse.Namespace, rest: Sequence[str], root: Path) -> list[str]:
    script = options.script if Path(options.script).is_file() else str(root / options.script)
    if not Path(script).is_file():
        scripts = [path.name for path in root.glob("main_*.py")]
        raise ConfigError(f"--script {options.script} does not exist{suggestion(options.script, scripts)}")
    words = ["--debug"] * options.debug + list(rest)
    named = {word.partition("=")[0] for word in words} & {"--config-name", "-cn"}
    if Path(script).name == PRETRAIN and not named:
        words = [*QUICK_START, *words]
    workers = options.gpus or options.processes
    if not workers:
        return [sys.executable, script, *words]
    words += [f"accelerator={'gpu' if options.gpus else 'cpu'}", f"devices={workers}", f"num_nodes={options.nodes}"]
    if options.slurm or workers == options.nodes == 1:      # SLURM starts the processes itself
        return [sys.executable, script, *words]
    torchrun = [sys.executable, *TORCHRUN, f"--nproc-per-node={workers}"]
    if options.nodes == 1:
        return [*torchrun, "--standalone", script, *words]
    meeting = ["--rdzv-backend=c10d", "--rdzv-id=solo", f"--rdzv-endpoint={_rendezvous(options.rendezvous)}"]
    return [*torchrun, f"--nnodes={options.nodes}", *meeting, script, *words]


def _rendezvous(given: str | None) -> str:
    if not given and "MASTER_ADDR" in os.environ:
        given = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '29500')}"
    if not given:
        raise ConfigError("--nodes needs --rendezvous HOST:PORT, the same on every node, or MASTER_ADDR in the environment")
    if not re.fullmatch(r"[\w.\-\[\]:]+:\d+", given):
        raise ConfigError(f"--rendezvous must be HOST:PORT, got {given!r}")
    return given


def _require_gpus(count: int) -> None:
    import torch  # seconds of import that only this question needs

    available = torch.cuda.device_count()
    if count > available:
        raise EnvironmentFault(f"--gpus {count}: this machine has {available}, use --gpus {available}" if available else
                               f"--gpus {count}: torch finds no GPU on this machine, use --processes N for CPU processes")


def _job(options: argparse.Namespace) -> dict[str, str | int]:
    """What sbatch is asked for, under sbatch's own names."""
    workers = options.gpus or options.processes
    job = {
        "job_name": "solo", "nodes": options.nodes, "ntasks_per_node": workers, "gpus_per_node": options.gpus,
        "cpus_per_task": options.cpus_per_task, "mem": options.mem_gb and f"{options.mem_gb}GB",
        "time": options.time and _minutes(options.time), "partition": options.partition, "account": options.account,
        "qos": options.qos, "constraint": options.constraint,
    }
    for name in ("partition", "account", "qos", "constraint"):      # these end up as lines of a shell script
        if job[name] and not re.fullmatch(r"[A-Za-z0-9_.,:&|@+\-]+", job[name]):
            raise ConfigError(f"--{name} must be a plain word, got {job[name]!r}")
    return {name: value for name, value in job.items() if value}


def _minutes(text: str) -> int:
    match = re.fullmatch(r"(?P<plain>\d+)|(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)", text)
    if not match:
        raise ConfigError(f"--time must be minutes or [days-]HH:MM:SS, got {text!r}")
    part = {name: int(value or 0) for name, value in match.groupdict().items()}
    minutes = part["plain"] + 60 * (24 * part["days"] + part["hours"]) + part["minutes"] + (part["seconds"] > 0)
    if not minutes:
        raise ConfigError("--time must be at least a minute")
    return minutes


def _submit(command: list[str], job: dict[str, str | int], logs: str) -> str:
    try:
        import submitit
    except ImportError:
        raise EnvironmentFault("--slurm needs submitit: pip install 'solo-ssl[slurm]'") from None
    try:
        executor = submitit.SlurmExecutor(folder=logs)
    except RuntimeError as error:
        raise EnvironmentFault(f"--slurm: {error}") from error
    setup = [f"export PYTHONPATH={shlex.quote(LIBRARY)}${{PYTHONPATH:+:$PYTHONPATH}}"]
    executor.update_parameters(**job, signal_delay_s=WARNING, setup=setup, additional_parameters={"requeue": True})
    try:
        return str(executor.submit(Job(tuple(command))).job_id)
    except (RuntimeError, OSError) as error:      # sbatch refused
        raise EnvironmentFault(f"--slurm: {' '.join(str(error).split())}") from error
