"""The kernels in Triton's interpreter, which has to be asked for before Triton is imported: in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton for this platform")


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/interpreted", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "SOLO_KERNELS": "auto"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_small_shapes():
    run("-m", "not slow")


@pytest.mark.slow
def test_all_shapes():
    run("-m", "slow")
