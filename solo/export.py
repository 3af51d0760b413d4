"""From a checkpoint to a backbone: ours, solo-learn's, a plain state dict, or safetensors; and to a file of its own.

``python -m solo.export CHECKPOINT OUT.safetensors`` writes the weights alone, in a format that cannot hold code.
"""

import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from solo import backbones, checkpoint
from solo.backbones import BackboneConfig
from solo.config import bind, plain
from solo.console import quiet_libraries, say
from solo.errors import ConfigError, EnvironmentFault, Parser, reported
from solo.files import digest, write_file
from solo.reading import read_safetensors, read_tensors

_MAX_SIZE = 4096        # pixels of a side that a file may ask for
_DEEP = ("depth", "depths", "layers")
_FETCHES = {"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "checkpoint_path", "cache_dir", "device"}
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
        path: our checkpoint or a run's directory, solo-learn's checkpoint (``backbone.`` or ``encoder.`` keys), a
            backbone's plain state dict, or a ``.safetensors`` file of one.
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
    content = _read(path)
    experiment = checkpoint.provenance(content, path)["config"] if "solo" in content else {}
    weights = backbone_weights(content, path)
    config = _with_stem(_config(backbone, experiment, weights, path), weights)
    in_chans = next((w.shape[1] for w in weights.values() if w.ndim == 4), 3)
    image_size = image_size or _image_size(experiment, path)
    with torch.device("meta"):                  # nothing is allocated until the file is known to fit
        fitting = backbones.build(config, in_chans, image_size or 224).state_dict()
    if problem := checkpoint.misfit(fitting, weights):
        raise ConfigError(f"{path} does not fit backbone {config.name}: {problem}")
    model = backbones.build(config, in_chans, image_size or 224)
    model.load_state_dict(weights)
    return Pretrained(model.eval(), config, in_chans, image_size, experiment, path, digest(path))


def save_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Write the backbone's plain state dict, readable by ``torch.load(path, weights_only=True)`` anywhere."""
    buffer = io.BytesIO()
    torch.save(backbone.state_dict(), buffer)
    write_file(Path(path), buffer.getvalue())


def save_safetensors(source: Pretrained, path: str | Path) -> None:
    """Write the backbone's weights, and what `load_backbone` needs to know of them, without any pickle."""
    views = [{"crop_size": source.image_size}] if source.image_size else []
    config = {"backbone": plain(source.config), "augmentations": views}
    facts = {"method": "backbone", "config": config, "checkpoint_sha256": source.sha256}
    weights = {name: value.contiguous() for name, value in source.backbone.state_dict().items()}
    write_file(Path(path), save(weights, {"format": "pt", "solo": json.dumps(facts)}))


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


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        weights, facts = read_safetensors(path)
        return {"state_dict": {f"backbone.{name}": value for name, value in weights.items()}, **facts}
    content = read_tensors(path, stand_ins=True)
    return checkpoint.read(path) if "solo" in content else content      # ours: the checksum is verified


def _config(
    backbone: str | Mapping[str, Any] | None, experiment: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path
) -> BackboneConfig:
    """What the caller says over what the file says; another model than the file's starts from its defaults."""
    given = {"name": backbone} if isinstance(backbone, str) else dict(backbone or {})
    own = _own(experiment, weights, path)
    merged = {**(own if given.get("name") in (None, own.get("name")) else {}), **given}
    return bind(BackboneConfig, merged if "name" in merged else {**merged, "name": _infer(weights, path)}, "backbone")


def _own(experiment: Mapping[str, Any], weights: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The file's word on its backbone. It may neither fetch anything nor ask for a model that its weights cannot fill."""
    own = experiment.get("backbone", {})
    kwargs = own.get("kwargs", {}) if isinstance(own, dict) else None
    if not isinstance(kwargs, dict):
        raise ConfigError(f"{path} does not describe its backbone by a block of keys: name it with backbone.name=...")
    if fetched := sorted(_FETCHES & set(kwargs)):
        raise ConfigError(f"{path} asks for backbone.kwargs.{fetched[0]}, which a checkpoint may not")
    for key in _DEEP:
        blocks = kwargs.get(key, 0)
        blocks = sum(n for n in blocks if isinstance(n, int)) if isinstance(blocks, list) else blocks
        if isinstance(blocks, int) and blocks > len(weights):
            raise ConfigError(f"{path} asks for backbone.kwargs.{key}={kwargs[key]}, but holds {len(weights)} tensors")
    return {**own, "kwargs": {key: value for key, value in kwargs.items() if key != "pretrained"}}


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


def _image_size(experiment: Mapping[str, Any], path: Path) -> int | None:
    views = experiment.get("augmentations", [])
    try:
        sizes = [int(view["crop_size"]) for view in views]
    except (TypeError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not tell the size of its crops") from error
    if not all(0 < size <= _MAX_SIZE for size in sizes):
        raise ConfigError(f"{path} names crops that are not of 1 to {_MAX_SIZE} pixels")
    return max(sizes, default=None)


def main(argv: Sequence[str] | None = None) -> None:
    """The command.

    Raises:
        ConfigError: no such checkpoint, or another kind of file asked for.
        EnvironmentFault: the file cannot be written.
    """
    parser = Parser(prog="python -m solo.export", description=__doc__)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file or a run's directory")
    parser.add_argument("out", metavar="OUT.safetensors")
    parser.add_argument("--backbone", metavar="NAME", help="timm's name, where the checkpoint does not tell")
    options = parser.parse_args(argv)
    out = Path(options.out)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out} must end with .safetensors")
    source = load(options.checkpoint, options.backbone)
    try:
        save_safetensors(source, out)
    except OSError as error:
        raise EnvironmentFault(f"{out} cannot be written: {error.strerror}") from error
    say(f"{out}: {source.config.name}, {out.stat().st_size / 1e6:.1f} MB; solo.load_backbone({str(out)!r}) reads it")


if __name__ == "__main__":
    quiet_libraries()
    with reported():
        main()
