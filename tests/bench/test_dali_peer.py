"""DALI's own graph makes the recipe's views, of pixels and of files."""

import numpy as np
import pytest
import torch
from PIL import Image

from solo.bench import large
from solo.data.config import DataConfig
from solo.data.engines import Job, Slot
from solo.data.engines.small import SmallEngine
from solo.data.sources import ArraySource, FolderSource
from solo.data.views import View
from solo.errors import ConfigError
from tests.data.common import full_view, picture

peers = pytest.importorskip("solo.bench.peers.dali")


def job(source):
    return Job(source, [full_view(24), View(crop_size=16)], (0.5,) * 3, (0.2,) * 3, 1, DataConfig(dataset="fake"))


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
        name, batch = large._other(asked, asked.source, "dali", stage)
        view = batch(np.arange(4))[0]
        assert (tuple(view.shape), view.dtype, name) == (shape, kind, "DALI on the CPU")


def test_other_peers_do_not_decode():
    class Arguments:
        peer = "kornia"

    with pytest.raises(ConfigError, match="--peer kornia is for images up to 64 px"):
        large.main(Arguments(), None)
