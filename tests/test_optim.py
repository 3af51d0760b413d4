"""LARS, schedules and parameter groups against the official code's numbers."""

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from solo import optim
from solo.errors import ConfigError
from solo.methods import All4One
from solo.nn import Momentum, mlp
from solo.optim import LARC, LARS, OptimizerConfig, parameter_groups, states_per_parameter
from solo.schedules import Ramp, SchedulerConfig, ends, learning_rate, value_at, warmup_cosine
from tests.methods.test_golden import Features

NAMES = ("weight", "bias", "bn_weight", "zero")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lars_equals_official(golden, dtype):
    z = golden("solo_util_lars")
    for c, combo in enumerate(z.params["combos"]):
        params = [z[f"p_{name}"].to(dtype).clone().requires_grad_() for name in NAMES]
        rates = combo.pop("lr_per_step", None) or [combo["lr"]] * 5
        optimizer = LARS(params, **combo)
        for step in range(5):
            optimizer.param_groups[0]["lr"] = rates[step]
            for p, name in zip(params, NAMES, strict=True):
                p.grad = z[f"g_{name}"][step].to(dtype).clone()
            optimizer.step()
            for p, name in zip(params, NAMES, strict=True):
                key = f"c{c}_step{step + 1}_{name}"
                if key in z:
                    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
                    torch.testing.assert_close(
                        p.detach().double(), z[key], rtol=tolerance, atol=tolerance * 1e-2, msg=f"{combo}: {key}"
                    )


def test_lars_defaults_are_published():
    defaults = LARS([torch.zeros(1, requires_grad=True)], lr=1.0).defaults
    assert defaults == {
        "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "eta": 1e-3, "clip_lr": False, "exclude_bias_n_norm": False,
        "dampening": 0.0, "nesterov": False, "eps": 1e-8, "decay_first": False,
    }


def test_warmup_cosine_equals_official(golden):
    z = golden("solo_util_warmup_cosine")
    for i, config in enumerate(z.params["configs"]):
        if config["warmup"] == 2.5:  # a published fault: see test_fractional_warmup_never_overshoots
            continue
        # Another: without warm-up all groups get the first one's rate, see test_no_warmup_keeps_each_groups_rate.
        for g, base in enumerate(config["lrs"] if config["warmup"] else config["lrs"][:1]):
            found = [
                warmup_cosine(t, config["total"], config["warmup"], base, config["start"], config["min_lr"])
                for t in range(config["total"] + 1)
            ]
            # The official value at step `total` is the next recursion; ours is the floor it aims at.
            assert found == pytest.approx(z[f"lr_{i}"][: config["total"] + 1, g].tolist(), rel=1e-8, abs=1e-12)


def test_no_warmup_keeps_each_groups_rate():
    assert [warmup_cosine(0, 8, 0, base, start=1e-5) for base in (1.0, 0.1)] == [1.0, 0.1]


def test_fractional_warmup_never_overshoots():
    rates = [warmup_cosine(t, 8, 2.5, 1.0, 0.0) for t in range(9)]
    assert max(rates) == 1.0 and rates[:3] == [0.0, pytest.approx(2 / 3), 1.0] and rates[-1] == pytest.approx(0)
    assert all(a >= b for a, b in zip(rates[2:], rates[3:], strict=False))


def test_step_schedule():
    config = SchedulerConfig(name="step", lr_decay_steps=[2, 4])
    assert [learning_rate(config, t, 60, 10, 1.0) for t in (0, 19, 20, 39, 40)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def names_of(groups, model):
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [
        {"name": g["name"], "weight_decay": g["weight_decay"], "params": [name_of[id(p)] for p in g["params"]]} for g in groups
    ]


def test_parameter_groups_equal_official(golden):
    z = golden("solo_util_param_groups")
    for i, run in enumerate(z.params["runs"]):
        model = {"simsiam": simsiam_like, "byol": byol_like, "all4one": all4one_like}[run["method"]](run)
        options = (
            model.param_options()
            if isinstance(model, All4One)
            else {"predictor": {"schedule": False}}
            if run["method"] == "simsiam"
            else {}
        )
        groups = parameter_groups(model, z.params["lr"], z.params["weight_decay"], options, run["exclude_bias_n_norm_wd"])
        # The official list begins with an empty backbone (here an identity) and the classifier, which is a callback of ours.
        official = [g for g in run["groups"] if g["params"] and not g["params"][0].startswith("classifier")]
        found = names_of(groups, model)
        assert [g["params"] for g in found] == [[renamed(p) for p in g["params"]] for g in official]
        assert [g["weight_decay"] for g in found] == [g["weight_decay"] for g in official]
        columns = [j for j, g in enumerate(run["groups"]) if g["params"] and not g["params"][0].startswith("classifier")]
        assert_rates(groups, z[f"lr_{i}"][:, columns], z.params)


def renamed(name):
    return name.replace("predictor2.", "centroid_predictor.").replace("transformer_encoder.", "transformer.")


def assert_rates(groups, official, params):
    epochs, steps = params["max_epochs"], len(official)
    config = SchedulerConfig(warmup_epochs=params["warmup_epochs"])
    for column, group in enumerate(groups):
        found = [
            learning_rate(config, t, steps, steps / epochs, group["lr"]) if group["schedule"] else group["lr"]
            for t in range(steps)
        ]
        # An un-scheduled group's official step 0 has the warm-up start value: a published fault.
        first = 0 if group["schedule"] else 1
        assert found[first:] == pytest.approx(official[first:, column].tolist(), rel=1e-8)


def simsiam_like(run):
    projector = nn.Sequential(
        *(
            nn.Linear(4, 4, bias=i == 2) if kind == "L" else nn.BatchNorm1d(4, affine=i < 2) if kind == "B" else nn.ReLU()
            for i, part in enumerate(("LBR", "LBR", "LB"))
            for kind in part
        )
    )
    projector[6].bias.requires_grad_(any("projector.6.bias" in g["params"] for g in run["groups"]))
    predictor = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
    return nn.ModuleDict({"projector": projector, "predictor": predictor})


def byol_like(run):
    return nn.ModuleDict({"projector": mlp(4, 4, 4), "predictor": mlp(4, 4, 4)})


def all4one_like(run):
    small = All4One.Config(proj_hidden_dim=8, proj_output_dim=8, pred_hidden_dim=8, queue_size=16, momentum=Momentum())
    return All4One(Features(8), small)


def test_groups_refuse_unknown_options_and_loose_parameters():
    model = nn.ModuleDict({"projector": nn.Linear(2, 2)})
    with pytest.raises(KeyError, match="predictor"):
        parameter_groups(model, 1.0, 0.0, {"predictor": {"lr": 1.0}})
    model.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(KeyError, match="scale"):
        parameter_groups(model, 1.0, 0.0)


def test_optimizer_config_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"did you mean optimizer.kwargs.clip_lr") as caught:
        OptimizerConfig(lr=-1, kwargs={"clip_lrr": True})
    assert "lr must be positive" in str(caught.value)
    with pytest.raises(ValueError, match="did you mean 'lars'"):
        OptimizerConfig(name="larss")
    assert issubclass(ConfigError, Exception)


def test_momentum_is_published_default():
    group = optim.parameter_groups(nn.ModuleDict({"a": nn.Linear(2, 2)}), 0.5, 0.0)
    assert optim.build(OptimizerConfig(name="sgd"), group).param_groups[0]["momentum"] == 0.9
    assert optim.build(OptimizerConfig(name="adamw"), group).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name, kind, options", [
    ("lars", LARS, {"eta": 1e-3, "decay_first": True, "exclude_bias_n_norm": True, "eps": 0.0}),   # SCE's
    ("larc", LARC, {"trust_coefficient": 1e-3}),
])
def test_published_variants_equal_official(golden, name, kind, options, dtype):
    z = golden(f"opt_{name}_small")
    w, b = (z[key].to(dtype).requires_grad_() for key in ("w0", "b0"))
    assert z.params["trust_coefficient"] == 1e-3
    common = {key: z.params[key] for key in ("lr", "momentum", "weight_decay")}
    optimizer = kind([w, b], **common, **options)
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5}[dtype]
    for step in range(4):
        w.grad, b.grad = z["grads_w"][step].to(dtype), z["grads_b"][step].to(dtype)
        optimizer.step()
        for found, official in ((w, z["w"][step]), (b, z["b"][step])):
            assert (found.detach().double() - official).abs().max() <= tolerance * official.abs().max()


def rules(p, g, lr, decay, trust, clip):
    """One step without momentum, number by number: SCE's LARS, and LARC."""
    p, g = p.flatten().tolist(), g.flatten().tolist()
    decayed = [x + decay * y for x, y in zip(g, p, strict=True)]
    p_norm, g_norm, d_norm = (sum(x * x for x in values) ** 0.5 for values in (p, g, decayed))
    lars = trust * p_norm / d_norm if p_norm and d_norm else 1.0
    larc = trust * p_norm / (g_norm + decay * p_norm + 1e-8)
    larc = min(larc / lr, 1.0) if clip else larc
    plain = not (p_norm and g_norm)
    return (
        [y - lr * lars * x for x, y in zip(decayed, p, strict=True)],
        [y - lr * (raw if plain else larc * x) for raw, x, y in zip(g, decayed, p, strict=True)],
    )


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("zero", ["none", "p", "g"])
def test_lars_and_larc_treat_decay_and_zeros_differently(zero, clip):
    torch.manual_seed(0)
    p, g = torch.randn(2, 3, 4, dtype=torch.float64)
    p, g = p * (zero != "p"), g * (zero != "g")
    expected = rules(p, g, 0.5, 0.1, 2.0, clip)
    lars, larc = (p.clone().requires_grad_() for _ in range(2))
    optimizers = (
        LARS([lars], 0.5, weight_decay=0.1, eta=2.0, decay_first=True, eps=0.0),
        LARC([larc], 0.5, weight_decay=0.1, trust_coefficient=2.0, clip=clip),
    )
    for found, optimizer, values in zip((lars, larc), optimizers, expected, strict=True):
        found.grad = g.clone()
        optimizer.step()
        assert found.detach().flatten().tolist() == pytest.approx(values, rel=1e-12)


PUBLISHED = {
    "sce_lr": {"warmup_start_lr": 0.0},
    "unigrad_lr": {"warmup_start_lr": 1e-3, "min_lr": 1e-3, "warmup_peak": "after", "cosine_over": "run"},  # lr x base rate
    "mvmr_lr": {"warmup_start_lr": 1e-6, "min_lr": 1e-6, "warmup_peak": "after"},
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_published_schedules_are_options(golden, size, name):
    z = golden(f"schedules_{size}")
    base, total, warmup = (z.params[key] for key in ("base_lr", "total_steps", "warmup_steps"))
    scale = base if name == "unigrad_lr" else 1.0
    options = {key: value * scale if key.endswith("_lr") else value for key, value in PUBLISHED[name].items()}
    config = SchedulerConfig(warmup_epochs=1, **options)
    found = [learning_rate(config, step, total, warmup, base) for step in range(total)]
    assert found == pytest.approx(z[name][:total].tolist(), rel=1e-10, abs=1e-15)
    # Beyond the last step MV-MR's restarts, which no step of ours sees.
    assert learning_rate(config, total + 3, total, warmup, base) == learning_rate(config, total, total, warmup, base)


def test_unigrads_momentum_is_ours(golden):
    for size in ("small", "medium"):
        z = golden(f"schedules_{size}")
        steps, momentum = z.params["total_steps"], Momentum(base_tau=z.params["base_momentum"])
        assert [momentum.tau(t / steps) for t in range(steps)] == pytest.approx(z["unigrad_momentum"].tolist(), rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_a_ramp_is_a_function_of_progress(shape):
    ramp = Ramp(start=0.04, end=0.06, share=0.4, shape=shape)
    assert [value_at(ramp, p) for p in (0.0, 0.2, 0.4, 1.0)] == pytest.approx([0.04, 0.05, 0.06, 0.06])
    quarter = {"linear": 0.045, "cosine": 0.06 - 0.02 * (1 + 0.5**0.5) / 2}[shape]
    assert value_at(ramp, 0.1) == pytest.approx(quarter)
    assert value_at(0.07, 0.5) == 0.07 and ends(ramp) == (0.04, 0.06) and ends(0.07) == (0.07,)


# --- all tensors at once ------------------------------------------------------------------------------------------------


def plain_lars(params, buffers, group):
    """One step of LARS, tensor by tensor, as its docstring says."""
    for p in params:
        g, decay = p.grad, group["weight_decay"]
        if p.ndim != 1 or not group["exclude_bias_n_norm"]:
            decayed = g.add(p, alpha=decay)
            norm = (decayed if group["decay_first"] else g).norm()
            ratio = p.norm() / ((norm if group["decay_first"] else norm + decay * p.norm()) + group["eps"]) * group["eta"]
            if group["clip_lr"]:
                ratio = (ratio / group["lr"]).clamp(max=1)
            if p.norm() > 0 and norm > 0:
                g = decayed * ratio
            elif group["decay_first"]:
                g = decayed
        buffers[p] = buffers[p].mul(group["momentum"]).add(g, alpha=1 - group["dampening"]) if p in buffers else g.clone()
        step = g.add(buffers[p], alpha=group["momentum"]) if group["nesterov"] else buffers[p]
        p.data = p.data.add(step, alpha=-group["lr"])


@pytest.mark.parametrize("options", [
    {"clip_lr": True, "exclude_bias_n_norm": True},
    {"exclude_bias_n_norm": True, "decay_first": True, "eps": 0.0},
    {"nesterov": True},
    {"dampening": 0.5, "clip_lr": True},
], ids=lambda options: "-".join(options))
def test_all_tensors_at_once_are_the_same_bits_as_one_by_one(options):
    torch.manual_seed(0)
    shapes = [(16, 3, 3, 3), (16,), (8, 16), (8,), (1, 5), (4, 4)]
    ours = [torch.randn(shape).requires_grad_() for shape in shapes]
    with torch.no_grad():
        ours[5].zero_()
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    groups = [{"params": ours[:2]}, {"params": ours[2:4], "lr": 0.05}, {"params": ours[4:]}]
    optimizer = LARS(groups, lr=0.3, momentum=0.9, weight_decay=1e-3, eta=0.02, **options)
    buffers = {}
    for step in range(5):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = None if (step, p.shape) == (0, (8,)) else torch.zeros_like(p) if p.shape == (1, 5) else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        optimizer.step()
        for group, params in zip(optimizer.param_groups, (theirs[:2], theirs[2:4], theirs[4:]), strict=True):
            plain_lars([q for q in params if q.grad is not None], buffers, group)
        assert all(map(torch.equal, ours, theirs)), step
        assert all(p.grad is q.grad or torch.equal(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True))


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but for views and bookkeeping; and what waits for the device."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_is_few_operations_and_waits_for_nothing():
    """A ResNet's 62 tensors in four groups of one rate; tensor by tensor it would be 15 operations for each."""
    model = timm.create_model("resnet18", num_classes=0)
    groups = [{"params": list(child.parameters())} for child in model.children() if list(child.parameters())]
    optimizer = LARS(groups, lr=0.3, momentum=0.9, weight_decay=1e-5, eta=0.02, clip_lr=True, exclude_bias_n_norm=True)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    with Operations() as seen:
        optimizer.step()
    assert len(seen.names) <= 40, seen.names
    assert not [name for name in seen.names if "_local_scalar_dense" in name or "is_nonzero" in name]


def test_a_loaded_state_steps_on():
    """torch adds defaults of its own to an optimizer whose state it has loaded."""
    p = torch.ones(2, 2, requires_grad=True)
    p.grad = torch.ones(2, 2)
    first, second = (LARS([p], lr=0.1, momentum=0.9, eta=0.02) for _ in range(2))
    first.step()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        expected = p - 0.1 * (0.9 * first.state[p]["momentum_buffer"] + 0.02 * p.norm() / 2 * p.grad)
    second.step()
    torch.testing.assert_close(p, expected)


@pytest.mark.parametrize(("optimizer", "kwargs", "states"), [
    ("lars", {}, (1, 0)), ("larc", {}, (1, 0)), ("larc", {"momentum": 0.0}, (0, 0)), ("sgd", {}, (1, 0)), ("adam", {}, (2, 1)),
    ("adamw", {}, (2, 1)), ("adamw", {"amsgrad": True}, (3, 1)), ("adamw", {"capturable": True}, (2, 1)),
])
def test_what_an_optimizer_keeps_of_each_parameter(optimizer, kwargs, states):
    assert states_per_parameter(OptimizerConfig(name=optimizer, kwargs=kwargs)) == states
