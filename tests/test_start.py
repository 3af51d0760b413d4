"""Where a run begins: said at the start, decided by rank 0, and never behind what its directory holds."""

import shutil
import threading
import time
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from solo import checkpoint, start
from solo.data import sources
from solo.data.config import DataConfig
from solo.data.module import DataModule
from solo.data.views import View
from solo.errors import ConfigError, EnvironmentFault
from solo.experiment import experiment
from solo.run import build, pretrain
from solo.testing import run_ranks
from tests.data.common import make_folder
from tests.test_continuing import watched
from tests.tiny import values


def lines(caplog):
    said = [record.getMessage() for record in caplog.records if record.name == "solo"]
    return [line for line in said if line.startswith(("run directory", "resume="))]


@pytest.fixture
def said(caplog):
    """``said(content)`` -> what a run says about where it begins."""
    caplog.set_level("INFO", "solo")

    def run(content):
        caplog.clear()
        pretrain(experiment(content))
        return lines(caplog)

    return run


def test_a_run_says_where_it_lives(tmp_path, said):
    content = values("nnclr", tmp_path, max_epochs=1)
    run_dir = experiment(content).run_dir(8)
    assert said(content) == [f"run directory: {run_dir} (new)"]
    assert said(content) == [f"run directory: {run_dir} (complete with step-000000008.ckpt, epoch 1, step 8)"]


def test_a_path_to_resume_is_forgotten_once_the_run_is_further(tmp_path, said):
    first = values("nnclr", tmp_path / "first", max_epochs=1)
    said(first)
    given = experiment(first).run_dir(8)
    content = values("nnclr", tmp_path / "second", max_epochs=2, resume=str(given))
    run_dir = experiment(content).run_dir(8)
    file = given / "checkpoints" / "step-000000008.ckpt"
    assert said(content) == [f"run directory: {run_dir} (new, continuing {file}, epoch 1, step 8)"]
    assert said(content) == [
        f"resume={given}: this run has gone on from there",
        f"run directory: {run_dir} (complete with step-000000016.ckpt, epoch 2, step 16)",
    ]


class Content(dict):
    """One that can be watched."""


def test_a_checkpoint_is_read_once_and_not_kept(tmp_path, monkeypatch):
    read, contents, kept = checkpoint.read_tensors, [], []

    def watched(path):
        content = Content(read(path))
        contents.append(weakref.ref(content))
        return content

    monkeypatch.setattr(checkpoint, "read_tensors", watched)
    watch = pl.Callback()
    watch.on_train_batch_start = lambda *_: kept.extend(each() for each in contents)
    done = pretrain(experiment(values("nnclr", tmp_path, max_epochs=1)))
    for changes in ({"max_epochs": 2, "resume": str(done.checkpoint)}, {"max_epochs": 1}):      # goes on; is complete
        contents.clear()
        pretrain(experiment(values("nnclr", tmp_path, **changes)), [watch])
        assert len(contents) == 1
    assert kept and not any(kept)


def test_a_requeued_job_does_not_begin_anew_again(tmp_path, said, monkeypatch):
    content = values("nnclr", tmp_path, max_epochs=1, resume="never")
    said(content)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (line,) = said(content)
    assert "complete with" in line and len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory):
    """A run that a signal ended at step 5 of 8, and the weights that it goes on to."""
    folder = tmp_path_factory.mktemp("broken_off")
    content = values("nnclr", folder / "run", max_epochs=1)
    watched(5, **content)
    shutil.copytree(folder / "run", folder / "kept", symlinks=True)
    return folder / "kept", pretrain(experiment(content)).method.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", "path", "earlier", "complete"])
def test_a_checkpoint_is_verified_and_loaded_once(resume, broken_off, tmp_path, monkeypatch):
    """What was judged is what is trained on: behind its verdict, the file may be anything."""

    def weights(name, **changes):
        config = experiment(values("nnclr", tmp_path / name, max_epochs=1, **changes))
        return pretrain(config).method.state_dict()

    kept, whole = broken_off
    shutil.copytree(kept, tmp_path / "run", symlinks=True)
    (first,) = (path.resolve() for path in tmp_path.glob("run/*/last.ckpt"))
    if resume in ("earlier", "complete"):
        weights("run")
    (last,) = (path.resolve() for path in tmp_path.glob("run/*/last.ckpt"))
    looks, begin, digest, read_tensors = [], start.begin, checkpoint.digest, checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "digest", lambda path: looks.append("sum") or digest(path))
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path: looks.append("load") or read_tensors(path))

    def begun(*arguments):
        found = begin(*arguments)
        assert looks == ["sum", "load"]
        last.write_bytes(b"another one")
        return found

    monkeypatch.setattr("solo.run.begin", begun)
    found = weights("other", resume=str(last)) if resume == "path" else (
        weights("run", resume=str(first)) if resume == "earlier" else weights("run"))
    assert looks == ["sum", "load"] and all(torch.equal(found[name], value) for name, value in whole.items())


def decided(rank, content, refuse):
    """What two ranks make of one directory of which the second sees nothing, or something else."""
    config = experiment(content)
    if rank == 1:
        checkpoint.newest = lambda folder: None
    strategy = SimpleNamespace(root_device="cpu", checkpoint_io=checkpoint.AtomicCheckpointIO(config.run_dir(8)))
    real = pl.Trainer(logger=False, enable_checkpointing=False)
    trainer = SimpleNamespace(global_rank=rank, strategy=strategy, max_epochs=2, max_steps=-1, callbacks=[],
                              fit_loop=real.fit_loop, precision_plugin=real.precision_plugin)
    if refuse:
        config.resume = "nowhere.ckpt"
    try:
        found = start.begin(config, config.run_dir(8), build(config), trainer)
        return str(found.path), found.complete
    except (ConfigError, SystemExit) as error:
        return type(error).__name__, str(error)


@pytest.mark.slow
def test_rank_zero_decides_for_all(tmp_path):
    content = values("nnclr", tmp_path, max_epochs=2, max_steps=12)
    pretrain(experiment(content))
    file = experiment(content).run_dir(8) / "checkpoints" / "step-000000012.ckpt"
    assert run_ranks(decided, content, False) == [(str(file), False)] * 2
    assert run_ranks(decided, content, True) == [("ConfigError", "resume=nowhere.ckpt does not exist"), ("SystemExit", "0")]


def test_a_file_that_comes_late_is_waited_for_but_not_for_ever(tmp_path, monkeypatch):
    file = tmp_path / "late.ckpt"

    def write():
        time.sleep(0.3)
        file.write_bytes(b"12")
        time.sleep(0.3)
        file.write_bytes(b"1234")

    thread = threading.Thread(target=write)
    thread.start()
    start._wait_for(file, 4)
    assert file.read_bytes() == b"1234"
    thread.join()
    monkeypatch.setattr(start, "_PATIENCE", 0.2)
    with pytest.raises(EnvironmentFault, match="rank 0 does not see .*late.ckpt"):
        start._wait_for(file, 5)


def test_a_run_goes_on_with_other_images_only_where_it_is_told_to(tmp_path, said):
    images = {"dataset": "image_folder", "train_path": str(tmp_path / "images"), "train_size": None}
    first, *_ = make_folder(tmp_path / "images", {"a": 16, "b": 16})
    before = values("nnclr", tmp_path / "runs", max_epochs=1, data=images)
    said(before)
    first.rename(first.with_name("other.png"))
    more = {"max_epochs": 2, "resume": str(experiment(before).run_dir(8))}
    refused = values("nnclr", tmp_path / "runs", **more, data=images)
    accepted = values("nnclr", tmp_path / "runs", **more, data={**images, "accept_changed": True})
    with pytest.raises(ConfigError, match="the training images have other names, labels or sizes"):
        said(refused)
    assert "continuing" in said(accepted)[0]
    assert experiment(refused).run_dir(8) == experiment(accepted).run_dir(8)


def listed_alike(rank, folder, unsorted, different):
    """What two ranks make of one folder that lists itself in another order, or with other files, to the second."""
    walk = sources.walk

    def other(top):
        for root, folders, names in walk(top):
            yield root, folders[::-1], names[::-1] if not different else [name for name in names if name != "0001.png"]

    if rank == 1 and (unsorted or different):
        sources.walk = other
    data = DataModule(DataConfig(dataset="image_folder", train_path=str(folder)), [View(crop_size=8)], 2, seed=1)
    try:
        start.alike(experiment(values("nnclr", "runs")), images=data.listing)
    except (ConfigError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return "alike"


def test_ranks_that_list_other_images_stop_together(tmp_path):
    make_folder(tmp_path, {"a": 3, "b": 3})
    assert run_ranks(listed_alike, tmp_path, True, False) == ["alike", "alike"]
    first, second = run_ranks(listed_alike, tmp_path, False, True)
    assert first.startswith("ConfigError rank 1 differs: the list of training images=") and second == "SystemExit 0"


def built_alike(rank, change, processors):
    """What two ranks make of a change to the second one's weights, and what the first says."""
    start._processor = lambda: processors[rank]
    method, said = build(experiment(values("nnclr", "runs"))), []
    start.say = said.append
    if rank == 1:
        method.queue.keys[3, 1] += change
    try:
        start.alike(experiment(values("nnclr", "runs")), method=method)
    except (ConfigError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return " ".join(["alike", *said])


REFUSED = "ConfigError rank 1 differs: the initial weights="
NOTED = "alike note: rank 1 rounds the initial weights otherwise: B (rank 0: A)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "processors", "line"),
    [(0.0, "AA", "alike"), (0.0, "AB", "alike"), (1e-6, "AA", REFUSED), (1e-6, "AB", NOTED), (0.1, "AB", REFUSED)],
    ids=["alike", "alike on two kinds", "a bit on one kind", "a bit on two kinds", "more on two kinds"],
)
def test_ranks_begin_with_the_same_weights_but_for_the_rounding_of_their_processors(change, processors, line):
    first, second = run_ranks(built_alike, change, processors)
    if line == REFUSED:
        assert first.startswith(REFUSED) and second == "SystemExit 0"
    else:
        assert first == second == line


@pytest.mark.parametrize(("cpuinfo", "kind"), [
    ("processor: 0\nmodel name\t: AMD EPYC 7B13\nmodel name\t: AMD EPYC 7B13\n", "AMD EPYC 7B13"),
    ("model name\t: Intel(R) Xeon(R) CPU\n", "Intel(R) Xeon(R) CPU"),
    ("CPU implementer: 0x41\n", "aarch64"),
    (None, "aarch64"),
], ids=["AMD", "Intel", "without a name", "no Linux"])
def test_processors_of_different_makers_are_of_different_kinds(monkeypatch, cpuinfo, kind):
    def read_text(path):
        if cpuinfo is None:
            raise FileNotFoundError
        return cpuinfo

    monkeypatch.setattr(start.Path, "read_text", read_text)
    monkeypatch.setattr(start.platform, "processor", lambda: "")
    monkeypatch.setattr(start.platform, "machine", lambda: "aarch64")
    assert start._processor() == f"{kind} with {torch.backends.cpu.get_cpu_capability()}"


def held_alike(rank, change, code, runners):
    start._code, start.runner = (lambda: code[rank]), (lambda device: runners[rank])
    config = experiment(values("nnclr", "runs", **change[rank]))
    try:
        start.alike(config, method=build(config))
    except (ConfigError, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return "alike"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "code", "runners", "line"),
    [
        ([{}, {}], "aa", "TT", None),
        ([{"seed": 5}, {"seed": 6}], "aa", "TT", "rank 1 differs: seed=6 (rank 0: 5)"),
        ([{}, {"extra": {"mine": 1}}], "aa", "TT", "rank 1 differs: extra.mine=1 (rank 0: None)"),
        ([{}, {}], "ab", "TT", "rank 1 differs: solo's code=b (rank 0: a)"),
        ([{}, {}], "aa", ["Triton 3.9", "torch, no C compiler"],
         "rank 1 differs: kernels=torch, no C compiler (rank 0: Triton 3.9)"),
        ([{"extra": {"api_key": f"sk-{rank}"}} for rank in range(2)], "aa", "TT",
         "rank 1 differs: extra.api_key=(hidden) (rank 0: (hidden))"),
        ([{"data": {"cache_dir": f"/scratch/node{rank}"}} for rank in range(2)], "aa", "TT", None),
    ],
    ids=["alike", "seed", "key", "code", "kernels", "secret", "cache of a node"],
)
def test_ranks_that_differ_stop_together_and_name_what_differs(changes, code, runners, line):
    first, second = run_ranks(held_alike, changes, code, runners)
    assert (first, second) == ((f"ConfigError {line}", "SystemExit 0") if line else ("alike", "alike"))


def test_the_code_is_the_same_to_all_and_not_to_an_edited_copy(tmp_path, monkeypatch):
    mine = start._code()
    (tmp_path / "solo").mkdir()
    (tmp_path / "solo" / "start.py").write_text("edited")
    monkeypatch.setattr(start, "__file__", str(tmp_path / "solo" / "start.py"))
    assert start._code() != mine


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, method, width", [
    ("lars", "all4one", 512), ("adamw", "all4one", 16), ("sgd", "simclr", 16),
], ids=["4 MB", "AdamW, 0.4 MB", "0.2 MB"])
def test_too_little_room_is_known_before_the_first_step(tmp_path, monkeypatch, optimizer, method, width):
    content = values(method, tmp_path, max_epochs=1, method_kwargs={"proj_hidden_dim": width})
    content["optimizer"] = {"name": optimizer, "batch_size": 8, "lr": 0.01}
    config = experiment(content)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 0))
    with pytest.raises(EnvironmentFault) as caught:
        pretrain(config)
    estimate = start._estimate(config, build(config))
    needed = f"{estimate * config.checkpoint.most(1) / 1e6:.1f} MB needed, 0.0 MB free"
    assert str(caught.value) == f"{config.run_dir(8)} has no room for checkpoints: {needed}"
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    result = pretrain(config)
    real = result.checkpoint.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 0))
    assert pretrain(experiment(content)).checkpoint == result.checkpoint       # complete: nothing will be saved
    print(f"{estimate} bytes estimated, {real} real: {estimate / real - 1:+.1%}")
    assert 0.9 * real < estimate <= real


def test_a_run_whose_checkpoints_are_gone_does_not_begin_from_scratch(tmp_path):
    content = values("nnclr", tmp_path, max_epochs=1)
    run_dir = pretrain(experiment(content)).run_dir
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match="last.ckpt is there, but none of the checkpoints beside it: resume=FILE"):
        pretrain(experiment({**content, "max_epochs": 1}))
