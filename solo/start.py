"""Where a run begins: anew, or at which checkpoint. Rank 0 decides, says so, and all follow."""

import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from solo import checkpoint, continuing, optim
from solo.console import say
from solo.dist import end_together, gather_text, rank, world_size
from solo.errors import ConfigError, EnvironmentFault, SoloError
from solo.experiment import Experiment, flat
from solo.files import sweep, try_folder, write_link
from solo.kernels.dispatch import runner
from solo.lease import owning
from solo.loggers import forget
from solo.methods import Method
from solo.names import checkpoints_near, there

_PATIENCE = 120.0       # seconds a shared file system may take to show a file to the other ranks
_DESCRIBED = 264        # bytes that a file of torch.save holds of a tensor besides its numbers: name, place and checksum
_REST = 10_000          # bytes of the config, of loops and of callbacks
_WEIGHTS = "the initial weights"
# What it keeps of a parameter, and where, depends on these.
_OF_THE_OPTIMIZERS_STATE = ("optimizer.name", *(f"optimizer.kwargs.{key}" for key in ("amsgrad", "fused", "capturable")))


@dataclass(frozen=True)
class Start:
    """How a run begins.

    Attributes:
        path: the checkpoint to continue from, None for a new run.
        complete: nothing is left to train.
        lease: what keeps other jobs out of the run's directory until it is closed.
    """

    path: Path | None
    complete: bool
    lease: ExitStack = field(default_factory=ExitStack)


def begin(config: Experiment, run_dir: Path, method: Method, trainer: pl.Trainer) -> Start:
    """Rank 0's decision, the same on every rank. "From scratch" is one, never a fallback.

    Args:
        config: the run.
        run_dir: its directory.
        method: what the checkpoint must fit.
        trainer: knows how long the run is; its processes have met.

    Raises:
        ConfigError: the checkpoint does not exist, is damaged, or belongs to something else.
        EnvironmentFault: a rank cannot see the file, another job owns the directory, or there is no room in it.
    """
    decided, error, lease = "", SoloError("refused by rank 0"), ExitStack()
    there_before = run_dir.parent.exists()
    if trainer.global_rank == 0:
        try:
            lease.enter_context(owning(run_dir))
            decided = json.dumps(_decide(config, run_dir, method, trainer))
        except SoloError as refused:
            error = refused
        except OSError as refused:
            error = EnvironmentFault(f"checkpoint.dir={config.checkpoint.dir} cannot be written: {refused.strerror}")
    decided = gather_text(decided, trainer.strategy.root_device)
    if not decided:
        lease.close()
        if not there_before:            # what is refused leaves nothing behind
            with suppress(OSError):
                run_dir.parent.rmdir()
        end_together(error)
    path, size, complete = json.loads(decided)
    if path is not None:
        _wait_for(Path(path), size)
    return Start(Path(path) if path else None, complete, lease)


def _decide(config: Experiment, run_dir: Path, method: Method, trainer: pl.Trainer) -> tuple[str | None, int, bool]:
    """The checkpoint's path and size, and whether nothing is left to train."""
    path, content = _choose(config, run_dir)
    if path is None:
        if config.checkpoint.enabled:
            _check_room(config, run_dir, method, path, trainer)
            _check_fallback(config)
        forget(run_dir)
        say(f"run directory: {run_dir} (new)")
        return None, 0, False
    provenance = checkpoint.provenance(content, path)
    if provenance["method"] != config.method:
        raise ConfigError(f"{path} was written by method {provenance['method']!r}, but method={config.method}")
    if problem := checkpoint.misfit(method.state_dict(), content["state_dict"]):
        raise ConfigError(f"{path} does not fit this model: {problem}")
    asked = [flat(content) for content in (provenance["config"], config.record())]
    for key in _OF_THE_OPTIMIZERS_STATE:
        then, now = (values.get(key) or None for values in asked)
        if then != now:
            raise ConfigError(f"{path} cannot be continued: it holds what an optimizer with {key}={then} kept, now it is {now}")
    if problem := continuing.problem(content, method, trainer):
        raise ConfigError(f"{path} cannot be continued: {problem}")
    complete = _complete(content, trainer)
    if config.checkpoint.enabled and not complete:
        _check_room(config, run_dir, method, path, trainer)
        _check_fallback(config)
    own = path.resolve().parent.parent == run_dir.resolve()
    if not own and not complete and not checkpoint.manifest(run_dir / "checkpoints"):
        forget(run_dir)
    doing = "complete with" if complete else "continuing" if own else "new, continuing"
    say(f"run directory: {run_dir} ({doing} {path.name if own else path}, epoch {content['epoch'] + 1}, "
        f"step {content['global_step']})")
    for key, (then, now) in config.changes(provenance["config"]).items():
        say(f"note: {key} is {now}, it was {then} when this checkpoint was saved")
    then, now = asked[0].get("optimizer.batch_size"), config.optimizer.batch_size
    steps = content.get("DataModule", {}).get("global_batch")
    if then not in (now, None) and steps == now * trainer.world_size:         # else the data refuse to go on
        say(f"note: each process takes {now} images of a step, it took {then} when this checkpoint was saved: the steps are of "
            "the same images, but statistics of BatchNorm and random numbers of networks are each process's own")
    trainer.strategy.checkpoint_io.judged[str(path)] = content  # type: ignore[attr-defined]
    return str(path), path.stat().st_size, complete


def alike(
    config: Experiment, device: torch.device | str = "cpu", images: str = "", method: torch.nn.Module | None = None
) -> None:
    """Hold every rank's config, code, torch, training images and initial weights against rank 0's.

    Weights to the bit, but between processors of different kinds, where rounding is only noted. What runs the kernels is a
    matter of what is installed, so it is refused. Secrets are compared and not shown; where a node keeps decoded images is
    its own affair.

    Args:
        config: this process's.
        device: see `gather_text`.
        images: `DataModule.listing`.
        method: as it was built, before anything is sent from rank to rank.

    Raises:
        ConfigError: on rank 0, naming what differs; the others leave.
    """
    if world_size() == 1:
        return
    state = method.state_dict() if method is not None else {}
    around = {
        "solo's code": _code(), "torch": torch.__version__, "kernels": runner(device), "the list of training images": images,
        _WEIGHTS: _fingerprint(state),
    }
    facts = {key: _digest(value) for key, value in {**flat(config.to_json()), **around}.items() if key != "data.cache_dir"}
    digests = gather_text(_digest(facts), device)
    if digests == digests[:64] * (len(digests) // 64):
        return
    own = json.dumps([facts, {**flat(config.record()), **around}, _processor(), _sums(state)], default=str)
    everyone = [json.loads(line) for line in gather_text(own + "\n", device).splitlines()]
    (ours, first, processor, sums), problems = everyone[0], []
    for other, (its, theirs, another, others) in enumerate(everyone):
        differ = [key for key in {**ours, **its} if ours.get(key) != its.get(key)]
        differ = [key for key in differ if key != _WEIGHTS] or differ       # which follow from the rest
        if differ == [_WEIGHTS] and another != processor and _near(sums, others):
            say(f"note: rank {other} rounds the initial weights otherwise: {another} (rank 0: {processor})")
            differ = []
        what = ", ".join(f"{key}={theirs.get(key)} (rank 0: {first.get(key)})" for key in differ[:5])
        problems += [f"rank {other} differs: {what}" + f" and {len(differ) - 5} more" * (len(differ) > 5)] if differ else []
    if problems:
        end_together(ConfigError("; ".join(problems[:3]) + f"; and {len(problems) - 3} more ranks" * (len(problems) > 3)))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """Of a state dict, to the bit."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _sums(state: Mapping[str, Tensor]) -> list[tuple[float, float]]:
    """Of each tensor its sum, and that of its absolute values."""
    return [(float(value.double().sum()), float(value.double().abs().sum())) for value in state.values()]


def _near(ours: list[tuple[float, float]], theirs: list[tuple[float, float]]) -> bool:
    """Whether tensors of these sums may be one another's but for rounding, which is 1e-7 of a number in float32."""
    if len(ours) != len(theirs):
        return False
    pairs = zip(ours, theirs, strict=True)
    return all(max(abs(total - other), abs(size - its)) <= 1e-5 * size for (total, size), (other, its) in pairs)


def _processor() -> str:
    """What numbers are drawn on: its instructions round otherwise than another's, and so may what a library does with them."""
    model = platform.processor() or platform.machine()
    with suppress(OSError):             # Linux; not every processor there has a name
        named = re.search(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = named[1] if named else model
    return f"{model} with {torch.backends.cpu.get_cpu_capability()}"


def _code() -> str:
    """Fingerprint of this library's source."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _choose(config: Experiment, run_dir: Path) -> tuple[Path | None, dict[str, Any]]:
    """The checkpoint to go on from and what it holds, whose checksum is computed once, just before it is loaded."""
    requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0         # the command's resume=never has been obeyed
    if config.resume == "never" and not requeued:
        if run_dir.exists():
            old = next(path for n in range(1, 10**6) if not (path := run_dir.with_name(f"{run_dir.name}.old{n}")).exists())
            run_dir.rename(old)
            say(f"resume=never: starting anew; the earlier run is now {old}")
        return None, {}
    sweep(run_dir)
    folder = run_dir / "checkpoints"
    own = checkpoint.newest(folder, checkpoint.repair(folder))
    link = run_dir / "last.ckpt"
    if own is not None and link.resolve() != own.resolve():     # a save was interrupted before its last move
        write_link(link, own.relative_to(run_dir))
    asked = own if config.resume in ("auto", "never") else checkpoint.resolve(config.resume, "resume")
    if asked is None:
        if os.path.lexists(link):
            raise ConfigError(f"{link} is there, but none of the checkpoints beside it: resume=FILE goes on from one; "
                              "where all are lost, remove it to start anew")
        return None, {}
    entries = checkpoint.manifest(folder) if own is not None else []
    if own is None or asked.resolve() not in {(folder / entry.file).resolve() for entry in entries}:
        try:
            given = checkpoint.read(asked)
        except ConfigError as error:
            raise ConfigError(f"{error}{there(checkpoints_near(asked))}") from error
        if own is None or given["global_step"] > entries[-1].step:
            return asked, given
        del given                       # it may be large, and so is the one that is read next
    if own.resolve() != asked.resolve():
        say(f"resume={config.resume}: this run has gone on from there")
    return own, checkpoint.read(own, verified=True)


def _estimate(config: Experiment, method: Method) -> int:
    """Bytes of a checkpoint: its tensors, what describes each of them, and the rest."""
    trained = [p for p in method.parameters() if p.requires_grad]
    states, others = optim.states_per_parameter(config.optimizer)
    tensors = [*method.state_dict().values(), *trained * states]
    described = len(tensors) + len(trained) * others
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + _DESCRIBED * described + _REST


def _check_room(config: Experiment, run_dir: Path, method: Method, path: Path | None, trainer: pl.Trainer) -> None:
    """All that will lie in the run's folder must fit beside what does.

    Raises:
        EnvironmentFault: it does not.
    """
    size = _estimate(config, method) if path is None else path.stat().st_size
    there = len(list(run_dir.glob("checkpoints/*.ckpt")))
    other_end = trainer.max_steps > 0 or trainer.max_epochs == -1 or config.trainer.get("max_time") is not None
    most = config.checkpoint.most(None if other_end else trainer.max_epochs)
    needed, free = size * max(most - there, 1), shutil.disk_usage(run_dir.parent).free
    if free < needed:
        raise EnvironmentFault(f"{run_dir} has no room for checkpoints: {needed / 1e6:.1f} MB needed, {free / 1e6:.1f} MB free")


def _check_fallback(config: Experiment) -> None:
    """The day it is needed is too late to learn that it cannot be written.

    Raises:
        EnvironmentFault: it cannot.
    """
    if config.checkpoint.fallback:
        try:
            try_folder(Path(config.checkpoint.fallback))
        except OSError as error:
            problem = f"checkpoint.fallback={config.checkpoint.fallback} cannot be written: {error.strerror or error}"
            raise EnvironmentFault(problem) from error


def _complete(content: dict[str, Any], trainer: pl.Trainer) -> bool:
    done = content["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    return bool(done >= (trainer.max_epochs or 0) > 0 or content["global_step"] >= trainer.max_steps > 0)


def _wait_for(path: Path, size: int) -> None:
    """Until this process sees what rank 0 saw: shared file systems lag."""
    deadline = time.monotonic() + _PATIENCE
    while not path.is_file() or path.stat().st_size != size:
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"rank {rank()} does not see {path}, which rank 0 does: all nodes need one file system")
        time.sleep(0.1)
