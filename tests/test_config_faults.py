"""Config files and command lines as people write them: each is read as meant, or refused with the reason."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from solo import config
from solo.errors import ConfigError
from solo.experiment import experiment
from tests.conftest import ROOT
from tests.tiny import values

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def file(tmp_path):
    """Writes a YAML file: the tiny experiment, and these lines."""

    def write(lines="", **changes):
        path = tmp_path / "tiny.yaml"
        path.write_text(f"{yaml.safe_dump(values('nnclr', tmp_path / 'runs', **changes))}{lines}\n")
        return path

    return write


@pytest.mark.parametrize("lines, key", [
    ("seed: 1\nseed: 2", "seed"), ("extra: {a: 1, a: 2}", "a"), ("max_epochs: 7", "max_epochs"),
])
def test_a_key_that_stands_twice_is_refused(file, lines, key):
    with pytest.raises(ConfigError, match=f"is not valid YAML.*duplicate key {key}") as found:
        config.load(file(lines))
    assert len(str(found.value).splitlines()) == 1 and "tiny.yaml" in str(found.value)


@pytest.mark.parametrize("written, meant", [
    ("on", True), ("off", False), ("yes", True), ("No", False), ("true", True), ("1e-3", 1e-3), ("1E3", 1000.0), (".5", 0.5),
    ("1_000", 1000), ("~", None), ("'on'", "on"), ("'1e-3'", "1e-3"), ("2020-01-01", "2020-01-01"), ("n", "n"),
])
def test_words_of_yaml(file, written, meant):
    found = config.load(file(f"extra: {{x: {written}}}"))["extra"]["x"]
    assert found == meant and type(found) is type(meant)


@pytest.mark.parametrize("block, written, said", [
    ("scheduler", "{warmup_epochs: 'on'}", "scheduler.warmup_epochs must be a number, got 'on'"),
    ("scheduler", "{warmup_epochs: on}", "scheduler.warmup_epochs must be a number, got True"),
    ("knn", "{enabled: 'yes'}", "knn.enabled must be true or false, got 'yes'"),
    ("knn", "{enabled: 1}", "knn.enabled must be true or false, got 1"),
    ("probe", "{enabled: 'off'}", "probe.enabled must be true or false, got 'off'"),
])
def test_a_word_of_another_kind_is_refused(file, block, written, said):
    path = file()
    content = yaml.safe_load(path.read_text())
    content.pop(block, None)
    path.write_text(f"{yaml.safe_dump(content)}{block}: {written}\n")
    with pytest.raises(ConfigError) as found:
        experiment(config.load(path))
    assert str(found.value) == said


def test_numbers_with_an_exponent_are_numbers_everywhere(file):
    assert experiment(config.load(file(), ["optimizer.lr=1e-3"])).optimizer.lr == 1e-3
    path = file()
    path.write_text(path.read_text().replace("lr: 1.0", "lr: 1e-3"))
    assert experiment(config.load(path)).optimizer.lr == 1e-3


PATHS = [
    "a=b", "with space", "epoch=3-step=4.ckpt", "größe", "日本語/猫", "it's", 'say "x"', "a{b}", "(a)", "#1", "~/x", "100%",
    "a:b", "back\\slash", "end\\", "[x", "x]", "'", "@home", "$HOME", "a;b&c|d",
]


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key", ["data.train_path", "checkpoint.dir", "+resume", "++data.val_path"])
def test_any_path_can_be_typed(file, path, key):
    found = config.load(file(), [f"{key}={path}"])
    for part in key.lstrip("+").split("."):
        found = found[part]
    assert found == path


@pytest.mark.parametrize("written, meant", [
    ("'a,b'", "a,b"), ('"a b"', "a b"), ("'on'", "on"), ("[a,b]", ["a", "b"]), ("", ""),
])
def test_hydras_own_quotes_still_count(file, written, meant):
    assert config.load(file(), [f"extra.x={written}"])["extra"]["x"] == meant


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["a=b", "with space", "größe", "it's", 'say "x"', "a;b"])
def test_a_run_in_a_folder_of_any_name(folder, tmp_path, monkeypatch, capsys):
    """The config's folder, the run's folder and the folder of images."""
    from PIL import Image

    place = tmp_path / folder
    (place / "images" / "x").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (16, 16), (i, 0, 0)).save(place / "images" / "x" / f"{i}.png")
    content = values("nnclr", "unused", max_epochs=1, optimizer={"batch_size": 8}, probe={"enabled": False})
    content["data"] = {"dataset": "image_folder", "num_workers": 0}
    (place / "tiny.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(sys, "argv", ["main_pretrain.py", "--config-path", str(place), "--config-name", "tiny.yaml",
                                      f"data.train_path={place / 'images'}", f"checkpoint.dir={place / 'runs'}"])

    @config.main(config_path="unused")
    def command(content):
        from solo.run import pretrain

        pretrain(experiment(content))

    command()
    assert len(list((place / "runs").glob("*/last.ckpt"))) == 1 and not capsys.readouterr().err


WITHOUT_ASSERTS = f"""
import json, os, sys
from tests import forks
assert False
for line in sys.stdin:
    done = forks.run([sys.executable, {str(ROOT / "main_pretrain.py")!r}, *json.loads(line)])
    print(json.dumps([done.returncode, done.stderr]))
"""


@pytest.mark.slow
def test_without_asserts_the_checks_are_the_same(file, tmp_path):
    """``python -O``: the lines and exit codes that `test_cli` holds without it, and a run that trains."""
    told = "config error: unknown key optimizer.lrr: did you mean optimizer.lr?\n"
    missing = "config error: resume=none.ckpt does not exist\n"
    expected = {"optimizer.lrr=1": [2, told], "resume=none.ckpt": [2, missing], "max_epochs=1": [0, ""]}
    where = ["--config-path", str(file().parent), "--config-name", "tiny.yaml"]
    done = subprocess.run(
        [sys.executable, "-O", "-c", WITHOUT_ASSERTS], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
        input="".join(f"{json.dumps([*where, word])}\n" for word in expected),
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == [*expected.values()], done.stderr
    assert list(tmp_path.glob("runs/*/last.ckpt"))


@pytest.mark.slow
def test_every_module_imports_without_what_is_optional():
    optional = ["numba", "nvidia", "open_clip", "umap", "h5py", "wandb", "submitit", "triton", "mlflow", "comet_ml"]
    source = f"""
import sys
sys.modules.update(dict.fromkeys({optional!r}))
import importlib, pkgutil, solo
names = [module.name for module in pkgutil.walk_packages(solo.__path__, "solo.")]
alone = ("chain", "jit", "kernel_numba", "dali_graph")
needs = [name for name in names if name.startswith("solo.bench") or name.rpartition(".")[2] in alone]
needs += [name for name in names if "triton" in name]
for name in sorted(set(names) - set(needs)):
    importlib.import_module(name)
print(len(names) - len(needs))
"""
    done = subprocess.run([sys.executable, "-c", source], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) > 60, done.stderr


def test_views_are_given_on_the_command_line_in_place_of_a_file():
    for recipe in ("sce", "cifar/sce"):
        views = "augmentations=[{crop_size: 32, num_crops: 2}, {crop_size: 16, num_crops: 3}]"
        found = experiment(config.load(ROOT / "scripts" / "pretrain" / f"{recipe}.yaml", [views])).augmentations
        assert [(view.crop_size, view.num_crops) for view in found] == [(32, 2), (16, 3)]
    blocks = "augmentations=[{crop_size: 32, num_crops: 2}]"
    for others in (["augmentations.0.crop_size=24"], ["augmentations=[]"], ["augmentations=digits"]):
        for both in ([blocks, *others], [*others, blocks]):
            with pytest.raises(ConfigError, match="change the same: give one of them"):
                config.load(ROOT / "scripts" / "pretrain" / "sce.yaml", both)
    with pytest.raises(ConfigError, match=r"augmentations\[0\].crop_siz: did you mean augmentations\[0\].crop_size"):
        experiment(config.load(ROOT / "scripts" / "pretrain" / "sce.yaml", ["augmentations=[{crop_siz: 32}]"]))
