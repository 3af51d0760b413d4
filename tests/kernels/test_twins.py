"""The eager twins, which are what a CPU runs, against loops and autograd in float64; and who is chosen when."""

import math
import subprocess
import sys

import pytest
import torch

from solo.errors import ConfigError
from solo.kernels import dispatch, info_nce, neighbours, queue_attention
from solo.kernels.attention import attend_eager
from solo.kernels.contrast import pull_eager, row_statistics_eager
from tests.conftest import ROOT


def rows(n, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


def test_queue_attention_is_the_equation(monkeypatch):
    monkeypatch.setattr("solo.kernels.attention._BLOCK", 4)
    q, queue, scale = rows(3), rows(10, seed=1), torch.tensor([5.0, 10.0, 14.0], dtype=torch.float64)
    out, lse = queue_attention(q, queue, scale)
    for i in range(3):
        weights = [math.exp(scale[i].item() * torch.dot(q[i], key).item()) for key in queue]
        assert lse[i].item() == pytest.approx(math.log(sum(weights)), rel=1e-12)
        mean = sum(w * key for w, key in zip(weights, queue, strict=True)) / sum(weights)
        torch.testing.assert_close(out[i], mean, rtol=1e-12, atol=1e-12)


def test_queue_attention_has_the_gradient_of_its_lse_alone():
    q, queue, scale = rows(4).requires_grad_(), rows(9, seed=1), torch.full((4,), 7.0, dtype=torch.float64)
    out, lse = queue_attention(q, queue, scale)
    assert not out.requires_grad and lse.requires_grad
    assert torch.autograd.gradcheck(lambda x: queue_attention(x, queue, scale, 3)[1], q)


@pytest.mark.parametrize("symmetric", [False, True], ids=["rows and columns", "rows alone"])
def test_info_nce_has_its_gradient(symmetric, monkeypatch):
    monkeypatch.setattr("solo.kernels.contrast._BLOCK", 2)
    x, y = rows(5).requires_grad_(), rows(7, seed=1).requires_grad_()
    positive, own = torch.tensor([3, 0, 4, 1, 1]), torch.tensor([0, 1, -1, 3, 4])
    inputs = (x,) if symmetric else (x, y)

    def loss(x, y=None):
        lse, match = info_nce(x, y, 4.0, positive, own)
        return lse, match

    lse, match = loss(*inputs)
    s = 4 * x @ (x if symmetric else y).T
    for i in range(5):
        kept = [math.exp(s[i, j].item()) for j in range(s.shape[1]) if j != own[i]]
        assert lse[i].item() == pytest.approx(math.log(sum(kept)), rel=1e-12)
        assert match[i].item() == pytest.approx(s[i, positive[i]].item(), rel=1e-12)
    assert torch.autograd.gradcheck(loss, inputs)


def test_neighbours_come_in_order_and_a_wrong_k_is_told():
    x, queue = rows(4), rows(9000, seed=1)
    assert torch.equal(neighbours(x, queue, 5), (x @ queue.T).topk(5).indices)
    for k in (0, 10):
        with pytest.raises(ValueError, match="between 1 and the queue's 9 rows"):
            neighbours(x, queue[:9], k)


def test_twins_keep_nothing_as_long_as_both_sides():
    """Counted in elements of the largest tensor made, at twice the length the same or twice as many, never four times."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            Largest.size = max(Largest.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    def largest(work, n):
        Largest.size = 0
        with Largest():
            work(rows(n).float())
        return Largest.size

    def attention(z):
        attend_eager(z, z, torch.ones(len(z)))

    def contrast(z):
        index = torch.arange(len(z))
        row_statistics_eager(z, z, 1.0, index, index)

    for work in (attention, contrast):
        assert largest(work, 8192) <= 2 * largest(work, 4096)


def test_what_triton_takes(monkeypatch):
    fake = torch.empty(4, 8)
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: True)
    assert dispatch.uses_triton(fake, fake.bfloat16(), fake.half())
    for other in (fake.double(), fake[:0], torch.empty(4, dispatch.WIDEST + 1)):
        assert not dispatch.uses_triton(fake, other)
    monkeypatch.setenv("SOLO_KERNELS", "off")
    assert not dispatch.uses_triton(fake)
    monkeypatch.setenv("SOLO_KERNELS", "no")
    with pytest.raises(ConfigError, match="SOLO_KERNELS is auto or off, got 'no'"):
        dispatch.uses_triton(fake)


def test_absent_triton_means_the_twin(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    assert neighbours(rows(2).float(), rows(5).float(), 1).shape == (2, 1)


def test_a_cpu_run_never_imports_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from solo.kernels import info_nce, neighbours, queue_attention\n"
        "x = torch.randn(4, 8, requires_grad=True)\n"
        "neighbours(x, x, 1), queue_attention(x, x.detach(), torch.ones(4))\n"
        "sum(info_nce(x, x, 1.0, torch.arange(4))).sum().backward()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("memory", [101_376, 166_912, 232_448], ids=["RTX 30/40", "A100", "H100/H200"])
def test_tiles_fit_every_device(memory):
    for dtype in (torch.float32, torch.bfloat16):
        for width in (16, 128, 256):
            for accumulates in (False, True):
                for precision in ("tf32", "tf32x3"):
                    shape = dispatch.tiles(memory, width, dtype, precision, accumulates)
                    held = (shape.rows + shape.stages * shape.columns) * width * dtype.itemsize
                    assert held <= memory and shape.columns % 32 == 0


def test_parts_cover_the_columns(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    for processors in (1, 4, 50):
        monkeypatch.setattr(dispatch, "_INTERPRETED", processors)
        for n, m in ((1, 1), (1, 1000), (500, 64), (33, 65)):
            shape, parts, per_part = dispatch.cut(n, m, torch.empty(1, 8), "tf32", True)
            assert per_part % shape.columns == 0 and (parts - 1) * per_part < m <= parts * per_part


def test_the_twins_of_16_bit_rows_keep_float32():
    x, queue = rows(3).bfloat16(), rows(5, seed=1).bfloat16()
    index = torch.zeros(3, dtype=torch.long)
    found = row_statistics_eager(x, queue, 1.0, index, index - 1)
    assert {each.dtype for each in (*attend_eager(x, queue, torch.ones(3)), *found)} == {torch.float32}
    exact = row_statistics_eager(x.double(), queue.double(), 1.0, index, index - 1)
    torch.testing.assert_close(found.lse.double(), exact.lse, rtol=1e-6, atol=1e-6)
    assert pull_eager(x, queue, 1.0, None, None).dtype == torch.float32
