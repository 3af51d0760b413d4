"""What twice the batch, twice the queue and more ranks cost: bytes and collectives, counted."""

import pytest
import torch
import torch.nn.functional as F

from solo.bench.memory import peak_bytes
from solo.kernels import blocks, neighbours
from solo.losses import nnclr_loss_func, sce_loss_func, simclr_loss_func
from solo.testing import run_ranks
from tests.losses.test_contrast import infonce_part, rows, simclr_part


def units(*shape):
    return F.normalize(torch.randn(shape), dim=-1)


def sce(n, size):
    q, k, queue = torch.randn(n, 16, requires_grad=True), torch.randn(n, 16), units(size, 16)
    return lambda: sce_loss_func(q, k, queue).backward()


def simclr(n, _):
    z, ids = torch.randn(2 * n, 16, requires_grad=True), torch.arange(n).repeat(2)
    return lambda: simclr_loss_func(z, ids, positives=1).backward()


def nnclr(n, _):
    nn, p = torch.randn(n, 16), torch.randn(n, 16, requires_grad=True)
    return lambda: nnclr_loss_func(nn, p).backward()


def search(k):
    def work(n, size):
        z, keys = units(n, 16), units(size, 16)
        return lambda: neighbours(z, keys, k)

    return work


WORK = {"sce": sce, "simclr": simclr, "nnclr": nnclr, "top-1": search(1), "top-5": search(5)}
OVER_A_QUEUE = ("sce", "top-1", "top-5")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "CPU", (64, 1024))


@pytest.mark.parametrize("name", WORK)
def test_memory_is_linear_in_the_batch(name):
    once, twice = (peak_bytes(WORK[name](n, 40000)) for n in (1024, 2048))
    assert 0 < twice <= 2.2 * once


@pytest.mark.parametrize("name", OVER_A_QUEUE)
def test_memory_is_flat_in_the_queue(name):
    once, twice = (peak_bytes(WORK[name](256, size)) for size in (40000, 80000))
    assert 0 < twice <= 1.1 * once


def test_a_dense_loss_would_fail_here():
    """The counter sees what the bounds forbid."""

    def dense(n, size):
        q, queue = units(n, 16), units(size, 16)
        return lambda: (q @ queue.T).logsumexp(1)

    assert peak_bytes(dense(256, 80000)) > 1.9 * peak_bytes(dense(256, 40000)) > 0
    assert peak_bytes(dense(256, 40000)) >= 256 * 40000 * 4


@pytest.mark.parametrize("part", [simclr_part, infonce_part])
def test_collectives_do_not_depend_on_the_number_of_ranks(part):
    z = rows(2, 8, 4)
    given = (z, torch.arange(8).repeat(2, 1)) if part is simclr_part else tuple(z.detach())
    two, four = (run_ranks(part, *given, world, world=world)[0][2] for world in (2, 4))
    assert two == four != []
