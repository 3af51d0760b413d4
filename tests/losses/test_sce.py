"""SCE's loss against the official numbers, the paper's equation in loops, and its limits MoCo and ReSSL."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solo.kernels import attention, blocks, queue_attention
from solo.losses import sce, sce_loss_func, sce_multicrop_loss_func
from solo.testing import run_ranks
from tests.losses.test_losses import assert_gradient

TOLERANCE = {torch.float64: (1e-10, 1e-9), torch.float32: (1e-5, 1e-4)}  # of the loss, of a gradient's largest entry


def options(params):
    return {"temperature": params["temp"], "temperature_m": params["temp_m"], "coeff": params["coeff"]}


def cast(z, dtype):
    """float16 inputs in ``dtype``, the queue [D, K] as our rows [K, D]."""
    inputs = {name: x.to(dtype) for name, x in z.items() if x.dtype == torch.float16}
    return {name: x.T.contiguous() if name == "queue" else x for name, x in inputs.items()}


def soft_target(k, keys, own, temperature_m, coeff, mask_self):
    """One row of w, [1 + K]: k is the image's own target, then come ``keys``; ``own`` is the key left out, if any."""
    scores = [-math.inf if mask_self else 0.0]
    scores += [-math.inf if j == own else torch.dot(k, key).item() / temperature_m for j, key in enumerate(keys)]
    total = sum(math.exp(score) for score in scores)
    similar = [math.exp(score) / total for score in scores]
    return [coeff * (j == 0) + (1 - coeff) * s for j, s in enumerate(similar)]


def looped(q, k, keys, own=None, *, temperature=0.1, temperature_m=0.07, coeff=0.5, mask_self=False):
    """The paper's cross-entropy, one image and one key at a time."""
    loss = 0.0
    for i in range(len(q)):
        left_out = None if own is None else own + i
        a, t = q[i] / q[i].norm(), k[i] / k[i].norm()
        w = soft_target(t, keys, left_out, temperature_m, coeff, mask_self)
        logits = [torch.dot(a, t) / temperature]
        logits += [torch.dot(a, key) / temperature if j != left_out else logits[0] - math.inf for j, key in enumerate(keys)]
        log_total = torch.logsumexp(torch.stack(logits), 0)
        loss -= sum(weight * (logit - log_total) for weight, logit in zip(w, logits, strict=True) if weight) / len(q)
    return loss


def inputs(n, d, size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    q, k, queue = (torch.randn(rows, d, generator=generator, dtype=dtype) for rows in (n, n, size))
    return q.requires_grad_(), k, F.normalize(queue, dim=-1)


def value_and_gradient(loss, q):
    return loss.item(), torch.autograd.grad(loss, q)[0]


def along_the_sphere(gradient, unit):
    """An official gradient at the unit rows, which lacks the Jacobian of their normalisation, with it."""
    row, gradient = unit.detach().double(), gradient.double()
    return gradient - (gradient * row).sum(1, keepdim=True) * row


# --- golden -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_single_equals_official(golden, size, dtype):
    z = golden(f"sce_single_{size}")
    x = cast(z, dtype)
    q = x["q_raw"].requires_grad_()
    loss, gradient = value_and_gradient(sce_loss_func(q, x["k_raw"], x["queue"], **options(z.params)), q)
    assert loss == pytest.approx(z["loss"].item(), rel=TOLERANCE[dtype][0])
    assert_gradient(gradient, z["grad_q_raw"], TOLERANCE[dtype][1])
    unit = F.normalize(x["q_raw"].detach(), dim=-1).requires_grad_()
    _, gradient = value_and_gradient(sce_loss_func(unit, x["k_raw"], x["queue"], **options(z.params)), unit)
    assert_gradient(gradient, along_the_sphere(z["grad_q"], unit), TOLERANCE[dtype][1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_in_batch_equals_official(golden, size, dtype):
    z = golden(f"sce_keys_{size}")
    assert z.params["rank"] == 0 and z.params["world_size"] == 1
    x = cast(z, dtype)
    q = x["q_raw"].requires_grad_()
    loss = sce_loss_func(q, x["k_raw_all"], x.get("queue"), **options(z.params), in_batch=True, mask_self=True)
    loss, gradient = value_and_gradient(loss, q)
    assert loss == pytest.approx(z["loss"].item(), rel=TOLERANCE[dtype][0])
    assert_gradient(gradient, z["grad_q_raw"], TOLERANCE[dtype][1])
    unit = F.normalize(x["q_raw"].detach(), dim=-1).requires_grad_()
    loss = sce_loss_func(unit, x["k_raw_all"], x.get("queue"), **options(z.params), in_batch=True, mask_self=True)
    assert_gradient(torch.autograd.grad(loss, unit)[0], along_the_sphere(z["grad_q"], unit), TOLERANCE[dtype][1])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("kind", ["sym2", "multicrop"])
def test_pairs_equal_official(golden, kind, size, dtype):
    z = golden(f"sce_{kind}_{size}")
    x = cast(z, dtype)
    q, k, queue = x["q_raw"].requires_grad_(), x["k_raw"], x["queue"]
    pairs = [tuple(pair) for pair in z["pair_index"].tolist()]
    loss = sce_multicrop_loss_func(list(q), list(k), queue, pairs, **options(z.params))
    assert loss.item() == pytest.approx(z["loss"].item(), rel=TOLERANCE[dtype][0])
    assert_gradient(torch.autograd.grad(loss, q)[0], z["grad_q_raw"], TOLERANCE[dtype][1])
    singles = [sce_loss_func(q[v], k[g], queue, **options(z.params)).item() for g, v in pairs]
    assert singles == pytest.approx(z["pair_loss"].tolist(), rel=TOLERANCE[dtype][0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_target_equals_official(golden, size, dtype):
    z = golden(f"sce_target_{size}")
    x = cast(z, dtype)
    k, queue = F.normalize(x["k_raw"], dim=-1), x["queue"]
    rel = TOLERANCE[dtype][0]
    for (temperature_m, coeff), official in zip(z["grid"].tolist(), z["target"], strict=True):
        for row, expected in zip(k[:8], official, strict=False):
            assert soft_target(row, queue, None, temperature_m, coeff, False) == pytest.approx(expected.tolist(), rel=rel)
        mean, lse = queue_attention(k, queue, 1 / temperature_m)
        ours = sce._targets(k[None], (mean[None], lse[None]), None, temperature_m, coeff, False)[0].double()    # [N, D]
        expected = official[:, :1] * k.double() + official[:, 1:] @ queue.double()
        torch.testing.assert_close(ours, expected, rtol=0, atol=rel * expected.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("kind", ["single", "keys"])
def test_target_of_a_batch_equals_official(golden, kind, size, dtype):
    z = golden(f"sce_{kind}_{size}")
    x = cast(z, dtype)
    k, queue = F.normalize(x["k_raw" if kind == "single" else "k_raw_all"], dim=-1), x.get("queue")
    batch = [k] if kind == "keys" else None
    past = None if queue is None else sce._over_queue(k[None], k[None], queue, 1.0, z.params["temp_m"]).targets
    ours = sce._targets(k[None], past, batch, z.params["temp_m"], z.params["coeff"], mask_self=kind == "keys")[0].double()
    own = z["target"][:, :1] * k.double() if kind == "single" else 0            # its keys: the own one, those of the batch
    past = torch.cat([*(batch or []), *([] if queue is None else [queue])]).double()
    expected = own + z["target"][:, kind == "single" :] @ past                  # [N, D]
    torch.testing.assert_close(ours, expected, rtol=0, atol=TOLERANCE[dtype][0] * expected.abs().max().item())


# --- the equation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("in_batch", [False, True])
@pytest.mark.parametrize("n, d, size, block", [(1, 5, 7, 3), (3, 2, 4, 4), (5, 7, 11, 4), (6, 4, 9, 1), (4, 3, 2, 64)])
def test_blocks_equal_the_equation(monkeypatch, n, d, size, block, in_batch, mask_self):
    monkeypatch.setattr(blocks, "CPU", (2, block))
    q, k, queue = inputs(n, d, size)
    chosen = {"temperature": 0.2, "temperature_m": 0.11, "coeff": 0.3, "mask_self": mask_self}
    batch = F.normalize(k, dim=-1)
    keys, own = (torch.cat([batch, queue]), 0) if in_batch else (queue, None)
    found = value_and_gradient(sce_loss_func(q, k, queue, **chosen, in_batch=in_batch), q)
    expected = value_and_gradient(looped(q, k, keys, own, **chosen), q)
    assert found[0] == pytest.approx(expected[0], rel=1e-12)
    assert_gradient(found[1], expected[1], 1e-11)


def test_gradcheck():
    q, k, queue = inputs(4, 3, 6)
    for chosen in ({"temperature": 0.5}, {"temperature": 0.5, "in_batch": True, "mask_self": True}):
        assert torch.autograd.gradcheck(lambda x, chosen=chosen: sce_loss_func(x, k, queue, **chosen), (q,))


def test_targets_and_queue_are_constants():
    q, k, queue = inputs(4, 3, 6)
    sce_loss_func(q, k.requires_grad_(), queue.requires_grad_(), in_batch=True, mask_self=True).backward()
    assert q.grad is not None and k.grad is None and queue.grad is None


def test_nothing_to_compare_with():
    q, k, _ = inputs(4, 3, 6)
    with pytest.raises(ValueError, match="give a queue or set in_batch=True"):
        sce_loss_func(q, k, None)


# --- limits -----------------------------------------------------------------------------------------------------------


def moco(q, k, queue, temperature):
    """InfoNCE of each image against its own target and the queue."""
    total = 0.0
    for a, t in zip(q, k, strict=True):
        scores = [torch.dot(a, key).item() / temperature for key in (t, *queue)]
        total -= math.log(math.exp(scores[0]) / sum(map(math.exp, scores)))
    return total / len(q)


def ressl(q, k, queue, temperature, temperature_m, own_slot):
    """Cross-entropy between two relations to the queue; ``own_slot`` puts the image's own target into the online one."""
    total = 0.0
    for a, t in zip(q, k, strict=True):
        target = [math.exp(torch.dot(t, key).item() / temperature_m) for key in queue]
        online = [math.exp(torch.dot(a, key).item() / temperature) for key in queue]
        sum_online = sum(online) + own_slot * math.exp(torch.dot(a, t).item() / temperature)
        total -= sum(x / sum(target) * math.log(y / sum_online) for x, y in zip(target, online, strict=True))
    return total / len(q)


@pytest.mark.parametrize("size", ["s", "m"])
def test_lambda_one_is_moco(golden, size):
    """The official files hold vectors of unit length to 1e-4; here they have it exactly, as SCE normalises them."""
    z = golden(f"solo_loss_mocov2plus_{size}")
    q, k, queue = (F.normalize(x, dim=-1) for x in (z["query"], z["key"], z["queue"].T))
    t = z.params["temperature"]
    assert moco(z["query"], z["key"], z["queue"].T, t) == pytest.approx(z["loss"].item(), rel=1e-9)
    for mask_self in (False, True):
        found = sce_loss_func(q, k, queue, temperature=t, coeff=1.0, mask_self=mask_self).item()
        assert found == pytest.approx(moco(q, k, queue, t), rel=1e-10)


@pytest.mark.parametrize("size", ["s", "m"])
def test_lambda_zero_is_ressl_with_a_slot_for_the_positive(golden, size):
    z = golden(f"solo_loss_ressl_{size}")
    q, k, queue = (F.normalize(z[name], dim=-1) for name in ("q", "k", "queue"))
    temperatures = z.params["temperature_q"], z.params["temperature_k"]
    assert ressl(z["q"], z["k"], z["queue"], *temperatures, own_slot=0) == pytest.approx(z["loss"].item(), rel=1e-9)
    chosen = dict(zip(("temperature", "temperature_m"), temperatures, strict=True))
    found = sce_loss_func(q, k, queue, **chosen, coeff=0.0, mask_self=True).item()
    assert found == pytest.approx(ressl(q, k, queue, *temperatures, own_slot=1), rel=1e-10)
    without = ressl(q, -q, queue, 0.01, temperatures[1], own_slot=0)            # a target so far that its slot is empty
    found = sce_loss_func(q, -q, queue, temperature=0.01, temperature_m=temperatures[1], coeff=0.0, mask_self=True).item()
    assert found == pytest.approx(without, rel=1e-10)


def test_what_masking_oneself_changes():
    """Released: the positive weighs (1 - lambda) p more, p = 1 / (1 + sum_j exp(k . queue_j / temperature_m))."""
    q, k, queue = inputs(1, 8, 16)
    a = (F.normalize(q, dim=-1) @ torch.cat([F.normalize(k, dim=-1), queue]).T / 0.1)[0].detach()
    b = (F.normalize(k, dim=-1) @ queue.T / 0.3)[0]
    p = 1 / (1 + b.exp().sum())
    released, paper = (
        sce_loss_func(q, k, queue, temperature_m=0.3, coeff=0.4, mask_self=mask).item() for mask in (False, True)
    )
    assert released - paper == pytest.approx((0.6 * p * (b.softmax(0) @ a[1:] - a[0])).item(), rel=1e-9)
    assert abs(released - paper) > 1e-4


def test_masking_oneself_is_negligible_over_the_published_queue():
    """p is about 1e-5 with 65,536 keys spread over the sphere, and several percent with 32."""
    weights = {}
    for size in (32, 65536):
        _, k, queue = inputs(16, 256, size, dtype=torch.float32)
        b = F.normalize(k, dim=-1) @ queue.T / 0.07
        weights[size] = (1 / (1 + b.exp().sum(1))).mean().item()
    assert 5e-6 < weights[65536] < 2e-5 and 0.01 < weights[32] < 0.1


# --- cost -------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel, *(x.numel() for x in tensors)])
        return out


def saved_bytes(size, n, views=3, d=8):
    torch.manual_seed(0)
    q, k = torch.randn(views, n, d, requires_grad=True), torch.randn(2, n, d)
    queue = F.normalize(torch.randn(size, d), dim=-1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel() * x.element_size()) or x, lambda x: x):
        sce_multicrop_loss_func(list(q), list(k), queue, [(g, v) for g in range(2) for v in range(views) if g != v])
    return sum(kept)


def test_no_matrix_is_kept_for_the_backward_pass():
    assert saved_bytes(64, 32) == saved_bytes(8192, 32) < 100 * 32 * 8 * 4      # (V + 2) N D and pairs of them; no K
    assert saved_bytes(64, 64) == pytest.approx(2 * saved_bytes(64, 32), rel=0.01)


def test_no_matrix_is_ever_made(monkeypatch):
    monkeypatch.setattr(blocks, "CPU", (16, 16))
    q, k, queue = inputs(10, 8, 200)
    for in_batch in (False, True):
        with Largest() as largest:
            sce_loss_func(q, k, queue, in_batch=in_batch, mask_self=in_batch).backward()
        assert largest.numel <= 200 * 8                                         # the queue itself, which is given


def test_a_view_meets_the_queue_once(monkeypatch):
    rows = []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda x, *rest: rows.append(len(x)) or attend(x, *rest))
    q, k = list(torch.randn(6, 4, 8)), list(torch.randn(2, 4, 8))
    pairs = [(g, v) for g in range(2) for v in range(6) if g != v]
    sce_multicrop_loss_func(q, k, F.normalize(torch.randn(32, 8), dim=-1), pairs)
    assert rows == [(2 + 6) * 4]


# --- ranks ------------------------------------------------------------------------------------------------------------


def part(rank, q, k, queue):
    """Loss and gradient of this rank's rows."""
    rows = slice(rank * len(q) // 2, (rank + 1) * len(q) // 2)
    mine = q[rows].detach().requires_grad_()
    loss = sce_loss_func(mine, k[rows], queue, in_batch=True, mask_self=True)
    return loss.item(), torch.autograd.grad(loss, mine)[0].numpy()


def test_two_ranks_compare_with_the_whole_batch():
    q, k, queue = inputs(6, 5, 9)
    expected = value_and_gradient(sce_loss_func(q, k, queue, in_batch=True, mask_self=True), q)
    (loss0, grad0), (loss1, grad1) = run_ranks(part, q.detach(), k, queue)
    assert (loss0 + loss1) / 2 == pytest.approx(expected[0], rel=1e-12)
    found = torch.cat([torch.from_numpy(grad0), torch.from_numpy(grad1)]) / 2
    assert_gradient(found, expected[1], 1e-12)
