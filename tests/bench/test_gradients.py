"""``scripts/bench/gradients.py``: its numbers are those of the papers' formulas."""

import csv
import importlib.util
import sys

import pytest
import torch
from torch.nn.functional import normalize

from solo.experiment import experiment
from solo.run import pretrain
from solo.testing import tiny
from tests.conftest import ROOT
from tests.losses.unigrad_in_loops import by_loops


@pytest.fixture
def gradients_script(monkeypatch):
    """scripts/bench/gradients.py in this process."""
    spec = importlib.util.spec_from_file_location("gradients", ROOT / "scripts" / "bench" / "gradients.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gradients.py", *map(str, arguments)])
        script.main()

    return script, run


def as_they_arrive(rows, parts):
    """Parts at the unit rows, through the normalisation of ``rows`` [N, D]."""
    unit, length = normalize(rows, dim=1), rows.norm(dim=1, keepdim=True)
    return (parts - (parts * unit).sum(1, keepdim=True) * unit) / length


def read_rows(folder):
    with (folder / "gradients.csv").open() as file:
        return {(row["part"], row["method"], row["other"]): float(row["value"]) for row in csv.DictReader(file)}


@pytest.mark.slow
def test_the_script_that_draws_all_gradients(shared_data, tmp_path, gradients_script, monkeypatch):
    """Its numbers are those of the papers' formulas at the projections of the run's first batch."""
    monkeypatch.setenv("SOLO_SHARED", str(shared_data("cifar10-jpeg.npz").parents[1]))
    script, draw = gradients_script
    run = pretrain(experiment(tiny("unigrad", tmp_path / "runs", max_epochs=1))).run_dir
    draw("--checkpoint", run, "--images", 6, "--out", tmp_path)
    assert (tmp_path / "gradients.png").stat().st_size > 10_000
    found, e = read_rows(tmp_path), script.embed(*script.load(str(run), 6))
    z1, z2, m1, m2, memory = (x.detach().double() for x in e)
    arrived = {}
    for name, form in script.FORMS.items():
        targets = (z1, z2) if form == "simsiam" else (m1, m2)
        seen = normalize(torch.cat([memory, *targets]), dim=1).tolist()
        loops = by_loops(*(form, z1, z2, *targets), queue=normalize(memory, dim=1), seen=seen)
        parts = [torch.tensor([row[i] for row in loops], dtype=torch.float64) for i in range(2)]
        if form != "vicreg":
            parts = [as_they_arrive(torch.cat([z1, z2]), part) for part in parts]
        arrived[name] = dict(zip(script.PARTS, (*parts, sum(parts)), strict=True))
    expected = {}
    for part in script.PARTS:
        for name, mine in arrived.items():
            expected[part, name, ""] = mine[part].norm(dim=1).mean().item()
            for other, theirs in arrived.items():
                expected[part, name, other] = torch.cosine_similarity(mine[part], theirs[part]).mean().item()
    assert found.keys() == expected.keys()
    assert list(found.values()) == pytest.approx([expected[key] for key in found], rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_the_script_without_a_run(shared_data, tmp_path, gradients_script, monkeypatch):
    """One formula and a teacher that equals its network: SimSiam is BYOL."""
    monkeypatch.setenv("SOLO_SHARED", str(shared_data("cifar10-jpeg.npz").parents[1]))
    script, draw = gradients_script
    monkeypatch.setattr(script, "draw", lambda *arguments: None)
    draw("--images", 8, "--out", tmp_path)
    found = read_rows(tmp_path)
    assert len(found) == 3 * 7 * 8 and found["sum", "SimSiam", "BYOL"] == pytest.approx(1)
    assert found["sum", "UniGrad", "BYOL"] < 0.99
