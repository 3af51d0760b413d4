import math

import pytest
import torch

from solo.kernels import row_logsumexp, weighted_keys
from solo.kernels.contrast import row_logsumexp_eager, weighted_keys_eager
from solo.kernels.dispatch import uses_triton
from solo.losses import nnclr_loss_func, simclr_loss_func
from tests.kernels.interpreted.common import DEVICE, DTYPES, assert_near, tolerance, unit_rows

SMALL = [(1, 1, 16), (5, 40, 8), (33, 70, 24)]
LARGE = [(130, 257, 100), (64, 128, 256), (100, 1000, 128)]
shapes = pytest.mark.parametrize("shape", [*SMALL, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)], ids=str)
SCALE = 1 / 0.2
FORMS = ((row_logsumexp, weighted_keys), (row_logsumexp_eager, weighted_keys_eager))


def products(rows, keys, own, scale=SCALE):
    """In float64, with the matrix."""
    s = scale * rows.double() @ keys.double().T
    if own is not None:
        left = torch.arange(len(keys), device=rows.device) == own + torch.arange(len(rows), device=rows.device)[:, None]
        s = s.masked_fill(left, -math.inf)
    return s


def test_the_kernels_run_here():
    assert uses_triton(unit_rows(2, 8))


@shapes
@pytest.mark.parametrize("own", [None, 3, -2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_matrix_form_in_float64(shape, dtype, own):
    n, m, d = shape
    own = own if m > 1 else None                                            # the only key is not left out
    rows, keys = unit_rows(n, d, dtype=dtype), unit_rows(m, d, dtype=dtype, seed=1)
    s = products(rows, keys, own)
    key_lse = torch.linspace(SCALE, SCALE + 2, m, device=DEVICE)
    by_row, by_key = s.softmax(1) @ keys.double(), (s - key_lse.double()).exp() @ keys.double()
    for logsumexp, weighted in FORMS:
        lse = logsumexp(rows, keys, SCALE, own)
        assert_near(lse, s.logsumexp(1), tolerance(torch.float32, d, 1.0))
        bound = tolerance(dtype, d, SCALE)
        assert_near(weighted(rows, keys, SCALE, lse, None, own), by_row, bound)
        assert_near(weighted(rows, keys, SCALE, None, key_lse, own), by_key, bound)
        assert_near(weighted(rows, keys, SCALE, lse, key_lse, own), by_row + by_key, bound)


@pytest.mark.parametrize("n", [2, 50])
def test_nt_xent_by_the_kernels(n):
    z = unit_rows(n, 24)
    index = torch.arange(n // 2, device=DEVICE).repeat(2)
    ours, theirs = z.clone().requires_grad_(), z.double().requires_grad_()
    loss = simclr_loss_func(ours, index, 1 / SCALE, positives=1)
    loss.backward()
    s = SCALE * torch.nn.functional.normalize(theirs, dim=1) @ torch.nn.functional.normalize(theirs, dim=1).T
    others = s.masked_fill(torch.eye(n, dtype=torch.bool, device=DEVICE), -math.inf)
    loss64 = (others.logsumexp(1) - s.roll(n // 2, 1).diagonal()).mean()
    loss64.backward()
    bound = tolerance(torch.float32, 24, SCALE)
    # One pair has no negatives: the loss is 0 and so is its gradient, but for what the two terms' rounding leaves.
    assert (loss.double() - loss64).abs() <= bound * SCALE
    assert (ours.grad.double() - theirs.grad).abs().max() <= bound * SCALE


def test_info_nce_by_the_kernels_gives_each_argument_its_gradient():
    rows, keys = unit_rows(45, 24), unit_rows(45, 24, seed=1)
    ours, theirs = [x.clone().requires_grad_() for x in (rows, keys)], [x.double().requires_grad_() for x in (rows, keys)]
    nnclr_loss_func(*ours, 1 / SCALE).backward()
    a, b = (torch.nn.functional.normalize(x, dim=1) for x in theirs)
    torch.nn.functional.cross_entropy(SCALE * a @ b.T, torch.arange(45, device=DEVICE)).backward()
    for x, y in zip(ours, theirs, strict=True):
        assert_near(x.grad, y.grad, tolerance(torch.float32, 24, SCALE))


def test_local_rows_against_gathered_rows_have_their_whole_gradient():
    """Three ranks: a rank needs all rows and one number of each, and no sum over ranks."""
    n, part = 54, 18
    z = unit_rows(n, 24)
    whole = z.double().requires_grad_()
    products_of = SCALE * whole @ whole.T
    products_of.masked_fill(torch.eye(n, dtype=torch.bool, device=DEVICE), -math.inf).logsumexp(1).sum().backward()
    lse = torch.cat([row_logsumexp(z[start : start + part], z, SCALE, start) for start in range(0, n, part)])
    for start in range(0, n, part):
        mine = slice(start, start + part)
        found = SCALE * weighted_keys(z[mine], z, SCALE, lse[mine], lse, start)
        assert_near(found, whole.grad[mine], tolerance(torch.float32, 24, SCALE))


def test_a_maximum_that_comes_late():
    keys = torch.linspace(-1, 1, 700, device=DEVICE)[:, None] * unit_rows(1, 16)
    rows = unit_rows(1, 16).expand(5, 16).contiguous()
    for own in (None, 100):
        expected = products(rows, keys, own, 300.0).logsumexp(1)
        assert_near(row_logsumexp(rows, keys, 300.0, own), expected, tolerance(torch.float32, 16, 1.0))


def test_a_row_without_any_key():
    z = unit_rows(1, 16)
    for logsumexp, weighted in FORMS:
        lse = logsumexp(z, z, SCALE, 0)
        assert lse.item() == -math.inf and not weighted(z, z, SCALE, lse, lse, 0).any()


def test_equal_rows_share_everything_alike():
    z = unit_rows(1, 24).expand(50, 24).contiguous()
    lse = row_logsumexp(z, z, SCALE, 0)
    assert_near(lse, torch.full((50,), math.log(49) + SCALE, device=DEVICE), 1e-6)
    assert_near(weighted_keys(z, z, SCALE, lse, lse, 0), 2 * z, 1e-5)


def test_nan_stays_in_its_row_and_reaches_all_from_a_key():
    rows, keys = unit_rows(35, 16), unit_rows(70, 16, seed=1)
    rows[33, 2] = math.nan
    bad = torch.arange(35, device=DEVICE) == 33
    for logsumexp, weighted in FORMS:
        lse = logsumexp(rows, keys, SCALE)
        assert torch.equal(lse.isnan(), bad)
        assert torch.equal(weighted(rows, keys, SCALE, lse, None).isnan().any(1), bad)
        assert weighted(keys, rows, SCALE, None, lse).isnan().any(1).all()
