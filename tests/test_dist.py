"""Two gloo processes against the official code's numbers and against one process on the joined batch."""

import copy

import pytest
import torch
from torch import nn

from solo.batch import Batch
from solo.dist import gather, gather_uneven
from solo.losses import nnclr_loss_func
from solo.methods import METHODS
from solo.nn import Queue
from tests.gloo import run_ranks


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


def official_queue(rank, z):
    queue = Queue(8, 4).double()
    queue.keys.copy_(z[f"queue_rank{rank}"])
    queue.push(z[f"z_rank{rank}"], z[f"y_rank{rank}"])
    queue.land()
    return queue.keys.numpy(), queue.labels.numpy(), queue.pointer.item()


def test_queue_on_two_ranks_equals_official(golden):
    z = golden("solo_ddp_queue")
    for rank, (keys, labels, pointer) in enumerate(run_ranks(official_queue, z)):
        expected = torch.nn.functional.normalize(z[f"out_queue_rank{rank}"], dim=-1)
        found = torch.nn.functional.normalize(torch.from_numpy(keys), dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert labels.tolist() == z[f"out_queue_y_rank{rank}"].tolist()
        assert pointer == z[f"out_ptr_rank{rank}"].item()


def uneven(rank):
    rows = torch.arange(3 + 2 * rank).float()[:, None] + 10 * rank
    return gather_uneven(rows)[:, 0].tolist(), gather(rows[:2])[:, 0].tolist()


def test_gather_keeps_rank_order():
    for rows, even in run_ranks(uneven):
        assert rows == [0, 1, 2, 10, 11, 12, 13, 14] and even == [0, 1, 10, 11]


def tiny(name):
    torch.manual_seed(0)
    method = METHODS[name]
    sizes = dict(proj_hidden_dim=16, proj_output_dim=8, pred_hidden_dim=16, queue_size=32)
    backbone = nn.Sequential(nn.Linear(10, 12), nn.Tanh())
    backbone.num_features = 12
    config = method.Config(**sizes, **({"dropout": 0.0} if name == "all4one" else {}))
    model = method(backbone, config).double()
    # Batch statistics and All4One's feature term are local to a rank, as published; the rest must not notice ranks.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()
    return model


def gradients(rank, name, views, labels, world):
    model = tiny(name)
    part = slice(rank * len(labels) // world, (rank + 1) * len(labels) // world)
    outputs = model.losses(Batch([view[part] for view in views], labels[part], torch.arange(len(labels))[part]))
    loss = 2 * outputs["loss"] - outputs["feature"] if name == "all4one" else outputs["loss"]
    loss.backward()
    model.after_step(0.0)
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if world > 1:
        for grad in grads.values():
            torch.distributed.all_reduce(grad)
            grad /= world
        torch.distributed.all_reduce(loss.data)
        loss.data /= world
    return loss.item(), {key: grad.numpy() for key, grad in grads.items()}, model.queue.keys.numpy(), model.queue.labels.numpy()


@pytest.mark.parametrize("name", ["nnclr", "all4one"])
def test_two_ranks_equal_one_process_on_the_joined_batch(name):
    torch.manual_seed(3)
    views, labels = list(torch.randn(2, 8, 10, dtype=torch.float64)), torch.arange(8)
    loss, grads, keys, queued = gradients(0, name, views, labels, 1)
    for rank_loss, rank_grads, rank_keys, rank_queued in run_ranks(gradients, name, views, labels, 2):
        assert rank_loss == pytest.approx(loss, rel=1e-10)
        assert set(rank_grads) == set(grads)
        for key, grad in grads.items():
            torch.testing.assert_close(
                torch.from_numpy(rank_grads[key]), torch.from_numpy(grad), rtol=1e-8, atol=1e-10, msg=key
            )
        assert (abs(rank_keys - keys) < 1e-12).all() and (rank_queued == queued).all()


def test_copying_a_method_keeps_its_teacher_on_the_copy():
    model = copy.deepcopy(tiny("all4one"))
    with torch.no_grad():
        model.projector[0].weight.fill_(7.0)
    model.teacher.momentum.base_tau = 0.0
    model.teacher.update(0.0)
    assert torch.equal(model.teacher[1][0].weight, model.projector[0].weight)
