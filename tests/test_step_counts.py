"""What a training step costs in things that can be counted, so that no noise can excuse more of them."""

import gc
import resource
from collections import Counter
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.profilers import SimpleProfiler

from solo import dist, optim
from solo.backbones import BackboneConfig, build
from solo.batch import Batch
from solo.batching import ViewBatching
from solo.bench.counts import Collectives, Operations, Steps, Waits, search_of_a_gpu
from solo.bench.ranks import messages, of_a_run
from solo.bench.step import count, lars
from solo.data.module import DataModule
from solo.devices import settle
from solo.dist import Later, gather, gather_packed, rank
from solo.methods import METHODS
from solo.nn import Momentum, Queue, Teacher
from solo.profiler import NoProfiler
from solo.run import _trainer
from solo.testing.case import Case
from solo.testing.ranks import run_ranks

CIFAR = {"eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True}


@pytest.fixture(autouse=True)
def on_a_gpu():
    """The counts are of what a GPU is given."""
    with search_of_a_gpu():
        yield


def cifar(method, mode):
    """The published networks of a CIFAR recipe, and one optimizer step of them on few images."""
    torch.manual_seed(0)
    model = METHODS[method](build(BackboneConfig(), 3, 32), METHODS[method].Config(queue_size=16))
    model.each = ViewBatching(mode)
    optimizer = optim.LARS(optim.parameter_groups(model, 0.4, 1e-5, model.param_options()), lr=0.4, momentum=0.9, **CIFAR)
    batch = Batch([torch.randn(2, 3, 32, 32) for _ in range(2)], torch.arange(2), torch.arange(2))

    def step():
        optimizer.zero_grad()
        model.losses(batch)["loss"].backward()
        optimizer.step()
        model.after_step(0.5)

    return step


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most"), [("nnclr", 400), ("all4one", 1100)])
def test_operations_of_a_step(method, most):
    step = cifar(method, "concat")
    step()
    with Operations() as seen, Waits() as waits:
        step()
    assert seen.kernels <= most, seen.names.most_common()
    assert not waits.names and not seen.names["aten::_local_scalar_dense"]


@pytest.mark.slow
def test_the_bench_counts_the_same():
    found = {row.what: row.value for row in count("nnclr")}
    assert found["nnclr, concat: waits of a step"] == found["nnclr, separate: waits of a step"] == 0
    assert found["nnclr, concat: operations of a step"] <= 460 < found["nnclr, separate: operations of a step"]


def test_a_teacher_follows_in_one_operation_and_in_place():
    student = build(BackboneConfig(), 3, 32)
    teacher = Teacher(student, momentum=Momentum())
    before = [p.data_ptr() for p in teacher.parameters()]
    with Operations() as seen:
        teacher.after_step(0.5)
    assert seen.kernels == 1 and before == [p.data_ptr() for p in teacher.parameters()]


# --- a whole run ---------------------------------------------------------------------------------------------------------


def run(case, folder, callbacks, **changes):
    """The trainer of a run, the method and the images."""
    config = case.experiment(folder, **changes)
    arguments, processes = settle(config.trainer)
    method = case.build()
    data = DataModule(config.data, config.augmentations, config.optimizer.batch_size, config.seed)
    return _trainer(config, arguments, folder, data, method, config.optimizer.batch_size * processes, callbacks), method, data


def fit(case, folder, counters, **changes):
    """A run with all its callbacks; the last of several epochs may follow the process group of the test."""
    steps = Steps(*counters)
    trainer, method, data = run(case, folder, [steps], **changes)
    trainer.fit(method, data)
    return steps


def test_hooks_are_profiled_only_where_that_is_asked_for(tmp_path):
    for asked, kind in ({}, NoProfiler), ({"profiler": "simple"}, SimpleProfiler):
        assert type(run(Case("nnclr"), tmp_path, [], **asked)[0].profiler) is kind


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nnclr", "all4one"])
def test_a_run_waits_once_a_step_and_for_its_metrics_once_an_interval(method, tmp_path):
    """The one wait is for `FiniteGuard`, which lets no update happen on numbers that are not finite."""
    waits = Waits()
    with waits:
        steps = fit(Case(method), tmp_path, [waits], log_every_n_steps=4, max_epochs=2, health={"enabled": False})
    for step in (1, 2, 9, 10):
        (found,) = steps.between(step, step + 1)
        assert found == {"tolist": 1}, (step, found)
    (found,) = steps.between(3, 4)
    assert found["tolist"] == 2 and found == steps.between(11, 12)[0], found         # as late as early


def _two(_, folder, method):
    """Collectives and waits of this rank's steps in an epoch of 20; a report comes after every fourth."""
    with Collectives() as messages, Waits() as waits:
        changes = {"data": {"train_size": 320}, "log_every_n_steps": 4, "health": {"every": 1000}}
        steps = fit(Case(method), folder / str(rank()), [messages, waits], max_epochs=1, devices=2, **changes)
    return [steps.between(step, step + 1) for step in range(19)]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nnclr", "all4one"])
def test_collectives_of_a_step(method, tmp_path):
    """The rows of the loss and of the queue together and, backwards, one number for each row, with which the `Agreement`
    travels, for which alone a step waits, and the probe's gradient. A report adds one for all metrics together.
    """
    for steps in run_ranks(_two, tmp_path, method):
        for number, (sent, waits) in enumerate(steps):
            reports = number % 4 == 3
            assert sent == Counter(all_gather_into_tensor=2, all_reduce=int(reports)), number
            assert waits == {"tolist": 1 + reports}, number


@pytest.mark.slow
def test_the_bench_counts_those_of_a_run_too():
    assert (of_a_run("nnclr").what, of_a_run("nnclr").value) == ("nnclr: collectives of a run's step on 2 ranks", 2)


@pytest.mark.slow
def test_what_an_image_costs_between_ranks_does_not_depend_on_their_number():
    """Once each for both views: the rows and the keys; the queue's row and its label; backwards, one number."""
    found = {entry.what.removeprefix("nnclr: "): entry.value for entry in messages("nnclr")}
    for world in (2, 4):
        assert found[f"collectives of a step on {world} ranks"] == 2
        of_an_image = 2 * (256 + 256) * 4 + 256 * 4 + 8 + 2 * 4
        assert found[f"gathered by a rank for an image of the global batch on {world} ranks"] == of_an_image


@pytest.mark.slow
def test_the_bench_finds_lars_in_few_operations_and_equal_to_that_of_one_tensor_after_the_other():
    operations, difference = lars()
    assert operations.value <= 40 < operations.peer_value and difference.value == 0


def _packed(which):
    x = torch.arange(6, dtype=torch.float64).view(3, 2) + 10 * which
    labels, flags = torch.arange(3) - which, torch.tensor([True, False, which == 1])
    with Collectives() as messages:
        found = gather_packed(x, labels, flags)
    assert sum(messages.names.values()) == 1
    return [part.tolist() for part in found]


def test_one_collective_for_tensors_of_any_types():
    first, second = run_ranks(_packed)
    assert first == second == [
        [[0, 1], [2, 3], [4, 5], [10, 11], [12, 13], [14, 15]], [0, 1, 2, -1, 0, 1], [True, False, False, True, False, True]
    ]


def _one_row(which):
    x, later = torch.arange(4.0).view(1, 4) + 10 * which, Later(torch.tensor([which]))
    return gather_packed(x[:, 2])[0].tolist(), later()[0].tolist()


def test_one_number_with_a_stride_takes_others_along():
    assert run_ranks(_one_row) == [([2, 12], [0, 1])] * 2


def _with_the_next(which):
    """What waits, and the messages: of a gathering that takes two along, of answers that are there, of one that is not."""
    keys, labels, more = torch.randn(3, 2) + 10 * which, torch.arange(3) - which, torch.full((3,), 7 + which)
    first, second, dropped = Later(keys, labels), Later(more), Later(keys)
    del dropped
    x = (torch.arange(2.0)[:, None] + 10 * which).requires_grad_()
    with Collectives() as messages:
        gather(torch.zeros(0, 2))
        assert first.found is None          # nothing takes nobody along
        counts = []
        for act in (lambda: gather(x), first, second, lambda: Later(more)()):
            found = act()
            counts.append(sum(messages.names.values()))
            if x.grad is None:
                found.square().sum().backward()
                messages.names.clear()
    return counts, x.grad.tolist(), [part.tolist() for part in (*first(), *second(), *found)], keys.tolist()


def test_rows_that_wait_travel_with_the_next_however_many_they_are():
    (counts, grad, found, mine), (others, other_grad, same, theirs) = run_ranks(_with_the_next)
    assert counts == others == [2, 0, 0, 1] and found == same
    assert found == [mine + theirs, [0, 1, 2, -1, 0, 1], [7] * 3 + [8] * 3, [7] * 3 + [8] * 3]
    assert (grad, other_grad) == ([[0], [4]], [[40], [44]])


def test_in_one_process_nothing_waits():
    queue = Queue(8, 2)
    for _ in range(3):
        queue.push(torch.randn(4, 2), torch.arange(4))
        queue.land()
    assert not dist._waiting and queue.labels.tolist() == [0, 1, 2, 3] * 2


def _left_over(which):
    left = Later(torch.zeros(3, 2)) if which else None
    Case("nnclr").build().on_fit_start()
    return gather(torch.full((3,), which)).tolist(), left is None or left.found is None


def test_what_a_broken_run_left_on_one_rank_is_not_sent():
    assert run_ranks(_left_over) == [([0] * 3 + [1] * 3, True)] * 2


# --- a long run ----------------------------------------------------------------------------------------------------------


class Memory(pl.Callback):
    """Live tensors, and the process's memory in KiB, every 500 steps."""

    def __init__(self):
        self.tensors, self.resident = [], []

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 500 == 0:
            gc.collect()
            self.tensors.append(sum(type(thing) in (torch.Tensor, torch.nn.Parameter) for thing in gc.get_objects()))
            self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1024)


@pytest.mark.slow
@pytest.mark.alone      # the first of these: memory that other tests gave back is no memory of this one
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads the memory from /proc")
def test_nothing_grows_over_two_thousand_steps(tmp_path):
    memory = Memory()
    sizes = {"max_epochs": 6, "data": {"train_size": 4000}, "limit_val_batches": 0, "log_every_n_steps": 50}
    trainer, method, data = run(Case("nnclr"), tmp_path, [memory], loggers=[], **sizes)
    trainer.fit(method, data)
    assert len(memory.tensors) == 6 and memory.tensors[1] == memory.tensors[-1], memory.tensors
    assert memory.resident[-1] - memory.resident[1] < 1024, memory.resident      # the first thousand settle the allocator
