"""SCE as a method: its step against the official one, its variants, its fields."""

import re

import pytest
import torch
from torch import nn

from solo.batch import Batch
from solo.config import bind, load
from solo.errors import ConfigError
from solo.experiment import experiment
from solo.methods import SCE
from solo.nn import Momentum
from solo.optim import scaled_lr
from solo.testing import Case, checks, invariance, run_ranks
from solo.testing.case import VIEW
from tests.conftest import ROOT
from tests.losses.test_losses import assert_gradient
from tests.losses.test_sce import TOLERANCE, cast
from tests.methods.test_golden import Features, Targets

CROPS = [{**VIEW, "num_crops": 2}, {**VIEW, "crop_size": 12, "num_crops": 2}, {**VIEW, "crop_size": 8}]
CIFAR = {"symmetric": False, "proj_layers": 2, "proj_last_norm": False, "pred_hidden_dim": 0, "queue_size": 32}
FEW = [CROPS[0], *({**crop, "num_crops": 1} for crop in CROPS[1:])]           # one of each size
VARIANTS = {
    "multicrop": {"augmentations": FEW},
    "cifar": {"method_kwargs": CIFAR},
    "cifar with crops": {"method_kwargs": CIFAR, "augmentations": FEW},
    "in batch": {"method_kwargs": {"in_batch": True, "mask_self": True, "queue_size": 0}},
    "both, scheduled": {
        "method_kwargs": {
            "in_batch": True,
            "mask_self": True,
            "temperature_m": {"start": 0.04, "end": 0.07, "share": 0.5},
            "coeff": {"start": 1, "end": 0.5, "shape": "linear"},
        }
    },
}


def embedded(q, k, queue, chosen, pointer=0):
    """A model whose online and target embeddings are given: q [V, N, D] are its views, k [G, N, D] the teacher's answers."""
    chosen = {"temperature": chosen["temp"], "temperature_m": chosen["temp_m"], "coeff": chosen["coeff"]}
    model = SCE(Features(q.shape[-1]), SCE.Config(**chosen, proj_output_dim=q.shape[-1], queue_size=len(queue)))
    views = [view.clone().requires_grad_() for view in q]
    model.projector = model.predictor = nn.Identity()
    model.teacher = Targets(views[: len(k)], list(k))
    model.to(q.dtype)
    model.queue.keys.copy_(queue)
    model.queue.pointer.fill_(pointer)
    return model, Batch(views, torch.arange(q.shape[1]), torch.arange(q.shape[1]))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["sym2_small", "sym2_medium", "multicrop_small", "multicrop_medium"])
def test_step_equals_official(golden, name, dtype):
    z = golden(f"sce_{name}")
    x = cast(z, dtype)
    before = z.params["queue_ptr_before"]
    model, batch = embedded(x["q_raw"], x["k_raw"], x["queue"], z.params, before)
    outputs = model.losses(batch)
    outputs["loss"].backward()
    model.after_step(0.0)
    assert outputs["loss"].item() == pytest.approx(z["loss"].item(), rel=TOLERANCE[dtype][0])
    assert_gradient(torch.stack([view.grad for view in batch.views]), z["grad_q_raw"], TOLERANCE[dtype][1])
    assert torch.equal(outputs["feats"], torch.cat(batch.views[:2]))
    exact = {torch.float64: 1e-10, torch.float32: 1e-6}[dtype]
    keys = model.queue.keys.double()
    if "queue_after" in z:
        torch.testing.assert_close(keys, z["queue_after"].double().T, rtol=0, atol=exact)
    else:
        written = z["queue_after_written"].double().T
        torch.testing.assert_close(keys[before : before + len(written)], written, rtol=0, atol=exact)
    assert model.queue.pointer.item() == z["queue_ptr_after"].item()


def rank_step(rank, q, k, queue, chosen):
    model, batch = embedded(q[rank], k[rank], queue, chosen)
    loss = model.losses(batch)["loss"]
    loss.backward()
    model.after_step(0.0)
    gradient = torch.stack([view.grad for view in batch.views])
    return loss.item(), gradient.numpy(), model.queue.keys.numpy(), model.queue.pointer.item()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_ranks_fill_the_queue_view_by_view(golden, dtype):
    z = golden("sce_sym2_w2")
    x = cast(z, dtype)
    value, slope = TOLERANCE[dtype]
    for rank, found in enumerate(run_ranks(rank_step, x["q_raw"], x["k_raw"], x["queue"], z.params)):
        loss, gradient, keys, pointer = found
        assert loss == pytest.approx(z["loss"][rank].item(), rel=value)
        assert_gradient(torch.from_numpy(gradient), z["grad_q_raw"][rank], slope)
        exact = {torch.float64: 1e-10, torch.float32: 1e-6}[dtype]
        torch.testing.assert_close(torch.from_numpy(keys).double(), z["queue_after"].double().T, rtol=0, atol=exact)
        assert pointer == z["queue_ptr_after"].item()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("check", [
    checks.every_parameter_learns,
    pytest.param(invariance.declares_what_it_gathers, marks=pytest.mark.slow),
    pytest.param(invariance.micro_batches_equal_one, marks=pytest.mark.slow),
    pytest.param(invariance.ranks_equal_one, marks=pytest.mark.slow),
    pytest.param(invariance.ranks_normalise_alone, marks=pytest.mark.slow),
    pytest.param(invariance.ranks_accumulate, marks=pytest.mark.slow),
    checks.teachers_are_constant,
    pytest.param(checks.state_is_whole, marks=pytest.mark.slow),
    pytest.param(checks.trains, marks=pytest.mark.slow),
    pytest.param(checks.overfits_one_batch, marks=pytest.mark.slow),
    pytest.param(checks.teachers_and_queues_advance_once_per_step, marks=pytest.mark.slow),
    pytest.param(checks.resumes_exactly, marks=pytest.mark.slow),
], ids=lambda check: check.__name__)
def test_variants_keep_the_contract(check, variant):
    check(Case("sce", **VARIANTS[variant]))


class Counted(nn.Identity):
    """Remembers the sizes of the images that come by."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.seen = backbone, []

    def forward(self, x):
        self.seen.append(x.shape[-1])
        return self.backbone(x)


@pytest.mark.parametrize("symmetric, online, targets", [(True, [16, 16, 12, 12, 8], [16, 16]), (False, [16, 12, 12, 8], [16])])
def test_each_view_is_seen_once_and_targets_are_large(symmetric, online, targets):
    case = Case("sce", augmentations=CROPS, method_kwargs={"symmetric": symmetric, "queue_size": 32})
    model = case.build()
    model.backbone, model.teacher[0] = Counted(model.backbone), Counted(model.teacher[0])
    (batch,) = case.batches(1)
    outputs = model.losses(batch)
    assert model.backbone.seen == online and model.teacher[0].seen == targets
    assert len(outputs["feats"]) == 8 * len(targets)
    model.after_step(0.0)
    assert model.queue.pointer.item() == 8 * len(targets) % 32


def test_the_target_starts_as_the_online_network():
    model = Case("sce").build()
    for online, target in zip((model.backbone, model.projector), model.teacher, strict=True):
        assert all(map(torch.equal, online.state_dict().values(), target.state_dict().values()))


def kinds(module):
    """Layers as text: ``L`` without bias, ``Lb`` with, ``B`` BatchNorm, ``b`` BatchNorm without scale and shift."""
    names = []
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            names.append(f"{layer.in_features}-{layer.out_features}{'b' if layer.bias is not None else ''}")
        elif isinstance(layer, nn.BatchNorm1d):
            names.append("B" if layer.affine else "b")
    return " ".join(names)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_published_heads():
    """Layers and numbers of parameters of the released configs."""
    model = SCE(Features(2048), SCE.Config(queue_size=16))
    assert kinds(model.projector) == "2048-2048 B 2048-2048 B 2048-256 b" and parameters(model.projector) == 8_921_088
    assert kinds(model.predictor) == "256-4096 B 4096-256" and parameters(model.predictor) == 2_105_344
    model = SCE(Features(2048), SCE.Config(queue_size=16, proj_hidden_dim=4096))
    assert parameters(model.projector) == 26_230_784
    cifar = {**CIFAR, "proj_hidden_dim": 512, "proj_output_dim": 128}
    model = SCE(Features(512), SCE.Config(**cifar))
    assert kinds(model.projector) == "512-512 B 512-128b" and parameters(model.projector) == 328_832
    assert isinstance(model.predictor, nn.Identity)


def test_schedules_follow_progress():
    given = {"temperature_m": {"start": 0.04, "end": 0.08, "share": 0.5, "shape": "linear"}, "queue_size": 32}
    case = Case("sce", method_kwargs=given)
    (batch,) = case.batches(1)
    losses = {}
    for progress, fixed in ((0.0, 0.04), (0.25, 0.06), (0.5, 0.08), (1.0, 0.08)):
        moving = case.build()
        moving._total_steps = 100
        moving.__dict__["_trainer"] = type("Trainer", (), {"global_step": int(100 * progress)})()
        still = Case("sce", method_kwargs={**given, "temperature_m": fixed}).build()
        losses[progress] = moving.losses(batch)["loss"].item()
        assert losses[progress] == pytest.approx(still.losses(batch)["loss"].item(), rel=1e-6)
    assert len({round(loss, 6) for loss in losses.values()}) == 3


@pytest.mark.parametrize("values, message", [
    ({"coeff": 1.2}, "coeff must lie in \\[0, 1\\], got 1.2"),
    ({"coeff": {"start": 0.5, "end": -1}}, "coeff must lie in"),
    ({"temperature_m": 0}, "temperature_m must be positive"),
    ({"temperature_m": {"start": 0.1, "end": 0.2, "share": 0}}, "share must lie in \\(0, 1\\]"),
    ({"temperature_m": {"start": 0.1, "stop": 0.2}}, "method_kwargs.temperature_m.stop"),
    ({"queue_size": 0}, "set in_batch=true"),
    ({"in_batch": True}, "set mask_self=true"),
    ({"proj_layers": 0}, "proj_layers must be at least 1"),
    ({"proj_hidden_dim": 0}, "proj_hidden_dim must be at least 1"),
    ({"temperature": 0}, "temperature must be positive"),
    ({"queue_size": -8}, "queue_size must be at least 0"),
])
def test_wrong_fields_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        bind(SCE.Config, values, "method_kwargs")


def test_the_queue_takes_every_target_view():
    model = Case("sce").build()
    model.check(8, [16, 16])
    with pytest.raises(ConfigError, match="queue_size=32 is not a multiple of the global batch 12 x 2 views: use 24 or 48"):
        model.check(12, [16, 16])
    Case("sce", method_kwargs={**CIFAR, "queue_size": 36}).build().check(12, [16, 16, 8])


def test_recipes_have_the_published_rates_and_crops():
    """The table of epochs in the header of sce.yaml, made of overrides that bind."""
    folder = ROOT / "scripts" / "pretrain" / "imagenet"
    rows = re.findall(r"^#  +(\d\d\.\d) %   (max_epochs.*)$", (folder / "sce.yaml").read_text(), flags=re.MULTILINE)
    found = {}
    for accuracy, overrides in [*rows, ("72.7", "")]:
        bound = experiment(load(folder / "sce.yaml", ["data.train_path=x", *overrides.split()]))
        batch = bound.optimizer.batch_size * bound.trainer["devices"]
        rate = pytest.approx(scaled_lr(bound.optimizer.lr, batch))
        found[accuracy] = bound.trainer["max_epochs"], batch, rate, bound.optimizer.weight_decay
    assert found == {
        "72.1": (100, 4096, 9.6, 1e-6),
        "72.7": (200, 4096, 4.8, 1e-6),
        "73.3": (300, 4096, 4.8, 1e-6),
        "74.1": (1000, 4096, 4.8, 1.5e-6),
    }
    bound = experiment(load(folder / "sce-multicrop.yaml", ["data.train_path=x"]))
    views = [(view.crop_size, view.rrc.crop_max_scale) for view in bound.augmentations]
    assert [size for size, _ in views] == [224, 224, 192, 160, 128, 96]
    assert all(scale == pytest.approx(size / 224, abs=3e-3) for size, scale in views)
    assert bound.optimizer.batch_size * bound.trainer["devices"] * bound.trainer["num_nodes"] == 4096


def test_momentum_equals_official_at_its_own_progress(golden):
    """The official cosine reaches 1 at the last step, S - 1; ours one step later, as BYOL's: a named deviation."""
    for size in ("small", "medium"):
        z = golden(f"schedules_{size}")
        steps = z.params["total_steps"]
        momentum = Momentum(base_tau=z.params["base_momentum"])
        found = [momentum.tau(step / (steps - 1)) for step in range(steps)]
        assert found == pytest.approx(z["sce_momentum_at_global_step"].tolist(), rel=1e-12)
        ours = [momentum.tau(step / steps) for step in range(steps)]
        assert max(abs(a - b) for a, b in zip(ours, found, strict=True)) < (1 - z.params["base_momentum"]) * 1.6 / steps
        assert [Momentum(base_tau=0.99, final_tau=0.99).tau(step / steps) for step in range(steps)] == [0.99] * steps
