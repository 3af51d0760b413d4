"""Every registered method keeps the contract: a method is tested because it is registered."""

import pytest

from solo.methods import METHODS
from solo.testing import CHECKS, Case


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check, name):
    check(Case(name))
