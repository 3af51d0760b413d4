"""What a checkpoint holds beside weights, held against what the run that continues it has itself.

Lightning restores these parts by place and by key, fails in the middle of it, or takes what is missing for a fresh start.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from solo.data.bad import is_state
from solo.methods import Method


def problem(content: Mapping[str, Any], method: Method, trainer: pl.Trainer) -> str:
    """The first reason why a run cannot go on exactly from this content; empty where it can."""
    return next(_problems(content, method, trainer), "")


def _problems(content: Mapping[str, Any], method: Method, trainer: pl.Trainer) -> Iterator[str]:
    if "loops" not in content and "optimizer_states" not in content:
        yield "it holds weights but no state of a training run"
    kinds = {"loops": {"fit_loop": {}}, "optimizer_states": [], "callbacks": {}, "DataModule": {}, "lr_schedulers": []}
    yield from _differences(kinds, content)
    yield from _differences(trainer.fit_loop.state_dict(), content["loops"]["fit_loop"], "loops.fit_loop")
    steps, optimizers = _steps(content["loops"]["fit_loop"]), content["optimizer_states"]
    if steps != content["global_step"]:
        yield f"it counts {steps} steps in its loops, and calls itself step {content['global_step']}"
    if len(optimizers) != 1:
        yield f"it holds the states of {len(optimizers)} optimizers, not of one"
    yield from _differences({"state": {}, "param_groups": []}, optimizers[0], "optimizer_states[0]")
    yield from _of_groups(method.parameter_groups(), **optimizers[0])
    callbacks = {each.state_key: each.state_dict() for each in trainer.callbacks}       # type: ignore[attr-defined]
    own = {key: state for key, state in callbacks.items() if state and key in content["callbacks"]}
    yield from _differences(own, content["callbacks"], "callbacks")
    if not is_state(content.get("unreadable", {})):
        yield "its list of unreadable images is damaged"
    precision = trainer.precision_plugin
    if (name := type(precision).__qualname__) in content:
        yield from _differences(precision.state_dict(), content[name], name)
    if not re.fullmatch(r"\d+(\.\d+)+\S*", str(content.get("pytorch-lightning_version"))):
        yield "it does not name the version of pytorch-lightning"


def _differences(own: Any, theirs: Any, name: str = "") -> Iterator[str]:
    """What a value lacks of another one's kind: keys, types, shapes of tensors; counts are not negative."""
    if isinstance(own, Mapping) and isinstance(theirs, Mapping):
        for key, value in own.items():
            place = f"{name}.{key}" if name else str(key)
            if key not in theirs:
                yield f"it lacks {place}"
            else:
                yield from _differences(value, theirs[key], place)
    elif isinstance(own, Tensor) and isinstance(theirs, Tensor):
        if own.shape != theirs.shape:
            yield f"{name} is of shape {list(theirs.shape)}, not {list(own.shape)}"
    elif type(own) is not type(theirs):
        yield f"{name} is {theirs!r:.60}, not of type {type(own).__name__}"
    elif isinstance(own, (int, float)) and theirs < 0:
        yield f"{name} is {theirs}"


def _steps(loop: Mapping[str, Any]) -> int:
    automatic = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    manual = loop["epoch_loop.manual_optimization.optim_step_progress"]
    return int(automatic["total"]["completed"] + manual["total"]["completed"])


def _of_groups(own: list[dict[str, Any]], state: Mapping[Any, Any], param_groups: list[Any], **_: Any) -> Iterator[str]:
    """Groups must be the same by name, in number and in order, as a state knows its parameter by its place only."""
    for place, group in enumerate(param_groups):
        yield from _differences({"params": []}, group, f"optimizer_states[0].param_groups[{place}]")
    saved = [f"{group.get('name')} ({len(group['params'])} tensors)" for group in param_groups]
    now = [f"{group['name']} ({len(group['params'])} tensors)" for group in own]
    if saved != now:
        yield f"its optimizer has the groups {', '.join(saved) or 'none'}, this run's {', '.join(now)}"
    places = [place for group in param_groups for place in group["params"]]
    for place, parameter in zip(places, [p for group in own for p in group["params"]], strict=True):
        yield from _differences({place: {}}, {place: state.get(place, {})}, "optimizer_states[0].state")
        for key, value in state.get(place, {}).items():
            if isinstance(value, Tensor) and value.numel() != 1:
                yield from _differences(parameter, value, f"optimizer_states[0].state.{place}.{key}")
            elif not isinstance(value, (Tensor, int, float, type(None))):
                yield f"optimizer_states[0].state.{place}.{key} is {value!r:.60}, no tensor"
