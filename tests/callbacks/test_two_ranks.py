"""Under two ranks the callbacks give what one process gives on the joined batch."""

from types import SimpleNamespace

import pytest
import torch

from solo.agreement import Agreement
from solo.bench.counts import Collectives
from solo.callbacks.health import FiniteGuard
from solo.callbacks.probe import OnlineProbe
from solo.dist import all_reduce, rank
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


def agreed_steps(parts, own_step=False):
    """The same in a run, three batches to an optimizer step; and the messages of the probe's own.

    ``own_step``: of a method whose `training_step` is its own and keeps no ``feats``.
    """
    agreement = Agreement()
    probe = OnlineProbe(dim=6, num_classes=CLASSES, lr=0.3, agreement=agreement)
    trainer = SimpleNamespace(global_step=0, estimated_stepping_batches=1)
    probe.on_train_start(trainer, None)
    counts = []
    for feats, labels in parts:
        method, batch = SimpleNamespace(feats=torch.ones(4, 6)), SimpleNamespace(labels=labels)
        probe.on_train_batch_start(trainer, method, batch, 0)
        if not own_step:
            method.feats = feats
        probe.on_after_backward(trainer, method)
        if len(counts) == 2:
            assert agreement.reach(loss=torch.tensor(rank() == 1))["loss"] == [0, 1]
        with Collectives() as seen:
            probe.on_train_batch_end(trainer, method, {"feats": feats}, batch, 0)
        counts.append(sum(seen.names.values()))
        assert len(agreement._sums) < 2         # those that were asked for are let go
    return [value.tolist() for value in probe.state_dict().values()], counts


def test_probe_equals_one_process_on_the_joined_batch():
    generator = torch.Generator().manual_seed(0)
    steps = [(torch.randn(8, 6, generator=generator), torch.tensor([0, 1, -1, -1, -1, 2, 1, 0])) for _ in range(3)]
    halves = [[(feats[4 * r : 4 * r + 4], labels[4 * r : 4 * r + 4]) for feats, labels in steps] for r in (0, 1)]
    ranks = run_ranks(lambda rank: (
        probe_steps(halves[rank]), agreed_steps(halves[rank]), agreed_steps(halves[rank], own_step=True)
    ))
    assert ranks[0] == ranks[1]
    alone, agreed, own = ranks[0]
    assert agreed == (alone, [1, 1, 0]) and own == (alone, [1, 1, 1])
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


def guard(rank):
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.zeros(1, 2)
    trainer = SimpleNamespace(precision_plugin=None, global_step=6, current_epoch=0)
    callback = FiniteGuard()
    callback.on_before_backward(trainer, module, torch.tensor(float("inf") if rank == 1 else 1.0))
    try:
        callback.on_before_optimizer_step(trainer, module, torch.optim.SGD(module.parameters(), lr=1))
    except (NumericsError, SystemExit) as error:
        return f"{type(error).__name__} {error}"


def test_a_non_finite_loss_on_one_rank_stops_both():
    first, second = run_ranks(guard)
    assert second == "SystemExit 0"     # one voice
    assert first.startswith("NumericsError non-finite loss of Linear at step 7 (epoch 1, lr 1; not finite: the loss alone)")


def facts(rank):
    agreement = Agreement()
    agreement.add("signal", lambda: 15 * rank)
    agreement.add("save", lambda: False)
    with Collectives() as sent:
        found = agreement.reach(loss=torch.tensor(rank == 0), gradient=torch.tensor(False))
    assert sent.names == {"all_reduce": 1} and found == agreement.found
    return found


def test_all_that_ranks_tell_each_other_at_a_step_is_one_message():
    assert run_ranks(facts) == [{"loss": [1, 0], "gradient": [0, 0], "signal": [0, 15], "save": [0, 0]}] * 2
