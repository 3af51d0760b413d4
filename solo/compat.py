"""What solo-learn's YAML files say in other words, in ours. Keys nothing reads there are named, not obeyed."""

from collections.abc import Callable
from typing import Any

# Keys that solo-learn's shipped files carry and no code of it reads, or that mean nothing here.
_IGNORED = {
    "scheduler.interval": "the schedule always advances per optimizer step",
    "momentum.classifier": "the probe follows the student",
    "method_kwargs.momentum_classifier": "nothing reads it",
    "augmentations_cfg": "nothing reads it",
    "wandb_cfg": "nothing reads it",
    "data.format": "the engine is chosen by data.engine",
    "data.preload": "the fast engine always keeps small images in memory",
    "auto_resume.max_hours": "a run is continued by its own directory, however old",
    "performance.disable_channel_last": "the memory format is chosen by the device",
    "knn_eval.features": "k-NN uses the backbone's features",
}


def _resume(values: dict[str, Any], block: dict[str, Any]) -> None:
    if "enabled" in block:
        values.setdefault("resume", "auto" if block.pop("enabled") else "never")


def _resume_path(values: dict[str, Any], path: Any) -> None:
    if path:
        values.setdefault("resume", path)


def _knn(values: dict[str, Any], block: dict[str, Any]) -> None:
    knn = values.setdefault("knn", {})
    for theirs, own in (("enabled", "enabled"), ("k", "k"), ("T", "temperature"), ("distance_func", "distance")):
        if theirs in block:
            value = block.pop(theirs)
            knn.setdefault(own, [value] if own == "k" and isinstance(value, int) else value)


_MOVED: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "auto_resume": _resume,
    "resume_from_checkpoint": _resume_path,
    "knn_eval": _knn,
}


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """solo-learn's keys moved to ours.

    Args:
        values: a composed config.

    Returns:
        The config, and a line for each key that is read by nobody.
    """
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    ignored = []
    for path, reason in _IGNORED.items():
        *parents, key = path.split(".")
        block = values.get(parents[0]) if parents else values
        if isinstance(block, dict) and key in block:
            del block[key]
            ignored.append(f"{path} is ignored: {reason}")
    for key, move in _MOVED.items():
        if key in values:
            block = values.pop(key)
            move(values, block)
            if isinstance(block, dict) and block:
                values[key] = block             # what is left is unknown, and will be named
    return values, ignored
