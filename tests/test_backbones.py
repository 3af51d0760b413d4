"""Backbones: the published stem, and layouts that no CPU crashes on."""

import os
import sys

import pytest
import torch
from torch import nn

from solo import backbones
from solo.backbones import BackboneConfig
from solo.errors import ConfigError
from tests import forks
from tests.conftest import ROOT


def maps(model, size):
    """Side of the maps after the stem and after each of the four stages."""
    sides = []
    for layer in (model.conv1, model.layer1, model.layer2, model.layer3, model.layer4):
        layer.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))
    model.eval()(torch.zeros(1, 3, size, size))
    return sides


@pytest.mark.slow
@pytest.mark.parametrize("size, config, expected", [
    (32, {}, [34, 34, 17, 9, 5]),                               # as published for CIFAR
    (32, {"name": "resnet50"}, [34, 34, 17, 9, 5]),
    (32, {"stem_padding": 1}, [32, 32, 16, 8, 4]),
    (64, {}, [66, 66, 33, 17, 9]),
    (96, {}, [48, 24, 12, 6, 3]),                               # STL-10 keeps the ImageNet stem, as published
    (224, {}, [112, 56, 28, 14, 7]),
    (32, {"stem": "imagenet"}, [16, 8, 4, 2, 1]),
])
def test_maps_have_the_published_sides(size, config, expected):
    model = backbones.build(BackboneConfig(**config), image_size=size)
    assert maps(model, size) == expected
    if expected[0] > size / 2:
        conv = model.conv1
        assert conv.kernel_size == (3, 3) and conv.stride == (1, 1) and conv.bias is None and conv.out_channels == 64
        assert isinstance(model.maxpool, nn.Identity)


def test_residual_branches_do_not_start_at_zero():
    model = backbones.build(BackboneConfig(), image_size=32)
    assert all((block.bn2.weight == 1).all() for block in model.layer1)


@pytest.mark.parametrize("channels, layout", [([64, 128, 256, 512], True), ([16, 32, 64, 128], True), ([4, 4, 4, 8], False)])
def test_channels_last_only_for_widths_that_are_multiples_of_16(channels, layout):
    weight = backbones.build(BackboneConfig(kwargs={"channels": channels})).layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is layout and weight.is_contiguous() is not layout


STEP = """
import torch
from solo import backbones
from solo.backbones import BackboneConfig
torch.set_num_threads(1)
for name, kwargs in {models}:
    for bfloat16 in (False, True):
        print(name, kwargs, "bfloat16" if bfloat16 else "float32", flush=True)
        model = backbones.build(BackboneConfig(name=name, kwargs=kwargs), {in_chans}, 224)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(torch.randn(2, {in_chans}, 224, 224)).float().square().mean()
        loss.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
"""
MODELS = [
    ("resnet18", {}),
    ("resnet18", {"channels": [16, 32, 64, 128]}),
    ("resnet18", {"channels": [4, 4, 4, 8]}),
    ("efficientnet_b0", {}),
    ("mobilenetv3_small_100", {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("in_chans", [3, 1])
def test_no_width_crashes_the_process_at_224_pixels(in_chans):
    """torch 2.14's float32 backward of channels_last convolutions ends the process for some narrow widths."""
    program = STEP.format(models=MODELS, in_chans=in_chans)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = forks.run([sys.executable, "-c", program], env=environment)
    assert ended.returncode == 0, f"{ended.returncode} after {ended.stdout.splitlines()[-1:]}: {ended.stderr[-300:]}"


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet10t"])
def test_the_width_is_that_of_the_features(name):
    """timm's MobileNetV3 says 288 and gives 1024."""
    model = backbones.build(BackboneConfig(name=name, stem="imagenet"), image_size=64)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, model.num_features)


@pytest.mark.parametrize("scheme", ["http", "HTTP", "ftp"])
@pytest.mark.parametrize("block", ["pretrained_cfg", "pretrained_cfg_overlay"])
def test_weights_are_fetched_by_https_only(block, scheme):
    kwargs = {"pretrained": True, block: {"url": f"{scheme}://127.0.0.1:9/weights.pth"}}
    with pytest.raises(ConfigError, match=f"^backbone.kwargs: {scheme}://127.0.0.1:9/weights.pth: weights are fetched by"):
        backbones.build(BackboneConfig(name="resnet18", kwargs=kwargs))


def test_an_address_that_nothing_is_fetched_from_is_no_matter():
    noted = {"pretrained_cfg": {"url": "http://127.0.0.1:9/weights.pth", "origin_url": "http://127.0.0.1:9"}}
    backbones.build(BackboneConfig(name="resnet18", kwargs=noted))
