"""``python -m tests.archive.make``: the checkpoint and the losses that `tests/test_archive.py` holds later versions to.

Run once for each format, before anything of that format is released; what it wrote is kept for good.
"""

import gzip
import json
import os
import tempfile
from pathlib import Path

import pytorch_lightning as pl

from solo.checkpoint import FORMAT
from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import tiny

FOLDER = Path(__file__).parent
STEP = 12       # of 24: in the middle of the second epoch


class Watch(pl.Callback):
    """The loss of each step, and the checkpoint of one."""

    def __init__(self, file=None):
        self.file, self.losses = file, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = outputs["loss"].item()
        if self.file and trainer.global_step == STEP:
            trainer.save_checkpoint(self.file)


def content(folder, **changes):
    """A method with heads, teacher, queue and probe, as small as it gets: 64 images, three epochs."""
    small = {"proj_hidden_dim": 8, "proj_output_dim": 8, "pred_hidden_dim": 8, "proj_layers": 2, "queue_size": 16}
    backbone = {"name": "resnet18", "kwargs": {"channels": [4, 4, 4, 4], "layers": [1, 1, 1, 1]}, "stem": "imagenet"}
    return tiny("sce", folder, method_kwargs=small, backbone=backbone, loggers=[], **changes)


def main():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        watch = Watch("saved/x.ckpt")
        pretrain(experiment(content("runs")), [watch])
        saved = Path("saved/x.ckpt").read_bytes()
    (FOLDER / f"format{FORMAT}.ckpt.gz").write_bytes(gzip.compress(saved, mtime=0))
    (FOLDER / f"format{FORMAT}.json").write_text(json.dumps(watch.losses, indent=1) + "\n")


if __name__ == "__main__":
    main()
