"""Every command and program of the README runs. Commands are run as they stand, on fewer images and steps."""

import os
import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from tests import forks
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.strip() and not line.startswith("#")
]
SMALL = [
    *("max_epochs=1", "scheduler.warmup_epochs=1"),
    *("checkpoint.dir=runs", "limit_train_batches=2", "report.max_train=300", "report.points=100"),
]
LESS = {
    "pretrain/cifar": "data.dataset=fake data.size=32 data.train_size=64 optimizer.batch_size=16 method_kwargs.queue_size=64 "
    "precision=32-true report.enabled=false",
    "pretrain/custom": "optimizer.batch_size=4 method_kwargs.queue_size=16 precision=32-true data.num_workers=0",
    "finetune.yaml": "optimizer.batch_size=32",
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository and holds ``my_images``."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("scripts", "solo", "main_pretrain.py", "main_linear.py", "main_knn.py", "launcher.py", "Makefile"):
        (folder / name).symlink_to(ROOT / name)
    for part, count in (("train", 6), ("val", 3)):
        for kind in ("cats", "dogs"):
            (folder / "my_images" / part / kind).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "my_images" / part / kind / f"{i}.jpg")
    return folder


def run(words, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = forks.run(words, cwd=folder, env=environment)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_commands(workplace):
    assert len(COMMANDS) >= 12
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "make":
            assert run(["make", "-n", *words[1:]], workplace)
        elif words[:2] == ["python", "launcher.py"]:
            assert "main_pretrain.py" in run([sys.executable, *words[1:], "--dry-run"], workplace)
        elif words[:3] == ["python", "-m", "solo.certify"]:
            assert "micro" in run([sys.executable, *words[1:]], workplace)
        else:
            assert words[0] == "python" and words[1] in ("main_pretrain.py", "main_linear.py", "main_knn.py"), command
            small = [] if "knn" in words[1] else SMALL if "pretrain" in words[1] else SMALL[:2]
            small = small + [word for mark, extra in LESS.items() if mark in command for word in extra.split()]
            run([sys.executable, *words[1:], *small], workplace)


def test_programs(tmp_path, monkeypatch):
    programs = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(programs) == 2
    monkeypatch.chdir(ROOT)
    for program in programs:
        exec(compile(program, "README.md", "exec"), {"__name__": "agree"})


def test_every_figure_is_filled_in():
    assert not re.findall(r"\b(DEMO|LEARN)_\w+", README)
    assert (ROOT / "docs" / "pictures" / "demo.png").stat().st_size > 10_000
