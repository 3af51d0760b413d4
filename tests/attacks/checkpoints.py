"""Checkpoints, safetensors and manifests."""

import io
import json
import pickle
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.attacks.registry import Maker, attack, each, payloads

PLACES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda evil: evil,
    "weight": lambda evil: whole(state_dict={"backbone.w": evil}),
    "key": lambda evil: {**whole(), (1, evil): 1},
    "optimizer": lambda evil: whole(optimizer_states=[{"state": {0: {"momentum_buffer": evil}}}]),
    "callbacks": lambda evil: whole(callbacks={"x": {"y": [evil]}}),
    "hyper-parameters": lambda evil: whole(hyper_parameters=evil),
    "solo": lambda evil: whole(solo=evil),
    "loops": lambda evil: whole(loops={"fit_loop": (evil,)}),
    "metadata": lambda evil: whole(state_dict=_with_metadata(evil)),
}


def _with_metadata(evil: Any) -> Any:
    state = OrderedDict(w=torch.zeros(1))
    state._metadata = evil  # type: ignore[attr-defined]
    return state


def whole(**changes: Any) -> dict[str, Any]:
    """What one of our checkpoints holds."""
    facts = json.dumps({"version": "0", "method": "nnclr", "config": {}})
    return {"state_dict": {"backbone.w": torch.zeros(4)}, "global_step": 1, "epoch": 0, "solo": facts, **changes}


def config_of(**config: Any) -> dict[str, Any]:
    return whole(solo=json.dumps({"version": "0", "method": "nnclr", "config": config}))


def save(content: Any, file: Path, **options: Any) -> None:
    torch.save(content, file, **options)


def saved(content: Any) -> Maker:
    return lambda file, ran: save(content, file)


def resnet(**kwargs: Any) -> Maker:
    """A checkpoint that asks for such a ResNet."""
    return saved(config_of(backbone={"name": "resnet18", "kwargs": kwargs}))


PAYLOADS: dict[str, Maker] = {
    f"{payload}-as-{place}": lambda file, ran, put=put, payload=payload: save(put(payloads(ran)[payload]), file)
    for place, put in PLACES.items() for payload in ("os-system", "exec", "popen")
} | {
    payload: lambda file, ran, payload=payload: save(whole(x=payloads(ran)[payload]), file)
    for payload in ("eval", "open", "path", "runpy", "torch-load", "getattr")
}
for name, make in PAYLOADS.items():
    attack(f"checkpoint/{name}")(make)


def legacy_tar(file: Path, ran: Path) -> None:
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps(payloads(ran)["os-system"], protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


each(
    "checkpoint",
    legacy_pickle=lambda file, ran: save(whole(x=payloads(ran)["os-system"]), file, _use_new_zipfile_serialization=False),
    legacy_plain=lambda file, ran: save(whole(), file, _use_new_zipfile_serialization=False),
    legacy_tar=legacy_tar,
    bare_pickle=lambda file, ran: file.write_bytes(pickle.dumps(payloads(ran)["os-system"])),
    bare_pickle_0=lambda file, ran: file.write_bytes(pickle.dumps(payloads(ran)["exec"], protocol=0)),
    protocol_5=lambda file, ran: save(whole(x=payloads(ran)["exec"]), file, pickle_protocol=5),
)


# Archives by hand.

def described(value: bytes) -> bytes:
    """The pickle of a checkpoint whose key ``x`` is what these words make."""
    facts = text(json.dumps({"version": "0", "method": "nnclr", "config": {}}))
    parts = (text("state_dict") + b"}", text("epoch") + number(0), text("global_step") + number(1), text("solo") + facts)
    return b"\x80\x02}(" + b"".join(parts) + text("x") + value + b"u."


def archive(file: Path, description: bytes, members: dict[str, bytes] | None = None, compressed: bool = False) -> None:
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", kind, compresslevel=1) as opened:
        warnings.simplefilter("ignore")     # two members of one name
        opened.writestr("archive/data.pkl", description)
        for name, content in {"version": b"3\n", "byteorder": b"little", **(members or {})}.items():
            opened.writestr(name if name.startswith(("/", "..", "a/")) else f"archive/{name}", content)


def number(n: int) -> bytes:
    size = (n.bit_length() + 8) // 8
    return b"\x8a" + bytes([size]) + n.to_bytes(size, "little", signed=True)


def call(name: str, *arguments: bytes) -> bytes:
    return f"c{name.rpartition('.')[0]}\n{name.rpartition('.')[2]}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def text(word: str) -> bytes:
    return b"X" + struct.pack("<I", len(word)) + word.encode()


def tensor(numel: int = 4, shape: int = 4, stride: int = 1, offset: int = 0, key: str = "0", place: str = "cpu") -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text(place) + number(numel) + b"tQ"
    sizes = b"(" + number(shape) + b"t" + b"(" + number(stride) + b"t"
    return call("torch._utils._rebuild_tensor_v2", storage, number(offset), sizes, b"\x89", call("collections.OrderedDict"))


WORDS: dict[str, bytes] = {
    "storage-larger-than-its-record": tensor(numel=10**6),
    "storage-of-a-terabyte": tensor(numel=10**12),
    "storage-negative": tensor(numel=-4),
    "storage-elsewhere": tensor(key="../../version"),
    "storage-absolute": tensor(key="/etc/passwd"),
    "shape-giant": tensor(shape=10**12),
    "shape-by-stride-0": tensor(shape=10**12, stride=0),
    "shape-negative": tensor(shape=-1),
    "offset-beyond": tensor(offset=10**9),
    "offset-negative": tensor(offset=-2),
    "persistent-id-of-another-kind": b"(" + text("module") + text("os") + b"tQ",
    "persistent-id-text": text("storage") + b"Q",
    "persistent-id-number": number(7) + b"Q",
    "bytearray-of-a-terabyte": call("builtins.bytearray", number(10**12)),
    "bytearray-by-its-old-name": call("__builtin__.bytearray", number(10**12)),
    "bytearray-of-half-a-gigabyte": call("builtins.bytearray", number(1 << 29)),
    "tensor-unfilled": call("torch.Tensor", number(10**8)),
    "tensor-class-unfilled": call("torch.FloatTensor", number(10**8)),
    "storage-class-unfilled": call("torch.storage.UntypedStorage", number(10**9)),
    "sparse-giant": call(
        "torch._utils._rebuild_sparse_tensor", call("torch.serialization._get_layout", text("torch.sparse_coo")),
        b"(" + tensor() + tensor() + b"(" + number(10**9) + b"t\x89t"),
    "meta-tensor": call("torch._utils._rebuild_meta_tensor_no_storage", b"ctorch\nfloat32\n", b"(" + number(10**12) + b"t",
                        b"(" + number(1) + b"t", b"\x89"),
    "numpy-array": call("torch._utils._rebuild_device_tensor_from_numpy", tensor(), text("float32"), text("cpu"), b"\x89"),
    "any-type": call("torch._tensor._rebuild_from_type_v2", b"ctorch\nTensor\n" * 2, b"(" + number(4) + b"t", b"}"),
    "codec": call("_codecs.encode", text("x" * 200_000), text("punycode")),
    "counter": call("collections.Counter", text("abc")),
    "nested-100000-deep": b"]" * 100_000 + b"a" * 99_999,
    "itself-inside": b"]q\x05h\x05a",
    "doubled-40-times": b"(]q\x05%st" % b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(5, 45)),
    "a-million-lists": b"(" + b"]" * 1_000_001 + b"t",
    "stack-global": text("os") + text("system") + b"\x93",
    "unknown-word": b"\xff",
    "set-of-lists": call("builtins.set", b"(]t"),
}
FOUR = {"data/0": bytes(16)}
for name, words in WORDS.items():
    attack(f"checkpoint/{name}")(lambda file, ran, words=words: archive(file, described(words), FOUR))


def overlapping(file: Path, ran: Path) -> None:
    """A thousand names for the same bytes."""
    archive(file, described(tensor()), {"data/0": bytes(1 << 20), **{f"data/{i}": b"" for i in range(1, 300)}})
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as opened:
        first = opened.getinfo("archive/data/0")
    place = content.find(b"PK\1\2")
    while place >= 0:
        if b"archive/data/" in content[place + 46 : place + 62]:
            struct.pack_into("<LLL", content, place + 16, first.CRC, first.file_size, first.file_size)
            struct.pack_into("<L", content, place + 42, first.header_offset)
        place = content.find(b"PK\1\2", place + 1)
    file.write_bytes(content)


def with_member(file: Path, name: str, content: bytes) -> None:
    archive(file, described(tensor()), {**FOUR, name: content})


def wrapped(file: Path, before: bytes = b"", after: bytes = b"") -> None:
    archive(file, described(tensor()), FOUR)
    file.write_bytes(before + file.read_bytes() + after)


def with_comment(file: Path) -> None:
    wrapped(file)
    content = bytearray(file.read_bytes())
    struct.pack_into("<H", content, len(content) - 2, 30)
    file.write_bytes(content + b"PK\5\6" + bytes(18) + b"\0" * 8)


def second_archive(file: Path, ran: Path) -> None:
    archive(file, described(call("builtins.bytearray", number(1 << 29))), FOUR)
    first = file.read_bytes()
    archive(file, described(tensor()), FOUR)
    file.write_bytes(first + file.read_bytes())


def two_descriptions(file: Path, ran: Path) -> None:
    archive(file, described(tensor()), FOUR)
    with warnings.catch_warnings(), zipfile.ZipFile(file, "a") as opened:
        warnings.simplefilter("ignore")
        opened.writestr("archive/data.pkl", pickle.dumps(payloads(ran)["os-system"], protocol=2))


def cut(share: float) -> Maker:
    def make(file: Path, ran: Path) -> None:
        save(whole(), file)
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])

    return make


each(
    "checkpoint",
    more_pickles=lambda file, ran: with_member(file, "extra.pkl", pickle.dumps(payloads(ran)["exec"], 2)),
    code_of_torchscript=lambda file, ran: with_member(file, "code/__torch__.py", b"import os"),
    two_descriptions=two_descriptions,
    second_archive=second_archive,
    bytes_before=lambda file, ran: wrapped(file, before=b"#!/bin/sh\n"),
    bytes_after=lambda file, ran: wrapped(file, after=b"\0" * 64),
    comment=lambda file, ran: with_comment(file),
    byteorder=lambda file, ran: with_member(file, "byteorder", b"middle"),
    no_description=lambda file, ran: zipfile.ZipFile(file, "w").writestr("archive/version", "3"),
    traversal=lambda file, ran: with_member(file, "../../evil/data/1", bytes(4)),
    traversal_absolute=lambda file, ran: with_member(file, "/tmp/evil/data/1", bytes(4)),
    two_roots=lambda file, ran: with_member(file, "a/data/1", bytes(4)),
    bomb=lambda file, ran: archive(file, described(tensor(numel=1 << 28)), {"data/0": bytes(1 << 30)}, compressed=True),
    overlap=overlapping,
    many_members=lambda file, ran: archive(file, described(tensor()), {f"data/{i}": b"" for i in range(60_000)}),
    many_keys=lambda file, ran: save(whole(state_dict={f"backbone.{i}": i for i in range(1_000_000)}), file),
    weights_of_text=saved(whole(state_dict={"backbone.w": "text"})),
    weights_of_numbers=saved(whole(state_dict={1: torch.zeros(1), "x": torch.zeros(1)})),
    weights_in_a_list=saved(whole(state_dict=[torch.zeros(1)])),
    a_list=lambda file, ran: save([1, 2], file),
    a_tensor=lambda file, ran: save(torch.zeros(3), file),
    steps_of_text=saved(whole(global_step="1")),
    facts_deep=saved(whole(solo="[" * 100_000)),
    facts_huge=saved(whole(solo="[" + "1," * (4 << 20) + "1]")),
    facts_of_another_kind=saved(whole(solo="[]")),
    facts_no_json=saved(whole(solo="__import__('os')")),
    instantiator=saved(whole(hyper_parameters={"_instantiator": "os.system", "_class_path": "os.system"})),
    hub=saved(config_of(backbone={"name": "hf-hub:somebody/evil"})),
    local_dir=saved(config_of(backbone={"name": "local-dir:."})),
    fetches_weights=resnet(pretrained_cfg={"url": "x"}),
    loads_weights=resnet(checkpoint_path="x"),
    model_of_a_million_layers=resnet(layers=[10**6, 1, 1, 1]),
    model_of_giant_layers=resnet(channels=[1 << 20] * 4),
    crops_of_giant_size=saved(config_of(backbone={"name": "resnet18"}, augmentations=[{"crop_size": 10**6}])),
    backbone_of_text=saved(config_of(backbone="resnet18")),
    empty=lambda file, ran: file.write_bytes(b""),
    gzip=lambda file, ran: file.write_bytes(b"\x1f\x8b" + zlib.compress(pickle.dumps(payloads(ran)["exec"]))),
    cut_at_the_end=cut(0.98),
    cut_in_half=cut(0.5),
    cut_at_the_start=cut(0.05),
)


# safetensors


def safetensors(header: Any, data: bytes = bytes(16), length: int | None = None) -> Maker:
    def make(file: Path, ran: Path) -> None:
        words = header if isinstance(header, bytes) else json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(words) if length is None else length) + words + data)

    return make


W = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
each(
    "safetensors",
    header_giant=safetensors({"w": W}, length=1 << 40),
    header_of_80_MiB=safetensors(b"{" + b" " * (80 << 20) + b"}"),
    header_no_json=safetensors(b"import os"),
    header_deep=safetensors(b"[" * 100_000),
    shape_giant=safetensors({"w": {**W, "shape": [1 << 40]}}),
    shape_overflow=safetensors({"w": {**W, "shape": [1 << 32, 1 << 32]}}),
    beyond=safetensors({"w": {**W, "data_offsets": [0, 1 << 30]}}),
    overlapping=safetensors({"w": W, "v": W}),
    facts_deep=safetensors({"w": W, "__metadata__": {"solo": "[" * 100_000}}),
    facts_fetch=safetensors({"w": W, "__metadata__": {"solo": json.dumps(
        {"method": "x", "config": {"backbone": {"name": "resnet18", "kwargs": {"checkpoint_path": "x"}}}})}}),
    a_pickle=lambda file, ran: file.write_bytes(pickle.dumps(payloads(ran)["os-system"])),
)


# manifest.json beside one good checkpoint


GOOD = "0" * 64
ROW = {"file": "good.ckpt", "sha256": GOOD, "step": 1, "epoch": 0, "keep": False}


def manifest(content: Any) -> Maker:
    return lambda file, ran: file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


each(
    "manifest",
    no_json=manifest(b"import os"),
    a_dictionary=manifest(ROW),
    numbers=manifest([1, 2]),
    deep=manifest(b"[" * 200_000),
    huge=manifest(b"[" + b"1," * (4 << 20) + b"1]"),
    no_text=manifest(b"\xff\xfe\x00"),
    more_keys=manifest([{**ROW, "__class__": "os.system"}]),
    fewer_keys=manifest([{"file": "good.ckpt"}]),
    file_above=manifest([{**ROW, "file": "../victim"}]),
    file_absolute=manifest([{**ROW, "file": "/etc/passwd"}]),
    file_is_the_folder=manifest([{**ROW, "file": ".."}]),
    file_empty=manifest([{**ROW, "file": ""}]),
    file_hidden=manifest([{**ROW, "file": ".ssh"}]),
    file_with_nul=manifest([{**ROW, "file": "good.ckpt\0"}]),
    file_a_number=manifest([{**ROW, "file": 3}]),
    sum_of_another=manifest([ROW]),
    sum_short=manifest([{**ROW, "sha256": "0"}]),
    sum_null=manifest([{**ROW, "sha256": None}]),
    step_of_text=manifest([{**ROW, "step": "9"}, ROW]),
    step_not_a_number=manifest(json.dumps([{**ROW, "step": float("nan")}]).encode()),
    keep_of_text=manifest([{**ROW, "keep": "yes"}]),
)
