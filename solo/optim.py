"""Optimizers, parameter groups and learning-rate scaling."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from solo.errors import ConfigError
from solo.names import nearest
from solo.ranges import require
from solo.registry import Registry


def of_fewer(
    closure: Callable[[], Any] | None, optimizer: Optimizer, batch_idx: int, accumulated: int
) -> Callable[[], Any]:
    """The closure of a step, whose gradient is the mean over its batches also where an epoch leaves it fewer than
    ``accumulated``: Lightning divides by those of a whole step.

    Args:
        closure: forward and backward of the step's last batch.
        optimizer: whose parameters it moves.
        batch_idx: of that batch, in the epoch.
        accumulated: batches of a whole step.
    """
    rest = (batch_idx + 1) % accumulated

    def mean() -> Any:
        result = closure() if closure else None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if rest and gradients:
            torch._foreach_mul_(gradients, accumulated / rest)
        return result

    return mean


OPTIMIZERS: Registry[Callable[..., Optimizer]] = Registry("solo.optimizers")


@OPTIMIZERS.register("lars")
class LARS(Optimizer):
    """SGD whose gradient is rescaled per tensor to a fraction of the weight's norm (You et al. 2017, arXiv:1708.03888).

    For a weight p with gradient g: ``r = eta |p| / (|g| + wd |p| + eps)``, with ``clip_lr`` ``r = min(r / lr, 1)``;
    the step uses ``r (g + wd p)``. A zero p or g, and with ``exclude_bias_n_norm`` any tensor of one dimension, gets
    its plain gradient: no rescaling and no weight decay.

    SCE's LARS (and MoCo v3's) is ``decay_first, exclude_bias_n_norm, eps=0``: ``r = eta |p| / |g + wd p|``, and where that
    or p is zero, ``r = 1``.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: 0 keeps no buffer; the buffer starts as the first gradient.
        weight_decay: L2 coefficient.
        eta: trust coefficient.
        clip_lr: never exceed plain SGD's step.
        exclude_bias_n_norm: leave one-dimensional tensors alone.
        dampening: of the momentum.
        nesterov: Nesterov momentum.
        eps: added to the denominator.
        decay_first: the decay belongs to the gradient before its norm is taken.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        eta: float = 1e-3,
        clip_lr: bool = False,
        exclude_bias_n_norm: bool = False,
        dampening: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        decay_first: bool = False,
    ) -> None:
        if not 0 <= momentum < 1 or eta <= 0 or eps < 0:
            raise ValueError(f"momentum must be in [0, 1), eta positive, eps at least 0, got {momentum}, {eta} and {eps}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a momentum and no dampening")
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta, clip_lr=clip_lr,
                        exclude_bias_n_norm=exclude_bias_n_norm, dampening=dampening, nesterov=nesterov, eps=eps,
                        decay_first=decay_first)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; ``closure`` recomputes the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for options, params in self._alike():
            updates = self._scaled(params, options)
            if options["momentum"]:
                updates = self._with_momentum(params, updates, options)
            torch._foreach_add_(params, updates, alpha=-options["lr"])
        return loss

    def _alike(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """Parameters with a gradient, those of groups with the same options together: fewer and larger operations."""
        alike: dict[tuple[Any, ...], tuple[dict[str, Any], list[Tensor]]] = {}
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            if used:
                _, params = alike.setdefault(tuple(group.get(name) for name in self.defaults), (group, []))
                params += used
        return list(alike.values())

    @staticmethod
    def _scaled(params: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
        """The gradients, those of tensors that are not left alone decayed and rescaled; no host sync."""
        updates = [p.grad for p in params if p.grad is not None]
        chosen = [i for i, p in enumerate(params) if p.ndim != 1 or not options["exclude_bias_n_norm"]]
        if not chosen:
            return updates
        weights, gradients = [params[i] for i in chosen], [updates[i] for i in chosen]
        decay, first = options["weight_decay"], options["decay_first"]
        decayed = torch._foreach_add(gradients, weights, alpha=decay)
        p_norm = torch.stack(torch._foreach_norm(weights))                                              # [tensors]
        g_norm = torch.stack(torch._foreach_norm(decayed if first else gradients))                      # [tensors]
        ratio = p_norm / ((g_norm if first else g_norm + decay * p_norm) + options["eps"]) * options["eta"]
        if options["clip_lr"]:
            ratio = (ratio / options["lr"]).clamp(max=1)
        alone = torch.ones_like(ratio) if first else (g_norm != 0).to(ratio.dtype)  # a zero g gets no decay, a zero p has none
        factor = torch.where((p_norm > 0) & (g_norm > 0), ratio, alone)
        torch._foreach_mul_(decayed, list(factor.unbind()))
        for i, update in zip(chosen, decayed, strict=True):
            updates[i] = update
        return updates

    def _with_momentum(self, params: list[Tensor], updates: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
        states = [self.state[p] for p in params]
        old = [i for i, state in enumerate(states) if "momentum_buffer" in state]
        for i in set(range(len(params))) - set(old):
            states[i]["momentum_buffer"] = updates[i].clone()
        buffers: list[Tensor] = [state["momentum_buffer"] for state in states]
        if old:
            moved = [buffers[i] for i in old]
            torch._foreach_mul_(moved, options["momentum"])
            torch._foreach_add_(moved, [updates[i] for i in old], alpha=1 - options["dampening"])
        return list(torch._foreach_add(updates, buffers, alpha=options["momentum"])) if options["nesterov"] else buffers


@OPTIMIZERS.register("larc")
class LARC(LARS):
    """apex's LARC around SGD, as UniGrad's linear evaluation has it: `LARS` over every tensor, biases and norms included.

    Args:
        params: parameters or groups.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: L2 coefficient; a zero p or g gets none.
        trust_coefficient: eta of `LARS`.
        clip: never exceed plain SGD's step.
        eps: added to the denominator.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        clip: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay, trust_coefficient, clip, eps=eps)


OPTIMIZERS.register("sgd")(SGD)
OPTIMIZERS.register("adam")(Adam)
OPTIMIZERS.register("adamw")(AdamW)


@dataclass(kw_only=True)
class OptimizerConfig:
    """Optimizer of the method; ``lr`` and ``classifier_lr`` hold for a global batch of 256 and are scaled with it.

    ``kwargs`` go to the optimizer's class. ``momentum`` defaults to 0.9 where the optimizer has one.
    ``exclude_bias_n_norm_wd`` puts tensors of one dimension in groups without weight decay.
    """

    name: str = "lars"
    batch_size: int = 256
    lr: float = 0.4
    classifier_lr: float = 0.1
    weight_decay: float = 1e-5
    exclude_bias_n_norm_wd: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(
            self, positive="lr classifier_lr", at_least_0="weight_decay", at_least_1="batch_size",
            also=_kwargs_problems(self.name, self.kwargs),
        )


def _kwargs_problems(name: str, kwargs: Mapping[str, Any]) -> list[str]:
    try:
        parameters = inspect.signature(OPTIMIZERS[name]).parameters
    except (ConfigError, TypeError, ValueError) as error:
        return [f"name: {error}"]
    known = {key: parameter for key, parameter in parameters.items() if key not in ("params", "lr", "weight_decay")}
    problems = []
    for key, value in sorted(kwargs.items()):
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean optimizer.kwargs.{near}?" if near else f"{name} has {', '.join(sorted(known))}"
            problems.append(f"kwargs.{key} is unknown: {hint}")
        elif isinstance(known[key].default, bool) and not isinstance(value, bool):
            problems.append(f"kwargs.{key} must be true or false, got {value!r}")
        elif type(known[key].default) in (int, float) and (isinstance(value, bool) or not isinstance(value, (int, float))):
            problems.append(f"kwargs.{key} must be a number, got {value!r}")
    if not problems:
        try:
            _build(name, [{"params": [nn.Parameter(torch.zeros(1))]}], 1.0, 0.0, kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(f"kwargs do not suit {name}: {error}")
    return problems


def build(config: OptimizerConfig, groups: list[dict[str, Any]]) -> Optimizer:
    """The optimizer over groups made by `parameter_groups`."""
    return _build(config.name, groups, config.lr, config.weight_decay, config.kwargs)


def _build(name: str, groups: list[dict[str, Any]], lr: float, weight_decay: float, kwargs: Mapping[str, Any]) -> Optimizer:
    optimizer = OPTIMIZERS[name]
    default = {"momentum": 0.9} if "momentum" in inspect.signature(optimizer).parameters else {}
    return optimizer(groups, lr=lr, weight_decay=weight_decay, **{**default, **kwargs})


def states_per_parameter(config: OptimizerConfig) -> tuple[int, int]:
    """How many tensors the optimizer keeps for each parameter: of its size, as Adam's two moments, and others, as its step."""
    kwargs = {key: value for key, value in config.kwargs.items() if key not in ("capturable", "fused")}     # of a GPU's step
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    optimizer = build(replace(config, kwargs=kwargs), [{"params": [parameter]}])
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    of_its_size = sum(value.shape == parameter.shape for value in kept)
    return of_its_size, len(kept) - of_its_size


def scaled_lr(lr: float, global_batch: int) -> float:
    """Linear scaling rule: a rate stated for a batch of 256, at ``global_batch`` images per optimizer step."""
    return lr * global_batch / 256


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    options: Mapping[str, Mapping[str, Any]] = {},  # noqa: B006
    split_one_dimensional: bool = False,
) -> list[dict[str, Any]]:
    """One group per direct child that has parameters to train, named after it.

    Args:
        model: its children become groups; parameters without ``requires_grad`` are left out.
        lr: rate of every group that ``options`` do not change.
        weight_decay: likewise.
        options: child name -> ``{"lr": float}`` (taken as it is, never scaled), ``{"weight_decay": float}``,
            ``{"schedule": False}``.
        split_one_dimensional: a second group ``<name>_no_decay`` per child for tensors of one dimension.

    Raises:
        KeyError: an option names no child with parameters to train.
    """
    children = {name: [p for p in child.parameters() if p.requires_grad] for name, child in model.named_children()}
    children = {name: parameters for name, parameters in children.items() if parameters}
    if unknown := set(options) - set(children):
        raise KeyError(f"parameter options for {sorted(unknown)}, but the model trains {sorted(children)}")
    loose = [name for name, p in model.named_parameters(recurse=False) if p.requires_grad]
    if loose:
        raise KeyError(f"parameters {loose} belong to no submodule, so no optimizer group would train them")
    groups: list[dict[str, Any]] = []
    for name, parameters in children.items():
        base = {"lr": lr, "weight_decay": weight_decay, "schedule": True, **options.get(name, {})}
        if not split_one_dimensional:
            groups.append({"name": name, "params": parameters, **base})
            continue
        many = [p for p in parameters if p.ndim > 1]
        one = [p for p in parameters if p.ndim <= 1]
        groups += [{"name": name, "params": many, **base}] if many else []
        groups += [{"name": f"{name}_no_decay", "params": one, **base, "weight_decay": 0.0}] if one else []
    return groups
