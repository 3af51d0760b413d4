"""Nearest neighbours, streamed: the same as a full search, whatever the sizes, and in bfloat16 too."""

import pytest
import torch
import torch.nn.functional as F

from solo import neighbours
from solo.neighbours import nearest


def unit_rows(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def crowded(rows, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    centres = 8 * torch.randn(5, dim, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(rows, dim, generator=generator)
    return F.normalize(centres[torch.randint(5, (rows,), generator=generator)] + noise, dim=1)


def assert_nearest(index, z, keys, k):
    """Keys in falling order, none twice, and as similar as the best there are, up to float32's rounding."""
    similarity = z.double() @ keys.double().T
    best = similarity.topk(k).values
    found = similarity.gather(1, index)
    rounding = 1e-6 if z.dtype == torch.float32 else 1e-14
    assert (found - best).abs().max() <= rounding
    assert all(len(set(row)) == k for row in index.tolist())
    apart = torch.cat([best, -torch.ones(len(z), 1)], 1).diff().abs().amin(1) > 4 * rounding
    assert torch.equal(index[apart], similarity.topk(k).indices[apart]) and apart.any()


@pytest.fixture(params=[(3, 32), (64, 64)], ids=["small blocks", "one block"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(neighbours, "_CPU", request.param)
    monkeypatch.setattr(neighbours, "_COMPARED", 48)
    monkeypatch.setattr(neighbours, "_SPAN", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, size, dim, k", [(1, 5, 3, 1), (7, 5, 3, 5), (7, 130, 5, 1), (5, 333, 6, 5), (2, 64, 4, 33)])
def test_equals_a_full_search(blocks, rows, size, dim, k, dtype):
    z, keys = unit_rows(rows, dim, dtype=dtype), unit_rows(size, dim, seed=1, dtype=dtype)
    assert_nearest(nearest(z, keys, k), z, keys, k)


@pytest.mark.parametrize("make", [unit_rows, crowded], ids=["spread", "crowded"])
@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("k", [1, 5])
def test_bfloat16_scan_finds_what_float32_finds(monkeypatch, k, pays, make):
    monkeypatch.setattr(neighbours, "LARGE", 0)
    monkeypatch.setattr(neighbours, "_bfloat16_is_fast", lambda z: True)
    monkeypatch.setattr(neighbours, "_pays", lambda *_: pays)
    exact = neighbours._exact
    again = []
    monkeypatch.setattr(neighbours, "_exact", lambda z, *rest: again.append(len(z)) or exact(z, *rest))
    z, keys = make(200, 32, seed=1), make(5000, 32, seed=2)
    assert_nearest(nearest(z, keys, k), z, keys, k)
    assert not pays or make is not crowded or again, "no row was too close to call: this test shows nothing"


def test_bfloat16_alone_would_be_wrong():
    """The test above compares with something: rounding does change the nearest key of some rows."""
    z, keys = crowded(200, 32, seed=1), crowded(5000, 32, seed=2)
    rounded = (z.bfloat16() @ keys.bfloat16().T).argmax(1)
    assert (rounded != nearest(z, keys)[:, 0]).any()


def test_whether_it_pays_is_seen_from_a_part(monkeypatch):
    assert neighbours._pays(unit_rows(64, 256), unit_rows(16384, 256, seed=1), 1)
    assert not neighbours._pays(crowded(64, 256, 1), crowded(16384, 256, 2), 1)


def test_ties_and_equal_keys():
    keys = unit_rows(1, 8).expand(100, 8).contiguous()
    index = nearest(keys[:3], keys, 5)
    assert all(len(set(row)) == 5 for row in index.tolist())
