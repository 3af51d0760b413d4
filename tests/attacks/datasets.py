"""Data sets: npz, tar, image files, annotations."""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.attacks.registry import Maker, attack, each, payloads, zeros


def npz(compressed: bool = False, replace: dict[str, Any] | None = None, **arrays: Any) -> Maker:
    """A data set of two images, with some arrays exchanged; ``replace`` gives the bytes of a member."""

    def make(file: Path, ran: Path) -> None:
        image = png(8, 8)
        content: dict[str, Any] = {
            "jpeg": np.frombuffer(image * 2, np.uint8), "offsets": np.array([0, len(image), 2 * len(image)]),
            "labels": np.array([0, 1]), "split": np.array([0, 0]), "classes": np.array(["a", "b"]), **arrays,
        }
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED, compresslevel=1) as opened:
            for name, array in content.items():
                array = array(ran) if callable(array) else array
                opened.writestr(f"{name}.npy", (replace or {}).get(name) or dumped(array))

    return make


def dumped(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy(header: str, data: bytes = b"", length: int | None = None, version: bytes = b"\x02\x00") -> bytes:
    words = header.encode()
    return b"\x93NUMPY" + version + struct.pack("<I", len(words) if length is None else length) + words + data


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)).save(buffer, "PNG")
    return buffer.getvalue()


def evil_array(ran: Path) -> np.ndarray:
    array = np.empty(2, dtype=object)
    array[0] = payloads(ran)["os-system"]
    return array


PLAIN = "{'descr': '<i8', 'fortran_order': False, 'shape': (%s,)}\n"
each(
    "npz",
    objects=npz(labels=evil_array),
    objects_as_images=npz(jpeg=evil_array),
    objects_as_names=npz(classes=evil_array),
    header_calls=npz(replace={"labels": npy("__import__('os').system('touch RAN')\n")}),
    header_giant=npz(replace={"labels": npy("{" + " " * (20 << 20) + "}")}),
    header_length_giant=npz(replace={"labels": npy(PLAIN % 2, bytes(16), length=1 << 31)}),
    header_deep=npz(replace={"labels": npy("(" * 5_000 + ")" * 5_000)}),
    version_unknown=npz(replace={"labels": npy(PLAIN % 2, bytes(16), version=b"\x09\x09")}),
    shape_giant=npz(replace={"labels": npy(PLAIN % 10**12, bytes(16))}),
    shape_overflow=npz(replace={"labels": npy(PLAIN % f"{1 << 33}, {1 << 33}", bytes(16))}),
    shape_negative=npz(replace={"labels": npy(PLAIN % -2, bytes(16))}),
    shape_of_text=npz(replace={"labels": npy(PLAIN % "'x'", bytes(16))}),
    bomb=npz(compressed=True, labels=np.zeros(1 << 26, np.int64)),
    offsets_backwards=npz(offsets=np.array([0, 300, 100])),
    offsets_backwards_unsigned=npz(offsets=np.array([0, 1 << 63, 2 * len(png(8, 8))], np.uint64)),
    offsets_negative=npz(offsets=np.array([-50, 10, 2 * len(png(8, 8))])),
    offsets_beyond=npz(offsets=np.array([0, 10, 10**9])),
    offsets_fractions=npz(offsets=np.array([0.0, 10.0, 2.0 * len(png(8, 8))])),
    offsets_none=npz(offsets=np.array([], np.int64)),
    offsets_scalar=npz(offsets=np.array(3)),
    labels_of_text=npz(labels=np.array(["a", "b"])),
    labels_beyond=npz(labels=np.array([0, 7])),
    labels_in_columns=npz(labels=np.zeros((2, 2), np.int64)),
    images_of_numbers=npz(jpeg=np.zeros(2 * len(png(8, 8)))),
    lacks_one=lambda file, ran: zipfile.ZipFile(file, "w").writestr("jpeg.npy", dumped(np.zeros(1))),
    a_pickle=lambda file, ran: file.write_bytes(pickle.dumps(payloads(ran)["os-system"])),
    a_pickled_npy=lambda file, ran: file.write_bytes(dumped(evil_array(ran))),
    hdf5=lambda file, ran: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2048)),
)


# tar


def tar(*members: Any, mode: str = "w") -> Maker:
    """An archive of one good image and these members: (name, changes of the header, content)."""

    def make(file: Path, ran: Path) -> None:
        with tarfile.open(file, mode) as opened:  # type: ignore[call-overload]
            for name, changes, content in [("train/a/0.png", {}, png(8, 8)), *members]:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                for key, value in changes.items():
                    setattr(member, key, value)
                opened.addfile(member, io.BytesIO(content))

    return make


def tar_header(size: bytes, kind: bytes = b"0", name: bytes = b"train/a/1.png") -> bytes:
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108], header[124:136], header[136:148], header[156:157] = b"0000644\0", size, b"00000000000\0", kind
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def tar_with(header: bytes, after: bytes = bytes(1024)) -> Maker:
    def make(file: Path, ran: Path) -> None:
        tar()(file, ran)
        content = file.read_bytes()
        with tarfile.open(file) as opened:
            end = opened.getmembers()[-1]
        file.write_bytes(content[: end.offset_data + 512 * -(-end.size // 512)] + header + after)

    return make


LINK, HARD, DEVICE, PIPE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE
# These are read, without what does not belong there.
each(
    "tar-left-out",
    link=tar(("train/a/1.png", {"type": LINK, "linkname": "/etc/passwd"}, b"")),
    hard_link=tar(("train/a/1.png", {"type": HARD, "linkname": "../../etc/passwd"}, b"")),
    device=tar(("train/a/1.png", {"type": DEVICE, "devmajor": 1, "devminor": 5}, b"")),
    pipe=tar(("train/a/1.png", {"type": PIPE}, b"")),
    same_name=tar(("train/a/0.png", {}, b"another")),
    program=tar(("train/a/evil.py", {"mode": 0o4755}, b"import os")),
    negative_size=tar_with(tar_header(b"\xff" + b"\xff" * 9 + b"\xfc\x00")),
    size_giant=tar_with(tar_header(b"77777777777\0")),
    long_name_giant=tar_with(tar_header(b"77777777777\0", b"L")),
    pax_giant=tar_with(tar_header(b"77777777777\0", b"x")),
    pax_nonsense=tar_with(tar_header(b"00000000100\0", b"x"), b"99999999999 path=x\n" + bytes(4096)),
)
each(
    "tar",
    compressed=tar(mode="w:gz"),
    compressed_bomb=lambda file, ran: file.write_bytes(zeros()),
    zip=lambda file, ran: zipfile.ZipFile(file, "w").writestr("../../evil.png", png(8, 8)),
    a_pickle=lambda file, ran: file.write_bytes(pickle.dumps(payloads(ran)["os-system"])),
    only_links=lambda file, ran: _only_links(file),
    shell=lambda file, ran: file.write_bytes(f"#!/bin/sh\ntouch {ran}\n".encode()),
)


def _only_links(file: Path) -> None:
    with tarfile.open(file, "w") as opened:
        member = tarfile.TarInfo("train/a/0.png")
        member.type, member.linkname = LINK, "/etc/passwd"
        opened.addfile(member)


# Images


def png_of(width: int, height: int, data: bytes = b"", *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def jpeg(width: int = 16, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)).save(buffer, "JPEG")
    content = bytearray(buffer.getvalue())
    place = content.index(b"\xff\xc0")
    struct.pack_into(">HH", content, place + 5, height, width)
    return bytes(content)


EPS = b"%%!PS-Adobe-3.0 EPSF-3.0\n%%%%BoundingBox: 0 0 9 9\n(%s) (w) file closefile\n"
IMAGES: dict[str, bytes | Callable[[Path], bytes]] = {
    "png-bomb": lambda ran: png_of(20_000, 20_000, zeros()),
    "png-giant": png_of(2**31 - 1, 2**31 - 1),
    "png-without-data": png_of(8_000, 8_000),
    "png-text-bomb": lambda ran: png_of(8, 8, zlib.compress(bytes(200)), (b"zTXt", b"x\0\0" + zeros())),
    "png-profile-bomb": lambda ran: png_of(8, 8, b"", (b"iCCP", b"x\0\0" + zeros())),
    "png-chunk-giant": b"\x89PNG\r\n\x1a\n\xff\xff\xff\xffIHDR",
    "jpeg-giant": jpeg(65_535, 65_535),
    "jpeg-zero": jpeg(0, 0),
    "jpeg-cut": jpeg()[:200],
    "gif-giant": b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\x00\x00\x00\x00\xff\xff\xff\xff\x00\x08\xff" + bytes(300),
    "bmp-giant": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm-giant": b"P6 100000 100000 255\n",
    "ppm-long-number": b"P6 " + b"9" * 1_000_000,
    "tiff-loop": b"II*\0\x08\0\0\0\1\0\x00\x01\x04\0\1\0\0\0\xff\xff\xff\x7f\x08\0\0\0",
    "webp-giant": b"RIFF\xff\xff\xff\xffWEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff",
    "eps": lambda ran: EPS % str(ran).encode(),
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "html": b"<html><script>1</script></html>",
    "xpm": b"/* XPM */ static char *x[] = {\"1000000 1000000 1 1\", \"a c #000\"};",
    "pickle": lambda ran: pickle.dumps(payloads(ran)["os-system"]),
    "empty": b"",
}
for name, content in IMAGES.items():
    attack(f"image/{name}")(
        lambda file, ran, content=content: file.write_bytes(content(ran) if callable(content) else content))


# Pascal VOC annotations


LAUGHS = "<!DOCTYPE l [<!ENTITY a 'ha'>" + "".join(
    f"<!ENTITY {chr(98 + i)} '{f'&{chr(97 + i)};' * 10}'>" for i in range(9)) + "]>"
each(
    "voc",
    laughs=lambda file, ran: file.write_text(f"{LAUGHS}<annotation><object><name>&j;</name></object></annotation>"),
    outside=lambda file, ran: file.write_text(
        "<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><annotation><object><name>&x;</name></object></annotation>"),
    deep=lambda file, ran: file.write_text("<annotation>" * 100_000),
    large=lambda file, ran: file.write_text("<annotation>" + " " * (5 << 20) + "</annotation>"),
    another=lambda file, ran: file.write_text("<html/>"),
    codec=lambda file, ran: file.write_text("<?xml version='1.0' encoding='evil'?><annotation/>"),
)
