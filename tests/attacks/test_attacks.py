"""Every file of `tests.attacks.make` is refused in one line, soon, in little memory, and nothing in it runs."""

import contextlib
import gc
import io
import json
import os
import pickle
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import solo.run as run
from solo import checkpoint, config, export, loggers, tuning
from solo.data.config import DataConfig
from solo.data.decoding import BadImage, decode
from solo.data.module import DataModule
from solo.data.tar import TarSource
from solo.data.views import View
from solo.data.voc import read_annotation
from solo.errors import ConfigError, DataError
from solo.eval.results import record
from solo.experiment import experiment
from solo.reading import read_tensors
from tests.attacks import checkpoints, configs, datasets, fuzz, registry
from tests.attacks.make import ATTACKS, made
from tests.attacks.sandbox import MIB, SECONDS, confined

SPARE = 256 * MIB               # of memory, beside twice the file
IMAGE = 640 * MIB               # of memory, for the largest image that is read: 80 MP
QUICK = (                       # a telling one of each kind: it would run code, leave its folder, or ask for too much
    "checkpoint/os-system-as-weight", "safetensors/a-pickle", "manifest/file-above", "yaml/object-apply", "npz/objects",
    "tar/a-pickle", "hdf5/link-outside", "tar-left-out/link", "image/png-giant", "voc/outside", "results/code", "search/code",
    "server/code",
)


def is_plain_data(name: str) -> bool:
    """Files that hold tensors and plain values, as they should: it is what they ask for that is refused."""
    plain = ("hub", "local", "fetches", "loads", "model-of", "crops", "backbone-of", "instantiator")
    return name.split("/")[1].startswith(plain)


def read_checkpoint(file: Path, name: str) -> None:
    """By all doors: resuming, a teacher's weights, evaluation."""
    doors: list[Callable[[], object]] = [lambda: export.load(file)]
    if not is_plain_data(name):
        doors.append(lambda: checkpoint.provenance(checkpoint.read(file), file))
    if (short := name.split("/")[1]) in (*checkpoints.WORDS, *checkpoints.PAYLOADS):
        doors.append(lambda: read_tensors(file, stand_ins=short in checkpoints.WORDS))
    for door in doors:
        with pytest.raises(ConfigError) as refused:
            door()
        assert len(str(refused.value).splitlines()) == 1
    raise refused.value


def read_manifest(file: Path, name: str) -> None:
    folder = file.parent
    (folder / "good.ckpt").write_bytes(b"not what the manifest says")
    (folder.parent / "victim").write_text("precious")
    try:
        checkpoint.prune(folder, newest=0 if len(file.read_bytes()) < MIB else 1)
    except ConfigError:
        pass
    assert (folder.parent / "victim").read_text() == "precious"
    checkpoint.newest(folder)


def run_command(file: Path, name: str) -> None:
    """As ``main_pretrain.py`` does, until the model stands."""

    @config.main(config_path="unused")
    def command(values: dict[str, Any]) -> None:
        run.build(experiment(values))

    sys.argv[:] = ["main_pretrain.py", "--config-path", str(file.parent), "--config-name", file.name]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            command()
    except SystemExit as error:
        lines = said.getvalue().splitlines()
        assert error.code == 2 and lines and all(line.startswith("config error: ") for line in lines), said.getvalue()
        raise ConfigError(said.getvalue()) from None


def read_images(file: Path, name: str) -> None:
    dataset = name.split("/")[0]
    data = DataModule(DataConfig(dataset=dataset, train_path=str(file), num_workers=0), [View(crop_size=8)], 1, seed=1)
    for _ in data.train_dataloader():
        pass


def read_rest_of_tar(file: Path, name: str) -> None:
    source = TarSource(file, "", 3, "data.train_path")
    assert source.load(0).shape == (8, 8, 3)
    for i in range(1, len(source)):         # declared, and not there
        with pytest.raises(BadImage):
            source.load(i)


def read_picture(file: Path, name: str) -> None:
    try:
        decode(file.read_bytes(), 3)
    except BadImage as error:
        raise DataError(str(error)) from None


def read_voc(file: Path, name: str) -> None:
    try:
        read_annotation(file)
    except ValueError as error:
        raise DataError(str(error)) from None


def write_results(file: Path, name: str) -> None:
    record(file.parent, "knn", {"acc1": 1.0})
    assert json.loads(file.read_text()) == {"knn": {"acc1": 1.0}}


def read_server(file: Path, name: str) -> None:
    assert loggers._read(file) == ("", {})


READERS: dict[str, Callable[[Path, str], object]] = {
    "checkpoint": read_checkpoint, "safetensors": lambda file, name: export.load(file), "manifest": read_manifest,
    "yaml": run_command, "npz": read_images, "tar": read_images, "hdf5": read_images, "tar-left-out": read_rest_of_tar,
    "image": read_picture, "voc": read_voc, "results": write_results, "search": lambda file, name: tuning._read(file),
    "server": read_server,
}
HARMLESS = ("tar-left-out", "results", "server")        # read, without what does not belong there


def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 200 and {name.split("/")[0] for name in ATTACKS} == set(READERS)
    assert set(QUICK) <= set(ATTACKS) and {name.split("/")[0] for name in QUICK} == set(READERS)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ATTACKS
])
def test_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, ran = tmp_path / "place", tmp_path / "RAN"
    place.mkdir()
    file = made(place, name, ran)
    assert not ran.exists()
    before = {path for path in tmp_path.rglob("*")}
    monkeypatch.chdir(place)
    surface = name.split("/")[0]
    allowed = 2 * file.stat().st_size + (IMAGE if surface == "image" else SPARE)
    end = confined(lambda: READERS[surface](file, name), memory=allowed + 1024 * MIB)
    assert not ran.exists(), "it ran"
    if surface in HARMLESS:
        assert end.kind == "returned", end.text
    else:
        assert end.kind == "refused" and end.code in (2, 3), end
        assert len(end.text.splitlines()) <= 6 and len(end.text) < 2000, end.text
    assert end.seconds < SECONDS and end.grown < allowed, end
    known = {tmp_path / "victim", place / "good.ckpt", place / "results.json"}
    assert {path for path in tmp_path.rglob("*")} - before <= known, "it wrote files"


@pytest.mark.slow
@pytest.mark.parametrize("parser", fuzz.PARSERS)
def test_damaged_at_random(parser: str) -> None:
    """300 inputs each; ``python -m tests.attacks.fuzz`` does 10,000."""
    refused, read, longest, grown = fuzz.campaign(parser, 300)
    assert refused > 20 and refused + read == 300 and longest < SECONDS


@pytest.mark.slow
def test_every_damage_to_a_checkpoint_with_a_manifest_is_found(tmp_path: Path) -> None:
    """1,000 flipped bits and 200 cuts, the previous checkpoint used each time."""
    draw = random.Random(0)
    for step in (1, 2):
        checkpoint.save({**checkpoints.whole(), "global_step": step}, tmp_path / f"{step}.ckpt")
    good = (tmp_path / "2.ckpt").read_bytes()
    for i in range(1200):
        bad = bytearray(good)
        if i < 1000:
            bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        else:
            del bad[draw.randrange(len(bad)) :]
        (tmp_path / "2.ckpt").write_bytes(bad)
        with pytest.raises(ConfigError, match="damaged"):
            checkpoint.read(tmp_path / "2.ckpt")
        assert checkpoint.newest(tmp_path) == tmp_path / "1.ckpt"


# The harness itself: what it must be able to see.


def test_what_the_attacks_are_made_of_is_readable_without_the_attack(tmp_path: Path) -> None:
    saved, by_hand = tmp_path / "saved.ckpt", tmp_path / "hand.ckpt"
    checkpoints.save(checkpoints.whole(), saved)
    checkpoints.archive(by_hand, checkpoints.described(checkpoints.tensor()), checkpoints.FOUR)
    for file in (saved, by_hand):
        assert checkpoint.provenance(checkpoint.read(file), file)["method"] == "nnclr"
    assert torch.equal(checkpoint.read(by_hand)["x"], torch.zeros(4))
    for surface, suffix in (("npz", ".npz"), ("tar", ".tar")):
        file = tmp_path / f"x{suffix}"
        (datasets.npz() if surface == "npz" else datasets.tar())(file, tmp_path / "RAN")
        read_images(file, f"{surface}/x")
    (tmp_path / "x.yaml").write_text(configs.BASE)
    argv = list(sys.argv)
    run_command(tmp_path / "x.yaml", "yaml/x")
    sys.argv[:] = argv
    assert decode(datasets.jpeg(), 3).shape == decode(datasets.png(16, 16), 3).shape == (16, 16, 3)


@pytest.mark.parametrize("payload", ["os-system", "popen", "exec", "eval", "open", "path", "runpy"])
def test_the_payloads_work(payload: str, tmp_path: Path) -> None:
    ran = tmp_path / "RAN"
    content = pickle.dumps(registry.payloads(ran)[payload])

    def unsafely() -> None:
        pickle.loads(content)
        for _ in range(100):        # a program takes a moment
            if ran.exists():
                return
            time.sleep(0.05)

    confined(unsafely, 256 * MIB)
    assert ran.exists()


@pytest.mark.slow
def test_the_sandbox_sees_memory_time_and_errors() -> None:
    assert confined(lambda: bytearray(os.urandom(1) * (64 * MIB)), 256 * MIB).grown > 60 * MIB
    garbage: list[object] = [bytearray(os.urandom(1) * (200 * MIB))]
    garbage.append(garbage)
    del garbage         # the child's collection would make room for what it takes
    assert confined(lambda: (gc.collect(), bytearray(os.urandom(1) * (64 * MIB))), 256 * MIB).grown > 60 * MIB
    once = [bytearray(os.urandom(1) * 100_000) for _ in range(3000)]
    del once[:-1]       # nor is what it takes there already, free below the last
    assert confined(lambda: bytearray(os.urandom(1) * (64 * MIB)), 256 * MIB).grown > 60 * MIB and once
    assert "MemoryError" in confined(lambda: bytearray(512 * MIB), 256 * MIB).text
    assert confined(lambda: sum(i * i for i in range(10**10)), 256 * MIB, seconds=1).kind == "died"
    assert confined(lambda: 1 / 0, 256 * MIB).kind == "raised"
    assert confined(lambda: torch.zeros(3), 256 * MIB).kind == "returned"
