"""Rows that a damaged or collapsed network can give: every loss stays finite, and so does its gradient."""

import pytest
import torch

import solo.losses as losses
from tests.losses.test_float16 import LOSSES


def drawn(scale=1.0):
    return scale * torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def one_row(value):
    rows = drawn()
    rows[3] = value
    return rows


ROWS = {
    "zeros": torch.zeros(8, 16),
    "a zero row": one_row(0.0),
    "equal rows": torch.ones(8, 16),
    "equal drawn rows": drawn()[:1].repeat(8, 1),
    "a constant row": one_row(3.0),
    "huge": drawn(1e6),
    "a huge row": one_row(1e6),
    "tiny": drawn(1e-20),
    "one direction": drawn()[:, :1].repeat(1, 16),
    "opposite rows": torch.cat([torch.ones(4, 16), -torch.ones(4, 16)]),
}


def test_every_loss_is_here():
    used = {name for loss in LOSSES.values() for name in loss.__code__.co_names}
    inside = {"feature_loss_func", "sce_multicrop_loss_func"}          # of all4one and sce
    assert {name for name in losses.__all__ if name.endswith("_loss_func")} - inside <= used


@pytest.mark.parametrize("same", [True, False], ids=["both views", "one view"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_are_finite(name, rows, same):
    views = [ROWS[rows].clone().requires_grad_() for _ in range(4)]
    if not same:
        views[1:] = [drawn().roll(place, 0).requires_grad_() for place in range(1, 4)]
    loss = LOSSES[name](*views)
    assert loss.isfinite(), loss
    for gradient in torch.autograd.grad(loss, views[:2], allow_unused=True):
        assert gradient is None or gradient.isfinite().all(), gradient


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_no_loss_leaves_a_row_that_is_not_finite_out(name, value):
    """Whichever of its inputs the row is in: such a step must be seen, not learned from with the other rows (D6)."""
    views = [drawn().roll(place, 0) for place in range(4)]
    plain = LOSSES[name](*views)
    used = 0
    for view in views:
        row = view[3].clone()
        view[3] = 2 * row + 1
        counts = not torch.equal(LOSSES[name](*views), plain)
        view[3] = value
        assert not (counts and LOSSES[name](*views).isfinite())
        view[3] = row
        used += counts
    assert used >= 2
