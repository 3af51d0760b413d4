"""Attacks that are not one file: caches, links, plugins, archives of other libraries, names on command lines."""

import json
import os
import shlex
import subprocess
import sys
import zlib
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import torch

from solo import checkpoint, launch
from solo.data import cache
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.decoding import BadImage
from solo.data.sources import ArraySource
from solo.errors import ConfigError
from solo.eval.prepare import data_config, data_module
from solo.export import Pretrained, load
from solo.methods import METHODS
from tests.attacks.checkpoints import config_of
from tests.attacks.datasets import dumped, evil_array
from tests.attacks.sandbox import MIB, confined
from tests.conftest import ROOT
from tests.eval.runs import make_run

SHAPE = (2, 2, 3)


class Named(ArraySource):
    """Two images that are worth a cache."""

    def fingerprint(self) -> str:
        return "f" * 24


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Named:
    monkeypatch.setattr(cache, "WORTH", 2)
    return Named(np.full((2, *SHAPE), 7, np.uint8), np.zeros(2), ["a"])


PIXELS = np.zeros((2, *SHAPE), np.uint8)
GOOD = {"crc32": zlib.crc32(PIXELS.data), "unreadable": {}}
POISON = {
    "objects": (lambda ran: dumped(evil_array(ran)), json.dumps(GOOD)),
    "another shape": (lambda ran: dumped(np.zeros((3, *SHAPE), np.uint8)), json.dumps(GOOD)),
    "another type": (lambda ran: dumped(PIXELS.astype(np.int64)), json.dumps(GOOD)),
    "giant shape": (lambda ran: dumped(PIXELS).replace(b"(2, 2, 2, 3)", b"(2, 2,2**9,)"), json.dumps(GOOD)),
    "cut": (lambda ran: dumped(PIXELS)[:-5], json.dumps(GOOD)),
    "empty": (lambda ran: b"", json.dumps(GOOD)),
    "deep facts": (lambda ran: dumped(PIXELS), "[" * 200_000),
    "huge facts": (lambda ran: dumped(PIXELS), "[" + "1," * (4 << 20) + "1]"),
    "facts in a list": (lambda ran: dumped(PIXELS), "[1]"),
    "facts of another kind": (lambda ran: dumped(PIXELS), json.dumps({**GOOD, "unreadable": 3})),
    "another sum": (lambda ran: dumped(PIXELS), json.dumps({**GOOD, "crc32": 1})),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_cache_is_made_anew(kind: str, source: Named, tmp_path: Path) -> None:
    folder, ran = tmp_path / "kept", tmp_path / "RAN"
    folder.mkdir(mode=0o700)
    pixels, facts = POISON[kind]
    (folder / f"{source.fingerprint()}.npy").write_bytes(pixels(ran))
    (folder / f"{source.fingerprint()}.json").write_text(facts)

    def read() -> None:
        found = cache.decoded(source, SHAPE, folder)
        assert found is not None and (found.images == 7).all() and not found.unreadable

    assert confined(read, 1024 * MIB).kind == "returned" and not ran.exists()


def test_reasons_in_a_cache_are_text(source: Named, tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    (folder / f"{source.fingerprint()}.npy").write_bytes(dumped(PIXELS))
    (folder / f"{source.fingerprint()}.json").write_text(json.dumps({**GOOD, "unreadable": {"0": {"x": 1}}}))
    found = cache.decoded(source, SHAPE, folder)
    assert found is not None and found.unreadable == {0: "{'x': 1}"}


def test_links_planted_in_a_cache_are_not_followed(source: Named, tmp_path: Path) -> None:
    folder, victim = tmp_path / "kept", tmp_path / "victim"
    folder.mkdir(mode=0o700)
    victim.write_text("precious")
    for suffix in (".part", ".npy", ".json"):
        (folder / f"{source.fingerprint()}{suffix}").symlink_to(victim)
    assert cache.decoded(source, SHAPE, folder) is not None
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770])
def test_a_cache_that_others_may_write_is_not_used(
    mode: int, source: Named, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    folder.chmod(mode)
    assert cache.decoded(source, SHAPE, folder) is not None
    assert not list(folder.iterdir())
    assert f"others may write to {folder}: chmod go-w {folder}; data.cache_dir=FOLDER keeps" in caplog.text
    folder.chmod(mode & ~0o022)
    assert cache.decoded(source, SHAPE, folder) is not None and list(folder.iterdir())


@pytest.mark.parametrize("linked", [False, True], ids=["the folder", "a link of its name"])
def test_a_cache_of_another_user_is_not_used_by_root_either(
    linked: bool, source: Named, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir(mode=0o700)
    if linked:
        folder.rename(tmp_path / "own")
        folder.symlink_to("own")
    if os.getuid() == 0:
        os.chown(folder, 1, -1, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 0)
    assert cache.decoded(source, SHAPE, folder) is not None
    assert not list(folder.iterdir())
    assert f"others may write to {folder}: it is another user's; use a folder of your own" in caplog.text


def test_a_cache_may_lie_behind_a_link_of_ones_own(source: Named, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "kept").symlink_to("disk")
    assert cache.decoded(source, SHAPE, tmp_path / "kept") is not None and list((tmp_path / "disk").iterdir())


def test_a_new_cache_is_ours_alone(source: Named, tmp_path: Path) -> None:
    cache.decoded(source, SHAPE, tmp_path / "kept")
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "kept").iterdir() if path.suffix != ".lock")


def test_links_planted_beside_a_checkpoint_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("1.ckpt", "manifest.json"):
        (tmp_path / name).symlink_to(victim)
    content = {"state_dict": {"w": torch.zeros(2)}, "global_step": 1, "epoch": 0, "solo": "{}"}
    checkpoint.save(content, tmp_path / "1.ckpt")       # the manifest that is there is none, and is made anew
    assert victim.read_text() == "precious"
    assert not any((tmp_path / name).is_symlink() for name in ("1.ckpt", "manifest.json"))
    assert [entry.file for entry in checkpoint.manifest(tmp_path)] == ["1.ckpt"]


@pytest.mark.parametrize("group", ["solo.methods", "solo.datasets"])
def test_an_installed_plugin_is_loaded_when_named_and_not_before(group: str, tmp_path: Path) -> None:
    """In a process of its own: metadata on ``sys.path`` stays for good."""
    site, ran = tmp_path / "site", tmp_path / "RAN"
    (site / "evil-1.0.dist-info").mkdir(parents=True)
    (site / "evil-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (site / "evil-1.0.dist-info" / "entry_points.txt").write_text(f"[{group}]\nevil = evil:Evil\n")
    (site / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")

    def use() -> None:
        sys.path.insert(0, str(site))
        assert "evil" in entry_points(group=group).names
        registry = {"solo.methods": METHODS, "solo.datasets": DATASETS}[group]
        list(registry), registry["nnclr" if group == "solo.methods" else "fake"]
        with pytest.raises(ConfigError, match="did you mean 'evil'"):
            registry["evill"]
        assert not ran.exists()
        registry["evil"]
        assert ran.exists()

    end = confined(use, 1024 * MIB)
    assert end.kind == "returned", end.text


def test_a_checkpoint_cannot_name_a_plugin_for_its_images(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    source = load(run)
    hostile = Pretrained(**{**vars(source), "experiment": {"data": {"dataset": "evil:Evil"}}})
    with pytest.raises(ConfigError, match="names a plugin, 'evil:Evil'"):
        data_config(hostile, {})
    assert data_config(hostile, {"dataset": "evil:Evil"}).dataset == "evil:Evil"       # the user does
    assert "evil" not in sys.modules


def test_a_checkpoint_neither_downloads_images_nor_says_where_they_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, victim = load(make_run(tmp_path / "run")), tmp_path / "victim"
    fetched: list[object] = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *arguments, **keywords: fetched.append(arguments))
    asked = {"dataset": "cifar10", "train_path": str(victim), "download": True, "cache_dir": str(victim / "cache")}
    hostile = Pretrained(**{**vars(source), "experiment": {"data": asked}})
    config = data_config(hostile, {})
    assert (config.dataset, config.download, config.cache_dir) == ("cifar10", False, None)
    with pytest.raises(ConfigError, match="data.train_path"):
        data_module(hostile, config, [], 2)
    assert not fetched and not victim.exists()
    own = {"download": True, "cache_dir": "mine"}
    assert {key: getattr(data_config(hostile, own), key) for key in own} == own         # the user may


def test_pretrained_weights_are_not_fetched_for_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    content = checkpoint.read(checkpoint.resolve(run))
    facts = json.loads(content["solo"])
    facts["config"]["backbone"]["kwargs"]["pretrained"] = True
    checkpoint.save({**content, "solo": json.dumps(facts)}, tmp_path / "other" / "x.ckpt")
    assert load(tmp_path / "other" / "x.ckpt").config.kwargs == {"channels": [4, 4, 8, 8]}


def test_pickles_of_torchvision_are_refused_by_their_sum(tmp_path: Path) -> None:
    """CIFAR's published files are pickles: torchvision compares their MD5 before it opens them."""
    ran, folder = tmp_path / "RAN", tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(dumped(evil_array(ran)))
    config = DataConfig(dataset="cifar10", train_path=str(tmp_path))
    with pytest.raises(ConfigError, match="is not there"):
        DATASETS["cifar10"].open(config, True)
    assert not ran.exists()


SHELL = ("x; touch RAN", "$(touch RAN)", "`touch RAN`", "x\ntouch RAN", "x && touch RAN", "'; touch RAN; '", "a b", "$HOME")


@pytest.mark.parametrize("word", SHELL)
def test_words_of_a_command_line_arrive_as_they_are(word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "main_echo.py").write_text("import json, sys\njson.dump(sys.argv[1:], open('received', 'w'))\n")
    arguments = ["--script", "main_echo.py", f"name={word}", f"data.train_path={word}"]
    script = "import json, pathlib, sys; from solo.launch import main; main(json.loads(sys.argv[1]), pathlib.Path('.'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script, json.dumps(arguments)], cwd=tmp_path, env=environment, check=True)
    assert json.loads((tmp_path / "received").read_text()) == [f"name={word}", f"data.train_path={word}"]
    assert not (tmp_path / "RAN").exists()
    launch.main([*arguments, "--dry-run"], tmp_path)
    assert shlex.split(capsys.readouterr().out)[-2:] == arguments[2:]


@pytest.mark.parametrize("flag", ["--partition", "--account", "--qos", "--constraint", "--time"])
@pytest.mark.parametrize("word", SHELL)
def test_no_word_becomes_a_line_of_a_job_script(flag: str, word: str, tmp_path: Path) -> None:
    (tmp_path / "main_echo.py").write_text("")
    words = ["--slurm", "--processes", "1", "--script", "main_echo.py", "--dry-run"]
    with pytest.raises(ConfigError, match=flag):
        launch.main([*words, *([] if flag == "--time" else ["--time", "1"]), flag, word], tmp_path)


@pytest.mark.parametrize("job", ["1; touch RAN", "$(touch RAN)", "1\n2", "", "../1", "1_2_3", "１"])
def test_no_job_number_is_trusted(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path}/RAN\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert launch._requeue(job).startswith("not requeued: SLURM_JOB_ID=") and not (tmp_path / "RAN").exists()
    assert "requeued job 31_2" in launch._requeue("31_2") and (tmp_path / "RAN").exists()


def test_an_image_that_vanishes_is_a_bad_image(tmp_path: Path) -> None:
    from solo.data.decoding import read_file

    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(BadImage):
            read_file(path)


def test_what_a_checkpoint_may_ask_for_is_all_that_is_kept(tmp_path: Path) -> None:
    torch.save(config_of(backbone={"name": "resnet18"}, data={"dataset": "evil:Evil"}), tmp_path / "x.ckpt")
    with pytest.raises(ConfigError, match="does not fit backbone resnet18"):
        load(tmp_path / "x.ckpt")
