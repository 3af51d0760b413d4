"""Time and memory of work on a GPU. On a CPU the same calls only show that the benchmark runs."""

import subprocess
import time
from collections.abc import Callable

import torch

from solo.bench.measure import Comparison

SETS = 4                    # of inputs, taken in turn: what one step leaves in the cache is not what the next one reads
Work = Callable[[int], object]


def seconds(work: Work, steps: int, device: str) -> float:
    """Of one step, by CUDA events around all of them; ``work`` gets the number of an input set."""
    if device == "cpu":
        began = time.perf_counter()
        for i in range(steps):
            work(i % SETS)
        return (time.perf_counter() - began) / steps
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for i in range(steps):
        work(i % SETS)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / steps


def compare(first: Work, second: Work, pairs: int, steps: int, device: str) -> Comparison:
    """Both in turn, A B A B, in steps per second; 25 steps of each go before, or half of ``steps`` where that is less."""
    for work in (first, second):
        seconds(work, min(25, max(1, steps // 2)), device)
    return Comparison(tuple(
        (1 / seconds(first, steps, device), 1 / seconds(second, steps, device)) for _ in range(pairs)
    ))


def peak(work: Work) -> float:
    """MB of GPU memory that one step takes above what is there before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work(0)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def clocks() -> str:
    """What the driver says of the GPU's clocks and power at this moment."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "clocks: unknown"
    return f"clocks: {found.stdout.strip().splitlines()[0]}"
