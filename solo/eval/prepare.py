"""What every offline evaluation begins with: a checkpoint's backbone, and the images to judge it on."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from solo.config import bind
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.module import DataModule
from solo.data.views import View
from solo.errors import ConfigError
from solo.export import Pretrained

_THE_USERS = ("download", "cache_dir")      # what would fetch and write; a file has no say in it


def data_config(source: Pretrained, overrides: Mapping[str, Any]) -> DataConfig:
    """The ``data`` block: the checkpoint's own, changed by ``overrides``; another dataset starts from its defaults.
    ``download`` and ``cache_dir`` are those of ``overrides`` alone.

    Raises:
        ConfigError: neither names a dataset.
    """
    own = source.experiment.get("data", {})
    named = own.get("dataset") if isinstance(own, dict) else None
    if "dataset" not in overrides and named is not None and named not in DATASETS:
        raise ConfigError(f"{source.path} names a plugin, {named!r} for images: data.dataset={named} says that you trust it")
    if "dataset" not in overrides and not own:
        raise ConfigError(f"data.dataset is missing: {source.path} does not say which images to evaluate on")
    default = DataConfig().dataset
    same = overrides.get("dataset", own.get("dataset", default)) == own.get("dataset", default)
    merged = {**({key: own[key] for key in own if key not in _THE_USERS} if same else {}), **overrides}
    for key in sorted(set(merged) - set(overrides)):
        if "${oc.env:" in str(merged[key]):
            raise ConfigError(f"{source.path} names data.{key}={merged[key]} only by where it came from: give data.{key}=...")
    return bind(DataConfig, merged, "data")


def data_module(
    source: Pretrained, config: DataConfig, views: Sequence[View], batch_size: int, seed: int = 5, judged: bool = True
) -> DataModule:
    """Images that fit the backbone and, where they are to be ``judged``, have labels and a validation part; training
    images without a label are then left out.

    Raises:
        ConfigError: there is no validation part, no label, or another number of channels.
    """
    if not views and source.image_size:
        config = dataclasses.replace(config, size=config.size or source.image_size)
    data = DataModule(config, views, batch_size, seed, labelled=judged)
    problems = []
    if judged and data.spec.classes < 2:
        problems.append(f"data.dataset={config.dataset} has {data.spec.classes} classes: accuracy needs labels of at least 2")
    if data.spec.in_chans != source.in_chans:
        problems.append(f"the backbone takes {source.in_chans} channels, the images have {data.spec.in_chans}: "
                        f"set data.in_chans={source.in_chans}")
    if problems:
        raise ConfigError("\n".join(problems))
    if judged:
        data.clean_loader(train=False)  # names data.val_path when there is nothing to judge by
    return data
