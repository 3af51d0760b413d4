"""``python -m solo.bench kernel``: are the fused kernels right on this GPU, and how fast beside the plain formulas."""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from solo.bench.baselines import similarity as plain
from solo.bench.device import SETS, Work, clocks, compare, peak, seconds
from solo.bench.measure import RESULTS, Row, row, table, write
from solo.errors import ConfigError, EnvironmentFault, Parser
from solo.kernels import neighbours
from solo.kernels.dispatch import uses_triton
from solo.losses import sce_loss_func, simclr_loss_func

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Scale:
    """Sizes of a measurement: those of the goals, or tiny ones that show on a CPU that it runs."""

    width: int = 256
    batch: int = 4096           # rows of one view
    small: int = 256
    queue: int = 65_536
    longer: int = 98_304
    side: int = 8192            # of the square product
    copied: int = 1 << 29       # bytes
    pairs: int = 5
    steps: int = 50
    compiles: bool = True


TINY = Scale(16, 32, 8, 256, 384, 64, 1 << 16, 2, 2, False)


def main(argv: list[str]) -> None:
    parser = Parser("python -m solo.bench kernel", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    device, scale, path = settled(arguments)
    rows: list[Row] = []
    for _, stage in stages(device, scale):
        rows += (found := stage())
        write(found, path)
        print(table(found), flush=True)
    print(clocks() if device == "cuda" else "tiny sizes on a CPU: this shows that it runs, and nothing else")
    print(table(rows))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the benchmarks of a GPU share."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run with tiny sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="a dry run's must be another file")


def settled(arguments: argparse.Namespace) -> tuple[str, Scale, Path]:
    """Device, sizes and results file.

    Raises:
        EnvironmentFault: there is no GPU.
        ConfigError: a dry run would write among the real results.
    """
    if arguments.device == "cuda":
        if not torch.cuda.is_available():
            raise EnvironmentFault("no CUDA device here: this measures a GPU (--device cpu is a dry run with tiny sizes)")
        return "cuda", Scale(), arguments.results
    if arguments.results.resolve() == RESULTS.resolve():
        raise ConfigError(f"--device cpu measures nothing: give --results a file other than {RESULTS}")
    return "cpu", TINY, arguments.results


def stages(device: str, scale: Scale) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Names and measurements, in the order in which they run; each name is the `Row.id` of what it gives."""
    yield "K0", partial(ceilings, device, scale)
    yield "KC", partial(correctness, device, scale)
    if device == "cuda":
        yield "KT", kernel_tests
    yield "K1", partial(queue_attention_rows, device, scale)
    yield "K2", partial(nt_xent_rows, device, scale)
    yield "K3", partial(nearest_rows, "K3", device, scale)
    yield "K4", partial(nearest_rows, "K4", device, scale)


# --- what is measured --------------------------------------------------------------------------------------------------


def sce(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    """The library's loss, as `baselines.similarity.sce` has its numbers."""
    return sce_loss_func(q, k, queue, temperature=0.1, temperature_m=0.07, coeff=0.5)


def nt_xent(z: Tensor) -> Tensor:
    """The library's loss, as `baselines.similarity.nt_xent` has its numbers."""
    return simclr_loss_func(z, torch.arange(len(z) // 2, device=z.device).repeat(2), 0.2, positives=1)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """``torch.set_float32_matmul_precision`` for a while."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _step(loss: Callable[..., Tensor], inputs: Sequence[tuple[Tensor, ...]], autocast: bool) -> Work:
    """Forward and backward to the first input."""

    def work(number: int) -> None:
        first, *others = inputs[number]
        first.grad = None
        with torch.autocast(first.device.type, torch.bfloat16, enabled=autocast):
            value = loss(first, *others)
        value.backward()

    return work


def _against(
    id: str, what: str, ours: Work, peers: dict[str, Work], flops: float, device: str, scale: Scale
) -> list[Row]:
    """Rows of time, memory and, where ``flops`` of one step are given, of the rate that is reached."""
    found = [row(id, f"{what}: the same twice", "steps/s", "itself", compare(ours, ours, scale.pairs, scale.steps, device))]
    for name, peer in peers.items():
        taken = compare(ours, peer, scale.pairs, scale.steps, device)
        found.append(row(id, what, "steps/s", name, taken))
        if device == "cuda":
            mine, theirs = peak(ours), peak(peer)
            found.append(Row(id, f"{what}: peak above inputs", mine, "MB", name, theirs))
    found.append(Row(id, f"{what}: rate of the products (K5)", flops / seconds(ours, scale.steps, device) / 1e12, "TFLOP/s"))
    return found


def queue_attention_rows(device: str, scale: Scale) -> list[Row]:
    """K1: SCE over a queue, forward and backward, with float32 products in TF32."""
    n, d = scale.batch, scale.width
    queue = plain.unit(scale.queue, d, device=device, seed=9)
    views = [(plain.unit(n, d, device=device, seed=i).requires_grad_(), plain.unit(n, d, device=device, seed=i + SETS))
             for i in range(SETS)]
    inputs = [(q, k, queue) for q, k in views]
    ours = _step(sce, inputs, True)
    peers = {"official formula, autocast": _step(plain.sce, inputs, True)}
    if scale.compiles:
        peers["official formula, torch.compile"] = _step(torch.compile(plain.sce), inputs, True)
    flops = 2 * (2 * n) * scale.queue * d * 2           # scores and values of both branches
    with _products("high"):
        return _against("K1", f"SCE N={n} K={scale.queue} D={d}", ours, peers, flops, device, scale)


def nt_xent_rows(device: str, scale: Scale) -> list[Row]:
    """K2: NT-Xent, forward and backward, with float32 products in TF32."""
    n, d = 2 * scale.batch, scale.width
    inputs = [(plain.unit(n, d, device=device, seed=i).requires_grad_(),) for i in range(SETS)]
    peers = {"masks over exponentials, autocast": _step(plain.nt_xent, inputs, True)}
    if scale.compiles:
        peers["masks over exponentials, torch.compile"] = _step(torch.compile(plain.nt_xent), inputs, True)
    with _products("high"):
        return _against("K2", f"NT-Xent 2N={n} D={d}", _step(nt_xent, inputs, True), peers, 3 * 2 * n * n * d, device, scale)


def nearest_rows(id: str, device: str, scale: Scale) -> list[Row]:
    """K3: the nearest row of a queue for both views. K4: the five nearest."""
    k, length, sizes = (1, scale.queue, (scale.small, scale.batch)) if id == "K3" else (5, scale.longer, (scale.small,))
    found = []
    for n in sizes:
        both = [plain.unit(2 * n, scale.width, device=device, seed=i) for i in range(SETS)]      # as the methods give them
        queues = [plain.unit(length, scale.width, device=device, seed=9 + i) for i in range(SETS)]
        shadows = [queue.bfloat16() for queue in queues]

        def ours(i: int, both: list = both, queues: list = queues, shadows: list = shadows) -> Tensor:
            return neighbours(both[i], queues[i], k, shadow=shadows[i])

        def peer(i: int, both: list = both, queues: list = queues) -> Tensor:
            with torch.autocast(device, torch.bfloat16):
                return (plain.nearest if k == 1 else plain.five_nearest)(both[i].chunk(2), queues[i])

        what = f"nearest {k} of {length}, 2 x {n}, D={scale.width}"
        flops = 2 * 2 * n * length * scale.width
        found += _against(id, what, ours, {"a product per look-up, autocast": peer}, flops, device, scale)
    return found


def ceilings(device: str, scale: Scale) -> list[Row]:
    """What copies and plain products reach here."""
    source = [torch.empty(scale.copied, dtype=torch.uint8, device=device) for _ in range(2)]
    a, b = (torch.randn(scale.side, scale.side, device=device, dtype=torch.bfloat16) for _ in range(2))
    copying: Work = lambda i: source[1].copy_(source[0])  # noqa: E731
    product: Work = lambda i: a @ b  # noqa: E731
    for work in (copying, product):
        seconds(work, scale.steps // 2, device)
    copied = 2 * scale.copied / seconds(copying, scale.steps, device) / 1e9
    multiplied = 2 * scale.side**3 / seconds(product, scale.steps, device) / 1e12
    return [
        Row("K0", "copy, bytes read and written", copied, "GB/s"),
        Row("K0", f"bfloat16 product of {scale.side} x {scale.side}", multiplied, "TFLOP/s"),
    ]


# --- the same numbers, whoever makes them ------------------------------------------------------------------------------


def correctness(device: str, scale: Scale) -> list[Row]:
    """Largest errors against float64, as a share of the largest entry.

    Raises:
        AssertionError: one is beyond what its number format explains.
        EnvironmentFault: on this GPU the eager twins would be measured in the kernels' place.
    """
    n, d, length = scale.small, scale.width, scale.queue // 8
    q, k, queue = (plain.unit(rows, d, device=device, seed=i) for i, rows in enumerate((n, n, length)))
    if device == "cuda" and not uses_triton(q, queue):
        raise EnvironmentFault("no Triton kernel runs on this GPU: what follows is torch's own")
    cases: list[tuple[str, Loss, Loss, Tensor]] = [
        ("SCE", partial(sce, k=k, queue=queue), partial(plain.sce, k=k.double(), queue=queue.double()), q),
        ("NT-Xent", nt_xent, plain.nt_xent, torch.cat([q, k])),
    ]
    found = []
    for kind, precision, bound in (("float32", "highest", 1e-4), ("TF32", "high", 1e-2)):
        for name, ours, theirs, at in cases:
            with _products(precision):
                error = _gradient_error(ours, theirs, at)
            assert error < bound, f"the gradient of {name} in {kind} is off by {error:.1e}"
            found.append(Row("KC", f"{name} gradient in {kind}, largest error", error, "of the largest"))
    cosines = q.double() @ queue.double().T
    index = neighbours(q, queue, 5, shadow=queue.bfloat16())
    shortfall = (cosines.topk(5).values - cosines.gather(1, index)).max().item()
    assert shortfall < 1e-3, f"a neighbour is {shortfall:.1e} less similar than the true one"
    others = (index[:, 0] != cosines.argmax(1)).float().mean().item()
    return [*found, Row("KC", "five nearest, similarity lost at most", shortfall, "cosine"),
            Row("KC", "nearest that is another one than in float64", 100 * others, "%")]


def kernel_tests() -> list[Row]:
    """The kernels' own tests, on this GPU: odd shapes, ties, NaN, 16 bits, each against float64; none without pytest.

    Raises:
        AssertionError: one fails.
    """
    folder = Path(__file__).parents[2] / "tests" / "kernels" / "interpreted"
    if find_spec("pytest") is None or not folder.is_dir():
        print("KT: no pytest or no tests here: the kernels' own are left out", flush=True)
        return []
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run([sys.executable, *words], cwd=folder.parents[2], capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    if done.returncode > 1:         # not a test that fails: pytest itself, or a plugin that is not there
        print(f"KT: pytest ended with status {done.returncode}: the kernels' own tests are left out", flush=True)
        return []
    assert done.returncode == 0, "the kernels' own tests fail on this GPU"
    passed = re.search(r"(\d+) passed", done.stdout)
    return [Row("KT", "the kernels' own tests on this GPU, passed", float(passed[1]) if passed else 0.0, "tests")]


def _gradient_error(ours: Loss, theirs: Loss, at: Tensor) -> float:
    """Of ``ours`` in float32 against ``theirs`` in float64, as a share of the largest entry; ours scales rows to length 1."""
    x, exact = at.clone().requires_grad_(), at.double().requires_grad_()
    wanted, = torch.autograd.grad(theirs(torch.nn.functional.normalize(exact, dim=-1)), exact)
    given, = torch.autograd.grad(ours(x), x)
    return ((given - wanted).abs().max() / wanted.abs().max()).item()
