"""The commands: Hydra's command line works, and wrong input gets one clear line and a non-zero exit before any work."""

import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
import yaml
from hydra._internal.hydra import Hydra

from solo import checkpoint, config
from solo.experiment import experiment
from tests.conftest import ROOT
from tests.forks import Fork
from tests.tiny import values


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """``cli(*arguments)`` -> (exit code, stderr lines) of main_pretrain on a tiny experiment."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(values("nnclr", tmp_path / "runs")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)     # it composes all, once more, and forgives every error

    def run(*arguments, name="tiny.yaml"):
        @config.main(config_path="unused")
        def command(content):
            from solo.run import pretrain

            started.append(content)
            pretrain(experiment(content))

        started = []
        monkeypatch.setattr(
            sys, "argv", ["main_pretrain.py", "--config-path", str(tmp_path), "--config-name", name, *arguments]
        )
        code = 0
        try:
            command()
        except SystemExit as error:
            code = int(error.code or 0)
        captured = capsys.readouterr()
        return code, [line for line in captured.err.splitlines() if line.strip()], captured.out

    return run


WRONG = {
    ("optimizer.lrr=1",): ["unknown key optimizer.lrr: did you mean optimizer.lr?"],
    ("+optimizer.wieght_decay=3",): ["unknown key optimizer.wieght_decay: did you mean optimizer.weight_decay?"],
    ("optimiser.lr=1",): ["unknown key optimiser: did you mean optimizer?"],
    ("max_epoch=3",): ["unknown key max_epoch: did you mean max_epochs?"],
    ("method_kwargs.queue_sise=64",): ["unknown key method_kwargs.queue_sise: did you mean method_kwargs.queue_size?"],
    ("optimizer.lr=fast", "seed=x"): ["optimizer.lr must be a number, got 'fast'", "seed must be a whole number, got 'x'"],
    ("method_kwargs.temperature=warm",): ["method_kwargs.temperature must be a number, got 'warm'"],
    ("method=nnlcr",): ["method: no 'nnlcr' in solo.methods, did you mean 'nnclr'?"],
    ("data.dataset=cifar",): ["data.dataset: no 'cifar' in solo.datasets, did you mean 'cifar"],
    ("backbone.name=resnet81",): ["backbone.name: no timm model 'resnet81', did you mean 'resnet"],
    ("backbone.kwargs.width=3",): ["unknown key backbone.kwargs.width"],
    ("optimizer.name=larss",): ["optimizer.name: no 'larss' in solo.optimizers, did you mean 'lars'?"],
    ("optimizer.kwargs.clip_lrr=true",): ["optimizer.kwargs.clip_lrr is unknown: did you mean optimizer.kwargs.clip_lr?"],
    ("scheduler.warmup_epochs=-1",): ["scheduler.warmup_epochs must be at least 0, got -1"],
    ("method_kwargs.queue_size=30",): ["method_kwargs.queue_size=30 is not a multiple of the global batch 8: use 24 or 32"],
    ("method=all4one", "method_kwargs.proj_output_dim=100"): ["proj_output_dim=100 is not divisible by heads=8: use 96 or 104"],
    ("optimizer.batch_size=128", "method_kwargs.queue_size=128"): ["0 steps"],
    ("data.dataset=cifar10", "data.train_path=nowhere"): ["data.train_path", "data.download=true"],
    ("data.dataset=image_folder",): ["data.train_path"],
    ("data.dataset=image_folder", "data.train_path=nowhere"): ["data.train_path", "nowhere"],
    ("data.dataset=image_folder", "data.train_path=empty"): ["data.train_path", "empty"],
    ("data.dataset=image_folder", "data.train_path=texts"): ["data.train_path", "texts"],
    ("resume=nowhere.ckpt",): ["resume=nowhere.ckpt does not exist"],
    ("resume=text.ckpt",): ["text.ckpt cannot be loaded as tensors and plain values"],
    ("callbacks=[]",): ["callbacks is decided by the run itself and cannot be set"],
    ("name=../../x",): ["name may hold letters"],
    ("precision=fp3",): ["precision must be one of 32-true", "got 'fp3'"],
    ("precision=64-true",): ["precision must be one of"],
    ("accelerator=gpu",): ["no usable GPU"],
    ("loggers=[csvv]",): ["loggers[0] must be one of csv, tensorboard", "did you mean csv"],
    ("method_kwargs.temperature=0", "seed=-1"): ["method_kwargs.temperature must be positive, got 0", "seed must lie in [0"],
    ("method_kwargs.temperature=nan",): ["method_kwargs.temperature must be a number, got nan"],
    ("method_kwargs.queue_size=0", "method_kwargs.proj_output_dim=-8"): ["queue_size must be at least 1", "proj_output_dim"],
    ("method=all4one", "method_kwargs={depth: 0, heads: 0, dropout: 2}"): ["depth must", "heads must", "dropout must"],
    ("method=all4one", "method_kwargs.transformer_lr=-1"): ["method_kwargs.transformer_lr must be at least 0, got -1"],
    ("method=math:sqrt",): ["method: 'math:sqrt' is no method"],
    ("method_kwargs=[1]",): ["Error merging override ++method_kwargs=[1]: Cannot merge DictConfig with ListConfig"],
    ("optimizer.kwargs.momentum=-1",): ["optimizer.kwargs do not suit lars: momentum must be in [0, 1)"],
    ("optimizer.kwargs.eta=x",): ["optimizer.kwargs.eta must be a number, got 'x'"],
    ("optimizer.kwargs.clip_lr=maybe",): ["optimizer.kwargs.clip_lr must be true or false, got 'maybe'"],
    ("optimizer.kwargs.nesterov=true", "optimizer.kwargs.momentum=0"): ["nesterov needs a momentum"],
    ("micro_batch=0",): ["micro_batch must be at least 1, got 0"],
    ("micro_batch=3",): ["micro_batch=3 does not divide optimizer.batch_size=8"],
    ("micro_batch=4", "view_batching=concat"): ["micro_batch takes views apart and view_batching=concat puts them together"],
    ("optimizer.lr=inf",): ["optimizer.lr must be a number, got inf"],
    ("optimizer.batch_size=1", "method_kwargs.queue_size=8"): ["BatchNorm needs at least 2 images per process"],
    ("scheduler.lr_decay_factor=-1",): ["scheduler.lr_decay_factor must be positive, got -1"],
    ("strategy=ddp_spawn",): ["strategy must be one of auto, ddp", "got 'ddp_spawn'"],
    ("accelerator=tpu",): ["accelerator must be one of auto, cpu, gpu, cuda, mps, got 'tpu'"],
    ("devices=",): ["devices must be how many, a list of GPU numbers, or auto, got ''"],
    ("devices=[0,0]",): ["devices=[0, 0] names a device twice"],
    ("devices=1000", "method_kwargs.queue_size=8000"): ["devices=1000 processes on", "or fewer"],
    ("devices=1,2",): ["Ambiguous value for argument '++devices=1,2'"],
    ("num_nodes=0",): ["num_nodes must be at least 1, got 0"],
    ("num_nodes=2",): ["num_nodes=2 needs the same command on each node: start it with launcher.py --nodes 2"],
    ("limit_train_batches=0",): ["limit_train_batches must be positive, got 0"],
    ("max_time=3",): ["max_time must be text or a block of keys or null, got 3"],
    ("max_time=00:00:00:00",): ["max_time must be positive, got 00:00:00:00"],
    ("gradient_clip_val=-1", "accumulate_grad_batches=0", "seed=x"): ["gradient_clip_val must", "accumulate_grad_batches must"],
    ("benchmark=3",): ["benchmark must be true or false or null, got 3"],
    ("barebones=true",): ["barebones is decided by the run itself and cannot be set"],
    ("data.timeout=inf",): ["data.timeout must be a number, got inf"],
    ("step_timeout=4",): ["step_timeout must be at least 8 s, got 4"],
    ("checkpoint.minutes=-1",): ["checkpoint.minutes must be at least 0, got -1"],
    ("backbone.kwargs={channels: [4, 4]}",): ["backbone.kwargs do not suit resnet18"],
    ("backbone.kwargs.block=x",): ["backbone.kwargs do not suit resnet18: 'str' object has no attribute 'expansion'"],
    ("backbone.kwargs.features_only=true",): ["resnet18: features [1, dim] are needed, it gives list"],
    ("augmentations={}",): ["Error merging override ++augmentations={}: Cannot merge DictConfig with ListConfig"],
    ("augmentations=text",): ["augmentations must be a list, got 'text'"],
    ("augmentations=[{crop_size: 16}]",): ["augmentations: NNCLR takes 2 views of one size, got crops of 16 px"],
    ("data.dataset=math:sqrt",): ["data.dataset: 'math:sqrt' is no DatasetSpec"],
    ("=3",): ["'=3' is not an override: write key=value"],
    ("nonsense",): ["'nonsense' is not an override: write key=value"],
    ("optimizer.lr=${nope}",): ["nope"],
    ("data.train_path=???",): ["data.train_path has to be given: add data.train_path=..."],
    ("data.train_path=???", "name=???"): ["data.train_path has to be given", "name has to be given"],
    ("sync_batchnorm=true", "devices=2"): ["sync_batchnorm=true works between GPUs only", "devices=1"],
    ("val_check_interval='00:00:10:00'", "devices=2"): ["val_check_interval=00:00:10:00 is a time, which 2 processes"],
    ("wandb.enabled=true",): ["wandb.enabled=true needs the package wandb", "solo-ssl[wandb]"],
    ("devices=0",): ["devices=0: a run needs at least one, e.g. devices=1"],
    ("devices=[]",): ["devices=[]: a run needs at least one"],
    ("devices=x",): ["devices must be how many, a list of GPU numbers, or auto, got 'x'"],
    ("devices=1.5",): ["devices must be how many, a list of GPU numbers, or auto, got 1.5"],
    ("max_epochs=0",): ["max_epochs must be at least 1, got 0"],
    ("max_epochs=many",): ["max_epochs must be at least 1, got 'many'"],
    ("max_epochs=-1",): ["max_epochs=-1 never ends", "give max_epochs or max_steps"],
    ("max_steps=0",): ["max_steps must be at least 1, got 0"],
    ("checkpoint.dir=text.ckpt/runs",): ["checkpoint.dir=text.ckpt/runs cannot be written: Not a directory"],
    ("auto_resume.enabled=true", "+auto_resume.max_hour=3"): ["auto_resume.max_hour: did you mean auto_resume.max_hours?"],
}
MACHINE = {  # these are its faults: 5
    ("accelerator=gpu",),
    ("devices=1000", "method_kwargs.queue_size=8000"),
    ("wandb.enabled=true",),
    ("checkpoint.dir=text.ckpt/runs",),
}


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_input_is_one_clear_line(cli, tmp_path, arguments, monkeypatch):
    if "accelerator=gpu" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if "wandb.enabled=true" in arguments and find_spec("wandb"):
        pytest.skip("this machine has wandb")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts" / "a").mkdir(parents=True)
    (tmp_path / "texts" / "a" / "notes.txt").write_text("no image")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    code, errors, _ = cli(*arguments)
    assert code == (5 if arguments in MACHINE else 2)
    several = {"seed=x": len(arguments), "name=???": 2, "seed=-1": 2, "method_kwargs.queue_size=0": 2}
    several["method_kwargs={depth: 0, heads: 0, dropout: 2}"] = 3
    assert len(errors) == max(several.get(argument, 1) for argument in arguments), errors
    for expected in WRONG[arguments]:
        assert expected in "\n".join(errors)
    assert "Traceback" not in "\n".join(errors) and not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("sync_batchnorm=true", "strategy=ddp"),
        ("devices=[0]",),
        ("devices='1'",),
        ("devices=auto",),
        ("precision=16-mixed", "backbone.stem=small"),  # torch 2.14 on CPU: no bfloat16 convolution of one-pixel maps
        ("max_epochs=-1", "max_steps=8"),
    ],
    ids=" ".join,
)
def test_what_one_process_on_a_cpu_can_do_without_just_runs(cli, arguments):
    code, errors, _ = cli("max_epochs=1", *arguments)
    assert code == 0 and not errors


def test_missing_config_offers_the_nearest(cli):
    code, errors, _ = cli(name="tinny.yaml")
    assert code == 2 and len(errors) == 1 and "did you mean tiny.yaml?" in errors[0]


def test_every_key_can_be_overridden_and_cfg_prints(cli, tmp_path):
    code, errors, out = cli("knn.every=3", "++health.every=7", "+extra.note=mine", "--cfg", "job")
    shown = yaml.safe_load(out)
    assert code == 0 and shown["knn"]["every"] == 3 and shown["health"]["every"] == 7 and shown["extra"] == {"note": "mine"}
    assert not errors and not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_sweep_runs_each_value(cli, tmp_path):
    code, _, _ = cli("-m", "method_kwargs.temperature=0.1,0.3", "max_epochs=1")
    assert code == 0 and len(list((tmp_path / "runs").glob("*/last.ckpt"))) == 2


def test_run_leaves_nothing_beside_its_directory(cli, tmp_path):
    before = set(tmp_path.iterdir())
    assert cli("max_epochs=1")[0] == 0
    assert set(tmp_path.iterdir()) - before == {tmp_path / "runs"}


def command(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, str(ROOT / "main_pretrain.py"), "--config-path", str(folder), "--config-name", "tiny.yaml"]
    return Fork(
        [*words, *arguments], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def weights(runs):
    return checkpoint.read(next(runs.glob("*/last.ckpt")))["state_dict"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three epochs of 12 steps, and the weights of a run that nobody interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    content = values("all4one", "runs", data={"train_size": 96}, max_epochs=3, limit_val_batches=2)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    running = command(folder)
    _, err = running.communicate(timeout=300)
    assert running.returncode == 0 and not err
    return folder / "tiny.yaml", weights(folder / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_same_command_continues(tmp_path, number, whole):
    shutil.copy(whole[0], tmp_path)
    running = command(tmp_path)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("runs/*/checkpoints/*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    running.send_signal(number)
    out, err = running.communicate(timeout=300)
    assert running.returncode == 128 + number, err
    assert len(err.strip().splitlines()) == 1 and "run the same command to continue" in err and "Traceback" not in err
    again = command(tmp_path)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0 and "continuing" in out + err, err
    one = weights(tmp_path / "runs")
    assert all(torch.equal(one[key], other) for key, other in whole[1].items())
