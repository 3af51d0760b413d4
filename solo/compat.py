"""What solo-learn's YAML files say in other words, in ours. Keys nothing reads there are named, not obeyed."""

from collections.abc import Callable
from typing import Any

from solo.config import unknown_key

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


# Keys with another name here.
_MOVED: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "resume_from_checkpoint": ("resume", str),
    "auto_resume.enabled": ("resume", lambda enabled: {True: "auto", False: "never"}.get(enabled, enabled)),
    "knn_eval.enabled": ("knn.enabled", lambda value: value),
    "knn_eval.k": ("knn.k", lambda k: [k] if isinstance(k, int) else k),
    "knn_eval.T": ("knn.temperature", lambda value: value),
    "knn_eval.distance_func": ("knn.distance", lambda value: value),
}
# The data sets that solo-learn reads from HDF5 files when data.format is h5.
_IN_HDF5 = ("imagenet", "imagenet100")
# Blocks that exist there only: whatever else they hold is unknown.
_THEIRS = ("auto_resume", "knn_eval", "performance")


def translate(values: dict[str, Any]) -> tuple[dict[str, Any], list[str], list[str]]:
    """solo-learn's keys moved to ours; a key given in our words as well keeps that value.

    Args:
        values: a composed config, left as it is.

    Returns:
        The config, a line for each key that is read by nobody or differently, and a line for each that is unknown.
    """
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    ignored = _in_hdf5(values)
    ignored += [f"{path} is ignored: {reason}" for path, reason in _IGNORED.items() if _take(values, path) is not _ABSENT]
    for path, (own, convert) in _MOVED.items():
        value = _take(values, path)
        if value is not _ABSENT and value is not None:
            _give(values, own, convert(value))
    known = [*_IGNORED, *_MOVED]
    unknown = []
    for name in _THEIRS:
        block = values.pop(name, None) or {}
        if not isinstance(block, dict):
            unknown.append(f"{name} must be a block of keys, got {block!r}")
            continue
        inside = [path.removeprefix(f"{name}.") for path in known if path.startswith(f"{name}.")]
        unknown += [unknown_key(key, name, inside) for key in block]
    return values, ignored, unknown


def _in_hdf5(values: dict[str, Any]) -> list[str]:
    """Say ``data.format: h5`` as ``data.dataset: hdf5``; the line that tells it, where it was said."""
    data = values.get("data")
    if not isinstance(data, dict) or data.get("format") != "h5" or data.get("dataset") not in _IN_HDF5:
        return []
    del data["format"]
    data["dataset"] = "hdf5"
    return ["data.format=h5 is read as data.dataset=hdf5: every class in the file, also where that is more than ImageNet-100"]


_ABSENT = object()


def _take(values: dict[str, Any], path: str) -> Any:
    """Remove a key and return its value."""
    *parents, key = path.split(".")
    block = values.get(parents[0]) if parents else values
    return block.pop(key, _ABSENT) if isinstance(block, dict) else _ABSENT


def _give(values: dict[str, Any], path: str, value: Any) -> None:
    *parents, key = path.split(".")
    block = values.setdefault(parents[0], {}) if parents else values
    if isinstance(block, dict):
        block.setdefault(key, value)
