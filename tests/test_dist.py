"""Two gloo processes against the official code's numbers; a method's against one process: test_contract."""

import copy

import pytest
import torch

from solo.dist import gather, gather_text, gather_uneven
from solo.losses import nnclr_loss_func
from solo.nn import Queue
from solo.testing import Case, run_ranks


def official_nnclr(rank, z, dtype):
    nn_, p = (z[f"{name}_rank{rank}"].to(dtype) for name in ("nn", "p"))
    p.requires_grad_()
    loss = nnclr_loss_func(nn_, p, z.params["temperature"])
    loss.backward()
    return loss.item(), p.grad.numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_nnclr_on_two_ranks_equals_official(golden, dtype):
    z = golden("solo_ddp_nnclr")
    for rank, (loss, grad) in enumerate(run_ranks(official_nnclr, z, dtype)):
        value, gradient = {torch.float64: (1e-9, 1e-8), torch.float32: (2e-6, 5e-6)}[dtype]
        official = z[f"out_grad_p_rank{rank}"]
        assert loss == pytest.approx(z[f"out_loss_rank{rank}"].item(), rel=value)
        assert abs(torch.from_numpy(grad).double() - official).max() <= gradient * official.abs().max()


def official_queue(rank, z, dtype):
    queue = Queue(8, 4).to(dtype)
    queue.keys.copy_(z[f"queue_rank{rank}"])
    queue.push(z[f"z_rank{rank}"].to(dtype), z[f"y_rank{rank}"])
    queue.land()
    return queue.keys.numpy(), queue.labels.numpy(), queue.pointer.item()


@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-9, 1e-12), (torch.float32, 1e-5, 1e-6)])
def test_queue_on_two_ranks_equals_official(golden, dtype, rtol, atol):
    z = golden("solo_ddp_queue")
    for rank, (keys, labels, pointer) in enumerate(run_ranks(official_queue, z, dtype)):
        expected = torch.nn.functional.normalize(z[f"out_queue_rank{rank}"], dim=-1)
        found = torch.nn.functional.normalize(torch.from_numpy(keys).double(), dim=-1)
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
        assert labels.tolist() == z[f"out_queue_y_rank{rank}"].tolist()
        assert pointer == z[f"out_ptr_rank{rank}"].item()


def uneven(rank):
    rows = torch.arange(3 + 2 * rank).float()[:, None] + 10 * rank
    return gather_uneven(rows)[:, 0].tolist(), gather(rows[:2])[:, 0].tolist()


def test_gather_keeps_rank_order():
    for rows, even in run_ranks(uneven):
        assert rows == [0, 1, 2, 10, 11, 12, 13, 14] and even == [0, 1, 10, 11]


def test_copying_a_method_keeps_its_teacher_on_the_copy():
    model = copy.deepcopy(Case("all4one").build())
    with torch.no_grad():
        model.projector[0].weight.fill_(7.0)
    model.teacher.momentum.base_tau = 0.0
    model.teacher.update(0.0)
    assert torch.equal(model.teacher[1][0].weight, model.projector[0].weight)


def said(rank, *texts):
    return gather_text(texts[rank])


@pytest.mark.parametrize("texts", [("a", "bü\n"), ("", "only one"), ("rank 0's", ""), ("", "")])
def test_texts_of_all_ranks_in_rank_order(texts):
    assert run_ranks(said, *texts) == ["".join(texts)] * 2
    assert gather_text(texts[0]) == texts[0]
