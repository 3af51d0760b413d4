"""Every form of UniGrad with and without teacher: the contract, official numbers through the method, its memories."""

import json

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn.functional import normalize

from solo.batch import Batch
from solo.errors import ConfigError
from solo.experiment import experiment
from solo.methods import UniGrad
from solo.methods.unigrad import CONSTANTS
from solo.nn import Correlation, Momentum, Teacher
from solo.testing import CHECKS, Case
from solo.testing import tiny as values
from tests.losses.test_losses import assert_gradient
from tests.losses.test_unigrad import TOLERANCE
from tests.methods.test_golden import Features, Targets

CHECK = {check.__name__: check for check in CHECKS}
FAST = ("every_parameter_learns", "state_is_whole")
SLOW = (
    "ranks_equal_one", "declares_what_it_gathers", "micro_batches_equal_one", "ranks_normalise_alone", "ranks_accumulate",
    "trains", "teachers_and_queues_advance_once_per_step", "bfloat16_is_close", "resumes_exactly",
)
COMBINATIONS = [(form, teacher) for form in CONSTANTS for teacher in (True, False)]
COMBINATIONS.remove(("unigrad", True))                      # test_contract.py has it, with every check


def case(form, teacher=True, **changes):
    kwargs = {"form": form, "proj_hidden_dim": 16, "proj_output_dim": 8, **({"queue_size": 32} if form == "moco" else {})}
    momentum = {} if teacher else {"momentum": None}
    return Case("unigrad", method_kwargs={**kwargs, **changes}, **momentum)


@pytest.mark.parametrize("form, teacher", COMBINATIONS)
@pytest.mark.parametrize("check", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_contract(form, teacher, check):
    CHECK[check](case(form, teacher))


# --- official numbers, through the method --------------------------------------------------------------------------------


def heads_only(dim, dtype, **kwargs):
    """The method whose projections are the views themselves."""
    model = UniGrad(Features(dim), UniGrad.Config(proj_hidden_dim=4, proj_output_dim=dim, **kwargs))
    model.projector = nn.Identity()
    return model.to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name, kwargs", [
    ("unigrad", {}),
    ("unigrad_byol_directpred", {"form": "byol_directpred", "eigen_every": 1}),
    ("unigrad_simclr", {"form": "simclr"}),
    ("unigrad_barlow", {"form": "barlow"}),
])
def test_steps_equal_official(golden, name, kwargs, dtype):
    g = golden(f"{name}_small")
    model = heads_only(16, dtype, **kwargs)
    for step in range(len(g["loss"])):
        views = [g[f"z{view}_raw"][step].to(dtype).requires_grad_() for view in (1, 2)]
        model.teacher = Targets(views, [g[f"z{view}m_raw"][step].to(dtype) for view in (1, 2)])
        labels = torch.zeros(len(views[0]), dtype=torch.long)
        outputs = model.losses(Batch(views, labels, labels))
        outputs["loss"].backward()
        model.after_step(0.0)
        value, gradient = TOLERANCE[dtype]
        assert outputs["pos_sim"].item() == pytest.approx(g["pos_sim"][step].item(), rel=value)
        for view in range(2):
            assert_gradient(views[view].grad, g[f"grad_z{view + 1}_raw"][step], gradient)
        if "F" in g:
            (memory,) = (module for module in model.modules() if isinstance(module, Correlation))
            assert_gradient(memory.value, g["F"][step], value)


def test_the_loss_is_the_objective_and_not_the_carrier():
    model, batch = case("unigrad").build().double(), case("unigrad").batches(1)[0]
    seen = []
    model.projector.register_forward_hook(lambda module, args, output: seen.append(normalize(output.detach(), dim=1)))
    model.teacher.register_forward_hook(lambda module, args, output: seen.append(normalize(output, dim=1)))
    outputs = model.losses(batch._replace(views=[view.double() for view in batch.views]))
    z1, z2, m1, m2 = seen
    F = torch.cat([m1, m2]).T @ torch.cat([m1, m2]) / 16
    expected = sum((-(z * m).sum(1) + 50 * ((z @ F) * z).sum(1)).mean() for z, m in ((z1, m2), (z2, m1))) / 2
    assert outputs["loss"].item() == pytest.approx(expected.item(), rel=1e-12)


# --- memories ------------------------------------------------------------------------------------------------------------


def by_hand(m1, m2):
    rows = normalize(torch.cat([m1, m2]), dim=1)
    return rows.T @ rows / len(rows)


def test_correlation_moves_once_per_step_by_the_mean_of_the_micro_batches():
    torch.manual_seed(0)
    memory, F = Correlation(4, 0.9).double(), None
    for micro_batches in (1, 3, 2):
        seen = []
        for m1, m2 in torch.randn(micro_batches, 2, 6, 4, dtype=torch.float64):
            seen.append(by_hand(m1, m2))
            used = memory(m1, m2)
            torch.testing.assert_close(used, seen[-1] if F is None else 0.9 * F + 0.1 * seen[-1], rtol=1e-12, atol=1e-15)
            if F is not None:
                torch.testing.assert_close(memory.value, F, rtol=1e-12, atol=1e-15)
        memory.after_step(0.0)
        mean = sum(seen) / micro_batches
        F = mean if F is None else 0.9 * F + 0.1 * mean
        torch.testing.assert_close(memory.value, F, rtol=1e-12, atol=1e-15)
        assert memory.value.trace().item() == pytest.approx(1)
    before = memory.value.clone()
    memory.after_step(0.0)                                   # a step that saw nothing moves nothing
    assert torch.equal(memory.value, before) and memory.steps == 3


def test_correlation_is_float32_under_autocast():
    torch.manual_seed(0)
    m1, m2 = torch.randn(2, 64, 8).bfloat16()
    memory, exact = Correlation(8, 0.99), Correlation(8, 0.99)
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            used = memory(m1, m2)
            memory.after_step(0.0)
        assert torch.equal(used, exact(m1.float(), m2.float())) and used.dtype == torch.float32
        exact.after_step(0.0)


@pytest.mark.slow
def test_correlation_in_a_run_of_mixed_precision():
    settings = {"max_epochs": 1, "precision": "bf16-mixed", "accumulate_grad_batches": 2}
    state = case("byol_directpred").train(backbone={"stem": "small"}, **settings)["state_dict"]     # stem: see test_cli.py
    assert state["predictor.steps"] == 4
    assert {state[f"predictor.{name}"].dtype for name in ("value", "W", "largest")} == {torch.float32}
    assert state["predictor.value"].trace().item() == pytest.approx(1, abs=1e-5)


def test_eigendecomposition_every_n_steps():
    model = heads_only(4, torch.float64, form="byol_directpred", eigen_every=3, momentum=None)
    torch.manual_seed(0)
    predictors = []
    for _ in range(7):
        W, A = model.predictor(*torch.randn(2, 9, 4, dtype=torch.float64))
        predictors.append(W.clone())
        model.after_step(0.0)
    changed = [not torch.equal(a, b) for a, b in zip(predictors, predictors[1:], strict=False)]
    assert changed == [False, False, True, False, False, True]


def test_teacher_is_the_published_one_with_the_tau_of_a_step_earlier():
    """Published: inside forward, before the targets, with tau(t / T). Ours: after the step, with the progress before it."""
    torch.manual_seed(0)
    momentum, total = Momentum(base_tau=0.996), 8
    online = nn.Linear(3, 2)
    teacher = Teacher(online, momentum=momentum)
    published = online.weight.detach().clone()
    for t in range(total):
        if t:                                                # at t = 0 both are the same weights: nothing to average
            tau = momentum.tau((t - 1) / total)
            published = tau * published + (1 - tau) * online.weight.detach()
        torch.testing.assert_close(teacher[0].weight, published)
        with torch.no_grad():
            online.weight.add_(torch.randn(2, 3))            # the optimizer's step
        teacher.after_step(t / total)


# --- configuration -------------------------------------------------------------------------------------------------------


def test_momentum_null_reaches_the_config_and_survives_a_runs_own_json(tmp_path):
    absent = experiment(values("unigrad", tmp_path))
    null = experiment(values("unigrad", tmp_path, momentum=None))
    assert absent.method_kwargs.momentum == Momentum(base_tau=0.996) and null.method_kwargs.momentum is None
    assert absent.run_dir(8) != null.run_dir(8)
    for config in (absent, null):
        again = experiment(json.loads(json.dumps(config.to_json())))
        assert again.method_kwargs == config.method_kwargs and again.run_dir(8) == config.run_dir(8)


def test_a_block_of_momentum_keeps_the_methods_other_value(tmp_path):
    config = experiment(values("unigrad", tmp_path, momentum={"final_tau": 0.999}))
    assert config.method_kwargs.momentum == Momentum(base_tau=0.996, final_tau=0.999)


@pytest.mark.parametrize("method, kwargs, momentum, line", [
    ("all4one", {}, None, "momentum=null would take the teacher away, and all4one does not work without one"),
    ("unigrad", {"cutmix": 1.0}, None, "method_kwargs.cutmix needs a teacher"),
    ("unigrad", {"form": "simclr", "lambda_": 3.0}, {},
     "method_kwargs.lambda_=3.0 means nothing to form=simclr, which has temperature"),
    ("unigrad", {"form": "moco", "lambda_": 3.0}, {}, "form=moco, which has temperature, queue_size"),
    ("unigrad", {"rho": 1.5}, {}, "method_kwargs.rho must lie between 0 and 1, got 1.5"),
    ("unigrad", {"form": "byol_directpred", "eigen_every": 0}, {}, "eigen_every must lie between 1 and inf, got 0"),
    ("unigrad", {"form": "byol"}, {}, "method_kwargs.form must be one of unigrad, simclr"),
    ("unigrad", {"proj_output_dim": 0}, {}, "method_kwargs.proj_output_dim must be at least 1, got 0"),
    ("unigrad", {"cutmix": -1.0}, {}, "method_kwargs.cutmix must be at least 0, got -1.0"),
])
def test_what_cannot_train_is_one_line(tmp_path, method, kwargs, momentum, line):
    with pytest.raises(ConfigError) as error:
        experiment(values(method, tmp_path, method_kwargs=kwargs, momentum=momentum))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_constants_are_the_forms_own():
    config = UniGrad.Config(form="barlow")
    assert config.constants == {"lambda_": 50.0} and config.rho is None and UniGrad.Config().lambda_ == 100.0
    assert UniGrad.Config(lambda_=10.0).constants == {"lambda_": 10.0, "rho": 0.99}


def test_published_projector():
    with torch.device("meta"):
        model = UniGrad(Features(2048), UniGrad.Config())
    assert sum(p.numel() for p in model.projector.parameters()) == 12_593_152


def test_what_is_logged():
    """The last step's numbers, under the names that `losses` gives them."""
    seen, returned = [], []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            returned.append({name: value.item() for name, value in outputs.items() if value.numel() == 1})

        def on_train_end(self, trainer, pl_module):
            seen.append(next(c.last for c in trainer.callbacks if type(c).__name__ == "MetricsLogger"))

    case("unigrad").train(Watch(), max_epochs=1)
    names = ("loss", "pos_sim", "positive_norm", "negative_norm")
    assert [seen[0][name] for name in names] == pytest.approx([returned[-1][name] for name in names], rel=1e-6)
    assert {"tau", "lr"} <= set(seen[0]) and seen[0]["positive_norm"] == pytest.approx(1)
