"""NT-Xent and the streamed InfoNCE: official numbers, the equations in loops, any block size, and 2 and 4 ranks as one."""

import math

import pytest
import torch
import torch.nn.functional as F

from solo import dist
from solo.kernels import blocks
from solo.losses import nnclr_loss_func, simclr_loss_func
from solo.losses.contrast import info_nce
from solo.testing import run_ranks
from tests.losses.test_losses import TOLERANCE, assert_gradient


def value_and_gradients(loss, *inputs):
    return loss.item(), torch.autograd.grad(loss, inputs)


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).requires_grad_()


def looped_simclr(z, ids, t):
    """``-log(sum over the positives / sum over all others)``, one pair at a time."""
    z = [row / row.norm() for row in z]
    loss = 0.0
    for i in range(len(z)):
        e = {j: torch.exp(torch.dot(z[i], z[j]) / t) for j in range(len(z)) if j != i}
        loss = loss - torch.log(sum(e[j] for j in e if ids[j] == ids[i]) / sum(e.values()))
    return loss / len(z)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["s", "m"])
def test_simclr_equals_official(golden, size, dtype):
    g = golden(f"solo_loss_simclr_{size}")
    z = g["z"].to(dtype).requires_grad_()
    for positives in (None, g.params["views"] - 1):
        loss, (grad,) = value_and_gradients(
            simclr_loss_func(z, g["indexes"], g.params["temperature"], positives=positives), z
        )
        value, gradient = TOLERANCE[dtype]
        assert loss == pytest.approx(g["loss"].item(), rel=value)
        assert_gradient(grad, g["grad_z"], gradient)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["s", "m"])
def test_several_positives_equal_official(golden, size, dtype):
    """SupCon's official loss is the same function of class labels."""
    g = golden(f"solo_loss_supcon_{size}")
    z = g["z"].to(dtype).requires_grad_()
    loss, (grad,) = value_and_gradients(simclr_loss_func(z, g["targets"], g.params["temperature"]), z)
    value, gradient = TOLERANCE[dtype]
    assert loss == pytest.approx(g["loss"].item(), rel=value)
    assert_gradient(grad, g["grad_z"], gradient)


IDS = {
    "two views": [7, 3, 5, 7, 3, 5],
    "three views": [1, 0, 1, 0, 1, 0],
    "uneven": [4, 4, 9, 9, 9, 4, 2, 2],
}


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 2), (64, 64)])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_simclr_is_the_equation_in_blocks_of_any_size(monkeypatch, ids, block):
    monkeypatch.setattr(blocks, "CPU", block)
    z = rows(len(ids), 5)
    loss, (grad,) = value_and_gradients(simclr_loss_func(z, torch.tensor(ids), 0.3), z)
    expected, (expected_grad,) = value_and_gradients(looped_simclr(z, ids, 0.3), z)
    assert loss == pytest.approx(expected, rel=1e-12)
    assert_gradient(grad, expected_grad, 1e-11)


@pytest.mark.parametrize("block", [(1, 1), (3, 2), (64, 64)])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_infonce_is_cross_entropy_in_blocks_of_any_size(monkeypatch, n, block):
    monkeypatch.setattr(blocks, "CPU", block)
    a, b = rows(n, 5), rows(n, 5, seed=1)
    found, grads = value_and_gradients(nnclr_loss_func(a, b, 0.3), a, b)
    logits = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T / 0.3
    expected, expected_grads = value_and_gradients(F.cross_entropy(logits, torch.arange(n)), a, b)
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(nnclr_loss_func(a.detach(), b, 0.3), b)[0], grads[1], rtol=0, atol=0)


def looped_infonce(a, b, t):
    """``-log(exp(s_ii) / sum_j exp(s_ij))``, one pair at a time."""
    a, b = ([row / row.norm() for row in x] for x in (a, b))
    e = [[torch.exp(torch.dot(x, y) / t) for y in b] for x in a]
    return sum(torch.log(sum(row) / row[i]) for i, row in enumerate(e)) / len(a)


@pytest.mark.parametrize("constant", [False, True], ids=["rows learn", "rows are constants"])
@pytest.mark.parametrize("block", [(1, 1), (3, 2), (64, 64)])
def test_views_and_terms_are_each_by_themselves(monkeypatch, block, constant):
    """Of terms with temperatures and numbers of views of their own."""
    monkeypatch.setattr(blocks, "CPU", block)
    given = [(rows(2, 5, 4), rows(2, 5, 4, seed=1), 0.3), (rows(5, 4, seed=2), rows(5, 4, seed=3), 0.7)]
    inputs = [x for a, b, _ in given for x in ((b,) if constant else (a, b))]
    terms = [(a.detach() if constant else a, b, t) for a, b, t in given]
    (a, b, t), (c, d, u) = terms
    wanted = (looped_infonce(a[0], b[0], t) + looped_infonce(a[1], b[1], t)) / 2, looped_infonce(c, d, u)
    for found, expected in zip(info_nce(*terms), wanted, strict=True):
        assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    first, second = info_nce(*terms)
    grads = torch.autograd.grad(2 * first + 3 * second, inputs)
    for grad, expected in zip(grads, torch.autograd.grad(2 * wanted[0] + 3 * wanted[1], inputs), strict=True):
        assert_gradient(grad, expected, 1e-11)
    assert nnclr_loss_func(a, b, t).item() == first.item()


def test_rows_and_keys_of_two_shapes_are_told():
    with pytest.raises(ValueError, match=r"of one shape, got \[4, 3\] and \[2, 4, 3\]"):
        nnclr_loss_func(torch.randn(4, 3), torch.randn(2, 4, 3))


def test_simclr_gradcheck():
    z = rows(6, 3)
    ids = torch.tensor([0, 1, 2, 0, 1, 2])
    assert torch.autograd.gradcheck(lambda x: 3 * simclr_loss_func(x, ids, 0.5), (z,))


def test_low_temperatures_are_finite():
    """The official form overflows where a cosine over the temperature exceeds 88."""
    z, ids = rows(16, 8, dtype=torch.float32), torch.arange(8).repeat(2)
    exact = z.detach().double().requires_grad_()
    (loss, (grad,)), (expected, (expected_grad,)) = (
        value_and_gradients(simclr_loss_func(x, ids, 0.005), x) for x in (z, exact)
    )
    s = F.normalize(exact, dim=1) @ F.normalize(exact, dim=1).T / 0.005
    positive = s.roll(8, dims=1).diagonal()
    assert expected == pytest.approx((s.fill_diagonal_(-math.inf).logsumexp(1) - positive).mean().item(), rel=1e-12)
    assert loss == pytest.approx(expected, rel=2e-6)
    assert_gradient(grad, expected_grad, 1e-4)


def test_a_row_that_is_not_finite_shows():
    z = rows(8, 4).detach().clone()
    z[3, 2] = math.nan
    assert simclr_loss_func(z, torch.arange(4).repeat(2)).isnan()
    assert nnclr_loss_func(z, z).isnan()


def test_equal_rows_and_zero_rows():
    for z in (torch.ones(8, 4), torch.zeros(8, 4)):
        z.requires_grad_()
        loss, (grad,) = value_and_gradients(simclr_loss_func(z, torch.arange(4).repeat(2)), z)
        assert loss == pytest.approx(math.log(7), rel=1e-6) and grad.isfinite().all()


# --- ranks ------------------------------------------------------------------------------------------------------------


class Counted:
    """Calls of the collectives, and bytes that a rank receives from them."""

    def __init__(self):
        self.calls, self.bytes = [], 0

    def __enter__(self):
        self.module = dist.dist
        self.originals = {name: getattr(self.module, name) for name in ("all_gather_into_tensor", "all_reduce")}
        for name, original in self.originals.items():
            setattr(self.module, name, self.counting(name, original))
        return self

    def counting(self, name, original):
        def call(out, *rest):
            self.calls.append(name)
            self.bytes += out.numel() * out.element_size()
            return original(out, *rest)

        return call

    def __exit__(self, *_):
        for name, original in self.originals.items():
            setattr(self.module, name, original)


def part(x, rank, world):
    """This rank's rows of each view: x is [V, N, D], view after view as the loss has it."""
    n = x.shape[1] // world
    return x[:, rank * n : (rank + 1) * n].flatten(0, 1)


def simclr_part(rank, z, ids, world):
    mine = part(z.detach(), rank, world).requires_grad_()
    with Counted() as counted:
        loss = simclr_loss_func(mine, part(ids, rank, world), 0.2, positives=len(z) - 1)
        grad = torch.autograd.grad(loss, mine)[0]
    return loss.item(), grad.numpy(), counted.calls, counted.bytes


def infonce_part(rank, a, b, world):
    n = a.shape[1] // world
    mine = [x[:, rank * n : (rank + 1) * n].detach().requires_grad_() for x in (a, b)]
    with Counted() as counted:
        loss = nnclr_loss_func(*mine, 0.2)
        grads = torch.autograd.grad(loss, mine)
    return loss.item(), [grad.numpy() for grad in grads], counted.calls, counted.bytes


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", [2, 4])
def test_simclr_on_ranks_is_one_process(world, dtype, tolerance):
    views, n, d = 3, 8, 16
    z, ids = rows(views, n, d, dtype=dtype), torch.arange(n).repeat(views, 1)
    loss = simclr_loss_func(z.flatten(0, 1), ids.flatten(), 0.2)
    expected, (grad,) = value_and_gradients(loss, z)
    found = run_ranks(simclr_part, z, ids, world, world=world)
    assert sum(each[0] for each in found) / world == pytest.approx(expected, rel=tolerance)
    for rank, (_, each, calls, received) in enumerate(found):
        assert_gradient(torch.from_numpy(each) / world, part(grad, rank, world), tolerance)
        assert calls == ["all_gather_into_tensor"] * 2
        size = z.element_size()
        assert received == views * n * (d * size + 2 * size + 8)         # rows, two numbers and an index


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("world", [2, 4])
def test_infonce_on_ranks_is_one_process(world, dtype, tolerance):
    views, n, d = 2, 8, 16
    a, b = rows(views, n, d, dtype=dtype), rows(views, n, d, seed=1, dtype=dtype)
    losses = [nnclr_loss_func(x, y, 0.2) for x, y in zip(a, b, strict=True)]
    expected, grads = value_and_gradients(sum(losses) / views, a, b)
    found = run_ranks(infonce_part, a, b, world, world=world)
    assert sum(each[0] for each in found) / world == pytest.approx(expected, rel=tolerance)
    for rank, (_, each, calls, received) in enumerate(found):
        for mine, whole in zip(each, grads, strict=True):
            assert_gradient(torch.from_numpy(mine).flatten(0, 1) / world, part(whole, rank, world), tolerance)
        assert calls == ["all_gather_into_tensor"] * 2
        assert received == views * n * a.element_size() * (2 * d + 1)


def official_simclr(rank, g, dtype):
    z = g[f"z_rank{rank}"].to(dtype).requires_grad_()
    loss = simclr_loss_func(z, g[f"indexes_rank{rank}"], g.params["temperature"])
    return loss.item(), torch.autograd.grad(loss, z)[0].numpy()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_simclr_on_two_ranks_equals_official(golden, dtype):
    g = golden("solo_ddp_simclr")
    value, gradient = TOLERANCE[dtype]
    for rank, (loss, grad) in enumerate(run_ranks(official_simclr, g, dtype)):
        assert loss == pytest.approx(g[f"out_loss_rank{rank}"].item(), rel=value)
        assert_gradient(torch.from_numpy(grad), g[f"out_grad_z_rank{rank}"], gradient)


SHARED_IMAGE = torch.tensor([[5, 0, 0], [5, 1, 1]])        # rank 0's rows and rank 1's


def shared_image(rank, z):
    mine = z[rank].detach().requires_grad_()
    loss = simclr_loss_func(mine, SHARED_IMAGE[rank], 0.4)
    return loss.item(), torch.autograd.grad(loss, mine)[0].numpy()


def test_an_index_on_two_ranks_is_one_image():
    z = rows(2, 3, 4, seed=3)
    expected, (grad,) = value_and_gradients(looped_simclr(z.flatten(0, 1), SHARED_IMAGE.flatten().tolist(), 0.4), z)
    found = run_ranks(shared_image, z.detach())
    assert sum(loss for loss, _ in found) / 2 == pytest.approx(expected, rel=1e-12)
    for rank, (_, each) in enumerate(found):
        assert_gradient(torch.from_numpy(each) / 2, grad[rank], 1e-11)
