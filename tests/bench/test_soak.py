"""What a run that was left alone must not have done."""

import pytest

from solo.bench.soak import GROWTH, Usage, judged


@pytest.mark.parametrize(("memory", "files", "problems"), [
    ([100] * 30, [8] * 30, 0),
    ([100] * 30, [8] * 20 + [6] * 10, 0),
    ([100] * 30, [8] * 20 + [9] * 10, 1),
    ([1000] * 20 + [1000 + int(1000 * GROWTH)] * 10, [8] * 30, 1),
    ([100, 100], [8, 8], 1),
    ([], [], 1),
], ids=["even", "fewer files", "more files", "more memory", "two looks", "none"])
def test_growth_is_a_problem_and_so_is_not_having_looked(memory, files, problems):
    said, found = judged(Usage(memory, files))
    assert len(found) == problems and said
