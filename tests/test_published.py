"""Facts whose origin is outside this code: dataset statistics, recipes, views and rates as solo-learn publishes them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision.datasets
import yaml

from solo import optim
from solo.callbacks.knn import KNNConfig
from solo.config import bind, load
from solo.data.config import DataConfig
from solo.data.datasets import DATASETS
from solo.data.engines.torchvision import apply
from solo.data.random import Draws
from solo.data.views import View, sample
from solo.eval.knn import Vote
from solo.eval.linear import LinearConfig
from solo.eval.protocol import standard_view
from solo.experiment import experiment
from solo.testing import Case
from tests.conftest import ROOT

PRETRAIN = ROOT / "scripts" / "pretrain"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

# --- datasets: classes, pixels, mean, std -------------------------------------------------------------------------------

ROWS = {
    "cifar10": (10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": (100, 32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": (10, 96, (0.4914, 0.4823, 0.4466), (0.247, 0.243, 0.261)),
    "imagenet": (1000, 224, *IMAGENET),
    "imagenet100": (100, 224, *IMAGENET),
    "image_folder": (0, 224, *IMAGENET),
    "npz": (0, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


@pytest.mark.parametrize("name", ROWS)
def test_dataset_rows(name):
    row = DATASETS[name]
    assert (row.classes, row.size, row.mean, row.std, row.in_chans) == (*ROWS[name], 3)


def test_cifar_statistics_are_those_of_the_images(shared_data):
    """Every tenth of the 50,000 training images; quality-75 JPEG moves the std by less than 0.005."""
    path = str(shared_data("cifar10-jpeg.npz"))
    source = DATASETS["npz"].open(DataConfig(dataset="npz", train_path=path), True)
    pixels = np.stack([source.load(i) for i in range(0, 50_000, 10)]) / 255
    assert np.allclose(pixels.mean((0, 1, 2)), ROWS["cifar10"][2], atol=0.005)
    assert np.allclose(pixels.std((0, 1, 2)), ROWS["cifar10"][3], atol=0.005)


# --- recipes ------------------------------------------------------------------------------------------------------------

HEADS = {"temperature": 0.2, "proj_hidden_dim": 2048, "pred_hidden_dim": 4096, "proj_output_dim": 256}
NNCLR = {**HEADS, "queue_size": 65536}
# The centroid term is at 0.1 whatever the config says, the transformer has rate 0.1, and tau goes from 0.99 to 1.
ALL4ONE = {
    **HEADS, "queue_size": 98304, "centroid_temperature": 0.1, "transformer_lr": 0.1, "neighbours": 5, "depth": 3, "heads": 8,
    "dropout": 0.1, "momentum": {"base_tau": 0.99, "final_tau": 1.0},
}
LARS = {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}
BYOL_IMAGENET = {**LARS, "eta": 0.001, "clip_lr": False}
# method_kwargs; backbone, dataset; lr, classifier_lr, weight decay per 256 images; images and devices; epochs; LARS
RECIPES = {
    "cifar/nnclr": (NNCLR, "resnet18", "cifar10", 0.4, 0.1, 1e-5, 256, 1, 1000, LARS),
    "cifar/all4one": (ALL4ONE, "resnet18", "cifar10", 1.0, 0.1, 1e-5, 256, 1, 1000, LARS),
    "imagenet-100/nnclr": (NNCLR, "resnet18", "imagenet100", 0.4, 0.1, 1e-5, 128, 2, 400, LARS),
    "imagenet-100/all4one": (ALL4ONE, "resnet18", "imagenet100", 1.0, 0.1, 1e-5, 128, 2, 400, LARS),
    # Not published for these methods: the optimizer of BYOL's file, as the headers say.
    "imagenet/nnclr": (NNCLR, "resnet50", "imagenet", 0.45, 0.2, 1e-6, 128, 8, 100, BYOL_IMAGENET),
    "imagenet/all4one": (ALL4ONE, "resnet50", "imagenet", 0.45, 0.2, 1e-6, 128, 8, 100, BYOL_IMAGENET),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name):
    method_kwargs, backbone, dataset, lr, classifier_lr, decay, batch, devices, epochs, lars = RECIPES[name]
    recipe = experiment(load(PRETRAIN / f"{name}.yaml", ["data.train_path=x"]))
    assert recipe.method == name.split("/")[1] and recipe.seed == 5
    assert dataclasses.asdict(recipe.method_kwargs) == method_kwargs
    assert (recipe.backbone.name, recipe.backbone.kwargs, recipe.data.dataset) == (backbone, {}, dataset)
    assert (recipe.backbone.stem, recipe.backbone.stem_padding) == ("auto", 2)
    optimizer, schedule = recipe.optimizer, recipe.scheduler
    assert (optimizer.name, optimizer.lr, optimizer.classifier_lr, optimizer.weight_decay) == ("lars", lr, classifier_lr, decay)
    assert optimizer.kwargs == lars and not optimizer.exclude_bias_n_norm_wd
    assert (optimizer.batch_size, recipe.trainer["devices"], recipe.trainer["max_epochs"]) == (batch, devices, epochs)
    assert (schedule.name, schedule.warmup_epochs, schedule.warmup_start_lr, schedule.min_lr) == ("warmup_cosine", 10, 3e-5, 0)
    assert recipe.trainer["sync_batchnorm"] and recipe.trainer["precision"] == "bf16-mixed"
    assert method_kwargs["queue_size"] % (batch * devices) == 0


def test_linear_recipes():
    linear = load(ROOT / "scripts" / "linear" / "linear.yaml", ["checkpoint=x"])
    assert linear["optimizer"] == {"name": "sgd", "batch_size": 256, "lr": 0.3, "weight_decay": 0}
    assert linear["scheduler"] == {"name": "step", "lr_decay_steps": [60, 80]} and linear["max_epochs"] == 100
    finetune = load(ROOT / "scripts" / "linear" / "finetune.yaml", ["checkpoint=x"])
    optimizer = finetune.pop("optimizer")
    assert (optimizer["name"], optimizer["lr"], optimizer["weight_decay"]) == ("adamw", 5e-4, 0.05)
    assert finetune.pop("scheduler") == {"name": "warmup_cosine", "warmup_epochs": 10, "warmup_start_lr": 0}
    assert finetune == {"checkpoint": "x", "max_epochs": 100, "finetune": True, "label_smoothing": 0.1, "mixup": 0.8,
                        "cutmix": 1.0, "layer_decay": 0.75}


def test_knn_without_settings():
    """solo-learn's k and temperature; its online distance is euclidean, ours is cosine on line and off."""
    online, vote = KNNConfig(), Vote()
    assert (online.k, online.temperature, online.distance) == ([20], 0.07, "cosine")
    assert (vote.k, vote.temperature, vote.distance) == (20, 0.07, "cosine")


def test_linear_evaluation_without_a_recipe_is_the_published_one():
    config, view = LinearConfig(checkpoint="x"), standard_view(224)
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay) == ("sgd", 0.3, 0)
    assert (config.scheduler.name, config.scheduler.lr_decay_steps, config.scheduler.lr_decay_factor) == ("step", [60, 80], 0.1)
    assert (view.rrc.crop_min_scale, view.rrc.crop_max_scale, view.horizontal_flip.prob, view.crop_size) == (0.08, 1, 0.5, 224)
    others = (view.color_jitter, view.grayscale, view.gaussian_blur, view.solarization, view.equalization)
    assert not any(chance.prob for chance in others)


# --- views: crop scale; jitter prob, brightness, contrast, saturation, hue; grey, blur, solarise, equalise, flip ----------

WHOLE, MILD, WEAK, STRONG = (0.08, 1.0), (0.8, 0.4, 0.4, 0.2, 0.1), (0.8, 0.4, 0.4, 0.4, 0.1), (0.8, 0.8, 0.8, 0.8, 0.2)
NONE = (0.0,) * 5
SMALL = [(WHOLE, MILD, 0.2, 0.0, 0.0, 0.0, 0.5), (WHOLE, MILD, 0.2, 0.0, 0.2, 0.0, 0.5)]
LARGE = [(WHOLE, MILD, 0.2, 1.0, 0.0, 0.0, 0.5), (WHOLE, MILD, 0.2, 0.1, 0.2, 0.0, 0.5)]
VIEWS = {
    "asymmetric": {"cifar": SMALL, "imagenet-100": LARGE, "imagenet": LARGE, "custom": LARGE},
    "symmetric": [(WHOLE, STRONG, 0.2, 0.5, 0.0, 0.0, 0.5)] * 2,
    "symmetric_weak": [(WHOLE, WEAK, 0.2, 0.5, 0.0, 0.0, 0.5)] * 2,
    "mocov2": [((0.2, 1.0), WEAK, 0.2, 0.5, 0.0, 0.0, 0.5)] * 2,        # UniGrad's
    "weak_strong": [((0.2, 1.0), NONE, 0.0, 0.0, 0.0, 0.0, 0.5), ((0.2, 1.0), WEAK, 0.2, 0.5, 0.0, 0.0, 0.5)],     # SCE's
}
FILES = sorted(path for name in ("cifar", "imagenet-100", "imagenet", "custom")
               for path in (PRETRAIN / name / "augmentations").glob("*.yaml") if path.stem in VIEWS)


def test_the_table_covers_the_views_of_every_recipe():
    assert {path.relative_to(PRETRAIN).as_posix() for path in FILES} >= {
        *(f"{name}/augmentations/asymmetric.yaml" for name in VIEWS["asymmetric"]),
        "cifar/augmentations/symmetric.yaml", "cifar/augmentations/symmetric_weak.yaml",
        "cifar/augmentations/weak_strong.yaml", "imagenet/augmentations/mocov2.yaml",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PRETRAIN).as_posix())
def test_views(path):
    folder = path.parts[-3]
    expected = VIEWS[path.stem]
    expected = expected[folder] if isinstance(expected, dict) else expected
    views = [bind(View, block) for block in yaml.safe_load(path.read_text())]
    found = []
    for view in views:
        jitter = view.color_jitter
        numbers = (
            (view.rrc.crop_min_scale, view.rrc.crop_max_scale),
            (jitter.prob, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue),
            *(chance.prob for chance in (view.grayscale, view.gaussian_blur, view.solarization, view.equalization)),
            view.horizontal_flip.prob,
        )
        assert view.rrc.enabled and view.crop_size == (32 if folder == "cifar" else 224)
        found += [numbers] * view.num_crops
    assert found == expected


def test_solarise_turns_128_and_above():
    """As Pillow's ``solarize(128)``, on pixels that nothing else touches."""
    view = bind(View, {"crop_size": 16, "rrc": {"enabled": False}, "solarization": {"prob": 1.0}})
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    params = sample(view, Draws(0, 0, np.arange(1), 0), np.array([16]), np.array([16]))
    turned = np.where(pixels < 128, pixels, 255 - pixels)
    assert np.array_equal((apply(view, params.row(0), pixels) * 255).round().numpy().transpose(1, 2, 0), turned)


# --- rates: base per 256 images, images on each device, devices, accumulated batches -> effective ------------------------

RATES = [
    (1.0, 256, 1, 1, 1.0),                                      # All4One, CIFAR
    (0.4, 256, 1, 1, 0.4),                                      # NNCLR, CIFAR
    (0.4, 128, 2, 1, 0.4),                                      # NNCLR, ImageNet-100
    (0.5, 64, 2, 1, 0.25),                                      # BYOL, custom
    (0.0003, 128, 8, 1, 0.0012),                                # MoCo v3 ViT, ImageNet-100
    (0.45, 64, 2, 16, 3.6),                                     # BYOL, ImageNet
]


@pytest.mark.parametrize("base, images, devices, accumulated, effective", RATES)
def test_effective_rates(base, images, devices, accumulated, effective):
    model = Case("all4one").build()
    model.optimizer_config = optim.OptimizerConfig(lr=base, batch_size=images)
    model.__dict__["_trainer"] = SimpleNamespace(world_size=devices, accumulate_grad_batches=accumulated)
    rates = {group["name"]: group["lr"] for group in model.configure_optimizers().param_groups}
    assert rates.pop("transformer") == 0.1                      # never scaled, as published
    assert set(rates) == {"backbone", "projector", "predictor", "centroid_predictor"}
    assert list(rates.values()) == pytest.approx([effective] * 4, rel=1e-12)


# --- torchvision's datasets: which part, which axis, which label ---------------------------------------------------------

PARTS = {
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_torchvision_datasets_are_opened_as_published(name, monkeypatch, tmp_path):
    kind, *parts = PARTS[name]
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)      # [N, H, W, C]
    opened = []

    def init(self, root, **kwargs):
        opened.append((root, kwargs))
        self.classes = ["a", "b", "c"]
        if name == "stl10":                                     # [N, C, H, W], and labels with -1
            self.data, self.labels = pixels.transpose(0, 3, 1, 2), np.array([2, -1, 0])
        else:
            self.data, self.targets = pixels, [2, 1, 0]

    monkeypatch.setattr(getattr(torchvision.datasets, kind), "__init__", init)
    config = DataConfig(dataset=name, train_path=str(tmp_path / "a"), val_path=str(tmp_path / "b"))
    sources = [DATASETS[name].open(config, train) for train in (True, False)]
    assert opened == [(str(tmp_path / "a"), parts[0]), (str(tmp_path / "b"), parts[1])]
    for source in sources:
        assert np.array_equal(source.images, pixels) and source.classes == ["a", "b", "c"]
        assert source.labels.tolist() == ([2, -1, 0] if name == "stl10" else [2, 1, 0])
