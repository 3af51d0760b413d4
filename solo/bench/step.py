"""``python -m solo.bench step``: a training step beside the same step as the field writes it.

``--count`` counts operations, waits for the device and messages (no clock), ``--overhead`` times the Python around a step,
``--method`` times whole steps on the CPU; without any of them these three are done. The clock is CPU time of one thread.
``--ranks`` times two processes by the wall, ``--peer`` a checkout's own LARS.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from solo.backbones import BackboneConfig
from solo.batching import Mode
from solo.bench import ranks
from solo.bench.baselines.step import LoggedAtOnce
from solo.bench.counts import Operations, Waits, search_of_a_gpu
from solo.bench.measure import Comparison, Row, alternate, compared, rate, row, table, write
from solo.bench.peers.checkout import Checkout, release
from solo.bench.recipe import Step
from solo.callbacks.health import FiniteGuard
from solo.callbacks.metrics import MetricsLogger
from solo.compiling import compile_networks
from solo.errors import ConfigError, EnvironmentFault, NumericsError, Parser
from solo.kernels.nearest import multiplies_bfloat16
from solo.profiler import NoProfiler

METHODS_MEASURED = ("nnclr", "all4one")
_PEER = "as published"
_METRICS, _STEPS = 9, 400
_UPDATES = 3
_LARS = {"lars": 0.0, "old_lars": 1e-6}  # how far a weight may end from the peer's: old releases round in another order


def main(argv: list[str]) -> None:
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    everything = not (arguments.count or arguments.overhead or arguments.method or arguments.ranks or arguments.peer)
    chosen = METHODS_MEASURED if everything else tuple(arguments.method or ())
    if unknown := set(chosen) - set(METHODS_MEASURED):
        raise ConfigError(f"--method takes {' or '.join(METHODS_MEASURED)}, got {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    if everything or arguments.count:
        rows += [entry for method in METHODS_MEASURED for entry in count(method)]
        rows += lars()
        rows += [entry for method in METHODS_MEASURED for entry in ranks.messages(method)]
        rows += [ranks.of_a_run(method) for method in METHODS_MEASURED]
    if everything or arguments.overhead:
        rows.append(overhead(arguments.pairs))
    if arguments.peer:
        rows += beside(Path(arguments.peer), arguments.pairs)
    if arguments.ranks:
        rows.append(ranks.pace(METHODS_MEASURED[0], arguments.batch, arguments.pairs))
    for method in chosen:
        print(correctness(method, compiled=True), flush=True)
        rows += whole(method, arguments.batch, arguments.pairs)
    print(table(rows), flush=True)
    if not arguments.no_write:
        write(rows, peer=release(arguments.peer))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m solo.bench step", description=__doc__)
    parser.add_argument("--count", action="store_true", help="count instead of timing")
    parser.add_argument("--overhead", action="store_true", help="time the Python around a step")
    parser.add_argument("--method", action="append", help=f"time whole steps: {', '.join(METHODS_MEASURED)}")
    parser.add_argument("--ranks", action="store_true", help="time a step of two ranks beside one (wall: two idle cores)")
    parser.add_argument("--peer", help="a folder with a checkout of solo-learn: its own LARS beside ours")
    parser.add_argument("--batch", type=int, default=64, help="images of a step")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each way, in turn")
    parser.add_argument("--no-write", action="store_true", help="do not append to bench/results.csv")
    return parser.parse_args(argv)


# --- correctness ------------------------------------------------------------------------------------------------------


def correctness(method: str, backbone: BackboneConfig | None = None, compiled: bool = False) -> str:
    """Both ways move the weights by the same in a step from the same start, however views are run, also if ``compiled``.

    In float64: in float32 a gradient of so small a batch has two or three digits.

    Raises:
        AssertionError: they do not.
    """
    found = []
    sizes: dict[str, Any] = {"queue_size": 64, **({"dropout": 0.0} if method == "all4one" else {})}
    ways: list[tuple[Mode | None, bool]] = [(None, False), ("separate", False), ("concat", False)]
    for mode, faster in [*ways, ("separate", True)] if compiled else ways:
        step = Step(method, 8, mode, backbone=backbone, **sizes)
        step.model.double()
        step.batch = step.batch._replace(views=[view.double() for view in step.batch.views])
        if faster:
            compile_networks(step.model, torch.device("cpu"))
        before = _weights(step)
        step()
        found.append(_weights(step) - before)
    worst = max(((other - found[0]).norm() / found[0].norm()).item() for other in found[1:])
    if not worst < 1e-8:
        raise AssertionError(f"{method}: the update differs by {worst:.1e} of its norm from that of the step as published")
    return f"{method}: the update differs by {worst:.1e} of its norm from that of the step as published"


def _weights(step: Step) -> Tensor:
    return torch.cat([p.detach().flatten() for p in step.model.parameters()])


# --- counts --------------------------------------------------------------------------------------------------------------


def count(method: str) -> list[Row]:
    """S1 and S2 of what a GPU without Triton is given, beside the step as published."""
    counted: dict[Mode | None, tuple[int, int]] = {}
    modes: tuple[Mode | None, ...] = (None, "separate", "concat")
    for mode in modes:
        step = Step(method, 2, mode, queue_size=16)
        step()
        with search_of_a_gpu(), Operations() as seen, Waits() as waits:
            step()
        counted[mode] = seen.kernels, sum(waits.names.values())
    rows = []
    for mode in ("separate", "concat"):
        for place, (id, what) in enumerate((("S1", "operations"), ("S2", "waits"))):
            ours, theirs = counted[mode][place], counted[None][place]
            rows.append(Row(id, f"{method}, {mode}: {what} of a step", ours, what, _PEER, theirs))
    return rows


def lars() -> list[Row]:
    """S4: operations of an optimizer step over NNCLR's networks, and how far three steps end from those tensor by tensor."""
    ours, theirs = Step("nnclr", 2, "separate", queue_size=16), Step("nnclr", 2, None, queue_size=16)
    pairs = list(zip(ours.model.parameters(), theirs.model.parameters(), strict=True))
    for _ in range(3):
        for p, q in pairs:
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        with Operations() as seen:
            ours.optimizer.step()
        with Operations() as published:
            theirs.optimizer.step()
    difference = max((p - q).abs().max().item() for p, q in pairs)
    return [
        Row("S4", "LARS: operations of a step", seen.kernels, "operations", _PEER, published.kernels),
        Row("S4", "LARS: largest of a weight after three steps from that as published", difference, "difference"),
    ]


def beside(path: Path, pairs: int) -> list[Row]:
    """S4: a step of LARS over NNCLR's networks beside a checkout's own, each in its process.

    Raises:
        NumericsError: they move the weights otherwise.
    """
    step = Step("nnclr", 2, "separate", queue_size=16)
    groups = step.optimizer.param_groups
    weights = [p for group in groups for p in group["params"]]
    for p in weights:                           # as the peer gets them: in another layout a norm is summed in another order
        p.data = p.detach().contiguous()
    gradients = [torch.randn_like(p) for p in weights]
    numbers = [groups[0]["lr"], groups[0]["weight_decay"], groups[0]["eta"], _UPDATES]

    def ours() -> int:
        for _ in range(_UPDATES):
            for p, g in zip(weights, gradients, strict=True):
                p.grad = g.clone()
            step.optimizer.step()
        return _UPDATES

    with Checkout(path, "step") as peer:
        if not peer.knows("lars"):
            raise ConfigError(f"--peer {path}: bench step takes solo-learn's LARS, which this is not (bench loss takes both)")
        expected, bound = _its_lars(peer, path, [*(p.detach() for p in weights), *gradients], numbers)
        ours()
        worst = max((p - q).abs().max().item() for p, q in zip(weights, expected, strict=True))
        if not worst <= bound:
            raise NumericsError(f"LARS: a weight differs by {worst:.1e} from {peer.name}, where {bound:g} is allowed")
        print(f"LARS: after {_UPDATES} steps a weight differs by {worst:.1e} at most from {peer.name}", flush=True)
        found = Comparison(tuple((rate(ours), _UPDATES * peer.rate()) for _ in range(pairs)))
    return [row("S4", "LARS: a step over NNCLR's networks", "per CPU-s", peer.name, found)]


def _its_lars(peer: Checkout, path: Path, tensors: list[Tensor], numbers: list[float]) -> tuple[list[Tensor], float]:
    """The peer's weights after its steps, and how far ours may end from them."""
    found: list[Tensor] | str = ""
    for formula, bound in _LARS.items():
        found = peer.prepare(formula, (), tensors, numbers)
        if not isinstance(found, str):
            return found, bound
    raise EnvironmentFault(f"--peer {path}: {found}")


# --- Python around a step ------------------------------------------------------------------------------------------------


class _Collected(LoggedAtOnce):
    """The same module under our way of logging."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.network(batch).square().mean()
        return {"loss": loss, **{f"metric{i}": loss.detach() for i in range(self.metrics - 1)}}


def _fitted(kind: type[LoggedAtOnce], callbacks: list[Callable[[], pl.Callback]], folder: str, **more: Any) -> float:
    """CPU seconds of `_STEPS` steps under a Trainer, its start left out."""
    seconds: list[float] = []

    class Clock(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            seconds.append(time.process_time())

        def on_train_end(self, *_: Any) -> None:
            seconds.append(time.process_time())

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=CSVLogger(folder), log_every_n_steps=50, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*(make() for make in callbacks), Clock()],
        **more,
    )
    trainer.fit(kind(nn.Linear(8, 8), _METRICS), _vectors())
    return seconds[1] - seconds[0]


def _vectors() -> DataLoader:
    return DataLoader(cast(Dataset, [torch.zeros(4, 8)] * _STEPS), batch_size=None)


def _raw() -> float:
    network = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    began = time.process_time()
    for batch in _vectors():
        optimizer.zero_grad()
        network(batch).square().mean().backward()
        optimizer.step()
    return time.process_time() - began


def overhead(pairs: int) -> Row:
    """S3: microseconds of Python per step above a bare loop, nine metrics logged.

    `FiniteGuard`, which the peer lacks, has a row of its own.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours = partial(_fitted, _Collected, [MetricsLogger], folder, profiler=NoProfiler())
        theirs = partial(_fitted, LoggedAtOnce, [], folder)
        ours(), theirs(), _raw()
        measured = [(ours(), theirs(), _raw()) for _ in range(pairs)]
    above = [(1e6 * (a - raw) / _STEPS, 1e6 * (b - raw) / _STEPS) for a, b, raw in measured]
    medians = statistics.median(a for a, _ in above), statistics.median(b for _, b in above)
    what = f"Python of a step over a bare loop, {_METRICS} metrics"
    return compared("S3", what, "us", "log_dict", medians, [b / a for a, b in above])


# --- whole steps ---------------------------------------------------------------------------------------------------------


def whole(method: str, batch: int, pairs: int) -> list[Row]:
    """S5: images per CPU second beside the step as published, and what the finite check takes of a step."""
    theirs, unit = Step(method, batch, None), "images/CPU-s"
    ways = {f"float32, {mode}": Step(method, batch, mode) for mode in get_args(Mode)}
    ways["float32, separate, compiled"] = compiled = Step(method, batch, "separate")
    compile_networks(compiled.model, torch.device("cpu"))
    if multiplies_bfloat16():
        ways["bf16-mixed, separate"] = Step(method, batch, "separate", torch.bfloat16)
    else:
        print("bf16-mixed is left out: this processor has no instructions for it", flush=True)
    rows = []
    for what, step in ways.items():
        rows.append(row("S5", f"{method}, {what}, batch {batch}", unit, _PEER, alternate(step, theirs, pairs)))
    return [*rows, _guard(theirs, rows[0].value, batch)]


def _guard(step: Step, images_per_second: float, batch: int) -> Row:
    """The share of a step that `FiniteGuard` takes to look at the loss and at every gradient."""
    step()
    guard, loss = FiniteGuard(), torch.zeros(())
    trainer: Any = argparse.Namespace(precision_plugin=None, model=step.model)

    def look() -> int:
        for _ in range(20):
            guard.on_before_backward(trainer, step.model, loss)
            guard.on_before_optimizer_step(trainer, step.model, step.optimizer)
        return 20

    look()
    share = 100 * (1 / statistics.median(rate(look) for _ in range(5))) * images_per_second / batch
    return Row("S5", f"finite check in a step, batch {batch}", share, "% of a step")
