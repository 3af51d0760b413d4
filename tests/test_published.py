"""Facts whose origin is outside this code: dataset statistics, recipes, views and rates as solo-learn publishes them."""

import dataclasses
import re
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
SIMCLR = {"temperature": 0.2, "proj_hidden_dim": 2048, "proj_output_dim": 256}
WIDE = {"proj_hidden_dim": 2048, "proj_output_dim": 2048}
BARLOW = {**WIDE, "lamb": 0.0051, "scale_loss": 0.1}
VICREG = {**WIDE, "sim_loss_weight": 25, "var_loss_weight": 25, "cov_loss_weight": 1}
LARS = {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}
BYOL_IMAGENET = {**LARS, "eta": 0.001, "clip_lr": False}
# method_kwargs; backbone, dataset; lr, classifier_lr, weight decay per 256 images; images and devices; epochs; LARS
RECIPES = {
    "cifar/nnclr": (NNCLR, "resnet18", "cifar10", 0.4, 0.1, 1e-5, 256, 1, 1000, LARS),
    "cifar/all4one": (ALL4ONE, "resnet18", "cifar10", 1.0, 0.1, 1e-5, 256, 1, 1000, LARS),
    "imagenet-100/nnclr": (NNCLR, "resnet18", "imagenet100", 0.4, 0.1, 1e-5, 128, 2, 400, LARS),
    "imagenet-100/all4one": (ALL4ONE, "resnet18", "imagenet100", 1.0, 0.1, 1e-5, 128, 2, 400, LARS),
    "cifar/simclr": (SIMCLR, "resnet18", "cifar10", 0.4, 0.1, 1e-4, 256, 1, 1000, LARS),
    "cifar/barlow_twins": (BARLOW, "resnet18", "cifar10", 0.3, 0.1, 1e-4, 256, 1, 1000, LARS),
    "cifar/vicreg": (VICREG, "resnet18", "cifar10", 0.3, 0.1, 1e-4, 256, 1, 1000, LARS),
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
    assert method_kwargs.get("queue_size", 0) % (batch * devices) == 0


SCE_LARS = {"momentum": 0.9, "eta": 0.001, "exclude_bias_n_norm": True, "decay_first": True, "eps": 0}
SCE_CIFAR = {
    "symmetric": False, "temperature_m": 0.05, "proj_layers": 2, "proj_hidden_dim": 512, "proj_output_dim": 128,
    "proj_last_norm": False, "pred_hidden_dim": 0, "queue_size": 4096, "momentum": {"base_tau": 0.99, "final_tau": 0.99},
}
SCE_IMAGENET = {"temperature": 0.1, "temperature_m": 0.07, "coeff": 0.5, "symmetric": True, "mask_self": False,
                "proj_layers": 3, "proj_hidden_dim": 2048, "proj_output_dim": 256, "pred_hidden_dim": 4096,
                "queue_size": 65536, "momentum": {"base_tau": 0.99, "final_tau": 1.0}}
SGD, ADAM = {"momentum": 0.9}, {}
UNIGRAD = {"proj_hidden_dim": 2048, "proj_output_dim": 2048, "momentum": {"base_tau": 0.996, "final_tau": 1.0}}
BANK = dict.fromkeys(("raw", "scattering", "augmented", "hog", "local_std"), 1.0)
MVMR = {"proj_hidden_dim": 8192, "proj_output_dim": 8192, "normalize_z": False, "std_margin": 1.0, "sign": "paper",
        "invariance_weight": 1.0, "variance_weight": 1.0, "views_weight": 1.0}
CLIP = {"library": "open_clip", "name": "ViT-B-16", "tag": "laion400m_e32", "weights": None}
# epochs of warm-up, rate at its start and at the end; where its peak lies, what the cosine spans
LAST, SLOW, AFTER = (10, 0, 0, "last", "rest"), (5, 0, 0, "last", "rest"), (10, 1e-6, 1e-6, "after", "rest")
OVER_RUN = (5, 2e-4, 2e-4, "after", "run")


def unigrad(form, epochs=100, **constants):
    kwargs = {**UNIGRAD, "form": form, "cutmix": 0.0, **constants}
    return kwargs, "sgd", 0.05, 1e-4, 128 * 8, epochs, OVER_RUN, SGD


def mvmr(batch, rate, epochs, **kwargs):
    return {**MVMR, **kwargs}, "adam", rate, 1e-6, batch, epochs, AFTER, ADAM


PREDICTOR = {"rho": 0.99, "eps": 0.3, "eigen_every": 10}
# some method_kwargs; optimizer, lr per 256, weight decay, images of a step, epochs, schedule, the optimizer's own
SEEDS = {
    "imagenet/sce": (SCE_IMAGENET, "lars", 0.3, 1e-6, 4096, 200, LAST, SCE_LARS),
    "imagenet/sce-multicrop": ({**SCE_IMAGENET, "proj_hidden_dim": 4096}, "lars", 0.3, 1e-6, 4096, 200, LAST, SCE_LARS),
    "cifar/sce": (SCE_CIFAR, "sgd", 0.06, 5e-4, 256, 200, SLOW, {}),
    "imagenet/unigrad": unigrad("unigrad", lambda_=100.0, rho=0.99),
    "imagenet/unigrad-cutmix": unigrad("unigrad", 800, cutmix=1.0, lambda_=100.0, rho=0.99),
    "imagenet/unigrad-simclr": unigrad("simclr", temperature=0.2),
    "imagenet/unigrad-moco": unigrad("moco", temperature=0.2, queue_size=65536),
    "imagenet/unigrad-simsiam": unigrad("simsiam", **PREDICTOR),
    "imagenet/unigrad-byol-directpred": unigrad("byol_directpred", **PREDICTOR),
    "imagenet/unigrad-barlow": unigrad("barlow", lambda_=50.0),
    "imagenet/unigrad-vicreg": unigrad("vicreg", invariance=25.0, variance=25.0, covariance=1.0),
    # Not published: SimSiam's usual rate and length for CIFAR, as the header says.
    "cifar/unigrad": ({"form": "unigrad", "momentum": {"base_tau": 0.99, "final_tau": 1.0}}, "sgd", 0.06, 5e-4, 256, 200,
                      (10, 3e-5, 0, "last", "rest"), SGD),
    "stl10/mvmr": mvmr(256, 1e-4, 1000, representations=BANK, teacher=None),
    "cifar/mvmr": mvmr(512, 1e-4, 1000, representations=BANK, teacher=None),
    "imagenet/mvmr": mvmr(2048, 1.25e-5, 1000, representations=BANK, teacher=None),
    "stl10/mvmr-clip": mvmr(256, 1e-4, 200, representations={}, teacher=CLIP, teacher_weight=1.0),
    "cifar/mvmr-clip": mvmr(256, 1e-4, 200, representations={}, teacher=CLIP, teacher_weight=1.0),
    "imagenet/mvmr-clip": mvmr(256, 1e-4, 200, representations={}, teacher=CLIP, teacher_weight=1.0),
}
# top-1 in the header, in %; and without momentum encoder. SCE's ImageNet recipe has a row for each length (test_sce.py).
TOP1 = {
    "imagenet/sce-multicrop": (75.4,),
    "imagenet/unigrad": (70.3,),
    "imagenet/unigrad-cutmix": (74.9,),
    "imagenet/unigrad-simclr": (70.0, 67.6),
    "imagenet/unigrad-moco": (70.0, 67.6),
    "imagenet/unigrad-simsiam": (70.2, 67.9),
    "imagenet/unigrad-byol-directpred": (70.2, 67.9),
    "imagenet/unigrad-barlow": (70.0, 67.6),
    "imagenet/unigrad-vicreg": (69.8, 67.6),
    "stl10/mvmr": (89.67,),
    "cifar/mvmr": (73.2,),
    "imagenet/mvmr": (74.5,),
    "stl10/mvmr-clip": (95.6,),
    "cifar/mvmr-clip": (78.6,),
    "imagenet/mvmr-clip": (75.3,),
}
# backbone, its arguments, stem and its padding; dataset, mean and std; one BatchNorm over all devices; views (VIEWS)
CIFAR_MEAN, CIFAR_STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.261)                        # MV-MR's
SCE_STATISTICS = ROWS["cifar10"][2], (0.2023, 0.1994, 0.2010)
SMALL_KERNEL, ZERO_INIT = ("small_pool", 1), {"zero_init_last": True}                       # which keeps the max-pooling
UNIGRAD_SETUP = ("resnet50", ZERO_INIT, "auto", 2, "imagenet", *IMAGENET, True, "imagenet/mocov2")
SETUPS = {
    "imagenet/sce": ("resnet50", {}, "auto", 2, "imagenet", *IMAGENET, True, "imagenet/sce"),
    "imagenet/sce-multicrop": ("resnet50", {}, "auto", 2, "imagenet", *IMAGENET, True, "imagenet/sce-multicrop"),
    "cifar/sce": ("resnet18", {}, "auto", 1, "cifar10", *SCE_STATISTICS, False, "cifar/weak_strong"),
    **{name: UNIGRAD_SETUP for name in SEEDS if name.startswith("imagenet/unigrad")},
    "cifar/unigrad": ("resnet18", {}, "auto", 2, "cifar10", *ROWS["cifar10"][2:], True, "cifar/symmetric_weak"),
    "stl10/mvmr": ("resnet50", ZERO_INIT, *SMALL_KERNEL, "stl10", *IMAGENET, False, "stl10/original_strong"),
    "cifar/mvmr": ("resnet50", ZERO_INIT, *SMALL_KERNEL, "cifar20", CIFAR_MEAN, CIFAR_STD, False, "cifar/original_mild"),
    "imagenet/mvmr": ("resnet50", ZERO_INIT, "auto", 2, "imagenet", *IMAGENET, False, "imagenet/original_strong"),
    "stl10/mvmr-clip": ("resnet50", ZERO_INIT, "imagenet", 2, "stl10", *IMAGENET, False, "stl10/original_strong"),
    "cifar/mvmr-clip": ("resnet50", ZERO_INIT, *SMALL_KERNEL, "cifar100", CIFAR_MEAN, CIFAR_STD, False, "cifar/original_crop"),
    "imagenet/mvmr-clip": ("resnet50", ZERO_INIT, "auto", 2, "imagenet", *IMAGENET, False, "imagenet/original_strong"),
}
CUSTOM = {"custom/nnclr", "custom/all4one"}     # templates for one's own images, with values to change


def test_every_recipe_has_a_row():
    shipped = {path.relative_to(PRETRAIN).with_suffix("").as_posix() for path in PRETRAIN.glob("*/*.yaml")
               if path.parent.name != "augmentations"}
    assert shipped == {*RECIPES, *SEEDS, *CUSTOM}
    assert {path.stem for path in (ROOT / "scripts" / "linear").glob("*.yaml")} == {"linear", "finetune", "semi-supervised"}


@pytest.mark.parametrize("name", SEEDS)
def test_recipes_of_sce_unigrad_and_mvmr(name):
    method_kwargs, kind, lr, decay, images, epochs, schedule, own = SEEDS[name]
    recipe = experiment(load(PRETRAIN / f"{name}.yaml", ["data.train_path=x"]))
    found = dataclasses.asdict(recipe.method_kwargs)
    assert recipe.method == name.split("/")[1].split("-")[0] and {key: found[key] for key in method_kwargs} == method_kwargs
    optimizer, s, trainer = recipe.optimizer, recipe.scheduler, recipe.trainer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.kwargs) == (kind, lr, decay, own)
    assert not optimizer.exclude_bias_n_norm_wd
    assert optimizer.batch_size * trainer["devices"] * trainer.get("num_nodes", 1) == images and trainer["max_epochs"] == epochs
    assert (s.name, s.warmup_epochs, s.warmup_start_lr, s.min_lr, s.warmup_peak, s.cosine_over) == ("warmup_cosine", *schedule)
    if method_kwargs.get("queue_size"):
        assert method_kwargs["queue_size"] % (2 * images) == 0


@pytest.mark.parametrize("name", SEEDS)
def test_network_data_and_views_of_sce_unigrad_and_mvmr(name):
    recipe = experiment(load(PRETRAIN / f"{name}.yaml", ["data.train_path=x"]))
    *setup, views = SETUPS[name]
    network, data, known = recipe.backbone, recipe.data, DATASETS[recipe.data.dataset]
    assert [
        network.name, network.kwargs, network.stem, network.stem_padding,
        data.dataset, tuple(data.mean or known.mean), tuple(data.std or known.std), recipe.trainer.get("sync_batchnorm", False),
    ] == setup
    assert [numbers(view) for view in recipe.augmentations for _ in range(view.num_crops)] == VIEWS[views]


def test_headers_have_the_published_accuracies():
    assert set(SEEDS) - set(TOP1) == {"imagenet/sce", "cifar/sce", "cifar/unigrad"}     # of several lengths; no number; none
    for name, accuracies in TOP1.items():
        (line,) = (line for line in (PRETRAIN / f"{name}.yaml").read_text().splitlines() if line.startswith("# published: "))
        assert tuple(map(float, re.findall(r"(\d\d\.\d+) %", line))) == accuracies, name


def test_semi_supervised_recipe():
    """MV-MR's: 100 epochs, Adam at 1e-4 for a batch of 256, a cosine without warm-up, its strong view."""
    path = ROOT / "scripts" / "linear" / "semi-supervised.yaml"
    assert "56.1 / 79.4 top-1 / top-5 with 1 %, 69.9 / 89.5 with 10 %" in path.read_text()
    recipe = load(path, ["checkpoint=x"])
    assert recipe["optimizer"] == {"name": "adam", "batch_size": 256, "lr": 1e-4, "weight_decay": 1e-6}
    assert recipe["scheduler"] == {"name": "warmup_cosine", "warmup_epochs": 0}
    assert (recipe["max_epochs"], recipe["finetune"]) == (100, True)
    (block,) = recipe["augmentations"]
    assert numbers(bind(View, block)) == (224, WHOLE, STRONG, 0.2, 1.0, 0.0, 0.0, 0.5)


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
PLAIN = (NONE, 0.0, 0.0, 0.0, 0.0, 0.0)
SMALL = [(32, WHOLE, MILD, 0.2, 0.0, 0.0, 0.0, 0.5), (32, WHOLE, MILD, 0.2, 0.0, 0.2, 0.0, 0.5)]
LARGE = [(224, WHOLE, MILD, 0.2, 1.0, 0.0, 0.0, 0.5), (224, WHOLE, MILD, 0.2, 0.1, 0.2, 0.0, 0.5)]
SCE = [(224, (0.2, 1.0), MILD, 0.2, 1.0, 0.0, 0.0, 0.5), (224, (0.2, 1.0), MILD, 0.2, 0.1, 0.2, 0.0, 0.5)]
LOCAL = {192: (0.172, 0.86), 160: (0.143, 0.715), 128: (0.114, 0.571), 96: (0.086, 0.429)}
VIEWS = {
    "cifar/asymmetric": SMALL,
    "imagenet-100/asymmetric": LARGE,
    "imagenet/asymmetric": LARGE,
    "custom/asymmetric": LARGE,
    "cifar/symmetric": [(32, WHOLE, STRONG, 0.2, 0.5, 0.0, 0.0, 0.5)] * 2,
    "cifar/vicreg": [(32, (0.2, 1.0), MILD, 0.2, 0.0, 0.1, 0.0, 0.5)] * 2,
    "cifar/symmetric_weak": [(32, WHOLE, WEAK, 0.2, 0.5, 0.0, 0.0, 0.5)] * 2,
    "imagenet/mocov2": [(224, (0.2, 1.0), WEAK, 0.2, 0.5, 0.0, 0.0, 0.5)] * 2,     # UniGrad's
    "cifar/weak_strong": [(32, (0.2, 1.0), NONE, 0.0, 0.0, 0.0, 0.0, 0.5), (32, (0.2, 1.0), WEAK, 0.2, 0.5, 0.0, 0.0, 0.5)],
    "imagenet/sce": SCE,
    "imagenet/sce-multicrop": SCE + [(size, scale, MILD, 0.2, 0.5, 0.2, 0.0, 0.5) for size, scale in LOCAL.items()],
    # MV-MR's: the image as it is, and a view; the padded crop of CIFAR-100 is a crop of at least 60 %, a named deviation
    "imagenet/original_strong": [(224, None, *PLAIN), (224, WHOLE, STRONG, 0.2, 1.0, 0.0, 0.0, 0.5)],
    "stl10/original_strong": [(96, None, *PLAIN), (96, WHOLE, STRONG, 0.2, 1.0, 0.0, 0.0, 0.5)],
    "cifar/original_mild": [(32, None, *PLAIN), (32, (0.2, 1.0), WEAK, 0.1, 0.0, 0.0, 0.0, 0.5)],
    "cifar/original_crop": [(32, None, *PLAIN), (32, (0.6, 1.0), NONE, 0.0, 0.0, 0.0, 0.0, 0.5)],
}


def numbers(view):
    """Side, crop scale (None: the image as it is) and strengths of a view."""
    jitter = view.color_jitter
    return (
        view.crop_size, (view.rrc.crop_min_scale, view.rrc.crop_max_scale) if view.rrc.enabled else None,
        (jitter.prob, jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) if jitter.prob else NONE,
        *(chance.prob for chance in (view.grayscale, view.gaussian_blur, view.solarization, view.equalization)),
        view.horizontal_flip.prob,
    )


def test_every_file_of_views_has_a_row():
    shipped = {f"{path.parts[-3]}/{path.stem}" for path in PRETRAIN.glob("*/augmentations/*.yaml")}
    assert shipped == set(VIEWS)


@pytest.mark.parametrize("name", VIEWS)
def test_views(name):
    folder, stem = name.split("/")
    blocks = yaml.safe_load((PRETRAIN / folder / "augmentations" / f"{stem}.yaml").read_text())
    views = [view for view in (bind(View, block) for block in blocks) for _ in range(view.num_crops)]
    assert [numbers(view) for view in views] == VIEWS[name]


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
