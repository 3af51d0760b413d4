"""A25: whatever a run is called, its files can be named on a command line as they are."""

import random
import re
import string

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from solo.errors import ConfigError
from solo.experiment import experiment
from solo.run import pretrain
from tests.tiny import values

PLAIN = re.compile(r"[A-Za-z0-9_./-]+")
LETTERS = string.ascii_letters + string.digits + "_.-"


def as_pasted(path):
    """What the command line makes of it, with Hydra's own parser."""
    return str(OverridesParser.create().parse_override(f"resume={path}").value())


def names(count, letters, seed):
    generator = random.Random(seed)
    return ["".join(generator.choices(letters, k=generator.randint(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_a_name_is_refused_or_can_be_pasted(seed):
    allowed = 0
    for name in [*names(40, LETTERS, seed), *names(40, LETTERS + "=: '\"$\\/{}()[],;*\n\té", seed)]:
        try:
            run_dir = experiment(values("simclr", "runs", name=name)).run_dir(8)
        except ConfigError as error:
            assert "name may hold" in str(error) and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name)
            continue
        path = f"{run_dir}/checkpoints/step-000000001.ckpt"
        assert PLAIN.fullmatch(path) and as_pasted(path) == path and run_dir.parent.name == "runs"
        allowed += 1
    assert allowed >= 30


def test_every_file_of_a_run_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain(experiment(values("simclr", "runs", max_epochs=1, loggers=["csv", "tensorboard"])))
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert len(found) >= 8
    for path in found:
        assert PLAIN.fullmatch(path) and as_pasted(path) == path
