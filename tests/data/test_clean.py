"""Clean images: the published resize and crop; those in memory a batch at once, in the bits that one by one would have."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from solo.data import loaders
from solo.data.bad import BadImages
from solo.data.engines.torchvision import clean, normalise
from solo.data.loaders import CleanLoader
from solo.data.sources import ArraySource
from tests.data.common import picture

UNREADABLE = {0: "a hole", 5: "torn", 8: "torn", 9: "torn"}         # the last batch has none that can be read


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [12, 16])
def test_at_once_are_the_bits_of_one_by_one(size, channels, monkeypatch):
    levels = np.random.default_rng(0).integers(0, 256, (10, 12, 12, channels), dtype=np.uint8)
    levels[1].flat[:144] = np.arange(144) + 112
    source = ArraySource(levels, np.arange(10) % 3, ["a", "b", "c"], unreadable=UNREADABLE)
    mean, std = (0.4914, 0.4822, 0.4465)[:channels], (0.2470, 0.2435, 0.2616)[:channels]
    bad = BadImages(source, 1.0)
    alone = []
    monkeypatch.setattr(loaders, "clean", lambda image, size: alone.append(1) or clean(image, size))
    batches = list(CleanLoader(source, 4, size, mean, std, bad))
    shown = [[1, 2, 3], [4, 6, 7]]
    assert [batch.index.tolist() for batch in batches] == shown and bad.index == sorted(UNREADABLE)
    for batch, samples in zip(batches, shown, strict=True):
        expected = normalise(torch.stack([clean(levels[i], size) for i in samples]), mean, std)
        assert torch.equal(batch.views[0], expected) and batch.views[0].stride() == expected.stride()
        assert batch.labels.tolist() == [i % 3 for i in samples]
    assert len(alone) == (0 if size == 12 else 6)       # those of another size are resized, each for itself
    assert (source.images == levels).all()


@pytest.mark.parametrize(("height", "width", "size"), [(300, 400, 224), (500, 260, 224), (224, 224, 224), (120, 110, 96)])
def test_clean_images_are_the_published_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    """Shorter side 256 for 224 pixels, then the middle (solo-learn's validation transform), here bicubic."""
    image = picture(0, height, width)
    if height != size:
        side = {224: 256, 96: 110}[size]
        steps = v2.Compose([v2.Resize(side, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(size)])
        expected = steps(torch.from_numpy(image).permute(2, 0, 1).float() / 255).clamp(0, 1)
    else:
        expected = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    torch.testing.assert_close(clean(image, size), expected, rtol=0, atol=1e-6)
