"""Under two ranks the callbacks give what one process gives on the joined batch."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from solo import dist
from solo.agreement import Agreement
from solo.bench.counts import Collectives
from solo.callbacks.health import FiniteGuard
from solo.callbacks.probe import OnlineProbe
from solo.dist import all_reduce, gather, rank, sum_later
from solo.errors import NumericsError
from solo.eval.features import Features, extract
from solo.eval.knn import Vote, knn_hits
from solo.testing import run_ranks
from tests.callbacks.toy import CLASSES, ToyBackbone, batches


def probe_steps(parts):
    probe = OnlineProbe(dim=6, num_classes=CLASSES, lr=0.3)
    for feats, labels in parts:
        probe.update(feats, labels, 0.3)
    return [value.tolist() for value in probe.state_dict().values()]


def travelled_steps(parts, own_step=False):
    """The same in a run, where the third loss gathers something backwards; and the messages of the probe's own.

    ``own_step``: of a method whose `training_step` is its own and keeps no ``feats``.
    """
    probe = OnlineProbe(dim=6, num_classes=CLASSES, lr=0.3)
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=1)
    probe.on_train_start(trainer, None)
    counts = []
    for feats, labels in parts:
        method, batch = SimpleNamespace(feats=torch.ones(4, 6)), SimpleNamespace(labels=labels)
        probe.on_train_batch_start(trainer, method, batch, 0)
        if not own_step:
            method.feats = feats
        probe.on_before_backward(trainer, method, torch.tensor(0.0))
        if len(counts) == 2:
            assert gather(torch.tensor([rank(), 7])).tolist() == [0, 7, 1, 7] and not dist._waiting
        with Collectives() as seen:
            probe.on_train_batch_end(trainer, method, {"feats": feats}, batch, 0)
        counts.append(sum(seen.names.values()))
    return [value.tolist() for value in probe.state_dict().values()], counts


def test_probe_equals_one_process_on_the_joined_batch():
    generator = torch.Generator().manual_seed(0)
    steps = [(torch.randn(8, 6, generator=generator), torch.tensor([0, 1, -1, -1, -1, 2, 1, 0])) for _ in range(3)]
    halves = [[(feats[4 * r : 4 * r + 4], labels[4 * r : 4 * r + 4]) for feats, labels in steps] for r in (0, 1)]
    ranks = run_ranks(lambda rank: (
        probe_steps(halves[rank]), travelled_steps(halves[rank]), travelled_steps(halves[rank], own_step=True)
    ))
    assert ranks[0] == ranks[1]
    alone, travelled, own = ranks[0]
    assert travelled == (alone, [1, 1, 0]) and own == (alone, [1, 1, 1])
    for a, b in zip(alone, probe_steps(steps), strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b))


def features_and_hits(rank, shares):
    torch.manual_seed(0)
    backbone = ToyBackbone()
    bank = extract(backbone, shares[rank], "cpu")
    own = [i for batch in shares[rank] for i in batch.index.tolist()]
    hits = knn_hits(bank, Features(bank.features[own], bank.labels[own]), CLASSES, [Vote(k=5)])
    return bank.features.tolist(), bank.labels.tolist(), all_reduce(hits).tolist()


SHARES = {"contiguous": (batches(1)[:4], batches(1)[4:]), "striped": (batches(1)[::2], batches(1)[1::2]),
          "one has none": (batches(1), [])}


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES)
def test_features_are_in_dataset_order_and_hits_add_up(shares):
    first, second = run_ranks(features_and_hits, shares)
    alone = features_and_hits(0, [batches(1)])
    assert first == second
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(alone[0]))
    assert first[1:] == alone[1:]


def guard(rank, what, reduced):
    module = torch.nn.Linear(2, 1, bias=False)
    module.automatic_optimization = True
    value = float("inf") if rank == 1 else 1.0
    if what == "gradient":
        module.weight.register_hook(lambda grad: grad * value)
    model = DistributedDataParallel(module) if reduced else module
    trainer = SimpleNamespace(precision_plugin=None, global_step=6, current_epoch=0, model=model)
    callback = FiniteGuard()
    loss = model(torch.ones(1, 2)).sum() + (value if what == "loss" else 1.0)
    callback.on_before_backward(trainer, module, loss)
    loss.backward()
    if what == "behind":
        module.weight.grad.mul_(value)
    try:
        callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters(), lr=1))
    except (NumericsError, SystemExit) as error:
        return f"{type(error).__name__} {error}"


@pytest.mark.parametrize(("what", "reduced", "named"), [
    ("loss", True, "the loss alone"), ("loss", False, "the loss alone"),
    ("gradient", True, "weight.grad"), ("gradient", False, "the norm of the gradient alone"),
])
def test_a_non_finite_number_of_one_rank_stops_both(what, reduced, named):
    """Also of a gradient that DDP has not made the same on all ranks."""
    first, second = run_ranks(guard, what, reduced)
    behind_ddp = what == "gradient" and reduced            # where `solo.peers` sees to the one voice
    one_voice = "NumericsError non-finite gradient" if behind_ddp else "SystemExit 0"
    assert second.startswith(one_voice)
    assert first.startswith(f"NumericsError non-finite {what} of Linear at step 7 (epoch 1, lr 1; not finite: {named})")


def test_a_gradient_that_breaks_behind_the_sum_over_ranks_is_not_passed_over_in_silence():
    """By a hook of a method, or a bit that flips: its rank alone can see it."""
    first, second = run_ranks(guard, "behind", True)
    assert first is None and second.startswith("NumericsError non-finite gradient of Linear at step 7")


def facts(rank):
    agreement, signal = Agreement(), 15 * rank
    agreement.add("signal", lambda: signal)
    agreement.add("save", lambda: False)
    with Collectives() as sent:
        at_once = agreement.reach(loss=torch.tensor(rank == 0), gradient=torch.tensor(False))
    assert sent.names == {"all_gather_into_tensor": 1} and at_once == agreement.found
    agreement.send(loss=torch.tensor(True))         # of a batch that was only accumulated
    agreement.send(loss=torch.tensor(rank == 1))
    signal = 9                                      # too late for this step
    gather(torch.zeros(3))
    with Collectives() as sent:
        travelled = agreement.reach(loss=torch.tensor(True), gradient=torch.tensor(True))
    assert not sent.names and not dist._waiting
    return at_once, travelled, agreement.reach(loss=torch.tensor(False))


def test_all_that_ranks_tell_each_other_at_a_step_is_one_message_or_none():
    at_once = {"loss": [1, 0], "gradient": [0, 0], "signal": [0, 15], "save": [0, 0]}
    travelled = {"loss": [0, 1], "gradient": [1, 1], "signal": [0, 15], "save": [0, 0]}
    assert run_ranks(facts) == [(at_once, travelled, {"loss": [0, 0], "signal": [9, 9], "save": [0, 0]})] * 2


def sums(which):
    """Of the heaviest that travels and the lightest that does not: what they send when asked for, behind a gathering."""
    light, heavy = (torch.full((dist.LIGHT // 8 + more,), 2.0**which) for more in (0, 1))
    asked = sum_later(light), sum_later(heavy)
    gather(torch.zeros(2))
    with Collectives() as sent:
        found = [each().unique().tolist() for each in asked]
    return found, dict(sent.names)


def test_a_heavy_sum_is_reduced_by_itself():
    assert run_ranks(sums) == [([[3], [3]], {"all_reduce": 1})] * 2
