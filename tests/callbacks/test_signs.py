"""Each way not to learn, forced on a method that works: one warning that names the cause, or the end of the run."""

import re

import pytest
import pytorch_lightning as pl
import torch

from solo.callbacks.health import HealthConfig
from solo.callbacks.signs import jump, own_neighbours
from solo.errors import NumericsError, reported
from solo.experiment import experiment
from solo.nn import Momentum, Queue, Teacher
from solo.run import pretrain
from solo.testing import tiny

pytestmark = pytest.mark.filterwarnings("ignore")
HEALTH = {"every": 1, "patience": 2}


class Forced(pl.Callback):
    """Changes the method before it trains."""

    def __init__(self, change):
        self.change = change

    def on_fit_start(self, trainer, pl_module):
        self.change(pl_module)


def train(folder, method, change=None, **changes):
    quick = {"health": HEALTH, "max_epochs": 1, "loggers": [], "probe": {"enabled": False}}
    config = experiment(tiny(method, folder, **{**quick, **changes}))
    pretrain(config, [Forced(change)] if change else [])


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "solo.callbacks.health"]


def constant(module, inputs, output):
    return 0 * output + torch.arange(1.0, output.shape[-1] + 1)


def constant_features(method):
    method.backbone.register_forward_hook(constant)


def features_on_a_line(method):
    method.backbone.register_forward_hook(lambda module, inputs, output: output[:, :1] * torch.ones_like(output) + 1)


def constant_projector(method):
    method.projector.register_forward_hook(constant)


def constant_heads(method):
    for module in (method.predictor, method.teacher):
        module.register_forward_hook(constant)


def constant_predictor(method):
    method.predictor.register_forward_hook(constant)


def frozen_backbone(method):
    method.backbone.requires_grad_(False)


def searches_its_own_batch(method):
    push = method.queue.push

    def pushed(z, labels):
        push(z, labels)
        method.queue.land()

    def nearest(z, k=1, search=method.queue.nearest):
        pushed(z, torch.zeros(len(z), dtype=torch.long))
        return search(z, k)

    method.queue.nearest = nearest


MOMENTUM_0, MOMENTUM_1 = {"base_tau": 0.0, "final_tau": 0.0}, {"base_tau": 1.0, "final_tau": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "change", "changes", "words"),
    [
        ("nnclr", constant_features, {}, "has collapsed"),
        ("nnclr", features_on_a_line, {}, "dimensional collapse"),
        ("simclr", constant_projector, {}, r"loss stays at ln 15 = 2.71, .*a projector that gives every image the same"),
        ("nnclr", constant_predictor, {}, r"loss stays at ln 8 = 2.08"),
        ("sce", constant_heads, {}, r"loss stays at ln 33 = 3.50"),
        ("nnclr", frozen_backbone, {}, "no weight of the backbone moves.*frozen"),
        ("sce", None, {"momentum": MOMENTUM_0}, "teacher is its student.*base_tau 0"),
        ("sce", None, {"momentum": MOMENTUM_1}, "teacher stands still.*base_tau 1"),
        ("sce", lambda method: [weight.data.mul_(30) for weight in method.teacher.parameters()],
         {"momentum": {"base_tau": 0.9999}}, r"2\d times .*base_tau too near 1, optimizer.lr too high"),
        ("nnclr", searches_its_own_batch, {}, "100% of the neighbours in the queue are the very images"),
        ("all4one", searches_its_own_batch, {}, "100% of the neighbours in the queue are the very images"),
    ],
)
def test_each_sign_is_told_once(tmp_path, caplog, method, change, changes, words):
    train(tmp_path, method, change, **changes)
    lines = told(caplog)
    assert sum(bool(re.search(words, line)) for line in lines) == 1, lines
    assert len(set(lines)) == len(lines)


def a_second_of_each(method):
    """Another teacher that is its student, and another queue that is searched with what it holds."""
    second = {"still": Teacher(method.projector, momentum=Momentum(base_tau=0.0, final_tau=0.0)), "full": Queue(32, 8)}
    for name, module in second.items():
        method.add_module(name, module)
    lookup = torch.nn.functional.normalize(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    second["full"].lookup = lookup, lookup


@pytest.mark.slow
def test_each_teacher_and_each_queue_is_measured_and_named(tmp_path, caplog):
    """Whichever comes last: the method's own, which learn, say nothing."""
    for first in (False, True):
        caplog.clear()

        def change(method, first=first):
            a_second_of_each(method)
            if first:
                own = [(name, method._modules.pop(name)) for name in ("teacher", "queue")]
                method._modules.update(own)

        train(tmp_path / str(first), "all4one", change, loggers=["csv"], health={**HEALTH, "plateau": 0.001})
        assert [line.partition(".")[0] for line in told(caplog)] == [
            "the teacher still is its student: it teaches nothing",
            "100% of the neighbours in the queue full are the very images that asked for them",
        ]
        (logged,) = tmp_path.glob(f"{first}/*/csv/version_0/metrics.csv")
        columns = set(logged.read_text().splitlines()[0].split(","))
        assert {f"train/{what}/{name}" for what, name in (
            ("teacher_distance", "teacher"), ("teacher_distance", "still"), ("own_neighbours", "queue"),
            ("own_neighbours", "full"), ("tau", "teacher"), ("tau", "still"))} <= columns


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nnclr", "all4one", "sce", "simclr"])
def test_a_method_as_it_is_shows_none(tmp_path, caplog, method):
    train(tmp_path, method, health={**HEALTH, "plateau": 0.001})
    assert not told(caplog)


@pytest.mark.parametrize("change", [constant_features, frozen_backbone, searches_its_own_batch])
def test_stop_on_collapse_ends_the_run_with_4(tmp_path, capsys, change):
    with pytest.raises(SystemExit) as ended, reported():
        train(tmp_path, "nnclr", change, health={**HEALTH, "stop_on_collapse": True})
    assert ended.value.code == NumericsError.exit_code == 4
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("numerics error: ") and lines[-1].endswith("(health.stop_on_collapse)")


def test_neighbours_of_one_point_are_not_their_own():
    z = torch.nn.functional.normalize(torch.randn(16, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert own_neighbours(z, z) == 1 and own_neighbours(z, z.flip(0)) == 0
    point = z[:1].expand(16, 8)
    assert own_neighbours(point, point) == 0


class Damaged(pl.Callback):
    """Makes the loss of one step ten times as large."""

    def __init__(self, step):
        self.step = step

    def on_fit_start(self, trainer, pl_module):
        losses = pl_module.losses

        def larger(batch):
            outputs = losses(batch)
            return {**outputs, "loss": outputs["loss"] * (10 if trainer.global_step == self.step else 1)}

        pl_module.losses = larger


@pytest.mark.slow
def test_a_jump_of_the_loss_is_told_with_step_and_factor(tmp_path, caplog):
    config = experiment(tiny("nnclr", tmp_path, health={"every": 4}, max_epochs=4, loggers=[], accumulate_grad_batches=2))
    pretrain(config, [Damaged(14)])
    (line,) = [line for line in told(caplog) if "jumped" in line]
    step, factor = re.search(r"at step (\d+), ([\d.]+) times", line).groups()
    assert int(step) == 15 and float(factor) > 5
    assert any(tmp_path.glob("*/last.ckpt"))


def test_jumps_are_relative_to_the_median_before():
    assert jump([2.0] * 20 + [2.1, 9.0, 2.0], 20) == (21, 4.5, 2.0)
    assert jump([2.0] * 20, 20)[1] == 0                                     # too few
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    assert jump(noise, 100)[1] < 2                                          # around 0, nothing jumps


def test_config_refuses():
    with pytest.raises(ValueError, match=r"max_own .*\nspike must be above 1"):
        HealthConfig(max_own=-1, spike=1)
