"""Queue, teacher and heads against the official code's numbers and their own promises."""

import copy

import pytest
import torch
from torch import nn

from solo.methods.all4one import positional_code
from solo.nn import Momentum, Queue, Teacher, mlp, neighbour_accuracy

EXACT = {torch.float64: {"rtol": 1e-9, "atol": 1e-12}, torch.float32: {"rtol": 1e-5, "atol": 1e-6}}


def filled(keys, labels=None):
    queue = Queue(*keys.shape).to(keys.dtype)
    queue.keys.copy_(keys)
    if labels is not None:
        queue.labels.copy_(labels)
    return queue


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("number", [0, 1])
def test_nearest_equals_official(golden, number, dtype):
    z = golden(f"solo_util_nn_lookup_{number}")
    queue = filled(z["queue"].to(dtype), z["queue_y"])
    for k, expected in ((1, z["neighbours"][:, None]), (5, z["all4one_neighbours"])):
        neighbours, labels = queue.nearest(z["z"].to(dtype), k)
        torch.testing.assert_close(neighbours, expected.to(dtype), rtol=0, atol=0)
    assert torch.equal(labels, z["all4one_neighbour_label"])
    assert torch.equal(queue.nearest(z["z"].to(dtype))[1][:, 0], z["queue_y"][z["idx"]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_queue_equals_official_over_a_wrap(golden, dtype):
    z = golden("solo_util_queue")
    queue = filled(z["queue_0"].to(dtype), z["queue_y_0"])
    for i in (1, 2, 3):
        queue.push(z[f"push_{i - 1}"].to(dtype), z[f"push_y_{i - 1}"])
        queue.land()
        # The official push stores rows as given, ours normalises: the file's rows are unit to 1e-4.
        written = torch.nn.functional.normalize(z[f"queue_{i}"], dim=-1)
        torch.testing.assert_close(torch.nn.functional.normalize(queue.keys.double(), dim=-1), written, **EXACT[dtype])
        assert torch.equal(queue.labels, z[f"queue_y_{i}"])
        assert queue.pointer.item() == z[f"ptr_{i}"].item()


def test_a_query_never_finds_itself_before_landing():
    queue = Queue(64, 8)
    for _ in range(20):
        z = torch.randn(16, 8)
        queue.push(z, torch.arange(16))
        found = torch.nn.functional.cosine_similarity(queue.nearest(z)[0][:, 0], z)
        assert (found < 0.999).all()
        queue.land()
        assert torch.nn.functional.cosine_similarity(queue.nearest(z)[0][:, 0], z).allclose(torch.ones(16))


def test_the_shadow_follows_the_keys_whoever_writes_them(monkeypatch):
    monkeypatch.setattr("solo.nn.wants_shadow", lambda keys: True)
    queue = Queue(64, 8)
    queue.nearest(torch.randn(4, 8))
    shadow = queue._current_shadow()
    queue.push(torch.randn(16, 8), torch.arange(16))
    queue.land()
    assert queue._current_shadow() is shadow and torch.equal(shadow, queue.keys.bfloat16())         # moved, not made anew
    for write in (lambda: queue.load_state_dict(Queue(64, 8).state_dict()), lambda: queue.to(torch.float64).float(),
                  lambda: queue.keys.zero_()):
        write()
        assert torch.equal(queue._current_shadow(), queue.keys.bfloat16())
    queue.keys[3] = 1                                                       # and then a push before the next look-up
    queue.push(torch.randn(16, 8), torch.arange(16))
    queue.land()
    assert torch.equal(queue._current_shadow(), queue.keys.bfloat16())
    assert set(queue.state_dict()) == {"keys", "labels", "pointer"}
    assert torch.equal(copy.deepcopy(queue)._current_shadow(), queue.keys.bfloat16())
    for writes in range(2 * queue.keys._version + 2):      # as many as make a copy's keys look like those of the first
        other = copy.deepcopy(queue)
        for _ in range(writes):
            other.keys.copy_(Queue(*queue.keys.shape).keys)
        assert torch.equal(other._current_shadow(), other.keys.bfloat16()), writes


def test_no_shadow_where_no_search_reads_it():
    queue = Queue(64, 8)
    queue.nearest(torch.randn(4, 8))
    assert queue._current_shadow() is None


def test_queue_is_fifo_whatever_the_batch():
    queue, history = Queue(10, 4), []
    for step in range(9):
        z = torch.randn(3, 4)
        queue.push(z, torch.full((3,), step))
        queue.land()
        history += [step] * 3
    assert sorted(queue.labels.tolist()) == sorted(history[-10:])


def test_tau_equals_official(golden):
    z = golden("solo_util_momentum")
    for i, config in enumerate(z.params["tau_configs"]):
        momentum = Momentum(base_tau=config["base"], final_tau=config["final"])
        found = [momentum.tau(t / config["steps"]) for t in range(config["steps"] + 1)]
        assert found == pytest.approx(z[f"tau_{i}"].tolist(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_teacher_equals_official(golden, dtype):
    z = golden("solo_util_momentum")
    names = ("0.weight", "0.bias", "1.weight", "1.bias")
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to(dtype)
    ema = z.params["ema"]

    def load(t):
        student.load_state_dict({**student.state_dict(), **{name: z[f"online{t}_{name}"] for name in names}})

    load(0)
    teacher = Teacher(student, momentum=Momentum(base_tau=ema["base"], final_tau=ema["final"]))
    storage = [p.data_ptr() for p in teacher.parameters()]
    for t in range(1, ema["steps"] + 1):
        load(t)
        student[1].running_mean += 1
        teacher.update((t - 1) / ema["steps"])
        for name in names:
            torch.testing.assert_close(teacher.state_dict()[f"0.{name}"].double(), z[f"momentum{t}_{name}"], **EXACT[dtype])
    assert torch.equal(teacher[0][1].running_mean.double(), z["momentum_running_mean"])
    assert storage == [p.data_ptr() for p in teacher.parameters()]
    assert all(not p.requires_grad for p in teacher.parameters())


def test_teacher_keeps_its_own_batch_norm_statistics():
    student = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    teacher = Teacher(student, momentum=Momentum(base_tau=0.0))
    student(torch.randn(8, 3))
    teacher.update(0.0)
    assert torch.equal(teacher[0][1].running_mean, torch.zeros(2))
    assert not teacher(torch.randn(8, 3)).requires_grad


@pytest.mark.parametrize("dim", [16, 128, 256])
def test_positional_code_equals_official(golden, dim):
    torch.testing.assert_close(positional_code(5, dim).double(), golden("solo_util_posenc")[f"enc_{dim}"], rtol=0, atol=5e-6)


def test_mlp_shape():
    kinds = [type(layer).__name__ for layer in mlp(4, 8, 8, 2, last_norm=True)]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert [type(layer).__name__ for layer in mlp(4, 8, 2)] == ["Linear", "BatchNorm1d", "ReLU", "Linear"]

    biases = lambda head: [layer.bias is not None for layer in head if isinstance(layer, nn.Linear)]  # noqa: E731
    assert biases(mlp(4, 8, 8, 2)) == [True] * 3 and biases(mlp(4, 8, 8, 2, bias=False)) == [False] * 3
    assert biases(mlp(4, 8, 8, 2, bias=False, last_bias=True)) == [False, False, True]
    assert biases(mlp(4, 8, 8, 2, last_bias=False)) == [True, True, False]


@pytest.mark.parametrize("options, biases", [
    ({}, [True, True]),
    ({"bias": False}, [False, False]),
    ({"bias": False, "last_bias": True}, [False, True]),
    ({"last_bias": False}, [True, False]),
])
def test_mlp_biases(options, biases):
    assert [layer.bias is not None for layer in mlp(4, 8, 2, **options) if isinstance(layer, nn.Linear)] == biases


def test_mlp_last_norm_may_be_plain():
    first, last = (layer for layer in mlp(4, 8, 2, last_norm=True, last_affine=False) if isinstance(layer, nn.BatchNorm1d))
    assert first.affine and not last.affine


def test_neighbour_accuracy_leaves_unknown_out():
    assert neighbour_accuracy(torch.tensor([1, -1, 2, 3]), torch.tensor([1, 1, 0, -1])).item() == 0.5
    assert neighbour_accuracy(torch.tensor([-1]), torch.tensor([-1])).isnan()
