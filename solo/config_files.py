"""The YAML files of a config, judged before Hydra uses them: data only, of bounded size, below the config's own folder.

Hydra's own block can start programs (``hydra.callbacks``, ``hydra.job_logging``, ``hydra.searchpath: [pkg://...]``), so a
file may set only the few keys of it that name folders. Whoever types a command may say anything in it.
"""

import os
from pathlib import PurePosixPath
from typing import Any

import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from solo.errors import ConfigError

_MAX_BYTES = 1 << 20
_MAX_NODES = 100_000                    # with every alias written out
_MAX_DEPTH = 32
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge")} | {None, "!"}
_HYDRA_KEYS = {"output_subdir", "run", "sweep", "mode", "verbose"}
_HYDRA_GROUPS = ("hydra/job_logging", "hydra/hydra_logging")


class CheckedFiles(FileConfigSource):
    """Hydra's source of files, for files that are judged first."""

    def load_config(self, config_path: str) -> ConfigResult:
        parts = PurePosixPath(os.path.normpath(config_path)).parts
        if {"/", ".."} & set(parts) or "hydra" in (part.removesuffix(".yaml") for part in parts):
            raise ConfigError(f"config file {config_path} does not lie below {self.path}, or in a folder called hydra")
        file = os.path.join(self.path, self._normalize_file_name(config_path))
        try:
            check_yaml(file)
            result: ConfigResult = super().load_config(config_path)
            content = OmegaConf.to_container(result.config, resolve=False)
        except yaml.YAMLError as error:
            raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
        except (UnicodeDecodeError, OSError, OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())[:300]}") from error
        if isinstance(result.config, DictConfig) and isinstance(content, dict):
            _check_hydra(file, content, str(result.header.get("package")))
        return result


def install() -> None:
    """Let Hydra read files through `CheckedFiles`."""
    Plugins.instance()                  # registers its own source first
    SourcesRegistry.instance().types["file"] = CheckedFiles


def check_yaml(file: str) -> None:
    """Raise `ConfigError` where a YAML file is too large, its aliases written out as well, or holds more than plain values."""
    with open(file, "rb") as opened:
        text = opened.read(_MAX_BYTES + 1)
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{file} is larger than {_MAX_BYTES >> 20} MiB, which no config is")
    sizes: dict[str, int] = {}
    blocks: list[tuple[str | None, int]] = [(None, 0)]          # (anchor, nodes so far) of each block around
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if (tag := getattr(event, "tag", None)) not in _TAGS:
            raise ConfigError(f"{file}:{event.start_mark.line + 1} holds the tag {tag}: a config holds plain values only")
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            blocks.append((event.anchor, 1))
            continue
        if isinstance(event, yaml.AliasEvent):
            nodes, anchor = sizes.get(event.anchor, _MAX_NODES), None
        elif isinstance(event, yaml.ScalarEvent):
            nodes, anchor = 1, event.anchor
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            anchor, nodes = blocks.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = nodes
        blocks[-1] = (blocks[-1][0], blocks[-1][1] + nodes)
        if blocks[-1][1] >= _MAX_NODES or len(blocks) > _MAX_DEPTH:
            raise ConfigError(f"{file}:{event.start_mark.line + 1} is larger or deeper than a config can be")


def _check_hydra(file: str, content: dict[Any, Any], package: str) -> None:
    own = content.get("hydra")
    problems = [f"hydra.{key}" for key in (own if isinstance(own, dict) else [])] if own is not None else []
    problems = [key for key in problems if key.removeprefix("hydra.") not in _HYDRA_KEYS]
    if own is not None and not isinstance(own, dict):
        problems.append("hydra")
    if "hydra" in package:
        problems.append(f"@package {package}")
    defaults = content.get("defaults") or []
    for entry in defaults if isinstance(defaults, list) else [defaults]:
        problems += [f"defaults: {entry}" for word, value in _choices(entry) if not _harmless(word, str(value))]
    if problems:
        raise ConfigError(f"{file} sets {problems[0]}: a file may not, say it on the command line if it is meant")


def _choices(entry: Any) -> list[tuple[str, Any]]:
    """(group, option) of a line of a defaults list."""
    if isinstance(entry, dict):
        return [(str(word), value) for word, value in entry.items()]
    return [("", entry)]


def _harmless(word: str, value: str) -> bool:
    group, _, package = word.partition("@")
    group = group.removeprefix("override ").removeprefix("optional ").strip().strip("/")
    name, _, moved = value.partition("@")
    places = [*group.split("/"), *name.split("/")]
    if any("hydra" in part or "${" in part for part in (package, moved)) or "://" in value or ".." in places:
        return False
    if "hydra" in places:
        return group in _HYDRA_GROUPS and value in ("disabled", "none", "default", "stdout", "None")
    return not os.path.isabs(name)
