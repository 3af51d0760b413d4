"""From YAML files and a command line to typed dataclasses.

Hydra composes files and overrides; `bind` then checks every key and value against a dataclass and reports all
problems at once. Defaults live in the dataclasses and nowhere else.
"""

import dataclasses
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin
from uuid import uuid4

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from solo import config_files
from solo.errors import ConfigError, debug, reported
from solo.names import nearest
from solo.redaction import remember

T = TypeVar("T")

_MAX_GROWTH = 2e7       # characters that interpolations may make of a config, at worst
_hints = lru_cache(maxsize=256)(typing.get_type_hints)
config_files.install()


def _environment(key: str, *default: Any) -> Any:
    """OmegaConf's ``${oc.env:KEY}``, which records name and do not quote."""
    value = oc.env(key, *default)
    if isinstance(value, str) and key in os.environ:
        remember(value, key)
    return value


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def bind(schema: type[T], values: dict[str, Any], path: str = "", also_known: Iterable[str] = ()) -> T:
    """Build a dataclass from plain values, strictly.

    Args:
        schema: the dataclass; nested dataclasses, lists, tuples, dictionaries, ``Literal`` and unions are followed.
        values: what YAML and command line said.
        path: prefix of the key names in errors.
        also_known: key names of the top level that somebody else binds, offered as suggestions.

    Raises:
        ConfigError: one line for each unknown key, wrong type, missing key and refused value.
    """
    problems: list[str] = []
    bound = _bind_dataclass(schema, values, path, problems, also_known)
    if problems:
        raise ConfigError("\n".join(problems))
    return typing.cast(T, bound)


def plain(thing: Any) -> Any:
    """The inverse of `bind`: dataclasses become dictionaries, ready for YAML or JSON."""
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        return {field.name: plain(getattr(thing, field.name)) for field in dataclasses.fields(thing)}
    if isinstance(thing, dict):
        return {key: plain(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [plain(value) for value in thing]
    return thing


def unknown_key(key: str, path: str, known: Iterable[str]) -> str:
    """The line for a key that is not known, with the nearest one that is."""
    if near := nearest(key, known):
        return f"unknown key {_join(path, key)}: did you mean {_join(path, near)}?"
    return f"unknown key {_join(path, key)} (known: {', '.join(known)})"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _bind_dataclass(schema: type, values: Any, path: str, problems: list[str], also_known: Iterable[str] = ()) -> Any:
    if dataclasses.is_dataclass(values):
        return values
    if not isinstance(values, dict):
        problems.append(f"{path or 'the config'} must be a block of keys, got {values!r}")
        return None
    hints = _hints(schema)
    fields = {field.name: field for field in dataclasses.fields(schema)}
    before = len(problems)
    problems += [unknown_key(str(key), path, [*fields, *also_known]) for key in values if key not in fields]
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _bind_value(hints[name], values[name], _join(path, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"missing key {_join(path, name)}")
    if len(problems) > before:
        return None
    try:
        return schema(**arguments)
    except ValueError as error:
        problems += [_join(path, line) for line in str(error).splitlines()]
        return None


def _bind_value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    found: list[str] = [f"{path} must be {_type_name(hint)}, got {value!r}"] if len(options) > 1 else []
    for option in options:
        trial: list[str] = []
        bound = _bind_option(option, value, path, trial)
        if not trial:
            return bound
        if len(options) == 1 or _shaped(option, value):     # its parts are wrong, not its kind
            found = trial
    problems += found
    return None


def _shaped(hint: Any, value: Any) -> bool:
    """Whether a value is the block or the list that a type asks for, whatever is inside."""
    if isinstance(value, dict):
        return dataclasses.is_dataclass(hint)
    return get_origin(hint) is list and isinstance(value, list)


def _bind_option(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return _bind_dataclass(typing.cast(type, hint), value, path, problems)
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        if origin is tuple and Ellipsis not in args:
            if len(args) != len(value):
                problems.append(f"{path} must have {len(args)} values, got {len(value)}")
                return None
            return tuple(_bind_value(a, v, f"{path}[{i}]", problems) for i, (a, v) in enumerate(zip(args, value, strict=True)))
        return origin(_bind_value(args[0], v, f"{path}[{i}]", problems) for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _bind_value(args[1], v, _join(path, str(key)), problems) for key, v in value.items()}
    if origin is Literal and value in args and not isinstance(value, bool):
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint in (str, bool) and type(value) is hint:
        return value
    if hint in (None, type(None)) and value is None:
        return None
    problems.append(f"{path} must be {_type_name(hint)}, got {value!r}{_literal_hint(hint, value)}")
    return None


def _literal_hint(hint: Any, value: Any) -> str:
    if get_origin(hint) is not Literal:
        return ""
    near = nearest(str(value), map(str, get_args(hint)))
    return f": did you mean {near}?" if near else ""


def _type_name(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(dict.fromkeys(map(str, args)))
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(option) for option in args)
    if hint in (None, type(None)):
        return "null"
    if dataclasses.is_dataclass(hint):
        return "a block of keys"
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if origin in (list, tuple):
        return "a list"
    if origin is dict:
        return "a block of keys"
    return names.get(hint, str(hint))


def load(path: str | Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Compose one YAML file with its ``defaults`` list and overrides, as the command line would, into plain values.

    Raises:
        ConfigError: the file is missing or does not compose.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"config file {path} does not exist{_nearest_file(file)}")
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(file.parent), version_base="1.3"):
            arguments = _all_forced(list(overrides), file.parent)
            return values(hydra.compose(file.name, overrides=[*_QUIET, *arguments]))
    except HydraException as error:
        raise ConfigError(_one_line(error)) from error
    except RecursionError as error:
        raise ConfigError(_CIRCLE) from error


def values(config: DictConfig) -> dict[str, Any]:
    """Resolved plain values of a composed config, without Hydra's own node.

    Raises:
        ConfigError: an interpolation does not resolve or a mandatory value is missing.
    """
    config = config.copy()
    with open_dict(config):
        config.update(config.pop(_INSTEAD, {}))
    text = OmegaConf.to_yaml(config)
    if len(text) * 3 ** (text.count("${") / 3) > _MAX_GROWTH:       # each of n can stand in another: at most 3 ** (n / 3) fold
        raise ConfigError(f"{text.count('${')} interpolations ${{...}} could make the config grow beyond all bounds: use fewer")
    try:
        missing = sorted(key for key in OmegaConf.missing_keys(config) if not key.startswith("hydra."))
        content = OmegaConf.to_container(config, resolve=True, throw_on_missing=not missing)
    except OmegaConfBaseException as error:
        raise ConfigError(_one_line(error)) from error
    if missing:
        raise ConfigError("\n".join(f"{key} has to be given: add {key}=..." for key in missing))
    assert isinstance(content, dict)
    content.pop("hydra", None)
    return {str(key): value for key, value in content.items()}


def main(config_path: str, config_name: str | None = None) -> Callable[[Callable[[dict[str, Any]], None]], Callable[[], None]]:
    """Decorator that turns ``task(values)`` into a command with Hydra's command line.

    ``key=value`` works for every key of the schema, written in the YAML or not; ``-m``, ``--cfg job``,
    ``--config-path`` (relative to the working directory) and ``--config-name`` are Hydra's own.

    Args:
        config_path: folder of the YAML files, relative to the script, used without ``--config-path``.
        config_name: file used without ``--config-name``.
    """

    def decorate(task: Callable[[dict[str, Any]], None]) -> Callable[[], None]:
        script_dir = Path(task.__code__.co_filename).resolve().parent

        def command() -> None:
            original = list(sys.argv)

            begun = False

            def run(config: DictConfig) -> None:
                nonlocal begun
                begun = True
                sys.argv[:] = original  # Lightning starts further ranks with this command line
                with reported():
                    task(values(config))

            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and does not print them in its own way
            with reported():
                directory, sys.argv[1:] = _arguments(original[1:], script_dir / config_path, config_name)
                try:
                    hydra.main(version_base="1.3", config_path=str(directory), config_name=config_name)(run)()
                except (HydraException, OmegaConfBaseException) as error:
                    raise ConfigError(_one_line(error)) from error
                except (RecursionError, OSError) as error:      # of the composing, or of a folder that Hydra is told to make
                    if begun:
                        raise
                    raise ConfigError(_CIRCLE if isinstance(error, RecursionError) else _one_line(error)) from error

        return command

    return decorate


_BLOCKS = re.compile(r"\[\s*\{")
_INSTEAD = f"values_{uuid4().hex}"      # given in the place of a file, whose name Hydra would look for
_CIRCLE = "the defaults lists of the config files name each other in a circle"

# Hydra writes no folders and no logs of its own: a run's files live in the run's directory.
_QUIET = ["hydra.output_subdir=null", "hydra.run.dir=.", "hydra/job_logging=none", "hydra/hydra_logging=none"]
_SWEEP = ["hydra.sweep.dir=.", "hydra.sweep.subdir=."]
_OF_CFG, _OF_INFO = ("job", "hydra", "all"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_FLAGS_WITH_VALUE: dict[str, Sequence[str]] = {                     # and what they may be, where it is not a name
    **dict.fromkeys(("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p"), ()),
    **dict.fromkeys(("--cfg", "-c"), _OF_CFG),
    **dict.fromkeys(("--info", "-i"), _OF_INFO),
}
_FLAGS = {
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion", "-sc"),
    "--debug",
}


def _arguments(argv: list[str], directory: Path, config_name: str | None) -> tuple[Path, list[str]]:
    """Hydra's arguments from the user's: the config folder found and checked, every override made to fit any key."""
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            overrides.append(word)
            continue
        if name in _FLAGS_WITH_VALUE and not equals:
            value = next(words, "")
        if name not in _FLAGS and name not in _FLAGS_WITH_VALUE:
            near = nearest(name, (*_FLAGS, *_FLAGS_WITH_VALUE))
            raise ConfigError(f"unknown flag {name}" + (f", did you mean {near}?" if near else ""))
        choices = _FLAGS_WITH_VALUE.get(name, [value])
        if name in _FLAGS_WITH_VALUE and (not value or choices and value not in choices):
            raise ConfigError(f"{name} needs {'one of ' + ', '.join(choices) if choices else 'a value'}, got {value!r}")
        if name in ("--config-path", "-cp"):
            directory = Path(value).resolve()
        elif name in ("--config-name", "-cn"):
            config_name = value
        elif name == "--debug":
            debug()
        elif name in _FLAGS_WITH_VALUE:
            flags += [name, value]
        else:
            flags.append(word)
    if config_name is not None:
        file = directory / (config_name if config_name.endswith(".yaml") else f"{config_name}.yaml")
        if not file.is_file():
            raise ConfigError(f"--config-name {config_name}: {file} does not exist{_nearest_file(file)}")
        flags += ["--config-name", file.name]
    multirun = _SWEEP if {"-m", "--multirun"} & set(flags) else []
    return directory, [*flags, *_QUIET, *multirun, *_all_forced(overrides, directory)]


def _all_forced(overrides: Sequence[str], directory: Path) -> list[str]:
    """Each as `_forced` makes it; a list of blocks in the place of a file is applied last, so nothing else may change it."""
    keys = [override.partition("=")[0].lstrip("+~").partition("@")[0] for override in overrides]
    for override, key in zip(overrides, keys, strict=True):
        if (directory / key).is_dir() and _BLOCKS.match(override.partition("=")[2]):
            if other := [o for o, k in zip(overrides, keys, strict=True) if o is not override and k.split(".")[0] == key]:
                raise ConfigError(f"{override} and {other[0]} change the same: give one of them")
    return [_forced(override, directory) for override in overrides]


def _forced(override: str, directory: Path) -> str:
    """``a.b=c`` as ``++a.b=c``, so that a key the YAML leaves out can be set; the schema judges it afterwards."""
    key, equals, value = override.partition("=")
    if (not equals and not key.startswith("~")) or not key.strip("+~"):
        raise ConfigError(f"{override!r} is not an override: write key=value")
    group = directory / key.lstrip("+~").partition("@")[0]
    if key.startswith(("~", "hydra.", "hydra/")):
        return override
    if group.is_dir():
        return _readable(f"++{_INSTEAD}.{key.lstrip('+')}={value}") if _BLOCKS.match(value) else override
    return _readable("++" + override.lstrip("+"))


def _readable(override: str) -> str:
    """A value that Hydra's grammar has no reading for, such as a path with ``=``, ``'`` or letters beyond ASCII, as text."""
    try:
        OverridesParser.create().parse_override(override)
        return override
    except HydraException:
        key, _, value = override.partition("=")
        value = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
        return f"{key}='{value}'"


def _nearest_file(file: Path) -> str:
    if not file.parent.is_dir():
        return f" (no folder {file.parent})"
    names = sorted(path.name for path in file.parent.glob("*.yaml"))
    near = nearest(file.name, names)
    return f", did you mean {near}?" if near else f" (there: {', '.join(names) or 'no .yaml file'})"


def _one_line(error: Exception) -> str:
    cause = f": {str(error.__cause__).splitlines()[0]}" if isinstance(error.__cause__, OmegaConfBaseException) else ""
    return re.sub(r"\s*\n\s*", "; ", str(error).strip()) + cause
