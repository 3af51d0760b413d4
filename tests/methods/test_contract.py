"""Every registered method keeps the contract: a method is tested because it is registered."""

import pytest

from solo.methods import METHODS
from solo.testing import CHECKS, Case

SLOW = {
    "large_batch_mode_equals_one", "ranks_share_uneven_images", "ranks_accumulate", "ranks_normalise_alone",
    "overfits_one_batch", "resumes_exactly", "bfloat16_is_close",
}
QUICK = "simclr"        # goes through those in the fast half too


def case(check, name):
    slow = check.__name__ in SLOW and name != QUICK
    return pytest.param(check, name, id=f"{check.__name__}-{name}", marks=pytest.mark.slow if slow else ())


@pytest.mark.parametrize(("check", "name"), [case(check, name) for check in CHECKS for name in METHODS])
def test_contract(check, name):
    check(Case(name))


def test_what_is_slow_exists():
    assert SLOW <= {check.__name__ for check in CHECKS}
