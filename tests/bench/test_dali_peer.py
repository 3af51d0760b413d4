"""DALI's own graph makes the recipe's views, of pixels and of files."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from solo.bench import large
from solo.data.config import DataConfig
from solo.data.engines import Job, Slot
from solo.data.engines.large import LargeEngine
from solo.data.engines.small import SmallEngine
from solo.data.module import DataModule
from solo.data.sources import ArraySource, FolderSource
from solo.data.views import View
from solo.errors import ConfigError, NumericsError
from tests.data.common import full_view, picture

peers = pytest.importorskip("solo.bench.peers.dali")


def job(source):
    return Job(source, [full_view(24), View(crop_size=16)], (0.5,) * 3, (0.2,) * 3, 1, DataConfig(dataset="fake"))


@pytest.mark.slow
def test_views_of_pixels():
    images = np.stack([picture(i, 32, 32) for i in range(64)])
    asked, samples = job(ArraySource(images, np.zeros(64), ["a"])), np.arange(300) % 64  # more than its batch
    views, ours = peers.Peer(asked).batch(samples), next(SmallEngine(asked).batches([Slot(0, samples)])).batch.views
    assert [tuple(view.shape) for view in views] == [(300, 3, 24, 24), (300, 3, 16, 16)]
    for theirs, mine in zip(views, ours, strict=True):
        assert abs(theirs.mean() - mine.mean()) < 0.2 * mine.std() and 0.8 < theirs.std() / mine.std() < 1.25
    assert not torch.equal(views[0][0], views[0][64])


def test_views_and_crops_of_files(tmp_path):
    for i in range(4):
        Image.fromarray(picture(i, 70, 90)).save(tmp_path / f"{i}.jpg")
    asked = job(FolderSource(tmp_path, 3, "data.train_path"))
    for stage, shape, kind in (("cpu", (4, 24, 24, 3), torch.uint8), ("all-cpu", (4, 3, 24, 24), torch.float32)):
        name, batch, _ = large._other(asked, "dali", stage)
        view = batch(np.arange(4))[0]
        assert (tuple(view.shape), view.dtype, name) == (shape, kind, "DALI on the CPU")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cpu", "all-cpu"])
def test_views_and_crops_are_looked_at(stage, tmp_path):
    """Ours, made with other numbers, look alike in either form; brighter ones do not."""
    for i in range(64):
        Image.fromarray(picture(i, 32, 32)).save(tmp_path / f"{i}.jpg")
    views = [View(crop_size=8)]
    asked = Job(FolderSource(tmp_path, 3, ""), views, (0.5,) * 3, (0.2,) * 3, 1, DataConfig(dataset="fake", num_workers=0))
    other = LargeEngine(replace(asked, seed=2))

    def batch(samples, factor=1.0):
        crops = next(other.batches([Slot(0, samples)])).batch
        shown = [crops.crops[0].permute(0, 2, 3, 1)] if stage == "cpu" else other.finish(crops).views
        return [factor * view for view in shown]

    assert "correct" in large.looks_like(asked, batch, stage)
    with pytest.raises(NumericsError, match="do not look like ours"):
        large.looks_like(asked, lambda samples: batch(samples, 1.3), stage)


def test_a_peer_is_looked_at_before_it_is_timed(tmp_path, monkeypatch):
    for i in range(32):
        Image.fromarray(picture(i, 70, 90)).save(tmp_path / f"{i}.jpg")
    views = [View(crop_size=24)]
    data = DataModule(DataConfig(dataset="image_folder", train_path=str(tmp_path), num_workers=0), views, 32, seed=1)
    monkeypatch.setattr(peers.Peer, "batch", lambda self, samples: [torch.zeros(len(samples), 24, 24, 3, dtype=torch.uint8)])
    arguments = argparse.Namespace(recipe="x", peer="dali", stage="cpu", pairs=1, no_write=True)
    with pytest.raises(NumericsError, match="do not look like ours"):
        large.main(arguments, data, "in224")


def test_other_peers_do_not_decode():
    class Arguments:
        peer = "kornia"

    with pytest.raises(ConfigError, match="--peer kornia is for images up to 64 px"):
        large.main(Arguments(), None, "in224")
