"""From a checkpoint to a backbone: ours, solo-learn's, or a plain state dict."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from solo import backbones, checkpoint
from solo.backbones import BackboneConfig
from solo.config import bind
from solo.errors import ConfigError
from solo.files import write_file

_INFERRED = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A backbone and where it comes from.

    Attributes:
        backbone: [B, in_chans, H, W] -> [B, dim], in eval mode, on the CPU.
        config: how it was built.
        in_chans: image channels.
        image_size: pixels of a side it was trained with, None where the file does not tell.
        experiment: the plain config it was trained with; empty for foreign files.
        path: the checkpoint.
        sha256: of the file.
    """

    backbone: nn.Module
    config: BackboneConfig
    in_chans: int
    image_size: int | None
    experiment: dict[str, Any]
    path: Path
    sha256: str


def load_backbone(
    path: str | Path, backbone: str | Mapping[str, Any] | None = None, image_size: int | None = None
) -> nn.Module:
    """The backbone of a checkpoint, in eval mode: images [B, C, H, W] to features [B, dim].

    Args:
        path: our checkpoint or a run's directory, solo-learn's checkpoint (``backbone.`` or ``encoder.`` keys), or a
            backbone's plain state dict.
        backbone: timm name, or keys of `BackboneConfig` that change what the file says; the name is needed where the
            file does not tell and it is no plain ResNet.
        image_size: pixels of a side, for models of a fixed grid.

    Raises:
        ConfigError: the file is missing, damaged or no checkpoint, or its keys do not fit; the keys are listed.
    """
    return load(path, backbone, image_size).backbone


def load(path: str | Path, backbone: str | Mapping[str, Any] | None = None, image_size: int | None = None) -> Pretrained:
    """As `load_backbone`, with the config and the hash of the checkpoint."""
    path = checkpoint.resolve(path)
    content = read_foreign(path)
    experiment: dict[str, Any] = {}
    if "solo" in content:
        content = checkpoint.read(path)  # ours: the checksum is verified
        experiment = json.loads(content["solo"])["config"]
    weights = backbone_weights(content, path)
    config = _with_stem(_config(backbone, experiment, weights, path), weights)
    in_chans = next((w.shape[1] for w in weights.values() if w.ndim == 4), 3)
    image_size = image_size or _image_size(experiment)
    model = backbones.build(config, in_chans, image_size or 224)
    if problem := checkpoint.misfit(model.state_dict(), weights):
        raise ConfigError(f"{path} does not fit backbone {config.name}: {problem}")
    model.load_state_dict(weights)
    return Pretrained(model.eval(), config, in_chans, image_size, experiment, path, checkpoint.digest(path))


def save_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Write the backbone's plain state dict, readable by ``torch.load(path, weights_only=True)`` anywhere."""
    buffer = io.BytesIO()
    torch.save(backbone.state_dict(), buffer)
    write_file(Path(path), buffer.getvalue())


class _Inert:
    """Stands for every object of a foreign file that is neither tensor nor plain container: nothing of it is run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def read_foreign(path: str | Path) -> dict[str, Any]:
    """The content of any ``torch.save`` file without running anything it names.

    Config objects, callbacks and the like (solo-learn's files hold some) come back as empty stand-ins.

    Raises:
        ConfigError: it is no checkpoint that can be read this way.
    """
    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        with torch.serialization.safe_globals([(_Inert, name) for name in named]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for files that are damaged, unsafe or something else
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a checkpoint: {reason[:200]}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def backbone_weights(content: Mapping[str, Any], path: str | Path = "checkpoint") -> dict[str, Tensor]:
    """The backbone's state dict out of a checkpoint's content.

    Keys must begin with ``backbone.`` or ``encoder.`` (``transformer_encoder.`` is another module); a dictionary of
    tensors without either is taken as a backbone's own.

    Raises:
        ConfigError: there is no backbone in it.
    """
    state = content.get("state_dict", content)
    state = state if isinstance(state, Mapping) else {}
    for prefix in ("backbone.", "encoder."):
        found = {name[len(prefix):]: value for name, value in state.items() if str(name).startswith(prefix)}
        if found:
            break
    else:
        found = {} if "state_dict" in content else dict(state)
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        seen = ", ".join(sorted({str(name).split(".")[0] for name in state})[:8]) or "nothing"
        raise ConfigError(f"{path} holds no backbone: no key begins with backbone. or encoder. (it has {seen})")
    return found


def _config(
    backbone: str | Mapping[str, Any] | None, experiment: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> BackboneConfig:
    """What the caller says over what the file says; another model than the file's starts from its defaults."""
    given = {"name": backbone} if isinstance(backbone, str) else dict(backbone or {})
    own = experiment.get("backbone", {})
    merged = {**(own if given.get("name") in (None, own.get("name")) else {}), **given}
    return bind(BackboneConfig, merged if "name" in merged else {**merged, "name": _infer(weights, path)}, "backbone")


def _infer(weights: Mapping[str, Tensor], path: Path) -> str:
    """The plain ResNet whose keys these are."""
    for name in _INFERRED:
        with torch.device("meta"):
            if backbones.build(BackboneConfig(name=name)).state_dict().keys() == weights.keys():
                return name
    raise ConfigError(f"{path} does not say which backbone it holds: name it with backbone.name=... (a timm model)")


def _with_stem(config: BackboneConfig, weights: Mapping[str, Tensor]) -> BackboneConfig:
    """``stem: auto`` decided by the stem that was saved."""
    stem = weights.get("conv1.weight")
    if config.stem != "auto" or stem is None or stem.ndim != 4:
        return config
    return dataclasses.replace(config, stem="small" if stem.shape[-1] == 3 else "imagenet")


def _image_size(experiment: Mapping[str, Any]) -> int | None:
    return max((int(view["crop_size"]) for view in experiment.get("augmentations", [])), default=None)
