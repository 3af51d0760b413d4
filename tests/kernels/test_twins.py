"""The eager twins, which are what a CPU runs, against loops and autograd in float64; and who is chosen when."""

import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from solo.errors import ConfigError
from solo.kernels import blocks, dispatch, neighbours, queue_attention, row_logsumexp, weighted_keys
from solo.kernels.attention import attend_eager
from solo.kernels.contrast import row_logsumexp_eager, weighted_keys_eager
from tests.conftest import ROOT


def rows(n, d=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


def test_queue_attention_is_the_equation(monkeypatch):
    monkeypatch.setattr(blocks, "CPU", (2, 4))
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


def test_one_scale_is_that_of_every_row():
    q, queue = rows(3), rows(10, seed=1)
    for one, each in zip(queue_attention(q, queue, 5.0), queue_attention(q, queue, 5.0 + 0 * q[:, 0]), strict=True):
        assert torch.equal(one, each)


@pytest.mark.parametrize("own", [None, 2, -3])
def test_sums_over_keys_are_the_equation(own, monkeypatch):
    monkeypatch.setattr(blocks, "CPU", (2, 3))
    x, y, key_lse = rows(5), rows(7, seed=1), torch.linspace(1, 4, 7, dtype=torch.float64)
    lse = row_logsumexp(x, y, 4.0, own)
    both, of_rows, of_keys = (weighted_keys(x, y, 4.0, *chosen, own) for chosen in
                              ((lse, key_lse), (lse, None), (None, key_lse)))
    for i in range(5):
        s = {j: 4 * torch.dot(x[i], y[j]).item() for j in range(7) if own is None or j != own + i}
        assert lse[i].item() == pytest.approx(math.log(sum(map(math.exp, s.values()))), rel=1e-12)
        by_row, by_key = (sum(math.exp(s[j] - shift(j)) * y[j] for j in s) for shift in
                          (lambda j: lse[i].item(), lambda j: key_lse[j].item()))  # noqa: B023
        torch.testing.assert_close(of_rows[i], by_row, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(of_keys[i], by_key, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both, of_rows + of_keys, rtol=1e-12, atol=1e-12)


def test_weights_need_a_softmax():
    with pytest.raises(ValueError, match="give row_lse, key_lse or both"):
        weighted_keys(rows(2), rows(3), 1.0, None, None)


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
        lse = row_logsumexp_eager(z, z, 1.0, 0)
        weighted_keys_eager(z, z, 1.0, lse, lse, 0)

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


@pytest.mark.slow
def test_a_cpu_run_never_imports_triton():
    code = (
        "import sys, torch; sys.modules['triton'] = None\n"
        "from solo.losses import nnclr_loss_func, sce_loss_func, simclr_loss_func\n"
        "from solo.nn import Queue\n"
        "x, queue = torch.randn(4, 8, requires_grad=True), Queue(16, 8)\n"
        "queue.nearest(x), sce_loss_func(x, x.detach(), queue.keys).backward(), nnclr_loss_func(x, x).backward()\n"
        "simclr_loss_func(x, torch.tensor([0, 1, 0, 1])).backward()"
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
    lse = row_logsumexp_eager(x, queue, 1.0)
    pulled = weighted_keys_eager(x, queue, 1.0, lse, None)
    assert {each.dtype for each in (*attend_eager(x, queue, torch.ones(3)), lse, pulled)} == {torch.float32}
    exact = row_logsumexp_eager(x.double(), queue.double(), 1.0)
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


def test_without_a_c_compiler_the_twins_run_and_that_is_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    monkeypatch.setattr(dispatch, "_able", lambda _: True)
    monkeypatch.setattr(dispatch, "find_spec", lambda _: object())
    rows = SimpleNamespace(dtype=torch.float32, numel=lambda: 8, shape=(2, 4), is_cuda=True, device=torch.device("cuda", 0))
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.9.1"))
    try:
        dispatch.compiler.cache_clear()
        assert not dispatch.uses_triton(rows) and not dispatch.uses_triton(rows)
        assert [record.message.partition(",")[0] for record in caplog.records] == ["no C compiler here"]
        assert dispatch.runner(rows.device) == "torch, no C compiler (install gcc or set CC)"
        monkeypatch.setenv("CC", "gcc")
        dispatch.compiler.cache_clear()
        assert dispatch.uses_triton(rows) and dispatch.runner("cuda:0") == "Triton 3.9.1"
        monkeypatch.setenv("SOLO_KERNELS", "off")
        assert dispatch.runner("cuda:0") == "torch, SOLO_KERNELS=off"
        monkeypatch.setenv("SOLO_KERNELS", "no")
        assert dispatch.runner("cuda:0") == "SOLO_KERNELS is auto or off, got 'no'"
    finally:
        dispatch.compiler.cache_clear()
