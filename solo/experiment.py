"""The schema of an experiment: every key a YAML file or a command line may hold."""

import dataclasses
import hashlib
import inspect
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytorch_lightning as pl

from solo import devices
from solo.backbones import BackboneConfig
from solo.batching import Mode
from solo.callbacks.checkpoint import CheckpointConfig
from solo.callbacks.health import HealthConfig
from solo.callbacks.knn import KNNConfig
from solo.callbacks.probe import ProbeConfig
from solo.compat import translate
from solo.config import bind, plain
from solo.console import say
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.views import View, expand
from solo.errors import ConfigError
from solo.eval.report import ReportConfig
from solo.methods import METHODS
from solo.nn import Momentum
from solo.optim import OptimizerConfig
from solo.redaction import redacted
from solo.schedules import SchedulerConfig

# Trainer arguments that a run decides itself.
_OWNED = {
    "self",
    "logger",
    "callbacks",
    "plugins",
    "enable_checkpointing",
    "use_distributed_sampler",
    "default_root_dir",
    "enable_progress_bar",
    "barebones",
    "model_registry",
    "trainer",
}
TRAINER_ARGUMENTS = frozenset(inspect.signature(pl.Trainer.__init__).parameters) - _OWNED
SHORTEST = 8.0      # seconds of step_timeout, within twice which all processes have left


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases; needs the extra ``wandb``."""

    enabled: bool = False
    project: str = "solo"
    entity: str | None = None
    offline: bool = False


@dataclass(kw_only=True)
class Experiment:
    """A whole run.

    ``method_kwargs`` is an instance of the method's own ``Config``. ``momentum`` is handed to methods with a teacher;
    null trains without one where a method can.
    ``view_batching``: ``concat`` runs all views of one size as one batch, with BatchNorm still per view (`solo.batching`).
    ``micro_batch``: images that pass the backbone at a time; the gradient stays that of the whole batch.
    ``compile``: ``torch.compile`` of backbone and heads, which takes a minute before the first step.
    ``auto_batch_size`` and ``auto_lr`` search for ``optimizer.batch_size`` and ``optimizer.lr`` first (`solo.tuning`).
    ``step_timeout``: seconds after which several processes give up on one that does not answer, at least 8; all have left
    within twice that time.
    ``trainer`` holds what is passed to Lightning's Trainer under its own names. ``extra`` is for the user's own keys.
    """

    method: str
    name: str | None = None
    method_kwargs: Any = field(default_factory=dict)
    momentum: dict[str, Any] | None = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augmentations: list[View]
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    view_batching: Mode = "separate"
    micro_batch: int | None = None
    compile: bool = False
    auto_batch_size: bool = False
    auto_lr: bool = False
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    knn: KNNConfig = field(default_factory=KNNConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    resume: str = "auto"
    loggers: list[Literal["csv", "tensorboard", "mlflow", "comet"]] = field(default_factory=lambda: ["csv", "tensorboard"])
    wandb: WandbConfig = field(default_factory=WandbConfig)
    seed: int = 5
    step_timeout: float = 300.0
    extra: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = []
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.name):
            problems.append(f"name may hold letters, digits, '_', and behind the first '.' and '-', got {self.name!r}")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed must lie in [0, 2**32), got {self.seed}")
        if self.step_timeout < SHORTEST:
            problems.append(f"step_timeout must be at least {SHORTEST:g} s, got {self.step_timeout:g}: behind it, those that "
                            "wait need up to 6 s to tell who is missing")
        if sum(view.num_crops for view in self.augmentations) < 1:
            problems.append("augmentations must list at least one view")
        if len(set(self.loggers)) < len(self.loggers):
            problems.append(f"loggers names one twice: {', '.join(self.loggers)}")
        if self.micro_batch is not None and self.micro_batch < 1:
            problems.append(f"micro_batch must be at least 1, got {self.micro_batch}")
        elif self.micro_batch and self.optimizer.batch_size % self.micro_batch and not self.auto_batch_size:
            problems.append(f"micro_batch={self.micro_batch} does not divide optimizer.batch_size={self.optimizer.batch_size}")
        if self.micro_batch and self.view_batching == "concat":
            problems.append("micro_batch takes views apart and view_batching=concat puts them together: use one of them")
        if problems:
            raise ValueError("\n".join(problems))

    def to_json(self) -> dict[str, Any]:
        """Plain values that `experiment` accepts again."""
        content: dict[str, Any] = plain(self)
        trainer = content.pop("trainer")
        return {**content, **trainer}

    def record(self) -> dict[str, Any]:
        """`to_json` without secrets; names and words of the schema stay, as they are needed to build a backbone again."""
        return _with_words(redacted(self.to_json()), self)

    def run_dir(self, global_batch: int) -> Path:
        """``<checkpoint.dir>/<name>-<hash>``: the hash covers whatever changes what is learned.

        Args:
            global_batch: images per step over all processes; stands for devices, nodes and ``optimizer.batch_size``.
        """
        text = json.dumps({**_learned(self.to_json()), "global_batch": global_batch}, sort_keys=True)
        return Path(self.checkpoint.dir) / f"{self.title}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def changes(self, other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Keys that change what is learned or its rounding and differ from another config: (its value, this one's).

        Neither is shown with its secrets; where the other config has them, as older records do, they are compared.
        """
        theirs, shown, own, record = (
            flat(_learned(content, _ROUNDING)) for content in (other, redacted(other), self.to_json(), self.record())
        )
        changed = (key for key in sorted({*theirs, *own}) if theirs.get(key) not in (own.get(key), record.get(key)))
        return {key: (shown.get(key), record.get(key)) for key in changed}

    @property
    def title(self) -> str:
        """The run's name: given, or method and dataset."""
        return self.name or f"{self.method.rpartition(':')[2]}-{self.data.dataset.rpartition(':')[2]}"


_NOT_LEARNED = (
    *("name", "checkpoint", "report", "resume", "loggers", "wandb", "knn", "health", "probe", "extra"),
    *("view_batching", "compile", "auto_batch_size", "auto_lr", "step_timeout"),
    *("accelerator", "devices", "num_nodes", "strategy", "log_every_n_steps", "enable_model_summary", "profiler"),
    *("limit_val_batches", "limit_test_batches", "limit_predict_batches", "check_val_every_n_epoch", "val_check_interval"),
    *("num_sanity_val_steps", "detect_anomaly", "benchmark", "deterministic", "inference_mode"),
)
_NOT_LEARNED_INSIDE = (
    ("data", "num_workers"),
    ("data", "threads"),
    ("data", "kernel"),
    ("data", "cache_dir"),
    ("data", "timeout"),
    ("data", "download"),
    ("data", "accept_changed"),
    ("data", "val_path"),
    ("optimizer", "batch_size"),
)
# None of these names another run; a run that goes on with another value says so.
_ROUNDING = ("probe", "view_batching", "compile", "accelerator", "strategy", "deterministic", "benchmark", "kernel")


def _with_words(shown: Any, thing: Any) -> Any:
    """What is shown of a dataclass, with the texts that cannot be secrets: names that are looked up, and choices of a few."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        hints = get_type_hints(type(thing))
        for key in set(hints) & set(shown):
            own = getattr(thing, key)
            place = f"backbone.{key}" if isinstance(thing, BackboneConfig) else ""
            word = place or key in _LOOKED_UP or "Literal[" in str(hints[key])
            shown[key] = redacted(plain(own), environment=False, key=place) if word else _with_words(shown[key], own)
    elif isinstance(thing, list) and isinstance(shown, list):
        return [_with_words(part, own) for part, own in zip(shown, thing, strict=True)]
    return shown


_LOOKED_UP = ("method", "name", "dataset")


def _learned(content: dict[str, Any], also: Collection[str] = ()) -> dict[str, Any]:
    """The part of a config that decides what is learned, and these keys; the batch counts through the global batch."""
    content = {key: dict(value) if isinstance(value, dict) else value for key, value in content.items()}
    for key in set(_NOT_LEARNED) - set(also):
        content.pop(key, None)
    for block, key in _NOT_LEARNED_INSIDE:
        if key not in also and isinstance(content.get(block), dict):
            content[block].pop(key, None)
    return content


def flat(content: Any, path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    if not isinstance(content, dict):
        return {path: content}
    found: dict[str, Any] = {}
    for name, part in content.items():
        found |= flat(part, f"{path}.{name}" if path else name)
    return found


def experiment(values: dict[str, Any]) -> Experiment:
    """Bind a composed config, strictly.

    Raises:
        ConfigError: one line for everything that is wrong with it.
    """
    values, ignored, problems = translate(values)
    for line in ignored:
        say(line)
    trainer = {key: values.pop(key) for key in list(values) if key in TRAINER_ARGUMENTS}
    owned = [key for key in values if key in _OWNED]
    problems += [f"{key} is decided by the run itself and cannot be set" for key in owned]
    values = {key: value for key, value in values.items() if key not in owned}
    given = values.pop("method_kwargs", None) or {}
    momentum = values.pop("momentum", _ABSENT)
    bound: Experiment | None = None
    try:
        bound = bind(Experiment, values, also_known=[*TRAINER_ARGUMENTS, "method_kwargs", "momentum"])
    except ConfigError as error:
        problems += str(error).splitlines()
    problems += devices.problems(trainer)
    kwargs = _method_kwargs(values.get("method"), given, momentum, problems)
    problems += _unknown_dataset(values)
    if bound is not None and kwargs is not None:
        problems += _augmented_originals(bound)
    if problems or bound is None:
        raise ConfigError("\n".join(problems))
    kept = None if momentum is _ABSENT else momentum
    return dataclasses.replace(bound, method_kwargs=kwargs, momentum=kept, trainer=trainer)


_ABSENT = object()


def schema_of(method: str) -> type[Any]:
    """The dataclass of a method's own keys.

    Raises:
        ConfigError: there is no such method, or it has none.
    """
    schema = getattr(METHODS[method], "Config", None)
    if not dataclasses.is_dataclass(schema) or not isinstance(schema, type):
        raise ConfigError(f"{method!r} is no method: it has no Config dataclass")
    return schema


def _method_kwargs(method: Any, given: Any, momentum: Any, problems: list[str]) -> Any:
    if not isinstance(method, str):
        return None
    try:
        schema = schema_of(method)
        if momentum is not _ABSENT and isinstance(given, dict):
            given = _with_momentum(method, schema, given, momentum)
        return bind(schema, given, "method_kwargs")
    except ConfigError as error:
        prefix = "" if str(error).startswith(("method_kwargs", "unknown key", "missing key", "momentum")) else "method: "
        problems += [prefix + line for line in str(error).splitlines()]
        return None


def _augmented_originals(config: Experiment) -> list[str]:
    """What is wrong with the views that the method takes as images that are not augmented."""
    count = METHODS[config.method].originals
    if not any(view.augments for view in expand(config.augmentations)[:count]):
        return []
    first = "first view" if count == 1 else f"first {count} views"
    return [f"augmentations: the {first} of {config.method} must be the image as it is: rrc: {{enabled: false}}, nothing else"]


def _with_momentum(method: str, schema: type, given: dict[str, Any], momentum: Any) -> dict[str, Any]:
    """``method_kwargs`` with the block ``momentum``, which stands beside it; null takes the teacher away."""
    own = next((field for field in dataclasses.fields(schema) if field.name == "momentum"), None)
    if momentum is None and (own is None or "momentum" in given):       # a run's own config.json says it inside
        return given
    if momentum is None:
        if type(None) not in get_args(get_type_hints(schema)["momentum"]):
            raise ConfigError(f"momentum=null would take the teacher away, and {method} does not work without one")
        return {**given, "momentum": None}
    if own is None:
        bind(Momentum, momentum, "momentum")                            # it must at least be right
        say(f"momentum is ignored: {method} has no teacher")
        return given
    if isinstance(momentum, dict) and own.default_factory is not dataclasses.MISSING:
        momentum = {**plain(own.default_factory()), **momentum}
    return {**given, "momentum": bind(Momentum, momentum, "momentum")}


def _unknown_dataset(values: dict[str, Any]) -> list[str]:
    data = values.get("data")
    name = data.get("dataset") if isinstance(data, dict) else None
    if not isinstance(name, str):
        return []
    try:
        DATASETS[name]
    except ConfigError as error:
        return [f"data.dataset: {error}"]
    return []
