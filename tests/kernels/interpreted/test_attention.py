import math

import pytest
import torch

from solo.kernels import queue_attention
from solo.kernels.attention import attend, attend_eager
from solo.kernels.dispatch import uses_triton
from tests.kernels.interpreted.common import DEVICE, DTYPES, assert_near, tolerance, unit_rows

# One of each; less than a tile; a tail in both directions; D that is no power of two; several tiles and parts.
SMALL = [(1, 1, 16), (3, 33, 8), (33, 130, 24)]
LARGE = [(130, 515, 100), (65, 1000, 256), (32, 1024, 128)]
shapes = pytest.mark.parametrize("shape", [*SMALL, *(pytest.param(shape, marks=pytest.mark.slow) for shape in LARGE)], ids=str)


def dense(q, queue, scale, own=None):
    """In float64, with the matrix."""
    s = scale.double()[:, None] * (q.to(queue.dtype).double() @ queue.double().T)
    if own is not None:
        rows = torch.arange(len(q), device=q.device)
        s[rows, own + rows] = -math.inf
    return s.softmax(1) @ queue.double(), s.logsumexp(1)


def scales(n):
    """Of two branches, at temperatures 0.1 and 0.07."""
    return torch.where(torch.arange(n, device=DEVICE) < n // 2, 1 / 0.1, 1 / 0.07)


@shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_matrix_form_in_float64(shape, dtype):
    n, k, d = shape
    q, queue, scale = unit_rows(n, d, dtype=dtype), unit_rows(k, d, dtype=dtype, seed=1), scales(n)
    assert uses_triton(q, queue)
    expected, lse = dense(q, queue, scale)
    bound = tolerance(dtype, d, 1 / 0.07)
    for form in (attend, attend_eager):
        out, found = form(q, queue, scale)
        assert_near(out, expected, bound)
        assert_near(found, lse, tolerance(torch.float32, d, 1.0))       # nothing of the weights' rounding


def test_float32_rows_meet_a_bfloat16_queue_in_its_dtype():
    q, queue, scale = unit_rows(20, 32), unit_rows(70, 32, dtype=torch.bfloat16, seed=1), scales(20)
    expected, lse = dense(q, queue, scale)
    out, found = attend(q, queue, scale)
    assert_near(out, expected, tolerance(torch.bfloat16, 32, 1 / 0.07))
    assert_near(found, lse, tolerance(torch.float32, 32, 1.0))


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_a_maximum_that_comes_late_or_early(order):
    """A logit range of 600 over the tiles: without the running maximum float32 overflows, without the shrinking it is wrong."""
    queue = torch.linspace(-order, order, 200, device=DEVICE)[:, None] * unit_rows(1, 16)
    q, scale = unit_rows(1, 16).expand(5, 16), torch.full((5,), 300.0, device=DEVICE)
    expected, lse = dense(q, queue, scale)
    out, found = attend(q, queue, scale)
    assert_near(out, expected, tolerance(torch.float32, 16, 300))
    assert_near(found, lse, tolerance(torch.float32, 16, 1.0))


def test_own_key_is_left_out_and_a_row_may_have_none():
    q, queue = unit_rows(40, 16), unit_rows(140, 16, seed=1)
    expected, lse = dense(q, queue, scales(40), own=97)
    out, found = attend(q, queue, scales(40), 97)
    assert_near(out, expected, tolerance(torch.float32, 16, 1 / 0.07))
    assert_near(found, lse, tolerance(torch.float32, 16, 1.0))
    for form in (attend, attend_eager):
        out, found = form(q[:1], queue[:1], scales(1), 0)
        assert found.item() == -math.inf and not out.any()


def test_equal_keys_are_their_own_mean():
    queue = unit_rows(1, 24).expand(77, 24)
    out, lse = attend(unit_rows(9, 24, seed=1), queue, scales(9))
    assert_near(out, queue[:9], 1e-6)
    assert_near(lse, math.log(77) + scales(9) * (unit_rows(9, 24, seed=1) @ queue[0]), 1e-6)


def test_nan_stays_in_its_row_and_reaches_all_rows_from_a_key():
    q, queue = unit_rows(35, 16), unit_rows(90, 16, seed=1)
    spoilt = q.clone()
    spoilt[33, 2] = math.nan
    for form in (attend, attend_eager):
        out, lse = form(spoilt, queue, scales(35))
        bad = torch.arange(35, device=DEVICE) == 33
        assert torch.equal(lse.isnan(), bad) and torch.equal(out.isnan().all(1), bad) and torch.equal(out.isnan().any(1), bad)
        keys = queue.clone()
        keys[80, 0] = math.nan
        out, lse = form(q, keys, scales(35))
        assert lse.isnan().all() and out[:, 0].isnan().all()


def test_gradient_equals_that_of_the_matrix_form():
    q, queue, scale = unit_rows(37, 24), unit_rows(101, 24, seed=1), scales(37)
    upstream = torch.randn(37, device=DEVICE)
    ours, theirs = q.clone().requires_grad_(), q.double().requires_grad_()
    _, lse = queue_attention(ours, queue, scale)
    (lse * upstream).sum().backward()
    (dense(theirs, queue.double(), scale)[1] * upstream).sum().backward()
    assert_near(ours.grad, theirs.grad, tolerance(torch.float32, 24, 1 / 0.07))
