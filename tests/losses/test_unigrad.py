"""UniGrad and its family against the official code's numbers, the formulas in loops, and autograd of what each minimises."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from solo.losses import (
    unigrad_barlow_loss_func,
    unigrad_byol_directpred_loss_func,
    unigrad_loss_func,
    unigrad_moco_loss_func,
    unigrad_simclr_loss_func,
    unigrad_simsiam_loss_func,
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
    if F is not None and len(g["F"]) > step:
        assert_gradient(F, g["F"][step], value)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("form", FORMS)
def test_equals_official(golden, form, size, dtype):
    g = golden(f"{form}_{size}")
    results = steps(form, g, dtype)
    for step, found in enumerate(results):
        assert_step_equals(found, {**g, "F": g["F"] if size == "small" else ()} if "F" in g else g, form, step, dtype)
    if "F" in g:
        assert_gradient(results[-1][2], g["F"][-1], TOLERANCE[dtype][0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("form", ["unigrad", "unigrad_simclr", "unigrad_barlow"])
def test_equals_official_on_two_ranks(golden, form, dtype):
    g = golden(f"{form}_w2")
    ranks = run_ranks(lambda rank: [[None if x is None else x.numpy() for x in found] for found in steps(form, g, dtype, rank)])
    for rank, results in enumerate(ranks):
        for step, found in enumerate(results):
            tensors = [None if x is None else torch.as_tensor(x) for x in found]
            assert_step_equals(tensors, g, form, step, dtype, (rank,))


@pytest.mark.parametrize("form", ["unigrad", "unigrad_simclr", "unigrad_barlow", "unigrad_byol_directpred"])
def test_parts_at_the_unit_rows_equal_official(golden, form):
    g = golden(f"{form}_small")
    z1, z2, m1, m2 = (g[name][0].double() for name in ("z1_raw", "z2_raw", "z1m_raw", "z2m_raw"))
    F, p = correlation(m1, m2), g.params
    gradients = {
        "unigrad": lambda: unigrad_gradients(z1, z2, m1, m2, F, lambda_=p["lambd"]),
        "unigrad_simclr": lambda: simclr_gradients(z1, z2, m1, m2, temperature=p["moco_t"]),
        "unigrad_barlow": lambda: barlow_gradients(z1, z2, m1, m2, lambda_=p["lambd"]),
        "unigrad_byol_directpred": lambda: directpred_gradients(z1, z2, m1, m2, *metric(F, p["eps"])),
    }[form]()
    for view in range(2):
        assert_gradient((gradients.positive[view] + gradients.negative[view]) / 2 / len(z1), g[f"grad_z{view + 1}"][0], 1e-9)


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


def unit(row):
    return [x / math.sqrt(sum(y * y for y in row)) for x in row]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def times(row, matrix):
    return [sum(row[i] * matrix[i][j] for i in range(len(row))) for j in range(len(matrix[0]))]


def contrast(z, own, others, temperature):
    """Both parts of one row against its own target and others, one of which may be the own one."""
    logits = [dot(z, v) / temperature for v in others]
    total = sum(math.exp(logit) for logit in logits)
    negative = [sum(math.exp(logit) / total * v[d] for logit, v in zip(logits, others, strict=True)) for d in range(len(z))]
    return [-x / temperature for x in own], [x / temperature for x in negative]


def predictor(targets, eps):
    """W and A of DirectPred from the rows of both views, W by its eigenvectors."""
    F = [[sum(t[i] * t[j] for t in targets) / len(targets) for j in range(5)] for i in range(5)]
    values, vectors = torch.linalg.eigh(torch.tensor(F, dtype=torch.float64))
    top = max(values.tolist())
    lengths = [max(math.sqrt(max(v, 0) / top) + eps, 1e-4) for v in values.tolist()]
    W = [[sum(vectors[i, k].item() * lengths[k] * vectors[j, k].item() for k in range(5)) for j in range(5)] for i in range(5)]
    A = [[F[i][j] / top + (eps**2 if i == j else 0) for j in range(5)] for i in range(5)]
    return W, A


def direct(z, m, W, A):
    zW, zA, mW = times(z, W), times(z, A), times(m, W)
    length, c = math.sqrt(dot(zW, zW)), dot(zW, m) / dot(zA, z)
    return [-x / length for x in mW], [c * x / length for x in zA]


def by_loops(name, z1, z2, m1, m2, queue):
    """(positive, negative) rows of view 1 and of view 2, with the paper's formulas on lists of floats."""
    z = [[unit(row) for row in view.tolist()] for view in (z1, z2)]
    m = [[unit(row) for row in view.tolist()] for view in (m1, m2)]
    everything, n = [*m[0], *m[1]], len(z[0])
    parts = []
    for view, other in ((0, 1), (1, 0)):
        for i in range(n):
            row, target = z[view][i], m[other][i]
            if name == "unigrad":
                F = [[sum(t[a] * t[b] for t in everything) / (2 * n) for b in range(5)] for a in range(5)]
                parts.append(([-x for x in target], [100 * x for x in times(row, F)]))
            elif name == "simclr":
                parts.append(contrast(row, target, everything, 0.2))
            elif name == "moco":
                parts.append(contrast(row, target, [target, *queue.tolist()], 0.2))
            elif name == "directpred":
                parts.append(direct(row, target, *predictor(everything, 0.3)))
            elif name == "barlow":
                weights = [dot(target, m[other][j]) / n for j in range(n)]
                negative = [2 * 50 * sum(w * z[view][j][d] for j, w in enumerate(weights)) for d in range(5)]
                parts.append(([-2 * x for x in target], negative))
    return parts


NAMES = {
    "unigrad": lambda z, queue: unigrad_gradients(*z, correlation(*z[2:]), lambda_=100.0),
    "simclr": lambda z, queue: simclr_gradients(*z, temperature=0.2),
    "moco": lambda z, queue: moco_gradients(*z, queue, temperature=0.2),
    "directpred": lambda z, queue: directpred_gradients(*z, *metric(correlation(*z[2:]), 0.3)),
    "barlow": lambda z, queue: barlow_gradients(*z, lambda_=50.0),
    "vicreg": lambda z, queue: vicreg_gradients(*z, **VICREG),
}


@pytest.mark.parametrize("name", ["unigrad", "simclr", "moco", "directpred", "barlow"])
def test_parts_are_the_papers_formulas(rows, name):
    queue = normalize(torch.randn(11, 5, dtype=torch.float64), dim=1)
    gradients = NAMES[name](rows, queue)
    expected = by_loops(name, *rows, queue)
    for part in range(2):
        found = torch.cat((gradients.positive, gradients.negative)[part])
        assert_gradient(found, torch.tensor([row[part] for row in expected], dtype=torch.float64), 1e-12)


def test_vicreg_parts_are_the_derivatives_in_loops(rows):
    gradients = vicreg_gradients(*rows, **VICREG)
    for view, (z, m) in enumerate(((rows[0], rows[3]), (rows[1], rows[2]))):
        z, m, n, d = z.tolist(), m.tolist(), 7, 5
        mean = [sum(row[k] for row in z) / n for k in range(d)]
        x = [[row[k] - mean[k] for k in range(d)] for row in z]
        cov = [[sum(row[a] * row[b] for row in x) / (n - 1) for b in range(d)] for a in range(d)]
        std = [math.sqrt(cov[k][k] + 1e-4) for k in range(d)]
        assert 0 < sum(s < 1 for s in std) < d                  # the hinge is at work in some dimensions
        for i in range(n):
            for k in range(d):
                positive = 2 * 25 * 2 * (z[i][k] - m[i][k]) / (n * d)
                push = -x[i][k] / ((n - 1) * std[k]) / d if std[k] < 1 else 0.0
                decorrelate = sum(4 * cov[k][j] * x[i][j] for j in range(d) if j != k) / ((n - 1) * d)
                negative = 2 * (25 * push + decorrelate)
                assert gradients.positive[view][i, k].item() == pytest.approx(n * positive, rel=1e-12)
                assert gradients.negative[view][i, k].item() == pytest.approx(n * negative, rel=1e-10)


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
    if name == "directpred":
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
    if name == "directpred":                                    # as published it is close to the gradient, not equal
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


def test_simsiam_is_directpred_towards_itself():
    torch.manual_seed(0)
    z1, z2 = torch.randn(2, 9, 4, dtype=torch.float64)
    found = unigrad_simsiam_loss_func(z1, z2, None, rho=0.9, eps=0.3)
    expected = unigrad_byol_directpred_loss_func(z1, z2, z1, z2, None, rho=0.9, eps=0.3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


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
