import math

import pytest
import torch

from solo.kernels import dispatch, neighbours
from solo.kernels.dispatch import uses_triton
from solo.kernels.nearest import neighbours_eager
from tests.kernels.interpreted.common import DEVICE, unit_rows

slow = pytest.mark.slow
# One row; fewer than a group; no multiple of a group or a tile; D no power of two.
SHAPES = [(1, 5, 16, 5), (3, 33, 8, 1), (4, 130, 24, 5)]
LARGE = [(40, 1000, 100, 5), (33, 515, 256, 1), (20, 1024, 128, 13)]
shapes = pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(shape, marks=slow) for shape in LARGE)], ids=str)


@shapes
@pytest.mark.parametrize("exact", [False, True], ids=["bfloat16 scan", "exact scan"])
def test_equals_sorting_in_float64(shape, exact):
    n, size, d, k = shape
    x, queue = unit_rows(n, d), unit_rows(size, d, seed=1)
    assert uses_triton(x, queue)
    expected = (x.double() @ queue.double().T).argsort(dim=1, descending=True, stable=True)[:, :k]
    found = neighbours(x, queue, k, exact=exact)
    assert found.dtype == torch.long and torch.equal(found, expected)
    assert torch.equal(neighbours_eager(x, queue, k), expected)


def test_reads_a_shadow_queue_but_compares_the_real_one():
    x, queue = unit_rows(6, 32), unit_rows(200, 32, seed=1)
    found = neighbours(x, queue, 5, shadow=queue.bfloat16())
    assert torch.equal(found, neighbours_eager(x, queue, 5))


@pytest.mark.parametrize("k", [1, 5])
def test_the_lower_number_wins_ties_within_a_group_and_across_groups(k):
    queue = unit_rows(1, 16).expand(333, 16).contiguous()
    for form in (neighbours, neighbours_eager):
        assert torch.equal(form(unit_rows(3, 16, seed=1), queue, k), torch.arange(k, device=DEVICE).expand(3, k))
    queue = unit_rows(333, 16)
    twins = [300, 65, 64, 130, 20, 290]
    queue[twins] = queue[7].clone()
    found = neighbours(queue[7:8], queue, k)[0].tolist()
    assert found == [7, 20, 64, 65, 130][:k] == neighbours_eager(queue[7:8], queue, k)[0].tolist()


@pytest.mark.parametrize("programs", [3, pytest.param(1, marks=slow), pytest.param(7, marks=slow)])
def test_the_same_whatever_the_work_is_cut_into(programs, monkeypatch):
    from solo.kernels import triton_nearest

    x, queue = unit_rows(70, 16), unit_rows(210, 16, seed=1)
    queue[100:] = queue[:110].clone()
    monkeypatch.setattr(dispatch, "_INTERPRETED", programs)
    monkeypatch.setattr(triton_nearest, "_MEMORY", 1)       # 64 rows at a time
    assert torch.equal(neighbours(x, queue, 2), neighbours_eager(x, queue, 2))


def test_the_best_may_stand_anywhere(monkeypatch):
    """Many more groups than are looked at again, so it is the scan that has to see each block, the last one too."""
    monkeypatch.setattr(torch, "empty", lambda *size, **options: torch.full(size, -9.0, **options))   # no lucky left-overs
    x, queue = unit_rows(1, 16), unit_rows(997, 16, seed=1)
    for place in (0, 500, 996):
        kept = queue.clone()
        kept[place] = x[0]
        assert neighbours(x, kept, 1).item() == place


def test_near_ties_of_the_scan_are_settled_in_float32():
    """Rows that bfloat16 cannot tell apart: the scan may miss the best, never by more than its rounding."""
    x = unit_rows(2, 32)
    queue = torch.nn.functional.normalize(x[0] + 5e-2 * unit_rows(1300, 32, seed=1), dim=1)
    best = (x[:1] @ queue.T).max()
    assert (x[:1] * queue[neighbours(x, queue, 1)[0]]).sum() >= best - 1e-3
    near = unit_rows(100, 32)
    near[:32] = queue[:32]                                  # all of one group: then exactly
    assert torch.equal(neighbours(x, near, 5), neighbours_eager(x, near, 5))


def test_nan_is_seen_and_gives_no_number_outside_the_queue():
    x, queue = unit_rows(3, 16), unit_rows(100, 16, seed=1)
    x[1, 3] = math.nan
    for form in (neighbours, neighbours_eager):
        assert form(x, queue, 2)[1].tolist() == [0, 1]
    queue[[70, 90]] = math.nan
    for form in (neighbours, neighbours_eager):
        assert form(x, queue, 2)[0].tolist() == [70, 90]
    queue[:] = math.nan
    for form in (neighbours, neighbours_eager):
        assert form(x, queue, 5)[0].tolist() == [0, 1, 2, 3, 4]
