"""Representations against the official code's numbers, and what users add."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from solo.errors import ConfigError
from solo.losses import distance_correlation
from solo.registry import UnknownName
from solo.representations import REPRESENTATIONS, represent
from solo.representations.scattering import scattering_maps

DTYPES = [torch.float64, torch.float32]


def whole(name, images):
    return torch.cat(list(represent(name, images)), dim=1)


def assert_close(found, expected):
    assert (found.double() - expected.double()).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", ["small", "medium"])
def test_equal_official(golden, size, dtype):
    g = golden(f"mvmr_repr_{size}")
    image = g["image"].double().to(dtype)
    of_image, *of_moduli = scattering_maps(image)
    first, second = [maps[:, :, :1] for maps in of_moduli], [maps[:, :, 1:] for maps in of_moduli]
    assert_close(torch.cat([of_image[:, :, :1], *first, of_image[:, :, 1:], *second], dim=2), g["scattering"])
    assert whole("scattering", image).shape == (1, g["scattering"].numel())
    assert_close(whole("scattering", image).sum() * 32, g["scattering"].double().sum())
    assert_close(whole("hog", image).view_as(g["hog"]), g["hog"])
    assert_close(whole("local_std", image).view_as(g["local_std"]), g["local_std"])
    assert_close(whole("raw", image) * 32, image.flatten(1))


@pytest.mark.slow
def test_no_block_holds_a_representation_and_none_outlives_the_next():
    """At 224 px, where raw pixels are 150,528 columns and scattering 762,048; beside the blocks only images are held."""
    images, largest, columns = torch.randn(2, 3, 224, 224), {}, {}
    for name in ("raw", "augmented", "local_std", "hog", "scattering"):
        alive, blocks = [], represent(name, images)
        assert not isinstance(blocks, (list, tuple))
        for block in blocks:
            alive = [ref for ref in alive if ref() is not None] + [weakref.ref(block)]
            assert len(alive) <= 2
            largest[name] = max(largest.get(name, 0), block.shape[1])
            columns[name] = columns.get(name, 0) + block.shape[1]
    assert largest == {"raw": 16_352, "augmented": 16_352, "local_std": 16_352, "hog": 18_816, "scattering": 28_224}
    assert columns == {"raw": 150_528, "augmented": 150_528, "local_std": 150_528, "hog": 56_448, "scattering": 762_048}


class Made(TorchDispatchMode):
    """Bytes of the largest memory that an operation made, that of ``given`` left out."""

    def __init__(self, given):
        super().__init__()
        self.given, self.largest = given.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        memories = [x.untyped_storage() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *(x.nbytes() for x in memories if x.data_ptr() != self.given)])
        return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raw", "augmented", "local_std", "scattering"])
def test_no_operation_makes_a_representation_whole(name):
    images = torch.randn(4, 3, 224, 224)
    list(represent(name, images[:1]))       # scattering's filters are made once
    with Made(images) as made:
        columns = sum(block.shape[1] for block in represent(name, images))
    assert 0 < made.largest <= 4 * len(images) * columns / 2


def test_bands_meet():
    """What stands in several bands is what one band has."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 300, 96, dtype=torch.float64)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    around = padded.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    expected = (around.square().mean(-1) - around.mean(-1).square() + 1e-8).sqrt()
    assert len(list(represent("local_std", images))) == 6
    torch.testing.assert_close(whole("local_std", images), expected.flatten(1))
    assert torch.equal(whole("raw", images), images.flatten(1) / 32)


def test_scattering_of_other_shapes():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 18, 29, dtype=torch.float64)
    maps = [path for maps in scattering_maps(x) for path in maps.unbind(2)]
    assert len(maps) == 81 and all(path.shape[:2] == (2, 1) and min(path.shape[2:]) >= 4 for path in maps)
    turned = next(scattering_maps(x.transpose(2, 3)))[:, :, 0]
    torch.testing.assert_close(turned, maps[0].transpose(2, 3))         # the smoothed image knows no direction
    constant = [path for maps in scattering_maps(torch.ones_like(x)) for path in maps.unbind(2)]
    assert constant[0].sub(1).abs().max() < 1e-4 and all(path.abs().max() < 1e-9 for path in constant[1:])


def hog_in_loops(channel, bins=24, cell=8):
    """The official steps for one channel, pixel by pixel."""
    height, width = len(channel), len(channel[0])

    def at(y, x):
        return channel[y][x] if 0 <= y < height and 0 <= x < width else 0.0

    out = [[[0.0] * (width // cell) for _ in range(height // cell)] for _ in range(bins)]
    for y in range(height // cell * cell):
        for x in range(width // cell * cell):
            g0 = sum(w * (at(y + d, x - 1) - at(y + d, x + 1)) for w, d in ((1, -1), (2, 0), (1, 1)))
            g1 = sum(w * (at(y - 1, x + d) - at(y + 1, x + d)) for w, d in ((1, -1), (2, 0), (1, 1)))
            length, direction = math.hypot(g0, g1), math.atan2(g0, g1) / math.pi * bins
            out[math.floor(direction) % bins][y // cell][x // cell] += length / cell**2
            out[math.ceil(direction) % bins][y // cell][x // cell] += (1 - length) / cell**2
    return out


def test_hog_pixel_by_pixel():
    torch.manual_seed(0)
    x = torch.randn(2, 2, 19, 10, dtype=torch.float64)
    x[0, 0, :9] = 0.5                                                   # flat: a vote of 1 in the first bin
    expected = torch.tensor([[hog_in_loops(channel.tolist()) for channel in image] for image in x], dtype=torch.float64)
    torch.testing.assert_close(whole("hog", x).view(2, 2, 24, 2, 1), expected, rtol=1e-10, atol=1e-10)
    with pytest.raises(ConfigError, match="hog needs images of at least 8 px, got 7 x 9"):
        whole("hog", torch.zeros(1, 3, 7, 9))


@pytest.mark.parametrize("channels", [1, 3])
def test_augmented_copies(channels):
    torch.manual_seed(0)
    images = torch.randn(1, channels, 40, 40).expand(64, -1, -1, -1)

    def copies(seed):
        torch.manual_seed(seed)
        return whole("augmented", images).view_as(images) * 32

    first = copies(0)
    assert torch.equal(first, copies(0)) and not torch.equal(first, copies(1))
    assert len({image.mean().item() for image in first}) == 64          # every image has its own numbers
    assert (first < 0).any() and first.isfinite().all()                 # normalised values are not cut off at 0
    if channels == 3:
        grey = (first - first.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-5
        assert 4 <= grey.sum() <= 24                                    # a fifth of 64
    flat = torch.full((64, channels, 40, 40), 0.5)
    torch.manual_seed(0)
    copied = whole("augmented", flat).view_as(flat) * 32                # neither crop, blur nor hue changes a flat grey
    brightness = copied.mean((1, 2, 3)) / 0.5
    torch.testing.assert_close(copied, (0.5 * brightness).view(-1, 1, 1, 1).expand_as(copied), rtol=1e-4, atol=1e-4)
    assert 0.2 <= brightness.min() < brightness.max() <= 1.8
    assert 4 <= (brightness - 1).abs().lt(1e-3).sum() <= 26             # a fifth keeps its colours


def test_five_lines_of_a_users_own():
    @REPRESENTATIONS.register("colour")
    def colour(images):
        return images.mean(dim=(2, 3))

    @REPRESENTATIONS.register("rows")
    def rows(images):
        for row in images.unbind(2):
            yield row.flatten(1)

    torch.manual_seed(0)
    images, z = torch.randn(6, 3, 5, 5), torch.randn(6, 4)
    try:
        assert torch.equal(whole("colour", images), images.mean(dim=(2, 3)))
        values = [distance_correlation(represent(name, images), z / 32).item() for name in ("raw", "rows")]
        assert values[1] == pytest.approx(distance_correlation(images.flatten(1), z / 32).item(), rel=1e-5)
    finally:
        for name in ("colour", "rows"):
            del REPRESENTATIONS._rows[name]
    assert REPRESENTATIONS["solo.representations.pixels:raw"] is REPRESENTATIONS["raw"]
    with pytest.raises(UnknownName, match="no 'scatering' in solo.representations, did you mean 'scattering'"):
        REPRESENTATIONS["scatering"]


def test_half_precision_images_are_widened():
    images = torch.randn(4, 3, 16, 16, dtype=torch.bfloat16)
    assert all(block.dtype == torch.float32 for name in REPRESENTATIONS for block in represent(name, images))
