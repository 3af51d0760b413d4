"""Where a kernel runs instead of its eager twin, and how its work is cut up: by fixed rules, nothing is tuned at run time."""

import logging
import os
import shutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from solo.errors import ConfigError

log = logging.getLogger(__name__)
SWITCH = "SOLO_KERNELS"     # "off": eager twins everywhere
WIDEST = 256                # columns D that a program keeps at hand
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = 4            # programs that the interpreter's work is split over: enough to meet every merge


def uses_triton(*tensors: Tensor) -> bool:
    """Whether Triton takes tensors [..., D]: 16 or 32 bits, D up to `WIDEST`, not empty, on the current GPU (NVIDIA, from
    compute capability 8.0 on) or in Triton's interpreter.

    Raises:
        ConfigError: ``SOLO_KERNELS`` is neither ``auto`` nor ``off``.
    """
    fit = all(x.dtype in _DTYPES and x.numel() > 0 and x.shape[-1] <= WIDEST for x in tensors)
    return not any(_hindrance(device) for device in {x.device for x in tensors}) and fit


def runner(device: torch.device | str) -> str:
    """What runs the kernels on a device of this process, and why, for comparison with other processes: it rounds otherwise."""
    try:
        if why := _hindrance(torch.device(device)):
            return f"torch, {why}"
    except ConfigError as error:        # raised by the first step, together with the others
        return str(error)
    import triton  # here, as a run without it must work

    return f"Triton {triton.__version__}"


def _hindrance(device: torch.device) -> str:
    """What keeps Triton from a device, or nothing."""
    switch = os.environ.get(SWITCH, "auto")
    if switch not in ("auto", "off"):
        raise ConfigError(f"{SWITCH} is auto or off, got {switch!r}")
    if switch == "off":
        return f"{SWITCH}=off"
    if not (_able(device.index) if device.type == "cuda" else interpreted()):
        return "no GPU that Triton takes"
    if find_spec("triton") is None:
        return "no Triton"
    return "" if interpreted() or compiler() else "no C compiler (install gcc or set CC)"


@cache
def compiler() -> bool:
    """Whether there is the C compiler that Triton needs for its first launch; if not, that is said once."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not found:
        log.warning("no C compiler here, which Triton needs: the losses and look-ups run by torch (install gcc or set CC)")
    return bool(found)


def _able(index: int) -> bool:
    current = index == torch.cuda.current_device() and torch.version.hip is None
    return current and torch.cuda.get_device_capability(index) >= (8, 0)


def interpreted() -> bool:
    """Whether Triton runs on the CPU; it reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What sums, statistics and results of ``dtype`` are kept in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def input_precision() -> str:
    """How float32 operands are multiplied: TF32 where torch's own products may use it, else nearly as exact as float32.

    Torch's may after ``torch.set_float32_matmul_precision("high")`` or by the newer ``fp32_precision``, behind which the
    former's getter raises an error. Else three TF32 products on tensor cores (``tf32x3``), for plain float32 products would
    not fit in registers; the interpreter has real ones.
    """
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee" if interpreted() else "tf32x3"


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a program's tile, warps and pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int


_SMALLEST = Tiles(16, 32, 4, 1)


def tiles(memory: int, width: int, dtype: torch.dtype, precision: str, accumulates: bool) -> Tiles:
    """The largest tiles that fit.

    Args:
        memory: bytes of shared memory a program may have.
        width: D, padded.
        dtype: of the columns.
        precision: of `input_precision`.
        accumulates: the program sums rows of width D in registers too.
    """
    if dtype == torch.float32 and precision == "tf32x3":                        # operands in two parts: no room for stages
        fitting = [shape for shape in ((64, 32), (32, 32)) if sum(shape) * width * 8 <= memory]
        return Tiles(*fitting[0], 8, 1) if fitting else _SMALLEST
    for rows, columns in ((128, 128), (128, 64), (64, 64), (64, 32))[accumulates:]:
        weights = rows * columns * 4 if accumulates else 0                      # on their way from one product to the next
        stages = (memory - rows * width * dtype.itemsize - weights) // (columns * width * dtype.itemsize)
        if stages >= 2:
            wide = rows == 128 or (accumulates and dtype == torch.float32)
            return Tiles(rows, columns, 8 if wide else 4, min(3, stages))
    return _SMALLEST


@cache
def _device(index: int) -> tuple[int, int]:
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count


def cut(rows: int, columns: int, like: Tensor, precision: str, accumulates: bool) -> tuple[Tiles, int, int]:
    """How ``rows`` x ``columns`` similarities are shared out.

    Args:
        like: the columns [..., D]: their device, width and dtype.
        precision, accumulates: see `tiles`.

    Returns:
        Tiles, parts that the columns are split into so that a few rows fill the device, and columns of a part.
    """
    if interpreted():
        shape, processors = Tiles(32, 64, 4, 1), _INTERPRETED
    else:
        memory, processors = _device(like.device.index)
        shape = tiles(memory, padded(like.shape[-1]), like.dtype, precision, accumulates)
    wanted = max(1, min(32, processors // -(-rows // shape.rows)))
    column_tiles = -(-columns // shape.columns)
    per_part = -(-column_tiles // wanted) * shape.columns
    return shape, -(-columns // per_part), per_part


def padded(width: int) -> int:
    """The power of two, 16 at least, that a tile of ``width`` columns takes up."""
    return max(16, 1 << (width - 1).bit_length())
