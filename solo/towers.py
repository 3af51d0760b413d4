"""Frozen image towers to distil from: any timm model, or the image side of an open_clip model."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import timm
import timm.data
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled
from timm.layers import to_2tuple
from torch import Tensor, nn

from solo import checkpoint
from solo.errors import ConfigError, EnvironmentFault
from solo.reading import read_tensors
from solo.registry import suggestion


@dataclass(kw_only=True)
class TowerConfig:
    """A pretrained tower by name.

    Attributes:
        library: ``timm``, or ``open_clip`` (the extra ``clip``).
        name: of the model in its library; a timm name may end with the tag of its weights.
        tag: of open_clip's weights, e.g. ``laion400m_e32``; beside a file, of those whose normalisation and activation it has.
        weights: file with the tower's plain state dict, read instead of fetching the library's weights.
    """

    library: Literal["timm", "open_clip"] = "timm"
    name: str
    tag: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.library == "timm" and not timm.is_model(self.name):
            raise ValueError(f"name: no timm model {self.name!r}{suggestion(self.name, timm.list_models())}")
        if self.library == "timm" and self.tag is not None:
            raise ValueError(f"tag is open_clip's; timm's weights are part of the name: {self.name}.{self.tag}")
        if self.library == "open_clip" and self.tag is None and self.weights is None:
            raise ValueError("an open_clip tower needs the tag of its weights or a file: tag=... or weights=...")


class _Parts(NamedTuple):
    """A model [B, 3, *size] -> [B, F], which may come first in a tuple, and what its images look like."""

    model: nn.Module
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]


class Tower(nn.Module):
    """Images [B, C, H, W] of pixels in 0..1 to the tower's features [B, F], constants.

    Images are resized (bilinear) and normalised as the tower's own training was. Its weights come from its name each
    time: they are neither trained nor part of a state dict, which holds their fingerprint instead.

    Raises:
        ConfigError: the name, the tag or the file is wrong; or, on loading a state dict, it was written with another tower.
        EnvironmentFault: the library is missing or its weights cannot be fetched.
    """

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.config = config
        parts = _LIBRARIES[config.library](config)
        if config.weights is not None:
            state = read_tensors(config.weights)
            if problem := checkpoint.misfit(parts.model.state_dict(), state):
                raise ConfigError(f"{config.weights} does not fit the teacher {config.name}: {problem}")
            parts.model.load_state_dict(state)
        self.size = parts.size
        self._model = (parts.model.eval().requires_grad_(False),)       # a tuple: neither saved nor set to train
        self._mean, self._std = (torch.tensor(each).view(-1, 1, 1) for each in (parts.mean, parts.std))
        self._fingerprint = _fingerprint(parts)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        x = F.interpolate(pixels, self.size, mode="bilinear", align_corners=False)
        features = self._model[0]((x - self._mean) / self._std)         # grey images become three channels here
        if isinstance(features, tuple):                                 # pooled, and the tokens
            features = features[0]
        if features.dim() != 2:
            raise ConfigError(f"the teacher {self.config.name} makes {list(features.shape)} of images {list(x.shape)}, "
                              f"not features [images, numbers]: choose another")
        return features

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Tower":
        super()._apply(fn, recurse)
        self._model[0]._apply(fn)
        self._mean, self._std = fn(self._mean), fn(self._std)
        return self

    def get_extra_state(self) -> Tensor:
        return self._fingerprint

    def set_extra_state(self, state: Tensor) -> None:
        if not torch.equal(state.cpu(), self._fingerprint):
            raise ConfigError(f"the weights of the teacher {self.config.name} are not those this checkpoint was trained with")


def _timm(config: TowerConfig) -> _Parts:
    model = _fetched(config, lambda: timm.create_model(config.name, pretrained=config.weights is None, num_classes=0))
    facts = timm.data.resolve_model_data_config(model)
    return _Parts(model, facts["input_size"][1:], facts["mean"], facts["std"])


def _open_clip(config: TowerConfig) -> _Parts:
    try:
        import open_clip
    except ImportError as error:
        raise EnvironmentFault("a teacher of open_clip needs open_clip_torch: pip install 'solo-ssl[clip]'") from error
    for what, value, known in (
        ("name", config.name, open_clip.list_models()),
        ("tag", config.tag, open_clip.list_pretrained_tags_by_model(config.name)),
    ):
        if value is not None and value not in known:
            hint = suggestion(value, known) or f" (known: {', '.join(known)})"
            raise ConfigError(f"the teacher's {what}: no {value!r} in open_clip{hint}")
    tags = [config.tag] if config.tag else open_clip.list_pretrained_tags_by_model(config.name)
    rows = [open_clip.get_pretrained_cfg(config.name, tag) for tag in tags] or [{}]
    normalisations = [{key: row.get(key) for key in ("mean", "std")} for row in rows]
    if any(each != normalisations[0] for each in normalisations):
        raise ConfigError(f"weights of {config.name} differ in their normalisation: give the teacher's tag beside its file")
    visual = _fetched(config, lambda: open_clip.create_model(
        config.name, pretrained=None if config.weights else config.tag, force_preprocess_cfg=normalisations[0],
        force_quick_gelu=bool(config.tag and rows[0].get("quick_gelu")),
    )).visual
    facts = visual.preprocess_cfg
    return _Parts(visual, to_2tuple(facts["size"]), facts["mean"], facts["std"])


_LIBRARIES: dict[str, Callable[[TowerConfig], _Parts]] = {"timm": _timm, "open_clip": _open_clip}


def _fetched(config: TowerConfig, create: Callable[[], Any]) -> Any:
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.CRITICAL)      # each of its attempts would be a line
    try:
        return create()
    except Exception as error:          # hub, network and disk raise many kinds
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
            reason = "they are not in the local cache and the hub cannot be reached; connect once, or give teacher.weights=FILE"
        else:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise EnvironmentFault(f"the teacher {config.name} cannot be made, or its weights fetched: {reason}") from error
    finally:
        hub.setLevel(level)


def _fingerprint(parts: _Parts) -> Tensor:
    """SHA-256 of everything its output depends on, [32] uint8."""
    digest = hashlib.sha256(repr((parts.size, *parts.mean, *parts.std)).encode())
    for name, value in sorted(parts.model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
