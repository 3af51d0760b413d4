"""The contract of a method, as checks that hold for every method, whoever wrote it.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_sage(check):
        check(Case("mylab.sage:Sage", method_kwargs={"pred_hidden_dim": 8}))

Everything runs on the CPU in seconds, on drawn images of 16 pixels.
"""

from typing import Any

from solo.testing.case import Case, tiny
from solo.testing.checks import CHECKS
from solo.testing.ranks import run_ranks

__all__ = ["CHECKS", "Case", "check_method", "run_ranks", "tiny"]


def check_method(method: str, **changes: Any) -> None:
    """Every check on one method; arguments as for `Case`.

    Raises:
        AssertionError: what the first check that fails found.
    """
    for check in CHECKS:
        check(Case(method, **changes))
