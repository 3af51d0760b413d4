"""A command that is a fork of the tests' process is, to itself and to its parent, what a new interpreter is."""

import signal
import subprocess
import sys
import warnings

import pytest

from tests import forks

PROGRAM = """
import atexit, logging, os, signal, sys, warnings
atexit.register(print, "at the exit")
print(__name__, sys.argv, os.getcwd(), sorted(name for name in os.environ if name != "LC_CTYPE"), os.path.realpath(sys.path[0]))
print([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], logging.root.handlers)
print(os.getsid(0) == os.getpid(), sys.stdin.read(1))
warnings.warn("old", ResourceWarning)
print("to stderr", file=sys.stderr)
sys.stdout.flush()
if sys.argv[-1] == "killed":
    os.kill(os.getpid(), signal.SIGTERM)
sys.exit(7)
"""


def new(words, **options):
    return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, **options)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"start_new_session": True}], ids=["", "own session"])
@pytest.mark.parametrize("last", ["x", "killed"])
@pytest.mark.parametrize("words", [["program.py"], ["-m", "program"], ["-c", PROGRAM]], ids=["script", "module", "code"])
def test_it_is_as_a_new_interpreter(tmp_path, monkeypatch, words, last, options):
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(sys, "argv", ["other"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected, found = (
            start([sys.executable, *words, last], cwd=tmp_path, env={"PATH": "/bin", "A": "b"}, **options)
            for start in (new, forks.run)
        )
    assert (found.returncode, found.stdout.splitlines()) == (expected.returncode, expected.stdout.splitlines())
    assert found.stderr == expected.stderr and found.returncode == (-signal.SIGTERM if last == "killed" else 7)


def test_what_fails_is_told_on_standard_error(capfd):
    done = forks.run([sys.executable, "-c", "raise ValueError('why')"])
    assert done.returncode == 1 and done.stderr.endswith("ValueError: why\n") and not done.stdout
    with pytest.raises(AssertionError):
        forks.apart(int, "x")
    assert "invalid literal" in capfd.readouterr().err
