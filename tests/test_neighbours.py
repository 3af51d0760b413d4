"""Nearest neighbours, streamed: the same as a full search, whatever the sizes, and in bfloat16 too."""

import pytest
import torch
import torch.nn.functional as F

from solo.kernels import nearest, neighbours


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
    monkeypatch.setattr(nearest, "BLOCK", request.param)
    monkeypatch.setattr(nearest, "_COMPARED", 48)
    monkeypatch.setattr(nearest, "_SPAN", 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, size, dim, k", [(1, 5, 3, 1), (7, 5, 3, 5), (7, 130, 5, 1), (5, 333, 6, 5), (2, 64, 4, 33)])
def test_equals_a_full_search(blocks, rows, size, dim, k, dtype):
    z, keys = unit_rows(rows, dim, dtype=dtype), unit_rows(size, dim, seed=1, dtype=dtype)
    assert_nearest(neighbours(z, keys, k), z, keys, k)


@pytest.mark.parametrize("make", [unit_rows, crowded], ids=["spread", "crowded"])
@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("k", [1, 5])
def test_bfloat16_scan_finds_what_float32_finds(monkeypatch, k, pays, make):
    monkeypatch.setattr(nearest, "LARGE", 0)
    monkeypatch.setattr(nearest, "_bfloat16_is_fast", lambda z: True)
    monkeypatch.setattr(nearest, "_pays", lambda *_: pays)
    search = nearest._search
    again = []

    def followed(z, queue, k, spare, dtype, shadow=None):
        again.extend(z if dtype == torch.float32 else ())
        return search(z, queue, k, spare, dtype, shadow)

    monkeypatch.setattr(nearest, "_search", followed)
    z, keys = make(200, 32, seed=1), make(5000, 32, seed=2)
    assert_nearest(neighbours(z, keys, k), z, keys, k)
    assert not pays or make is not crowded or again, "no row was too close to call: this test shows nothing"


def test_bfloat16_alone_would_be_wrong():
    """The test above compares with something: rounding does change the nearest key of some rows."""
    z, keys = crowded(200, 32, seed=1), crowded(5000, 32, seed=2)
    rounded = (z.bfloat16() @ keys.bfloat16().T).argmax(1)
    assert (rounded != neighbours(z, keys, 1)[:, 0]).any()


def test_whether_it_pays_is_seen_from_a_part(monkeypatch):
    assert nearest._pays(unit_rows(64, 256), unit_rows(16384, 256, seed=1), 1, None)
    assert not nearest._pays(crowded(64, 256, 1), crowded(16384, 256, 2), 1, None)


def test_ties_and_equal_keys():
    keys = unit_rows(1, 8).expand(100, 8).contiguous()
    index = neighbours(keys[:3], keys, 5)
    assert all(len(set(row)) == 5 for row in index.tolist())


@pytest.mark.parametrize("fast", [False, True])
def test_ties_go_to_the_lower_number_and_nan_is_seen(monkeypatch, fast):
    monkeypatch.setattr(nearest, "_bfloat16_is_fast", lambda queue: fast)
    monkeypatch.setattr(nearest, "_pays", lambda *_: True)
    z, keys = unit_rows(3, 16), unit_rows(9000, 16, seed=1)
    keys[[8000, 17, 16, 5000]] = z[0].clone()
    z[1, 3] = float("nan")
    found = neighbours(z, keys, 3)
    assert found[0].tolist() == [16, 17, 5000] and found[1].tolist() == [0, 1, 2]
    assert_nearest(found[2:], z[2:], keys, 3)


def test_a_shadow_changes_nothing(monkeypatch):
    monkeypatch.setattr(nearest, "_bfloat16_is_fast", lambda queue: True)
    z, keys = unit_rows(100, 32), unit_rows(9000, 32, seed=1)
    assert torch.equal(neighbours(z, keys, 5, shadow=keys.bfloat16()), neighbours(z, keys, 5))


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_processor_without_instructions_for_bfloat16_is_not_asked_for_it(monkeypatch, flags):
    """oneDNN supports it on any AVX-512, at a third of float32's speed."""
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for name, flag in zip(("_is_avx512_bf16_supported", "_is_amx_tile_supported"), flags, strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda flag=flag: flag, raising=False)
    nearest.multiplies_bfloat16.cache_clear()
    assert nearest.wants_shadow(torch.zeros(nearest.LARGE, 1)) == any(flags)
    nearest.multiplies_bfloat16.cache_clear()
