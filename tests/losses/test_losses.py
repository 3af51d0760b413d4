"""Losses against the official code's numbers and against the paper's equation in loops."""

import math

import pytest
import torch

from solo.losses import all4one_loss_func, feature_loss_func, nnclr_loss_func

TOLERANCE = {torch.float64: (1e-9, 1e-8), torch.float32: (2e-6, 5e-6)}  # of the loss, of a gradient's largest entry


def assert_gradient(found, expected, tolerance):
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["s", "m"])
def test_nnclr_equals_official(golden, size, dtype):
    z = golden(f"solo_loss_nnclr_{size}")
    nn, p = (z[name].to(dtype).requires_grad_() for name in ("nn", "p"))
    loss = nnclr_loss_func(nn, p, temperature=z.params["temperature"])
    loss.backward()
    value, gradient = TOLERANCE[dtype]
    assert loss.item() == pytest.approx(z["loss"].item(), rel=value)
    assert_gradient(p.grad, z["grad_p"], gradient)
    assert_gradient(nn.grad, z["grad_nn"], gradient)


def test_nnclr_is_the_papers_equation():
    torch.manual_seed(0)
    nn, p = torch.randn(2, 7, 5, dtype=torch.float64)
    total = 0.0
    for i in range(7):
        similarity = [torch.dot(nn[i] / nn[i].norm(), p[j] / p[j].norm()).item() / 0.3 for j in range(7)]
        total -= math.log(math.exp(similarity[i]) / sum(math.exp(s) for s in similarity))
    assert nnclr_loss_func(nn, p, temperature=0.3).item() == pytest.approx(total / 7, rel=1e-12)


def test_feature_loss_is_the_papers_equation():
    torch.manual_seed(0)
    z1, z2, m1, m2 = torch.randn(4, 6, 4, dtype=torch.float64)
    on, off = [], []
    for m, z in ((m1, z2), (m2, z1)):
        for d in range(4):
            for e in range(4):
                c = sum(m[n, d] * z[n, e] for n in range(6)) / (m[:, d].norm() * z[:, e].norm())
                (on if d == e else off).append((c.item() - float(d == e)) ** 2)
    expected = 5 * (math.sqrt(sum(on) / len(on)) + math.sqrt(sum(off) / len(off)))
    assert feature_loss_func((z1, z2), (m1, m2)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("number", [0, 1])
def test_all4one_terms_equal_official(golden, number, dtype):
    g = golden(f"solo_all4one_loss_{number}")
    z = {key: value.to(dtype) if value.is_floating_point() else value for key, value in g.items()}
    m = z["momentum_z_1"], z["momentum_z_2"]
    neighbours = [z["b0::queue"][(v @ z["b0::queue"].T).argmax(1)] for v in m]
    terms = all4one_loss_func(
        (z["rich_emb_1"], z["rich_emb_2"]),
        (z["strange_emb_1"], z["strange_emb_2"]),
        tuple(neighbours),
        (z["p_1"], z["p_2"]),
        (z["z1"], z["z2"]),
        m,
        temperature=g.params["temperature"],
        centroid_temperature=g.params["centroid_temperature"],
    )
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-5}[dtype]
    for found, name in (
        (terms.centroid, "att_nnclr_loss"),
        (terms.neighbour, "nnclr_loss"),
        (terms.feature, "feature_loss"),
        (terms.loss, "loss"),
    ):
        assert found.item() == pytest.approx(g[name].item(), rel=tolerance), name


def test_losses_survive_zero_vectors():
    z = torch.zeros(4, 8, requires_grad=True)
    loss = nnclr_loss_func(torch.zeros(4, 8), z)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4)) and torch.isfinite(z.grad).all()


def test_nnclr_gradcheck():
    torch.manual_seed(1)
    nn, p = (x.requires_grad_() for x in torch.randn(2, 4, 3, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: nnclr_loss_func(a, b, 0.5), (nn, p))
