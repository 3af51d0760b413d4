"""Other programs are timed where they are installed, and only if their views look like ours."""

import sys

import pytest
import torch

from solo.bench import data, looks, measure
from solo.bench.peers import PEERS
from solo.errors import EnvironmentFault, NumericsError
from tests.bench.test_board import found, page


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
    assert "correct" in looks.looks(ours, theirs)
    for wrong in (theirs[0] + 0.3, 1.3 * theirs[0], views[1], theirs[0][..., :4]):
        with pytest.raises(NumericsError):
            looks.looks(ours, [wrong])


def test_a_goal_may_be_the_peers(tmp_path):
    rows = [measure.row("D2", "fast engine", "images/CPU-s", name, found(5.0)) for name in ("kornia", "OpenCV and numpy")]
    _, text = page(tmp_path, [*rows, measure.row("D4", "crops", "images/CPU-s", "DALI", found(3.0))])
    assert ["| >= 12x | **no** |", "| >= 3x | yes |", "| >= 2x | yes |"] == [
        line[line.index("| >=") :] for line in text.splitlines() if line.startswith("| D")
    ]
