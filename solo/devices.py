"""The Trainer's arguments as this machine can take them, judged before anything starts."""

from typing import Any

import torch

from solo.console import say
from solo.errors import ConfigError, EnvironmentFault


def settle(trainer: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The arguments with what one process or a CPU makes pointless left out, and the number of processes.

    Args:
        trainer: Lightning's Trainer arguments under their own names.

    Raises:
        ConfigError: one line for each that cannot be meant.
        EnvironmentFault: there are fewer devices.
    """
    arguments = dict(trainer)
    kind = _kind(arguments.get("accelerator", "auto"))
    problems = _length(arguments)
    try:
        numbers = _numbers(arguments.get("devices", "auto"), kind)
    except ValueError as error:
        raise ConfigError("\n".join([*problems, str(error)])) from None
    gpus = torch.cuda.device_count()
    if kind == "gpu" and max(numbers) >= gpus:
        raise EnvironmentFault(f"devices={arguments['devices']}, but this machine has {gpus} GPUs: use devices={gpus} or fewer")
    processes = len(numbers) * int(arguments.get("num_nodes", 1))
    if arguments.get("sync_batchnorm") and processes > 1 and kind == "cpu":
        problems.append("sync_batchnorm=true works between GPUs only: on CPU use sync_batchnorm=false or devices=1")
    if problems:
        raise ConfigError("\n".join(problems))
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


def _kind(accelerator: Any) -> str:
    gpus = torch.cuda.device_count()
    if accelerator in ("gpu", "cuda") and not gpus:
        raise EnvironmentFault("accelerator=gpu, but this machine has no usable GPU: use accelerator=cpu or accelerator=auto")
    if accelerator == "auto":
        return "gpu" if gpus else "mps" if torch.backends.mps.is_available() else "cpu"
    return "gpu" if accelerator == "cuda" else str(accelerator)


def _numbers(devices: Any, kind: str) -> list[int]:
    """The devices' numbers; Lightning's forms: a count, a list, ``"0,1"``, ``auto`` and -1."""
    wanted: Any = devices
    if isinstance(wanted, str) and wanted != "auto":
        parts = [part.strip() for part in wanted.strip("[]").split(",") if part.strip()]
        if not all(part.lstrip("-").isdigit() for part in parts):
            raise ValueError(f"devices must be how many, a list of GPU numbers, or auto, got {devices!r}")
        wanted = [int(part) for part in parts] if "," in devices else int(devices)
    if wanted in ("auto", -1):
        return list(range(torch.cuda.device_count() if kind == "gpu" else 1))
    numbers = list(range(wanted)) if isinstance(wanted, int) and not isinstance(wanted, bool) else wanted
    if not isinstance(numbers, list) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"devices must be how many, a list of GPU numbers, or auto, got {devices!r}")
    if not numbers:
        raise ValueError(f"devices={devices}: a run needs at least one, e.g. devices=1")
    return numbers


def _length(arguments: dict[str, Any]) -> list[str]:
    """What is wrong with how long to train: schedules need an end."""
    epochs, steps = arguments.get("max_epochs", 1), arguments.get("max_steps", -1)
    ends = isinstance(steps, int) and steps > 0
    problems = [] if ends or steps == -1 else [f"max_steps must be at least 1, got {steps!r}"]
    if epochs in (None, -1) and not ends:
        problems.append(f"max_epochs={epochs} never ends, and the schedules need an end: give max_epochs or max_steps")
    elif epochs not in (None, -1) and (not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1):
        problems.append(f"max_epochs must be at least 1, got {epochs!r}")
    return problems
