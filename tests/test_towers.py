"""Frozen towers: their own normalisation, no weights in a state dict, and a changed one is noticed."""

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
        ({"name": "ViT-B-16", "library": "open_clip"}, "either the tag of its weights or a file"),
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


def test_open_clip_tower(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    model = open_clip.create_model("RN50", pretrained=None).eval()
    torch.save(model.visual.state_dict(), tmp_path / "visual.pt")
    tower = Tower(TowerConfig(library="open_clip", name="RN50", weights=str(tmp_path / "visual.pt")))
    pixels = torch.rand(2, 3, 224, 224)
    facts = model.visual.preprocess_cfg
    mean, std = (torch.tensor(facts[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels), model.encode_image((pixels - mean) / std))
    for name, tag, message in (("RN5", "openai", "name: no 'RN5'"), ("RN50", "none", "tag: no 'none'")):
        with pytest.raises(ConfigError, match=message):
            Tower(TowerConfig(library="open_clip", name=name, tag=tag))
