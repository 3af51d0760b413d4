"""How long a run that a signal ends may take."""

import pytest

from solo.bench.ordeal import RECORD
from solo.bench.routes import LIMIT, _most_seconds


@pytest.mark.parametrize(("steps", "answer", "most"), [
    ([1.0] * 9, 1.0, LIMIT + 1),
    ([1.0], 1000.0, LIMIT + 1),
    ([1.0] * 4 + [50.0] + [1.0] * 4, 1.0, LIMIT + 1),
    ([3.0] * 9, 3.0, 3 * LIMIT + 3),
    ([0.5] * 9, 0.5, LIMIT + 0.5),
    ([], 7.0, LIMIT + 1),
], ids=["as usual", "a slow answer", "one slow step", "a slow machine", "a quick one", "one step"])
def test_the_steps_before_the_signal_set_the_bound(tmp_path, steps, answer, most):
    times = [100.0]
    for seconds in steps:
        times.append(times[-1] + seconds)
    signalled = times[-1] + 0.1
    trace = tmp_path / "losses"
    trace.write_bytes(b"".join(RECORD.pack(step, 0.0, time) for step, time in enumerate([*times, times[-1] + answer], 1)))
    assert _most_seconds(trace, signalled, usual=1.0) == pytest.approx(most)
