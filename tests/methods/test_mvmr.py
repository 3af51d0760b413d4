"""MV-MR as a method: its views, its representations, its teacher, its schedule."""

import pytest
import pytorch_lightning as pl
import torch

from solo import towers
from solo.batch import Batch
from solo.config import bind, load
from solo.errors import ConfigError
from solo.experiment import experiment
from solo.losses import mvmr_loss_func
from solo.methods import MVMR, NNCLR
from solo.optim import scaled_lr
from solo.representations import represent
from solo.run import pretrain
from solo.schedules import warmup_cosine
from solo.testing import CHECKS, Case, tiny
from solo.testing.checks import bfloat16_is_close, every_parameter_learns, labels_change_nothing, state_is_whole
from solo.testing.ranks import run_ranks
from tests.conftest import ROOT
from tests.methods.test_golden import Features
from tests.test_towers import save

QUICK = {every_parameter_learns, bfloat16_is_close, labels_change_nothing, state_is_whole}


def distilled(weights, **kwargs):
    teacher = {"name": "test_resnet", "weights": str(weights)}
    return Case("mvmr", method_kwargs={"representations": {}, "teacher": teacher, **kwargs})


@pytest.fixture
def small_tower(monkeypatch):
    """The tower sees 32 px instead of its 160: what size it asks for is checked in test_towers.py."""
    timm = towers._LIBRARIES["timm"]
    monkeypatch.setitem(towers._LIBRARIES, "timm", lambda config: timm(config)._replace(size=32))


@pytest.mark.parametrize("check", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CHECKS])
def test_distillation_keeps_the_contract(check, tmp_path, small_tower):
    save(tmp_path / "tower.pt")
    check(distilled(tmp_path / "tower.pt"))


def test_a_resume_with_another_teacher_is_refused(tmp_path):
    save(tmp_path / "tower.pt")
    case = distilled(tmp_path / "tower.pt")
    state = pretrain(case.experiment(tmp_path / "runs", max_epochs=1)).checkpoint
    assert not any(key.startswith("teacher.") and key != "teacher._extra_state" for key in torch.load(state)["state_dict"])
    save(tmp_path / "tower.pt", seed=1)
    with pytest.raises(ConfigError, match="teacher test_resnet are not those this checkpoint was trained with"):
        pretrain(case.experiment(tmp_path / "runs", max_epochs=2, resume=str(state)))


def test_the_teacher_sees_the_pixels(tmp_path):
    save(tmp_path / "tower.pt")
    model = distilled(tmp_path / "tower.pt").build()
    assert model.mean == (0.5,) * 3 and model.std == (0.25,) * 3        # of the dataset `fake`
    seen = []
    model.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    pixels = torch.rand(4, 3, 16, 16)
    batch = Batch([(pixels - 0.5) / 0.25, torch.randn(4, 3, 16, 16)], torch.zeros(4), torch.arange(4))
    model.losses(batch)
    torch.testing.assert_close(seen[0], pixels)
    model.mean = None
    with pytest.raises(ConfigError, match="MVMR must know what its images are normalised with"):
        model.losses(batch)


def test_step_is_the_loss_of_the_two_views():
    torch.manual_seed(0)
    config = MVMR.Config(proj_hidden_dim=16, proj_output_dim=8, representations={"raw": 2.0, "hog": 1.0, "local_std": 0.0},
                         sign="released", invariance_weight=3.0, variance_weight=0.5, views_weight=4.0, std_margin=2.0)
    model = MVMR(Flat(), config)
    original, augmented = torch.randn(2, 6, 3, 8, 8)
    outputs = model.losses(Batch([original, augmented], torch.zeros(6), torch.arange(6)))
    z_original, z = model.projector(original.flatten(1)), model.projector(augmented.flatten(1))
    terms = mvmr_loss_func(
        z, z_original, {name: represent(name, original) for name in ("raw", "hog")}, sign="released", std_margin=2.0,
        invariance_weight=3.0, variance_weight=0.5, views_weight=4.0, representation_weights={"raw": 2.0},
    )
    assert outputs["loss"].item() == pytest.approx(terms.loss.item())
    assert set(outputs) == {"loss", "feats", "invariance", "variance", "dcor_views", "dcor_raw", "dcor_hog"}
    assert torch.equal(outputs["feats"], torch.cat([original, augmented]).flatten(1))
    model.config.normalize_z = True
    assert model.losses(Batch([original, augmented], torch.zeros(6), torch.arange(6)))["invariance"] < 4 / 8


class Flat(Features):
    def __init__(self):
        super().__init__(3 * 8 * 8)

    def forward(self, x):
        return x.flatten(1)


def test_projector_is_the_published_one():
    with torch.device("meta"):
        model = MVMR(Features(2048), MVMR.Config())
    assert sum(p.numel() for p in model.projector.parameters()) == 151_027_712


def test_paper_sign_draws_the_embedding_to_a_representation_and_the_released_one_away():
    """The gradient of the embedding alone, on images whose raw pixels it does not know yet."""
    found = {}
    for sign in ("paper", "released"):
        torch.manual_seed(0)
        images, z = torch.randn(16, 3, 8, 8), torch.nn.Parameter(torch.randn(16, 32))
        optimizer = torch.optim.Adam([z], lr=0.05)
        for _ in range(60):
            terms = mvmr_loss_func(z, z.detach(), {"raw": represent("raw", images)}, sign=sign, views_weight=0.0)
            optimizer.zero_grad()
            terms.loss.backward()
            optimizer.step()
        found[sign] = terms.representations["raw"].item()
    assert found["paper"] > 0.95 and found["released"] < 0.9 and found["paper"] > found["released"] + 0.08


def test_wrong_configs_are_told(tmp_path):
    with pytest.raises(ConfigError) as error:
        bind(MVMR.Config, {"representations": {"scatering": 1.0, "raw": -1.0}, "sign": "papers"}, "method_kwargs")
    assert "method_kwargs.sign must be one of paper, released" in str(error.value)
    with pytest.raises(ConfigError) as error:
        bind(MVMR.Config, {"representations": {"scatering": 1.0, "raw": -1.0}, "teacher_weight": 2.0}, "method_kwargs")
    assert "method_kwargs.teacher_weight=2 weighs nothing: there is no teacher" in str(error.value)
    assert "no 'scatering' in solo.representations, did you mean 'scattering'?" in str(error.value)
    assert "representations.raw must be at least 0, got -1.0" in str(error.value)
    with pytest.raises(ConfigError) as error:
        bind(MVMR.Config, {"proj_hidden_dim": 0, "std_margin": -1.0, "views_weight": -1.0}, "method_kwargs")
    for name, least in (("proj_hidden_dim", 1), ("std_margin", 0), ("views_weight", 0)):
        assert f"method_kwargs.{name} must be at least {least}" in str(error.value)


def test_the_first_view_must_be_the_image_as_it_is(tmp_path):
    plain, drawn = tiny("mvmr", tmp_path)["augmentations"]
    assert NNCLR.originals == 0 and plain["rrc"] == {"enabled": False}
    for views in ([drawn, plain], [drawn, drawn], [{**plain, "grayscale": {"prob": 0.1}}, drawn]):
        with pytest.raises(ConfigError, match="augmentations: the first view of mvmr must be the image as it is"):
            Case("mvmr", augmentations=views).experiment()


# batch of a process, accumulated or other processes, epochs, rate of the optimizer, small stem, teacher
RECIPES = {
    "stl10/mvmr": (256, 1, 1000, 1e-4, True, False),
    "cifar/mvmr": (512, 1, 1000, 2e-4, True, False),
    "imagenet/mvmr": (256, 8, 1000, 1e-4, False, False),
    "cifar/mvmr-clip": (256, 1, 200, 1e-4, True, True),
    "stl10/mvmr-clip": (256, 1, 200, 1e-4, False, True),
    "imagenet/mvmr-clip": (256, 1, 200, 1e-4, False, True),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name):
    batch, times, epochs, lr, small, clip = RECIPES[name]
    recipe = experiment(load(ROOT / "scripts" / "pretrain" / f"{name}.yaml", ["data.train_path=x"]))
    optimizer, kwargs = recipe.optimizer, recipe.method_kwargs
    assert (optimizer.name, optimizer.batch_size, optimizer.weight_decay, optimizer.kwargs) == ("adam", batch, 1e-6, {})
    assert recipe.trainer["devices"] == times and scaled_lr(optimizer.lr, batch * times) == pytest.approx(lr)
    assert (recipe.trainer["max_epochs"], recipe.scheduler.warmup_epochs, recipe.scheduler.min_lr) == (epochs, 10, 1e-6)
    assert (recipe.backbone.name, recipe.backbone.kwargs) == ("resnet50", {"zero_init_last": True})
    assert recipe.backbone.stem.startswith("small") == small and "sync_batchnorm" not in recipe.trainer
    assert kwargs == (MVMR.Config(representations={}, teacher=kwargs.teacher) if clip else MVMR.Config())
    if clip:
        teacher = kwargs.teacher
        assert (teacher.library, teacher.name, teacher.tag) == ("open_clip", "ViT-B-16", "laion400m_e32")


def rates_of_two_epochs(rank, world, folder):
    """The learning rate of each optimizer step: 64 images, 8 to a process and batch, 2 batches to a step."""
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    scheduler = {"warmup_epochs": 1, "warmup_start_lr": 1e-6, "min_lr": 1e-6}
    optimizer = {"name": "adam", "lr": 0.016, "kwargs": {}}
    case = Case("mvmr", scheduler=scheduler, method_kwargs={"representations": {"raw": 1.0}}, optimizer=optimizer)
    pretrain(case.experiment(folder, accumulate_grad_batches=2, max_epochs=2, devices=world), [Watch()])
    return rates


def test_real_optimizer_steps_drive_the_schedule(tmp_path):
    """Of 16 batches 2 to a step: the published code would see 16 steps and end in the middle of the cosine."""
    due = [warmup_cosine(t, 8, 4, 0.001, 1e-6, 1e-6) for t in range(8)]
    assert rates_of_two_epochs(0, 1, tmp_path) == pytest.approx(due)


@pytest.mark.slow
def test_real_optimizer_steps_of_two_processes_drive_the_schedule(tmp_path):
    due = [warmup_cosine(t, 4, 2, 0.002, 1e-6, 1e-6) for t in range(4)]
    for rates in run_ranks(rates_of_two_epochs, 2, tmp_path):
        assert rates == pytest.approx(due)
