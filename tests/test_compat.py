"""YAML files in solo-learn's schema, written as its users write them, run here; what nothing reads is named."""

import pytest

from solo import checkpoint, config
from solo.compat import translate
from solo.errors import ConfigError
from solo.experiment import experiment
from solo.run import pretrain
from tests.tiny import values

HEAD = """
defaults:
  - _self_
  - augmentations: asymmetric.yaml
  - wandb: private.yaml
  - override hydra/hydra_logging: disabled
  - override hydra/job_logging: disabled

# no folders of Hydra's own
hydra:
  output_subdir: null
  run:
    dir: .
"""
SHARED = """
backbone:
  name: "resnet18"
data:
  dataset: cifar10
  train_path: "./datasets"
  val_path: "./datasets"
  format: "image_folder"
  num_workers: 4
optimizer:
  name: "lars"
  batch_size: 256
  lr: 0.4
  classifier_lr: 0.1
  weight_decay: 1e-5
  kwargs:
    clip_lr: True
    eta: 0.02
    exclude_bias_n_norm: True
scheduler:
  name: "warmup_cosine"
  interval: "step"
checkpoint:
  enabled: True
  dir: "trained_models"
  frequency: 1
auto_resume:
  enabled: True

# the rest goes to the Trainer
max_epochs: 1000
devices: [0]
sync_batchnorm: True
accelerator: "gpu"
strategy: "ddp"
precision: 16-mixed
"""
NNCLR = """
name: "nnclr-cifar10"
method: "nnclr"
method_kwargs:
  temperature: 0.2
  proj_hidden_dim: 2048
  pred_hidden_dim: 4096
  proj_output_dim: 256
  queue_size: 65536
"""
ALL4ONE = """
name: "all4one-cifar10"
method: "all4one"
method_kwargs:
  temperature: 0.2
  proj_hidden_dim: 2048
  pred_hidden_dim: 4096
  proj_output_dim: 256
  queue_size: 98304
momentum:
  base_tau: 0.99
  final_tau: 1.0
  classifier: False
"""
METHODS = {"nnclr": NNCLR, "all4one": ALL4ONE}
VIEW = """
- rrc:
    enabled: True
    crop_min_scale: 0.08
    crop_max_scale: 1.0
  color_jitter:
    prob: 0.8
    brightness: 0.4
    contrast: 0.4
    saturation: 0.2
    hue: 0.1
  grayscale:
    prob: 0.2
  gaussian_blur:
    prob: 0.0
  solarization:
    prob: {solarization}
  equalization:
    prob: 0.0
  horizontal_flip:
    prob: 0.5
  crop_size: 32
  num_crops: 1
"""
WANDB = """
enabled: True
entity: my-lab
project: "solo-learn"
offline: False
"""
ON_CPU = [
    *("accelerator=cpu", "devices=1", "precision=32-true", "wandb.enabled=false", "max_epochs=1", "report.enabled=false"),
    "scheduler.warmup_epochs=1",
    *("data.dataset=fake", "data.train_path=null", "data.val_path=null", "data.num_workers=0", "data.train_size=64"),
    *("optimizer.batch_size=16", "backbone.kwargs={channels:[4,4,4,8],layers:[1,1,1,1]}"),
    *("method_kwargs.proj_hidden_dim=16", "method_kwargs.pred_hidden_dim=16", "method_kwargs.queue_size=64"),
]


@pytest.fixture
def theirs(tmp_path):
    """``theirs(method)`` -> the YAML file of a user, with the folders it composes from."""
    for group, name, text in (
        ("augmentations", "asymmetric", VIEW.format(solarization=0.0) + VIEW.format(solarization=0.2)),
        ("wandb", "private", WANDB),
    ):
        (tmp_path / group).mkdir()
        (tmp_path / group / f"{name}.yaml").write_text(text)

    def write(method, extra=""):
        file = tmp_path / f"{method}.yaml"
        file.write_text(HEAD + METHODS[method] + SHARED + extra)
        return file

    return write


@pytest.mark.parametrize("method", METHODS)
def test_a_users_file_means_what_it_says(theirs, method):
    bound = experiment(config.load(theirs(method)))
    assert bound.method == method and bound.name == f"{method}-cifar10" and bound.resume == "auto"
    assert bound.method_kwargs.queue_size == {"nnclr": 65536, "all4one": 98304}[method]
    if method == "all4one":
        assert (bound.method_kwargs.momentum.base_tau, bound.method_kwargs.momentum.final_tau) == (0.99, 1.0)
    assert [view.solarization.prob for view in bound.augmentations] == [0.0, 0.2]
    assert bound.optimizer.weight_decay == 1e-5 and bound.optimizer.kwargs["clip_lr"] is True
    assert (bound.wandb.enabled, bound.wandb.entity, bound.wandb.project) == (True, "my-lab", "solo-learn")
    assert bound.checkpoint.dir == "trained_models"
    assert bound.trainer == {
        "max_epochs": 1000, "devices": [0], "sync_batchnorm": True, "accelerator": "gpu", "strategy": "ddp",
        "precision": "16-mixed",
    }  # fmt: skip


def test_dead_keys_are_named_in_a_line_each(theirs, caplog):
    caplog.set_level("INFO", "solo")
    experiment(config.load(theirs("all4one")))
    lines = [record.getMessage() for record in caplog.records]
    names = sorted(line.split(" is ignored: ")[0] for line in lines)
    assert names == ["data.format", "momentum.classifier", "scheduler.interval"] and all("\n" not in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_users_file_trains(theirs, method, tmp_path):
    loaded = config.load(theirs(method), [*ON_CPU, f"checkpoint.dir={tmp_path / 'trained_models'}"])
    result = pretrain(experiment(loaded))
    assert result.run_dir.parent == tmp_path / "trained_models" and checkpoint.read(result.checkpoint)["global_step"] == 4


def test_the_command_takes_a_users_file(theirs, tmp_path, monkeypatch, capsys):
    theirs("nnclr")
    seen = []

    def command(content):
        seen.append(content)

    arguments = ["main_pretrain.py", "--config-path", str(tmp_path), "--config-name", "nnclr.yaml", "++wandb.offline=True"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.chdir(tmp_path)
    config.main(config_path="unused")(command)()
    assert seen[0]["wandb"]["offline"] is True and "hydra" not in seen[0] and not capsys.readouterr().err
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.glob(".hydra"))


def test_other_keys_are_still_refused(theirs):
    extra = "auto_resume:\n  enabled: True\n  max_hour: 36\nknn_eval:\n  enabled: True\n  kk: 20\nperformance:\n  fast: True\n"
    file = theirs("nnclr")
    file.write_text(file.read_text().replace("auto_resume:\n  enabled: True\n", extra))
    with pytest.raises(ConfigError) as found:
        experiment(config.load(file))
    lines = str(found.value).splitlines()
    assert lines[0] == "unknown key auto_resume.max_hour: did you mean auto_resume.max_hours?"
    assert lines[1].startswith("unknown key knn_eval.kk") and lines[2].startswith("unknown key performance.fast")
    assert len(lines) == 3


def their(**keys):
    content = values("nnclr", "runs", **keys)
    del content["knn"]
    return experiment(content)


def test_moved_blocks():
    knn = {"enabled": True, "k": 20, "T": 0.1, "distance_func": "cosine"}
    bound = their(knn_eval=knn, auto_resume={"enabled": False, "max_hours": 36}, performance={"disable_channel_last": True})
    assert bound.resume == "never" and bound.knn.enabled and bound.knn.k == [20] and bound.knn.temperature == 0.1
    assert their(resume_from_checkpoint="there.ckpt", auto_resume={"enabled": True}).resume == "there.ckpt"
    assert their(resume_from_checkpoint=None).resume == "auto"


@pytest.mark.parametrize("dataset", ["imagenet", "imagenet100", "custom"])
def test_hdf5_is_a_dataset_here(dataset):
    data = {"dataset": dataset, "format": "h5", "train_path": "train.h5", "val_path": "val.h5"}
    told, lines, unknown = translate({"data": data})
    if dataset == "custom":         # solo-learn reads a folder all the same
        assert told["data"]["dataset"] == "custom" and lines[0].startswith("data.format is ignored")
    else:
        assert told["data"] == {"dataset": "hdf5", "train_path": "train.h5", "val_path": "val.h5"}
        assert lines[0].startswith("data.format=h5 is read as data.dataset=hdf5: ")
    assert len(lines) == 1 and not unknown
    assert their(data=data | {"dataset": "imagenet"}).data.dataset == "hdf5"


@pytest.mark.parametrize("format", ["dali", "h5"])
def test_translation_leaves_its_input_alone(format):
    given = {"auto_resume": {"enabled": True}, "data": {"format": format, "dataset": "imagenet"}, "knn_eval": {"k": 1}}
    before = {key: dict(block) for key, block in given.items()}
    translate(given)
    assert given == before
