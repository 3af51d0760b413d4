"""A run directory with a checkpoint of an untrained narrow ResNet on the ``fake`` dataset."""

import json
from pathlib import Path
from typing import Any

import torch

from solo import backbones, checkpoint
from solo.backbones import BackboneConfig
from solo.config import plain

NARROW: dict[str, Any] = {"name": "resnet18", "kwargs": {"channels": [4, 4, 8, 8]}, "stem": "imagenet"}
FAKE: dict[str, Any] = {"dataset": "fake", "train_size": 96, "classes": 3, "size": 16, "num_workers": 0}


def make_run(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BackboneConfig(**NARROW)
    backbone = backbones.build(config, 3, 16)
    experiment = {"backbone": plain(config), "augmentations": [{"crop_size": 16}], "data": FAKE}
    state = {f"backbone.{name}": value for name, value in backbone.state_dict().items()}
    content = {"state_dict": state, "global_step": 7, "epoch": 1,
               "solo": json.dumps({"version": "0", "method": "nnclr", "config": experiment})}
    checkpoint.save(content, folder / "checkpoints" / "step7.ckpt")
    return folder
