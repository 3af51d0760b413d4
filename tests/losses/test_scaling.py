"""What twice the batch, twice the queue and more ranks cost: bytes and collectives, counted."""

import pytest
import torch
import torch.nn.functional as F

from solo.bench.memory import peak_bytes
from solo.kernels import blocks, neighbours
from solo.losses import mvmr, nnclr_loss_func, sce_loss_func, simclr_loss_func
from solo.representations import base, represent
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


@pytest.mark.slow
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


# Height and width of images, and the blocks [N, f] of their representation that its distances have alive at once; those
# that are made of a few images at a time have `NUMBERS` beside them, however many images there are.
NUMBERS = 1 << 17
BLOCKS = {"raw": (256, 64, 4), "local_std": (256, 64, 8), "augmented": (256, 64, 11), "hog": (32, 32, 3),
          "scattering": (32, 32, 3)}


def of_representation(name, n):
    """Bytes that the distances of n images' representation take, and that they may."""
    height, width, blocks = BLOCKS[name]
    images = torch.randn(n, 3, height, width)
    widest = max(block.shape[1] for block in represent(name, images[:1]))
    parts = NUMBERS if name in ("hog", "scattering") else 0
    return peak_bytes(lambda: mvmr._distances(represent(name, images))), 4 * (blocks * n * widest + parts + 6 * n * n)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_representation_is_held_in_blocks(name, monkeypatch):
    for module, size, value in ((base, "WIDTH", 1024), (mvmr, "WIDTH", 1024), (base, "AT_ONCE", NUMBERS)):
        monkeypatch.setattr(module, size, value)
    for n in (8, 16):
        found, most = of_representation(name, n)
        assert 0 < found <= most


@pytest.mark.parametrize("name", BLOCKS)
def test_one_made_at_once_would_fail_here(name, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(base, "WIDTH", 1024)
        _, most = of_representation(name, 16)
    assert of_representation(name, 16)[0] > most


@pytest.mark.parametrize("part", [simclr_part, infonce_part])
def test_collectives_do_not_depend_on_the_number_of_ranks(part):
    z = rows(2, 8, 4)
    given = (z, torch.arange(8).repeat(2, 1)) if part is simclr_part else tuple(z.detach())
    two, four = (run_ranks(part, *given, world, world=world)[0][2] for world in (2, 4))
    assert two == four != []
