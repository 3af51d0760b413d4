"""Other programs are timed where they are installed, and only if their views look like ours."""

import argparse
import random
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from solo.bench import data, large, looks, measure
from solo.bench.baselines.pil import PILBaseline
from solo.bench.peers import PEERS
from solo.data.config import DataConfig
from solo.data.engines import Job, Slot
from solo.data.engines.small import SmallEngine
from solo.data.module import DataModule
from solo.data.sources import ArraySource
from solo.data.views import Chance
from solo.errors import EnvironmentFault, NumericsError
from tests.bench.test_board import found, page
from tests.data.common import full_view, picture


@pytest.mark.parametrize(("name", "needs"), [("kornia", "kornia"), ("opencv", "cv2"), ("ffcv", "cv2")])
def test_a_peer_that_is_absent_is_one_line(name, needs, monkeypatch):
    for module in [needs, f"{needs}.augmentation"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, PEERS[name], raising=False)
    with pytest.raises(EnvironmentFault, match=f"--peer {name}: .*{needs}"):
        data.main(["--peer", name])
    assert EnvironmentFault.exit_code == 5


def test_views_that_look_otherwise_are_refused():
    views = torch.randn(2, 512, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = torch.randn(2, 512, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    ours, theirs = [images[0] + views[0]], [images[0] + views[1]]
    pixels = [np.zeros((8, 8, 3), np.uint8)] * 512
    assert "correct" in looks.looks(ours, theirs, pixels)
    for wrong in (theirs[0] + 0.3, 1.3 * theirs[0], views[1], theirs[0][..., :4]):
        with pytest.raises(NumericsError):
            looks.looks(ours, [wrong], pixels)


@pytest.fixture(scope="module")
def drawn():
    """Views of 2,048 images under the recipe with these changes, and the images: of structure at every scale."""
    draw = np.random.default_rng(0)
    pixels = np.stack([picture(i, 32, 32) for i in range(256)]) // 2 + draw.integers(0, 128, (256, 32, 32, 3), np.uint8)
    source = ArraySource(np.clip(pixels + np.arange(32, dtype=np.uint8)[:, None], 0, 255), np.zeros(256), ["a"])
    samples = np.arange(2048) % 256

    def views(seed=1, **changes):
        job = Job(source, [replace(full_view(16), **changes)], (0.5,) * 3, (0.2,) * 3, seed, DataConfig(dataset="fake"))
        return looks.shown(next(SmallEngine(job).batches([Slot(0, samples)])).batch.views, job.mean, job.std)

    return views, views(), source.images[samples]


@pytest.mark.parametrize(("changes", "trait"), [
    ({"horizontal_flip": Chance(prob=0.0)}, "mirrored"),
    ({"horizontal_flip": Chance(prob=1.0)}, "mirrored"),
    ({"grayscale": Chance(prob=0.0)}, "grey"),
    ({"gaussian_blur": Chance(prob=0.0)}, "sharp"),
    ({"solarization": Chance(prob=0.0)}, "solarised"),
    ({}, None),
], ids=["no flip", "all mirrored", "no grey", "no blur", "no solarisation", "the same"])
def test_an_operation_that_a_peer_leaves_out_is_found(drawn, changes, trait):
    views, ours, images = drawn
    theirs = views(seed=2, **changes)
    if trait is None:
        assert "grey, solarised, mirrored, sharp as ours are" in looks.looks(ours, theirs, images)
    else:
        with pytest.raises(NumericsError, match=f"view 1 is {trait} to "):
            looks.looks(ours, theirs, images)


# --- torchvision on PIL, beside which most rows are measured --------------------------------------------------------------


def _published(monkeypatch, **without):
    """A job on pictures in memory, and the published pipeline of its view but for ``without``."""
    monkeypatch.setattr(data, "_LOOKED_AT", 512)
    torch.manual_seed(0)
    random.seed(0)
    source = ArraySource(np.stack([picture(i, 16, 16) for i in range(512)]), np.zeros(512), ["a"])
    job = Job(source, [full_view(16)], (0.5,) * 3, (0.2,) * 3, 1, DataConfig(dataset="fake"))
    return job, PILBaseline(replace(job, views=[replace(job.views[0], **without)]))


@pytest.mark.parametrize(("without", "trait"), [
    ({}, None),
    ({"horizontal_flip": Chance(prob=0.0)}, "mirrored"),
    ({"solarization": Chance(prob=0.0)}, "solarised"),
], ids=["as published", "no flip", "no solarisation"])
def test_the_published_pipeline_is_looked_at(monkeypatch, without, trait):
    job, baseline = _published(monkeypatch, **without)
    if trait is None:
        assert "grey, solarised, mirrored, sharp as ours are" in data.looks_like(job, baseline.batch)
    else:
        with pytest.raises(NumericsError, match=f"view 1 is {trait} to "):
            data.looks_like(job, baseline.batch)


def test_it_is_looked_at_before_it_is_timed(monkeypatch, tmp_path):
    """Of images in memory and of files."""
    job, _ = _published(monkeypatch)
    monkeypatch.setattr(PILBaseline, "batch", lambda self, samples: [torch.zeros(len(samples), 3, 16, 16)])
    monkeypatch.setattr(large, "_LOOKED_AT", 1)
    for module in (data, large):
        monkeypatch.setattr(module, "alternate", None)
    with pytest.raises(NumericsError, match="do not look like ours"):
        data.compare(job, 1, 64)
    for i in range(32):
        Image.fromarray(picture(i, 70, 90)).save(tmp_path / f"{i}.jpg")
    files = DataModule(DataConfig(dataset="image_folder", train_path=str(tmp_path), num_workers=0), job.views, 32, seed=1)
    with pytest.raises(NumericsError, match="do not look like ours"):
        large.main(argparse.Namespace(recipe="x", peer=None, stage="cpu", pairs=1, no_write=True), files, "in224")


def test_a_goal_may_be_the_peers(tmp_path):
    rows = [measure.row("D2", "fast engine", "images/CPU-s", name, found(5.0)) for name in ("kornia", "OpenCV and numpy")]
    _, text = page(tmp_path, [*rows, measure.row("D4", "crops", "images/CPU-s", "DALI", found(3.0))])
    assert ["| >= 12x | **no** |", "| >= 3x | yes |", "| >= 2x | yes |"] == [
        line[line.index("| >=") :] for line in text.splitlines() if line.startswith("| D")
    ]
