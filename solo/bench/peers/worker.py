"""The process in which a peer's own code runs: its package may be called ``solo`` too, so nothing of ours is imported here.

Started by `solo.bench.peers.checkout` as a script. Plain arrays come in on standard input and go out on standard output, each
message an ``.npz`` behind its length: first a formula with its tensors, answered by its value and its gradients, then how often
to compute it again, answered by the CPU seconds.
"""

import importlib
import io
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

Formula = Callable[..., Any]


def send(file: BinaryIO, **arrays: Any) -> None:
    """Write one message; nothing is pickled."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    file.write(len(buffer.getbuffer()).to_bytes(8, "little") + buffer.getvalue())
    file.flush()


def receive(file: BinaryIO) -> dict[str, np.ndarray]:
    """The next message, empty at the end."""
    size = file.read(8)
    if len(size) < 8:
        return {}
    with np.load(io.BytesIO(file.read(int.from_bytes(size, "little"))), allow_pickle=False) as found:
        return dict(found)


# --- how each peer calls it ----------------------------------------------------------------------------------------------


def _of(module: str, name: str) -> Any:
    """A name of the peer's, its packages' own ``__init__`` left out: they import all there is, installed or not."""
    *packages, _ = module.split(".")
    for i in range(1, len(packages) + 1):
        name_of = ".".join(packages[:i])
        if name_of not in sys.modules:
            package = ModuleType(name_of)
            package.__path__ = [str(Path(sys.path[0], *packages[:i]))]
            sys.modules[name_of] = package
    return getattr(importlib.import_module(module), name)


def _solo_nt_xent(z: Tensor, t: float) -> Formula:
    loss = _of("solo.losses.simclr", "simclr_loss_func")
    if "indexes" in signature(loss).parameters:
        ids = torch.arange(len(z) // 2).repeat(2)
        return lambda: loss(z, ids, t)
    return lambda: loss(*z.chunk(2), t)         # releases up to 1.0.2


def _solo_nearest(z: Tensor, keys: Tensor) -> Formula:
    method = _of("solo.methods.nnclr", "NNCLR")
    state = SimpleNamespace(queue=keys)
    return lambda: torch.cat([method.find_nn(state, view)[1] for view in z.chunk(2)])


def _solo_nnclr(p: Tensor, found: Tensor, t: float) -> Formula:
    return _solo("nnclr", "nnclr_loss_func")(found, p, t)


def _solo(module: str, name: str) -> Callable[..., Formula]:
    def prepared(*given: Any) -> Formula:
        loss = _of(f"solo.losses.{module}", name)
        return lambda: loss(*given)

    return prepared


def _lightly_nt_xent(z: Tensor, t: float) -> Formula:
    loss = _of("lightly.loss.ntx_ent_loss", "NTXentLoss")(temperature=t)
    return lambda: loss(*z.chunk(2))


def _lightly_barlow(z1: Tensor, z2: Tensor, lamb: float, scale: float) -> Formula:
    loss = _of("lightly.loss.barlow_twins_loss", "BarlowTwinsLoss")(lambda_param=lamb)
    return lambda: scale * loss(z1, z2)


def _lightly_vicreg(z1: Tensor, z2: Tensor, similarity: float, variance: float, covariance: float) -> Formula:
    kind = _of("lightly.loss.vicreg_loss", "VICRegLoss")
    loss = kind(lambda_param=similarity, mu_param=2 * variance, nu_param=covariance)     # takes half of the two views' sum
    return lambda: loss(z1, z2)


def _lightly_nearest(z: Tensor, keys: Tensor) -> Formula:
    bank = _of("lightly.models.modules.nn_memory_bank", "NNMemoryBankModule")(size=tuple(keys.shape))
    bank.bank = keys
    return lambda: torch.cat([bank(view, update=False) for view in z.chunk(2)])


def _solo_lars(*tensors: Any, old: bool = False) -> Formula:
    """So many steps: half of the tensors are weights, the others their gradients; the weights after these."""
    *given, lr, decay, eta, steps = tensors
    half = len(given) // 2
    weights, gradients = [p.clone().requires_grad_() for p in given[:half]], given[half:]
    options: dict[str, Any] = {"lr": lr, "momentum": 0.9, "weight_decay": decay}
    if old:
        wrapper = _of("solo.utils.lars", "LARSWrapper")
        optimizer = wrapper(torch.optim.SGD(weights, **options), eta=eta, clip=True, exclude_bias_n_norm=True)
    else:
        kind = _of("solo.utils.lars", "LARS")
        optimizer = kind(weights, **options, eta=eta, clip_lr=True, exclude_bias_n_norm=True)

    def run() -> list[Tensor]:
        for _ in range(int(steps)):
            for p, g in zip(weights, gradients, strict=True):
                p.grad = g.clone()
            optimizer.step()
        return [p.detach() for p in weights]

    return run


FORMULAS: dict[str, dict[str, Callable[..., Formula]]] = {
    "solo": {
        "nt_xent": _solo_nt_xent, "nnclr": _solo_nnclr, "nearest": _solo_nearest,
        "lars": _solo_lars, "old_lars": partial(_solo_lars, old=True),      # releases up to 1.0.2
        "barlow": _solo("barlow", "barlow_loss_func"), "vicreg": _solo("vicreg", "vicreg_loss_func"),
    },
    "lightly": {
        "nt_xent": _lightly_nt_xent, "barlow": _lightly_barlow, "vicreg": _lightly_vicreg, "nearest": _lightly_nearest,
    },
}


# --- the process ---------------------------------------------------------------------------------------------------------


def _work(package: str, message: dict[str, np.ndarray]) -> Callable[[], list[Tensor]]:
    inputs = [torch.from_numpy(message[f"x{i}"]).requires_grad_() for i in range(int(message["inputs"]))]
    constants = [torch.from_numpy(message[f"c{i}"]) for i in range(int(message["constants"]))]
    formula = FORMULAS[package][str(message["formula"])](*inputs, *constants, *message["numbers"].tolist())

    def work() -> list[Tensor]:
        value = formula()
        values = value if isinstance(value, list) else [value]
        return [*(each.detach() for each in values), *(torch.autograd.grad(value, inputs) if inputs else ())]

    return work


def main(path: str, package: str) -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)                               # what the peer prints
    sys.path[0] = path                          # instead of this file's folder
    torch.set_num_threads(1)
    work: Callable[[], list[Tensor]] = list
    while message := receive(sys.stdin.buffer):
        if "runs" in message:
            began = time.process_time()
            for _ in range(int(message["runs"])):
                work()
            send(answers, seconds=time.process_time() - began)
            continue
        try:
            work = _work(package, message)
            found = {f"v{i}": value.numpy() for i, value in enumerate(work())}
        except Exception as error:              # whatever a peer's code raises is said, and that formula left out
            found = {"error": np.array(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")}
        send(answers, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
