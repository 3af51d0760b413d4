"""What the kernels' tests share. They run in the interpreter or, without its variable, on the GPU."""

import torch
import torch.nn.functional as F

from solo.kernels.dispatch import interpreted

DEVICE = "cpu" if interpreted() else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a weight on its way into the second product, where it has the columns' dtype: half a unit in its last place, times four
# for the sum. The interpreter does not round there.
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12}


def unit_rows(*shape, dtype=torch.float32, seed=0):
    """Random rows of length 1 as ``dtype`` holds them."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype).to(DEVICE)


def tolerance(dtype, width, scale):
    """Relative to the largest value: a product of two rows is off by about 6e-8 sqrt(D), the exponent by scale times that."""
    return 10 * 6e-8 * width**0.5 * scale + ROUNDING[dtype]


def assert_near(found, expected, relative):
    assert found.dtype == torch.float32
    bound = relative * max(1e-30, expected.abs().max().item())
    assert (found.double() - expected.double()).abs().max().item() <= bound
