"""Under float16 autocast, as with ``precision=16-mixed``, every loss is that of float32 on the same rounded rows."""

import pytest
import torch
from torch.nn.functional import normalize

import solo.losses as losses

VICREG = {"invariance": 25.0, "variance": 25.0, "covariance": 1.0}


def queue(x):
    return normalize(x.float(), dim=1)


LOSSES = {
    "nnclr": lambda a, b, c, d: losses.nnclr_loss_func(a, b, 0.1),
    "all4one": lambda a, b, c, d: losses.all4one_loss_func((a, b), (c, d), (b, c), (d, a), (a, c), (b, d)).loss,
    "sce": lambda a, b, c, d: losses.sce_loss_func(a, b, queue(c), temperature=0.1, temperature_m=0.07, coeff=0.5),
    "unigrad": lambda a, b, c, d: losses.unigrad_loss_func(a, b, c, d, None, lambda_=100.0, rho=0.99)[0],
    "simclr": lambda a, b, c, d: losses.unigrad_simclr_loss_func(a, b, c, d, temperature=0.2)[0],
    "moco": lambda a, b, c, d: losses.unigrad_moco_loss_func(a, b, c, d, queue(a), temperature=0.2)[0],
    "simsiam": lambda a, b, c, d: losses.unigrad_simsiam_loss_func(a, b, c, d, None, rho=0.99, eps=0.3)[0],
    "byol": lambda a, b, c, d: losses.unigrad_byol_directpred_loss_func(a, b, c, d, None, rho=0.99, eps=0.3)[0],
    "barlow": lambda a, b, c, d: losses.unigrad_barlow_loss_func(a, b, c, d, lambda_=50.0)[0],
    "vicreg": lambda a, b, c, d: losses.unigrad_vicreg_loss_func(a, b, c, d, **VICREG)[0],
    "own_simclr": lambda a, b, c, d: losses.simclr_loss_func(torch.cat([a, b]), torch.arange(len(a)).repeat(2), 0.2),
    "own_barlow": lambda a, b, c, d: losses.barlow_loss_func(a, b),
    "own_vicreg": lambda a, b, c, d: losses.vicreg_loss_func(a, b),
    "mvmr": lambda a, b, c, d: losses.mvmr_loss_func(a, b, {"some": c}, d).loss,
}


@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient(name):
    torch.manual_seed(0)
    short = [(5 * torch.randn(16, 32)).half().requires_grad_() for _ in range(4)]
    long = [row.detach().float().requires_grad_() for row in short]
    with torch.autocast("cpu", dtype=torch.float16):
        found = LOSSES[name](*short)
    expected = LOSSES[name](*long)
    assert found.dtype == torch.float32 and found.isfinite()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    (wanted,) = torch.autograd.grad(expected, long[:1])
    (gradient,) = torch.autograd.grad(1024 * found, short[:1])                  # scaled, as a GradScaler does
    assert gradient.isfinite().all() and wanted.abs().max() > 0
    assert (gradient.float() / 1024 - wanted).abs().max() <= 2e-3 * wanted.abs().max()      # float16 has 11 bits
