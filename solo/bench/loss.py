"""``python -m solo.bench loss``: the losses and the neighbour search beside the peers' dense formulas.

The clock is CPU time of the whole process, one thread, forward and backward; of two processes (L5) that of the first. Peaks
are bytes of tensors alive at once, counted by a dispatch mode (`solo.bench.memory`), inputs and their gradients left out.
With ``--peer`` the peer is a checkout's own code, in a process of its own with its own clock, or the formulas compiled.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from solo.bench.baselines import losses as peers
from solo.bench.measure import Comparison, Row, alternate, rate, row, table, write
from solo.bench.memory import peak_bytes
from solo.bench.peers import named
from solo.bench.peers.checkout import Checkout, release
from solo.errors import ConfigError, EnvironmentFault, Parser, SoloError
from solo.kernels import neighbours, wants_shadow
from solo.losses import barlow_loss_func, nnclr_loss_func, sce_loss_func, simclr_loss_func, vicreg_loss_func
from solo.testing import run_ranks

WIDTH = 256         # of embeddings
_TOLERANCE = 2e-4   # of a gradient's largest entry: both are float32
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Pair:
    """Ours and the peer's way to the same tensors; ``inputs`` get gradients, where there are any.

    Attributes:
        formula, constants, numbers: what a peer's own code is asked for, and what it is given besides the inputs.
    """

    id: str
    what: str
    ours: Loss
    peer: Loss
    inputs: tuple[Tensor, ...] = ()
    formula: str = ""
    constants: tuple[Tensor, ...] = ()
    numbers: tuple[float, ...] = ()

    def run(self, loss: Loss) -> list[Tensor]:
        """The loss and its gradients, or what a search finds."""
        value = loss(*self.inputs)
        return [value.detach(), *torch.autograd.grad(value, self.inputs)] if self.inputs else [value]

    def check(self, expected: Sequence[Tensor] | None = None) -> None:
        """Raises SoloError where ours is not the peer's, or another one's ``expected``, of a search the rows that are found."""
        given = self.run(self.ours)
        if expected is not None and not self.inputs:
            given = [self.constants[1][index] for index in given]
        for found, wanted in zip(given, self.run(self.peer) if expected is None else expected, strict=True):
            if found.is_floating_point() and self.inputs:
                equal = (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max()
            else:
                equal = (found != wanted).float().mean() < 1e-3         # near-ties
            if not equal:
                raise SoloError(f"{self.id} {self.what}: ours and the peer's differ")


def main(argv: list[str]) -> None:
    arguments = _arguments(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[Row] = []
    if arguments.peer in (None, *named("loss")):
        for id in arguments.only:
            rows += MEASUREMENTS[id](arguments.pairs) if arguments.peer is None else _compiled(id, arguments.pairs)
            print(f"{id} done", flush=True)
    else:
        with Checkout(Path(arguments.peer), "loss") as peer:
            rows += [entry for id in arguments.only for pair in PAIRS[id]() for entry in _against(pair, peer, arguments.pairs)]
        if not rows:
            raise EnvironmentFault(f"--peer {arguments.peer}: it has none of these losses that can be imported here")
    print(table(rows), flush=True)
    if not arguments.no_write:
        write(rows, peer=release(arguments.peer))


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = Parser("python -m solo.bench loss", description=__doc__)
    parser.add_argument("--only", help="e.g. L1,L4")
    parser.add_argument("--peer", help=f"{', '.join(named('loss'))}, or a folder with a checkout of solo-learn or of lightly")
    parser.add_argument("--pairs", type=int, default=5, help="measurements of each way, in turn")
    parser.add_argument("--no-write", action="store_true", help="do not append to bench/results.csv")
    arguments = parser.parse_args(argv)
    known = MEASUREMENTS if arguments.peer is None else PAIRS
    arguments.only = list(known) if arguments.only is None else arguments.only.split(",")
    if unknown := sorted(set(arguments.only) - set(known)):
        raise ConfigError(f"--only takes {', '.join(known)}{' with --peer' * (known is PAIRS)}, got {', '.join(unknown)}")
    return arguments


# --- what is measured ----------------------------------------------------------------------------------------------------


def _unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(shape), dim=-1)


def sce_pair(n: int, queue: int) -> Pair:
    """SCE of n rows over a queue."""
    k, keys = torch.randn(n, WIDTH), _unit(queue, WIDTH)
    return Pair(
        "L1", f"SCE N={n} Q={queue}",
        lambda q: sce_loss_func(q, k, keys, temperature=0.1, temperature_m=0.07, coeff=0.5),
        lambda q: peers.sce(q, k, keys, 0.1, 0.07, 0.5), (torch.randn(n, WIDTH, requires_grad=True),),
    )


def gram_pairs(n: int, d: int) -> list[Pair]:
    """Barlow Twins and VICReg of n rows of d features."""
    z = torch.randn(n, d, requires_grad=True), torch.randn(n, d, requires_grad=True)
    where = f"N={n} D={d}"
    return [
        Pair("L2", f"Barlow Twins {where}", lambda a, b: barlow_loss_func(a, b, 0.0051, 0.1),
             lambda a, b: peers.barlow(a, b, 0.0051, 0.1), z, "barlow", numbers=(0.0051, 0.1)),
        Pair("L2", f"VICReg {where}", vicreg_loss_func, lambda a, b: peers.vicreg(a, b, 25, 25, 1), z,
             "vicreg", numbers=(25, 25, 1)),
    ]


def search_pair(n: int, queue: int, k: int) -> Pair:
    """The k nearest of a queue to n rows of two views: the peers search for one view after the other."""
    z, keys = _unit(2 * n, WIDTH), _unit(queue, WIDTH)
    shadow = keys.bfloat16() if wants_shadow(keys) else None            # as `solo.nn.Queue` keeps it
    peer = peers.nearest if k == 1 else peers.nearest_five
    what = f"NN top-{k}, 2 views, N={n} Q={queue}"
    return Pair("L3", what, lambda: neighbours(z, keys, k, shadow=shadow).squeeze(1),
                lambda: torch.cat([peer(view, keys) for view in z.split(n)]), (), "nearest" * (k == 1), (z, keys))


def simclr_pair(rows: int) -> Pair:
    """NT-Xent of rows / 2 images in two views."""
    ids = torch.arange(rows // 2).repeat(2)
    return Pair("L4", f"NT-Xent 2N={rows}", lambda z: simclr_loss_func(z, ids, 0.2, positives=1),
                lambda z: peers.simclr(z, ids, 0.2), (torch.randn(rows, WIDTH, requires_grad=True),), "nt_xent", (), (0.2,))


def nnclr_pair(rows: int) -> Pair:
    """NNCLR's loss of one direction."""
    p, found = torch.randn(rows, WIDTH, requires_grad=True), _unit(rows, WIDTH)
    return Pair("Lx", f"NNCLR N={rows}", lambda p: nnclr_loss_func(found, p, 0.2), lambda p: peers.nnclr(found, p, 0.2), (p,),
                "nnclr", (found,), (0.2,))


PAIRS: dict[str, Callable[[], list[Pair]]] = {
    "L1": lambda: [sce_pair(512, 65536)],
    "L2": lambda: [pair for d in (2048, 8192) for pair in gram_pairs(256, d)],
    "L3": lambda: [search_pair(256, 65536, 1), search_pair(256, 98304, 5)],
    "L4": lambda: [simclr_pair(4096)],
    "Lx": lambda: [nnclr_pair(1024)],
}


def _against(pair: Pair, peer: Checkout, pairs: int) -> list[Row]:
    """Beside the peer's own code, where it has this formula."""
    if not peer.knows(pair.formula):
        return []
    expected = peer.prepare(pair.formula, pair.inputs, pair.constants, pair.numbers)
    if isinstance(expected, str):
        print(f"{pair.what} is left out: {peer.name} says {expected}", flush=True)
        return []
    pair.check(expected)
    found = Comparison(tuple((rate(lambda: bool(pair.run(pair.ours))), peer.rate()) for _ in range(pairs)))
    return [row(pair.id, pair.what, "per CPU-s", peer.name, found)]


def _compiled(id: str, pairs: int) -> list[Row]:
    """Beside the dense formulas under torch.compile; the first call, which compiles, is not timed."""
    if not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise EnvironmentFault("--peer torch-compile needs a C++ compiler, and there is none here")
    rows = []
    for pair in (replace(pair, peer=torch.compile(pair.peer)) for pair in PAIRS[id]()):
        pair.check()
        found = alternate(lambda way=pair: bool(way.run(way.ours)), lambda way=pair: bool(way.run(way.peer)), pairs)   # type: ignore[misc]
        rows.append(row(pair.id, pair.what, "per CPU-s", "dense formula, torch.compile", found))
    return rows


def _compared(pair: Pair, pairs: int) -> list[Row]:
    pair.check()
    found = alternate(lambda: bool(pair.run(pair.ours)), lambda: bool(pair.run(pair.peer)), pairs)
    ours, theirs = (peak_bytes(lambda way=way: pair.run(way)) / 2**20 for way in (pair.ours, pair.peer))    # type: ignore[misc]
    memory = [
        Row(pair.id, f"{pair.what}: peak", ours, "MiB", "dense formula", theirs),
        Row(pair.id, f"{pair.what}: peak of the peer's", 100 * ours / theirs, "%"),
    ]
    return [row(pair.id, pair.what, "per CPU-s", "dense formula", found), *memory]


def _scaled(id: str, what: str, base: Pair, double: Pair, pairs: int) -> list[Row]:
    """Time and peak of twice the size over those of one."""
    found = alternate(lambda: bool(base.run(base.ours)), lambda: bool(double.run(double.ours)), pairs)
    times = peak_bytes(lambda: double.run(double.ours)) / peak_bytes(lambda: base.run(base.ours))
    return [Row(id, f"{what}: time", statistics.median(found.ratios), "times"), Row(id, f"{what}: peak", times, "times")]


def _l1(pairs: int) -> list[Row]:
    base = sce_pair(512, 65536)
    rows = _compared(base, pairs) + _scaled("L1", "SCE at 2N", base, sce_pair(1024, 65536), pairs)
    return rows + _scaled("L1", "SCE at 2Q", base, sce_pair(512, 131072), pairs)


def _l2(pairs: int) -> list[Row]:
    return [entry for pair in PAIRS["L2"]() for entry in _compared(pair, pairs)]


def _l3(pairs: int) -> list[Row]:
    one, five = search_pair(256, 65536, 1), search_pair(256, 98304, 5)
    rows = _compared(one, pairs) + _compared(five, pairs)
    for k, base, longer in ((1, one, 131_072), (5, five, 196_608)):
        rows += _scaled("L3", f"NN top-{k} at 2N", search_pair(512, 65536, k), search_pair(1024, 65536, k), pairs)
        rows += _scaled("L3", f"NN top-{k} at 2Q", base, search_pair(256, longer, k), pairs)
    return rows


def _l4(pairs: int) -> list[Row]:
    return _compared(base := simclr_pair(4096), pairs) + _scaled("L4", "NT-Xent at 2N", base, simclr_pair(8192), pairs)


def _l5(pairs: int) -> list[Row]:
    found = Comparison(tuple(run_ranks(_on_a_rank, 1024, pairs)[0]))
    return [row("L5", "NT-Xent, 2 gloo processes, 1024 rows each", "per CPU-s", "dense, gradient all-reduce", found)]


def _on_a_rank(rank: int, rows: int, pairs: int) -> list[tuple[float, float]]:
    torch.manual_seed(rank)
    ids = torch.arange(rows // 2).repeat(2) + rank * rows
    pair = Pair("L5", "NT-Xent on two ranks", lambda z: simclr_loss_func(z, ids, 0.2, positives=1),
                lambda z: peers.simclr(z, ids, 0.2), (torch.randn(rows, WIDTH, requires_grad=True),))
    pair.check()
    ways = [lambda way=way: len([pair.run(way) for _ in range(5)]) for way in (pair.ours, pair.peer)]
    for way in ways:
        way()
    return [(rate(ways[0]), rate(ways[1])) for _ in range(pairs)]


MEASUREMENTS = {"L1": _l1, "L2": _l2, "L3": _l3, "L4": _l4, "L5": _l5}
