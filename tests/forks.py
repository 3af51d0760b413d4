"""Python commands as forks of this process, in which what they import is there: a new interpreter needs 5 s for it.

As a user's command has them are arguments, environment, folder, files, handlers of signals and of the exit, exit codes, and so
are the processes that Lightning's launcher starts for it. Not so: modules are imported already, with whatever a test has
patched in them, so that a test of an import, or of a missing package, starts a new interpreter.
"""

import atexit
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import warnings
from types import ModuleType

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from pytorch_lightning.utilities import rank_zero_only

from solo.errors import SIGNALS

FORKING = multiprocessing.get_context("fork")


class Fork(subprocess.Popen):
    """``Popen([sys.executable, SCRIPT, ...])``, ``[sys.executable, "-m", MODULE, ...]`` or ``[sys.executable, "-c", CODE]``."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                       *rest):
        if args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                                          creationflags, shell, *rest)
        pipes = stdin, ours_in, ours_out, stdout, ours_err, stderr = rest[:6]
        self.pid = os.fork()
        if not self.pid:
            if rest[11]:            # start_new_session
                os.setsid()
            for theirs, number in ((stdin, 0), (stdout, 1), (stderr, 2)):
                if theirs != -1:
                    os.dup2(theirs, number)
            for pipe in {*pipes} - {-1, 0, 1, 2}:
                os.close(pipe)
            work = FORKING.Process(target=_command, args=(args[1:], cwd, env))
            atexit._clear()         # of this process
            code = work._bootstrap()
            atexit._run_exitfuncs()
            os._exit(code)
        self._child_created = True
        self._close_pipe_fds(*pipes)


def run(words, timeout=300, **options):
    """``subprocess.run`` with its output as text."""
    with Fork(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def apart(function, *arguments):
    """Call it in a fork, so that what it leaves in torch reaches no other test; its traceback is on standard error."""
    process = FORKING.Process(target=function, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0


def _command(words, cwd, env):
    """What a new interpreter would do with this command line."""
    _as_new()
    if cwd is not None:
        os.chdir(cwd)
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    rank_zero_only.rank = int(os.environ.get("LOCAL_RANK", 0))
    subprocess.Popen = Fork
    first, *rest = words
    if first == "-m":
        sys.argv, sys.path[:0] = rest, [os.getcwd()]
        sys.modules.pop(rest[0], None)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:0], sys.modules["__main__"] = ["-c", *rest[1:]], [os.getcwd()], ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
    else:
        sys.argv, sys.path[:0] = words, [os.path.dirname(os.path.abspath(first))]
        runpy.run_path(first, run_name="__main__")


def _as_new():
    """What pytest, earlier tests and a launcher's first process have set."""
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    for name in list(logging.root.manager.loggerDict):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.setStream(sys.stderr)
    warnings.resetwarnings()
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
