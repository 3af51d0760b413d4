"""A step is the same step however it is run: over ranks, over micro-batches, over both, or in parts. All in float64.

What must be the same: the loss, every parameter's gradient, and all that an optimizer step moves (`StepModule`: teachers,
queues, correlations). A method says how far that goes: `Method.gathers`, `Method.local_terms`.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from solo.batch import Batch
from solo.batching import ViewBatching
from solo.methods import Method
from solo.nn import Queue, StepModule
from solo.testing.advance import advances_once_per_step
from solo.testing.case import Case
from solo.testing.compare import Absent, Differs, Measured, double, of, require, within
from solo.testing.ranks import run_ranks
from solo.testing.uneven import ranks_share_uneven_images

Values = dict[str, Tensor]
_BOUND = 1e-8
_PASSES = 1e-10         # of `micro_batch`: the same sums in another order, without another process or normalisation
_SPEAK = {
    "none": "no image's loss depends on another image of the step",
    "keys": "each image is compared with every other one of the step",
    "statistics": "an image's loss depends on means over the step's images",
}


def declares_what_it_gathers(case: Case) -> Measured | None:
    """``gathers`` says how the loss, without its local terms, depends on the other images of a step.

    With ``none``, a batch is the mean of its parts. Otherwise each image k times over has the same statistics but k times
    as many keys: from 8 to 16 to 32 times, the loss settles with the one and goes on growing with the other.
    """
    batch = _images(case, 4)
    whole = _step(_model(case), [batch])
    found, measured = "none", None
    try:
        halves = _step(_model(case), [_part(batch, i, 2) for i in range(2)])
        measured = within(_shared(whole), _shared(halves), "in two parts", _BOUND)
    except Differs:
        a, b, c = (float(_step(_model(case), [_repeated(batch, times)])["loss"]) for times in (8, 16, 32))
        found = "statistics" if abs(c - b) < 0.75 * abs(b - a) or abs(b - a) < _BOUND * max(abs(a), 1.0) else "keys"
    declared = case.build().gathers
    require(found == declared, f"gathers={declared!r} says that {_SPEAK.get(declared, 'nothing known')}, but {_SPEAK[found]}: "
            f"declare gathers = {found!r}, or what each process takes from its own images alone in local_terms")
    return measured


def ranks_equal_one(case: Case, world: int = 2) -> Measured:
    """Processes with a part of the batch each: loss, gradients, queues and the like of one process with all of it.

    BatchNorm and dropout are in eval mode. Of the terms in ``Method.local_terms``, which are no part of that loss, loss
    and gradients are the mean of what one process makes of each part.
    The step is one in the middle of a run, as every schedule has it; the next two checks take the last and the first.
    """
    return _ranks_equal(case, [_images(case, 4 * world)], world, per_rank_statistics=False, progress=0.5)


def ranks_normalise_alone(case: Case, world: int = 2) -> Measured:
    """The same with BatchNorms in training: each process normalises by its own rows, and that is the only difference.

    The one process to compare with has all rows in its loss, and normalises them by groups of one process's images.
    """
    return _ranks_equal(case, [_images(case, 8 * world)], world, per_rank_statistics=True, progress=1.0)


def ranks_accumulate(case: Case, world: int = 2) -> Measured:
    """Processes with two micro-batches each: one process with two micro-batches of all processes' images."""
    whole = _images(case, 8 * world)
    return _ranks_equal(case, [_part(whole, i, 2) for i in range(2)], world, per_rank_statistics=False, progress=0.0)


def micro_batches_equal_one(case: Case) -> Measured:
    """2 and 4 micro-batches: nothing moves in between; then teachers, queues, correlations as after one batch of all images.

    With ``gathers = "none"`` the loss and every gradient, too.
    """
    batch, measured = _images(case, 8), Measured(0.0, _BOUND)
    whole = _in_any_order(case, _step(_model(case), [batch]))
    for count in (2, 4):
        parts = _in_any_order(case, _step(_model(case), [_part(batch, i, count) for i in range(count)]))
        kept = [name for name in whole if name.startswith("after the step")]
        if case.build().gathers == "none":
            kept += _shared(whole)
        where = f"of {count} micro-batches"
        found = within({name: whole[name] for name in kept}, {name: parts[name] for name in kept}, where, _BOUND)
        measured = max(measured, found)
    return measured


def large_batch_mode_equals_one(case: Case) -> Measured | Absent:
    """``micro_batch``, also where it does not divide the 8 images: loss, gradients, teachers, queues and the like of one pass.

    BatchNorms are in eval mode; then in training, where the one pass to compare with normalises maps by as many images at a
    time: that, which moves the running statistics too, is the only difference. A run moves on once per optimizer step.
    """
    batch, measured = _images(case, 8), Measured(0.0, _PASSES)
    for size, by in ((1, None), (3, None), (3, _by_part(3)), (4, _by_part(4))):
        whole, parts, rows = _model(case, by), _model(case, by and _by_part(8)), _Rows()
        parts.each = ViewBatching(micro_batch=size)
        parts.backbone.register_forward_hook(rows)
        where = f"of {size} images at a time{', BatchNorms in training,' if by else ''}"
        expected, found = (_step(model, [batch]) | {f"after the step, {name}": buffer for name, buffer in model.named_buffers()}
                           for model in (whole, parts))
        if not 0 < rows.most <= size:
            return Absent(f"the backbone takes {rows.most} images at once whatever micro_batch is: it does not pass self.each")
        measured = max(measured, within(expected, found, where, _PASSES))
    advances_once_per_step(case, micro_batch=4, view_batching="separate")
    return measured._replace(note=parts.each.note(parts.backbone))


INVARIANCE = (
    declares_what_it_gathers,
    micro_batches_equal_one,
    large_batch_mode_equals_one,
    ranks_equal_one,
    ranks_normalise_alone,
    ranks_accumulate,
    ranks_share_uneven_images,
)
OVER_RANKS = (ranks_equal_one, ranks_normalise_alone, ranks_accumulate, ranks_share_uneven_images)


# --- batches -------------------------------------------------------------------------------------------------------------


def _images(case: Case, count: int) -> Batch:
    """The first images a run sees, in one batch."""
    batches = [double(batch) for batch in case.batches(-(-count // 8))]
    views = [torch.cat(list(views))[:count] for views in zip(*(batch.views for batch in batches), strict=True)]
    labels, index = (torch.cat([getattr(batch, name) for batch in batches])[:count] for name in ("labels", "index"))
    return Batch(views, labels, index)


def _part(batch: Batch, number: int, count: int) -> Batch:
    rows = slice(number * len(batch.labels) // count, (number + 1) * len(batch.labels) // count)
    return Batch([view[rows] for view in batch.views], batch.labels[rows], batch.index[rows])


def _repeated(batch: Batch, times: int) -> Batch:
    return Batch([torch.cat([view] * times) for view in batch.views], batch.labels.repeat(times), batch.index.repeat(times))


class _Rows:
    """The most images a network has seen at once."""

    most = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        self.most = max(self.most, len(args[0]))


# --- one step ------------------------------------------------------------------------------------------------------------


def _step(model: Method, micro_batches: Sequence[Batch], rank: int = 0, world: int = 1) -> Values:
    """A step's mean loss and gradients over micro-batches, without and with the local terms alone, and what it moved.

    Args:
        rank, world: take that part of each micro-batch.
    """
    values: Values = {}
    before = _states(model)
    for batch in micro_batches:
        shared, local = _losses(model, _part(batch, rank, world), rank)
        derived = _derived(model, shared)
        if model.local_terms:
            derived |= {f"{name} (local)": value for name, value in _derived(model, local).items()}
        values = {name: values.get(name, 0) + value / len(micro_batches) for name, value in derived.items()}
    within(before, _states(model), "between two micro-batches", 0.0)
    reported = {name: torch.tensor(value, dtype=torch.float64) for name, value in model.after_step(model.progress).items()}
    return values | {f"after the step, {name}": value for name, value in (reported | _states(model)).items()}


def _model(case: Case, normalised: Callable[[nn.Module, Tensor], Tensor] | None = None, progress: float = 0.0) -> Method:
    """The method in eval mode, or with BatchNorms in training that normalise as this says, given each and its rows.

    Args:
        progress: where in a run it is.
    """
    model = case.build().double().eval()
    model.progress = progress
    with torch.no_grad():
        torch._foreach_mul_([p for p in model.parameters() if p.requires_grad], 1.1)            # teachers are not there yet
    if normalised is not None:
        for norm in of(model, _BatchNorm).values():
            norm.train()
            norm.forward = partial(normalised, norm)
    return model


def _by_process(images: int, groups: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A BatchNorm by the statistics of each of several processes' images; its rows are those of one or several views."""

    def normalised(norm: nn.Module, x: Tensor) -> Tensor:                                       # [V * images, ...]
        require(len(x) % images == 0, f"a BatchNorm sees {len(x)} rows for {images} images: whose are they?")
        parts = x.view(-1, groups, images // groups, *x.shape[1:]).unbind(1)                    # each [V, b, ...]
        done = [type(norm).forward(norm, part.flatten(0, 1)).view_as(part) for part in parts]
        return torch.stack(done, dim=1).flatten(0, 2)

    return normalised


def _by_part(size: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """A BatchNorm on maps by the statistics of so many images at a time; one in a head by all rows."""

    def normalised(norm: nn.Module, x: Tensor) -> Tensor:                                       # [B, C, H, W] or [B, D]
        return torch.cat([type(norm).forward(norm, part) for part in (x.split(size) if x.ndim == 4 else [x])])

    return normalised


def _states(model: Method) -> Values:
    memories = of(model, StepModule).items()
    return {f"{name}.{key}": value.clone() for name, memory in memories for key, value in memory.state_dict().items()
            if isinstance(value, Tensor) and "running_" not in key and "num_batches_tracked" not in key}


def _losses(model: Method, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """The loss without its local terms, and these."""
    torch.manual_seed(seed)
    outputs = model.losses(batch)
    local = torch.stack([weight * outputs[name] for name, weight in model.local_terms.items()] or [outputs["loss"] * 0]).sum()
    return outputs["loss"] - local, local


def _derived(model: Method, loss: Tensor) -> Values:
    """A loss and its gradients; the graph stays."""
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    known = {f"gradient of {name}": grad for name, grad in zip(names, gradients, strict=True) if grad is not None}
    return {"loss": loss.detach().clone(), **known}


def _shared(values: Values) -> Values:
    """Loss and gradients without what belongs to local terms."""
    return {name: value for name, value in values.items() if not name.endswith("(local)") and not name.startswith("after")}


def _in_any_order(case: Case, values: Values) -> Values:
    """With the rows of queues sorted: micro-batches push several views in another order."""
    values = dict(values)
    for name in of(case.build(), Queue):
        keys, labels = (f"after the step, {name}.{key}" for key in ("keys", "labels"))
        order = values[keys][:, 0].argsort()
        order = order[values[labels][order].argsort(stable=True)]
        values[keys], values[labels] = values[keys][order], values[labels][order]
    return values


# --- over ranks ----------------------------------------------------------------------------------------------------------


def _ranks_equal(
    case: Case, micro_batches: Sequence[Batch], world: int, per_rank_statistics: bool, progress: float
) -> Measured:
    images = len(micro_batches[0].labels)
    own = _by_process(images // world, 1) if per_rank_statistics else None
    together = _by_process(images, world) if per_rank_statistics else None
    expected = _step(_model(case, together, progress), micro_batches)
    if local := [name for name in expected if name.endswith("(local)")]:
        alone = [_step(_model(case, own, progress), micro_batches, rank, world) for rank in range(world)]
        expected |= _mean(alone, local)

    def on(rank: int) -> dict[str, np.ndarray]:
        values = _step(_model(case, own, progress), micro_batches, rank, world)
        return {name: value.numpy() for name, value in values.items()}

    ranks = [{name: torch.from_numpy(value) for name, value in found.items()} for found in run_ranks(on, world=world)]
    measured = Measured(0.0, _BOUND)
    for rank, found in enumerate(ranks):
        found = found | _mean(ranks, [name for name in found if not name.startswith("after")])
        measured = max(measured, within(expected, found, f"on rank {rank} of {world}", _BOUND))
    return measured


def _mean(parts: Sequence[Values], names: Sequence[str]) -> Values:
    """Of these values, over all parts; 0 where a part has none."""
    return {name: torch.stack([part[name] for part in parts if name in part]).sum(0) / len(parts) for name in names}
