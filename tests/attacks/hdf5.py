"""HDF5 files: what leads out of them, what would need foreign code, what is larger than it can be, what is not as it says.

Where a file leads to another one, that is a pipe: whoever opened it would wait for ever.
"""

import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from solo.data.hdf5 import ARRAYS, checksum
from tests.attacks.datasets import png
from tests.attacks.registry import Maker, each, payloads, zeros

IMAGE = np.frombuffer(png(8, 8), np.uint8)
U8 = h5py.h5t.NATIVE_UINT8
OUTSIDE = "outside.h5"
Change = Callable[[h5py.File], object]


def groups(image: Change) -> Maker:
    """A file of one class with the image that ``image`` makes of ``a/0.png``."""

    def make(file: Path, ran: Path) -> None:
        os.mkfifo(file.with_name(OUTSIDE))
        with h5py.File(file, "w") as opened:
            opened.create_group("a")
            image(opened)

    return make


def good_groups(file: Path) -> None:
    with h5py.File(file, "w") as opened:
        for name in ("a/0.png", "a/1.png", "b/0.png"):
            opened.create_dataset(name, data=IMAGE, compression=None if name == "a/0.png" else "gzip")


def packed(change: Change = lambda opened: None, seal: bool = True, **arrays: Any) -> Maker:
    """A packed file of two images with these arrays exchanged, then changed; its checksum is right if ``seal``."""

    def make(file: Path, ran: Path) -> None:
        os.mkfifo(file.with_name(OUTSIDE))
        good_packed(file, seal, **arrays)
        with h5py.File(file, "r+") as opened:
            change(opened)

    return make


def good_packed(file: Path, seal: bool = True, libver: Any = ("v110", "v110"), **arrays: Any) -> None:
    content = {"offsets": np.array([0, len(IMAGE), 2 * len(IMAGE)]), "labels": np.array([0, 1]),
               "names": np.array([b"a/0.png", b"b/0.png"]), "classes": np.array([b"a", b"b"]), **arrays}
    with h5py.File(file, "w", libver=libver) as opened:
        opened.attrs["solo_images"] = 1
        opened["bytes/000000"] = np.concatenate([IMAGE, IMAGE])
        for name in ARRAYS:
            opened[name] = content[name]
        if seal:
            opened.attrs["complete"] = checksum(**content)


def good_unsealed(file: Path) -> None:
    """In HDF5's older format, which has no checksums of its own."""
    good_packed(file, seal=False, libver=None)
    with h5py.File(file, "r+") as opened:
        opened.attrs["complete"] = 1


def dataset(name: str, shape: tuple[int, ...], kind: Any = U8, chunk: int | None = None, filters: tuple[int, ...] = (),
            data: dict[int, bytes] | None = None) -> Change:
    """A dataset made by hand, with these chunks as they are to be stored."""

    def change(opened: h5py.File) -> None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        if chunk is not None:
            properties.set_chunk((chunk,))
        for number in filters:
            properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, (9,) if number == h5py.h5z.FILTER_DEFLATE else ())
        if name in opened:
            del opened[name]
        path, _, last = name.rpartition("/")
        place = opened.require_group(path) if path else opened
        space = h5py.h5s.create_simple(shape, (h5py.h5s.UNLIMITED,) if chunk else None)
        made = h5py.h5d.create(place.id, last.encode(), kind, space, properties)
        for start, content in (data or {}).items():
            made.write_direct_chunk((start,), content)

    return change


def outside(name: str, n: int) -> Change:
    def change(opened: h5py.File) -> None:
        if name in opened:
            del opened[name]
        opened.create_dataset(name, (n,), np.uint8, external=[(OUTSIDE, 0, n)])

    return change


def virtual(name: str, n: int, kind: Any = np.uint8) -> Change:
    def change(opened: h5py.File) -> None:
        if name in opened:
            del opened[name]
        layout = h5py.VirtualLayout((n,), kind)
        layout[:] = h5py.VirtualSource(OUTSIDE, "x", (n,))
        opened.create_virtual_dataset(name, layout)

    return change


def virtual_endless(opened: h5py.File) -> None:
    """Asking for its length alone would open the other file."""
    layout = h5py.VirtualLayout((4,), np.uint8, maxshape=(None,))
    source = h5py.VirtualSource(OUTSIDE, "x", (4,), maxshape=(None,))
    layout[0 : h5py.h5s.UNLIMITED] = source[0 : h5py.h5s.UNLIMITED]
    opened.create_virtual_dataset("a/0.png", layout)


def put(name: str, value: Any, **options: Any) -> Change:
    def change(opened: h5py.File) -> None:
        if name in opened:
            del opened[name]
        opened.create_dataset(name, data=value, **options) if options else opened.__setitem__(name, value)

    return change


def link(name: str, target: Any) -> Change:
    return put(name, target)


def objects(values: list[Any], kind: Any) -> np.ndarray:
    array = np.empty(len(values), dtype=kind)
    array[:] = values
    return array


def vectors(opened: h5py.File) -> None:
    opened.create_dataset("a/0.png", (2,), h5py.vlen_dtype(np.uint8))[:] = [IMAGE, IMAGE[:9]]


def references(opened: h5py.File) -> None:
    opened.create_dataset("a/0.png", (1,), h5py.ref_dtype)[0] = opened["a"].ref


def regions(opened: h5py.File) -> None:
    opened["x"] = IMAGE
    opened.create_dataset("a/0.png", (1,), h5py.regionref_dtype)[0] = opened["x"].regionref[2:4]
    opened.move("x", "a/1.png")
    del opened["a/1.png"]


def many_links(opened: h5py.File) -> None:
    for i in range(1, 300):
        opened[f"bytes/{i:06d}"] = opened["bytes/000000"]


def bomb(declared: int) -> Change:
    data = {0: zeros()}
    return dataset("a/0.png", (declared,), chunk=declared, filters=(DEFLATE,), data=data)


def attribute(name: str, value: Any, **options: Any) -> Change:
    return lambda opened: opened.attrs.create(name, value, **options)


DEFLATE, SHUFFLE, CHECKSUM, SZIP, NBIT, SCALE, LZF, BLOSC, ZSTD = 1, 2, 3, 4, 5, 6, 32000, 32001, 32015
BOTH = zlib.compress(bytes(64))
TEXT = h5py.string_dtype()
each(
    "hdf5",
    link_outside=groups(link("a/0.png", h5py.ExternalLink(OUTSIDE, "/x"))),
    link_outside_as_class=groups(link("b", h5py.ExternalLink(OUTSIDE, "/x"))),
    link_to_a_password=groups(link("a/0.png", h5py.ExternalLink("/etc/passwd", "/x"))),
    soft_link=groups(link("a/0.png", h5py.SoftLink("/b/0.png"))),
    soft_link_as_class=groups(link("b", h5py.SoftLink("/a"))),
    soft_link_through_a_link=groups(lambda o: [link("b", h5py.ExternalLink(OUTSIDE, "/"))(o),
                                               link("a/0.png", h5py.SoftLink("/b/x"))(o)]),
    storage_outside=groups(outside("a/0.png", 9)),
    virtual=groups(virtual("a/0.png", 9)),
    virtual_endless=groups(virtual_endless),
    vectors=groups(vectors),
    texts=groups(put("a/0.png", objects(["x", "y"], object), dtype=TEXT)),
    references=groups(references),
    regions=groups(regions),
    compound=groups(put("a/0.png", np.zeros(3, [("x", "u1"), ("y", "i4")]))),
    of_arrays=groups(lambda o: o.create_dataset("a/0.png", (3,), np.dtype((np.uint8, (9,))))),
    wide_numbers=groups(put("a/0.png", IMAGE.astype(np.int64))),
    pixels=groups(put("a/0.png", np.zeros((8, 8, 3), np.uint8))),
    no_values=groups(put("a/0.png", h5py.Empty("u1"))),
    committed_type=groups(put("a/0.png", np.dtype("u1"))),
    group_within_itself=groups(lambda o: link("a/0.png", o["a"])(o)),
    a_pickle_as_image=lambda file, ran: groups(put("a/0.png", np.void(pickle.dumps(payloads(ran)["os-system"]))))(file, ran),
    filter_of_a_plugin=groups(dataset("a/0.png", (4,), chunk=4, filters=(BLOSC,), data={0: b"abcd"})),
    filter_of_nobody=groups(dataset("a/0.png", (4,), chunk=4, filters=(65_000,), data={0: b"abcd"})),
    filter_of_h5py=groups(put("a/0.png", IMAGE, compression="lzf")),
    filter_checksum=groups(put("a/0.png", IMAGE, fletcher32=True)),
    filter_scale=groups(put("a/0.png", IMAGE, scaleoffset=0)),
    filters_many=groups(dataset("a/0.png", (4,), chunk=4, filters=(ZSTD, DEFLATE, SHUFFLE), data={0: b"abcd"})),
    gzip_twice=groups(dataset("a/0.png", (64,), chunk=64, filters=(DEFLATE,) * 2, data={0: zlib.compress(BOTH)})),
    gzip_bomb=groups(lambda o: bomb(1 << 20)(o)),
    gzip_bomb_declared=groups(lambda o: bomb(1 << 28)(o)),
    gzip_cut=groups(dataset("a/0.png", (64,), chunk=64, filters=(DEFLATE,), data={0: zlib.compress(bytes(64))[:9]})),
    gzip_nonsense=groups(dataset("a/0.png", (64,), chunk=64, filters=(DEFLATE,), data={0: b"x" * 64})),
    chunk_short=groups(dataset("a/0.png", (64,), chunk=64, data={0: b"x"})),
    chunk_missing=groups(dataset("a/0.png", (64,), chunk=64, filters=(DEFLATE,))),
    chunk_giant=groups(dataset("a/0.png", (64,), chunk=(1 << 32) - 1)),
    chunks_of_one_byte=groups(dataset("a/0.png", (1 << 26,), chunk=1)),
    size_giant=groups(dataset("a/0.png", (1 << 40,))),
    size_giant_in_chunks=groups(dataset("a/0.png", (1 << 40,), chunk=1 << 20)),
    opaque_giant=groups(dataset("a/0.png", (1 << 10,), kind=h5py.h5t.create(h5py.h5t.OPAQUE, 1 << 30))),
    empty=lambda file, ran: h5py.File(file, "w").close(),
    a_pickle=lambda file, ran: file.write_bytes(pickle.dumps(payloads(ran)["os-system"])),
    signature_only=lambda file, ran: file.write_bytes(b"\x89HDF\r\n\x1a\n"),
    signature_and_nothing=lambda file, ran: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(2048)),
    packed_bytes_outside=packed(outside("bytes/000000", 2 * len(IMAGE))),
    packed_bytes_virtual=packed(virtual("bytes/000000", 2 * len(IMAGE))),
    packed_bytes_linked=packed(link("bytes/000000", h5py.ExternalLink(OUTSIDE, "/x"))),
    packed_group_linked=packed(link("bytes", h5py.ExternalLink(OUTSIDE, "/x"))),
    packed_group_soft_link=packed(link("bytes", h5py.SoftLink("/a"))),
    packed_group_no_group=packed(put("bytes", IMAGE)),
    packed_bytes_in_chunks=packed(put("bytes/000000", np.concatenate([IMAGE, IMAGE]), chunks=(64,))),
    packed_bytes_of_a_plugin=packed(dataset("bytes/000000", (4,), chunk=4, filters=(BLOSC,), data={0: b"abcd"})),
    packed_bytes_giant=packed(dataset("bytes/000000", (1 << 40,))),
    packed_bytes_missing=packed(lambda o: o.__delitem__("bytes/000000")),
    packed_bytes_many_times=packed(many_links),
    packed_bytes_wide=packed(put("bytes/000000", np.concatenate([IMAGE, IMAGE]).astype(np.uint16))),
    packed_offsets_backwards=packed(offsets=np.array([0, 300, 2 * len(IMAGE)][::-1])),
    packed_offsets_negative=packed(offsets=np.array([-50, 10, 2 * len(IMAGE)])),
    packed_offsets_beyond=packed(offsets=np.array([0, 10, 1 << 40])),
    packed_offsets_overflow=packed(offsets=np.array([0, 1 << 63, 2 * len(IMAGE)], np.uint64)),
    packed_offsets_fractions=packed(put("offsets", np.array([0.0, 10.0, 2.0 * len(IMAGE)]))),
    packed_offsets_none=packed(offsets=np.zeros(0, np.int64)),
    packed_offsets_virtual=packed(virtual("offsets", 3, np.int64)),
    packed_offsets_outside=packed(outside("offsets", 3)),
    packed_labels_beyond=packed(labels=np.array([0, 7])),
    packed_labels_giant=packed(dataset("labels", (1 << 40,))),
    packed_labels_in_columns=packed(put("labels", np.zeros((2, 2), np.int64))),
    packed_names_of_any_length=packed(put("names", objects(["x", "y"], object), dtype=TEXT)),
    packed_names_references=packed(lambda o: put("names", objects([o.ref, o.ref], h5py.ref_dtype), dtype=h5py.ref_dtype)(o)),
    packed_names_a_group=packed(lambda o: [o.__delitem__("names"), o.create_group("names")]),
    packed_one_lacks=packed(lambda o: o.__delitem__("classes")),
    packed_checksum_wrong=packed(attribute("complete", 1)),
    packed_checksum_missing=packed(seal=False),
    packed_checksum_text=packed(attribute("complete", "1", dtype=TEXT)),
    packed_checksum_reference=packed(lambda o: attribute("complete", o.ref, dtype=h5py.ref_dtype)(o)),
    packed_checksum_many=packed(attribute("complete", np.zeros(1000))),
    packed_version_text=packed(attribute("solo_images", "1", dtype=TEXT)),
    packed_version_giant=packed(attribute("solo_images", np.uint64((1 << 64) - 1))),
)
