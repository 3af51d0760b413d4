"""What is said of the wait for a process that does not answer. That a run's line ends so: `tests.test_process_faults`."""

from types import FunctionType

import pytest
import torch
import torch.distributed

from solo import dist, peers
from solo.agreement import Agreement
from solo.awaited import awaited
from solo.errors import DataError, EnvironmentFault

SILENT = "rank 1: no answer: killed, unreachable, or longer in a step than step_timeout=8 s"


def of(module, function, **names):
    """A function as if another module had it."""
    names |= {"__name__": module, "__builtins__": __builtins__}
    return FunctionType(function.__code__, names, closure=function.__closure__)


def all_reduce(*arguments, **keywords):
    raise RuntimeError("Timed out waiting 8000ms for recv operation to complete")


def all_gather_into_tensor(out, x):
    if len(x) == 1:
        raise RuntimeError("Timed out waiting 8000ms for recv operation to complete")
    out.copy_(torch.cat([x, x]))


@pytest.fixture(autouse=True)
def the_other_rank_is_silent(monkeypatch):
    place = "torch.distributed.distributed_c10d"
    monkeypatch.setattr(dist, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", of(place, all_reduce))
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", of(place, all_gather_into_tensor, torch=torch))


def agree():
    Agreement().reach(loss=torch.tensor(1.0))


def gathered():
    dist.gather(torch.ones(2, 3, requires_grad=True)).sum().backward()


def a_loss():
    """By ``Function.apply``, which is a call of its own in some versions of torch."""
    apply = of("torch.autograd.function", lambda: dist.all_reduce(torch.ones(2)), torch=torch, dist=dist)
    of("solo.losses.mine", lambda: apply())()


def store():
    of("solo.callbacks.mine", lambda: peers.answered(lambda: int("x"), 1.0), peers=peers)()


def lightning():
    of("pytorch_lightning.strategies.ddp", lambda: torch.distributed.all_reduce(), torch=torch)()


def gradient():
    y = torch.ones(2, requires_grad=True).square().sum()
    y.backward()
    y.backward()                        # an error of torch's engine, as DDP's own is


@pytest.mark.parametrize(("wait", "said"), [
    (agree, "all_gather_into_tensor for solo.agreement.reach"),
    (a_loss, "all_reduce for solo.losses.mine.<lambda>"),
    (gathered, "all_reduce for a gradient"),
    (store, "the group's store for solo.callbacks.mine.<lambda>"),
    (lightning, "all_reduce for Lightning"),
    (gradient, "the backward pass, where DDP sums the gradient over ranks"),
    (lambda: int("x"), ""),
], ids=["ours", "a loss's", "ours, backwards", "the store's", "Lightning's", "DDP's", "none"])
def test_what_was_waited_in_and_for_whom(wait, said):
    for kind, line in ((EnvironmentFault, SILENT), (EnvironmentFault, "rank 0 no longer answers: it was killed"),
                       (EnvironmentFault, "rank 1: a data worker ended"), (DataError, SILENT)):
        with pytest.raises(kind) as caught:
            try:
                wait()
            except (RuntimeError, ValueError) as error:
                raise kind(line) from error
        assert awaited(caught.value) == (said if kind is EnvironmentFault and "answer" in line else "")
