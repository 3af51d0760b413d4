"""Each method's step against its loss function called directly, every field off its default, so that each is passed on."""

import pytest
import torch
from torch import nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import solo.losses.unigrad as forms
from solo.batch import Batch
from solo.losses import mvmr_loss_func
from solo.losses.sce import sce_multicrop_loss_func
from solo.methods import MVMR, SCE, UniGrad
from solo.methods import unigrad as module
from solo.methods.unigrad import CONSTANTS, DirectPredictor
from solo.representations import represent
from solo.schedules import Ramp
from solo.testing import Case, run_ranks
from tests.losses.test_losses import assert_gradient
from tests.methods.test_golden import Features, Targets
from tests.test_towers import save

LABELS = torch.zeros(6, dtype=torch.long)
OTHER = {
    "unigrad": {"lambda_": 7.0, "rho": 0.6},
    "simclr": {"temperature": 0.37},
    "moco": {"temperature": 0.37, "queue_size": 24},
    "simsiam": {"rho": 0.6, "eps": 0.17, "eigen_every": 1},
    "byol_directpred": {"rho": 0.6, "eps": 0.17, "eigen_every": 1},
    "barlow": {"lambda_": 7.0},
    "vicreg": {"invariance": 3.0, "variance": 5.0, "covariance": 7.0},
}


def heads_only(form, constants, **kwargs):
    model = UniGrad(Features(8), UniGrad.Config(form=form, proj_hidden_dim=4, proj_output_dim=8, **constants, **kwargs))
    model.projector = nn.Identity()
    return model.double()


def direct(form, z1, z2, m1, m2, memory, constants):
    """The loss function's scalar, and the memory after it; MoCo's is the queue."""
    c = {name: value for name, value in constants.items() if name not in ("queue_size", "eigen_every")}
    function = forms.unigrad_loss_func if form == "unigrad" else getattr(forms, f"unigrad_{form}_loss_func")
    if form in ("simclr", "barlow", "vicreg"):
        return function(z1, z2, m1, m2, **c)[0], None
    loss, _, memory = function(z1, z2, m1, m2, memory, **c)
    return loss, memory


@pytest.mark.parametrize("teacher", [True, False], ids=["teacher", "none"])
@pytest.mark.parametrize("form", OTHER)
def test_a_form_of_unigrad(form, teacher):
    torch.manual_seed(0)
    model = heads_only(form, OTHER[form], **({} if teacher else {"momentum": None}))
    memory = model.queue.keys.clone() if form == "moco" else None
    for _ in range(2):
        views = [torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        targets = [torch.randn(6, 8, dtype=torch.float64) for _ in range(2)] if teacher else [v.detach() for v in views]
        if teacher:
            model.teacher = Targets(views, targets)
        expected, memory = direct(form, *views, *targets, memory, OTHER[form])
        wanted = torch.autograd.grad(expected, views)
        found = torch.autograd.grad(model.losses(Batch(views, LABELS, LABELS))["loss"], views)
        for a, b in zip(found, wanted, strict=True):
            assert_gradient(a, b, 1e-10)
        model.after_step(0.0)


def test_default_constants_are_the_published_ones():
    predictor = {"rho": 0.99, "eps": 0.3, "eigen_every": 10}
    assert CONSTANTS == {
        "unigrad": {"lambda_": 100.0, "rho": 0.99}, "simclr": {"temperature": 0.2}, "barlow": {"lambda_": 50.0},
        "moco": {"temperature": 0.2, "queue_size": 65536}, "simsiam": predictor, "byol_directpred": predictor,
        "vicreg": {"invariance": 25.0, "variance": 25.0, "covariance": 1.0},
    }


def cutmix_step(rank, form, views, targets, others, shares):
    """Rank 0 draws an empty box; how often this rank gathers, and its gradients."""
    seen, gather = [], forms.gather
    forms.gather = lambda x: (seen.append(x), gather(x))[1]
    module.cutmix = lambda views, alpha: (views, others[rank], shares[rank])
    model = heads_only(form, OTHER[form], cutmix=1.0)
    rows = [view.requires_grad_() for view in views[rank]]
    model.teacher = Targets(rows, list(targets[rank]))
    loss = model.losses(Batch(rows, LABELS, LABELS))["loss"]
    return len(seen), [gradient.numpy() for gradient in torch.autograd.grad(loss, rows)]


@pytest.mark.parametrize("form", ["simclr", "barlow", "vicreg"])
def test_cutmix_with_an_empty_box_on_one_of_two_ranks(form):
    torch.manual_seed(0)
    views, targets = torch.randn(2, 2, 2, 6, 8, dtype=torch.float64)                # [rank, view, B, D]
    others, shares = [torch.randperm(6), torch.randperm(6)], [1.0, 0.7]
    (times, first), (again, second) = run_ranks(cutmix_step, form, views, targets, others, shares)
    assert times == again > 0
    z = [torch.cat([views[0, v], views[1, v]]).requires_grad_() for v in range(2)]  # both ranks' rows in one process
    m = [torch.cat([targets[0, v], targets[1, v]]) for v in range(2)]
    other, share = torch.cat([others[0], others[1] + 6]), torch.tensor(shares).repeat_interleave(6)[:, None]
    gradients = getattr(forms, f"{form}_gradients")
    own, pasted = gradients(*z, *m, **OTHER[form]), gradients(*z, m[0][other], m[1][other], **OTHER[form])
    scalar = sum((own.rows[v] * (share * (own.positive[v] + own.negative[v])
                                 + (1 - share) * (pasted.positive[v] + pasted.negative[v]))).sum() for v in range(2)) / 12
    for view, wanted in enumerate(torch.autograd.grad(scalar, z)):
        assert_gradient(torch.cat([torch.from_numpy(first[view]), torch.from_numpy(second[view])]), wanted, 1e-6)


class NoWait(TorchDispatchMode):
    """No tensor's value is read by the host, which on a GPU would wait for it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_predictor_waits_for_no_value_and_counts_on_after_a_resume():
    torch.manual_seed(0)
    predictor, rows = DirectPredictor(4, 0.9, 0.3, every=3), torch.randn(4, 2, 9, 4)
    with NoWait():
        for pair in rows:
            predictor(*pair)
            predictor.after_step(0.0)
    again = DirectPredictor(4, 0.9, 0.3, every=3)
    again.load_state_dict(predictor.state_dict())
    for pair in rows:
        for found, wanted in zip(again(*pair), predictor(*pair), strict=True):
            assert torch.equal(found, wanted)
        again.after_step(0.0)
        predictor.after_step(0.0)


@pytest.mark.parametrize("fields", [
    {"symmetric": True, "mask_self": True, "in_batch": False},
    {"symmetric": False, "mask_self": True, "in_batch": True},
    {"symmetric": False, "mask_self": False, "in_batch": False},
])
def test_sce(fields):
    torch.manual_seed(0)
    ramps = {"temperature_m": Ramp(start=0.2, end=0.6, shape="linear"), "coeff": Ramp(start=0.9, end=0.1, shape="linear")}
    model = SCE(Features(8), SCE.Config(temperature=0.3, **ramps, **fields, proj_output_dim=8, queue_size=24)).double()
    model.projector = model.predictor = nn.Identity()
    views = [torch.randn(6, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    targets = list(torch.randn(2, 6, 8, dtype=torch.float64))[: 1 + fields["symmetric"]]
    model.teacher = Targets(views[: len(targets)], targets)
    model._total_steps = 100
    model.__dict__["_trainer"] = type("Trainer", (), {"global_step": 25})()
    online = views if fields["symmetric"] else views[1:]
    pairs = [(0, 1), (0, 2), (1, 0), (1, 2)] if fields["symmetric"] else [(0, 0), (0, 1)]
    expected = sce_multicrop_loss_func(
        online, targets, model.queue.keys, pairs, temperature=0.3, temperature_m=0.3, coeff=0.7,
        mask_self=fields["mask_self"], in_batch=fields["in_batch"],
    )
    found = model.losses(Batch(views, LABELS, LABELS))["loss"]
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    wanted = torch.autograd.grad(expected, online)
    for a, b in zip(torch.autograd.grad(found, online), wanted, strict=True):
        assert_gradient(a, b, 1e-10)


@pytest.mark.parametrize("sign", ["paper", "released"])
def test_mvmr(sign, tmp_path):
    save(tmp_path / "tower.pt")
    weights = {"invariance_weight": 2.0, "variance_weight": 3.0, "views_weight": 5.0, "teacher_weight": 7.0}
    chosen, given = {"raw": 11.0, "hog": 13.0, "local_std": 0.0}, {"sign": sign, "std_margin": 2.5, **weights}
    teacher = {"name": "test_resnet", "weights": str(tmp_path / "tower.pt")}
    case = Case("mvmr", method_kwargs={"representations": chosen, "teacher": teacher, "normalize_z": True, **given})
    model, batch = case.build(), case.batches(1)[0]
    seen = []
    model.projector.register_forward_hook(lambda layer, inputs, output: seen.append(normalize(output.detach(), dim=1)))
    found = model.losses(batch)
    (z_original, z), used = seen, {name: weight for name, weight in chosen.items() if weight}
    features = {name: represent(name, batch.views[0]) for name in used}
    pixels = batch.views[0] * 0.25 + 0.5                                            # of the dataset `fake`
    terms = mvmr_loss_func(z, z_original, features, model.teacher(pixels), **given, representation_weights=used)
    assert found["loss"].item() == pytest.approx(terms.loss.item(), rel=1e-5)
    assert set(found) >= {"dcor_raw", "dcor_hog", "dcor_teacher"} and "dcor_local_std" not in found


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_numbers_that_are_not_finite_are_refused(value):
    refused = [(UniGrad, {"lambda_": value}), (UniGrad, {"form": "simsiam", "eps": value}), (SCE, {"temperature_m": value}),
               (SCE, {"temperature": value}), (MVMR, {"representations": {"raw": value}}), (MVMR, {"views_weight": value})]
    for method, fields in refused:
        with pytest.raises(ValueError, match=f"must .*{value}"):
            method.Config(**fields)


def test_mvmr_without_any_weight_is_refused():
    none = {"invariance_weight": 0.0, "variance_weight": 0.0, "views_weight": 0.0}
    for representations in ({}, {"raw": 0.0}):
        with pytest.raises(ValueError, match="nothing is left to learn from"):
            MVMR.Config(**none, representations=representations)
    MVMR.Config(**none, representations={"raw": 1.0})
