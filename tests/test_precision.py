import pytest
import torch

from solo.losses import feature_loss_func, nnclr_loss_func, sce_loss_func
from solo.nn import Queue
from solo.precision import full_precision


@full_precision
def product(pair, *, scale):
    assert not torch.is_autocast_enabled("cpu")
    return pair[0] @ pair[1] * scale


@pytest.mark.parametrize("given, inside", [
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
])
def test_sixteen_bits_are_widened_and_autocast_is_off(given, inside):
    a = torch.randn(3, 3, dtype=given, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = product((a, a), scale=torch.ones((), dtype=given))
        assert torch.is_autocast_enabled("cpu")
    assert result.dtype == inside
    result.sum().backward()
    assert a.grad.dtype == given


@pytest.mark.parametrize("loss", [
    lambda a, b: nnclr_loss_func(a, b, 0.1),
    lambda a, b: feature_loss_func((a, b), (b, a)),
    lambda a, b: Queue(4096, 64).nearest(a)[0],
    lambda a, b: sce_loss_func(a, b, Queue(4096, 64).keys, in_batch=True, mask_self=True),
], ids=["nnclr", "feature", "nearest", "sce"])
def test_losses_and_searches_are_the_same_bits_under_autocast(loss):
    torch.manual_seed(0)
    a, b = torch.randn(2, 32, 64)
    torch.manual_seed(1)
    expected = loss(a, b)
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(a, b)
    assert found.dtype == torch.float32 and torch.equal(found, expected)
