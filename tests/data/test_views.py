"""What is drawn: torchvision's distributions; and what a wrong view is told."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import ColorJitter as TorchJitter
from torchvision.transforms import RandomResizedCrop

from solo.config import bind
from solo.data.random import Draws
from solo.data.views import Chance, ColorJitter, Crop, View, expand, sample
from solo.errors import ConfigError

N = 3000


def drawn(view: View, height: int, width: int) -> object:
    return sample(view, Draws(5, 0, np.arange(N), 0), np.full(N, height), np.full(N, width))


@pytest.mark.parametrize(("height", "width", "scale"), [(32, 32, (0.08, 1.0)), (48, 20, (0.2, 1.0)), (10, 60, (0.5, 1.0))])
def test_crops_are_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    view = View(crop_size=32, rrc=Crop(crop_min_scale=scale[0], crop_max_scale=scale[1]))
    box = drawn(view, height, width).box
    torch.manual_seed(0)
    image = torch.zeros(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(N)])
    assert (box[:, :2] >= 0).all() and (box[:, 0] + box[:, 2] <= height).all() and (box[:, 1] + box[:, 3] <= width).all()
    for ours, published in zip(box.T, theirs.T, strict=True):
        assert stats.ks_2samp(ours, published).pvalue > 1e-4
    assert stats.ks_2samp(box[:, 2] / box[:, 3], theirs[:, 2] / theirs[:, 3]).pvalue > 1e-4


def test_fallback_is_the_centre() -> None:
    view = View(crop_size=8, rrc=Crop(crop_min_scale=1.0, crop_max_scale=1.0))
    image = torch.zeros(3, 10, 100)
    assert tuple(drawn(view, 10, 100).box[0]) == RandomResizedCrop.get_params(image, [1.0, 1.0], [3 / 4, 4 / 3])


def test_jitter_is_torchvisions() -> None:
    view = View(crop_size=32, color_jitter=ColorJitter(prob=1, brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1))
    params = drawn(view, 32, 32)
    published = TorchJitter(0.4, 1.5, 0.2, 0.1)
    torch.manual_seed(0)
    rows = [
        TorchJitter.get_params(published.brightness, published.contrast, published.saturation, published.hue) for _ in range(N)
    ]
    for part in range(4):
        assert stats.ks_2samp(params.factors[:, part], [row[1 + part] for row in rows]).pvalue > 1e-4
        assert stats.chisquare(np.bincount(params.order[:, part])).pvalue > 1e-4
    assert params.jitter.all()


def test_probabilities_and_blur() -> None:
    view = View(
        crop_size=32,
        grayscale=Chance(prob=0.2),
        gaussian_blur=Chance(prob=0.5),
        solarization=Chance(prob=0.1),
        equalization=Chance(prob=0.3),
        horizontal_flip=Chance(prob=0.5),
    )
    params = drawn(view, 32, 32)
    masks = (params.gray, params.blur, params.solarize, params.equalize, params.flip)
    for mask, prob in zip(masks, (0.2, 0.5, 0.1, 0.3, 0.5), strict=True):
        assert abs(mask.mean() - prob) < 4 * (prob * (1 - prob) / N) ** 0.5
    assert not params.jitter.any()
    assert stats.kstest(params.sigma, "uniform", (0.1, 1.9)).pvalue > 1e-4


def test_disabled_crop_is_the_centre_square() -> None:
    box = drawn(View(crop_size=32, rrc=Crop(enabled=False)), 20, 33).box
    assert (box == (0, 6, 20, 20)).all()


def test_large_crops_come_first() -> None:
    small, large = View(crop_size=18, num_crops=3), View(crop_size=32, num_crops=2)
    assert [view.crop_size for view in expand([small, large])] == [32, 32, 18, 18, 18]


def test_solo_learns_yaml_binds() -> None:
    block = {
        "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1},
        "color_jitter": {"prob": 0.8, "brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1},
        "grayscale": {"prob": 0.2},
        "gaussian_blur": {"prob": 0},
        "solarization": {"prob": 0.2},
        "equalization": {"prob": 0},
        "horizontal_flip": {"prob": 0.5},
        "crop_size": 32,
        "num_crops": 1,
    }
    assert bind(View, block).color_jitter.hue == 0.1


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"crop_size": 0}, "crop_size must be at least 1"),
        ({"crop_size": 8, "num_crops": 0}, "num_crops must be at least 1"),
        ({"crop_size": 8, "rrc": {"crop_min_scale": 0.0}}, "rrc.crop_min_scale"),
        ({"crop_size": 8, "rrc": {"crop_min_scale": 0.5, "crop_max_scale": 0.2}}, "rrc.crop_min_scale"),
        ({"crop_size": 8, "grayscale": {"prob": 1.5}}, "grayscale.prob must lie in [0, 1]"),
        ({"crop_size": 8, "color_jitter": {"prob": 1, "hue": 0.6}}, "color_jitter.hue"),
        ({"crop_size": 8, "color_jitter": {"prob": 1, "contrast": -1.0}}, "color_jitter.contrast"),
        ({"crop_size": 8, "color_jiter": {"prob": 1}}, "did you mean color_jitter"),
        ({}, "missing key crop_size"),
    ],
)
def test_wrong_views_are_named(block: dict, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(View, block)
    assert said in str(caught.value)
