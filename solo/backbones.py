"""Any timm model as a feature extractor, and the small-image stem of ResNets."""

import inspect
import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, cast

import timm
import timm.models
import torch
from torch import nn

from solo.config import unknown_key
from solo.errors import ConfigError
from solo.ranges import require
from solo.registry import suggestion


@dataclass(kw_only=True)
class BackboneConfig:
    """A timm model by name.

    ``stem`` is for ResNets: ``small`` keeps the resolution of small images (3x3 convolution of stride 1, no pooling),
    ``small_pool`` the same convolution before timm's pooling, ``imagenet`` is timm's own, ``auto`` takes ``small`` up to
    64 pixels.
    """

    name: str = "resnet18"
    kwargs: dict[str, Any] = field(default_factory=dict)
    stem: Literal["auto", "small", "small_pool", "imagenet"] = "auto"
    # The published CIFAR recipes pad the 3x3 stem by 2, so that a 32-pixel image becomes 34x34 maps: numbers and
    # checkpoints compare only with the same maps. 1 keeps 32x32 and saves a fifth of the time.
    stem_padding: int = 2

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            raise ValueError(f"name: no timm model {self.name!r}{suggestion(self.name, timm.list_models())}")
        require(self, at_least_0="stem_padding")


def build(config: BackboneConfig, in_chans: int = 3, image_size: int = 224) -> nn.Module:
    """A module from images [B, in_chans, H, W] to features [B, dim] with ``.num_features`` = dim.

    Args:
        config: which model, and its stem.
        in_chans: image channels.
        image_size: pixels of a side, decides ``stem: auto`` and sizes models of a fixed grid.

    Raises:
        ConfigError: timm refuses the keyword arguments, or the model gives no features.
    """
    kwargs = dict(config.kwargs)
    for key in [key for key, value in kwargs.items() if value is None]:         # which timm leaves out unseen
        if key not in _arguments(config.name):
            raise ConfigError(unknown_key(key, "backbone.kwargs", _arguments(config.name)))
    for url in _addresses(kwargs) if kwargs.get("pretrained") else ():
        if not url.lower().startswith("https://"):
            raise ConfigError(f"backbone.kwargs: {url}: weights are fetched by https only")
    is_resnet = timm.models.is_model_in_modules(config.name, ["resnet"])
    if is_resnet:
        kwargs.setdefault("zero_init_last", False)              # as the published recipes; timm's default is True
    try:
        model = timm.create_model(config.name, num_classes=0, in_chans=in_chans, **kwargs)
    except Exception as error:                                  # each model has its own
        raise _unsuitable(config, error) from error
    small = config.stem.startswith("small") or (is_resnet and config.stem == "auto" and image_size <= 64)
    if small and not is_resnet:
        raise ConfigError(f"backbone.stem={config.stem} is for ResNets, not for {config.name}")
    if small:
        _small_stem(model, in_chans, config.stem_padding)
        if config.stem != "small_pool":
            model.maxpool = nn.Identity()
    expected = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if expected and tuple(expected) != (image_size, image_size):
        raise ConfigError(f"backbone {config.name} takes {expected[0]} px images but views have {image_size}: "
                          f"set backbone.kwargs.img_size={image_size}")
    # timm's own is the width before a head's last layer
    model.num_features = _width(config, model, in_chans, min(image_size, 64) if is_resnet else image_size)  # type: ignore[assignment]
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    if all(width % 16 == 0 for width in widths):                # others crash torch 2.14's backward on some CPUs
        model = model.to(memory_format=torch.channels_last)     # the fast layout of convolutions
    return model


def _addresses(kwargs: dict[str, Any]) -> list[str]:
    """Where timm is told to fetch weights from."""
    blocks = [kwargs.get(key) for key in ("pretrained_cfg", "pretrained_cfg_overlay")]
    return [str(block["url"]) for block in blocks if isinstance(block, dict) and block.get("url")]


def _unsuitable(config: BackboneConfig, error: Exception) -> ConfigError:
    named = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if named and named[1] in config.kwargs:
        return ConfigError(unknown_key(named[1], "backbone.kwargs", _arguments(config.name)))
    reason = " ".join(str(error).split()) or type(error).__name__
    return ConfigError(f"backbone.kwargs do not suit {config.name}: {reason}")


@cache
def _arguments(name: str) -> list[str]:
    """Of a timm model's class."""
    with torch.device("meta"):
        return sorted(set(inspect.signature(type(timm.create_model(name))).parameters) - {"num_classes", "in_chans", "kwargs"})


def _width(config: BackboneConfig, model: nn.Module, in_chans: int, image_size: int) -> int:
    """Features of one black image: some wrong keyword arguments only show then."""
    training = model.training
    try:
        with torch.no_grad():
            feats = model.eval()(torch.zeros(1, in_chans, image_size, image_size))                  # [1, dim]
    except Exception as error:                                  # likewise
        raise _unsuitable(config, error) from error
    finally:
        model.train(training)
    if not isinstance(feats, torch.Tensor) or feats.ndim != 2 or not feats.numel():
        got = list(feats.shape) if isinstance(feats, torch.Tensor) else type(feats).__name__
        raise ConfigError(f"backbone.kwargs do not suit {config.name}: features [1, dim] are needed, it gives {got}")
    return feats.shape[1]


def _small_stem(model: nn.Module, in_chans: int, padding: int) -> None:
    """Replace the 7x7 stride-2 convolution."""
    width = cast(nn.BatchNorm2d, model.bn1).num_features
    conv = nn.Conv2d(in_chans, width, kernel_size=3, stride=1, padding=padding, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = conv
