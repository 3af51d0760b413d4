"""Files that somebody else may have written: judged before they are used, within bounds, and never run.

What a file of tensors may hold is decided here, before torch sees it: stored members under the names that ``torch.save``
gives them, no larger together than the file, and a description that names nothing but tensors and plain containers. So no
file costs much more memory than its own size, and nothing in it is called.
"""

import json
import math
import pickletools
import re
import stat
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # tables only: Python 2's names of today's modules
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from solo.errors import ConfigError

MAX_JSON = 4 << 20              # bytes
MAX_DEPTH = 64                  # of containers
_MAX_DESCRIPTION = 8 << 20      # bytes of what describes the tensors; a ResNet-50 with its optimizer needs 0.1 MB
_MAX_WORDS = 1_000_000          # of it
_MAX_DIRECTORY = 16 << 20       # bytes
_SPARE = 64 << 20               # bytes that a compressed file may grow by, besides twice its size

_MEMBER = re.compile(
    r"[^/\\]+/(data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble".split()
_NAMES = {
    "collections.OrderedDict", "builtins.set", "torch.Size", "torch.device", "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter", *(f"torch.{name}Storage" for name in _STORAGES),
    *(str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}


class Inert:
    """Stands for every object of a foreign file that is neither tensor nor plain container: nothing of it is run."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


def parse_json(text: str | bytes) -> Any:
    """Plain values out of JSON.

    Raises:
        ValueError: it is none, larger than `MAX_JSON` or nested too deeply.
    """
    if len(text) > MAX_JSON:
        raise ValueError(f"larger than {MAX_JSON >> 20} MiB")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path: Path) -> Any:
    """A JSON file; errors as of `parse_json`, and `OSError`. A pipe is none: nobody may ever write to it."""
    if stat.S_ISFIFO(path.stat().st_mode):
        raise ValueError("a pipe")
    with path.open("rb") as file:
        return parse_json(file.read(MAX_JSON + 1))


def read_tensors(path: str | Path, stand_ins: bool = False) -> dict[str, Any]:
    """Tensors and plain values of a file of ``torch.save``, on the CPU.

    Args:
        path: the file.
        stand_ins: take objects of other kinds too, each as an `Inert`: foreign checkpoints hold their configs this way.

    Raises:
        ConfigError: the file is missing, damaged, or holds anything else; one line.
    """
    try:
        sizes, names = _judge(Path(path))
        others = names - _NAMES
        if stand_ins and others:
            others -= set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
        if others:
            raise ValueError(f"it names {', '.join(sorted(others)[:3])}, which is neither a tensor nor a plain value")
        with torch.serialization.safe_globals([(Inert, name) for name in names - _NAMES]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
        _judge_content(content, sizes, (Inert,) if stand_ins else ())
    except Exception as error:  # the unpickler and the zip reader raise many kinds
        raise ConfigError(f"{path} cannot be loaded as tensors and plain values: {_reason(error)}") from error
    return content


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if blocked := re.search(r"unsupported GLOBAL (\S+) whose module \S+ is blocked", text):
        return f"it names {blocked[1]}, which could do harm"        # torch advises to load it nevertheless
    return text.splitlines()[0][:200] if text else type(error).__name__


def _judge(path: Path) -> tuple[set[int], set[str]]:
    """The sizes of the members and the names in the description; every checksum is verified."""
    with path.open("rb") as file:
        size = path.stat().st_size
        _judge_directory(file, size)
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            strange = [member.filename for member in members if not _MEMBER.fullmatch(member.filename)]
            if strange or len({member.filename.split("/")[0] for member in members}) != 1:
                raise ValueError(f"it holds {(strange or ['several archives'])[0]!r}, which is no part of a file of tensors")
            if any(member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1 for member in members):
                raise ValueError("it is compressed or encrypted")
            if len({member.filename for member in members}) < len(members) or sum(m.file_size for m in members) > size:
                raise ValueError("its members overlap")
            description = next((member for member in members if member.filename.endswith("/data.pkl")), None)
            if description is None or description.file_size > _MAX_DESCRIPTION:
                raise ValueError("its description is missing or larger than 8 MiB")
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} differs")
            return {member.file_size for member in members}, _names(archive.read(description))


def _judge_directory(file: BinaryIO, size: int) -> None:
    """The archive's directory must end where the file does, so that every reader finds the same one, and be small."""
    file.seek(max(0, size - 98))
    tail = file.read()
    end, long_end = tail[-22:], tail[-98:-42]
    if len(end) < 22 or end[:4] != b"PK\5\6":
        raise ValueError("it is no archive of torch.save, or was cut")
    length, offset = struct.unpack("<LL", end[12:20])
    if tail[-42:-38] == b"PK\6\7":
        (place,) = struct.unpack("<Q", tail[-34:-26])
        if place != size - 98 or long_end[:4] != b"PK\6\6":
            raise ValueError("its directory is not where it should be")
        length, offset = struct.unpack("<QQ", long_end[40:56])
        size -= 76
    if offset + length != size - 22 or length > _MAX_DIRECTORY:
        raise ValueError("its directory is not where it should be, or too large")


def _names(description: bytes) -> set[str]:
    names = set()
    for count, (word, argument, _) in enumerate(pickletools.genops(description)):
        if count > _MAX_WORDS:
            raise ValueError(f"its description is longer than {_MAX_WORDS} words")
        if word.name == "GLOBAL":
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))     # as torch does
            names.add(f"{module}.{name}")
    return names


def _judge_content(content: Any, sizes: set[int], also: tuple[type, ...]) -> None:
    """Only tensors that lie wholly in the file, and plain containers, neither deep nor large when all is written out."""
    plain: tuple[type, ...] = (str, bytes, int, float, complex, type(None), torch.dtype, torch.device, *also)
    known: dict[int, int] = {}      # of each container, how many values it has with those inside

    def count(value: Any, depth: int) -> int:
        if isinstance(value, Tensor):
            _judge_tensor(value, sizes)
        if isinstance(value, Tensor) or isinstance(value, plain):
            return 1
        if not isinstance(value, (Mapping, list, tuple, set)):
            raise ValueError(f"it holds a {type(value).__name__}")
        if id(value) not in known:
            if depth == MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            parts = [*value, *value.values()] if isinstance(value, Mapping) else value
            known[id(value)] = 1 + sum(count(part, depth + 1) for part in parts)
        if known[id(value)] > _MAX_WORDS:
            raise ValueError(f"it has more than {_MAX_WORDS} values")
        return known[id(value)]

    count(content, 0)


def _judge_tensor(tensor: Tensor, sizes: set[int]) -> None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"it holds a tensor of layout {tensor.layout} on {tensor.device}")
    stored = tensor.untyped_storage().nbytes()
    if stored and stored not in sizes:
        raise ValueError("it holds a tensor larger than its storage")
    if tensor.numel() * tensor.element_size() > stored:
        raise ValueError(f"it declares a tensor {list(tensor.shape)} that it does not hold")


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        ConfigError: it is none, or its header is too large; one line.
    """
    try:
        with open(path, "rb") as file:
            if int.from_bytes(file.read(8), "little") > _MAX_DESCRIPTION:
                raise ValueError("its header is larger than 8 MiB")
        with safe_open(str(path), framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, dict(opened.metadata() or {})
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {_reason(error)}") from error


def read_arrays(path: str | Path, names: Iterable[str]) -> list[np.ndarray]:
    """Plain arrays of an ``.npz`` file, by name.

    Raises:
        ValueError: the file cannot be opened, is damaged or lacks one, or one is of objects or not what it declares.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > 2 * Path(path).stat().st_size + _SPARE:
                raise ValueError("it holds far more than its size")
            return [_array(archive, f"{name}.npy") for name in names]
    except Exception as error:  # the zip reader, zlib and numpy's parser of headers raise many kinds
        raise ValueError(_reason(error)) from error


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if header is None:
            raise ValueError(f"{name} is of a version that nobody writes")
        shape, columns_first, dtype = header(file)
        count = math.prod(int(side) for side in shape)
        held = archive.getinfo(name).file_size - file.tell()
        if dtype.hasobject or min(shape, default=0) < 0 or count * dtype.itemsize != held:
            raise ValueError(f"{name} is of objects, or not of the size it declares")
        array = np.frombuffer(file.read(held), dtype=dtype, count=count)
        return array.reshape(shape, order="F" if columns_first else "C")
