"""The Trainer's arguments as this machine can take them, judged before anything starts."""

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch

from solo.config import bind
from solo.console import say
from solo.errors import ConfigError, EnvironmentFault
from solo.ranges import require

MAX_EPOCHS = 100        # where nothing is said
_STARTED = ("MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS")       # by which the nodes of a run find each other


@dataclass(kw_only=True)
class TrainerArguments:
    """What the Trainer's arguments may be; those that are not here are Lightning's to judge."""

    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"] = "auto"
    num_nodes: int = 1
    precision: Literal["32-true", "32", 32, "16-mixed", "16", 16, "bf16-mixed", "bf16", "16-true", "bf16-true"] | None = None
    fast_dev_run: bool | int = False
    min_epochs: int | None = None
    min_steps: int | None = None
    max_time: str | dict[str, int] | None = None
    limit_train_batches: float | None = None
    limit_val_batches: float | None = None
    overfit_batches: float = 0.0
    val_check_interval: float | str | dict[str, int] | None = None
    check_val_every_n_epoch: int | None = None
    num_sanity_val_steps: int = 0
    log_every_n_steps: int | None = None
    enable_model_summary: bool = False
    accumulate_grad_batches: int = 1
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: Literal["norm", "value"] | None = None
    deterministic: bool | Literal["warn"] | None = None
    benchmark: bool | None = None
    inference_mode: bool = True
    detect_anomaly: bool = False
    sync_batchnorm: bool = False
    reload_dataloaders_every_n_epochs: int = 0

    def __post_init__(self) -> None:
        time, interval = self.max_time, self.val_check_interval
        parts = time.split(":") if isinstance(time, str) else list((time or {}).values())
        also = [f"max_time must be positive, got {time}"] if parts and not any(str(part).strip("0") for part in parts) else []
        if isinstance(interval, (int, float)) and interval <= 0:
            also.append(f"val_check_interval must be positive, got {interval}")
        if self.num_sanity_val_steps < -1:
            also.append(f"num_sanity_val_steps must be at least -1, which means all, got {self.num_sanity_val_steps}")
        if self.gradient_clip_algorithm and not self.gradient_clip_val:
            also.append(f"gradient_clip_algorithm={self.gradient_clip_algorithm} clips nothing without gradient_clip_val")
        if self.overfit_batches and self.limit_train_batches is not None:
            also.append("overfit_batches and limit_train_batches both say how many batches an epoch has: use one of them")
        require(
            self, positive="limit_train_batches", at_least_1="num_nodes check_val_every_n_epoch accumulate_grad_batches",
            at_least_0="limit_val_batches overfit_batches log_every_n_steps gradient_clip_val min_epochs min_steps", also=also,
        )


def problems(trainer: dict[str, Any]) -> list[str]:
    """A line for each of the Trainer's arguments that cannot be meant, whatever the machine."""
    known = {field.name for field in dataclasses.fields(TrainerArguments)}
    found = _length(trainer)
    try:
        bind(TrainerArguments, {key: value for key, value in trainer.items() if key in known})
    except ConfigError as error:
        found += str(error).splitlines()
    return found


def settle(trainer: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The arguments with what one process or a CPU makes pointless left out, and the number of processes.

    Args:
        trainer: Lightning's Trainer arguments under their own names.

    Raises:
        ConfigError: one line for each that cannot be meant.
        EnvironmentFault: there are fewer devices.
    """
    if wrong := problems(trainer):
        raise ConfigError("\n".join(wrong))
    arguments = dict(trainer)
    kind = _kind(arguments.get("accelerator", "auto"))
    numbers = _numbers(arguments.get("devices", "auto"), kind)
    gpus = torch.cuda.device_count()
    if kind == "gpu" and max(numbers) >= gpus:
        raise EnvironmentFault(f"devices={arguments['devices']}, but this machine has {gpus} GPUs: use devices={gpus} or fewer")
    if kind == "cpu" and len(numbers) > (most := max(8, os.cpu_count() or 1)):
        raise EnvironmentFault(f"devices={arguments['devices']} processes on {os.cpu_count()} cores: "
                               f"use devices={most} or fewer")
    nodes = arguments.get("num_nodes", 1)
    processes = len(numbers) * nodes
    if nodes > 1 and not any(name in os.environ for name in _STARTED):
        raise ConfigError(f"num_nodes={nodes} needs the same command on each node: start it with launcher.py --nodes {nodes}, "
                          "torchrun or srun")
    if arguments.get("sync_batchnorm") and processes > 1 and kind == "cpu":
        raise ConfigError("sync_batchnorm=true works between GPUs only: on CPU use sync_batchnorm=false or devices=1")
    if processes > 1 and isinstance(interval := arguments.get("val_check_interval"), (str, dict)):
        raise ConfigError(f"val_check_interval={interval} is a time, which {processes} processes would each take from "
                          "their own clock: give a number of batches or a share of an epoch")
    if kind == "cpu":
        arguments["devices"] = len(numbers)
        if str(arguments.get("precision")) in ("16", "16-mixed"):
            say(f"precision={arguments['precision']}: a CPU computes in bfloat16 instead (bf16-mixed)")
            arguments["precision"] = "bf16-mixed"
    if processes == 1:
        arguments.pop("sync_batchnorm", None)
        if arguments.get("strategy") == "ddp":
            arguments["strategy"] = "auto"
    return arguments, processes


def torch_device(name: str | None) -> torch.device:
    """A device by torch's name; None: the GPU where there is one.

    Raises:
        EnvironmentFault: there is no such device.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise EnvironmentFault(f"device={name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _kind(accelerator: Any) -> str:
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not gpus:
        raise EnvironmentFault("accelerator=gpu, but this machine has no usable GPU: use accelerator=cpu or accelerator=auto")
    if accelerator == "auto":
        return "gpu" if gpus else "mps" if torch.backends.mps.is_available() else "cpu"
    return "gpu" if accelerator == "cuda" else str(accelerator)


def _numbers(devices: Any, kind: str) -> list[int]:
    """The devices' numbers; Lightning's forms: a count, a list, ``"0,1"``, ``auto`` and -1."""
    wanted = devices
    if isinstance(wanted, str) and wanted != "auto":
        parts = [part.strip() for part in wanted.strip("[]").split(",") if part.strip()]
        numeric = all(part.removeprefix("-").isdecimal() for part in parts)
        wanted = [int(part) for part in parts] if numeric and parts else None
        if wanted and "," not in devices and "[" not in devices:
            (wanted,) = wanted                          # "2" is a count
    if wanted in ("auto", -1):
        return list(range(torch.cuda.device_count() if kind == "gpu" else 1))
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        wanted = list(range(wanted))
    elif not isinstance(wanted, list) or not all(type(number) is int and number >= 0 for number in wanted):
        raise ConfigError(f"devices must be how many, a list of GPU numbers, or auto, got {devices!r}")
    if not wanted:
        raise ConfigError(f"devices={devices}: a run needs at least one, e.g. devices=1")
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"devices={devices} names a device twice")
    return wanted


def _length(arguments: dict[str, Any]) -> list[str]:
    """What is wrong with how long to train: schedules need an end."""
    epochs, steps = arguments.get("max_epochs", 1), arguments.get("max_steps", -1)
    ends = isinstance(steps, int) and steps > 0
    problems = [] if (ends and steps is not True) or steps == -1 else [f"max_steps must be at least 1, got {steps!r}"]
    if epochs in (None, -1) and not ends:
        problems.append(f"max_epochs={epochs} never ends, and the schedules need an end: give max_epochs or max_steps")
    elif epochs not in (None, -1) and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        problems.append(f"max_epochs must be at least 1, got {epochs!r}")
    return problems
