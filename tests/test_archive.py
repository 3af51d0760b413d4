"""Checkpoints of every format that ever was are read and continued (G15); those of formats to come are refused in words."""

import gzip
import json

import pytest
import torch

from solo import checkpoint
from solo.errors import ConfigError
from solo.experiment import experiment
from solo.export import load_backbone
from solo.run import pretrain
from tests.archive.make import FOLDER, STEP, Watch, content

FORMATS = range(1, checkpoint.FORMAT + 1)


@pytest.fixture
def archived(tmp_path):
    """``archived(number)`` -> a checkpoint of that format as a file."""

    def unpacked(number):
        file = tmp_path / f"format{number}.ckpt"
        file.write_bytes(gzip.decompress((FOLDER / f"format{number}.ckpt.gz").read_bytes()))
        return file

    return unpacked


@pytest.mark.slow
@pytest.mark.parametrize("number", FORMATS)
def test_each_format_is_continued_as_by_the_version_that_wrote_it(archived, tmp_path, number):
    """Not to the bit: torch's own arithmetic changes between its versions and processors."""
    losses = {int(step): loss for step, loss in json.loads((FOLDER / f"format{number}.json").read_text()).items()}
    watch = Watch()
    pretrain(experiment(content(tmp_path / "runs", resume=str(archived(number)))), [watch])
    assert sorted(watch.losses) == list(range(STEP + 1, 25))
    assert watch.losses == pytest.approx({step: losses[step] for step in watch.losses}, rel=2e-3)
    assert load_backbone(archived(number)).num_features == 4


@pytest.mark.parametrize("change, written", [({"format": 2}, "2"), ({"format": "x"}, "'x'"), ({"format": 0}, "0")])
def test_another_format_is_refused_with_both_versions(archived, tmp_path, change, written):
    state = torch.load(archived(1), weights_only=True)
    file = tmp_path / "later.ckpt"
    torch.save({**state, "solo": json.dumps({**json.loads(state["solo"]), "version": "9.1", **change})}, file)
    told = f"{file} is of checkpoint format {written}, written by solo 9.1; this version reads formats up to 1: "
    for act in (lambda: pretrain(experiment(content(tmp_path / "runs", resume=str(file)))), lambda: load_backbone(file)):
        with pytest.raises(ConfigError) as caught:
            act()
        assert str(caught.value).startswith(told) and len(str(caught.value).splitlines()) == 1


def test_a_checkpoint_says_its_format_and_the_first_ones_did_not(archived, tmp_path):
    facts = checkpoint.provenance(checkpoint.read(archived(checkpoint.FORMAT)), "x")
    assert facts["format"] == checkpoint.FORMAT
    del facts["format"]
    assert checkpoint.provenance({"solo": json.dumps(facts)}, "x") == facts
