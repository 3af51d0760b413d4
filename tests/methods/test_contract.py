"""Every registered method keeps the contract: a method is tested because it is registered."""

import pytest

from solo.methods import METHODS
from solo.testing import CHECKS, Case

SLOW = {
    "large_batch_mode_equals_one", "ranks_share_uneven_images", "ranks_accumulate", "ranks_normalise_alone",
    "overfits_one_batch", "resumes_exactly", "bfloat16_is_close",
}
CASES = [pytest.param(check, marks=pytest.mark.slow if check.__name__ in SLOW else (), id=check.__name__) for check in CHECKS]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", CASES)
def test_contract(check, name):
    check(Case(name))


def test_what_is_slow_exists():
    assert SLOW <= {check.__name__ for check in CHECKS}
