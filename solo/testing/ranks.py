"""Run a function in several gloo processes on the loopback interface."""

import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, function: Callable[..., Any], world: int, port: int, queue: Any, args: tuple[Any, ...]) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=60))   # ranks out of step fail
        queue.put((rank, function(rank, *args), None))
        if dist.is_initialized():                           # after a run it is not
            dist.barrier()
            dist.destroy_process_group()
    except Exception:
        queue.put((rank, None, traceback.format_exc()))


def run_ranks(function: Callable[..., Any], *args: Any, world: int = 2) -> list[Any]:
    """``[function(rank, *args) for rank in range(world)]``, each in its own process; results must be picklable."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("fork")
    queue = context.SimpleQueue()
    arguments = [(rank, function, world, port, queue, args) for rank in range(world)]
    processes = [context.Process(target=_worker, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    results: list[Any] = [None] * world
    for _ in range(world):
        rank, value, error = queue.get()
        assert error is None, f"rank {rank}:\n{error}"
        results[rank] = value
    for process in processes:
        process.join()
    return results
