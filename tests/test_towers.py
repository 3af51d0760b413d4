"""Frozen towers: their own normalisation, no weights in a state dict, and a changed one is noticed."""

import copy
import json
import logging
import sys

import pytest
import timm
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from solo.errors import ConfigError, EnvironmentFault
from solo.towers import Tower, TowerConfig


def save(path, seed=0, name="test_resnet"):
    """A small tower's weights, drawn from a seed."""
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=0).eval()
    torch.save(model.state_dict(), path)
    return model


@pytest.fixture
def weights(tmp_path):
    save(tmp_path / "tower.pt")
    return str(tmp_path / "tower.pt")


def test_images_are_resized_and_normalised_as_the_tower_learned(tmp_path):
    model = save(tmp_path / "tower.pt")
    tower = Tower(TowerConfig(name="test_resnet", weights=str(tmp_path / "tower.pt"))).train()
    pixels = torch.rand(3, 3, 20, 20, requires_grad=True)
    large = torch.nn.functional.interpolate(pixels, (160, 160), mode="bilinear")
    with torch.no_grad():
        expected = model((large - 0.5) / 0.5)                           # what timm says of this model
    found = tower(pixels)
    torch.testing.assert_close(found, expected)
    assert not found.requires_grad
    grey = tower(pixels[:, :1])
    torch.testing.assert_close(grey, tower(pixels[:, :1].expand(-1, 3, -1, -1)))
    assert tower.double()(pixels.double()).dtype == torch.float64
    moved = tower.to("meta")
    assert moved(torch.empty(2, 3, 20, 20, device="meta")).device.type == "meta"


@pytest.fixture
def added(monkeypatch):
    """Adds a model to timm's for the length of a test."""
    entrypoints = timm.models._registry._model_entrypoints

    def add(name, create, **facts):
        def entrypoint(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, **kwargs):
            model = create()
            model.pretrained_cfg = facts
            return model

        monkeypatch.setitem(entrypoints, name, entrypoint)

    return add


def test_a_tower_whose_images_are_not_square(added, tmp_path):
    added("wide", torch.nn.Flatten, input_size=(3, 4, 6), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    torch.save({}, tmp_path / "none.pt")
    tower = Tower(TowerConfig(name="wide", weights=str(tmp_path / "none.pt")))
    pixels = torch.rand(2, 3, 4, 6)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    torch.testing.assert_close(tower(pixels), ((pixels - mean) / std).flatten(1))
    assert tower(torch.rand(2, 3, 9, 9)).shape == (2, 3 * 4 * 6)


def test_a_tower_of_maps_is_told(added, tmp_path):
    added("maps", torch.nn.Identity, input_size=(3, 4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)
    torch.save({}, tmp_path / "none.pt")
    tower = Tower(TowerConfig(name="maps", weights=str(tmp_path / "none.pt")))
    with pytest.raises(ConfigError, match=r"teacher maps makes \[2, 3, 4, 4\] of images \[2, 3, 4, 4\], not features"):
        tower(torch.rand(2, 3, 8, 8))


def test_weights_are_neither_trained_nor_saved(weights):
    tower = Tower(TowerConfig(name="test_resnet", weights=weights))
    assert not list(tower.parameters()) and list(tower.state_dict()) == ["_extra_state"]
    again = Tower(TowerConfig(name="test_resnet", weights=weights)).double()
    again.load_state_dict(tower.state_dict())


def test_another_tower_is_noticed(weights, tmp_path):
    tower = Tower(TowerConfig(name="test_resnet", weights=weights))
    save(tmp_path / "other.pt", seed=1)
    other = Tower(TowerConfig(name="test_resnet", weights=str(tmp_path / "other.pt")))
    with pytest.raises(ConfigError, match="teacher test_resnet are not those this checkpoint was trained with"):
        other.load_state_dict(tower.state_dict())


def test_wrong_requests_are_told(weights):
    for keys, message in (
        ({"name": "test_resent"}, "name: no timm model 'test_resent', did you mean 'test_resnet'?"),
        ({"name": "test_resnet", "tag": "r160_in1k"}, "part of the name: test_resnet.r160_in1k"),
        ({"name": "ViT-B-16", "library": "open_clip"}, "the tag of its weights or a file"),
    ):
        with pytest.raises(ValueError) as error:
            TowerConfig(**keys)
        assert message in str(error.value)
    with pytest.raises(ConfigError, match="does not fit the teacher test_vit: missing"):
        Tower(TowerConfig(name="test_vit", weights=weights))
    with pytest.raises(ConfigError, match="nowhere.pt"):
        Tower(TowerConfig(name="test_resnet", weights="nowhere.pt"))


def test_timms_own_weights_are_asked_for(monkeypatch):
    asked = {}

    def create_model(name, **kwargs):
        asked.update(kwargs, name=name)
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(EnvironmentFault, match="the teacher test_resnet cannot be made, or its weights fetched: no route$"):
        Tower(TowerConfig(name="test_resnet"))
    assert asked == {"name": "test_resnet", "pretrained": True, "num_classes": 0}


def test_no_connection_is_one_line(monkeypatch, caplog):
    hub = logging.getLogger("huggingface_hub.utils._http")

    def create_model(name, **kwargs):
        for _ in range(5):
            hub.warning("Retrying in 1s")
        raise LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub. " * 9)

    monkeypatch.setattr(timm, "create_model", create_model)
    with caplog.at_level("WARNING"), pytest.raises(EnvironmentFault) as error:
        Tower(TowerConfig(name="test_resnet"))
    assert str(error.value) == (
        "the teacher test_resnet cannot be made, or its weights fetched: they are not in the local cache and the hub cannot "
        "be reached; connect once, or give teacher.weights=FILE"
    )
    assert not caplog.records
    with caplog.at_level("WARNING"):
        hub.warning("heard again")
    assert len(caplog.records) == 1


def test_open_clip_is_asked_for_only_where_it_is_used(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(EnvironmentFault, match=r"needs open_clip_torch: pip install 'solo-ssl\[clip\]'"):
        Tower(TowerConfig(library="open_clip", name="ViT-B-16", tag="laion400m_e32"))


CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # as CLIP was published
TEXT = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": [32, 48], "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TINY = {
    "tiny": {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT},
    "coca_tiny": {
        "embed_dim": 8, "custom_text": True, "vision_cfg": {**VISION, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2, "dim_head": 8},
    },
}


@pytest.fixture
def tiny_models(tmp_path, monkeypatch):
    """Two small models, whose images are not square, among those of open_clip."""
    factory = pytest.importorskip("open_clip.factory")
    for name in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(factory, name, copy.copy(getattr(factory, name)))
    for name, config in TINY.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        factory.add_model_config(tmp_path / f"{name}.json")


@pytest.mark.parametrize("name, normalisation", [
    ("tiny", CLIP),
    ("coca_tiny", CLIP),
    *(pytest.param(*row, marks=pytest.mark.slow) for row in (
        ("RN50", CLIP), ("ViT-B-16", CLIP), ("coca_ViT-B-32", CLIP), ("ViT-B-16-SigLIP", ((0.5,) * 3, (0.5,) * 3)),
    )),
])
def test_open_clip_tower_is_the_models_image_side(tmp_path, tiny_models, name, normalisation):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, pretrained_hf=False).eval()
    torch.save(model.visual.state_dict(), tmp_path / "visual.pt")
    tower = Tower(TowerConfig(library="open_clip", name=name, weights=str(tmp_path / "visual.pt")))
    size = model.visual.image_size
    pixels = torch.rand(2, 3, *((size, size) if isinstance(size, int) else size))
    mean, std = (torch.tensor(row).view(-1, 1, 1) for row in normalisation)
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), model.encode_image((pixels - mean) / std, normalize=False))


@pytest.mark.parametrize("name, tag, mean, quick_gelu", [
    ("ViT-B-16", "laion400m_e32", CLIP[0], False),              # the paper's teacher
    ("ViT-B-16", "openai", CLIP[0], True),
    ("ViT-B-16-SigLIP", "webli", (0.5,) * 3, False),
    ("ViT-L-14", "laion2b_s32b_b82k", (0.5,) * 3, False),
])
@pytest.mark.parametrize("file", [True, False])
def test_a_tag_brings_its_normalisation_and_activation(tmp_path, tiny_models, monkeypatch, name, tag, mean, quick_gelu, file):
    """As open_clip lists them, also where the weights come from a file."""
    open_clip = pytest.importorskip("open_clip")
    create, asked = open_clip.create_model, {}

    def create_model(name, pretrained, **kwargs):
        asked.update(kwargs, pretrained=pretrained)
        return create("tiny", **kwargs)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    torch.save(create("tiny").visual.state_dict(), tmp_path / "visual.pt")
    tower = Tower(TowerConfig(library="open_clip", name=name, tag=tag, weights=str(tmp_path / "visual.pt") if file else None))
    assert tower._mean.flatten().tolist() == pytest.approx(mean)
    activation = type(tower._model[0].transformer.resblocks[0].mlp.gelu).__name__
    assert activation == ("QuickGELU" if quick_gelu else "GELU") and asked["pretrained"] == (None if file else tag)


def test_wrong_requests_of_open_clip_are_told(weights):
    pytest.importorskip("open_clip")
    for keys, message in (
        ({"name": "RN5", "tag": "openai"}, "name: no 'RN5'"),
        ({"name": "RN50", "tag": "none"}, "tag: no 'none'"),
        ({"name": "ViT-L-14", "weights": weights}, "weights of ViT-L-14 differ in their normalisation: give the teacher's tag"),
    ):
        with pytest.raises(ConfigError, match=message):
            Tower(TowerConfig(library="open_clip", **keys))
