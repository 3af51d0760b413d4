"""The DALI engine on a CPU: the reference's numbers, its images within a bound, its bad images, and no thread left over.

What runs on a GPU is the same graph; here it is only put together, not run.
"""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from solo.data.config import DataConfig
from solo.data.engines import Job, Payload, Slot
from solo.data.engines import dali as engine_file
from solo.data.engines import torchvision as reference
from solo.data.engines.dali import DaliEngine
from solo.data.engines.torchvision import TorchvisionEngine
from solo.data.module import DataModule
from solo.data.random import Draws
from solo.data.sources import FolderSource, Source
from solo.data.tar import TarSource
from solo.data.views import Chance, Params, View, sample
from solo.errors import ConfigError, EnvironmentFault
from solo.experiment import experiment
from solo.run import pretrain
from tests.attacks.datasets import IMAGES
from tests.data.common import KINDS, broken, encoded, full_view, picture
from tests.data.test_engines import ALONE
from tests.tiny import values

graphs = pytest.importorskip("solo.data.engines.dali_graph")

CROPS = [name for name, view in ALONE.items() if view.rrc.enabled and name not in ("smaller", "larger")]
COLOURS = [name for name, view in ALONE.items() if not view.rrc.enabled and not view.equalization.prob]
BOUNDS = {"tiny crops": (0.14, 0.05), "blur of a small crop": (0.5, 0.25)}  # median, share above one level
SIMPLE = View(crop_size=16, horizontal_flip=Chance(prob=0.5), grayscale=Chance(prob=0.5))
PLAN = [Slot(2, np.arange(i, i + 4)[::-1].copy()) for i in range(0, 12, 4)]


def photographs(root: Path) -> list[Path]:
    """JPEGs of several sizes in two classes, with a grey, a turned and a PNG one among them."""
    paths = [root / "ab"[i % 2] / f"{i:02d}.jpg" for i in range(12)]
    for i, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        image, exif = Image.fromarray(picture(i, 70 + 5 * i, 90)), Image.Exif()
        if i == 7:
            exif[0x0112] = 6
        file = encoded(image.convert("L") if i == 3 else image, "PNG" if i == 5 else "JPEG", exif=exif)
        path.write_bytes(file.getvalue())
    return paths


def job(source: Source, views: list[View] | None = None, channels: int = 3, **config: object) -> Job:
    options = {"dataset": "fake", "num_workers": 2, **config}
    views = [full_view(40), View(crop_size=24)] if views is None else views
    return Job(source, views, (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels], 11, DataConfig(**options))


@pytest.fixture
def source(tmp_path: Path) -> FolderSource:
    photographs(tmp_path / "images")
    return FolderSource(tmp_path / "images", 3, "data.train_path")


def made(asked: Job, plan: list[Slot] = PLAN) -> list[Payload]:
    engine = DaliEngine(asked)
    payloads = list(engine.batches(plan))
    engine.close()
    return payloads


# --- the same image of the same numbers --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[3, pytest.param(1, marks=pytest.mark.slow)], ids=["rgb", "grey"])
def levels(request: pytest.FixtureRequest) -> dict[str, np.ndarray]:
    """How far each operation is from the reference's, in grey levels: 24 images, all operations in one graph."""
    channels, names = request.param, [*CROPS, *COLOURS]
    images = [picture(i, 32, 32, channels) for i in range(24)]
    sides = np.full(24, 32)
    params = [sample(ALONE[name], Draws(1, 0, np.arange(24), 0), sides, sides) for name in names]
    views = [ALONE[name] for name in names]
    graph = graphs.Graph(views, (0.0,) * channels, (1.0,) * channels, torch.device("cpu"), 24, 1)
    quick = graph.run([engine_file._pixmap(image).content for image in images], params)
    slow = [
        torch.stack([reference.apply(view, drawn.row(i), image) for i, image in enumerate(images)])
        for view, drawn in zip(views, params, strict=True)
    ]
    assert all(a.shape == b.shape and a.dtype == b.dtype for a, b in zip(quick, slow, strict=True))
    return {name: (255 * (a - b).abs()).numpy() for name, a, b in zip(names, quick, slow, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_the_references(name: str, levels: dict[str, np.ndarray]) -> None:
    different = levels[name] > 0.01
    assert different.mean() <= (1e-4 if ALONE[name].solarization.prob else 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CROPS)
def test_crops_are_the_references_but_for_their_border(name: str, levels: dict[str, np.ndarray]) -> None:
    """Bicubic repeats the outermost pixels where the reference weighs only those inside, and a small crop is all border.

    About 1.5 times what was measured: at most 0.0033 and 0.0044 for those without a bound of their own, 7.5 as the largest.
    """
    found, jumps = levels[name], 5e-4 if ALONE[name].solarization.prob else 0
    median, share = BOUNDS.get(name, (0.005, 0.0066))
    assert np.median(found) < median and (found > 1).mean() < share + jumps and (found > 11).mean() <= jumps


def test_real_photographs(shared_data: Callable[[str], Path]) -> None:
    tar = TarSource(shared_data("imagenet-sample-256.tar"), "train", 3, "data.train_path")
    asked, plan = job(tar, [full_view(96)], num_workers=1), [Slot(0, np.arange(0, 256, 32))]
    quick, slow = (list(payloads)[0].batch.views[0] for payloads in (made(asked, plan), TorchvisionEngine(asked).batches(plan)))
    found = (quick - slow).abs() * 0.2 * 255
    assert found.median() < 1.7e-3 and (found > 1).float().mean() < 2.4e-3


@pytest.mark.slow
def test_the_numbers_are_the_references(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of every image and view, as each engine hands it on."""
    given: dict[str, list[Params]] = {"dali": [], "torchvision": []}
    run = graphs.Graph.run

    def note(self: object, contents: list[np.ndarray], params: list[Params]) -> list[torch.Tensor]:
        given["dali"] += [drawn.row(i) for drawn in params for i in range(len(drawn))]
        return run(self, contents, params)

    def apply(view: View, params: Params, image: np.ndarray) -> torch.Tensor:
        given["torchvision"].append(params)
        return torch.zeros(3, view.crop_size, view.crop_size)

    monkeypatch.setattr(graphs.Graph, "run", note)
    monkeypatch.setattr(reference, "apply", apply)
    made(job(source))
    list(TorchvisionEngine(job(source, num_workers=0)).batches(PLAN))
    assert len(given["dali"]) == len(given["torchvision"]) == 24
    for mine, theirs in zip(given["dali"], given["torchvision"], strict=True):
        assert all(np.array_equal(getattr(mine, part), getattr(theirs, part)) for part in vars(mine))


@pytest.mark.slow
def test_batches_are_the_references(source: FolderSource) -> None:
    """Whatever kind of file an image is, on any number of threads, in any batch: the same image, index and label."""
    slow = list(TorchvisionEngine(job(source, num_workers=0)).batches(PLAN))
    for threads in (0, 2):
        for mine, theirs, slot in zip(made(job(source, num_workers=threads)), slow, PLAN, strict=True):
            assert mine.batch.index.tolist() == theirs.batch.index.tolist() == slot.samples.tolist()
            assert mine.batch.labels.tolist() == theirs.batch.labels.tolist() and not mine.failed
            for a, b in zip(mine.batch.views, theirs.batch.views, strict=True):
                assert a.shape == b.shape and a.is_contiguous() and a.dtype == torch.float32
                assert (a - b).abs().median() < 5e-5 and ((a - b).abs() > 0.02).float().mean() < 3e-3
    whole = torch.cat([payload.batch.views[0] for payload in made(job(source))])
    (once,) = made(job(source), [Slot(2, np.concatenate([slot.samples for slot in PLAN]))])
    assert torch.equal(whole, once.batch.views[0])


def test_batches_that_are_kept_do_not_change(source: FolderSource) -> None:
    for kept, again in zip(made(job(source, [SIMPLE]), PLAN * 3), made(job(source, [SIMPLE])) * 3, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kept.batch.views, again.batch.views, strict=True))


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def photograph_module(root: Path, engine: str = "dali", **config: object) -> DataModule:
    options = {"dataset": "image_folder", "train_path": str(root), "num_workers": 1, "max_bad_fraction": 0.5, **config}
    return DataModule(DataConfig(engine=engine, **options), [SIMPLE], 4, seed=1)


@pytest.mark.parametrize("noticed", ["before", "by DALI only"])
def test_damaged_images_are_replaced_and_counted_as_elsewhere(
    noticed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C21, also where DALI meets what is damaged, and loses its graph."""
    paths = photographs(tmp_path)
    for path, kind in zip(paths[1::2], KINDS, strict=False):
        path.write_bytes(broken(kind))
    if noticed == "by DALI only":
        monkeypatch.setattr(engine_file, "jpeg_size", lambda content: (40, 40) if content[:2] == b"\xff\xd8" else None)
    built: list[int] = []
    build = DaliEngine._built
    monkeypatch.setattr(DaliEngine, "_built", lambda self, images: built.append(images) or build(self, images))
    seen = {}
    for engine in ("dali", "torchvision"):
        data = photograph_module(tmp_path, engine)
        loader = data.train_dataloader()
        seen[engine] = [(batch.index.tolist(), batch.labels.tolist()) for _ in range(2) for batch in loader], data.bad._reasons
        data.teardown("fit")
    assert seen["dali"] == seen["torchvision"] and len(seen["dali"][1]) == len(KINDS)
    assert len(built) == 1 if noticed == "before" else len(built) > 1


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[np.ndarray]], bool]) -> tuple[list[int], list[list[bool]]]:
    """Let DALI fail at some batches; sizes of the graphs built, and of each batch which images its decoder was left."""
    built: list[int] = []
    left: list[list[bool]] = []
    build, run = DaliEngine._built, graphs.Graph.run

    def fail(self: object, contents: list[np.ndarray], params: list[Params]) -> list[torch.Tensor]:
        if fails(contents):
            raise RuntimeError("Critical error in pipeline:\nError in operator `x`,\n\nencountered:\n\nout of luck\nNo more.")
        left.append([is_jpeg(content) for content in contents])
        return run(self, contents, params)

    monkeypatch.setattr(DaliEngine, "_built", lambda self, images: built.append(images) or build(self, images))
    monkeypatch.setattr(graphs.Graph, "run", fail)
    return built, left


def is_jpeg(content: np.ndarray) -> bool:
    return content[:2].tobytes() == b"\xff\xd8"


def test_a_decoder_that_fails_is_said_once_and_given_up(
    source: FolderSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    built, left = failing(monkeypatch, lambda contents: any(map(is_jpeg, contents)))
    engine, slot = DaliEngine(job(source, [SIMPLE])), PLAN[0]
    with pytest.raises(EnvironmentFault, match="failed on cpu at 3 batches one after the other: out of luck$") as said:
        list(engine.batches([slot] * 9))
    engine.close()
    assert len(built) == 3 and left == [[False] * 4] * 2 and "\n" not in str(said.value)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "data.engine=dali failed on cpu: out of luck; this batch" in warnings[0]


def test_what_fails_twice_ends_the_run_in_one_line(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, lambda contents: True)
    with pytest.raises(EnvironmentFault, match="data.engine=dali failed on cpu twice at the same batch: out of luck$") as said:
        made(job(source, [SIMPLE]))
    assert "\n" not in str(said.value) and said.value.exit_code == 5


def test_a_failure_changes_no_other_batch(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """C23: what a resume does not know of has no effect."""
    odd, order = source.encoded(0), np.roll(np.arange(12), 2)  # the second epoch has its companions elsewhere
    built, left = failing(monkeypatch, lambda contents: any(content.tobytes() == odd for content in contents))
    rest = [Slot(3, order[i : i + 4]) for i in range(0, 12, 4)]
    made(job(source, [SIMPLE]), [*PLAN, *rest])
    whole = left.copy()
    left.clear()
    made(job(source, [SIMPLE]), rest)
    assert len(built) > 3 and whole[3:] == left and not any(whole[0]) and not any(left[0]) and any(left[1])


@pytest.mark.parametrize("real", [False, True], ids=["drawn", "photographs"])
def test_dalis_decoder_makes_our_pixels(real: bool, source: FolderSource, shared_data: Callable[[str], Path]) -> None:
    """On the CPU: which of the two decoded an image does not show."""
    files: Source = TarSource(shared_data("imagenet-sample-256.tar"), "train", 3, "data.train_path") if real else source
    engine, slot = DaliEngine(job(files, [SIMPLE])), Slot(2, np.arange(12))
    assert any(is_jpeg(image.content) for image in engine._read(slot, engine._image).images)
    quick, ours = (engine._payload(engine._read(slot, load)) for load in (engine._image, engine._pixels))
    engine.close()
    assert torch.equal(quick.batch.views[0], ours.batch.views[0])


@pytest.mark.parametrize("part", ["whole", "cut", "no end", "another marker", "unknown segment", "grey", "turned", "none"])
def test_only_what_is_plainly_a_whole_jpeg_is_left_to_dali(part: str) -> None:
    image, exif = Image.fromarray(picture(0, 20, 30)), Image.Exif()
    exif[0x0112] = 6
    good = encoded(image, "JPEG", quality=95).getvalue()
    scan = good.index(b"\xff\xda") + 20
    contents = {
        "whole": good,
        "cut": good[:-20],
        "no end": good[:-2],
        "another marker": good[:scan] + b"\xff\x73" + good[scan:],
        "unknown segment": good[:2] + b"\xff\xf0\x00\x02" + good[2:],
        "grey": encoded(image.convert("L"), "JPEG").getvalue(),
        "turned": encoded(image, "JPEG", exif=exif).getvalue(),
        "none": encoded(image, "PNG").getvalue(),
    }
    assert engine_file.jpeg_size(contents[part]) == ((20, 30) if part == "whole" else None)
    assert engine_file.jpeg_size(good + b"more") == (20, 30)


@pytest.mark.parametrize("name", [name for name, content in IMAGES.items() if isinstance(content, bytes)])
def test_files_that_attack_are_not_left_to_dali(name: str) -> None:
    assert engine_file.jpeg_size(IMAGES[name]) is None  # type: ignore[arg-type]


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_an_epoch_left_early_shortens_no_other_and_nothing_is_left_over(tmp_path: Path) -> None:
    """C22; DALI's own threads are no threads of Python's, so the system's are counted."""
    photographs(tmp_path)
    before, data = threads(), photograph_module(tmp_path)
    loader, lengths, running = data.train_dataloader(), [], []
    for epoch in range(6):
        left = 1 if epoch == 1 else None
        lengths.append(sum(1 for _, _ in zip(range(left or 99), loader, strict=False)))
        running.append(threads())
    assert lengths == [3, 1, 3, 3, 3, 3] and max(running[2:]) <= running[0]
    data.teardown("fit")
    assert threads() <= before      # of other tests' threads some may end meanwhile


def test_a_run_continues_within_an_epoch_to_the_bit(tmp_path: Path) -> None:
    """C23: from every batch, on another number of threads too."""
    photographs(tmp_path)

    def epoch(first: int, workers: int = 1) -> list[torch.Tensor]:
        data = photograph_module(tmp_path, num_workers=workers)
        data.set_position(1, first)
        views = [batch.views[0] for batch in data.train_dataloader()]
        data.teardown("fit")
        return views

    whole = epoch(0)
    for first, workers in ((1, 1), (2, 2)):
        rest = epoch(first, workers)
        assert len(rest) == 3 - first and all(torch.equal(a, b) for a, b in zip(whole[first:], rest, strict=True))


def test_ranks_share_what_one_process_sees(source: FolderSource) -> None:
    halves = [made(job(source, [SIMPLE]), [Slot(2, slot.samples[part]) for slot in PLAN]) for part in (slice(2), slice(2, 4))]
    for mine, *parts in zip(made(job(source, [SIMPLE])), *halves, strict=True):
        assert torch.equal(mine.batch.views[0], torch.cat([part.batch.views[0] for part in parts]))


# --- before anything starts --------------------------------------------------------------------------------------------


@pytest.fixture
def without_dali(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "solo.data.engines.dali_graph", raising=False)
    monkeypatch.delattr("solo.data.engines.dali_graph", raising=False)
    yield


def test_without_dali_one_line_names_the_extra(without_dali: None, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"^data.engine=dali: .*: pip install 'solo-ssl\[dali\]'$") as said:
        photograph_module(tmp_path / "is not even there")
    assert "\n" not in str(said.value) and said.value.exit_code == 5


def test_what_it_cannot_do_is_said_before_anything_starts(tmp_path: Path) -> None:
    view = View(crop_size=16, equalization=Chance(prob=0.1))
    with pytest.raises(ConfigError, match=r"augmentations\[0\].equalization: data.engine=dali .*fast and torchvision can"):
        DataModule(DataConfig(engine="dali"), [view], 4, seed=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_without_the_gpu_one_line_says_so(source: FolderSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph of a GPU is put together, each operation with inputs that it may have there; then there is no GPU."""
    asked_for: list[dict[str, object]] = []
    image = graphs.fn.decoders.image
    monkeypatch.setattr(graphs.fn.decoders, "image", lambda x, **how: asked_for.append(how) or image(x, **how))
    asked = Job(source, [full_view(16)], (0.5,) * 3, (0.2,) * 3, 1, DataConfig(dataset="fake"), torch.device("cuda", 0))
    with pytest.raises(EnvironmentFault, match="data.engine=dali cannot compute on cuda:0: .*CUDA is not available") as said:
        made(asked)
    assert "\n" not in str(said.value)
    (how,) = asked_for
    assert how["device"] == "mixed" and how["hw_decoder_load"] == 0  # all images by the same decoder


# --- in a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["digits", "npz", "image_folder", "tar"])
def test_every_kind_of_dataset(kind: str, tmp_path: Path, shared_data: Callable[[str], Path]) -> None:
    photographs(tmp_path)
    paths = {"npz": "cifar10-jpeg.npz", "tar": "imagenet-sample-256.tar"}
    path = {"digits": None, "image_folder": str(tmp_path)}.get(kind) if kind not in paths else str(shared_data(paths[kind]))
    batches = {}
    for engine in ("dali", "torchvision"):
        options = {"train_size": 16} if kind in ("npz", "tar") else {}
        data = photograph_module(tmp_path, engine, dataset=kind, train_path=path, num_workers=0, **options)
        batches[engine] = next(iter(data.train_dataloader()))
        data.teardown("fit")
    mine, theirs = batches["dali"], batches["torchvision"]
    assert torch.equal(mine.index, theirs.index) and torch.equal(mine.labels, theirs.labels)
    assert (mine.views[0] - theirs.views[0]).abs().median() < 4e-4


@pytest.mark.slow
def test_a_method_trains_on_it(tmp_path: Path) -> None:
    content = values("simclr", tmp_path, max_epochs=1)
    content["data"]["engine"] = "dali"
    before = threads()
    result = pretrain(experiment(content))
    assert result.checkpoint is not None and result.checkpoint.is_file() and threads() <= before + 1
