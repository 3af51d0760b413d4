import math

import pytest
import torch

from solo.kernels import Side, info_nce, pull, row_statistics
from solo.kernels.contrast import pull_eager, row_statistics_eager
from solo.kernels.dispatch import uses_triton
from tests.kernels.interpreted.common import DEVICE, DTYPES, assert_near, tolerance, unit_rows

SMALL = [(1, 1, 16), (5, 40, 8), (33, 70, 24)]
LARGE = [(130, 257, 100), (64, 128, 256), (100, 1000, 128)]
shapes = pytest.mark.parametrize("shape", [*SMALL, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)], ids=str)
SCALE = 1 / 0.2


def dense(rows, columns, positive, own, scale=SCALE):
    """``lse`` and ``match`` with the matrix, differentiable."""
    s = scale * rows @ columns.T
    left = torch.arange(len(columns), device=rows.device) == own[:, None]
    return s.masked_fill(left, -math.inf).logsumexp(1), s.gather(1, positive[:, None])[:, 0]


def indices(n, m):
    """Positives, and own columns that are none of them; the first row leaves none out."""
    generator = torch.Generator().manual_seed(2)
    positive = torch.randint(m, (n,), generator=generator).to(DEVICE)
    own = (positive + 1) % m
    own[0] = -1
    return positive, own


def test_the_kernels_run_here():
    assert uses_triton(unit_rows(2, 8))


@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_both_gradients_equal_the_matrix_form_in_float64(shape, dtype):
    n, m, d = shape
    rows, columns = unit_rows(n, d, dtype=dtype), unit_rows(m, d, dtype=dtype, seed=1)
    positive, own = indices(n, m)
    x, y = rows.double().requires_grad_(), columns.double().requires_grad_()
    upstream = torch.randn(2, n, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    expected = dense(x, y, positive, own)
    torch.autograd.backward(expected, list(upstream.double()))
    bound = tolerance(dtype, d, SCALE)
    for statistics, gradient in ((row_statistics, pull), (row_statistics_eager, pull_eager)):
        found = statistics(rows, columns, SCALE, positive, own)
        for value, name in zip((found.lse, found.match), expected, strict=True):
            assert_near(value, name.detach(), tolerance(torch.float32, d, 1.0))
        side = Side(positive, own, found.top, found.total, *upstream)
        assert_near(gradient(rows, columns, SCALE, side, None), x.grad, bound)
        assert_near(gradient(columns, rows, SCALE, None, side), y.grad, bound)


@pytest.mark.parametrize("n", [2, 50])
def test_nt_xent_in_one_pass(n):
    """Rows are columns: both directions of every pair in one backward."""
    z = unit_rows(n, 24)
    own = torch.arange(n, device=DEVICE)
    positive = (own + n // 2) % n
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    lse, match = info_nce(ours, None, SCALE, positive, own)
    (lse - match).mean().backward()
    lse64, match64 = dense(theirs, theirs, positive, own)
    (lse64 - match64).mean().backward()
    assert_near((lse - match).detach(), (lse64 - match64).detach(), tolerance(torch.float32, 24, SCALE))
    # One pair has no negatives: the loss is 0 and so is its gradient, but for what the two terms' rounding leaves.
    assert (ours.grad.double() - theirs.grad).abs().max() <= tolerance(torch.float32, 24, SCALE) * SCALE


def test_info_nce_gives_each_argument_its_gradient():
    rows, columns = unit_rows(20, 24), unit_rows(45, 24, seed=1)
    positive, _ = indices(20, 45)
    ours = [x.clone().requires_grad_() for x in (rows, columns)]
    theirs = [x.double().requires_grad_() for x in (rows, columns)]
    lse, match = info_nce(*ours, SCALE, positive)
    (lse - match).mean().backward()
    torch.nn.functional.cross_entropy(SCALE * theirs[0] @ theirs[1].T, positive).backward()
    for x, y in zip(ours, theirs, strict=True):
        assert_near(x.grad, y.grad, tolerance(torch.float32, 24, SCALE))


def test_local_rows_against_gathered_rows_have_their_whole_gradient():
    """Three ranks: a rank needs all rows and two numbers of each, and no sum over ranks."""
    n, part = 54, 18
    z = unit_rows(n, 24)
    own = torch.arange(n, device=DEVICE)
    positive = (own + part // 2) % part + own // part * part           # within the rank
    whole = z.clone().requires_grad_()
    lse, match = info_nce(whole, None, SCALE, positive, own)
    (lse - match).mean().backward()
    grads = torch.full((n,), 1 / n, device=DEVICE)
    parts = [row_statistics(z[rows], z, SCALE, positive[rows], own[rows]) for rows in own.split(part)]
    top, total = (torch.cat([getattr(each, name) for each in parts]) for name in ("top", "total"))
    everyone = Side(positive, own, top, total, grads, -grads)
    for rows in own.split(part):
        # The other side's indices name rows of `a`: here those of this rank.
        seen = everyone._replace(positive=positive - rows[0], own=own - rows[0])
        mine = Side(*(each[rows] for each in everyone))
        assert_near(pull(z[rows], z, SCALE, mine, seen), whole.grad[rows], tolerance(torch.float32, 24, SCALE))


def test_a_maximum_that_comes_late():
    columns = torch.linspace(-1, 1, 700, device=DEVICE)[:, None] * unit_rows(1, 16)
    rows = unit_rows(1, 16).expand(5, 16).contiguous()
    positive, own = indices(5, 700)
    found = row_statistics(rows, columns, 300.0, positive, own)
    lse, _ = dense(rows.double(), columns.double(), positive, own, 300.0)
    assert_near(found.lse, lse, tolerance(torch.float32, 16, 1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiny_upstream_gradients_do_not_vanish(dtype):
    rows, columns = unit_rows(8, 16, dtype=dtype), unit_rows(40, 16, dtype=dtype, seed=1)
    positive, own = indices(8, 40)
    found = row_statistics(rows, columns, SCALE, positive, own)
    one, tiny = torch.ones(8, device=DEVICE), torch.full((8,), 1e-9, device=DEVICE)
    large, small = (
        pull(rows, columns, SCALE, Side(positive, own, found.top, found.total, grad, -grad), None) for grad in (one, tiny)
    )
    assert_near(small * 1e9, large, 1e-5)
    assert not pull(rows, columns, SCALE, Side(positive, own, found.top, found.total, 0 * one, 0 * one), None).any()


def test_equal_rows_share_everything_alike():
    z = unit_rows(1, 24).expand(50, 24).contiguous()
    own = torch.arange(50, device=DEVICE)
    found = row_statistics(z, z, SCALE, (own + 25) % 50, own)
    assert_near(found.lse, torch.full((50,), math.log(49) + SCALE, device=DEVICE), 1e-6)
    assert_near(found.match, torch.full((50,), SCALE, device=DEVICE), 1e-6)


def test_nan_stays_in_its_row_and_reaches_all_from_a_column():
    rows, columns = unit_rows(35, 16), unit_rows(70, 16, seed=1)
    positive, own = indices(35, 70)
    rows[33, 2] = math.nan
    bad = torch.arange(35, device=DEVICE) == 33
    for statistics, gradient in ((row_statistics, pull), (row_statistics_eager, pull_eager)):
        found = statistics(rows, columns, SCALE, positive, own)
        assert torch.equal(found.lse.isnan(), bad) and torch.equal(found.match.isnan(), bad)
        ones = torch.ones(35, device=DEVICE)
        side = Side(positive, own, found.top, found.total, ones, -ones)
        assert torch.equal(gradient(rows, columns, SCALE, side, None).isnan().any(1), bad)
        assert gradient(columns, rows, SCALE, None, side).isnan().any(1).all()
