"""UniGrad and its family against the official code's numbers, the formulas in loops, and autograd of what each minimises."""

import inspect

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from solo import losses
from solo.losses import (
    unigrad_barlow_loss_func,
    unigrad_byol_directpred_loss_func,
    unigrad_loss_func,
    unigrad_moco_loss_func,
    unigrad_simclr_loss_func,
    unigrad_vicreg_loss_func,
)
from solo.losses.unigrad import (
    barlow_gradients,
    correlation,
    direct_metric,
    direct_predictor,
    directpred_gradients,
    moco_gradients,
    simclr_gradients,
    unigrad_gradients,
    vicreg_gradients,
)
from solo.testing import run_ranks
from tests.losses.test_losses import assert_gradient
from tests.losses.unigrad_in_loops import by_loops

TOLERANCE = {torch.float64: (1e-10, 1e-9), torch.float32: (1e-5, 1e-4)}     # of the loss and F, of a gradient
VICREG = dict(invariance=25.0, variance=25.0, covariance=1.0)


def unigrad(z, F, params):
    return unigrad_loss_func(*z, F, lambda_=params["lambd"], rho=params["rho"])


def simclr(z, F, params):
    return *unigrad_simclr_loss_func(*z, temperature=params["moco_t"]), None


def barlow(z, F, params):
    return *unigrad_barlow_loss_func(*z, lambda_=params["lambd"]), None


def byol_directpred(z, F, params):
    return unigrad_byol_directpred_loss_func(*z, F, rho=params["rho"], eps=params["eps"])


FORMS = {"unigrad": unigrad, "unigrad_simclr": simclr, "unigrad_barlow": barlow, "unigrad_byol_directpred": byol_directpred}


def steps(form, g, dtype, rank=None):
    """(loss, similarity, F, gradients) of each step; ``g`` may have a leading axis of ranks."""
    names = ("z1_raw", "z2_raw", "z1m_raw", "z2m_raw")
    embeddings = [g[name] if rank is None else g[name][rank] for name in names]
    F, results = None, []
    for step in range(len(embeddings[0])):
        z = [rows[step].to(dtype) for rows in embeddings]
        z[0].requires_grad_(), z[1].requires_grad_()
        loss, similarity, F = FORMS[form](z, F, g.params)
        loss.backward()
        results.append((loss.detach(), similarity, F, z[0].grad, z[1].grad))
    return results


def assert_step_equals(found, g, form, step, dtype, rank=()):
    loss, similarity, F, grad1, grad2 = found
    value, gradient = TOLERANCE[dtype]
    where = (*rank, step)
    if form == "unigrad_byol_directpred":                       # 0 up to rounding
        assert abs(loss.item()) <= {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    else:
        assert loss.item() == pytest.approx(g["loss"][where].item(), rel=value)
    assert similarity.item() == pytest.approx(g["pos_sim"][where].item(), rel=value)
    assert_gradient(grad1, g["grad_z1_raw"][where], gradient)
    assert_gradient(grad2, g["grad_z2_raw"][where], gradient)
    kept = step - (g["loss"].shape[-1] - len(g["F"])) if F is not None else -1      # F is there of the last steps
    if kept >= 0:
        assert_gradient(F, g["F"][kept], value)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_official(golden, form, size, dtype):
    g = golden(f"{form}_{size}")
    for step, found in enumerate(steps(form, g, dtype)):
        assert_step_equals(found, g, form, step, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", ["unigrad", "unigrad_simclr", "unigrad_barlow"])
def test_equals_official_on_two_ranks(golden, form, dtype):
    g = golden(f"{form}_w2")
    ranks = run_ranks(lambda rank: [[None if x is None else x.numpy() for x in found] for found in steps(form, g, dtype, rank)])
    for rank, results in enumerate(ranks):
        for step, found in enumerate(results):
            tensors = [None if x is None else torch.as_tensor(x) for x in found]
            assert_step_equals(tensors, g, form, step, dtype, (rank,))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", FORMS)
def test_parts_at_the_unit_rows_equal_official(golden, form, dtype):
    g, F = golden(f"{form}_small"), None
    p, (value, gradient) = g.params, TOLERANCE[dtype]
    for step, rows in enumerate(zip(*(g[name].to(dtype) for name in ("z1_raw", "z2_raw", "z1m_raw", "z2m_raw")), strict=True)):
        F = correlation(*rows[2:]) if F is None else p["rho"] * F + (1 - p["rho"]) * correlation(*rows[2:])
        gradients = {
            "unigrad": lambda rows, F: unigrad_gradients(*rows, F, lambda_=p["lambd"]),
            "unigrad_simclr": lambda rows, F: simclr_gradients(*rows, temperature=p["moco_t"]),
            "unigrad_barlow": lambda rows, F: barlow_gradients(*rows, lambda_=p["lambd"]),
            "unigrad_byol_directpred": lambda rows, F: directpred_gradients(*rows, *metric(F, p["eps"])),
        }[form](rows, F)
        assert gradients.similarity.item() == pytest.approx(g["pos_sim"][step].item(), rel=value)
        for view, official in enumerate((g["grad_z1"][step], g["grad_z2"][step])):
            found = (gradients.positive[view] + gradients.negative[view]) / 2 / len(rows[0])
            assert_gradient(found, official, gradient)


def metric(F, eps):
    W, largest = direct_predictor(F, eps)
    return W, direct_metric(F, largest, eps)


# --- forms without official code: the formula in loops -------------------------------------------------------------------


@pytest.fixture(params=["momentum", "no momentum"])
def rows(request):
    """z1, z2, m1, m2 of seven images; without momentum encoder the targets are the online rows."""
    torch.manual_seed(3)
    z1, z2, m1, m2 = torch.randn(4, 7, 5, dtype=torch.float64)
    return (z1, z2, m1, m2) if request.param == "momentum" else (z1, z2, z1.clone(), z2.clone())


NAMES = {
    "unigrad": lambda z, queue: unigrad_gradients(*z, correlation(*z[2:]), lambda_=100.0),
    "simclr": lambda z, queue: simclr_gradients(*z, temperature=0.2),
    "moco": lambda z, queue: moco_gradients(*z, queue, temperature=0.2),
    "byol_directpred": lambda z, queue: directpred_gradients(*z, *metric(correlation(*z[2:]), 0.3)),
    "barlow": lambda z, queue: barlow_gradients(*z, lambda_=50.0),
    "vicreg": lambda z, queue: vicreg_gradients(*z, **VICREG),
}


@pytest.mark.parametrize("name", NAMES)
def test_parts_are_the_papers_formulas(rows, name):
    queue = normalize(torch.randn(11, 5, dtype=torch.float64), dim=1)
    gradients = NAMES[name](rows, queue)
    expected = by_loops(name, *rows, queue)
    for part in range(2):
        found = torch.cat((gradients.positive, gradients.negative)[part])
        assert_gradient(found, torch.tensor([row[part] for row in expected], dtype=torch.float64), 1e-12)


# --- what they minimise --------------------------------------------------------------------------------------------------


def objective(name, z, m, everything, queue, F):
    """The objective of one view in plain torch, with a graph; z as `Gradients.rows`, m and the rest normalised."""
    if name == "unigrad":
        return (-(z * m).sum(1) + 50 * ((z @ F) * z).sum(1)).mean()
    if name in ("simclr", "moco"):
        bank = everything if name == "simclr" else queue
        own = (z * m).sum(1, keepdim=True) / 0.2
        others = z @ bank.T / 0.2
        if name == "moco":
            return cross_entropy(torch.cat([own, others], 1), torch.zeros(len(z), dtype=torch.long))
        return (others.exp().sum(1).log() - own[:, 0]).mean()
    if name == "barlow":
        C = z.T @ m / len(z)
        return -2 * C.trace() + 50 * C.square().sum()
    if name == "byol_directpred":
        W, _ = metric(F, 0.3)
        return -torch.cosine_similarity(z @ W, m).mean()
    x = z - z.mean(0)
    C = x.T @ x / (len(z) - 1)
    hinge = (1 - (C.diagonal() + 1e-4).sqrt()).clamp(min=0).mean()
    return 2 * (25 * (z - m).square().mean() + 25 * hinge + (C.square().sum() - C.diagonal().square().sum()) / z.shape[1])


@pytest.mark.parametrize("name", NAMES)
def test_objective_and_its_gradient(rows, name):
    z = [*(x.clone().requires_grad_() for x in rows[:2]), *rows[2:]]
    queue = normalize(torch.randn(11, 5, dtype=torch.float64), dim=1)
    gradients = NAMES[name](z, queue)
    m1, m2 = rows[2:] if name == "vicreg" else (normalize(x, dim=1) for x in rows[2:])
    z1, z2 = gradients.rows
    everything, F = torch.cat([m1, m2]), correlation(*rows[2:])
    expected = (objective(name, z1, m2, everything, queue, F) + objective(name, z2, m1, everything, queue, F)) / 2
    assert gradients.objective.item() == pytest.approx(expected.item(), rel=1e-12)
    cosines = torch.cosine_similarity(rows[0], rows[3]).mean() + torch.cosine_similarity(rows[1], rows[2]).mean()
    assert gradients.similarity.item() == pytest.approx(cosines.item() / 2, rel=1e-12)
    wanted = torch.autograd.grad(expected, z[:2], retain_graph=True)
    found = torch.autograd.grad(gradients.loss(), z[:2])
    assert gradients.loss().item() == gradients.objective.item()
    if name == "byol_directpred":                                    # as published it is close to the gradient, not equal
        cosine = torch.cosine_similarity(torch.cat(found).flatten(), torch.cat(wanted).flatten(), dim=0)
        assert 0.9 < cosine < 1 - 1e-6
        return
    for ours, theirs in zip(found, wanted, strict=True):
        assert_gradient(ours, theirs, 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["s", "m"])
def test_vicreg_without_momentum_encoder_has_the_published_losss_gradient(golden, size, dtype):
    g = golden(f"solo_loss_vicreg_{size}")
    z1, z2 = (g[name].to(dtype).requires_grad_() for name in ("z1", "z2"))
    unigrad_vicreg_loss_func(z1, z2, z1.detach(), z2.detach(), **VICREG)[0].backward()
    for z, name in ((z1, "grad_z1"), (z2, "grad_z2")):
        assert_gradient(z.grad, g[name], {torch.float64: 1e-8, torch.float32: 5e-6}[dtype])


def test_vicreg_on_two_ranks_has_the_published_losss_gradient(golden):
    g = golden("solo_ddp_vicreg")

    def share(rank):
        z1, z2 = (g[f"z{view}_rank{rank}"].double().requires_grad_() for view in (1, 2))
        unigrad_vicreg_loss_func(z1, z2, z1.detach(), z2.detach(), **VICREG)[0].backward()
        return z1.grad.numpy(), z2.grad.numpy()

    for rank, found in enumerate(run_ranks(share)):
        for view, grad in enumerate(found, 1):
            # There both ranks call backward through a gather that sums over ranks.
            assert_gradient(torch.from_numpy(grad), g[f"out_grad_z{view}_rank{rank}"], 1e-8)


def test_every_form_is_called_alike():
    """z1, z2, m1, m2, a memory where there is one, then numbers by name; (loss, similarity), and the memory's next value."""
    shared = ["z1", "z2", "m1", "m2"]
    found = {}
    for name in (name for name in losses.__all__ if name.startswith("unigrad_")):
        parameters = inspect.signature(getattr(losses, name)).parameters
        positional = [p for p, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        assert positional[:4] == shared, name
        found[name.removeprefix("unigrad_").removesuffix("loss_func").rstrip("_")] = positional[4:]
    assert found == {"": ["F"], "byol_directpred": ["F"], "simsiam": ["F"], "moco": ["queue"],
                     "simclr": [], "barlow": [], "vicreg": []}
    torch.manual_seed(0)
    z, queue = torch.randn(4, 6, 5), normalize(torch.randn(20, 5), dim=1)
    numbers = {"lambda_": 7.0, "rho": 0.9, "eps": 0.3, "temperature": 0.2, **VICREG}
    for form, memory in found.items():
        function = getattr(losses, f"unigrad_{form}_loss_func".replace("__", "_"))
        asked = {name: numbers[name] for name in inspect.signature(function).parameters if name in numbers}
        loss, similarity, *after = function(*z, *([queue] if form == "moco" else [None] * len(memory)), **asked)
        assert loss.shape == similarity.shape == () and len(after) == len(memory), form
        assert similarity.item() == pytest.approx((cosine(z[0], z[3]) + cosine(z[1], z[2])) / 2, abs=1e-6)


def cosine(a, b):
    return torch.cosine_similarity(a, b).mean().item()


@pytest.mark.parametrize("images", [3, 12])
def test_mocos_queue_is_its_newest_targets(images):
    torch.manual_seed(0)
    z, queue = torch.randn(4, images, 5, dtype=torch.float64), normalize(torch.randn(20, 5, dtype=torch.float64), dim=1)
    *_, after = unigrad_moco_loss_func(*z, queue, temperature=0.2)
    rows = torch.cat([queue, normalize(z[2], dim=1), normalize(z[3], dim=1)])
    assert torch.equal(after, rows[2 * images :] if images == 3 else rows[-20:])
    assert torch.equal(queue, rows[:20])                        # the given one stays


def test_mocos_queue_takes_the_targets_of_all_ranks():
    torch.manual_seed(0)
    z, queue = torch.randn(4, 4, 5, dtype=torch.float64), normalize(torch.randn(20, 5, dtype=torch.float64), dim=1)
    *_, whole = unigrad_moco_loss_func(*z, queue, temperature=0.2)
    share = lambda rank: unigrad_moco_loss_func(*z[:, 2 * rank : 2 * rank + 2], queue, temperature=0.2)[2].numpy()  # noqa: E731
    for found in run_ranks(share):
        torch.testing.assert_close(torch.from_numpy(found), whole, rtol=0, atol=0)


def test_moco_delivers_its_parts():
    torch.manual_seed(0)
    z1, z2, m1, m2 = (x.requires_grad_() for x in torch.randn(4, 6, 4, dtype=torch.float64))
    queue = normalize(torch.randn(8, 4, dtype=torch.float64), dim=1)
    unigrad_moco_loss_func(z1, z2, m1, m2, queue, temperature=0.2)[0].backward()
    cosines = normalize(z1, dim=1) @ torch.cat([normalize(m2, dim=1), queue]).T / 0.2
    logits = torch.cat([cosines[:, :6].diagonal()[:, None], cosines[:, 6:]], dim=1)
    (expected,) = torch.autograd.grad(cross_entropy(logits, torch.zeros(6, dtype=torch.long)) / 2, z1)
    assert_gradient(z1.grad, expected, 1e-12)
    assert m1.grad is None and m2.grad is None


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_under_autocast_and_finite_at_zero(name):
    torch.manual_seed(0)
    z = torch.randn(4, 16, 8)
    queue = normalize(torch.randn(12, 8), dim=1)
    expected = NAMES[name](z, queue)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = NAMES[name](z, queue)
    for a, b in zip((*expected.positive, *expected.negative), (*found.positive, *found.negative), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)
    z1 = torch.zeros(16, 8, requires_grad=True)
    gradients = NAMES[name]((z1, z[1], z[2], z[3]), queue)
    gradients.loss().backward()
    assert gradients.objective.isfinite() and z1.grad.isfinite().all()


def test_directpred_of_nothing_and_of_nonsense():
    z = torch.randn(2, 6, 4, requires_grad=True)
    dead = unigrad_byol_directpred_loss_func(*z, torch.zeros(6, 4), torch.zeros(6, 4), None, rho=0.99, eps=0.3)
    assert all(part.isfinite().all() for part in dead)
    broken = unigrad_byol_directpred_loss_func(*z, torch.full((6, 4), torch.nan), z[0], None, rho=0.99, eps=0.3)
    assert broken[0].isnan()


def test_parts_mix_by_share():
    torch.manual_seed(0)
    z1, z2, m1, m2 = torch.randn(4, 6, 4, dtype=torch.float64)
    other = torch.tensor([3, 0, 5, 1, 2, 4])
    own, pasted = (simclr_gradients(z1, z2, a, b, temperature=0.2) for a, b in ((m1, m2), (m1[other], m2[other])))
    mixed = own.mixed(pasted, 0.7)
    expected = [-(0.7 * normalize(m2, dim=1)[i] + 0.3 * normalize(m2, dim=1)[other[i]]) / 0.2 for i in range(6)]
    assert_gradient(mixed.positive[0], torch.stack(expected), 1e-12)
    torch.testing.assert_close(mixed.negative[1], own.negative[1])          # the bank is the same rows
    assert mixed.objective.item() == pytest.approx(0.7 * own.objective.item() + 0.3 * pasted.objective.item())
    assert mixed.similarity.item() == pytest.approx(0.7 * own.similarity.item() + 0.3 * pasted.similarity.item())
