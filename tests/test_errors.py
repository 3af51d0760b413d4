"""Every command, asked for what cannot be: one line per problem, the kind's exit code, no traceback (docs/errors.md)."""

import ast
import contextlib
import os
import re
import runpy
import sys
import threading

import pytest
import torch

from solo import errors
from solo.bench import processes
from solo.errors import ConfigError, DataError, EnvironmentFault, Interrupted, NumericsError, SoloError, Unanswered, reported
from tests.conftest import ROOT
from tests.eval.runs import make_run

# (command, words, exit code, what the first line says); RUN stands for a run's directory, the working directory holds no images
WRONG = [
    ("main_knn.py", ["checkpoint=none.ckpt"], 2, "checkpoint=none.ckpt does not exist"),
    ("main_knn.py", ["checkpoint=RUN", "kk=3"], 2, "unknown key kk: did you mean k?"),
    ("main_knn.py", ["checkpoint=RUN", "k=[]"], 2, "k must list at least one value"),
    ("main_knn.py", ["checkpoint=RUN", "k=[5,1000000]"], 2, "k=[1000000] is more than the"),
    ("main_knn.py", ["checkpoint=RUN", "data.dataset=cifar10"], 2, "data.train_path is missing"),
    ("main_knn.py", ["checkpoint=RUN", "data.dataset=nothing"], 2, "no 'nothing' in solo.datasets"),
    ("main_knn.py", ["checkpoint=RUN", "data.dataset=image_folder", "data.train_path=noise"], 3, "none of"),
    ("main_knn.py", ["checkpoint=RUN", "device=cuda:99"], 5, "cuda"),
    ("main_knn.py", ["checkpoint=RUN", "output=file/x"], 5, "output=file/x cannot be made"),
    ("main_knn.py", ["checkpoint="], 2, "checkpoint must name a checkpoint or a run's directory"),
    ("main_linear.py", ["checkpoint=damaged.ckpt"], 2, "damaged.ckpt cannot be loaded as tensors and plain values"),
    ("main_linear.py", ["checkpoint=RUN", "max_epochs=0"], 2, "max_epochs must be at least 1"),
    ("main_linear.py", ["checkpoint=RUN", "scheduler.name=warmup_cosine", "max_epochs=3"], 2,
     "scheduler.warmup_epochs=10 is longer than the whole run, max_epochs=3"),
    ("main_linear.py", ["checkpoint=RUN", "trainer.x=1"], 2, "unknown key trainer"),
    ("main_linear.py", ["checkpoint=RUN", "accelerator=gpu"], 5, "no usable GPU"),
    ("main_umap.py", ["checkpoint=RUN", "metric=nearly"], 2, "metric must be one of cosine, euclidean, got 'nearly'"),
    ("main_umap.py", ["checkpoint=other.ckpt"], 2, "other.ckpt holds no backbone"),
    ("main_pretrain.py", ["--config-name", "none.yaml"], 2, "--config-name none.yaml"),
    ("main_pretrain.py", ["--config-path", "broken", "--config-name", "x.yaml"], 2, "x.yaml is not valid YAML"),
    ("main_pretrain.py", ["--config-path", "broken", "--config-name", "circle"], 2, "the defaults lists of the config"),
    ("main_pretrain.py", ["--confg-name", "x"], 2, "unknown flag --confg-name, did you mean --config-name?"),
    ("main_pretrain.py", ["--config-name"], 2, "--config-name needs a value"),
    ("main_pretrain.py", ["--cfg", "nope"], 2, "--cfg needs one of job, hydra, all, got 'nope'"),
    ("main_pretrain.py", ["-h2"], 2, "unknown flag -h2"),
    ("main_pretrain.py", ["hydra.run.dir=file/x/y"], 2, "file/x"),
    ("main_pretrain.py", ["resume="], 2, "resume must name a checkpoint or a run's directory"),
    ("main_pretrain.py", ["data.dataset=image_folder", "data.train_path=noise"], 3, "none of"),
    ("main_pretrain.py", ["checkpoint.dir=file/runs"], 5, "checkpoint.dir=file/runs cannot be written"),
    ("main_pretrain.py", ["checkpoint.fallback=file/other"], 5, "checkpoint.fallback=file/other cannot be written"),
    ("main_pretrain.py", ["devices=1000"], 5, "devices=1000 processes on"),
    ("launcher.py", ["--gpu", "1"], 2, "unknown flag --gpu, did you mean '--gpus'?"),
    ("launcher.py", ["--script", "main_none.py"], 2, "--script main_none.py does not exist"),
    ("launcher.py", ["--gpus", "900"], 5, "--gpus 900"),
    ("solo.certify", ["nnlcr"], 2, "no 'nnlcr' in solo.methods, did you mean 'nnclr'?"),
    ("solo.certify", ["os:path"], 2, "'os:path' is no method: it has no Config dataclass"),
    ("solo.certify", [], 2, "the following arguments are required: METHOD"),
    ("solo.certify", ["nnclr", "--ranks", "x"], 2, "argument --ranks: invalid int value: 'x'"),
    ("solo.data.check", ["noise", "--nope"], 2, "unrecognized arguments: --nope"),
    ("solo.data.check", ["none"], 2, "none"),
    ("solo.data.check", ["noise"], 3, "none of the 20 train images can be read"),
    ("solo.data.check", ["file"], 2, "file is neither a folder nor a .npz, .tar, .h5 or .hdf5 file"),
    ("solo.data.pack", ["none", "x.h5"], 2, "data.train_path=none does not exist"),
    ("solo.data.pack", ["noise", "file"], 2, "file"),
    ("solo.eval.voc", ["checkpoint=RUN", "root=noise"], 2, "noise"),
    ("solo.eval.voc", ["checkpoint=RUN", "rooot=noise"], 2, "unknown key rooot: did you mean root?"),
    ("solo.bench", ["data", "--nope"], 2, "unrecognized arguments: --nope"),
    ("solo.bench", ["data"], 2, "--recipe cifar-asym is neither a file nor, in this repository's folder, one of"),
    ("solo.bench", ["chaos", "--kills", "0"], 2, "--kills must be at least 1, got 0"),
    ("solo.bench", ["nothing"], 2, "python -m solo.bench takes one of"),
    ("solo.export", ["none.ckpt", "x.safetensors"], 2, "checkpoint=none.ckpt does not exist"),
]
KINDS = {error.exit_code: error.kind for error in (ConfigError, DataError, NumericsError, EnvironmentFault)}


def run(command, words, monkeypatch):
    """As ``python COMMAND WORDS`` or ``python -m COMMAND WORDS``, in this process."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setattr(sys, "argv", [command, *words])
    if command.endswith(".py"):
        runpy.run_path(str(ROOT / command), run_name="__main__")
    else:
        with pytest.MonkeyPatch.context() as patch:
            name = f"{command}.__main__" if command == "solo.bench" else command
            patch.delitem(sys.modules, name, raising=False)
            runpy.run_module(command, run_name="__main__")


@pytest.mark.slow
@pytest.mark.parametrize("command, words, code, said", WRONG, ids=[f"{row[0]} {row[1]}" for row in WRONG])
def test_a_users_mistake_is_one_line(command, words, code, said, tmp_path, monkeypatch, capfd):
    if torch.cuda.is_available() and ("accelerator=gpu" in words or "--gpus" in words):
        pytest.skip("this machine has a GPU")
    make_run(tmp_path / "run")
    for folder in ("noise/a", "broken"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(20):
        (tmp_path / "noise" / "a" / f"{i}.png").write_bytes(bytes(100))
    (tmp_path / "broken" / "x.yaml").write_text("a: [1")
    (tmp_path / "broken" / "circle.yaml").write_text("defaults: [circle]")
    (tmp_path / "damaged.ckpt").write_bytes(next((tmp_path / "run").rglob("*.ckpt")).read_bytes()[:-200])
    (tmp_path / "file").write_text("")
    torch.save({"state_dict": {"head.weight": torch.zeros(1)}}, tmp_path / "other.ckpt")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        run(command, [word.replace("RUN", str(tmp_path / "run")) for word in words], monkeypatch)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert left.value.code == code and "Traceback" not in "\n".join(lines), lines
    assert lines and all(line.startswith(f"{KINDS[code]}: ") for line in lines), lines
    assert said in lines[0], lines


@pytest.mark.parametrize("debug", [False, True])
def test_debug_keeps_the_traceback(debug, monkeypatch, capsys):
    monkeypatch.setenv("SOLO_DEBUG", "1") if debug else monkeypatch.delenv("SOLO_DEBUG", raising=False)
    with pytest.raises(ConfigError if debug else SystemExit), reported():
        raise ConfigError("one\ntwo")
    assert capsys.readouterr().err.splitlines() == ([] if debug else ["config error: one", "config error: two"])


@pytest.mark.parametrize("command, words", [
    ("main_knn.py", ["checkpoint=none.ckpt", "--debug"]),
    ("launcher.py", ["--debug", "--script", "main_none.py"]),
    ("solo.certify", ["nnlcr", "--debug"]),
    ("solo.data.check", ["none", "--debug"]),
    ("solo.data.pack", ["none", "x.h5", "--debug"]),
    ("solo.bench", ["data", "--debug"]),
    ("solo.export", ["none.ckpt", "x.safetensors", "--debug"]),
], ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_knows_debug(command, words, tmp_path, monkeypatch):
    monkeypatch.setenv("SOLO_DEBUG", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="none|nnlcr|recipe"):
        run(command, words, monkeypatch)


def test_every_kind_has_its_own_code():
    kinds = [thing for thing in vars(errors).values()
             if isinstance(thing, type) and issubclass(thing, SoloError) and thing is not Unanswered]
    codes = [kind.exit_code for kind in kinds if kind is not Interrupted]
    assert len(set(codes)) == len(codes) and Interrupted("x", 15).exit_code == 143
    page = (ROOT / "docs" / "errors.md").read_text()
    assert all(re.search(rf"\| {code} \|", page) for code in codes if code != 1)


def test_every_error_of_the_source_is_of_a_kind_of_the_page():
    """A kind has the word its lines begin with and its code there, and nothing else ends a process with a number of its own."""
    page = (ROOT / "docs" / "errors.md").read_text()
    kinds = {kind.__name__: kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SoloError)}
    for kind in kinds.values():
        code = "128 + n" if kind is Interrupted else kind.exit_code
        assert re.search(rf"^\| {re.escape(str(code))} \| `{kind.kind}`", page, re.MULTILINE), kind
    for path in sorted((ROOT / "solo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            bases = {ast.unparse(base) for base in getattr(node, "bases", ())}
            if isinstance(node, ast.ClassDef) and bases & set(kinds) and path.stem != "errors":
                given = {ast.unparse(target) for part in node.body if isinstance(part, ast.Assign) for target in part.targets}
                assert not given & {"kind", "exit_code"}, f"{path}: {node.name}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("SystemExit", "sys.exit", "exit", "quit"):
                number = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
                assert number in ([], [0]), f"{path}:{node.lineno} {ast.unparse(node)}"


def test_a_fault_of_ours_is_not_dressed_up(monkeypatch):
    with pytest.raises(ZeroDivisionError), reported():
        1 / 0  # noqa: B018


def full():
    """The end of a pipe that takes nothing more, and that nobody reads."""
    _, end = os.pipe()
    os.set_blocking(end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(end, bytes(4096))
    os.set_blocking(end, True)
    return os.fdopen(end, "w")


@pytest.mark.parametrize("stream", [lambda: None, lambda: open("/dev/full", "w"), full], ids=["none", "full disk", "full pipe"])
def test_what_ends_a_process_at_once_ends_it_whatever_becomes_of_its_streams(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "_SPEAKING", 0.2)

    def body(rank):
        sys.stdout = sys.stderr = stream()
        if sys.stdout:
            sys.stdout.write("x")
        errors.end_at_once("no answer")

    def unable(rank):                   # no more threads may be had
        threading.Thread.start = lambda thread: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
        errors.end_at_once("no answer")

    (other,) = processes.fork(1, tmp_path / "other", unable)
    assert os.waitstatus_to_exitcode(processes.wait([other], 20)[other]) == 5
    (child,) = processes.fork(1, tmp_path / "log", body)
    statuses = processes.wait([child], 20)
    processes.kill([child] if child not in statuses else [])
    assert os.waitstatus_to_exitcode(statuses[child]) == 5
    assert (tmp_path / "log").read_text() == "environment error: no answer\n"


def test_modules_with_a_command_are_all_here():
    commands = {command for command, *_ in WRONG}
    assert {path.name for path in ROOT.glob("*.py")} - {"setup.py"} <= commands
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "solo").rglob("*.py") if "__main__" in path.read_text()]
    found = {".".join(path.parts).removesuffix(".__main__") for path in files}
    assert found - {"solo.torchrun", "solo.bench.peers.worker"} <= commands, sorted(found - commands)
