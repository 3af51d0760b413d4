"""Barlow Twins and VICReg: official numbers, the equations in loops, both forms, and 2 and 4 ranks as one."""

import pytest
import torch
import torch.nn.functional as F

from solo.losses import barlow, barlow_loss_func, moments, vicreg_loss_func
from solo.testing import run_ranks
from tests.losses.test_contrast import Counted, part, rows, value_and_gradients
from tests.losses.test_losses import TOLERANCE, assert_gradient

LOSSES = {"barlow": barlow_loss_func, "vicreg": vicreg_loss_func}
SHAPES = {"gram": (12, 20), "features": (12, 8), "square": (12, 12)}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["s", "m"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_official(golden, name, size, dtype):
    g = golden(f"solo_loss_{name}_{size}")
    z = [g[key].to(dtype).requires_grad_() for key in ("z1", "z2")]
    keys = {"barlow": ("lamb", "scale_loss"), "vicreg": ("sim_loss_weight", "var_loss_weight", "cov_loss_weight")}[name]
    loss, grads = value_and_gradients(LOSSES[name](*z, **{key: g.params[key] for key in keys}), *z)
    value, gradient = TOLERANCE[dtype]
    assert loss == pytest.approx(g["loss"].item(), rel=value)
    for grad, key in zip(grads, ("grad_z1", "grad_z2"), strict=True):
        assert_gradient(grad, g[key], gradient)


def test_vicregs_terms_equal_official(golden):
    g = golden("solo_loss_vicreg_s")
    for i, key in enumerate(("sim_term", "var_term", "cov_term")):
        weights = [float(i == j) for j in range(3)]
        assert vicreg_loss_func(g["z1"], g["z2"], *weights).item() == pytest.approx(g[key].item(), rel=1e-9)


def looped_barlow(z1, z2, lamb, scale):
    n, d = z1.shape
    mean = [z.sum(0) / n for z in (z1, z2)]
    std = [(((z - m) ** 2).sum(0) / n + 1e-5).sqrt() for z, m in zip((z1, z2), mean, strict=True)]
    loss = 0.0
    for i in range(d):
        for j in range(d):
            c = sum((z1[b, i] - mean[0][i]) * (z2[b, j] - mean[1][j]) for b in range(n)) / (n * std[0][i] * std[1][j])
            loss = loss + scale * ((1 - c) ** 2 if i == j else lamb * c**2)
    return loss


def looped_vicreg(z1, z2, similarity, variance, covariance):
    n, d = z1.shape
    loss = similarity * sum((z1[b] - z2[b]).square().sum() for b in range(n)) / (n * d)
    for z in (z1, z2):
        x = z - z.sum(0) / n
        for i in range(d):
            std = ((x[:, i] ** 2).sum() / (n - 1) + 1e-4).sqrt()
            loss = loss + variance * torch.clamp(1 - std, min=0) / d
            for j in range(d):
                if i != j:
                    loss = loss + covariance * (torch.dot(x[:, i], x[:, j]) / (n - 1)) ** 2 / d
    return loss


@pytest.mark.parametrize("n, d", [(6, 4), (4, 6), (5, 5), (2, 3)])
def test_are_the_papers_equations(n, d):
    z1, z2 = rows(n, d), rows(n, d, seed=1)
    for loss, looped, options in (
        (barlow_loss_func, looped_barlow, (0.03, 0.7)),
        (vicreg_loss_func, looped_vicreg, (3.0, 5.0, 2.0)),
    ):
        found, grads = value_and_gradients(loss(z1, z2, *options), z1, z2)
        expected, expected_grads = value_and_gradients(looped(z1, z2, *options), z1, z2)
        assert found == pytest.approx(expected, rel=1e-11)
        for grad, other in zip(grads, expected_grads, strict=True):
            assert_gradient(grad, other, 1e-10)


@pytest.mark.parametrize("name", LOSSES)
def test_both_forms_are_one(monkeypatch, name):
    """The Gram form where it is chosen, and the D x D form in its place."""
    z = [rows(24, 40, dtype=torch.float32), rows(24, 40, seed=1, dtype=torch.float32)]
    used = []
    gram = moments._SquaredGram.apply
    monkeypatch.setattr(moments._SquaredGram, "apply", lambda *rest: used.append(1) or gram(*rest))
    first, grads = value_and_gradients(LOSSES[name](*z), *z)
    assert used
    used.clear()
    monkeypatch.setattr(moments, "GRAM_BELOW", 0.0)
    second, others = value_and_gradients(LOSSES[name](*z), *z)
    assert not used
    assert first == pytest.approx(second, rel=2e-6)
    for grad, other in zip(grads, others, strict=True):
        assert_gradient(grad, other, 5e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gram_form_keeps_its_digits(monkeypatch, name):
    """Near the optimum, with an offset and under autocast: its float32 is no worse than that of the D x D form."""
    z = torch.linalg.qr(rows(64, 64).detach())[0][:48] * 8 + 3                  # rows of nearly decorrelated features
    noisy = [z + 0.05 * rows(*z.shape, seed=seed).detach() for seed in (1, 2)]
    exact = [x.clone().requires_grad_() for x in noisy]
    expected, expected_grads = value_and_gradients(LOSSES[name](*exact), *exact)
    errors = []
    for below in (1.0, 0.0):                                                    # Gram, D x D
        monkeypatch.setattr(moments, "GRAM_BELOW", below)
        single = [x.float().requires_grad_() for x in noisy]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = LOSSES[name](*single)
        found, grads = value_and_gradients(loss, *single)
        assert found == pytest.approx(expected, rel=2e-6)
        pairs = zip(grads, expected_grads, strict=True)
        errors.append(max(((grad - other).abs().max() / other.abs().max()).item() for grad, other in pairs))
    assert errors[0] <= 2 * errors[1] < 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name, shape):
    n, d = (size // 3 for size in shape)
    assert torch.autograd.gradcheck(lambda a, b: 2 * LOSSES[name](a, b), (rows(n, d), rows(n, d, seed=1)))


def test_constant_features_have_finite_gradients():
    for shape in SHAPES.values():
        for loss in LOSSES.values():
            z1, z2 = torch.ones(shape, requires_grad=True), torch.zeros(shape, requires_grad=True)
            value, grads = value_and_gradients(loss(z1, z2), z1, z2)
            assert torch.tensor(value).isfinite() and all(grad.isfinite().all() for grad in grads)


# --- ranks ------------------------------------------------------------------------------------------------------------


def joint_part(rank, name, z1, z2, world):
    mine = [part(z[None].detach(), rank, world).requires_grad_() for z in (z1, z2)]
    with Counted() as counted:
        loss = LOSSES[name](*mine)
        grads = torch.autograd.grad(loss, mine)
    return loss.item(), [grad.numpy() for grad in grads], counted.calls


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("form", SHAPES)
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_are_one_process(name, form, world, dtype, tolerance):
    z1, z2 = rows(*SHAPES[form], dtype=dtype), rows(*SHAPES[form], seed=1, dtype=dtype)
    expected, grads = value_and_gradients(LOSSES[name](z1, z2), z1, z2)
    found = run_ranks(joint_part, name, z1, z2, world, world=world)
    assert sum(each[0] for each in found) / world == pytest.approx(expected, rel=tolerance)
    for rank, (_, each, calls) in enumerate(found):
        for mine, whole in zip(each, grads, strict=True):
            assert_gradient(torch.from_numpy(mine) / world, part(whole[None], rank, world), tolerance)
        assert calls == (["all_gather_into_tensor"] if form == "gram" else ["all_reduce"] * 3)


def official_vicreg(rank, g, dtype):
    z = [g[f"{key}_rank{rank}"].to(dtype).requires_grad_() for key in ("z1", "z2")]
    loss = vicreg_loss_func(*z)
    return loss.item(), [grad.numpy() for grad in torch.autograd.grad(loss, z)]


def official_barlow(rank, g, dtype):
    """The official features: standardised over the rank's own rows."""
    z = [g[f"{key}_rank{rank}"].to(dtype).requires_grad_() for key in ("z1", "z2")]
    x = moments.Moments(*(F.batch_norm(each, None, None, training=True) for each in z))
    one = torch.ones(z[0].shape[1], dtype=dtype)
    loss = g.params["scale_loss"] * barlow._redundancy(x, one, one, g.params["lamb"])
    return loss.item(), [grad.numpy() / 2 for grad in torch.autograd.grad(loss, z)]    # DDP will not divide it again


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name, function", [("vicreg", official_vicreg), ("barlow", official_barlow)])
def test_two_ranks_equal_official(golden, name, function, dtype):
    g = golden(f"solo_ddp_{name}")
    value, gradient = TOLERANCE[dtype]
    for rank, (loss, grads) in enumerate(run_ranks(function, g, dtype)):
        assert loss == pytest.approx(g[f"out_loss_rank{rank}"].item(), rel=value)
        for grad, key in zip(grads, ("z1", "z2"), strict=True):
            assert_gradient(torch.from_numpy(grad), g[f"out_grad_{key}_rank{rank}"], gradient)
