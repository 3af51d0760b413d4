"""Checkpoints of several origins become backbones, or are refused with the reason."""

import json
import os

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from solo import backbones, checkpoint, export
from solo.backbones import BackboneConfig
from solo.errors import ConfigError, reported

SMALL = BackboneConfig(name="resnet18", stem="small")


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return backbones.build(SMALL, in_chans=1, image_size=32).state_dict()


def prefixed(prefix, weights):
    return {f"{prefix}{name}": value for name, value in weights.items()}


def same(backbone, weights):
    assert not backbone.training
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())
    assert backbone(torch.zeros(2, 1, 32, 32)).shape == (2, 512)


@pytest.mark.slow
def test_our_checkpoint_says_what_it_holds(tmp_path, weights):
    experiment = {"backbone": {"name": "resnet18", "stem": "auto"}, "augmentations": [{"crop_size": 32}]}
    state = {**prefixed("backbone.", weights), "projector.weight": torch.zeros(2)}
    content = {
        "state_dict": state,
        "global_step": 1,
        "epoch": 0,
        "solo": json.dumps({"version": "0", "method": "nnclr", "config": experiment}),
    }
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.save(content, path)
    found = export.load(path)
    same(found.backbone, weights)
    assert found.experiment == experiment and found.in_chans == 1 and found.sha256 == checkpoint.digest(path)
    same(export.load_backbone(tmp_path), weights)  # a run's directory
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"\xff\x00\xff")
    with pytest.raises(ConfigError, match="checksum"):
        export.load_backbone(path)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["backbone.", "encoder."])
def test_solo_learn_checkpoints(tmp_path, weights, prefix):
    path = tmp_path / "all4one-ep=399.ckpt"
    others = {"momentum_backbone.conv1.weight": torch.zeros(1), "transformer_encoder.layers.0.norm1.weight": torch.ones(4)}
    hparams = OmegaConf.create({"backbone": {"name": "resnet18"}})  # makes torch's own safe loading refuse the file
    torch.save({"state_dict": {**others, **prefixed(prefix, weights)}, "epoch": 3, "hyper_parameters": hparams}, path)
    same(export.load_backbone(path), weights)
    same(export.load_backbone(path, "resnet18"), weights)


def test_a_plain_state_dict(tmp_path, weights):
    model = backbones.build(SMALL, in_chans=1)
    model.load_state_dict(weights)
    export.save_backbone(model, tmp_path / "backbone.pt")
    same(export.load_backbone(tmp_path / "backbone.pt"), weights)


def test_transformer_encoder_alone_is_no_backbone(tmp_path):
    torch.save({"state_dict": {"transformer_encoder.layers.0.norm1.weight": torch.ones(4)}}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"holds no backbone.*it has transformer_encoder"):
        export.load_backbone(tmp_path / "x.ckpt")


@pytest.mark.slow
def test_misfit_names_missing_and_unexpected_keys(tmp_path, weights):
    broken = {**prefixed("backbone.", weights), "backbone.extra.bias": torch.zeros(2)}
    del broken["backbone.bn1.weight"]
    torch.save({"state_dict": broken}, tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match=r"missing 1: bn1\.weight; unexpected 1: extra\.bias"):
        export.load_backbone(tmp_path / "x.ckpt", "resnet18")
    with pytest.raises(ConfigError, match="does not say which backbone"):
        export.load_backbone(tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="no timm model 'resnet81', did you mean"):
        export.load_backbone(tmp_path / "x.ckpt", "resnet81")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_nothing_in_a_file_is_run(tmp_path, weights, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": prefixed("backbone.", weights), "callbacks": Evil()}, "x.ckpt")
    with pytest.raises(ConfigError) as caught:
        export.load_backbone("x.ckpt")
    said = "x.ckpt cannot be loaded as tensors and plain values: it names posix.mkdir, which could do harm"
    assert str(caught.value) == said and not (tmp_path / "pwned").exists()
    torch.load("x.ckpt", weights_only=False)        # the payload works
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", [b"", b"GIF89a not a checkpoint", b"PK\x03\x04 cut off"])
def test_files_of_something_else(tmp_path, content):
    (tmp_path / "x.ckpt").write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be loaded as tensors and plain values") as caught:
        export.load_backbone(tmp_path / "x.ckpt")
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ConfigError, match="does not exist"):
        export.load_backbone(tmp_path / "y.ckpt")


def test_stems():
    for stem, kernel, pool in (("imagenet", 7, "MaxPool2d"), ("small_pool", 3, "MaxPool2d"), ("small", 3, "Identity")):
        model = backbones.build(BackboneConfig(name="resnet18", stem=stem, stem_padding=1), image_size=96)
        assert model.conv1.kernel_size == (kernel, kernel) and type(model.maxpool).__name__ == pool
    with pytest.raises(ConfigError, match="backbone.stem=small_pool is for ResNets, not for test_vit"):
        backbones.build(BackboneConfig(name="test_vit", stem="small_pool"), image_size=160)


def test_stem_follows_the_file(tmp_path):
    large = backbones.build(BackboneConfig(name="resnet18", stem="imagenet"), image_size=32)
    torch.save({"state_dict": prefixed("backbone.", large.state_dict())}, tmp_path / "x.ckpt")
    assert export.load_backbone(tmp_path / "x.ckpt").conv1.weight.shape == (64, 3, 7, 7)


def run_with(tmp_path, weights, **config):
    """A run's directory that holds these weights."""
    facts = {"version": "0", "method": "nnclr", "config": {"backbone": {"name": "resnet18"}, **config}}
    content = {"state_dict": prefixed("backbone.", weights), "global_step": 1, "epoch": 0, "solo": json.dumps(facts)}
    checkpoint.save(content, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


@pytest.mark.slow
def test_safetensors_hold_the_same_backbone_and_no_secrets(tmp_path, weights, caplog):
    caplog.set_level("INFO", "solo")
    others = {"data": {"train_path": "/home/me"}, "extra": {"note": "mine"}}
    run = run_with(tmp_path, weights, augmentations=[{"crop_size": 32}], **others)
    out = tmp_path / "new" / "backbone.safetensors"
    export.main([str(run), str(out)])
    assert "resnet18" in caplog.text
    same(export.load_backbone(out), weights)
    found = export.load(out)
    assert found.image_size == 32 and found.in_chans == 1 and found.config.stem == "small"
    assert b"/home/me" not in out.read_bytes() and b"mine" not in out.read_bytes()
    assert {name: value.dtype for name, value in load_file(out).items()} == {name: w.dtype for name, w in weights.items()}


def test_a_safetensors_file_of_others(tmp_path, weights):
    save_file({name: value.contiguous() for name, value in weights.items()}, tmp_path / "x.safetensors")
    same(export.load_backbone(tmp_path / "x.safetensors"), weights)
    same(export.load_backbone(tmp_path / "x.safetensors", {"name": "resnet18", "stem": "small"}), weights)


@pytest.mark.slow
@pytest.mark.parametrize("arguments, code, said", [
    (["none.ckpt", "x.safetensors"], 2, "config error: checkpoint=none.ckpt does not exist"),
    (["run", "x.pt"], 2, "config error: x.pt must end with .safetensors"),
    (["run", "file/x.safetensors"], 5, "environment error: file/x.safetensors cannot be written: "),
    (["file", "x.safetensors"], 2, "config error: file cannot be loaded as tensors and plain values"),
    (["run", "x.safetensors", "--backbone", "resnet81"], 2, "config error: backbone.name: no timm model 'resnet81'"),
])
def test_the_command_says_what_is_wrong(tmp_path, weights, monkeypatch, capsys, arguments, code, said):
    run_with(tmp_path, weights)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left, reported():
        export.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == code and line.startswith(said)
