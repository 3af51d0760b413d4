"""Files that are no images: none gets through, each is replaced, named and counted, also over ranks."""

import errno
import json
import logging
import os
import tarfile
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from solo.data import bad as bad_file
from solo.data import check, decoding, pack, reads
from solo.data.decoding import BadImage, decode
from solo.data.hdf5 import open_hdf5
from solo.data.sources import FolderSource
from solo.data.tar import TarSource
from solo.errors import DataError, EnvironmentFault
from solo.testing import run_ranks
from tests.data.common import KINDS, VIEWS, broken, encoded, folder, full_view, make_folder, module, picture


def test_every_kind_of_image_becomes_rgb() -> None:
    rgb = Image.fromarray(picture(0, 20, 30))
    sixteen = Image.fromarray((np.asarray(rgb.convert("L")).astype(np.uint16) << 8) | 77)
    palette = rgb.quantize(64)
    palette.info["transparency"] = bytes(range(64))
    exif = Image.Exif()
    exif[0x0112] = 6
    cases = {
        "cmyk": encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        "grey": encoded(rgb.convert("L"), "PNG"),
        "rgba": encoded(rgb.convert("RGBA"), "PNG"),
        "grey and alpha": encoded(rgb.convert("LA"), "PNG"),
        "palette": encoded(palette, "PNG"),
        "one bit": encoded(rgb.convert("1"), "PNG"),
        "16 bit": encoded(sixteen, "PNG"),
        "animated": encoded(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)]),
    }
    for name, file in cases.items():
        pixels = decode(file.getvalue(), 3)
        assert pixels.shape == (20, 30, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable, name
        grey = decode(file.getvalue(), 1)
        assert grey.shape == (20, 30, 1), name
        if name != "one bit":
            assert np.abs(grey[..., 0].astype(int) - np.asarray(rgb.convert("L"))).mean() < 12, name
    assert decode(encoded(rgb, "JPEG", exif=exif).getvalue(), 3).shape == (30, 20, 3)
    assert decode(encoded(Image.new("RGB", (1, 5000)), "PNG").getvalue(), 3).shape == (5000, 1, 3)


@pytest.fixture(params=["torchvision", "simplejpeg"])
def jpegs_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(decoding, "_decode_jpeg", decoding._torchvision)


@pytest.mark.usefixtures("jpegs_by")
def test_a_jpeg_has_pillows_pixels() -> None:
    for progressive, subsampling, quality, (height, width) in product((False, True), (0, 1, 2), (30, 95), ((40, 64), (17, 33))):
        options = {"progressive": progressive, "subsampling": subsampling, "quality": quality}
        file = encoded(Image.fromarray(picture(quality, height, width)), "JPEG", **options)
        pixels = decode(file.getvalue(), 3)
        assert np.array_equal(pixels, np.asarray(Image.open(file))) and pixels.flags.writeable, options


@pytest.mark.usefixtures("jpegs_by")
def test_a_jpeg_that_libjpeg_only_warns_of_is_read() -> None:
    good = encoded(Image.fromarray(picture(1, 40, 40)), "JPEG").getvalue()
    odd = good[:-2] + b"\0\0\0" + good[-2:]  # extraneous bytes before the end: some of ImageNet's files have them
    assert np.array_equal(decode(odd, 3), decode(good, 3))


@pytest.mark.usefixtures("jpegs_by")
@pytest.mark.parametrize("kind", KINDS)
def test_broken_bytes_are_a_bad_image(kind: str) -> None:
    with pytest.raises(BadImage):
        decode(broken(kind), 3)


def bad_folder(root: Path, total: int = 60) -> list[Path]:
    """A folder whose images are good but for one of each kind; returns the bad ones."""
    paths = make_folder(root, {"a": total // 2, "b": total // 2})
    bad = sorted(paths[5 + 9 * i] for i in range(len(KINDS)))
    for path, kind in zip(bad, KINDS, strict=True):
        path.write_bytes(broken(kind))
    return bad


@pytest.mark.parametrize(("engine", "workers"), [("fast", 0), ("torchvision", 0), ("torchvision", 2)])
def test_bad_images_are_replaced_named_once_and_counted(
    engine: str, workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = bad_folder(tmp_path)
    data = folder(tmp_path, engine=engine, num_workers=workers, max_bad_fraction=0.2, batch_size=6)
    with caplog.at_level(logging.WARNING):
        loader = data.train_dataloader()
        epochs = [list(loader), list(loader)]
    assert data.bad.count == len(bad) and data.bad.names == [str(path) for path in bad]
    assert len(caplog.records) == len(bad)
    assert all(caplog.text.count(f"{path} (") == 1 for path in bad)
    for batches in epochs:
        shown = torch.cat([batch.index for batch in batches])
        assert len(batches) == 10 and not set(shown.tolist()) & set(data.bad.index)
        assert all(torch.equal(batch.labels, torch.from_numpy(data._train.labels)[batch.index]) for batch in batches)
    again = folder(tmp_path, engine="torchvision", num_workers=0, max_bad_fraction=0.2, batch_size=6).train_dataloader()
    assert [batch.index.tolist() for batch in again] == [batch.index.tolist() for batch in epochs[0]]
    clean = list(data.clean_loader(train=True, batch_size=60))   # one batch: the classes change within it
    assert torch.cat([batch.index for batch in clean]).tolist() == [i for i in range(60) if i not in data.bad.index]
    assert all(batch.labels.tolist() == data._train.labels[batch.index].tolist() for batch in clean)
    data.teardown("fit")


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
def test_what_becomes_of_a_bad_image_is_said_as_it_is(engine: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Replaced where views of it are trained; left out where it is judged by, and of an evaluation."""
    for part in ("train", "val"):
        make_folder(tmp_path / part, {"a": 9})[1].write_bytes(b"bad")
    images = {f"{part}_path": str(tmp_path / part) for part in ("train", "val")}
    for views, fate in ((VIEWS, "replaced by another one"), ([], "left out")):
        caplog.clear()
        data = module(views=views, dataset="image_folder", max_bad_fraction=1.0, engine=engine, num_workers=0, **images)
        shown = [[i for batch in data.clean_loader(train=train) for i in batch.index.tolist()] for train in (True, False)]
        assert shown == [[0, 2, 3, 4, 5, 6, 7, 8]] * 2
        train, val = sorted(record.getMessage() for record in caplog.records)
        assert "train" in train and train.endswith(fate) and "val" in val and val.endswith("left out")


def listing(run: Path) -> list[str]:
    return [json.loads(line)["name"] for line in (run / "bad_samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
def test_each_bad_image_is_listed_once_also_by_a_run_that_goes_on(engine: str, tmp_path: Path) -> None:
    bad = bad_folder(tmp_path / "images")
    for _ in range(2):
        data = folder(tmp_path / "images", engine=engine, num_workers=0, max_bad_fraction=0.2, batch_size=6)
        data.report_dir = tmp_path / "run"
        list(data.train_dataloader())
        assert sorted(listing(tmp_path / "run")) == [str(path) for path in bad]


@pytest.mark.parametrize("there", [
    b'{"na', b"5\n[]\n", b'{"x": 1}\n', b'{"name": []}\n', b"\xff\xfe\n", b"[" * 10**5, b'"name"',
])
def test_a_list_with_lines_that_are_none_goes_on(there: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_folder(tmp_path / "images", {"a": 4})
    source = FolderSource(tmp_path / "images", 3, "key")
    path = tmp_path / "bad_samples.jsonl"
    path.write_bytes(there)
    for _ in range(2):                              # a run, and the one that goes on
        bad_file.BadImages(source, 1.0, tmp_path).add([(1, "cut"), (2, "empty")])
    kept = path.read_bytes()
    assert kept.startswith(there) and "cannot be" not in caplog.text
    lines = kept.removeprefix(there).strip().splitlines()
    assert [json.loads(line) for line in lines] == [{"name": source.name(1), "reason": "cut"},
                                                    {"name": source.name(2), "reason": "empty"}]


@pytest.mark.parametrize("problem", ["a file is there", "a list of 4 MiB"])
def test_a_list_that_cannot_be_written_ends_nothing(problem: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    if problem == "a list of 4 MiB":
        run.mkdir()
    there = b"x" * ((4 << 20) - 20 if run.exists() else 1)
    (run / "bad_samples.jsonl" if run.exists() else run).write_bytes(there)
    make_folder(tmp_path / "images", {"a": 4})
    bad_file.BadImages(FolderSource(tmp_path / "images", 3, "key"), 1.0, run).add([(1, "cut"), (2, "empty")])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 3 and sum(f"{run}/bad_samples.jsonl cannot be" in line for line in said) == 1


def test_a_name_that_is_not_utf_8_is_reported(tmp_path: Path) -> None:
    """Of a class too."""
    paths = make_folder(tmp_path / "images", {"a": 3, "b": 5})
    paths[0].write_bytes(b"cut")
    paths[0].rename(paths[0].with_name(os.fsdecode(b"caf\xe9.png")))
    paths[0].parent.rename(paths[0].parent.with_name(os.fsdecode(b"\xe9")))
    told = str(tmp_path / "images" / "\\xe9" / "caf\\xe9.png")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        archive.add(tmp_path / "images", "train")
    pack.pack(source := FolderSource(tmp_path / "images", 3, "key"), tmp_path / "x.h5", [source.name(i) for i in range(8)])
    tar = TarSource(tmp_path / "x.tar", "", 3, "key")
    assert tar.classes == source.classes == open_hdf5(tmp_path / "x.h5", 3, "key").classes == ["b", "\\xe9"]
    assert tar.name(5) == f"{tmp_path / 'x.tar'}:train/\\xe9/0001.png" and source.labels.tolist() == [0] * 5 + [1] * 3
    data = folder(tmp_path / "images", num_workers=0, max_bad_fraction=0.2, engine="torchvision")
    data.report_dir = tmp_path / "run"
    list(data.train_dataloader())
    assert listing(tmp_path / "run") == [told]
    check.main([str(tmp_path / "images"), "--json", str(tmp_path / "x.json")])
    assert json.dumps(told) in (tmp_path / "x.json").read_text("utf-8")


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
@pytest.mark.parametrize("side", [20, 70])
def test_a_stand_in_keeps_the_numbers_of_the_image_it_replaces(engine: str, side: int, tmp_path: Path) -> None:
    """All images are one image, so that only the numbers can differ: a bad one must change nothing."""
    paths = make_folder(tmp_path, {"a": 12}, size=(side, side))
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())

    def views() -> torch.Tensor:
        data = module(6, [full_view(16)], dataset="image_folder", train_path=str(tmp_path), engine=engine, num_workers=0,
                      max_bad_fraction=0.5)
        return torch.cat([batch.views[0] for batch in data.train_dataloader()])

    whole = views()
    paths[3].write_bytes(b"no image")
    paths[7].write_bytes(b"")
    assert torch.equal(whole, views()) and not torch.equal(whole[0], whole[1])


def test_a_stand_in_that_is_bad_too_is_replaced_anew(tmp_path: Path) -> None:
    """Most images are bad, so that chains of stand-ins are long; every engine follows the same ones."""
    paths = make_folder(tmp_path, {"a": 20})
    for path in paths[:17]:
        path.write_bytes(b"")
    seen = []
    for engine in ("fast", "torchvision"):
        data = module(20, dataset="image_folder", train_path=str(tmp_path), engine=engine, num_workers=0, max_bad_fraction=1.0)
        seen.append([batch.index.tolist() for loader in [data.train_dataloader()] for _ in range(3) for batch in loader])
        assert all(set(shown) == {17, 18, 19} for shown in seen[-1])
    assert seen[0] == seen[1] and seen[0][0] != seen[0][1]


def test_a_passing_error_is_tried_again_and_a_lasting_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "_WAITS", (0.0, 0.0, 0.0))
    path = make_folder(tmp_path, {"a": 1})[0]
    content, left = path.read_bytes(), [errno.EIO, errno.ESTALE, errno.EIO]

    def flaky(self: Path) -> bytes:
        if left:
            raise OSError(left.pop(), "no luck")
        return content

    monkeypatch.setattr(Path, "read_bytes", flaky)
    assert decoding.read_file(path) == content
    left += [errno.EIO] * 4
    with pytest.raises(BadImage, match="no luck"):
        decoding.read_file(path)
    left[:] = [errno.EACCES, errno.EACCES]
    with pytest.raises(BadImage):
        decoding.read_file(path)
    assert left == [errno.EACCES]
    left[:] = [errno.EMFILE]
    with pytest.raises(EnvironmentFault, match="too many open files.*ulimit -n"):
        decoding.read_file(path)


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
def test_too_many_bad_images_stop_with_a_list(engine: str, tmp_path: Path) -> None:
    bad = bad_folder(tmp_path / "images")
    data = folder(tmp_path / "images", engine=engine, num_workers=0, max_bad_fraction=0.05)
    data.report_dir = tmp_path / "run"
    with pytest.raises(DataError, match=r"of 60 images cannot be read, more than data.max_bad_fraction=0.05; listed in"):
        for _ in range(2):
            list(data.train_dataloader())
    listed = listing(tmp_path / "run")
    assert set(listed) <= {str(path) for path in bad} and len(listed) > 3


def test_without_a_report_folder_the_first_names_are_said(tmp_path: Path) -> None:
    bad = bad_folder(tmp_path)
    with pytest.raises(DataError) as caught:
        folder(tmp_path, engine="fast").train_dataloader()
    assert str(bad[0]) in str(caught.value) and not list(Path.cwd().glob("bad_samples.jsonl"))


def bad_of_two(rank: int, folder_: Path, limit: float) -> tuple[list[str], str, str]:
    """Each rank meets every image of its half; together they are what one process meets."""
    data = folder(folder_, engine="torchvision", num_workers=0, max_bad_fraction=limit, batch_size=6)
    data.report_dir = folder_.parent / "run"
    ended = ""
    list(data.train_dataloader())
    try:
        data.bad.agree("cpu")
        data.bad.agree("cpu")  # nothing new
    except (DataError, SystemExit) as error:
        ended = f"{type(error).__name__} {error}"
    return data.bad.names, ended, "".join(data.bad._reasons[i] for i in data.bad.index)


def test_bad_images_are_those_of_all_ranks(tmp_path: Path) -> None:
    bad = [str(path) for path in bad_folder(tmp_path / "images")]
    (first, ended, reasons), (second, other, same) = run_ranks(bad_of_two, tmp_path / "images", 0.2)
    assert first == second == bad and reasons == same and not ended and not other
    # 3 of 60 would pass a limit of 4 on each rank alone; the 5 of both do not
    (_, ended, _), (_, other, _) = run_ranks(bad_of_two, tmp_path / "images", 4 / 60)
    assert ended.startswith("DataError 5 of 60 images cannot be read") and other == "SystemExit 0"
    assert sorted(listing(tmp_path / "run")) == bad


@pytest.mark.parametrize(("batches", "times"), [(100, 20), (7, 7)])
def test_ranks_agree_within_the_epoch(batches: int, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several times, so that too many bad images stop the run before its epoch ends; never in a single process."""
    asked: list[int] = []
    loop, strategy = SimpleNamespace(), SimpleNamespace(root_device="cpu")
    bad = SimpleNamespace(agree=lambda _: asked.append(loop.batch_idx))
    data = SimpleNamespace(bad=bad, bad_val=None)
    trainer = SimpleNamespace(num_training_batches=batches, fit_loop=loop, strategy=strategy, datamodule=data)
    for world in (1, 2):
        monkeypatch.setattr(bad_file, "world_size", lambda world=world: world)
        for loop.batch_idx in range(batches):
            bad_file.AgreedCount().on_train_batch_end(trainer, None)  # type: ignore[arg-type]
        assert len(asked) == (times if world == 2 else 0)
    for met, more in ((0, 0), (1, times)):          # by one of the ranks, as all know
        asked.clear()
        count = bad_file.AgreedCount(SimpleNamespace(found={"unreadable": [0, met]}))  # type: ignore[arg-type]
        for loop.batch_idx in range(batches):
            count.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
        assert len(asked) == more


@pytest.mark.parametrize("engine", ["fast", "torchvision"])
def test_a_link_that_leads_nowhere_is_a_bad_image(engine: str, tmp_path: Path) -> None:
    """Nor round in a circle: counted and replaced as any other, also where decoded images are kept by the files' dates."""
    make_folder(tmp_path, {"a": 30}, (16, 16))
    (tmp_path / "a" / "x.png").symlink_to("gone.png")
    (tmp_path / "a" / "y.png").symlink_to("y.png")
    data = folder(tmp_path, engine=engine, num_workers=0, max_bad_fraction=0.5)
    assert sum(len(batch.labels) for batch in data.train_dataloader()) == 32
    assert data.bad.count == 2
